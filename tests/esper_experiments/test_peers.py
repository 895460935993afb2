"""The package `gromo` as an arm: same start, same data and steps, within the same budget."""

import sys

import pytest
import torch

from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.config.sweep import Resources
from esper.earlier_trials import kept_events
from esper.environment import code_hash
from esper.evidence.records import Fingerprint, write_json
from esper.trial import Trial, TrialSpec
from esper_experiments.peers import GromoTrial, trial_of
from esper_experiments.plan import Planned, read_record, record_path
from esper_experiments.worker import TrialWorker

CONFIG = {
    "task": {"name": "spirals", "options": {"train_samples": 400, "held_out_samples": 200}},
    "host": {"name": "mlp", "options": {"hidden": [4, 4]}},
    "train": {"steps": 300, "batch_size": 64, "learning_rate": 0.01, "interval_steps": 50},
    "follow": "other",
    "controller": {"name": "gromo"},
}
SPAN = {"seeds_per_layer": 8, "geometry": "span"}
SCHEDULE = {
    **CONFIG,
    "follow": None,
    "lattice": [{"sites": "fc1->fc2", **SPAN}, {"sites": "fc2->out", **SPAN}],
    "growth": {"training_intervals": 0, "stabilization_intervals": 0, "ramp_steps": 1,
               "min_gain": None},
    "controller": {"name": "schedule", "options": {
        "blueprint": "mlp_relu", "at_intervals": [1, 3], "count": 6,
    }},
}  # fmt: skip


def build(kind=None, followed=None, **changes):
    config = RunConfig.model_validate({**CONFIG, **changes})
    mark = Fingerprint(code_hash="", commit=None, versions={}, device="cpu")
    spec = TrialSpec("arm", 0, 3, 0, "", mark)
    return (kind or trial_of(config))(config, spec, followed)


def finished(followed=None, **changes):
    trial = build(followed=followed, **changes)
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
        {"follow": None},
    ],
)
def test_a_network_that_gromo_cannot_take_over_is_refused(changes):
    with pytest.raises(ConfigError, match="must have a host 'mlp' with hidden layers of one width"):
        build(**changes)


@pytest.fixture(scope="module")
def other():
    """What a scheduled arm of Esper's left."""
    return finished(**SCHEDULE)


def test_an_arm_that_widens_nothing_cannot_be_followed():
    chunks = {"sites": "fc1", "seeds_per_layer": 2, "hidden": 2}
    other = finished(**SCHEDULE | {"lattice": [chunks]})
    with pytest.raises(ConfigError, match="'other' grew at 'fc1'; follow another"):
        build(followed=other)


class TestWithTheRealPackage:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("gromo", reason="the optional peer is not installed")

    def test_it_starts_as_the_host_of_its_pair(self):
        ours = build(Trial, controller={"name": "static"})
        theirs = build()
        x, _ = theirs.trainer.data.test
        torch.testing.assert_close(theirs.trainer.model(x), ours.trainer.model(x))

    def test_it_grows_the_units_of_the_arm_it_follows_and_what_that_takes_is_counted(self, other):
        record = finished(other)
        theirs, ours = other.curves["parameters"], record.curves["parameters"]
        # at once only what the statistics have rank for: two units in front of two outputs
        assert 42 < ours[0] < theirs[0]
        assert ours == sorted(ours)
        assert ours[-1] > 100
        assert record.metrics["growth_flops"] > 0
        assert record.metrics["steps"] == 300
        bare = finished()
        assert set(bare.curves["parameters"]) == {42.0}
        assert record.metrics["train_flops"] > bare.metrics["train_flops"]
        assert record.metrics["train_loss"] < bare.metrics["train_loss"]

    def test_in_the_end_it_has_as_many_units(self, other):
        trial = build(followed=other)
        while not trial.done:
            trial.run_for(0.0)
        layers = trial.trainer.model.layers
        wanted = [4 + sum(e.site.startswith(f"fc{k}") for e in kept_events(other)) for k in (1, 2)]
        assert [layer.out_features for layer in layers[:-1]] == wanted

    def test_it_keeps_to_the_budget(self, other):
        parameters = finished(other, growth={"max_parameters": 90}).curves["parameters"]
        assert 80 < parameters[-1] <= 90

    def test_a_worker_of_a_sweep_runs_it_after_the_arm_that_it_follows(self, other, tmp_path):
        """Called directly, as Tune does it; the record is that of a trial without a worker."""
        config = RunConfig.model_validate(CONFIG)
        mark = Fingerprint(code_hash=code_hash(), commit=None, versions={}, device="cpu")
        spec = TrialSpec("gromo", 0, 3, 0, "", mark)
        write_json(record_path(tmp_path, "other-000"), other)
        worker = TrialWorker.__new__(TrialWorker)
        plan = {spec.trial_id: Planned(spec, config, waits_for="other-000")}
        worker.setup({"trial": spec.trial_id}, plan, str(tmp_path), Resources())
        while not worker.step()["done"]:
            pass
        record = read_record(tmp_path, spec.trial_id)
        assert record.curves["train_loss"] == finished(other).curves["train_loss"]

    def test_it_is_the_same_each_time(self, other):
        one, again = finished(other), finished(other)
        assert one.curves["train_loss"] == again.curves["train_loss"]
