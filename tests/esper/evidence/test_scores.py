"""Interquartile mean, profile, bootstrap and front, against values worked by hand and scipy."""

import numpy as np
import pytest
from scipy import stats

from esper.evidence.scores import front, iqm, profile, stratified_bootstrap, tau_grid


def test_iqm_is_the_mean_of_the_middle_half():
    values = np.array([-100.0, 1, 2, 3, 4, 5, 6, 1000])
    assert iqm(values) == 3.5
    np.testing.assert_array_equal(iqm(np.stack([values, values + 1]), axis=1), [3.5, 4.5])


def test_a_profile_is_the_share_of_runs_above():
    taus = np.array([-1.0, 0.5, 1.0, 3.0])
    np.testing.assert_array_equal(profile(np.array([0.0, 1, 2, 3]), taus), [1, 0.75, 0.5, 0])


def test_the_bootstrap_draws_within_each_stratum_and_agrees_with_scipy():
    rng = np.random.default_rng(1)
    apart = [np.full(5, 0.0), np.full(5, 10.0)]
    low, high = stratified_bootstrap(apart, lambda x: x.mean(1), 0)
    assert low == high == 5
    values = rng.normal(size=40)
    low, high = stratified_bootstrap([values], lambda x: x.mean(1), 0)
    reference = stats.bootstrap((values,), np.mean, method="percentile", rng=2)
    expected = reference.confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_the_bootstrap_interval_covers_about_as_often_as_it_says():
    """Ten runs of each of four tasks, as in an arena: a little below 95 %."""
    rng, hits = np.random.default_rng(2), 0
    for repeat in range(200):
        strata = list(rng.normal(size=(4, 10)))
        low, high = stratified_bootstrap(strata, lambda x: iqm(x, axis=1), repeat)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_front_holds_what_nothing_beats_and_nothing_without_a_cost():
    values = {"cheap": 1.0, "good": 3.0, "beaten": 2.0, "tied": 3.0, "unknown": 9.0, "none": None}
    costs = {"cheap": 1.0, "good": 2.0, "beaten": 2.0, "tied": 2.0, "unknown": None, "none": 0.0}
    assert front(values, costs) == {"cheap", "good", "tied"}


def test_the_grid_of_a_profile_reaches_from_the_host_or_lower_to_the_best_run():
    low = tau_grid({"a": {"m": np.linspace(-1, 1, 101)}, "b": {"m": np.array([1.5])}})
    assert low[0] == pytest.approx(-0.9, abs=0.02)
    assert low[-1] == 1.5
    high = tau_grid({"a": {"m": np.array([0.5, 0.9])}})
    assert (high[0], high[-1]) == (0.0, 0.9)
    assert tau_grid({}).size == 0
