"""A tiny sweep that the command line runs in a process of its own; and nodes of Ray for it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster

# a node that does not answer is given up after a second or two
SYSTEM = {
    "health_check_initial_delay_ms": 500, "health_check_period_ms": 500,
    "health_check_timeout_ms": 500, "health_check_failure_threshold": 3,
}  # fmt: skip
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


def cluster_of(nodes: int, **common: object) -> Cluster:
    """A head without room, and nodes with room for one trial or shard each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": SYSTEM}
        | common,
    )
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, **common)
    cluster.wait_for_nodes()
    return cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head, and three nodes with room for one trial or shard each."""
    cluster = cluster_of(3)
    yield cluster
    cluster.shutdown()
