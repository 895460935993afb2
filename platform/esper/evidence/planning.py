"""How many pairs a question needs, and what a number of pairs can see, before anything is run.

Two ways, which check each other. Numbers of pairs come from Student's paired t test, whose power is
known in closed form; the chances that all guardrails pass are multiplied. Chances of a verdict are
simulated: normal differences, the exact sign-flip test and the real rule (`verdict.decide`).
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from esper.evidence.compare import (
    ALPHA_GUARDRAIL,
    GuardrailResult,
    PValues,
    differences_of,
    margin_of,
    values_of,
)
from esper.evidence.health import COLLAPSE, sides_of
from esper.evidence.paired import (
    ALPHA,
    ALPHA_EQUIVALENCE,
    LARGEST_DZ,
    MAX_PAIRS_NEEDED,
    MIN_PAIRS,
    Floats,
    t_power,
)
from esper.evidence.records import Registration, TrialRecord
from esper.evidence.sequential import e_process
from esper.evidence.verdict import decide

PAIRS = (8, 12, 16, 20, 30)
REPETITIONS = 1_000
# of a pilot's runs; more of them, and the test is that of ranks
MAX_COLLAPSED_FRAC = 0.02
LARGEST_EXACT = 20
NUM_PATTERNS = 19_999
_TIE_FRAC = 1e-9


@dataclass(frozen=True)
class Assumed:
    """The paired differences of one metric: normal, positive where the treatment is better.

    Attributes:
        mean: In units of the metric.
        sd: Of the differences, not of the runs; positive.
        margin: Of equivalence, or of a guardrail; None: equivalence is not asked for.
        name: Of the metric.
    """

    mean: float
    sd: float
    margin: float | None = None
    name: str = "metric"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("effect", self.mean, None), ("sd", self.sd, 0.0), ("margin", self.margin, 0.0),
        ):  # fmt: skip
            if value is None or (math.isfinite(value) and (least is None or value >= least)):
                continue
            rule = "finite" if least is None else "at least 0 and finite"
            raise ValueError(f"{name} must be {rule}, but got {value} for '{self.name}'.")

    def dz(self, by: float = 0.0) -> float:
        """Standard deviations from `-by` to the mean."""
        distance = self.mean + by
        return distance / self.sd if self.sd else math.copysign(math.inf, distance or -1.0)


@dataclass(frozen=True)
class Outlook:
    """What a number of pairs can be expected to give.

    Attributes:
        pairs: Of the sweep.
        win: Share of WIN at the assumed effect, simulated.
        equivalent: Share of EQUIVALENT if there is no difference, simulated; None without a margin.
        smallest_effect: What WIN finds with the wanted power; None if the guardrails forbid it.
        early_win: Share of sweeps in which the e-process says "better" by then; the guardrails are
            not looked at.
        early_pairs: Mean number of pairs after which it stops, those that never stop at `pairs`.
    """

    pairs: int
    win: float
    equivalent: float | None
    smallest_effect: float | None
    early_win: float
    early_pairs: float


def pilot(
    records: Sequence[TrialRecord], registration: Registration
) -> tuple[Assumed, list[Assumed]]:
    """The primary metric and the guardrails as a healthy pilot's primary comparison shows them.

    Differences of a collapsed run are those of its rank, as in a verdict. The guardrail of the
    collapse rate is left out: its chances depend on what made the runs collapse.
    """
    question = registration.question
    goal = question.goal
    assumed = []
    for part in (goal, *(g for g in question.guardrails if g.metric != COLLAPSE)):
        margin = margin_of(records, question, part)
        d = differences_of(records, registration, question, part, margin)
        assumed.append(Assumed(float(d.mean()), float(d.std(ddof=1)), margin, part.metric))
    return assumed[0], assumed[1:]


def collapsed_runs(records: Sequence[TrialRecord], registration: Registration) -> tuple[int, int]:
    """Runs of a pilot's primary comparison that collapsed, and all of them.

    Beyond `MAX_COLLAPSED_FRAC`, the mean of the differences hangs on the value that a collapsed run
    is ranked at; the signed-rank test only asks for its rank.
    """
    question = registration.question
    values = np.concatenate(
        [values_of(records, arm, question.metric) for arm in sides_of(question)]
    )
    return int(np.isnan(values).sum()), values.size


def win_power(goal: Assumed, guardrails: Sequence[Assumed], pairs: int) -> float:
    """Chance of WIN by Student's t, with guardrails that are independent of one another."""
    passed = (t_power(g.dz(g.margin or 0.0), pairs, ALPHA_GUARDRAIL) for g in guardrails)
    return t_power(goal.dz(), pairs, ALPHA) * math.prod(passed)


def equivalence_power(goal: Assumed, pairs: int) -> float:
    """Chance of EQUIVALENT by Student's t, a lower bound.

    Both one-sided tests at the margin succeed, and no difference is found: the rule calls up to 5 %
    of equal arms WIN or LOSE, so that a chance above 0.95 is never reached.
    """
    margin = goal.margin or 0.0
    above, below = goal.dz(margin), Assumed(-goal.mean, goal.sd).dz(margin)
    both = sum(t_power(dz, pairs, ALPHA_EQUIVALENCE) for dz in (above, below)) - 1
    return max(0.0, both - 2 * ALPHA)


def pairs_to_win(goal: Assumed, guardrails: Sequence[Assumed], power: float) -> int | None:
    """Pairs for WIN with this power; at least 6, None beyond 1,000."""
    return _fewest(lambda pairs: win_power(goal, guardrails, pairs), power)


def pairs_to_equivalence(goal: Assumed, power: float) -> int | None:
    """Pairs for EQUIVALENT with this power; at least 6, None beyond 1,000 or without a margin."""
    return _fewest(lambda pairs: equivalence_power(goal, pairs), power) if goal.margin else None


def _fewest(power_at: Callable[[int], float], power: float) -> int | None:
    if power_at(MAX_PAIRS_NEEDED) < power:
        return None
    return MIN_PAIRS + bisect_left(range(MIN_PAIRS, MAX_PAIRS_NEEDED), power, key=power_at)


def smallest_effect(
    sd: float, guardrails: Sequence[Assumed], pairs: int, power: float
) -> float | None:
    """The gain, in units of the metric, that `pairs` find with this power; None if none is."""

    def excess(dz: float) -> float:
        return win_power(Assumed(dz * sd, sd), guardrails, pairs) - power

    if sd == 0 or excess(LARGEST_DZ) < 0:
        return None
    return float(optimize.brentq(excess, 0.0, LARGEST_DZ)) * sd


def sign_flips(differences: Floats) -> tuple[Floats, Floats]:
    """Both one-sided p-values of the sign-flip test for many experiments at once.

    The sums over all sign patterns are those of the first half of the pairs plus those of the
    second: sorted, they are counted without being formed. Exact up to 20 pairs; beyond, 19,999
    random patterns, the same for every experiment.

    Args:
        differences: `[experiments, pairs]`, finite.

    Returns:
        `[experiments]` for "better" and `[experiments]` for "worse".
    """
    d = np.asarray(differences, dtype=np.float64)
    pairs = d.shape[1]
    observed, tolerance = d.sum(axis=1), _TIE_FRAC * pairs * np.abs(d).max(axis=1)
    low, high = observed - tolerance, observed + tolerance
    greater, less = np.empty(len(d)), np.empty(len(d))
    if pairs <= LARGEST_EXACT:
        first, second = _sums(d[:, : pairs // 2]), _sums(d[:, pairs // 2 :])
        total = 2.0**pairs
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            greater[i] = total - np.searchsorted(b, low[i] - a[::-1], side="left").sum()
            less[i] = np.searchsorted(b, high[i] - a[::-1], side="right").sum()
        return greater / total, less / total
    rng = np.random.default_rng(pairs)
    signs = rng.choice(np.array([-1.0, 1.0]), (pairs, NUM_PATTERNS))
    for at in range(0, len(d), 64):
        block = slice(at, at + 64)
        sums = d[block] @ signs
        # the observed order is one more pattern
        greater[block] = 1 + np.count_nonzero(sums >= low[block, None], axis=1)
        less[block] = 1 + np.count_nonzero(sums <= high[block, None], axis=1)
    return greater / (NUM_PATTERNS + 1), less / (NUM_PATTERNS + 1)


def _sums(d: Floats) -> Floats:
    """`[experiments, 2^pairs]`, sorted: the sum under every pattern of signs."""
    sums = np.zeros((len(d), 1))
    for column in d.T[:, :, None]:
        sums = np.concatenate([sums - column, sums + column], axis=1)
    return np.sort(sums, axis=1)


def verdicts(
    d: Floats, guards: Floats, margin: float | None, room: Sequence[float]
) -> Counter[str]:
    """How often the real rule gives each verdict.

    Args:
        d: `[experiments, pairs]`, differences of the metric.
        guards: `[experiments, guardrails, pairs]`, differences of the guardrails.
        margin: Of equivalence; None: no experiment is called equivalent.
        room: Margin of each guardrail.
    """
    repetitions, pairs = d.shape
    better, worse = sign_flips(d)
    equivalent = np.ones(repetitions)
    if margin is not None:
        equivalent = np.maximum(sign_flips(d + margin)[0], sign_flips(d - margin)[1])
    shifted = (guards + np.reshape(room, (-1, 1))).reshape(-1, pairs)
    fine, bad = (p.reshape(guards.shape[:2]) for p in sign_flips(shifted))
    counts: Counter[str] = Counter()
    for i in range(repetitions):
        results = [_guardrail(f, b) for f, b in zip(fine[i], bad[i], strict=True)]
        p = PValues(float(better[i]), float(worse[i]), float(equivalent[i]))
        counts[decide(pairs, p, results)[0]] += 1
    return counts


def _guardrail(fine: float, bad: float) -> GuardrailResult:
    return GuardrailResult(
        metric="guardrail", margin=0.0, mean_difference=0.0, p_value=fine, p_worse=bad,
        passed=bool(fine <= ALPHA_GUARDRAIL), failed=bool(bad <= ALPHA_GUARDRAIL),
        pairs_needed=None,
    )  # fmt: skip


def outlook(
    goal: Assumed,
    guardrails: Sequence[Assumed],
    *,
    power: float,
    pairs: Sequence[int] = PAIRS,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> list[Outlook]:
    """What each number of pairs can see.

    Args:
        goal: The primary metric, with the effect to be found as its mean.
        guardrails: As they are expected; a mean of 0 is no change.
        power: For `smallest_effect`.
        pairs: Numbers of pairs.
        repetitions: Simulated sweeps of each kind.
        seed: Of the simulation.
    """
    rng = np.random.default_rng(seed)
    most, room = max(pairs), [g.margin or 0.0 for g in guardrails]
    noise = rng.normal(size=(repetitions, 1 + len(guardrails), most))
    equal = goal.sd * noise[:, 0]
    means, sds = (np.array([[getattr(g, k)] for g in guardrails]) for k in ("mean", "sd"))
    guards = noise[:, 1:] * sds + means if guardrails else noise[:, 1:]
    stops = np.array([_stop(row) for row in equal + goal.mean])
    return [
        Outlook(
            pairs=n,
            win=verdicts(equal[:, :n] + goal.mean, guards[:, :, :n], None, room)["WIN"]
            / repetitions,
            equivalent=None
            if goal.margin is None
            else verdicts(equal[:, :n], guards[:, :, :n], goal.margin, room)["EQUIVALENT"]
            / repetitions,
            smallest_effect=smallest_effect(goal.sd, guardrails, n, power),
            early_win=float(np.mean(stops <= n)),
            early_pairs=float(np.minimum(stops, n).mean()),
        )
        for n in pairs
    ]


def _stop(d: Floats) -> float:
    """Pairs after which the e-process first reaches 1 / alpha; infinite if it never does."""
    reached = np.flatnonzero(e_process(d) >= -math.log(ALPHA))
    return float(reached[0] + 1) if reached.size else math.inf
