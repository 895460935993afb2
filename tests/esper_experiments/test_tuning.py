"""Searches for real: Ray Tune's own searchers and schedulers, a budget, an interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from esper.cli.main import app
from esper.config.run import load_run
from esper.config.sweep import load_sweep

TINY = {
    "name": "tiny",
    "run": {
        "task": {"name": "spirals", "options": {"train_samples": 200, "held_out_samples": 100}},
        "host": {"name": "mlp", "options": {"hidden": [8]}},
        "train": {"steps": 200, "batch_size": 50, "interval_steps": 20},
        "lattice": [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4}],
        "growth": {"ramp_steps": 20, "min_gain": -1e9, "min_explained_frac": -1e9},
        "controller": {"name": "tamiyo", "options": {"patience_intervals": 1}},
    },
    "space": {
        "train.learning_rate": {"loguniform": [0.0001, 0.1]},
        "controller.options.min_improvement_frac": {"uniform": [0.01, 0.3]},
    },
    "budget_runs": 4,
    "confirm": {"pairs": 2, "metric": "test_accuracy", "margin": 0.01},
    "resources": {"num_cpus": 2},
}


class Search:
    """`esper tune` in a folder of its own."""

    def __init__(self, folder, **changes):
        self.folder = folder
        (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes))

    def start(self, *options):
        script = "from esper_experiments.entry import main; main()"
        command = [sys.executable, "-c", script, "tune", "tiny.yaml", "--json", "out.json"]
        return subprocess.Popen(
            [*command, *options], cwd=self.folder, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    def run(self, *options):
        process = self.start(*options)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        return output

    @property
    def result(self):
        return json.loads((self.folder / "out.json").read_text())

    @property
    def place(self):
        (path,) = self.folder.glob("runs/tiny-????????-????????")
        return path

    def ledger(self):
        path = next(iter(self.folder.glob("runs/*/candidates.json")), None)
        return {} if path is None else json.loads(path.read_text())


def test_a_search_finds_and_tests_at_its_budget(tmp_path):
    search = Search(tmp_path)
    output = search.run()
    result = search.result
    candidates = result["candidates"]
    assert len(candidates) == 4
    assert result["used_steps"] == sum(c["used_steps"] for c in candidates.values()) == 800
    values = {name: c["value"] for name, c in candidates.items()}
    assert result["best"] == min(values, key=values.get)
    assert "[100% of the budget]" in output

    best = candidates[result["best"]]["values"]
    run = load_run(search.place / "best.yaml")
    assert run.train.learning_rate == best["train.learning_rate"]
    sweep = load_sweep(search.place / "confirm.yaml")
    assert sweep.run_config("tuned") == run
    assert result["confirmation"]["pairs"] == 2
    seeds = {json.loads(p.read_text())["seed"] for p in tmp_path.glob("runs/*-confirm-*/trials/*")}
    assert seeds == {0, 1}
    searched = {json.loads(p.read_text())["seed"] for p in search.place.glob("trials/*")}
    assert searched == {1000}

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'esper'")
    runs = client.search_runs([experiment.experiment_id], "tags.verdict = 'none'")
    assert len(runs) == 1
    where = f"tags.`mlflow.parentRunId` = '{runs[0].info.run_id}'"
    children = client.search_runs([experiment.experiment_id], where)
    assert len(children) == 4
    assert result["best"] in runs[0].data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_asha_starts_more_and_ends_the_worse_ones_within_the_budget(tmp_path):
    search = Search(tmp_path, search="optuna", budget_runs=6, asha={"grace_steps": 20})
    search.run("--search-only")
    candidates = search.result["candidates"].values()
    assert len(candidates) > 6
    assert any(not c["ended"] for c in candidates)
    # trials under way when it is used up add at most a report each
    assert 1200 <= search.result["used_steps"] <= 1200 + 2 * 20
    assert search.result["confirmation"] is None


@pytest.mark.slow
def test_the_worst_of_a_population_goes_on_as_the_best_with_other_settings(tmp_path):
    search = Search(tmp_path, pbt={"every_steps": 40}, resources={"num_cpus": 2})
    search.run("--search-only")
    candidates = search.result["candidates"].values()
    assert len(candidates) == 4
    assert all(c["ended"] == (c["steps"] == 200) for c in candidates)
    # who goes on from another's checkpoint repeats steps, and these count
    used = sum(c["used_steps"] for c in candidates)
    assert used == search.result["used_steps"] <= 4 * 200
    assert any(c["ended"] for c in candidates)
    assert all(c["ended"] for c in candidates) or used == 4 * 200
    changed = [c for c in candidates if len(c["changes"]) > 1]
    assert changed
    for c in changed:
        steps = [step for step, _ in c["changes"]]
        assert steps == sorted(steps)
        assert steps[0] == 0
        assert steps[1] >= 40
        assert c["values"] == c["changes"][-1][1]


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_stopped(tmp_path):
    train = {**TINY["run"]["train"], "steps": 4000}
    search = Search(tmp_path, run=TINY["run"] | {"train": train}, budget_runs=6)
    driver = search.start("--search-only")
    end = time.monotonic() + 90
    while sum(c["ended"] for c in search.ledger().values()) < 2:
        assert time.monotonic() < end, search.ledger()
        time.sleep(0.2)
    time.sleep(5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {k: c for k, c in search.ledger().items() if c["ended"]}
    written = {p: p.stat().st_mtime_ns for p in search.place.glob("trials/*")}
    search.run("--search-only")
    after = search.result["candidates"]
    assert len(after) == 6
    assert {k: after[k] for k in before} == before
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert search.result["used_steps"] == 6 * 4000


def test_a_wrong_option_of_a_plugin_is_refused_before_ray_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Search(tmp_path, space={"controller.options.patience": {"choice": [1, 2]}})
    done = CliRunner().invoke(app, ["tune", "tiny.yaml"])
    assert done.exit_code == 2
    assert "patience" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_the_task_does_not_have_is_refused(tmp_path):
    search = Search(tmp_path, metric="held_out_bleu")
    process = search.start()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "held_out_bleu" in output
