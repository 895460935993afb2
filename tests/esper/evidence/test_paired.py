"""The paired statistics against enumeration, hand-computed cases and published tables."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from esper.evidence.paired import (
    cohen_dz,
    equivalence_p,
    hodges_lehmann,
    holm,
    mcnemar_exact_p,
    one_sided,
    pairs_for_effect,
    pairs_needed,
    rank_collapsed,
    shift,
    t_interval,
    t_power,
    win_probability,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
INTEGERS = st.lists(st.integers(-9, 9), min_size=2, max_size=7)


def enumerated(values: Sequence[int]) -> tuple[float, float]:
    """Both one-sided p of the sign flips on integers, where a sum has no rounding."""
    sums = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    greater = sum(s >= sum(values) for s in sums)
    less = sum(s <= sum(values) for s in sums)
    return greater / len(sums), less / len(sums)


@settings(max_examples=60, deadline=None)
@given(INTEGERS)
def test_sign_flip_is_the_enumeration(values: list[int]) -> None:
    greater, less = enumerated(values)
    # tenths have rounding errors, which must not part what is tied on paper
    tenths = [v / 10 for v in values]
    assert one_sided(tenths) == (greater, less)


def test_a_tie_on_paper_counts_although_its_last_bits_differ() -> None:
    # of the 8 sign patterns, 5 have a sum of at least 0.1 + 0.2 - 0.3 = 0
    assert one_sided([0.1, 0.2, -0.3]).greater == 5 / 8


def test_sign_flip_is_exact_at_16_pairs_and_resampled_beyond() -> None:
    assert one_sided([1.0] * 16).greater == 2.0**-16
    # no draw but the observed one reaches it: (0 + 1) / (99,999 + 1), and never 0
    assert one_sided([1.0] * 40).greater == pytest.approx(1e-5)


def test_resampled_p_depends_on_the_seed_alone_and_lies_near_the_exact_one() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 18)
    p = one_sided(d, seed=5).greater
    assert p == one_sided(d[::-1], seed=5).greater
    assert p != one_sided(d, seed=6).greater
    half = np.array(list(itertools.product((1.0, -1.0), repeat=17))) @ d[1:]
    null = np.concatenate([d[0] + half, -d[0] + half])
    exact = np.mean(null >= d.sum() - 1e-9)
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / 99_999)


def enumerated_ranks(values: Sequence[int]) -> float:
    ranks = np.sign(values) * stats.rankdata(np.abs(values))
    return enumerated([int(2 * r) for r in ranks])[0]


@settings(max_examples=60, deadline=None)
@given(INTEGERS)
def test_wilcoxon_is_exact_with_ties_and_zeros(values: list[int]) -> None:
    assert one_sided([v / 10 for v in values], test="wilcoxon").greater == pytest.approx(
        enumerated_ranks(values), abs=1e-12
    )


def test_wilcoxon_by_hand() -> None:
    # ranks 1, 2, -3, 4: positive sum 7; patterns with at least 7: {1234, 234, 134, 34, 124}
    assert one_sided([0.1, 0.2, -0.3, 0.4], test="wilcoxon").greater == 5 / 16
    assert one_sided([0.0] * 8, test="wilcoxon").greater == 1.0
    assert one_sided([0.0] * 8, test="wilcoxon").less == 1.0


@pytest.mark.parametrize("test", ["sign_flip", "wilcoxon"])
@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf]])
def test_what_is_not_finite_has_no_p(test, bad) -> None:
    with pytest.raises(ValueError, match="differences must be finite"):
        one_sided(bad, test=test)


@pytest.mark.parametrize("few", [[], [1.0]])
def test_one_pair_is_no_sample(few) -> None:
    for function in (t_interval, cohen_dz, lambda d: one_sided(d).greater):
        with pytest.raises(ValueError, match="at least 2"):
            function(few)


def test_equivalence_takes_the_worse_side() -> None:
    d = [0.4, 0.5, 0.6, 0.5, 0.45, 0.55]
    assert equivalence_p(d, 1.0) == 1 / 64
    assert equivalence_p(d, 0.45) == one_sided(np.array(d) - 0.45).less
    assert equivalence_p(d, 0.45) > 0.5
    assert equivalence_p(np.array(d) * -1, 0.45) == equivalence_p(d, 0.45)


def not_worse(differences, margin: float) -> float:
    """As guardrails are judged: the p of "not worse by `margin` or more"."""
    return one_sided(shift(differences, margin)).greater


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(0.1, 1))
def test_differences_beyond_the_margin_are_never_equivalent(noise, margin) -> None:
    assert equivalence_p(np.array(noise) + 1.01 + margin, margin) >= 0.5
    assert equivalence_p(np.array(noise) - 1.01 - margin, margin) >= 0.5
    assert not_worse(np.array(noise) - 1.01 - margin, margin) >= 0.5


def test_non_inferiority_by_hand() -> None:
    assert not_worse([-0.1] * 6, 0.2) == 1 / 64
    assert not_worse([-0.3] * 6, 0.2) == 1.0
    # a worsening of exactly the margin does not turn on the last bit of 0.3 - 0.1 - 0.2
    assert not_worse([0.1 - 0.3] * 6, 0.2) == 1.0
    assert not shift([0.1 - 0.3] * 6, 0.2).any()


@pytest.mark.parametrize("margin", [0.0, -0.1, math.nan, math.inf])
def test_a_margin_must_be_a_margin(margin) -> None:
    with pytest.raises(ValueError, match="margin must be positive"):
        equivalence_p([0.1, 0.2], margin)


def test_t_interval_is_that_of_scipy() -> None:
    d = np.random.default_rng(1).normal(0.2, 1, 9)
    expected = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert t_interval(d) == pytest.approx((expected.low, expected.high))
    assert t_interval([0.5] * 4) == (0.5, 0.5)


def test_hodges_lehmann_by_hand() -> None:
    # means of all pairs of 1, 2, 9: 1, 1.5, 5, 2, 5.5, 9; their median is (2 + 5) / 2
    assert hodges_lehmann([1.0, 2.0, 9.0]) == 3.5


def test_win_probability_keeps_ties_apart() -> None:
    won = win_probability([1.0, 2.0, 3.0, -1.0, 0.0, 0.0])
    assert (won.wins, won.losses, won.ties, won.estimate) == (3, 1, 2, 0.75)
    # Wilson for 3 of 4: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), z = 1.96
    z2 = stats.norm.ppf(0.975) ** 2
    half = math.sqrt(z2) * math.sqrt(0.75 * 0.25 / 4 + z2 / 64)
    assert won.low == pytest.approx((0.75 + z2 / 8 - half) / (1 + z2 / 4))
    assert won.high == pytest.approx((0.75 + z2 / 8 + half) / (1 + z2 / 4))
    assert win_probability([0.0, 0.0]) == (0, 0, 2, None, 0.0, 1.0)


def test_cohen_dz_by_hand_and_without_spread() -> None:
    assert cohen_dz([1.0, 2.0, 3.0]) == 2.0
    assert cohen_dz([0.0, 0.0]) == 0.0
    assert cohen_dz([0.3, 0.3]) == math.inf
    assert cohen_dz([0.1 - 0.4, -0.3]) == -math.inf


def test_mcnemar_counts_only_pairs_with_one_collapse() -> None:
    t, c = [1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]
    # 5 against 1: (6 + 1) / 64 for at least 5 of 6
    assert mcnemar_exact_p(t, c) == pytest.approx(7 / 64)
    assert mcnemar_exact_p(c, t) == pytest.approx(63 / 64)
    assert mcnemar_exact_p([1, 0], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="one value a pair"):
        mcnemar_exact_p([1], [1, 0])


@pytest.mark.parametrize("higher_is_better", [True, False])
@settings(max_examples=50, deadline=None)
@given(
    finite=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6),
    margin=st.floats(0, 10),
    mark=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_collapsed_run_is_worse_than_every_other_one(
    higher_is_better, finite, margin, mark
) -> None:
    ranked = rank_collapsed(
        {"a": [mark], "b": finite}, higher_is_better=higher_is_better, margin=margin
    )
    assert ranked["b"].tolist() == finite
    sign = 1 if higher_is_better else -1
    oriented = sign * np.array(finite)
    assert np.all(oriented - sign * ranked["a"] >= np.ptp(oriented) * (1 - 1e-12))
    assert sign * ranked["a"][0] < oriented.min()


def test_the_rank_of_a_collapse_by_hand() -> None:
    values = {"a": [math.nan, 0.9], "b": [0.5, 0.7]}
    up = rank_collapsed(values, higher_is_better=True, margin=0.1)
    assert up["a"].tolist() == pytest.approx([0.5 - 0.4 - 0.1, 0.9])
    down = rank_collapsed(values, higher_is_better=False, margin=0.1)
    assert down["a"].tolist() == pytest.approx([0.9 + 0.4 + 0.1, 0.9])
    with pytest.raises(ValueError, match="every run collapsed"):
        rank_collapsed({"a": [math.nan], "b": [math.inf]}, higher_is_better=True, margin=0.1)


def test_pairs_for_effect_is_the_textbook_number() -> None:
    # noncentral t by hand: the first n whose power reaches 0.9 at one-sided 0.025
    def power(n: int, effect: float) -> float:
        critical = stats.t.ppf(0.975, n - 1)
        return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n)))

    for effect in (0.3, 0.5, 1.0):
        n = pairs_for_effect(effect, alpha=0.025)
        assert n is not None
        assert power(n, effect) >= 0.9 > power(n - 1, effect)
    assert pairs_for_effect(math.inf, alpha=0.025) == 6
    assert pairs_for_effect(0.01, alpha=0.025) is None
    assert pairs_for_effect(0.0, alpha=0.025) is None


def test_pairs_needed_takes_the_nearer_decision() -> None:
    spread = np.array([-1.0, 1.0, -0.5, 0.5, -0.2, 0.2])
    sd = spread.std(ddof=1)
    # no effect: only equivalence can ever be shown
    assert pairs_needed(spread, sd) == pairs_for_effect(1.0, alpha=0.05, power=0.95)
    # at the margin: only a difference can be shown
    assert pairs_needed(spread + 0.5 * sd, 0.5 * sd) == pairs_for_effect(0.5, alpha=0.025)
    assert pairs_needed(spread, sd / 1000) is None
    assert pairs_needed([0.2, 0.2, 0.2], 0.1) == 6
    # what did not decide once is not enough
    assert pairs_needed(np.tile(spread, 5), 100.0) == 31


@pytest.mark.parametrize("dz", [-7.0, -0.3, 0.0, 0.2, 1.0, 4.9])
@pytest.mark.parametrize("pairs", [2, 6, 16, 1000])
def test_power_is_that_of_statsmodels(dz, pairs) -> None:
    known = TTestPower().power(max(dz, -5.0), pairs, 0.025, alternative="larger")
    assert t_power(dz, pairs, 0.025) == known
    assert t_power(50.0, 16, 0.025) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@settings(max_examples=60, deadline=None)
@given(P_VALUES)
def test_holm_is_that_of_statsmodels_bit_for_bit(p_values: list[float]) -> None:
    assert holm(p_values) == multipletests(p_values, method="holm")[1].tolist()
