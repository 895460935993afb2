"""Hosts with a lattice, and a way to put a seed into any stage."""

import copy

import pytest
import torch
from torch import nn

from esper import attach
from esper.config.run import GrowthConfig
from esper.seeds.actions import Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.state import Stage

MAIN_PATH = [Promote, *[Advance] * 5]
ENDS = {Stage.CULLED: Cull, Stage.CANCELLED: Cancel, Stage.ROLLED_BACK: Rollback}

# seed 0 goes the main path; seed 1 is culled and its slot used again
STORY = [
    [Germinate("", 0, "mlp_gelu"), Germinate("", 1, "low_rank")],
    [Promote("", 0), Promote("", 1)],
    [Advance("", 0), Advance("", 1)],
    [Advance("", 0), Cull("", 1)],
    [Advance("", 0), Advance("", 1)],
    [Advance("", 0), Germinate("", 1, "mlp_silu", "cosine")],
    [Advance("", 0), Promote("", 1)],
    [Advance("", 1)],
    [Advance("", 1)],
]


def lead(lattice, site, seed, stage, blueprint="mlp_gelu", graft="linear"):
    """Commands a dormant seed all the way to a stage."""
    lattice.apply([Germinate(site, seed, blueprint, graft)])
    if stage in ENDS:
        lattice.apply([Promote(site, seed), ENDS[stage](site, seed)])
        return
    for action in MAIN_PATH[: stage - 1]:
        lattice.apply([action(site, seed)])


class ConvHost(nn.Module):
    """Convolutions whose layout matters: in place, then seen through `view`."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Conv2d(6, 12, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(12, 8, 3, padding=1)
        self.out = nn.Linear(8 * 25, 3)

    def forward(self, x):
        h = self.fc2(self.act(self.fc1(x)))
        return self.out(h.view(len(h), -1))


class LinearHost(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.fc2(self.act(self.fc1(x))))


class Bench:
    """A host, its twin without a lattice, a batch, and one site."""

    story = STORY

    def __init__(self, kind, geometry, **attach_options):
        torch.manual_seed(0)
        self.model = ConvHost() if kind == "conv" else LinearHost()
        self.twin = copy.deepcopy(self.model)
        self.x = torch.randn((32, 6, 5, 5) if kind == "conv" else (32, 6))
        self.target = torch.randn(32, 3)
        options = {"seeds_per_layer": 4, "growth": GrowthConfig(ramp_steps=10), **attach_options}
        pattern = "fc1->fc2" if geometry == "span" else "fc1"
        self.lattice = attach(self.model, pattern, geometry=geometry, **options)
        (self.site,) = self.lattice.attached
        self.layer = self.lattice.layer(self.site)

    def lead(self, seed, stage, **options):
        lead(self.lattice, self.site, seed, stage, **options)

    def tell(self, actions):
        """Commands for the one site, which they need not name."""
        self.lattice.apply([type(a)(**{**vars(a), "site": self.site}) for a in actions])

    def loss(self, model=None):
        return (((model or self.model)(self.x)) - self.target).square().mean()

    def train(self, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()


@pytest.fixture
def bench():
    return Bench


@pytest.fixture(params=["linear", "conv"])
def kind(request):
    return request.param


@pytest.fixture(params=["chunk", "span"])
def geometry(request):
    return request.param
