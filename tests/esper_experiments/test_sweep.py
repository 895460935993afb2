"""`esper ab` for real: Ray, a SQLite-backed MLflow, an interrupted driver, a broken plug-in."""

import os
import signal
import time

import pytest
from mlflow import MlflowClient

from esper.evidence.progress import FILE, read_progress
from esper.evidence.records import TrialRecord

ARMS = ("host", "static-final", "random", "esper")


def facts(result):
    """What must not depend on when and how often the sweep was interrupted."""
    arms = {
        name: {k: v for k, v in arm.items() if k != "train_seconds"}
        for name, arm in result["arms"].items()
    }
    secondary = [{k: v for k, v in s.items() if k != "reasons"} for s in result["secondary"]]
    kept = ("verdict", "treatment", "control", "pairs", "mean_difference", "p_value", "reasons")
    return {**{k: result[k] for k in kept}, "arms": arms, "secondary": secondary}


def test_the_result_file_holds_what_it_promises(undisturbed):
    sweep, output = undisturbed
    result = sweep.result()
    assert result["verdict"] in {"WIN", "LOSE", "EQUIVALENT", "INCONCLUSIVE"}
    assert result["pairs"] == 6
    assert set(result["arms"]) == set(ARMS)
    for arm in result["arms"].values():
        assert {"mean", "sd", "worst", "parameters"} <= set(arm)
    assert result["arms"]["esper"]["parameters"] > result["arms"]["host"]["parameters"]
    assert result["arms"]["static-final"]["parameters"] == result["arms"]["esper"]["parameters"]
    assert result["arms"]["random"]["parameters"] == result["arms"]["esper"]["parameters"]
    assert result["verdict"] in output
    assert str(result["mlflow_run_id"]) in output
    assert "[24/24]" in output
    assert "about 0 s left" in output


def test_the_arms_of_a_pair_share_their_seed_and_warm_workers_ran_many_trials(undisturbed):
    sweep, _ = undisturbed
    records = [TrialRecord.model_validate_json(p.read_text()) for p in sweep.records()]
    assert len(records) == 24
    for pair in range(6):
        assert {r.seed for r in records if r.pair == pair} == {pair}
    # new processes would each spend seconds on imports
    (path,) = sweep.folder.glob(f"runs/*/{FILE}")
    places = {trial.place for trial in read_progress(path).trials.values()}
    assert None not in places
    # a worker that starts late may find nothing left to do
    assert len(places) <= 2


def test_mlflow_holds_the_sweep_with_nested_trials_verdict_and_pictures(undisturbed):
    sweep, _ = undisturbed
    client = MlflowClient(f"sqlite:///{sweep.folder}/mlflow.db")
    parent = client.get_run(sweep.result()["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["verdict"] == sweep.result()["verdict"]
    where = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], where)
    assert len(children) == 24
    assert {c.info.status for c in children} == {"FINISHED"}
    history = client.get_metric_history(children[0].info.run_id, "train_loss")
    assert [m.step for m in history] == list(range(50, 601, 50))
    names = {a.path for a in client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"pictures/growth_curves.png", "pictures/forest_plot.png"} <= names
    assert "pictures/lattice_over_time.png" in names


def test_the_same_command_again_runs_nothing_and_says_the_same(undisturbed):
    sweep, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in sweep.records()}
    first = sweep.result()
    started = time.monotonic()
    again = sweep.run()
    assert again.returncode == 0, again.stdout
    assert "24 of 24 trials had finished before" in again.stdout
    assert time.monotonic() - started < 30
    assert {p: p.stat().st_mtime_ns for p in sweep.records()} == before
    assert facts(sweep.result()) == facts(first)
    assert sweep.result()["mlflow_run_id"] == first["mlflow_run_id"]


def wait_for_records(process, sweep, least):
    deadline = time.monotonic() + 120
    while len(sweep.records()) < least and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    assert len(sweep.records()) >= least


def test_a_killed_driver_loses_no_finished_trial_and_changes_no_verdict(undisturbed, make_sweep):
    sweep = make_sweep()
    process = sweep.start()
    wait_for_records(process, sweep, 6)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # workers whose driver is gone may still end the trial they are at
    time.sleep(5)
    before = {p: p.stat().st_mtime_ns for p in sweep.records()}
    assert 6 <= len(before) < 24
    done = sweep.run()
    assert done.returncode == 0, done.stdout
    assert f"{len(before)} of 24 trials had finished before" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert facts(sweep.result()) == facts(undisturbed[0].result())
    client = MlflowClient(f"sqlite:///{sweep.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("esper")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == 25
    assert {r.info.status for r in runs} == {"FINISHED"}


@pytest.mark.slow
def test_ctrl_c_ends_with_a_hint_and_the_same_command_continues(make_sweep):
    sweep = make_sweep(pairs=3)
    process = sweep.start()
    wait_for_records(process, sweep, 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (4, 130), output
    assert "same command" in output
    assert "Traceback" not in output
    done = sweep.run()
    assert done.returncode == 0, done.stdout
    assert len(sweep.records()) == 12


BROKEN = """
from esper.controller.base import CONTROLLERS, ControllerOptions

class Broken:
    def decide(self, report):
        raise ArithmeticError("planted on purpose")

@CONTROLLERS.register("broken")
class BrokenOptions(ControllerOptions):
    def build(self, seed, events=()):
        return Broken()
"""


@pytest.mark.slow
def test_a_trial_that_fails_is_named_and_the_others_are_kept(make_sweep, tmp_path):
    (tmp_path / "broken_plugin.py").write_text(BROKEN)
    arms = {"host": {"lattice": []}, "esper": {"controller": {"name": "broken"}}}
    question = {"treatment": "esper", "control": "host", "metric": "test_accuracy", "margin": 0.05}
    sweep = make_sweep(pairs=2, arms=arms, question=question)
    text = sweep.config.read_text().replace("run:\n", "run:\n  plugins: [broken_plugin]\n")
    sweep.config.write_text(text)
    done = sweep.run()
    assert done.returncode == 4, done.stdout
    assert "2 trials have no record yet" in done.stdout
    assert "planted on purpose" in done.stdout
    assert len(sweep.records()) == 2


def test_a_wrong_config_is_refused_with_status_2_and_nothing_is_written(make_sweep):
    sweep = make_sweep()
    text = sweep.config.read_text().replace("interval_steps", "interval_stepz")
    sweep.config.write_text(text)
    done = sweep.run()
    assert done.returncode == 2
    assert "did you mean 'interval_steps'?" in done.stdout
    assert sorted(p.name for p in sweep.folder.iterdir()) == ["tiny.yaml"]


def test_an_unreachable_mlflow_is_refused_with_status_3_before_any_trial(make_sweep):
    sweep = make_sweep(mlflow={"tracking_uri": "http://127.0.0.1:9"})
    done = sweep.run()
    assert done.returncode == 3
    assert "must be reachable" in done.stdout
    assert not sweep.records()


@pytest.mark.slow
def test_a_sweep_goes_on_when_nobody_reads_its_output(make_sweep):
    sweep = make_sweep(pairs=2)
    process = sweep.start()
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=200)
    assert len(sweep.records()) == 8
    assert sweep.result()["pairs"] == 2
