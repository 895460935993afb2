"""What a policy would have gained, from the logs of another: inverse propensity and doubly robust.

Dudik, Langford, Li: Doubly robust policy evaluation and learning (ICML 2011). Logs come in runs;
intervals are percentiles of a bootstrap over whole runs, whose choices depend on each other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean reward with its 95 % interval."""

    value: float
    low: float
    high: float


class OfflineValue(NamedTuple):
    """The value of a policy, estimated in three ways.

    Attributes:
        ips: Inverse propensity scores: unbiased, but wide where the policies differ.
        snips: Self-normalised: a little biased, narrower.
        dr: Doubly robust: unbiased, narrow where the model of the reward is good.
        effective: Effective number of logged choices: of 1,000 that the policy would never have
            made, none says anything.
    """

    ips: Estimate
    snips: Estimate
    dr: Estimate
    effective: float


def offline_value(
    rewards: ArrayLike,
    propensities: ArrayLike,
    target: ArrayLike,
    predicted: ArrayLike,
    expected: ArrayLike,
    runs: Sequence[str],
    seed: int = 0,
) -> OfflineValue:
    """The value of a target policy on logged choices.

    Args:
        rewards: What the logged choices brought, shape `[N]`.
        propensities: Probability with which each was logged, in (0, 1].
        target: Probability with which the target policy would have made it, in [0, 1].
        predicted: Reward that a model predicts for the logged choice.
        expected: Mean predicted reward under the target policy.
        runs: Name of the run of each choice.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there is no choice, lengths differ, or a probability is out of range.
    """
    r, p, t, q, v = (
        np.asarray(x, np.float64) for x in (rewards, propensities, target, predicted, expected)
    )
    if not len(r) or any(x.shape != r.shape for x in (p, t, q, v)) or len(runs) != len(r):
        raise ValueError("arguments must have one item for each logged choice, and at least one.")
    if (p <= 0).any() or (p > 1).any() or (t < 0).any() or (t > 1 + 1e-9).any():
        raise ValueError("probabilities must be in (0, 1], those of the target in [0, 1].")
    w = t / p
    names, codes = np.unique(np.array(runs), return_inverse=True)
    # sums by run: [runs, 4]; every estimate is a ratio of two of them
    columns = np.stack([w * r, w, v + w * (r - q), np.ones_like(r)], axis=1)
    sums = np.zeros((len(names), 4))
    np.add.at(sums, codes, columns)
    rng = np.random.default_rng(seed)
    again = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), _RESAMPLES) @ sums
    whole = sums.sum(axis=0)

    def ratio(above: int, below: int) -> Estimate:
        draws = again[:, above] / np.where(again[:, below] > 0, again[:, below], np.nan)
        low, high = np.nanpercentile(draws, [2.5, 97.5]).tolist()
        value = float(whole[above] / whole[below]) if whole[below] > 0 else float("nan")
        return Estimate(value, low, high)

    effective = float(w.sum() ** 2 / (w**2).sum()) if (w**2).sum() > 0 else 0.0
    return OfflineValue(ratio(0, 3), ratio(0, 1), ratio(2, 3), effective)
