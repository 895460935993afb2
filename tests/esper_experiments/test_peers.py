"""The package `gromo` as an arm: same start, same data and steps, within the same budget."""

import sys

import pytest
import torch

from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.evidence.records import Fingerprint
from esper.trial import Trial, TrialSpec
from esper_experiments.peers import GromoTrial, trial_of

CONFIG = {
    "task": {"name": "spirals", "options": {"train_samples": 400, "held_out_samples": 200}},
    "host": {"name": "mlp", "options": {"hidden": [4, 4]}},
    "train": {"steps": 300, "batch_size": 64, "learning_rate": 0.01, "interval_steps": 50},
    "growth": {"max_parameters": 80},
    "controller": {"name": "gromo", "options": {"at_intervals": [1, 2, 3, 4], "count": 4}},
}


def build(kind=None, **changes):
    config = RunConfig.model_validate({**CONFIG, **changes})
    mark = Fingerprint(code_hash="", commit=None, versions={}, device="cpu")
    return (kind or trial_of(config))(config, TrialSpec("gromo", 0, 3, 0, "", mark))


def finished(**changes):
    trial = build(**changes)
    while not trial.done:
        trial.run_for(0.0)
    return trial.record()


def test_the_controllers_name_decides_who_runs_an_arm():
    assert trial_of(RunConfig.model_validate(CONFIG)) is GromoTrial
    ours = RunConfig.model_validate({**CONFIG, "controller": {"name": "static"}})
    assert trial_of(ours) is Trial


def test_without_the_package_the_arm_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gromo", None)
    monkeypatch.setitem(sys.modules, "gromo.containers.growing_mlp", None)
    with pytest.raises(ConfigError, match="pip install gromo"):
        build()


@pytest.mark.parametrize(
    "changes",
    [
        {"host": {"name": "mlp", "options": {"hidden": [4, 6]}}},
        {"lattice": [{"sites": "fc1", "seeds_per_layer": 2, "hidden": 2}]},
    ],
)
def test_a_network_that_gromo_cannot_take_over_is_refused(changes):
    with pytest.raises(ConfigError, match="must have a host 'mlp' with hidden layers of one width"):
        build(**changes)


class TestWithTheRealPackage:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("gromo", reason="the optional peer is not installed")

    def test_it_starts_as_the_host_of_its_pair(self):
        ours = build(Trial, controller={"name": "static"})
        theirs = build()
        x, _ = theirs.trainer.data.test
        torch.testing.assert_close(theirs.trainer.model(x), ours.trainer.model(x))

    def test_it_grows_at_its_times_within_the_budget_and_what_that_takes_is_counted(self):
        record = finished()
        parameters = record.curves["parameters"]
        # a point is observed after growing; at the end nothing grows any more
        assert parameters[0] > 42
        assert parameters == sorted(parameters)
        assert 70 < parameters[-1] <= 80
        assert record.metrics["growth_flops"] > 0
        assert record.metrics["steps"] == 300
        assert record.metrics["train_flops"] > finished(
            controller={"name": "static"}
        ).metrics["train_flops"]  # fmt: skip

    def test_it_is_the_same_each_time(self):
        one, again = finished(), finished()
        assert one.curves["train_loss"] == again.curves["train_loss"]

    def test_growing_helps(self):
        grown, host = finished(), finished(controller={"name": "static"})
        assert grown.metrics["train_loss"] < 0.9 * host.metrics["train_loss"]
