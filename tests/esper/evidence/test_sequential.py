"""The e-process keeps its promise at any time, also for noise that is not normal."""

import math

import numpy as np
import pytest

from esper.evidence.sequential import BETS, Look, e_process, plan_looks

NOISES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy": lambda rng, n: rng.standard_t(2, size=n),
    "two values": lambda rng, n: rng.choice((-1.0, 1.0), size=n),
    "mostly zero": lambda rng, n: rng.choice((-1.0, 0.0, 0.0, 0.0, 1.0), size=n),
}


def by_hand(d):
    """The definition, one pair at a time, without logarithms."""
    wealth, values = np.ones(len(BETS)), []
    for i, x in enumerate(d):
        scale = np.median(np.abs(d[:i])) if i else 0
        if scale > 0:
            bets = np.array(BETS) * x / scale
            wealth = wealth * np.exp(bets) / np.cosh(bets)
        values.append(wealth.mean())
    return np.array(values)


@pytest.mark.parametrize("noise", NOISES)
def test_values_are_those_of_the_definition(noise):
    d = NOISES[noise](np.random.default_rng(1), 30) + 0.3
    np.testing.assert_allclose(np.exp(e_process(d)), by_hand(d), rtol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("pairs", [30, 200])
def test_a_null_rarely_ever_reaches_the_limit(noise, pairs):
    rng, repetitions = np.random.default_rng(2), 2_000
    limit = math.log(1 / 0.05)
    ever = sum(e_process(NOISES[noise](rng, pairs)).max() >= limit for _ in range(repetitions))
    # Ville's bound and three standard errors of the simulation
    assert ever / repetitions <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)


def test_one_standard_deviation_is_found_in_thirty_pairs():
    rng = np.random.default_rng(3)
    limit = math.log(1 / 0.025)
    found = np.mean([e_process(rng.normal(1, 1, 30)).max() >= limit for _ in range(1_000)])
    assert found >= 0.95


def test_scale_does_not_matter_and_order_of_magnitude_does_not_overflow():
    d = np.random.default_rng(4).normal(0.5, 1, 40)
    np.testing.assert_allclose(e_process(d * 1e-9), e_process(d))
    assert np.isfinite(e_process(np.r_[d, 1e300, -1e300])).all()


def test_a_constant_difference_gains_and_zeros_say_nothing():
    assert e_process(np.ones(12))[-1] > math.log(100)
    assert e_process(-np.ones(12))[-1] < 0
    assert not e_process(np.zeros(12)).any()
    assert e_process([5.0])[0] == 0


def test_planned_looks_share_what_a_single_one_would_have():
    assert plan_looks((), 16) == [Look(1, 1, 16, 1.0)]
    looks = plan_looks((12, 20, 30), 30)
    assert [(look.number, look.of, look.pairs) for look in looks] == [
        (1, 3, 12), (2, 3, 20), (3, 3, 30),
    ]  # fmt: skip
    assert [look.share for look in looks] == pytest.approx([0.16, 0.2844, 0.5556], abs=1e-4)
    assert sum(look.share for look in looks) == pytest.approx(1)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_what_is_no_vector_of_numbers_is_refused(bad):
    with pytest.raises(ValueError, match="must be a vector of finite numbers"):
        e_process(bad)
