"""Small runs that grow, for shards of every kind."""

import json

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


def untimed(record):
    """A record without what no two runs have in common."""
    content = json.loads(record.model_dump_json(exclude={"started_at", "ended_at"}))
    for timed in ("train_seconds", "growth_seconds"):
        del content["metrics"][timed]
    del content["curves"]["train_seconds"]
    return content


@pytest.fixture(scope="package")
def cluster():
    """Ray on this machine, for the tests of this folder that ask for it."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def make_config():
    return run_config


@pytest.fixture
def spec():
    return SPEC


@pytest.fixture
def without_times():
    return untimed
