"""A metric of a user's own: computed at the end of a trial, or refused by name."""

import math
import pickle

import pytest
import torch

from esper import metric
from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.evidence.records import Fingerprint
from esper.training.metrics import RESERVED, RESERVED_STARTS, MetricError
from esper.trial import Trial, TrialSpec

MARK = Fingerprint(code_hash="c", commit=None, versions={"torch": "2"}, device="cpu")
RUN = {
    "task": {
        "name": "spirals",
        "options": {"train_samples": 100, "held_out_samples": 50, "test_samples": 50},
    },
    "host": {"name": "mlp", "options": {"hidden": [4]}},
    "train": {"steps": 20, "interval_steps": 10},
}


@metric("largest_weight", unit="", higher_is_better=False)
def largest_weight(trained):
    """What a metric may look at: the model where it is, and the data."""
    assert not trained.model.training
    assert all(p.device.type == trained.device for p in trained.model.parameters())
    assert trained.data.test[0].shape == (50, 2)
    return max(float(p.detach().abs().max()) for p in trained.model.parameters())


@metric("noise", unit="ms", higher_is_better=True)
def noise(trained):
    return torch.rand(()).item()


@metric("sharpness", unit="", higher_is_better=False)
def sharpness(trained):
    """Metrics may take gradients."""
    x, y = trained.data.train
    loss = trained.data.losses(trained.model(x), y).mean()
    parts = torch.autograd.grad(loss, list(trained.model.parameters()))
    return sum(float(g.square().sum()) for g in parts)


@metric("fails", unit="", higher_is_better=True)
def fails(trained):
    raise KeyError("no such layer")


@metric("tensor_valued", unit="", higher_is_better=True)
def tensor_valued(trained):
    return torch.ones(2)


@metric("undefined", unit="", higher_is_better=True)
def undefined(trained):
    return math.nan


def finished(*names, **train):
    config = RunConfig.model_validate(
        RUN | {"metrics": names, "train": RUN["train"] | {"learning_rate": 0.01} | train}
    )
    trial = Trial(config, TrialSpec("arm", 0, 3, 0, "registered", MARK))
    known = trial.metric_names()
    trial.run_for(math.inf)
    record = trial.record()
    assert set(record.metrics) == known
    return trial, record


def test_a_metric_is_of_the_trained_model_and_stands_in_the_record():
    trial, record = finished("largest_weight", "sharpness")
    largest = max(float(p.detach().abs().max()) for p in trial.trainer.model.parameters())
    assert record.metrics["largest_weight"] == largest
    assert record.metrics["sharpness"] > 0
    assert "noise" not in record.metrics


def test_random_numbers_of_a_metric_are_the_trial_s_and_disturb_nobody():
    torch.manual_seed(5)
    expected = torch.rand(3)
    trial, first = finished("noise")
    torch.manual_seed(5)
    again = trial.record()
    assert torch.equal(torch.rand(3), expected)
    assert first.metrics["noise"] == again.metrics["noise"] == finished("noise")[1].metrics["noise"]


def test_a_collapsed_trial_has_no_value_and_the_function_is_not_called():
    _, record = finished("fails", optimizer="sgd", learning_rate=1e30)
    assert record.status == "collapsed"
    assert math.isnan(record.metrics["fails"])


def test_nan_stays_nan():
    _, record = finished("undefined")
    assert record.status == "finished"
    assert math.isnan(record.metrics["undefined"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fails", "'fails' must return one number, but KeyError: 'no such layer'; correct"),
        ("tensor_valued", "'tensor_valued' must return one number, but got Tensor"),
    ],
)
def test_a_function_that_fails_leaves_no_record(name, why):
    with pytest.raises(MetricError, match=why) as caught:
        finished(name)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_unknown_name_is_refused_before_the_run_with_those_that_exist():
    with pytest.raises(
        ConfigError, match=r"largest_weight.*but got 'largest_wieght'.*Did you mean"
    ):
        finished("largest_wieght")


@pytest.mark.parametrize("name", ["", "Loss", "a b", "2nd", "steps", "collapse", "test_accuracy"])
def test_names_that_are_taken_or_not_well_formed_are_refused(name):
    with pytest.raises(ValueError, match="metric name must"):
        metric(name, unit="", higher_is_better=True)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'noise' is already registered"):
        metric("noise", unit="", higher_is_better=True)(noise)


def test_everything_that_a_trial_records_by_itself_is_reserved():
    trial, record = finished()
    for name in (*record.metrics, *trial.curves):
        assert name in RESERVED or name.startswith(RESERVED_STARTS)
