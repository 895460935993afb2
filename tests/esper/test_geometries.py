"""One lattice, several geometries: Tamiyo grows what promises most for each parameter, and where.

Every target is the host's own output and a change that one kind of seed can make exactly.
"""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import esper
from esper.config.run import GrowthConfig
from esper.controller import TamiyoOptions
from esper.seeds.actions import Germinate
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.state import GRAFTED_STAGES

ROWS = 256
GROWTH = GrowthConfig(
    initialisation="matched", measured_samples=ROWS, training_intervals=0, ramp_steps=1,
    stabilization_intervals=0, min_gain=None, scored_blueprint=("low_rank", "mlp_relu"),
)  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tamiyo(**options):
    return TamiyoOptions(
        blueprint_by_score=True, score="bottleneck", patience_intervals=1, **options
    ).build(0)


def first_wave(lattice, controller, loss):
    """What Tamiyo germinates on the first plateau, as (site, blueprint), the most promising first.

    The first of two equal losses is the best so far.
    """
    for _ in range(2):
        report = lattice.report(1.0, measure=loss)
        actions = controller.decide(report)
    return report, [(a.site, a.blueprint) for a in actions if isinstance(a, Germinate)]


def test_a_linear_change_of_a_frozen_map_asks_for_rank_one_and_a_kink_for_a_unit():
    x, u, v = draw(ROWS, 6), draw(6, 1, seed=1), draw(1, 4, seed=2)
    changes = {"low_rank": x @ u @ v, "mlp_relu": F.relu(x @ u - 0.5) @ v}
    for wanted, change in changes.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
        target = model(x) + change
        lattice = esper.attach(model, "0", 4, geometry="span", growth=GROWTH)
        loss = lambda model=model, target=target: F.mse_loss(model(x), target)  # noqa: E731
        report, wave = first_wave(lattice, tamiyo(seeds_per_wave=1), loss)
        assert wave == [("0->0", wanted)]
        assert report.sites[0].scored_blueprint == wanted


def test_what_the_host_can_learn_itself_is_no_reason_for_rank_one():
    x = draw(ROWS, 6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    target = model(x).detach() + x @ draw(6, 1, seed=1) @ draw(1, 4, seed=2)
    lattice = esper.attach(model, "0", 4, geometry="span", growth=GROWTH)
    report = lattice.report(1.0, measure=lambda: F.mse_loss(model(x), target))
    site = report.sites[0]
    assert site.unexplained < 1e-6
    assert site.bottleneck.max() < 1e-6


@pytest.mark.parametrize(("inputs", "wanted"), [(60, "1"), (1, "0->0")])
def test_of_a_chunk_and_a_unit_that_promise_as_much_the_cheaper_one_is_grown(inputs, wanted):
    """The change is a kink of one of the four channels; both kinds of seeds can make it.

    A chunk of two channels costs 10 parameters, a unit across the map what it reads and writes:
    65 of 60 inputs, 6 of one.
    """
    x = draw(ROWS, inputs)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 4), nn.Identity()).requires_grad_(False)
    y = model(x)
    change = torch.zeros_like(y)
    change[:, 0] = F.relu(y[:, 0] - y[:, 0].median())
    growth = GROWTH.model_copy(update={"scored_blueprint": "mlp_relu"})
    lattice = esper.attach(model, "0", 2, geometry="span", growth=growth)
    esper.attach(model, "1", 2, channels=4, hidden=2)
    costs = {
        n: a.layer.seed_parameters(BLUEPRINTS["mlp_relu"]) for n, a in lattice.attached.items()
    }
    assert costs == {"0->0": inputs + 5, "1": 10}
    loss = lambda: F.mse_loss(model(x), y + change)  # noqa: E731
    _, wave = first_wave(lattice, tamiyo(seeds_per_wave=1), loss)
    assert wave == [(wanted, "mlp_relu")]


def test_a_network_grows_in_three_geometries_and_folds_exactly():
    x = draw(ROWS, 2)
    target = torch.stack([(3 * x[:, 0]).sin(), x.prod(1)], 1)
    torch.manual_seed(0)
    model = nn.Sequential()
    for i, (a, b) in enumerate([(2, 6), (6, 6), (6, 6)], start=1):
        model.add_module(f"fc{i}", nn.Linear(a, b))
        model.add_module(f"act{i}", nn.ReLU())
    model.add_module("out", nn.Linear(6, 2))
    # rank-one pays where the host itself stays as it is
    model.out.requires_grad_(False)
    # units across a layer and its activation are to be the host's own, or they cannot be merged
    menu = {"out->out": ("low_rank",), "*": ("mlp_relu",)}
    growth = GROWTH.model_copy(update={"scored_blueprint": menu})
    lattice = esper.attach(model, "fc1->fc2", 4, geometry="span", growth=growth)
    esper.attach(model, "fc3->out", 4, geometry="span")
    esper.attach(model, "out", 4, geometry="span")
    esper.attach(model, "fc2", 2, hidden=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = tamiyo(seeds_per_wave=3, min_improvement_frac=0.9)
    loss = lambda: F.mse_loss(model(x), target)  # noqa: E731
    for _ in range(12):
        for _ in range(5):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
        lattice.apply(controller.decide(lattice.report(value.item(), measure=loss)))
    grown = {
        name for name, a in lattice.attached.items() if a.layer.states().seeds_in(GRAFTED_STAGES)
    }
    assert grown >= {"out->out", "fc2"}
    assert grown & {"fc1->fc2", "fc3->out"}
    expected = model(x)
    plain = lattice.fold()
    assert torch.allclose(plain(x), expected, atol=1e-5)


def test_choosing_what_to_grow_needs_a_score_that_tells():
    with pytest.raises(ValidationError, match="score must be 'bottleneck'"):
        TamiyoOptions(blueprint_by_score=True)
