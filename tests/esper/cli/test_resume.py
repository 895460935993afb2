"""A run that is killed goes on from its checkpoint as if nothing had happened."""

import json
import os
import signal
import subprocess

import pytest
import yaml
from tests.esper.cli.conftest import CLI, esper_process

from esper.cli.log import diff

CONFIG = {
    "task": {"name": "spirals", "options": {"train_samples": 200}},
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 1500, "batch_size": 50, "learning_rate": 0.01, "interval_steps": 50},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4}],
    "growth": {"ramp_steps": 50, "fine_tuning_intervals": 4, "min_gain": -1e9},
    "controller": {
        "name": "random",
        "options": {"at_intervals": [2, 8, 14, 20], "count": 1},
    },
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path, config):
    undisturbed = esper_process("run", config, "--seed", "5", "--json", "a.json", cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = subprocess.Popen(
        [*CLI, "run", str(config), "--seed", "5", "--checkpoint", "state", "--every", "1"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 600 "):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    manifest = json.loads((tmp_path / "state" / "manifest.json").read_text())
    assert 550 <= manifest["trainer"]["step"] < 1500
    resumed = esper_process("run", "--resume", "state", "--json", "b.json", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"step {manifest['trainer']['step'] + 50} " in resumed.stdout.splitlines()[0]
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "ab")
    for record in (first, second):
        for key in ("started_at", "ended_at", "mlflow_run_id"):
            del record[key]
        for key in ("metrics", "curves"):
            for name in ("train_seconds", "growth_seconds"):
                record[key].pop(name, None)
    assert second == first
    assert len(first["transitions"]) > 20
    # the checkpoint was kept up to date, and holds the whole log
    assert diff(tmp_path / "a.json", tmp_path / "state")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either CONFIG or --resume"),
        (["run.yaml", "--resume", "state"], "give either CONFIG or --resume"),
        (["--resume", "state", "--seed", "1"], "takes seed and decisions from the"),
        (["--resume", "nowhere"], "must be a checkpoint folder"),
        (["run.yaml", "--replay", "nowhere.json"], "No such file"),
        (["run.yaml", "--every", "0"], "--every"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, config, arguments, message):
    done = esper_process("run", *arguments, cwd=tmp_path)
    assert done.returncode in (2, 3)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]


def test_other_code_does_not_continue_a_run(tmp_path, config):
    from esper.config.run import load_run
    from esper.evidence.records import Fingerprint
    from esper.trial import Trial, TrialSpec

    mark = Fingerprint(code_hash="0" * 64, commit=None, versions={}, device="cpu")
    trial = Trial(load_run(config), TrialSpec("run", 0, 0, 0, "none", mark))
    trial.save(tmp_path / "state")
    done = esper_process("run", "--resume", "state", cwd=tmp_path)
    assert done.returncode == 2
    assert "must be continued by the code that wrote it (000000000000)" in done.stderr
