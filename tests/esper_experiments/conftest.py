"""A tiny sweep that the command line runs in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

TINY = {
    "name": "tiny",
    "pairs": 6,
    "run": {
        "task": {"name": "spirals", "options": {"train_samples": 400, "held_out_samples": 200}},
        "host": {"name": "mlp", "options": {"hidden": [8]}},
        "train": {
            "steps": 600, "batch_size": 64, "learning_rate": 0.01, "interval_steps": 50,
        },
        "lattice": [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4}],
        "growth": {"ramp_steps": 50, "min_gain": -1e9, "min_explained_frac": -1e9},
    },
    "arms": {
        "host": {"lattice": []},
        "static-final": {"follow": "esper", "start": "grown"},
        "random": {"follow": "esper", "controller": {"name": "random"}},
        "esper": {"controller": {"name": "tamiyo", "options": {
            "patience_intervals": 1, "min_improvement_frac": 0.2,
        }}},
    },
    "question": {
        "treatment": "esper", "control": "host", "metric": "test_accuracy", "margin": 0.05,
        "secondary": [
            {"treatment": "esper", "control": "static-final"},
            {"treatment": "esper", "control": "random"},
        ],
    },
}  # fmt: skip


class TinySweep:
    """Writes the configuration into a folder and runs `esper ab` on it there."""

    def __init__(self, folder: Path, **changes: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.json = folder, folder / "out.json"
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump({**TINY, **changes}))

    def start(self) -> subprocess.Popen[str]:
        script = "from esper_experiments.entry import main; main()"
        command = [sys.executable, "-c", script, "ab", str(self.config), "--json", str(self.json)]
        return subprocess.Popen(
            command, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), *sys.path])},
        )  # fmt: skip

    def run(self) -> subprocess.CompletedProcess[str]:
        process = self.start()
        output, _ = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def records(self) -> list[Path]:
        return sorted(self.folder.glob("runs/*/trials/*.json"))

    def result(self) -> dict[str, object]:
        return json.loads(self.json.read_text())


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., TinySweep]:
    """Makes a tiny sweep with some keys changed, `at` a folder of its own if there are several."""
    return lambda at="", **changes: TinySweep(tmp_path / at, **changes)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinySweep, str]:
    """A finished tiny sweep, and what it printed."""
    sweep = TinySweep(tmp_path_factory.mktemp("undisturbed"))
    done = sweep.run()
    assert done.returncode == 0, done.stdout
    return sweep, done.stdout
