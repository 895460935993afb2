"""Sweeps on several Ray nodes, of which one dies and one is cut off; and on trials of shards."""

import json
import os
import signal
import time

import pytest

from esper.evidence.progress import FILE, read_progress
from esper.evidence.records import TrialRecord
from esper_experiments.on_ray import _PlanSearcher
from esper_experiments.room import Room, _fit, _in_turn

LONG = {
    "run": {
        "task": {"name": "spirals", "options": {"train_samples": 400, "held_out_samples": 200}},
        "host": {"name": "mlp", "options": {"hidden": [8]}},
        "train": {"steps": 4000, "batch_size": 64, "learning_rate": 0.01, "interval_steps": 50},
        "lattice": [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4}],
        "growth": {"ramp_steps": 50, "min_gain": -1e9, "min_explained_frac": -1e9},
    },
    "arms": {
        "host": {"lattice": []},
        "esper": {"controller": {"name": "tamiyo", "options": {
            "patience_intervals": 1, "min_improvement_frac": 0.2,
        }}},
    },
    "question": {
        "treatment": "esper", "control": "host", "metric": "test_accuracy", "margin": 0.05,
    },
    "resources": {"num_cpus": 2, "checkpoint_s": 1.0},
}  # fmt: skip


def decided(sweep):
    """What no accident may change."""
    result = sweep.result()
    kept = ("verdict", "pairs", "mean_difference", "p_value", "reasons")
    return {k: result[k] for k in kept}


def untimed(sweep):
    """Every record without what no two runs have in common."""
    found = {}
    for path in sweep.records():
        record = json.loads(path.read_text())
        for key in ("started_at", "ended_at", "registration_hash"):
            del record[key]
        for name in ("train_seconds", "growth_seconds"):
            del record["metrics"][name]
        del record["curves"]["train_seconds"]
        found[path.stem] = record
    return found


def progress_of(sweep):
    (path,) = sweep.folder.glob(f"runs/*/{FILE}")
    return read_progress(path)


def wait_for(sweep, ready, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if [*sweep.folder.glob(f"runs/*/{FILE}")] and ready(progress_of(sweep)):
            return
        time.sleep(0.2)
    pytest.fail(f"nothing of the kind in {seconds} s: {progress_of(sweep)}")


def saved(sweep):
    return [*sweep.folder.glob("runs/*/checkpoints/*/manifest.json")]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_dies_and_one_is_cut_off_and_nothing_is_lost(cluster, make_sweep, monkeypatch):
    alone = make_sweep("alone", **LONG)
    assert (done := alone.run()).returncode == 0, done.stdout

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    sweep = make_sweep("disturbed", **LONG)
    driver = sweep.start()
    _, _, cut, dead = cluster.list_all_nodes()
    wait_for(sweep, lambda p: p.counts()["running"] == 3 and len(saved(sweep)) == 3)
    cluster.remove_node(dead, allow_graceful=False)
    wait_for(sweep, lambda p: p.counts()["finished"] >= 2)
    raylet = cut.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        # its trial is taken over while its worker, which nobody can reach, goes on
        wait_for(sweep, lambda p: sum(t.failures for t in p.trials.values()) >= 2)
        output, _ = driver.communicate(timeout=240)
    finally:
        os.kill(raylet, signal.SIGCONT)
    assert driver.returncode == 0, output
    assert decided(sweep) == decided(alone)
    assert untimed(sweep) == untimed(alone)
    assert progress_of(sweep).outcome == "ended"
    assert not saved(sweep)


@pytest.mark.slow
def test_a_killed_drivers_trials_go_on_from_their_checkpoints(make_sweep):
    sweep = make_sweep(**LONG)
    driver = sweep.start()
    wait_for(sweep, lambda p: p.counts()["running"] == 2 and len(saved(sweep)) == 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert progress_of(sweep).driver_lives is False
    steps = {path.parent.name for path in saved(sweep)}
    again = sweep.start()
    # the first news of these trials is of later steps than those of a new one would be
    first = {}

    def heard(progress):
        if progress.pid != again.pid:
            return False
        first.update(
            (n, t.step) for n, t in progress.trials.items() if n in steps - set(first) and t.step
        )
        return set(first) == steps

    wait_for(sweep, heard)
    assert min(first.values()) > 100
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert len(sweep.records()) == 12


@pytest.mark.slow
def test_a_test_that_looks_after_every_pair_ends_the_sweep_early(make_sweep):
    run = {**LONG["run"], "train": {**LONG["run"]["train"], "steps": 100}}
    question = {"treatment": "fast", "control": "slow", "metric": "test_loss", "margin": 0.001,
                "higher_is_better": False, "test": "e_process"}  # fmt: skip
    arms = {"fast": {}, "slow": {"train": {"learning_rate": 1e-6}}}
    sweep = make_sweep(
        run=run | {"lattice": []}, arms=arms, pairs=40, question=question,
        resources=LONG["resources"],
    )  # fmt: skip
    done = sweep.run()
    assert done.returncode == 0, done.stdout
    assert sweep.result()["verdict"] == "WIN"
    assert sweep.result()["pairs"] == 8
    assert 16 <= len(sweep.records()) <= 24
    counts = progress_of(sweep).counts()
    assert counts["not needed"] == 80 - len(sweep.records())


@pytest.mark.slow
def test_trials_of_two_shards(make_sweep):
    resources = {"num_cpus": 2, "cpus_per_trial": 2, "shards": 2}
    sweep = make_sweep(**{**LONG, "pairs": 2, "resources": resources})
    done = sweep.run()
    assert done.returncode == 0, done.stdout
    for path in sweep.records():
        record = TrialRecord.model_validate_json(path.read_text())
        assert set(record.curves["shards"]) == {2.0}


class Plan:
    """Trials of two arms, of which the second follows the first."""

    def __init__(self, pairs):
        from types import SimpleNamespace as Any

        self.trials = [
            Any(
                spec=Any(trial_id=f"{arm}-{pair:03d}", pair=pair),
                waits_for=f"a-{pair:03d}" if arm == "b" else None,
            )
            for pair in range(pairs)
            for arm in "ab"
        ]


def test_both_arms_of_a_pair_get_one_kind_of_gpu():
    nodes = {"x": {"accelerator_type:A": 1.0, "GPU": 3.0, "CPU": 8.0},
             "y": {"accelerator_type:B": 1.0, "GPU": 1.0, "CPU": 8.0},
             "z": {"CPU": 8.0}}  # fmt: skip
    need = {"CPU": 1.0, "GPU": 1.0}
    fits = {name: _fit(node, need) for name, node in nodes.items()}
    assert fits == {"x": 3, "y": 1, "z": 0}
    kinds = _in_turn(nodes, fits)
    assert sorted(kinds) == ["accelerator_type:A"] * 3 + ["accelerator_type:B"]
    assert _in_turn({"x": nodes["x"]}, {"x": 3}) == ()

    room = Room(4, 4.0, kinds)
    searcher = _PlanSearcher(Plan(8).trials, set(), lambda: 8, room.kinds, 100)
    given = {}
    while isinstance(config := searcher.suggest(f"t{len(given)}"), dict):
        given[config["trial"]] = config["kind"]
        searcher.on_trial_complete(f"t{len(given) - 1}")
    assert len(given) == 16
    for pair in range(8):
        assert given[f"a-{pair:03d}"] == given[f"b-{pair:03d}"] == kinds[pair % 4]


def test_fractions_of_a_gpu_are_counted_as_ray_does():
    assert _fit({"GPU": 1.0}, {"GPU": 0.1}) == 10
    assert _fit({"GPU": 0.9999}, {"GPU": 0.3333}) == 3
    assert _fit({"CPU": 8.0}, {"GPU": 0.5}) == 0


def test_no_more_drivers_of_shards_than_fit_at_once():
    searcher = _PlanSearcher(Plan(4).trials, set(), lambda: 4, (), 1)
    assert searcher.suggest("t0")["trial"] == "a-000"
    assert searcher.suggest("t1") is None
    searcher.on_trial_complete("t0")
    assert searcher.suggest("t1")["trial"] == "b-000"


def test_a_decided_question_needs_no_trial_any_more():
    wanted = [4]
    searcher = _PlanSearcher(Plan(4).trials, set(), lambda: wanted[0], (), 100)
    for _ in range(3):
        searcher.suggest(f"t{len(searcher._running)}")
    assert not searcher.decided
    wanted[0] = 0
    searcher.look()
    assert searcher.decided
