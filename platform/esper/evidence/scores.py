"""Scores over tasks: interquartile mean, performance profile, stratified bootstrap, front.

Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
NeurIPS 2021.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from esper.evidence.paired import Floats

NUM_BOOTSTRAPS = 2_000
NUM_TAUS = 101
CONFIDENCE = 0.95
# interquartile: a quarter of the runs is cut off at either end
_CUT_FRAC = 0.25


def iqm(values: Floats, axis: int | None = None) -> Floats:
    """Mean of the middle half of the values; along one axis, or over all."""
    return np.asarray(stats.trim_mean(values, _CUT_FRAC, axis=axis), dtype=np.float64)


def profile(values: Floats, taus: Floats) -> Floats:
    """Share of the values above each tau: `[..., N]` and `[taus]` give `[..., taus]`."""
    return np.asarray((values[..., None, :] > taus[:, None]).mean(-1), dtype=np.float64)


def stratified_bootstrap(
    strata: Sequence[Floats], statistic: Callable[[Floats], Floats], seed: int
) -> tuple[Floats, Floats]:
    """Percentile interval of a statistic whose runs are drawn again within each stratum.

    Args:
        strata: Values of the runs, `[runs]` for each task.
        statistic: From `[draws, N]` to `[draws, ...]`.
        seed: Of the draws.

    Returns:
        Lower and upper end, `[...]`, at 95 %.
    """
    rng = np.random.default_rng(seed)
    drawn = [s[rng.integers(s.size, size=(NUM_BOOTSTRAPS, s.size))] for s in strata]
    found = statistic(np.concatenate(drawn, axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def tau_grid(scored: Mapping[str, Mapping[str, Floats]]) -> Floats:
    """Where profiles are drawn: from the 5th percentile of all scores, or 0, to their maximum.

    Runs below the grid are not left out: a profile then begins below 1.
    """
    every = [v for by_method in scored.values() for v in by_method.values()]
    if not every:
        return np.empty(0)
    values = np.concatenate(every)
    low, high = min(0.0, float(np.quantile(values, 0.05))), float(values.max())
    return np.linspace(low, high, NUM_TAUS)


def front(values: Mapping[str, float | None], costs: Mapping[str, float | None]) -> set[str]:
    """Names that no other beats: none is as good at less cost, or better at the same.

    Args:
        values: Higher is better; a name without a value is on no front.
        costs: Lower is better; likewise.
    """
    points = {
        name: (value, cost)
        for name, value in values.items()
        if value is not None and (cost := costs[name]) is not None
    }
    return {
        name
        for name, (value, cost) in points.items()
        if not any(
            v >= value and c <= cost and (v, c) != (value, cost) for v, c in points.values()
        )
    }  # fmt: skip
