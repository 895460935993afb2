"""Similarity of outputs: values known by hand, exact ends, and the control as its own noise."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from esper.evidence.similarity import (
    Parted,
    compare_curves,
    compare_models,
    compare_runs,
    first_divergent_step,
    similarity,
    ulp_distance,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def noisy(size, scale, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=rng, dtype=torch.float64) * scale).to(dtype)


def test_values_by_hand():
    found = similarity(
        torch.tensor([[1.0, 2.0], [3.0, 0.5]]), torch.tensor([[1.0, 4.0], [0.0, 1.0]])
    )
    assert (found.elements, found.max_abs, found.max_rel) == (4, 3.0, 0.5)
    assert found.cosine == pytest.approx((1 + 8 + 0.5) / math.sqrt(14.25 * 18))
    assert found.top1 == 0.5
    assert not found.identical
    assert found.ulps[0] == 1


def test_the_divergence_is_that_of_scipy():
    a, e = noisy((5, 7), 2.0, 1), noisy((5, 7), 2.0, 2)
    rows = stats.entropy(
        special.softmax(e.double().numpy(), 1), special.softmax(a.double().numpy(), 1), axis=1
    )
    assert similarity(a, e).kl_nats == pytest.approx(rows.mean(), rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_outputs_are_identical(dtype):
    x = noisy((4, 3), 1.0, dtype=dtype)
    found = similarity(x, x.clone())
    assert found.identical
    assert (found.max_abs, found.max_rel, found.max_ulps_bin) == (0.0, 0.0, 0)
    assert (found.cosine, found.top1, found.kl_nats) == (1.0, 1.0, 0.0)


def test_logits_that_differ_by_a_constant_say_the_same():
    e = noisy((6, 5), 1.0, 3, torch.float64)
    found = similarity(e + 10, e)
    assert found.kl_nats == pytest.approx(0, abs=1e-12)
    assert (found.top1, round(found.max_abs, 9)) == (1.0, 10.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_ulps_are_steps_to_the_next_number(dtype, steps):
    kind = np.float64 if dtype == torch.float64 else np.float32
    for start in (1.0, -1.0, 0.0, 1e-30, -3e20):
        x = kind(start)
        for _ in range(steps):
            x = np.nextafter(x, kind(np.inf))
        pair = torch.tensor([x], dtype=dtype), torch.tensor([start], dtype=dtype)
        assert ulp_distance(*pair).item() == steps
        assert similarity(*pair).ulps == {steps.bit_length(): 1}


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_ulps_of_short_types(dtype, step):
    a, e = (torch.tensor(x, dtype=dtype) for x in ([1 + 3 * step, -1.0], [1.0, 1.0]))
    apart, across = ulp_distance(a, e).tolist()
    assert apart == 3
    # as many steps below zero as above it
    assert across == 2 * ulp_distance(e[1:], torch.zeros(1, dtype=dtype)).item()


def test_ulps_across_zero_and_at_the_far_ends():
    zero = torch.tensor([0.0, -0.0])
    assert ulp_distance(zero, -zero).tolist() == [0, 0]
    tiny = torch.tensor([np.nextafter(np.float32(0), np.float32(1))])
    assert ulp_distance(tiny, -tiny).item() == 2
    most = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert ulp_distance(most, -most).item() == torch.iinfo(torch.int64).max


def test_what_is_not_there_is_none():
    zero, one = torch.zeros(3, 1), torch.ones(3, 1)
    found = similarity(one, zero)
    assert (found.max_rel, found.cosine, found.top1, found.kl_nats) == (None, None, None, None)
    assert similarity(torch.tensor(2.0), torch.tensor(1.0)).top1 is None


def test_a_treatment_within_the_noise_of_the_control_and_one_beyond():
    control = noisy((64, 10), 1.0)
    again, alike, unlike = (control + noisy((64, 10), s, 9) for s in (1e-3, 5e-4, 1e-2))
    assert compare_runs(alike, control, again).within_noise
    assert not compare_runs(unlike, control, again).within_noise
    # a control that repeats itself bit for bit asks for no less of the treatment
    assert compare_runs(control, control, control).within_noise
    assert not compare_runs(alike, control, control).within_noise


def test_a_single_wrong_decision_is_beyond_the_noise():
    control = torch.tensor([[1.0, 1.0 - 1e-3, 0.0]] * 8)
    again, flipped = control - 1e-2, control.clone()
    flipped[3, 1] += 2e-3
    found = compare_runs(flipped, control, again)
    assert found.treatment.max_abs < found.noise.max_abs
    assert (found.treatment.top1, found.within_noise) == (7 / 8, False)


def test_models_are_compared_on_the_same_inputs():
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(6, 4), noisy((32, 6), 1.0, 5)
    found = compare_models(model, model, inputs)
    assert found.noise.identical
    assert found.within_noise
    other = torch.nn.Linear(6, 4)
    assert not compare_models(other, model, inputs).within_noise
    # the control's own noise is seen
    noise = torch.nn.Sequential(model, torch.nn.Dropout(0.5))
    assert not compare_models(model, noise, inputs).noise.identical


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.ones(2), torch.ones(3), "must be alike"),
        (torch.ones(2), torch.ones(2).double(), "must be alike"),
        (torch.ones(0), torch.ones(0), "must be floating-point"),
        (torch.ones(2).int(), torch.ones(2).int(), "must be floating-point"),
        (torch.tensor([1.0, math.nan]), torch.ones(2), "actual must be finite, but 1 of 2"),
        (torch.ones(2), torch.tensor([1.0, math.inf]), "expected must be finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(actual, expected, message):
    with pytest.raises(ValueError, match=message):
        similarity(actual, expected)


def test_gradients_and_the_tensors_are_left_alone():
    a = torch.ones(2, 2, requires_grad=True)
    similarity(a * 2, torch.ones(2, 2))
    assert torch.equal(a, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "step"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, None),
        ([1.0, 2.0, 3.0], [1.0, 2.5, 3.0], 0.0, 1),
        ([1.0, 2.0, 3.0], [1.0, 2.5, 4.0], 0.5, 2),
        ([1.0, math.nan], [1.0, math.nan], 0.0, None),
        ([1.0, math.nan], [1.0, 2.0], 9.0, 1),
        ([1.0, math.inf], [1.0, math.inf], 0.0, None),
        ([1.0], [1.0, 2.0], 0.0, 1),
        ([], [], 0.0, None),
    ],
)
def test_the_first_step_at_which_two_curves_part(actual, expected, tolerance, step):
    assert first_divergent_step(actual, expected, tolerance=tolerance) == step
    assert first_divergent_step(expected, actual, tolerance=tolerance) == step


def test_a_curve_may_part_where_the_control_parts_from_itself():
    control, again = [3.0, 2.0, 1.0, 0.5], [3.0, 2.0, 1.1, 0.4]
    assert compare_curves([3.0, 2.0, 0.9, 0.5], control, again) == Parted(2, 2, True)
    assert compare_curves([3.0, 2.1, 1.0, 0.5], control, again) == Parted(1, 2, False)
    assert compare_curves(control, control, again) == Parted(None, 2, True)
    assert compare_curves(again, control, control) == Parted(2, None, False)
    assert compare_curves(again, control, control, tolerance=0.2) == Parted(None, None, True)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        first_divergent_step([1.0], [1.0], tolerance=tolerance)
