"""Hosts: their shapes, and what is said of a factory that does not fit."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from esper.training.hosts import HOSTS, Conv1dNet, Factory, Host, Mlp, UnitSlopeReLU
from esper.training.tasks import Mnist1d, Spirals

DATA = Spirals(train_samples=4, held_out_samples=4, test_samples=4).load(0)


def test_an_mlp_is_a_plain_sequential_with_named_layers():
    model = Mlp(hidden=(6, 5), activation="gelu").build(DATA)
    assert [n for n, _ in model.named_children()] == ["fc1", "act1", "fc2", "act2", "out"]
    assert type(model) is nn.Sequential
    assert type(model.act1) is nn.GELU
    # the 74 parameters of the spirals case
    model = Mlp(hidden=(6, 6)).build(DATA)
    assert sum(p.numel() for p in model.parameters()) == 74
    assert model(DATA.train[0]).shape == (4, 2)
    assert all(
        "bias" not in n for n, _ in Mlp(hidden=(3,), bias=False).build(DATA).named_parameters()
    )


def test_hosts_are_drawn_from_torchs_generator():
    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(Mlp(hidden=(6,)).build(DATA).parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_unit_slope_relu_has_derivative_1_at_0():
    z = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    y = UnitSlopeReLU()(z)
    y.sum().backward()
    assert y.tolist() == [0, 0, 2]
    assert z.grad.tolist() == [0, 1, 1]
    assert type(Mlp(hidden=(3,), activation="unit_slope_relu").build(DATA).act1) is UnitSlopeReLU


def test_a_convolutional_host_fits_its_signal():
    data = Mnist1d().load(0)
    model = Conv1dNet(channels=5).build(data)
    assert model(data.test[0][:7]).shape == (7, 10)
    with pytest.raises(ValueError, match="'conv1d' needs more than 2 of them"):
        Conv1dNet().build(DATA)


def make(width=3):
    return nn.Sequential(OrderedDict(fc=nn.Linear(2, width), out=nn.Linear(width, 2)))


def no_module():
    return 3


def build(function, **arguments):
    return Factory(path=f"{__name__}:{function}", arguments=arguments).build(DATA)


def test_a_factory_is_called_with_its_arguments():
    assert build("make", width=7).fc.out_features == 7
    assert build("make").fc.out_features == 3


@pytest.mark.parametrize(
    ("path", "arguments", "match"),
    [
        ("no.such.module:f", {}, "must be importable, but 'no.such.module:f' is not"),
        ("{here}:gone", {}, "must be importable"),
        ("{here}:no_module", {}, "must return an nn.Module, but .* returned int"),
        ("{here}:make", {"widht": 3}, "arguments must fit .*unexpected keyword argument 'widht'"),
        ("{here}:DATA", {}, "arguments must fit"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(path, arguments, match):
    with pytest.raises(ValueError, match=match):
        Factory(path=path.format(here=__name__), arguments=arguments).build(DATA)


def test_a_path_without_a_function_is_refused():
    with pytest.raises(ValueError, match="path"):
        Factory(path="just.a.module")


def test_a_host_must_say_how_it_is_built():
    with pytest.raises(NotImplementedError, match="Host must define build"):
        Host().build(DATA)
    assert set(HOSTS) >= {"mlp", "conv1d", "factory"}
