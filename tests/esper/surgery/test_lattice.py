"""What a lattice reports, against brute force, and that it applies all actions or none."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from esper.config.run import GrowthConfig
from esper.registry import UnknownNameError
from esper.seeds.actions import Advance, Cull, Germinate, Promote
from esper.seeds.lifecycle import IllegalTransitionError
from esper.seeds.state import Stage
from esper.surgery.attach import attach

S, C = 4, 2


def make(geometry="chunk", *, axis=None, dtype=torch.float32):
    """Host `site -> tanh -> out` with a lattice of 4 seeds, an optimizer and data."""
    torch.manual_seed(0)
    site = nn.Conv1d(3, S * C, 1) if axis else nn.Linear(3, S * C)
    out = nn.Conv1d(S * C, 2, 1) if axis else nn.Linear(S * C, 2)
    model = nn.Sequential(site, nn.Tanh(), out).to(dtype)
    lattice = attach(model, "0", S, geometry=geometry, growth=GrowthConfig(ramp_steps=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 3, 6) if axis else torch.randn(5, 3)
    return model, lattice, optimizer, x.to(dtype)


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def bring(lattice, name, seed, stage, *, blueprint="mlp_gelu", train=lambda: None):
    """Moves a seed along its life up to a stage, training in between."""
    lattice.apply([Germinate(name, seed, blueprint)])
    if stage is not Stage.GERMINATED:
        lattice.apply([Promote(name, seed)])
    while lattice.layer(name).states()[seed].stage is not stage:
        train()
        lattice.apply([Advance(name, seed)])


@pytest.mark.parametrize("axis", [None, -2])
def test_telemetry_of_chunks_against_brute_force(axis):
    model, lattice, optimizer, x = make(axis=axis)
    site = model[0]
    with torch.no_grad():
        # channels 2 and 3 are dead, channel 0 is so for some rows
        site.weight[2:4] = 0
        site.bias[2:4] = 0
    twin = copy.deepcopy(model)
    z = twin[0](x).detach().requires_grad_()
    twin[1:](z).square().mean().backward()

    def rows(t):
        return (t if axis is None else t.movedim(1, -1)).reshape(-1, S, C)

    step(model, optimizer, x)
    report = lattice.report(0.5).sites[0]
    zs, gs = rows(z.detach()), rows(z.grad)
    energy = (gs * len(gs)).square().mean((0, 2))
    variance = zs.var(0, correction=0).mean(1)
    dead = (zs.abs() < 1e-6).float().mean((0, 2))
    np.testing.assert_allclose(report.grad_energy, energy, rtol=1e-5)
    np.testing.assert_allclose(report.variance, variance, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(report.dead_frac, dead)
    assert report.dead_frac[1] == 1
    assert np.isnan(report.explained_frac).all()
    assert np.isnan(report.gain).all()


def test_telemetry_of_a_span_is_that_of_the_whole_output():
    model, lattice, optimizer, x = make("span")
    twin = copy.deepcopy(model)
    z = twin[0](x).detach().requires_grad_()
    twin[1:](z).square().mean().backward()
    step(model, optimizer, x)
    report = lattice.report().sites[0]
    energy = (z.grad * len(z)).square().mean()
    np.testing.assert_allclose(report.grad_energy, np.full(S, energy), rtol=1e-5)
    np.testing.assert_allclose(
        report.variance, np.full(S, z.detach().var(0, correction=0).mean()), rtol=1e-4
    )


def test_the_energy_does_not_depend_on_the_size_of_the_batch():
    energies = []
    for repeats in (1, 7):
        model, lattice, optimizer, x = make()
        step(model, optimizer, x.repeat(repeats, 1))
        energies.append(lattice.report().sites[0].grad_energy)
    np.testing.assert_allclose(energies[0], energies[1], rtol=1e-4)


def test_a_report_holds_its_own_interval_only():
    model, lattice, optimizer, x = make()
    step(model, optimizer, 100 * x)
    first = lattice.report().sites[0]
    step(model, optimizer, x)
    second = lattice.report().sites[0]
    twin = make()
    step(twin[0], twin[2], 100 * x)
    twin[1].report()
    z = twin[0][0](x).detach().reshape(-1, S, C)
    np.testing.assert_allclose(second.variance, z.var(0, correction=0).mean(1), rtol=1e-3)
    assert (first.variance > 100 * second.variance).all()
    empty = lattice.report().sites[0]
    for column in ("grad_energy", "variance", "dead_frac"):
        assert np.isnan(getattr(empty, column)).all(), column


def test_evaluation_passes_leave_no_trace_in_the_telemetry():
    reports = []
    for evaluates in (False, True):
        model, lattice, optimizer, x = make()
        step(model, optimizer, x)
        if evaluates:
            with torch.no_grad():
                model(50 * x)
            model.eval()(50 * x)
            model.train()
        reports.append(lattice.report().sites[0])
    for column in ("grad_energy", "variance", "dead_frac"):
        np.testing.assert_array_equal(getattr(reports[0], column), getattr(reports[1], column))


def test_numbers_of_the_whole_host():
    model, lattice, optimizer, x = make()
    twin = copy.deepcopy(model)
    first = lattice.report()
    assert (first.interval, first.step) == (1, 0)
    assert (first.loss, first.held_out_loss, first.grad_norm) == (None, None, None)
    assert first.host_drift_frac is None
    for _ in range(3):
        loss = step(model, optimizer, x)
    report = lattice.report(loss, lambda: torch.arange(5.0))
    old = torch.cat([p.flatten() for n, p in twin.named_parameters() if "kasmina" not in n])
    new = torch.cat([p.flatten() for n, p in model.named_parameters() if "kasmina" not in n])
    grads = [p.grad.flatten() for n, p in model.named_parameters() if "kasmina" not in n]
    assert (report.interval, report.step) == (2, 3)
    assert (report.loss, report.held_out_loss) == (loss, 2.0)
    assert report.host_drift_frac == pytest.approx(
        ((new - old).norm() / old.norm()).item(), rel=1e-4
    )
    assert report.grad_norm == pytest.approx(float(torch.cat(grads).norm()), rel=1e-5)
    assert report.host_parameters == report.parameters == len(new)
    assert lattice.report().host_drift_frac == 0


def test_the_drift_of_a_large_host_is_sampled():
    model = nn.Sequential(nn.Linear(300, 200))
    lattice = attach(model, "0", 1)
    lattice.report()
    with torch.no_grad():
        model[0].weight *= 1.1
        model[0].bias *= 1.1
    assert lattice.report().host_drift_frac == pytest.approx(0.1, rel=1e-4)


def test_parameters_are_counted_by_blueprint_and_stage():
    _, lattice, _, _ = make()
    host = sum(p.numel() for p in lattice.host_parameters())
    assert host == 3 * 8 + 8 + 8 * 2 + 2
    assert lattice.count_parameters() == host
    lattice.apply([Germinate("0", 0, "mlp_gelu"), Germinate("0", 3, "scale_shift")])
    # 2 units of (2 inputs, a bias, 2 outputs); a scale and a shift for 2 channels
    assert lattice.count_parameters() == host + 10 + 4
    assert lattice.count_awake() == 2
    lattice.apply([Promote("0", 0), Advance("0", 0), Cull("0", 0)])
    assert lattice.count_parameters() == host + 4
    assert lattice.count_awake() == 1
    report = lattice.report()
    assert (report.parameters, report.host_parameters, report.active_seeds) == (host + 4, host, 1)
    assert report.sites[0].seed_parameters["mlp_gelu"] == 10
    assert "glu" in report.sites[0].seed_parameters
    assert "glu" not in make("span")[1].report().sites[0].seed_parameters


def test_blueprints_that_do_not_fit_the_site_have_no_price():
    """Gated seeds halve their hidden units; what a controller sees must be what `apply` takes."""
    model = nn.Sequential(nn.Linear(3, 6))
    lattice = attach(model, "0", 2, hidden=3)
    prices = lattice.report().sites[0].seed_parameters
    assert "mlp_gelu" in prices
    assert "glu" not in prices
    with pytest.raises(ValueError, match="hidden must be even"):
        lattice.apply([Germinate("0", 0, "glu")])


def test_gain_is_the_held_out_loss_without_the_seed_minus_with_it():
    model, lattice, optimizer, x = make()
    bring(lattice, "0", 1, Stage.EVALUATING, train=lambda: step(model, optimizer, x))
    bring(lattice, "0", 2, Stage.EVALUATING, train=lambda: step(model, optimizer, x))
    layer = lattice.layer("0")
    with torch.no_grad():
        layer.w_out.normal_(generator=torch.Generator().manual_seed(1))

    def losses():
        assert not model.training
        assert not torch.is_grad_enabled()
        return model(x).square().mean(1)

    report = lattice.report(1.0, losses)
    model.eval()
    with torch.no_grad():
        on = losses()
        for seed in (1, 2):
            layer.alpha[seed] = 0
            saved = (losses() - on).double()
            layer.alpha[seed] = 1
            site = report.sites[0]
            assert site.gain[seed] == pytest.approx(float(saved.mean()), rel=1e-5)
            error = float(saved.std()) / math.sqrt(len(saved))
            assert site.gain_se[seed] == pytest.approx(error, rel=1e-5)
    assert np.isnan(site.gain[[0, 3]]).all()
    assert report.held_out_loss == pytest.approx(float(on.mean()))
    model.train()
    one_number = lattice.report(1.0, lambda: float(model(x).square().mean())).sites[0]
    assert one_number.gain[1] == pytest.approx(site.gain[1], rel=1e-4)
    assert np.isnan(one_number.gain_se).all()
    assert np.isnan(lattice.report(1.0).sites[0].gain).all()


def test_evaluating_restores_the_mode_of_every_module():
    model, lattice, _, x = make()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    lattice.report(1.0, lambda: model(x).square().mean(1))
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        lattice.report(1.0, lambda: 1 / 0)
    assert [m.training for m in model.modules()] == modes


def test_a_failed_evaluation_counts_no_interval():
    _, lattice, _, _ = make()
    lattice.apply([Germinate("0", 0, "mlp_gelu")])
    with pytest.raises(ZeroDivisionError):
        lattice.report(1.0, lambda: 1 / 0)
    assert lattice.interval == 0
    assert lattice.layer("0").states()[0].epochs == 0


def test_seeds_grow_older_by_interval_and_dormant_ones_do_not():
    _, lattice, _, _ = make()
    lattice.apply([Germinate("0", 1, "mlp_gelu")])
    for _ in range(3):
        site = lattice.report(1.0).sites[0]
    assert list(site.epochs) == [0, 3, 0, 0]
    lattice.apply([Promote("0", 1)])
    assert list(lattice.report().sites[0].epochs) == [0, 1, 0, 0]


def test_seeds_that_no_optimizer_moves_are_reported():
    model, lattice, _, x = make()
    optimizer = torch.optim.SGD(lattice.host_parameters(), lr=0.1)
    step(model, optimizer, x)
    lattice.report()
    bring(lattice, "0", 0, Stage.TRAINING)
    step(model, optimizer, x)
    with pytest.raises(ValueError, match=r"seeds of '0' must be moved by an optimizer"):
        lattice.report()


GOOD = [Germinate("0", 1, "mlp_gelu"), Germinate("0", 2, "low_rank")]
BAD = {
    "illegal": (Promote("0", 3), IllegalTransitionError, "Promote on seed 3 of site '0' must fit"),
    "again": (Germinate("0", 1, "noop"), IllegalTransitionError, "the seed is GERMINATED"),
    "site": (Cull("1", 0), ValueError, "site must be one of 0, but got '1'"),
    "seed": (Cull("0", S), ValueError, r"must be in 0\.\.3, but got 4"),
    "negative": (Germinate("0", -1, "noop"), ValueError, r"must be in 0\.\.3, but got -1"),
    "blueprint": (Germinate("0", 0, "mlp_gelo"), UnknownNameError, "Did you mean 'mlp_gelu'"),
    "graft": (Germinate("0", 0, "noop", "linea"), UnknownNameError, "Did you mean 'linear'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_all_actions_are_checked_before_any_is_applied(bad):
    action, kind, match = BAD[bad]
    model, lattice, _, _ = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kind, match=match):
        lattice.apply([*GOOD, action])
    assert all(torch.equal(v, before[k]) or "graft_loss" in k
               for k, v in model.state_dict().items())  # fmt: skip
    assert lattice.log == []


def test_a_blueprint_that_does_not_fit_the_site_is_refused():
    _, lattice, _, _ = make("span")
    with pytest.raises(ValueError, match="blueprint on a span site must be one of"):
        lattice.apply([Germinate("0->0", 0, "mlp_relu"), Germinate("0->0", 1, "glu")])
    assert lattice.count_awake() == 0


def test_a_graft_whose_signal_was_not_measured_is_refused_before_it_begins():
    model, lattice, optimizer, x = make()
    lattice.apply([Germinate("0", 1, "mlp_gelu", "performance_linked"), Promote("0", 1)])
    step(model, optimizer, x)
    lattice.report(1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="previous_loss must be measured for graft strategy"):
        lattice.apply([Advance("0", 1)])
    assert lattice.layer("0").states()[1].stage is Stage.TRAINING
    assert all(torch.equal(v, before[k]) or "graft_loss" in k
               for k, v in model.state_dict().items())  # fmt: skip
    lattice.report(0.9)
    lattice.apply([Advance("0", 1)])
    assert lattice.layer("0").states()[1].stage is Stage.GRAFTING
    assert lattice.layer("0").pace[1] == 1
    lattice.report(0.95)
    lattice.apply()
    assert lattice.layer("0").pace[1] == 0


def test_actions_are_applied_in_order_and_logged():
    model, lattice, optimizer, x = make()
    step(model, optimizer, x)
    lattice.report(1.0)
    done = lattice.apply([Germinate("0", 1, "low_rank"), Promote("0", 1), Promote("0", 1)][:2])
    assert [(t.before.stage, t.after.stage) for t in done] == [
        (Stage.DORMANT, Stage.GERMINATED),
        (Stage.GERMINATED, Stage.TRAINING),
    ]
    assert {(t.interval, t.step, t.blueprint) for t in done} == {(1, 1, "low_rank")}
    more = lattice.apply([Cull("0", 1)])
    assert lattice.log == done + more
    assert more[0].blueprint == "low_rank"


def test_checking_changes_nothing():
    _, lattice, _, _ = make()
    transitions = lattice.check(GOOD)
    assert [t.after.stage for t in transitions] == [Stage.GERMINATED] * 2
    assert lattice.count_awake() == 0
    assert lattice.log == []


def test_fresh_weights_depend_on_seed_place_and_time_alone():
    def fresh(seed=0, place=1, intervals=0):
        torch.manual_seed(intervals)
        model = nn.Sequential(nn.Linear(3, 8))
        lattice = attach(model, "0", S, seed=seed)
        for _ in range(intervals):
            lattice.report()
        lattice.apply([Germinate("0", place, "mlp_gelu")])
        return lattice.layer("0").w_in[place].detach()

    assert torch.equal(fresh(), fresh())
    assert fresh().any()
    assert not any(
        torch.equal(fresh(), other) for other in (fresh(seed=1), fresh(place=2), fresh(intervals=1))
    )


def test_a_whole_life_ends_in_a_fossil_that_helps():
    """A host of one channel cannot be anything but affine in it; the seed makes it bend."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    lattice = attach(model, "0", 1, hidden=8, growth=GrowthConfig(ramp_steps=20))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.linspace(-1, 1, 64)[:, None]

    def losses():
        return (model(x) - x - x.square()).square().mean(1)

    def train(steps=60):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = losses().mean()
            loss.backward()
            optimizer.step()
        return lattice.report(loss.item(), losses)

    for _ in range(5):
        alone = train().held_out_loss
    lattice.apply([Germinate("0", 0, "mlp_gelu"), Promote("0", 0)])
    assert train().sites[0].explained_frac[0] > 0
    for _ in range(3):
        lattice.apply([Advance("0", 0)])
        report = train()
    assert report.sites[0].stage[0] == Stage.EVALUATING
    assert report.sites[0].gain[0] > 0
    lattice.apply([Advance("0", 0)])
    for _ in range(8):
        report = train()
    lattice.apply([Advance("0", 0)])
    assert lattice.layer("0").states()[0].stage is Stage.FOSSILIZED
    assert report.held_out_loss < 0.3 * alone


def test_planting_puts_a_finished_seed_in_place():
    _, lattice, _, _ = make()
    host = lattice.count_parameters()
    lattice.plant("0", 2, "mlp_gelu")
    layer = lattice.layer("0")
    assert layer.states()[2].stage is Stage.FINE_TUNING
    assert layer.alpha.tolist() == [0, 0, 1, 0]
    assert layer.w_out[2].all()
    assert lattice.count_parameters() == host + 10
    with pytest.raises(ValueError, match="must be DORMANT to be planted, but is FINE_TUNING"):
        lattice.plant("0", 2, "mlp_gelu")
    with pytest.raises(ValueError, match=r"must be in 0\.\.3, but got -1"):
        lattice.plant("0", -1, "mlp_gelu")
    with pytest.raises(ValueError, match="site must be one of 0, but got '7'"):
        lattice.plant("7", 0, "mlp_gelu")
    with pytest.raises(UnknownNameError, match="blueprint must be one of"):
        lattice.plant("0", 1, "mlp")


def test_no_stage_change_touches_the_optimizer():
    model, lattice, _, x = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    groups, parameters = optimizer.param_groups, list(optimizer.param_groups[0]["params"])
    pools = [p.data_ptr() for p in lattice.parameters()]
    bring(lattice, "0", 1, Stage.FOSSILIZED, train=lambda: step(model, optimizer, x))
    lattice.apply([Germinate("0", 0, "mlp_relu"), Promote("0", 0), Cull("0", 0), Advance("0", 0)])
    assert optimizer.param_groups is groups
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert pools == [p.data_ptr() for p in lattice.parameters()]
