"""Five ways from alpha 0 to 1: exact ends, held where they should hold, no missing signals."""

import math
from dataclasses import replace

import pytest
import torch

from esper.config.run import GrowthConfig
from esper.seeds import optimizer_guard
from esper.seeds.grafting import GRAFTS, GraftSignals
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage

GROWTH = GrowthConfig(max_drift_frac=0.5, max_grad_norm_ratio=10.0)
HEALTHY = GraftSignals(loss=0.9, previous_loss=1.0, host_drift_frac=0.1, grad_norm=1.0,
                       median_grad_norm=1.0)  # fmt: skip


def grafting_layer(strategy, ramp_steps):
    layer = KasminaLayer(4, 2)
    layer.ramp_steps = ramp_steps
    layer.write_states([SeedState(Stage.GRAFTING, 3, 0, tuple(GRAFTS).index(strategy)),
                        SeedState()])  # fmt: skip
    return layer


def ramp(strategy, ramp_steps, steps, signals=HEALTHY):
    layer = grafting_layer(strategy, ramp_steps)
    layer.set_paces(signals, GROWTH)
    alphas = []
    for _ in range(steps):
        optimizer_guard.after_step(layer)
        alphas.append(float(layer.alpha[0]))
    assert layer.alpha[1] == 0
    return alphas


def test_all_five_are_registered():
    assert list(GRAFTS) == [
        "linear", "cosine", "performance_linked", "drift_controlled", "grad_norm_gated"
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", list(GRAFTS))
@pytest.mark.parametrize("ramp_steps", [1, 3, 7, 100, 1009])
def test_a_ramp_ends_at_exactly_1_after_ramp_steps_and_stays(strategy, ramp_steps):
    alphas = ramp(strategy, ramp_steps, ramp_steps + 3)
    assert all(0 < a < 1 for a in alphas[: ramp_steps - 1])
    assert alphas[ramp_steps - 1 :] == [1.0] * 4
    assert alphas == sorted(alphas)


def test_the_curves():
    fractions = [i / 8 for i in range(1, 9)]
    assert ramp("linear", 8, 8) == pytest.approx(fractions, abs=1e-6)
    cosine = [(1 - math.cos(math.pi * p)) / 2 for p in fractions]
    assert ramp("cosine", 8, 8) == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize(
    ("strategy", "signals", "pace"),
    [
        ("performance_linked", {"loss": 0.99}, 1.0),
        ("performance_linked", {"loss": 1.0}, 0.5),
        ("performance_linked", {"loss": 1.01}, 0.5),
        ("performance_linked", {"loss": 1.02}, 0.0),
        ("performance_linked", {"loss": -1.0, "previous_loss": -1.005}, 0.5),
        ("performance_linked", {"loss": -0.9, "previous_loss": -1.0}, 0.0),
        ("drift_controlled", {"host_drift_frac": 0.5}, 1.0),
        ("drift_controlled", {"host_drift_frac": 0.51}, 0.0),
        ("grad_norm_gated", {"grad_norm": 10.0}, 1.0),
        ("grad_norm_gated", {"grad_norm": 10.1}, 0.0),
        ("grad_norm_gated", {"grad_norm": 0.1}, 1.0),
        ("grad_norm_gated", {"grad_norm": 0.09}, 0.0),
        ("linear", {"loss": None, "grad_norm": None}, 1.0),
        ("cosine", {"loss": None, "grad_norm": None}, 1.0),
    ],
)
def test_paces(strategy, signals, pace):
    assert GRAFTS[strategy].pace(replace(HEALTHY, **signals), GROWTH) == pace


@pytest.mark.parametrize(
    ("strategy", "bad"),
    [
        ("performance_linked", {"loss": 2.0}),
        ("drift_controlled", {"host_drift_frac": 2.0}),
        ("grad_norm_gated", {"grad_norm": 1e-6}),
    ],
)
def test_a_held_graft_holds_alpha_and_goes_on_where_it_was(strategy, bad):
    layer = grafting_layer(strategy, 10)
    seen = []
    for signals in (HEALTHY, replace(HEALTHY, **bad), HEALTHY):
        layer.set_paces(signals, GROWTH)
        for _ in range(5):
            optimizer_guard.after_step(layer)
        seen.append(float(layer.alpha[0]))
    assert seen == [0.5, 0.5, 1.0]


def test_a_flat_loss_halves_the_pace():
    flat = replace(HEALTHY, loss=1.0)
    assert ramp("performance_linked", 10, 20, flat)[18:] == [pytest.approx(0.95), 1.0]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("performance_linked", "loss"),
        ("performance_linked", "previous_loss"),
        ("drift_controlled", "host_drift_frac"),
        ("grad_norm_gated", "grad_norm"),
        ("grad_norm_gated", "median_grad_norm"),
    ],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_missing_signal_is_an_error(strategy, name, value):
    layer = grafting_layer(strategy, 10)
    message = rf"^{name} must be measured for graft strategy '{strategy}', but got {value}; give"
    with pytest.raises(ValueError, match=message):
        layer.set_paces(replace(HEALTHY, **{name: value}), GROWTH)


def test_signals_that_no_grafting_seed_asks_for_may_be_missing():
    layer = grafting_layer("grad_norm_gated", 10)
    layer.write_states([SeedState(Stage.FINE_TUNING, 3, 0, 4), SeedState()])
    layer.set_paces(GraftSignals(), GROWTH)
    assert torch.equal(layer.pace, torch.ones(2))
