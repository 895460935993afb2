"""Evidence that may be looked at before the end: planned looks, and an e-process.

A fixed-sample test that is looked at again and again finds a winner sooner or later.

Planned looks share every error rate among them: at each, a test may err with its share of the rate
alone, and by the union bound all of them together with the rate itself, whatever the test and
whatever the reason to stop. The first shares are small, so that little is lost at the last look.

The e-process is a bet against "the differences are symmetric about zero or lie lower": under that
null its value reaches 1 / alpha at any time with probability at most alpha.
"""

import math
from bisect import insort
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BETS = (0.25, 0.5, 1.0, 2.0)


class Look(NamedTuple):
    """A moment at which a sweep is judged.

    Attributes:
        number: Its number, from 1.
        of: How many there are.
        pairs: The pairs that it sees.
        share: What it may spend of each error rate.
        anytime: The registered test may be looked at as often as one likes: only what else is
            tested, collapses, has to share.
    """

    number: int
    of: int
    pairs: int
    share: float
    anytime: bool = False

    @property
    def test_share(self) -> float:
        """What the registered test may spend of each error rate."""
        return 1.0 if self.anytime else self.share


def plan_looks(looks: Sequence[int], pairs: int) -> list[Look]:
    """The looks of a sweep; without planned ones a single look at the end, with all of each rate.

    The share spent by a look is the square of the fraction of pairs that it sees, so that 12, 20
    and 30 pairs get 16 %, 28 % and 56 %.

    Args:
        looks: Rising numbers of pairs, the last one all of them; or none.
        pairs: All pairs.

    Source: Kim and DeMets, Biometrika 74 (1987), the power family with exponent 2; Lan and DeMets,
    Biometrika 70 (1983), for spending.
    """
    ends = [0, *(looks or (pairs,))]
    return [
        Look(number, len(ends) - 1, end, (end * end - start * start) / (pairs * pairs))
        for number, (start, end) in enumerate(pairwise(ends), start=1)
    ]


def e_process(differences: ArrayLike) -> Floats:
    """Evidence, after each pair, that the differences are above zero.

    `E_t = mean over lambda of prod_i exp(lambda x_i) / cosh(lambda x_i)` with
    `x_i = d_i / median(|d_1|, ..., |d_(i-1)|)`; the first pair only sets the scale, and so does a
    pair before which all differences were zero. Each factor is `1 + tanh(lambda x_i)`, so that no
    single pair can do more than double the evidence.

    Args:
        differences: `[pairs]`, finite, in the order in which they were measured.

    Returns:
        `[pairs]`, natural logarithms of E.

    Raises:
        ValueError: If a difference is not finite, or there is none.

    Source: Ramdas et al., Admissible anytime-valid sequential inference must rely on nonnegative
    martingales (2020), example of symmetric distributions; Ville (1939) for the bound.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0 or not np.isfinite(d).all():
        raise ValueError(
            f"differences must be a vector of finite numbers, but got {differences!r}; "
            "give collapsed runs a finite value first."
        )
    x = _scaled(d)
    z = np.outer(BETS, x)
    # log(exp(z) / cosh(z)) without overflow
    gains = z - np.abs(z) + math.log(2) - np.log1p(np.exp(-2 * np.abs(z)))
    wealth = np.cumsum(gains, axis=1)
    top = wealth.max(axis=0)
    return np.asarray(top + np.log(np.exp(wealth - top).mean(axis=0)), dtype=np.float64)


def _scaled(d: Floats) -> Floats:
    """Each difference over the median size of those before it; 0 where there is no scale yet."""
    x = np.zeros_like(d)
    sizes: list[float] = []
    for i, value in enumerate(d.tolist()):
        if sizes:
            n = len(sizes)
            scale = (sizes[n // 2] + sizes[(n - 1) // 2]) / 2
            x[i] = value / scale if scale > 0 else 0.0
        insort(sizes, abs(value))
    return x
