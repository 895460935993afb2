"""`esper arena` for real: two tiny tasks on Ray, MLflow in SQLite, and the same command again."""

import os
import subprocess
import sys

import pytest
import yaml
from mlflow import MlflowClient

from esper.evidence.arena import ArenaSummary

SPIRALS = {
    "name": "tiny_spirals",
    "run": {
        "task": {"name": "spirals", "options": {"train_samples": 400, "held_out_samples": 200}},
        "host": {"name": "mlp", "options": {"hidden": [2]}},
        "train": {"steps": 400, "batch_size": 64, "learning_rate": 0.01, "interval_steps": 20},
        "lattice": [{"sites": "fc1->out", "seeds_per_layer": 8, "geometry": "span"}],
        "growth": {"ramp_steps": 20, "min_gain": -1e9, "min_explained_frac": -1e9},
    },
    "arms": {
        "host": {"lattice": []},
        "wide": {"lattice": [], "host": {"options": {"hidden": [16]}}},
        "static-final": {"follow": "esper", "start": "grown"},
        "esper": {"controller": {"name": "schedule", "options": {
            "blueprint": "mlp_relu", "at_intervals": [2, 6], "count": 4,
        }}},
    },
    "question": {
        "treatment": "esper", "control": "host", "metric": "test_accuracy", "margin": 0.05,
    },
}  # fmt: skip
DIGITS = {
    **SPIRALS,
    "name": "tiny_digits",
    "run": {**SPIRALS["run"], "task": {"name": "digits"}},
}
ARENA = {
    "name": "quick",
    "pairs": 2,
    "methods": {"host": {}, "static-final": {}, "static-full": {"of": "wide"}, "esper": {}},
    "scale": {"one": ["static-final", "static-full"]},
    "tasks": {
        "spirals": {"sweep": "spirals.yaml"},
        "digits": {
            "sweep": "digits.yaml",
            "methods": {"static-final": {"not_applicable": "left out on purpose"}},
        },
    },
}


def arena_command(folder, *options):
    script = "from esper_experiments.entry import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, "arena", "arena.yaml", *options],
        cwd=folder, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ,
    )  # fmt: skip


def write(folder, **changes):
    contents = {"spirals": SPIRALS, "digits": DIGITS, "arena": {**ARENA, **changes}}
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def facts(summary):
    """What must not depend on when and how often the arena was interrupted."""
    methods = {
        (name, method): (m.score, m.arm.mean, m.arm.parameters_mean, m.arm.train_flops_mean)
        for name, task in summary.tasks.items()
        for method, m in task.methods.items()
    }
    return methods, summary.aggregates, summary.verdicts()


@pytest.mark.slow
def test_an_arena_runs_reports_and_goes_on_where_it_stopped(tmp_path):
    write(tmp_path)
    outputs = ("--json", "out.json", "--html", "report.html")
    done = arena_command(tmp_path, *outputs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "task 2 of 2: digits, 3 methods" in done.stdout
    assert "static-final does not apply to digits: left out on purpose" in done.stdout

    summary = ArenaSummary.model_validate_json((tmp_path / "out.json").read_text())
    assert list(summary.tasks) == ["spirals", "digits"]
    assert len(summary.verdicts()) == 5
    assert {v.verdict for v in summary.verdicts()} == {"INCONCLUSIVE"}
    assert set(summary.aggregates) == set(ARENA["methods"])
    esper = summary.tasks["spirals"].methods["esper"].arm
    static = summary.tasks["spirals"].methods["static-final"].arm
    assert esper.parameters_mean == static.parameters_mean
    assert "left out on purpose" in (tmp_path / "report.html").read_text()

    # one experiment: the arena's run, its two sweeps below it, their trials below them
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("arena")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert {r.info.status for r in runs} == {"FINISHED"}
    (top,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    sweeps = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == top.info.run_id]
    assert {r.info.run_name for r in sweeps} == {"quick-spirals", "quick-digits"}
    assert len(runs) == 1 + 2 + 2 * (4 + 3)
    assert "of 5 comparisons" in top.data.tags["verdict"]
    assert {"report.html", "summary.json", "pictures"} <= {
        a.path for a in client.list_artifacts(top.info.run_id)
    }

    # one trial is lost: the same command runs that one alone and says the same
    lost = next(tmp_path.glob("runs/quick-digits-*/trials/esper-001.json"))
    lost.unlink()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/trials/*.json")}
    again = arena_command(tmp_path, *outputs)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "8 of 8 trials had finished before" in again.stdout
    assert "5 of 6 trials had finished before" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert facts(ArenaSummary.model_validate_json((tmp_path / "out.json").read_text())) == facts(
        summary
    )
    assert len(client.search_runs([experiment.experiment_id], max_results=100)) == len(runs)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"tretment": "esper"}, (), "did you mean 'treatment'?"),
        ({}, ("--pairs", "1"), "--pairs"),
        (
            {"methods": {**ARENA["methods"], "odd": {"of": "esper", "change": {
                "lattice": [{"sites": "fc9", "seeds_per_layer": 1}]}}}},
            (),
            "task 'spirals' is not valid",
        ),
    ],
)  # fmt: skip
def test_a_wrong_arena_is_refused_before_anything_starts(tmp_path, changes, options, message):
    write(tmp_path, **changes)
    done = arena_command(tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.suffix for p in tmp_path.iterdir()} == {".yaml"}
