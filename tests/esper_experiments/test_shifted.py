"""Hosts of one task that grow on another, similar one."""

import math

import pytest
import torch

from esper.config.run import RunConfig
from esper.environment import fingerprint
from esper.evidence.records import Fingerprint
from esper.surgery.files import save
from esper.training.tasks import Digits, Mnist1d
from esper.trial import Trial, TrialSpec
from esper_experiments.shifted import FrozenMlp, ReversedMnist1d, RotatedDigits

HOST = {"hidden": [8], "bias": False}


def trial(**changes):
    run = {
        "plugins": ["esper_experiments.shifted"],
        "task": {"name": "mnist1d", "options": {"data_seed": 42}},
        "host": {"name": "mlp", "options": HOST},
        "train": {"steps": 100, "batch_size": 64, "learning_rate": 0.01, "interval_steps": 20},
        **changes,
    }
    spec = TrialSpec("test", 0, 0, 0, "none", Fingerprint(**fingerprint("cpu")))
    made = Trial(RunConfig.model_validate(run), spec)
    made.run_for(math.inf)
    return made


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    made = trial()
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder, made.trainer.model, made.trainer.lattice)
    return folder, made.trainer.model.eval()


def test_the_signals_are_reversed_and_nothing_else():
    plain, turned = Mnist1d(data_seed=42).load(0), ReversedMnist1d(data_seed=42).load(0)
    for a, b in ((plain.train, turned.train), (plain.held_out, turned.held_out),
                 (plain.test, turned.test)):  # fmt: skip
        assert torch.equal(a[0], b[0].flip(1))
        assert torch.equal(a[1], b[1])


def test_the_images_are_turned_by_a_quarter_and_nothing_else():
    plain, turned = Digits(data_seed=42).load(0), RotatedDigits(data_seed=42).load(0)
    for a, b in ((plain.train, turned.train), (plain.held_out, turned.held_out),
                 (plain.test, turned.test)):  # fmt: skip
        image, shifted = (x[0].view(8, 8) for x, _ in (a, b))
        assert all(shifted[7 - j, i] == image[i, j] for i in range(8) for j in range(8))
        assert torch.equal(a[0].sum(1), b[0].sum(1))
        assert torch.equal(a[1], b[1])


def test_seeds_adapt_the_mlp_and_it_forgets_nothing(pretrained):
    folder, original = pretrained
    made = trial(
        task={"name": "reversed_mnist1d", "options": {"data_seed": 42}},
        host={"name": "frozen_mlp", "options": {**HOST, "pretrained": str(folder)}},
        lattice=[{"sites": s, "seeds_per_layer": 2, "geometry": "span"} for s in ("fc1", "out")],
        growth={"ramp_steps": 1, "training_intervals": 0, "min_gain": None},
        controller={"name": "schedule", "options": {
            "blueprint": "low_rank", "at_intervals": [1], "count": 4,
        }},
    )  # fmt: skip
    model, lattice = made.trainer.model.eval(), made.trainer.lattice
    assert made.curves["train_loss"][-1] < made.curves["train_loss"][0]
    x = made.trainer.data.test[0]
    assert not torch.equal(model(x), original(x))
    with torch.no_grad():
        for attached in lattice.attached.values():
            attached.layer.alpha.zero_()
    assert torch.equal(model(x), original(x))


def test_a_checkpoint_of_another_mlp_is_refused(pretrained):
    data = Mnist1d(data_seed=42).load(0)
    with pytest.raises(ValueError, match="pretrained must be a checkpoint of a host of these"):
        FrozenMlp(hidden=(16,), bias=False, pretrained=pretrained[0]).build(data)
