"""Gradients travel in buckets while others are computed; what arrives is the mean of all."""

import pytest
import torch
from torch import nn

from esper.shards.averaging import Averaging


class Wire:
    """Two replicas of which the other sends the same gradients, times three."""

    def __init__(self, params):
        self.params, self.messages = params, []

    def start(self, flat):
        self.messages.append((flat.numel(), sum(p.grad is None for p in self.params)))
        self.flat = flat
        flat.mul_(4)
        return self

    def wait(self):
        """It is there."""


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def averaging_of(net, floats, rows=None):
    params = list(net.parameters())
    wire = Wire(params)
    averaging = Averaging(params, 2, 4 * floats, wire.start)
    averaging.plan(rows or {})
    return averaging, wire


def step(net, averaging, used=slice(None)):
    """One backward pass, averaged; what it gave before."""
    net.zero_grad()
    averaging.begin()
    net[used](torch.ones(3, 4)).square().sum().backward()
    plain = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    averaging.finish()
    return plain


def test_the_last_layers_travel_while_the_first_are_computed(net):
    averaging, wire = averaging_of(net, floats=72)
    plain = step(net, averaging)
    # numbers of each message, and how many parameters had no gradient yet when it left
    assert wire.messages == [(2 + 16 + 8, 3), (64 + 8, 1), (32, 0)]
    for name, param in net.named_parameters():
        torch.testing.assert_close(param.grad, 2 * plain[name])


def test_a_small_model_sends_one_message_after_its_last_gradient(net):
    averaging, wire = averaging_of(net, floats=1000)
    step(net, averaging)
    assert wire.messages == [(sum(p.numel() for p in net.parameters()), 0)]


def test_rows_that_do_not_learn_stay_and_do_not_travel(net):
    weight = net[2].weight
    averaging, wire = averaging_of(net, 1000, {id(weight): torch.tensor([1, 5])})
    plain = step(net, averaging)
    assert wire.messages[0][0] == sum(p.numel() for p in net.parameters()) - 6 * 8
    factor = torch.ones(8, 1)
    factor[[1, 5]] = 2
    torch.testing.assert_close(weight.grad, factor * plain["2.weight"])


def test_a_parameter_without_gradient_holds_the_others_up_once(net):
    averaging, wire = averaging_of(net, floats=72)
    step(net, averaging, slice(3))
    assert [left for _, left in wire.messages] == [2, 2, 2]
    wire.messages.clear()
    step(net, averaging, slice(3))
    # the last layer's bucket is not waited for
    assert [left for _, left in wire.messages] == [5, 3, 2]
    # the same parts as in the first step, or a resumed run would sum otherwise
    assert [size for size, _ in wire.messages] == [8, 64 + 8, 32]
    # one that nobody waits for is sent all the same
    plain = step(net, averaging)
    for name, param in net.named_parameters():
        torch.testing.assert_close(param.grad, 2 * plain[name])


def test_what_changes_after_it_was_sent_is_sent_again(net):
    averaging, _ = averaging_of(net, floats=72)
    net.zero_grad()
    averaging.begin()
    net(torch.ones(3, 4)).square().sum().backward()
    changed = net[4].bias.grad + 1
    net[4].bias.grad = changed.clone()
    net[0].bias.grad.add_(1)
    added = net[0].bias.grad.clone()
    averaging.finish()
    torch.testing.assert_close(net[4].bias.grad, 2 * changed)
    torch.testing.assert_close(net[0].bias.grad, 2 * added)


def test_a_backward_pass_outside_of_a_step_sends_nothing(net):
    averaging, wire = averaging_of(net, floats=72)
    net(torch.ones(3, 4)).sum().backward()
    assert not wire.messages
    net.zero_grad()
    assert step(net, averaging)
    assert len(wire.messages) == 3
