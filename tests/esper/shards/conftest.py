"""Small runs that grow, for shards of every kind."""

import math
import time
from pathlib import Path

import pytest
import ray

from esper.config.run import RunConfig
from esper.evidence.records import Fingerprint
from esper.trial import TrialSpec

MARK = Fingerprint(code_hash="c", commit=None, versions={"torch": "2"}, device="cpu")
RUN = {
    "task": {
        "name": "spirals",
        "options": {"train_samples": 200, "held_out_samples": 100, "test_samples": 100},
    },
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 200, "batch_size": 40, "interval_steps": 10, "learning_rate": 0.01},
    "lattice": [
        {"sites": "fc1", "seeds_per_layer": 4, "hidden": 4},
        {"sites": "fc1->out", "seeds_per_layer": 4, "geometry": "span"},
    ],
    # what is woken stays and lives through all stages
    "growth": {"ramp_steps": 8, "fine_tuning_intervals": 2, "min_gain": -1e9,
               "min_explained_frac": -1e9, "max_instability_frac": 1e9, "max_drift_frac": 1e9},
    "controller": {"name": "random", "options": {"at_intervals": [2, 5], "count": 2}},
}  # fmt: skip
SPEC = TrialSpec("arm", 0, 3, 1, "registered", MARK)


def run_config(**changes):
    return RunConfig.model_validate(RUN | changes)


def finish(trial):
    """The record of a trial that runs to its end; its shards are closed."""
    trial.run_for(math.inf)
    record = trial.record()
    trial.shard.close()
    return record


def moves(record):
    """What became of the seeds, without the reasons."""
    return [(t.interval, t.site, t.seed, t.before, t.after) for t in record.transitions]


def until_ended(pids, wait_s=20.0):
    """Processes that are only not yet collected have ended."""
    deadline = time.monotonic() + wait_s
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="package")
def cluster():
    """Ray on this machine, for the tests of this folder that ask for it."""
    # not a cluster that someone else has on this machine
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def make_config():
    return run_config


@pytest.fixture
def spec():
    return SPEC


@pytest.fixture
def finished():
    return finish


@pytest.fixture
def steps():
    return moves


@pytest.fixture
def require_ended():
    return until_ended
