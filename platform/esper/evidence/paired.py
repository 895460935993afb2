"""Statistics of paired differences: exact tests, effect sizes, and how many pairs they need.

A difference is one number a pair, oriented so that a positive one says "treatment better". All
functions are pure; those that may resample take a seed, so that a verdict can be computed again
bit for bit. Sums that are equal on paper differ in their last bits, and one such bit would decide
a tie: 0.1 + 0.2 - 0.3 is not 0. Every comparison of means here therefore has a tolerance.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from esper.evidence.sequential import e_process

TestName = Literal["sign_flip", "wilcoxon", "e_process"]
Floats = NDArray[np.float64]

EXACT_MAX_PAIRS = 16
NUM_RESAMPLES = 99_999
ALPHA = 0.025
ALPHA_EQUIVALENCE = 0.05
POWER = 0.9
MIN_PAIRS = 6
MAX_PAIRS_NEEDED = 1_000
LARGEST_DZ = 5.0  # scipy's noncentral t gives NaN for dozens of standard deviations
_TIE_FRAC = 1e-9
_ROUNDING_FRAC = 1e-12


class OneSided(NamedTuple):
    """The p-values of one test in both directions."""

    greater: float
    less: float


class WinProbability(NamedTuple):
    """Pairs won and lost, and P(treatment better) among the pairs that are not ties."""

    wins: int
    losses: int
    ties: int
    estimate: float | None
    low: float
    high: float


def _checked(differences: ArrayLike, *, least: int = 1) -> Floats:
    """A finite vector `[pairs]`; a NaN must never reach a comparison, which it would pass."""
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size < least:
        raise ValueError(
            f"differences must be a vector of at least {least}, but got shape {d.shape}; "
            "run more pairs."
        )
    if not np.isfinite(d).all():
        raise ValueError(
            f"differences must be finite, but got {d[~np.isfinite(d)][0]}; "
            "rank collapsed runs first (rank_collapsed)."
        )
    return d


def _mean(x: Floats, axis: int) -> Floats:
    return np.asarray(x.mean(axis=axis), dtype=np.float64)


def _sign_flip(differences: Floats, seed: int) -> OneSided:
    # in sorted order the resampled p-value does not depend on the order of the pairs
    d = np.sort(differences)
    exact = d.size <= EXACT_MAX_PAIRS
    result = stats.permutation_test(
        (d,),
        _mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**d.size if exact else NUM_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    null = np.asarray(result.null_distribution, dtype=np.float64)
    # scipy's own p-value misses ties: its tolerance is relative to the observed mean alone
    observed, tolerance = d.mean(), _TIE_FRAC * np.abs(d).max()
    # the observed order is one of the exact ones, but has to be added to random ones
    extra = 0 if exact else 1
    greater = np.count_nonzero(null >= observed - tolerance) + extra
    less = np.count_nonzero(null <= observed + tolerance) + extra
    return OneSided(float(greater) / (null.size + extra), float(less) / (null.size + extra))


def _wilcoxon(differences: Floats, seed: int) -> OneSided:
    scale = np.abs(differences).max()
    if scale == 0:
        return OneSided(1.0, 1.0)
    d = np.round(differences / scale, 9)
    sizes = np.abs(d)
    if np.all(d != 0) and np.unique(sizes).size == d.size:
        return OneSided(
            float(stats.wilcoxon(d, method="exact", alternative="greater").pvalue),
            float(stats.wilcoxon(d, method="exact", alternative="less").pvalue),
        )
    # scipy's exact table knows neither ties nor zeros; flipping the signs of the ranks does
    return _sign_flip(np.sign(d) * stats.rankdata(sizes), seed)


def _e_process(differences: Floats) -> OneSided:
    # by Ville's inequality, the inverse of the greatest evidence so far is a p-value at any time
    greater, less = (float(np.exp(-max(0.0, e_process(s * differences).max()))) for s in (1, -1))
    return OneSided(greater, less)


def one_sided(differences: ArrayLike, *, test: TestName = "sign_flip", seed: int = 0) -> OneSided:
    """Both one-sided p-values of the registered test, for the price of one.

    Args:
        differences: `[pairs]`, finite.
        test: `sign_flip` tests the mean: under the null the sign of every difference is a fair
            coin, whatever their distribution. `wilcoxon` tests the signed ranks; tied sizes share
            their mean rank, and a zero keeps its rank but counts for neither side (Pratt). Both
            are exact up to 16 pairs, `wilcoxon` without ties and zeros beyond, too. `e_process`
            tests symmetry about zero and may be looked at after every pair, for which it needs
            the differences in the order of their pairs.
        seed: Of the resampling beyond 16 pairs.

    Raises:
        ValueError: With fewer than two differences, or one that is not finite.

    Source: Fisher, The Design of Experiments (1935), section 21; Wilcoxon, Biometrics 1 (1945);
        Pratt, JASA 54 (1959).
    """
    d = _checked(differences, least=2)
    if test == "e_process":
        return _e_process(d)
    return _sign_flip(d, seed) if test == "sign_flip" else _wilcoxon(d, seed)


def shift(differences: ArrayLike, by: float) -> Floats:
    """`differences + by`, with zero where only rounding is left.

    Without it a metric that worsens by exactly its margin in every pair would pass or fail by
    the last bit of that sum.
    """
    d = _checked(differences)
    shifted = d + by
    rounding = _ROUNDING_FRAC * max(float(np.abs(d).max()), abs(by))
    return np.where(np.abs(shifted) <= rounding, 0.0, shifted)


def equivalence_p(
    differences: ArrayLike, margin: float, *, test: TestName = "sign_flip", seed: int = 0
) -> float:
    """Two one-sided tests: the larger p of `difference > -margin` and `difference < margin`.

    Raises:
        ValueError: If `margin` is not positive, with fewer than two differences, or one that is not
            finite.

    Source: Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    if not 0 < margin < math.inf:
        raise ValueError(
            f"margin must be positive and finite, but got {margin=}; set it beforehand."
        )
    above = one_sided(shift(differences, margin), test=test, seed=seed).greater
    below = one_sided(shift(differences, -margin), test=test, seed=seed).less
    return max(above, below)


def t_interval(differences: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean difference, in units of the metric.

    Raises:
        ValueError: With fewer than two differences, or one that is not finite.
    """
    d = _checked(differences, least=2)
    half = stats.t.ppf(0.5 + confidence / 2, d.size - 1) * d.std(ddof=1) / math.sqrt(d.size)
    return float(d.mean() - half), float(d.mean() + half)


def hodges_lehmann(differences: ArrayLike) -> float:
    """Median of the means of all pairs of differences, each with itself included.

    Source: Hodges and Lehmann, Annals of Mathematical Statistics 34 (1963).
    """
    d = _checked(differences)
    i, j = np.triu_indices(d.size)
    return float(np.median((d[i] + d[j]) / 2))


def win_probability(differences: ArrayLike, confidence: float = 0.95) -> WinProbability:
    """P(treatment better) with its Wilson interval; ties are counted apart.

    With ties alone nothing is known: the estimate is None and the interval is 0 to 1.
    """
    d = _checked(differences)
    wins, losses = int(np.count_nonzero(d > 0)), int(np.count_nonzero(d < 0))
    ties = d.size - wins - losses
    if ties == d.size:
        return WinProbability(0, 0, ties, None, 0.0, 1.0)
    decided = wins + losses
    interval = stats.binomtest(wins, decided).proportion_ci(confidence, method="wilson")
    return WinProbability(
        wins, losses, ties, wins / decided, float(interval.low), float(interval.high)
    )


def cohen_dz(differences: ArrayLike) -> float:
    """Mean difference over the standard deviation of the differences.

    0 / 0 is 0: the arms are equal. A constant difference other than 0 is infinitely many standard
    deviations, with its sign.

    Raises:
        ValueError: With fewer than two differences, or one that is not finite.
    """
    d = _checked(differences, least=2)
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    if sd <= _ROUNDING_FRAC * abs(mean):
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / sd


def mcnemar_exact_p(treatment_collapsed: ArrayLike, control_collapsed: ArrayLike) -> float:
    """Exact McNemar test that the treatment collapses more often than the control.

    Args:
        treatment_collapsed: Truth values `[pairs]`.
        control_collapsed: Truth values `[pairs]`.

    Returns:
        The p-value; only pairs with exactly one collapse count, and it is 1 where there is none.

    Source: McNemar, Psychometrika 12 (1947).
    """
    t = np.asarray(treatment_collapsed, dtype=bool)
    c = np.asarray(control_collapsed, dtype=bool)
    if t.shape != c.shape or t.ndim != 1:
        raise ValueError(
            f"both arms must have one value a pair, but got shapes {t.shape} and {c.shape}; "
            "complete the pairs."
        )
    only_t, only_c = int(np.count_nonzero(t & ~c)), int(np.count_nonzero(c & ~t))
    if only_t + only_c == 0:
        return 1.0
    return float(stats.binomtest(only_t, only_t + only_c, alternative="greater").pvalue)


def rank_collapsed(
    values_by_arm: Mapping[str, Sequence[float] | Floats],
    *,
    higher_is_better: bool,
    margin: float,
) -> dict[str, Floats]:
    """Give every collapsed run a value that is worse than that of any run that did not collapse.

    With `best` and `worst` over the finite values of all arms, the value is `worst` made worse by
    `|best - worst| + margin` (by `max(|worst|, 1)` where that is 0). A pair with one collapse thus
    differs by more than any pair without, and never counts as equivalent.

    Args:
        values_by_arm: One value a run; NaN and infinities mark a collapse.
        higher_is_better: Which end is the worst.
        margin: Equivalence or guardrail margin, in units of the metric.

    Raises:
        ValueError: If every run collapsed, which leaves nothing to rank against.
    """
    sign = 1.0 if higher_is_better else -1.0
    arms = {a: sign * np.asarray(v, dtype=np.float64) for a, v in values_by_arm.items()}
    everything = np.concatenate([*arms.values(), np.empty(0)])
    finite = everything[np.isfinite(everything)]
    if finite.size == 0:
        raise ValueError(
            "values must have at least one finite run, but every run collapsed; "
            "nothing can be ranked."
        )
    worst, best = float(finite.min()), float(finite.max())
    gap = (best - worst + margin) or max(abs(worst), 1.0)
    # beside a huge value a small gap would vanish
    collapsed = min(worst - gap, math.nextafter(worst, -math.inf))
    return {a: sign * np.where(np.isfinite(v), v, collapsed) for a, v in arms.items()}


def t_power(dz: float, pairs: int, alpha: float) -> float:
    """Power of a one-sided paired t test.

    Args:
        dz: Mean difference in standard deviations of the differences; counted as at most 5.
        pairs: At least 2.
        alpha: Error rate of the test.
    """
    dz = min(max(dz, -LARGEST_DZ), LARGEST_DZ)
    least = stats.t.isf(alpha, pairs - 1)
    return float(1 - special.nctdtr(pairs - 1, dz * math.sqrt(pairs), least))


def pairs_for_effect(effect: float, *, alpha: float, power: float = POWER) -> int | None:
    """Pairs after which a one-sided paired t test finds `effect` standard deviations.

    Returns:
        At least 6 (fewer can reach no exact p <= 0.025); None beyond 1,000 pairs.
    """

    def power_at(pairs: int) -> float:
        return t_power(effect, pairs, alpha)

    if effect <= 0 or power_at(MAX_PAIRS_NEEDED) < power:
        return None
    return MIN_PAIRS + bisect_left(range(MIN_PAIRS, MAX_PAIRS_NEEDED), power, key=power_at)


def pairs_needed(differences: ArrayLike, margin: float, *, alpha: float = ALPHA) -> int | None:
    """Pairs that a new sweep needs for a decision, if its differences look like these.

    The smaller of two numbers, each at power 0.9: pairs for WIN or LOSE at the observed d_z, and
    pairs for EQUIVALENT at the observed distance to the nearer margin. For the latter each of the
    two tests gets power 0.95, so that both succeed with 0.9 wherever the mean lies.

    Returns:
        A total, not an addition, and more than the pairs at hand; None beyond 1,000 pairs.

    Raises:
        ValueError: With fewer than two differences, or one that is not finite.
    """
    d = _checked(differences, least=2)
    room = margin - abs(float(d.mean()))
    sd = float(d.std(ddof=1))
    distance = room / sd if sd > 0 else math.copysign(math.inf, room)
    counts = (
        pairs_for_effect(abs(cohen_dz(d)), alpha=alpha),
        pairs_for_effect(distance, alpha=ALPHA_EQUIVALENCE, power=(1 + POWER) / 2),
    )
    least = min((n for n in counts if n is not None), default=None)
    return None if least is None else max(least, d.size + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values of one family, in the given order.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return [float(q) for q in adjusted]
