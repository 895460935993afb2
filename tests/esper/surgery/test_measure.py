"""One batch seen from every site: nothing of the model moves, and new seeds are matched to it."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.config.run import GrowthConfig
from esper.controller.base import shepherd
from esper.seeds.actions import Advance, Cull, Germinate, Promote
from esper.seeds.state import Stage
from esper.surgery.measure import measure_rows

MATCHED = GrowthConfig(initialisation="matched", measured_samples=64)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 5, generator=g), torch.randn(64, 3, generator=g)


def make(growth=MATCHED, geometry="span", **first):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.fc1, model.act = nn.Linear(5, 6, **first), nn.ReLU(inplace=True)
    model.drop, model.fc2 = nn.Dropout(0.5), nn.Linear(6, 3)
    site = "fc1->fc2" if geometry == "span" else "fc1"
    lattice = esper.attach(
        model, site, 4 if geometry == "span" else 3, geometry=geometry, growth=growth
    )
    return model, lattice


def loss_of(model, data):
    return lambda: F.mse_loss(model(data[0]), data[1])


@pytest.mark.parametrize("geometry", ["span", "chunk"])
def test_the_wanted_change_is_the_negative_gradient_of_each_sample(data, geometry):
    model, lattice = make(geometry=geometry)
    rows = measure_rows(model, lattice.attached, loss_of(model, data))
    (seen,) = rows.values()
    model.eval()
    y = model.fc1(data[0])
    z = model.fc2(F.relu(y))
    (at_z,) = torch.autograd.grad(F.mse_loss(z, data[1]) * 64, z, retain_graph=True)
    (at_y,) = torch.autograd.grad(F.mse_loss(z, data[1]) * 64, y)
    torch.testing.assert_close(seen.wanted, -(at_z if geometry == "span" else at_y))
    torch.testing.assert_close(seen.source, data[0] if geometry == "span" else y)
    inputs = F.relu(y) if geometry == "span" else data[0]
    torch.testing.assert_close(seen.known[:, 1:], inputs)


def test_nothing_of_the_model_moves(data):
    model, lattice = make()
    model.train()
    model.fc1.weight.grad = torch.ones_like(model.fc1.weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    lattice.report(1.0, measure=loss_of(model, data))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert (model.fc1.weight.grad == 1).all()
    assert model.fc2.weight.grad is None


def test_a_frozen_host_expresses_nothing(data):
    model, lattice = make()
    model.requires_grad_(False)
    for p in lattice.parameters():
        p.requires_grad_()
    (rows,) = measure_rows(model, lattice.attached, loss_of(model, data)).values()
    # not even a shift of the output
    assert rows.known.shape == (64, 0)
    torch.testing.assert_close(rows.unexplained(rows.wanted), rows.wanted)
    assert rows.wanted.abs().sum() > 0


def test_the_bottleneck_is_reported_for_dormant_seeds_that_were_measured(data):
    model, lattice = make()
    assert lattice.report(1.0).sites[0].bottleneck.size == 4
    assert all(math.isnan(v) for v in lattice.report(1.0).sites[0].bottleneck)
    found = lattice.report(1.0, measure=loss_of(model, data)).sites[0].bottleneck
    assert (found > 0).all()
    # slots are alike, so the next is worth what the one before leaves
    assert (found[:-1] >= found[1:]).all()
    lattice.apply([Germinate("fc1->fc2", 0, "mlp_relu", "linear")])
    found = lattice.report(1.0, measure=loss_of(model, data)).sites[0].bottleneck
    assert math.isnan(found[0])
    assert not any(math.isnan(v) for v in found[1:])


def test_seeds_of_a_wave_are_matched_to_different_things(data):
    model, lattice = make()
    before = model.eval()(data[0])
    lattice.report(1.0, measure=loss_of(model, data))
    lattice.apply([Germinate("fc1->fc2", s, "mlp_relu", "linear") for s in range(3)])
    layer = lattice.layer("fc1->fc2")
    hidden = layer.span_hidden(data[0], torch.arange(3))
    assert (hidden > 0).any(0).all()
    assert torch.corrcoef(hidden.T).fill_diagonal_(0).max() < 0.95
    assert not layer.w_out.any()
    assert torch.equal(model(data[0]), before)


def test_a_unit_has_no_bias_where_the_hosts_own_have_none(data):
    model, lattice = make(bias=False)
    layer = lattice.layer("fc1->fc2")
    lattice.report(1.0, measure=loss_of(model, data))
    lattice.apply([Germinate("fc1->fc2", 0, "mlp_relu", "linear")])
    host = sum(p.numel() for p in lattice.host_parameters())
    assert lattice.count_parameters() == host + 5 + 3
    states = layer.states()
    states[0] = replace(states[0], stage=Stage.FINE_TUNING)
    layer.write_states(states)
    with torch.no_grad():
        layer.alpha[0] = 1
    loss_of(model.train(), data)().backward()
    assert not layer.bias.any()
    assert layer.bias.grad is None


def test_chunk_seeds_are_matched_as_well(data):
    model, lattice = make(geometry="chunk")
    report = lattice.report(1.0, measure=loss_of(model, data))
    assert (report.sites[0].bottleneck > 0).all()
    lattice.apply([Germinate("fc1", 1, "mlp_relu", "linear"), Germinate("fc1", 2, "glu", "linear")])
    layer = lattice.layer("fc1")
    read = model.fc1(data[0])[:, 2:4]
    assert (F.relu(read @ layer.w_in[1] + layer.bias[1]) > 0).any(0).all()
    # units that gate each other cannot be told apart: drawn
    assert layer.w_in[2].any()


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda model, data: torch.zeros((), requires_grad=True), "fc1->fc2 did not take part"),
        (lambda model, data: model(data[0]), "mean loss as a scalar"),
        (lambda model, data: model(data[0]).sum().detach(), "requires_grad False"),
    ],
)
def test_a_wrong_measure_is_refused_and_leaves_no_hook(data, measure, message):
    model, lattice = make()
    hooks = len(model.fc1._forward_pre_hooks), len(model.fc2._forward_hooks)
    with pytest.raises(ValueError, match=message):
        lattice.report(1.0, measure=lambda: measure(model, data))
    assert (len(model.fc1._forward_pre_hooks), len(model.fc2._forward_hooks)) == hooks


def test_matching_without_a_measurement_is_refused(data):
    _, lattice = make()
    lattice.report(1.0)
    with pytest.raises(ValueError, match="'fc1->fc2' must be measured before"):
        lattice.apply([Germinate("fc1->fc2", 0, "mlp_relu", "linear")])
    assert lattice.count_awake() == 0


def test_a_dead_seed_is_reported_and_culled(data):
    model, lattice = make()
    lattice.report(1.0, measure=loss_of(model, data))
    lattice.apply([Germinate("fc1->fc2", s, "mlp_relu", "linear") for s in range(2)])
    lattice.apply(shepherd(lattice.report(1.0, measure=loss_of(model, data))))
    layer = lattice.layer("fc1->fc2")
    with torch.no_grad():
        # zero incoming weights, and a ReLU whose derivative at 0 is 0
        layer.w_in[0] = layer.bias[0] = 0
    loss_of(model.train(), data)().backward()
    layer.counted_steps += 1
    report = lattice.report(1.0, measure=loss_of(model, data))
    assert report.sites[0].silent_frac[:2].tolist() == [1, 0]
    assert all(math.isnan(v) for v in report.sites[0].silent_frac[2:])
    culls = [a for a in shepherd(report) if isinstance(a, Cull)]
    assert [(a.seed, a.reason[:4]) for a in culls] == [(0, "dead")]


def test_too_few_rows_to_know_the_host_are_told():
    model = nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3))
    lattice = esper.attach(model, "0", 3, growth=MATCHED)
    x, y = torch.randn(64, 40), torch.randn(64, 3)
    with pytest.warns(UserWarning, match="64 rows were measured at '0', whose module weighs 40"):
        lattice.report(1.0, measure=lambda: F.mse_loss(model(x), y))


def test_places_are_not_scored_where_no_seed_is_affordable(data):
    model, lattice = make(MATCHED.model_copy(update={"max_parameters": 57 + 9 - 1}))
    assert sum(p.numel() for p in lattice.host_parameters()) == 57
    (site,) = lattice.report(1.0, measure=loss_of(model, data)).sites
    assert site.bottleneck.tolist() == pytest.approx([math.nan] * 4, nan_ok=True)
    lattice.growth = MATCHED.model_copy(update={"max_parameters": 57 + 9})
    (site,) = lattice.report(1.0, measure=loss_of(model, data)).sites
    assert not math.isnan(site.bottleneck[0])


def test_the_bottleneck_is_that_of_the_units_that_are_to_be_grown(data):
    scores = []
    for name in ("mlp_relu", "low_rank"):
        model, lattice = make(MATCHED.model_copy(update={"scored_blueprint": name}))
        (site,) = lattice.report(1.0, measure=loss_of(model, data)).sites
        scores.append(float(site.bottleneck[0]))
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("mlp_relo", "Did you mean 'mlp_relu'"), ("glu", "functions of one number, but got 'glu'")],
)
def test_a_blueprint_that_cannot_be_scored_is_refused(name, message):
    with pytest.raises((ValueError, KeyError), match=message):
        make(MATCHED.model_copy(update={"scored_blueprint": name}))


def test_a_copied_unit_is_like_one_of_the_hosts_and_needs_no_measurement():
    model, lattice = make(GrowthConfig(initialisation="net2net"))
    lattice.report(1.0)
    lattice.apply([Germinate("fc1->fc2", 0, "mlp_relu"), Germinate("fc1->fc2", 1, "mlp_relu")])
    w, host = lattice.layer("fc1->fc2").w_in.detach()[:2], model.fc1.weight.detach()
    near = (w[:, None] - host).norm(dim=2).min(1)
    assert (near.values < 0.3 * host.norm(dim=1)[near.indices]).all()
    bias = lattice.layer("fc1->fc2").bias.detach()[:2]
    assert torch.equal(bias, model.fc1.bias.detach()[near.indices])
    assert not lattice.layer("fc1->fc2").w_out.any()


def test_units_that_are_no_rows_of_a_linear_cannot_be_copied():
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))
    lattice = esper.attach(model, "0->1", 2, geometry="span")
    lattice.growth = GrowthConfig(initialisation="net2net")
    lattice.report(1.0)
    with pytest.raises(ValueError, match="must begin with a Linear for its units to be copied"):
        lattice.apply([Germinate("0->1", 0, "mlp_relu")])


def test_the_gradient_of_new_seeds_is_compared_with_the_hosts(data):
    growth = GrowthConfig(training_intervals=0, ramp_steps=1)
    model, lattice = make(growth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss_of(model, data)().backward()
        optimizer.step()

    step()
    (site,) = lattice.report(1.0).sites
    assert all(map(math.isnan, site.grad_ratio))
    lattice.apply([Germinate(site.name, 0, "mlp_relu"), Promote(site.name, 0),
                   Advance(site.name, 0)])  # fmt: skip
    for _ in range(2):
        step()
    (site,) = lattice.report(1.0).sites
    layer = lattice.layer(site.name)
    seed = torch.cat([w.grad[0].reshape(-1) for w in layer.pool()])
    host = torch.cat([p.grad.reshape(-1) for p in lattice.host_parameters()])
    expected = seed.square().mean().sqrt() / host.square().mean().sqrt()
    assert site.grad_ratio[0] == pytest.approx(float(expected), rel=1e-5)
    assert all(map(math.isnan, site.grad_ratio[1:]))


@pytest.mark.parametrize("how", ["random", "matched", "gradmax", "tiny", "net2net"])
def test_the_output_is_the_same_bit_for_bit_when_a_seed_is_inserted(data, how):
    """Whatever its incoming weights are, and also with alpha at 1 at once."""
    model, lattice = make(MATCHED.model_copy(update={"initialisation": how}))
    before = model.eval()(data[0])
    lattice.report(1.0, measure=loss_of(model, data))
    (name,) = lattice.attached
    lattice.apply([Germinate(name, 0, "mlp_relu"), Promote(name, 0), Advance(name, 0)])
    layer = lattice.layer(name)
    assert layer.w_in[0].any()
    for alpha in (0.0, 0.5, 1.0):
        layer.alpha[0] = alpha
        assert torch.equal(model.eval()(data[0]), before)
