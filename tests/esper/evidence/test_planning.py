"""What is planned is what happens: closed form, simulation and the published table agree."""

import math

import numpy as np
import pytest

from esper.config.sweep import Guardrail
from esper.evidence.paired import one_sided
from esper.evidence.planning import (
    Assumed,
    collapsed_runs,
    equivalence_power,
    outlook,
    pairs_to_equivalence,
    pairs_to_win,
    pilot,
    sign_flips,
    smallest_effect,
    win_power,
)

ONE_SD = Assumed(mean=1.0, sd=1.0, margin=1.0)
# three guardrails that do not change, with a margin of one standard deviation
THREE = [Assumed(mean=0.0, sd=1.0, margin=1.0)] * 3


@pytest.mark.parametrize("pairs", [2, 7, 8, 16])
def test_fast_p_values_are_those_that_users_get(pairs):
    d = np.random.default_rng(pairs).normal(0.4, 1, (6, pairs))
    expected = np.array([one_sided(row) for row in d])
    np.testing.assert_allclose(np.stack(sign_flips(d), axis=1), expected, rtol=1e-12)


@pytest.mark.parametrize("pairs", [20, 24])
def test_beyond_16_pairs_they_agree_within_the_noise_of_resampling(pairs):
    d = np.random.default_rng(pairs).normal(0.4, 1, (3, pairs))
    expected = np.array([one_sided(row) for row in d])
    # five standard errors of 19,999 patterns
    np.testing.assert_allclose(np.stack(sign_flips(d), axis=1), expected, atol=0.018)


def test_ties_count_as_users_get_them():
    d = np.array([[0.1, 0.2, -0.3, 0.1, 0.2, -0.3], [0.0] * 6, [1.0] * 6])
    expected = np.array([one_sided(row) for row in d])
    np.testing.assert_array_equal(np.stack(sign_flips(d), axis=1), expected)


@pytest.mark.parametrize(("pairs", "power"), [(8, 0.36), (10, 0.58), (16, 0.91), (20, 0.98)])
def test_the_closed_form_gives_the_published_powers(pairs, power):
    assert win_power(ONE_SD, THREE, pairs) == pytest.approx(power, abs=0.02)


def test_needed_pairs_are_the_fewest_that_reach_the_power():
    for guardrails in ([], THREE):
        pairs = pairs_to_win(ONE_SD, guardrails, 0.9)
        assert win_power(ONE_SD, guardrails, pairs) >= 0.9
        assert win_power(ONE_SD, guardrails, pairs - 1) < 0.9
    same = Assumed(0.0, 1.0, 0.7)
    pairs = pairs_to_equivalence(same, 0.9)
    assert equivalence_power(same, pairs) >= 0.9 > equivalence_power(same, pairs - 1)


def test_what_no_number_of_pairs_reaches_is_none():
    assert pairs_to_win(Assumed(-1.0, 1.0), [], 0.9) is None
    assert pairs_to_win(ONE_SD, [Assumed(-1.0, 1.0, 1.0, "latency")], 0.9) is None
    assert pairs_to_equivalence(Assumed(0.7, 1.0, 0.7), 0.9) is None
    assert pairs_to_equivalence(Assumed(0.0, 1.0), 0.9) is None
    # one in twenty equal sweeps is called WIN or LOSE
    assert pairs_to_equivalence(Assumed(0.0, 1.0, 0.7), 0.96) is None
    assert smallest_effect(1.0, THREE, 8, 0.9) is None


def test_a_metric_without_noise_needs_the_fewest_pairs():
    assert pairs_to_win(Assumed(1.0, 1.0), [Assumed(0.0, 0.0, 0.1)], 0.9) == 13
    assert pairs_to_win(Assumed(0.1, 0.0), [], 0.9) == 6


def test_the_smallest_effect_is_found_with_the_wanted_power():
    effect = smallest_effect(2.0, THREE, 16, 0.8)
    assert win_power(Assumed(effect, 2.0), THREE, 16) == pytest.approx(0.8)


def test_the_simulation_agrees_with_the_closed_form():
    rows = outlook(ONE_SD, THREE, power=0.9, pairs=(8, 16, 24), repetitions=2_000)
    for row in rows:
        expected = win_power(ONE_SD, THREE, row.pairs)
        # four standard errors, and what Student's t and the sign-flip test differ by
        assert row.win == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(2_000) + 0.03)
        assert row.equivalent >= equivalence_power(Assumed(0.0, 1.0, 1.0), row.pairs) - 0.05
    assert [row.early_win for row in rows] == sorted(row.early_win for row in rows)
    assert rows[-1].early_win > 0.9
    assert 8 < rows[-1].early_pairs < 16


def test_the_scale_of_the_metric_does_not_matter():
    first, second = (
        outlook(Assumed(k, 2 * k, k), [Assumed(0.0, k, k)], power=0.9, pairs=(8,), repetitions=200)
        for k in (1.0, 1e-3)
    )
    assert (first[0].win, first[0].equivalent) == (second[0].win, second[0].equivalent)
    assert first[0].smallest_effect is None
    assert first[0].early_pairs == second[0].early_pairs


def test_a_pilot_gives_means_deviations_and_margins_as_a_verdict_has_them(plant):
    sweep = plant(
        {"b": [1.0, 2.0, 4.0], "a": [0.5, 1.0, 2.0]},
        guarded={"latency_ms": {"b": [11.0, 12.0, 10.0], "a": [10.0, 10.0, 10.0]}},
        guardrails=[Guardrail(metric="latency_ms", margin=0.2, relative=True)],
        margin=0.3,
    )
    goal, (latency,) = pilot(sweep.records, sweep.registration)
    assert goal == Assumed(3.5 / 3, float(np.std([0.5, 1.0, 2.0], ddof=1)), 0.3, "score")
    assert latency == Assumed(-1.0, 1.0, 2.0, "latency_ms")
    verdict = sweep.primary()
    assert (goal.mean, latency.mean) == (
        verdict.mean_difference, verdict.guardrails[0].mean_difference
    )  # fmt: skip
    assert goal.dz() == pytest.approx(verdict.cohen_dz)


def test_a_pilot_counts_the_collapsed_runs_of_the_arms_that_it_compares(plant):
    nan = math.nan
    sweep = plant({"b": [1.0, nan, 4.0], "a": [0.5, 1.0, 2.0], "other": [nan, nan, 1.0]})
    assert collapsed_runs(sweep.records, sweep.registration) == (1, 6)


@pytest.mark.parametrize("bad", [{"mean": math.nan}, {"sd": -1.0}, {"margin": math.inf}])
def test_a_number_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match=r"must be .*finite, but got"):
        Assumed(**{"mean": 0.0, "sd": 1.0} | bad)
