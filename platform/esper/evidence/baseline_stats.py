"""What a baseline's blocks say: effects with intervals, verdicts, and what noise alone would do.

Requests are no samples: the unit is the block pair. Per block, D = log(new / old) of one metric;
D is turned so that a positive one says "better". Effects are exp(median D) with the interval that
belongs to the Hodges-Lehmann estimate, tests flip signs, families are corrected by Holm.

    BETTER          p(better) <= .025 after Holm
    WORSE           p(worse) <= .025 after Holm, and not shown to be within the margin
    WITHIN MARGIN   not worse than the margin, one-sided .05
    INCONCLUSIVE    anything else; never "passed"
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from enum import StrEnum

import numpy as np
from pydantic import Field
from scipy import stats

from esper.evidence.baseline import Baseline, BaselineError
from esper.evidence.health import ALPHA_HEALTH, MAX_DRIFT_FRAC
from esper.evidence.measure import ArmRecord, Machine, Measured, absent, present, quantile
from esper.evidence.paired import (
    ALPHA,
    ALPHA_EQUIVALENCE,
    POWER,
    Floats,
    holm,
    shift,
)
from esper.evidence.planning import sign_flips, smallest_effect
from esper.evidence.records import Record

# what the ratio may worsen, by the metric's ending
MARGINS = {
    "mean_ms": 0.03, "p50_ms": 0.03, "p95_ms": 0.05, "p99_ms": 0.10, "throughput": 0.03,
    "gpu_peak_bytes": 0.02, "memory_peak_bytes": 0.02,
}  # fmt: skip
HIGHER_IS_BETTER = ("throughput",)
# requests of one process without which a P99 is not judged
P99_REQUESTS = 2_500
MAX_CLIFF = 1.3
# of the share over the limit, where P99 lies on a cliff
MARGIN_OVER_LIMIT_POINTS = 1.0
# of the time in which a process of one thread had its CPU
MIN_CPU_PERCENT = 95.0
REPETITIONS = 400
RESAMPLES = 9_999


class Outcome(StrEnum):
    """What is known about one metric."""

    BETTER = "BETTER"
    WITHIN = "WITHIN MARGIN"
    WORSE = "WORSE"
    INCONCLUSIVE = "INCONCLUSIVE"


class Effect(Record):
    """One metric, new against old."""

    metric: str
    unit: str
    blocks: int
    old: float | None = Field(description="Median over the blocks.")
    new: float | None
    change: float | None = Field(
        description="exp(median D) - 1: positive where the number rose; points for a share."
    )
    low: float | None
    high: float | None
    margin: float
    p_better: float | None = Field(description="After Holm.")
    p_worse: float | None
    p_within: float | None
    outcome: Outcome
    why: str = ""


class Noise(Record):
    """What one implementation against itself shows."""

    implementation: str
    pairs: int
    metrics: int
    alarms: int = Field(description="Of the metrics, in these very pairs: BETTER or WORSE.")
    family_rate: float | None = Field(
        description="Share of resampled A/A baselines of `blocks` pairs with any alarm, after Holm."
    )
    family_low: float | None
    family_high: float | None
    single_rate: float | None = Field(description="Alarms of single uncorrected tests at .05.")
    smallest: dict[str, float] = Field(
        description="Change of each metric that `blocks` pairs find with power .9, one test."
    )


def margin_of(metric: str) -> float | None:
    """Tolerated worsening as a share; None for a metric that is told but not judged."""
    return next((m for end, m in MARGINS.items() if metric.endswith(end)), None)


def health(baseline: Baseline) -> list[str]:
    """Reasons why nothing can be concluded; empty means healthy."""
    plan, reasons = baseline.plan, []
    machines = {a.machine.model_dump_json() for a in baseline.arms}
    if machines != {plan.machine.model_dump_json()}:
        reasons.append(
            "code, libraries, machine, driver or clocks changed between the plan and the processes."
        )
    early = [a for a in baseline.arms if a.started_at <= plan.registered_at]
    if early:
        reasons.append(f"{len(early)} processes started before the question was written down.")
    for name in plan.config.implementations:
        share = level(baseline, name, "cpu_share_percent").value
        if share is not None and share < MIN_CPU_PERCENT:
            reasons.append(
                f"processes of {name} had a CPU for {share:.0f} % of the time, at least "
                f"{MIN_CPU_PERCENT:.0f} % is needed: other programs ran beside them."
            )
    first = plan.config.implementations[0]
    for other in plan.config.implementations[1:]:
        pairs = _pairs(baseline, other, first)
        ahead = sum(new.order < old.order for new, old in pairs)
        if stats.binomtest(ahead, len(pairs)).pvalue < ALPHA_HEALTH:
            reasons.append(f"the order was not random: {other} first in {ahead} of {len(pairs)}.")
        drifts = [
            math.log(_value(new, "reference_ms") / _value(old, "reference_ms"))
            for new, old in pairs
        ]
        drift = math.expm1(statistics.median(drifts))
        if abs(drift) >= MAX_DRIFT_FRAC:
            reasons.append(
                f"the reference workload was {drift:+.1%} beside {other} against {first}; "
                f"less than {MAX_DRIFT_FRAC:.0%} is needed."
            )
    return reasons


def _pairs(baseline: Baseline, new: str, old: str) -> list[tuple[ArmRecord, ArmRecord]]:
    """The block pairs of two implementations; of one implementation, its copies a and b."""
    olds = {a.block: a for a in baseline.of(old) if a.copy_name == "a"}
    copy = "b" if new == old else "a"
    return [(a, olds[a.block]) for a in baseline.of(new) if a.copy_name == copy]


def _value(arm: ArmRecord, metric: str) -> float:
    value = arm.metrics[metric].value
    return math.nan if value is None else value


def effects(baseline: Baseline, new: str, old: str) -> list[Effect]:
    """Every judged metric of one implementation against another (or itself), Holm over all."""
    pairs = _pairs(baseline, new, old)
    if not pairs:
        raise BaselineError(f"a comparison must have pairs, but {new} and {old} have none.")
    arms = [a for pair in pairs for a in pair]
    return _corrected([_draft(metric, pairs) for metric in _judged(arms)])


def _judged(arms: Sequence[ArmRecord]) -> list[str]:
    """Metrics with a margin that any of the processes measured."""
    return [
        m for m in arms[0].metrics
        if margin_of(m) is not None and any(a.metrics[m].value is not None for a in arms)
    ]  # fmt: skip


class _Draft:
    """A metric before the correction: its differences, better positive, or why it has none."""

    def __init__(self, metric: str, unit: str, margin: float) -> None:
        self.metric, self.unit, self.margin = metric, unit, margin
        self.d: Floats = np.empty(0)
        self.is_share = False
        self.old: float | None = None
        self.new: float | None = None
        self.why = ""
        self.p: tuple[float, float, float] | None = None


def _draft(metric: str, pairs: Sequence[tuple[ArmRecord, ArmRecord]]) -> _Draft:
    metric, why = _instead_of_cliff(metric, pairs)
    draft = _Draft(metric, pairs[0][0].metrics[metric].unit, margin_of(metric) or 0.0)
    draft.is_share = metric.endswith("over_limit_percent")
    if draft.is_share:
        draft.margin = MARGIN_OVER_LIMIT_POINTS
    draft.why = why
    lacking = [a.metrics[metric].why for pair in pairs for a in pair if a.metrics[metric].why]
    if lacking:
        draft.why = f"{len(lacking)} processes did not measure it: {lacking[0]}"
        return draft
    new, old = (np.array([_value(pair[i], metric) for pair in pairs]) for i in (0, 1))
    draft.new, draft.old = float(np.median(new)), float(np.median(old))
    if not draft.is_share and not (np.all(new > 0) and np.all(old > 0)):
        draft.why = "a value is not positive, so that there is no ratio"
        return draft
    change = new - old if draft.is_share else np.log(new / old)
    draft.d = change if metric.endswith(HIGHER_IS_BETTER) else -change
    fewest = min(_requests(a, metric) for pair in pairs for a in pair)
    if metric.endswith("p99_ms") and fewest < P99_REQUESTS:
        draft.why = f"{fewest} requests a process; at least {P99_REQUESTS} for a verdict on P99"
        return draft
    draft.p = _tests(draft)
    return draft


def _requests(arm: ArmRecord, metric: str) -> int:
    """Requests of the loop that a latency comes from."""
    loops = (x for x in arm.loops if metric.startswith(f"{x.mode}_b{x.batch}_"))
    return next((x.requests for x in loops), 0)


def _instead_of_cliff(metric: str, pairs: Sequence[tuple[ArmRecord, ArmRecord]]) -> tuple[str, str]:
    """P99 gives way to the share over the limit where it lies on a step of the distribution."""
    found = re.fullmatch(r"(\w+)_b(\d+)_p99_ms", metric)
    if found is None:
        return metric, ""
    for side in zip(*pairs, strict=True):
        cliffs = [
            x.cliff
            for a in side
            for x in a.loops
            if (x.mode, x.batch) == (found[1], int(found[2])) and x.cliff is not None
        ]
        if cliffs and statistics.median(cliffs) > MAX_CLIFF:
            why = f"in place of P99: q(.995)/q(.985) is {statistics.median(cliffs):.2f}"
            return f"{found[1]}_b{found[2]}_over_limit_percent", why
    return metric, ""


def _tests(draft: _Draft) -> tuple[float, float, float]:
    """p for better, for worse, and for "not worse than the margin"."""
    room = draft.margin if draft.is_share else math.log1p(draft.margin)
    better, worse = sign_flips(draft.d[None])
    within, _ = sign_flips(shift(draft.d, room)[None])
    return float(better[0]), float(worse[0]), float(within[0])


def _corrected(drafts: Sequence[_Draft]) -> list[Effect]:
    tested = [d for d in drafts if d.p is not None]
    better = holm([d.p[0] for d in tested if d.p])
    worse = holm([d.p[1] for d in tested if d.p])
    adjusted = {d.metric: (b, w) for d, b, w in zip(tested, better, worse, strict=True)}
    return [_effect(d, adjusted.get(d.metric)) for d in drafts]


def _effect(draft: _Draft, adjusted: tuple[float, float] | None) -> Effect:
    outcome, within = Outcome.INCONCLUSIVE, None
    if adjusted is not None and draft.p is not None:
        within = draft.p[2]
        outcome = decide(adjusted[0], adjusted[1], within)
    change, low, high = _change(draft)
    return Effect(
        metric=draft.metric, unit=draft.unit, blocks=draft.d.size, old=draft.old, new=draft.new,
        change=change, low=low, high=high, margin=draft.margin,
        p_better=adjusted and adjusted[0], p_worse=adjusted and adjusted[1], p_within=within,
        outcome=outcome, why=draft.why,
    )  # fmt: skip


def decide(p_better: float, p_worse: float, p_within: float) -> Outcome:
    """The rule of the module, on p-values that Holm has corrected."""
    if p_better <= ALPHA:
        return Outcome.BETTER
    if p_within <= ALPHA_EQUIVALENCE:
        return Outcome.WITHIN
    return Outcome.WORSE if p_worse <= ALPHA else Outcome.INCONCLUSIVE


def _change(draft: _Draft) -> tuple[float | None, float | None, float | None]:
    """The effect as a change of the number itself, with its interval."""
    if draft.d.size == 0:
        return None, None, None
    d = draft.d if draft.metric.endswith(HIGHER_IS_BETTER) else -draft.d
    ends = hodges_lehmann_interval(d)
    turn: Callable[[float], float] = float if draft.is_share else math.expm1
    middle = turn(float(np.median(d)))
    return (middle, None, None) if ends is None else (middle, turn(ends[0]), turn(ends[1]))


def hodges_lehmann_interval(
    differences: Floats, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval for the centre of symmetric differences; None with fewer than six.

    Inverts the exact signed-rank test: the ends are order statistics of the Walsh averages.

    Source: Hollander, Wolfe and Chicken, Nonparametric Statistical Methods (2014), section 3.3.
    """
    d = np.asarray(differences, dtype=np.float64)
    counts = np.ones(1)
    for rank in range(1, d.size + 1):
        counts = np.concatenate([counts, np.zeros(rank)]) + np.concatenate([np.zeros(rank), counts])
    below = np.cumsum(counts) / counts.sum()
    # ranks whose sum is at most c have probability <= the tail
    c = int(np.searchsorted(below, (1 - confidence) / 2, side="right"))
    if c == 0:
        return None
    i, j = np.triu_indices(d.size)
    walsh = np.sort((d[i] + d[j]) / 2)
    return float(walsh[c - 1]), float(walsh[-c])


def noise(baseline: Baseline, implementation: str, *, seed: int = 0) -> Noise:
    """What the pairs of an implementation with itself say about false alarms and resolution.

    Equal arms carry their names by chance, so that each pair's D (all metrics together) may as
    well have the other sign. A/A baselines of as many pairs as the real one are drawn from the
    observed D, with replacement and with random signs, and judged like the real one. That checks
    the rule on this machine's noise, its outliers and its ties included; it assumes that pairs do
    not depend on each other.
    """
    found = effects(baseline, implementation, implementation)
    pairs = _pairs(baseline, implementation, implementation)
    drafts = [_draft(metric, pairs) for metric in _judged([a for pair in pairs for a in pair])]
    tested = [d for d in drafts if d.p is not None]
    alarms = sum(e.outcome in (Outcome.BETTER, Outcome.WORSE) for e in found)
    blocks = baseline.plan.config.blocks
    smallest = {}
    for draft in tested:
        sd = float(draft.d.std(ddof=1))
        least = 0.0 if sd == 0 else smallest_effect(sd, (), blocks, POWER)
        if least is not None:
            smallest[draft.metric] = least if draft.is_share else math.expm1(least)
    family, single = _resampled([d.d for d in tested], blocks, seed) if tested else (None, None)
    ends: tuple[float, float] | tuple[None, None] = (None, None)
    if family is not None:
        hits = round(family * REPETITIONS)
        interval = stats.binomtest(hits, REPETITIONS).proportion_ci(method="wilson")
        ends = float(interval.low), float(interval.high)
    return Noise(
        implementation=implementation, pairs=len(pairs), metrics=len(tested), alarms=alarms,
        family_rate=family, family_low=ends[0], family_high=ends[1], single_rate=single,
        smallest=smallest,
    )  # fmt: skip


def _resampled(differences: Sequence[Floats], blocks: int, seed: int) -> tuple[float, float]:
    """Share of drawn A/A baselines with any alarm after Holm, and of single two-sided tests."""
    rng = np.random.default_rng(seed)
    number = differences[0].size
    drawn = rng.integers(number, size=(REPETITIONS, blocks))
    signs = rng.choice(np.array([-1.0, 1.0]), (REPETITIONS, blocks))
    p = np.empty((len(differences), 2, REPETITIONS))
    for i, d in enumerate(differences):
        p[i] = sign_flips(d[drawn] * signs)
    # Holm finds something in a family exactly if Bonferroni does
    any_alarm = (p.min(axis=0) * len(differences) <= ALPHA).any(axis=0)
    return float(any_alarm.mean()), float((p <= ALPHA).any(axis=1).mean())


class Comparison(Record):
    """Two stored baselines: has the second become worse?"""

    implementation: str
    effects: tuple[Effect, ...]


def machine_class(machine: Machine) -> dict[str, object]:
    """What two baselines must have in common; code and libraries may be what is compared."""
    return machine.model_dump(exclude={"code_hash", "versions"})


def compare(old: Baseline, new: Baseline) -> list[Comparison]:
    """Judge every implementation that both hold, by an unpaired permutation test over processes.

    The two were not interleaved: what the machine did in between is in the difference, which
    `drift` tells.

    Raises:
        BaselineError: If they are of another configuration, machine class or number of pairs.
    """
    require_comparable(old, new)
    return [
        Comparison(implementation=name, effects=tuple(_unpaired(old.of(name), new.of(name))))
        for name in old.plan.config.implementations
    ]


def require_comparable(old: Baseline, new: Baseline) -> None:
    """Refuse what cannot be compared; see `compare`."""
    mine, theirs = machine_class(old.plan.machine), machine_class(new.plan.machine)
    differing = [f"{k} {mine[k]} and {theirs[k]}" for k in mine if mine[k] != theirs[k]]
    if differing:
        raise BaselineError(
            "both baselines must come from one machine class, but differ in "
            + "; ".join(differing)
            + "; measure both on the same kind of machine."
        )
    if old.plan.config_hash != new.plan.config_hash:
        names = old.plan.config.model_dump(), new.plan.config.model_dump()
        keys = [k for k in names[0] if names[0][k] != names[1][k]]
        raise BaselineError(
            "both baselines must ask the same question, but differ in "
            f"{', '.join(keys)}; measure both with one configuration."
        )
    for name in old.plan.config.implementations:
        numbers = len(old.of(name)), len(new.of(name))
        if numbers[0] != numbers[1]:
            raise BaselineError(
                f"both baselines must have as many pairs, but {name} has {numbers[0]} and "
                f"{numbers[1]} processes; the pairs are unequal, measure again."
            )


def drift(old: Baseline, new: Baseline) -> float:
    """Change of the reference workload from one baseline to the other, as a share."""
    medians = [statistics.median(_value(a, "reference_ms") for a in b.arms) for b in (old, new)]
    return medians[1] / medians[0] - 1


def _unpaired(old: Sequence[ArmRecord], new: Sequence[ArmRecord]) -> list[Effect]:
    drafts = []
    for metric in _judged([*old, *new]):
        # the rules for cliffs and few requests are those of pairs
        draft = _draft(metric, list(zip(new, old, strict=True)))
        if draft.p is not None:
            sides = [np.array([_value(a, draft.metric) for a in arms]) for arms in (old, new)]
            draft.p = _permuted(draft, *sides)
        drafts.append(draft)
    return _corrected(drafts)


def _permuted(draft: _Draft, old: Floats, new: Floats) -> tuple[float, float, float]:
    sign = 1.0 if draft.metric.endswith(HIGHER_IS_BETTER) else -1.0
    if not draft.is_share:
        old, new = np.log(old), np.log(new)
    room = draft.margin if draft.is_share else math.log1p(draft.margin)
    better, worse = _permutation(sign * new, sign * old)
    within, _ = _permutation(sign * new + room, sign * old)
    return better, worse, within


def _permutation(new: Floats, old: Floats) -> tuple[float, float]:
    """p for "new is greater" and for "new is less", by the difference of means."""
    rng = np.random.default_rng(0)
    both, n = np.concatenate([new, old]), new.size
    observed = new.mean() - old.mean()
    picks = np.argsort(rng.random((RESAMPLES, both.size)), axis=1)[:, :n]
    sums = both[picks].sum(axis=1)
    null = sums / n - (both.sum() - sums) / old.size
    tolerance = 1e-9 * float(np.abs(both).max())
    greater = 1 + np.count_nonzero(null >= observed - tolerance)
    less = 1 + np.count_nonzero(null <= observed + tolerance)
    return greater / (RESAMPLES + 1), less / (RESAMPLES + 1)


def level(baseline: Baseline, implementation: str, metric: str) -> Measured:
    """A metric of one implementation over its processes: the median with its interval.

    Of a count, the smallest.
    """
    arms = baseline.of(implementation)
    unit = arms[0].metrics[metric].unit
    lacking = [m.why for a in arms if (m := a.metrics[metric]).why]
    if lacking:
        return absent(unit, str(lacking[0]))
    values = sorted(_value(a, metric) for a in arms)
    if unit == "count":
        return present(values[0], unit)
    found = quantile(values, 0.5, unit)
    # few processes have a median, but no interval for it
    return found if found.value is not None else present(statistics.median(values), unit)


def quantities(baseline: Baseline) -> dict[str, Measured]:
    """What targets and gates ask for; a latency is that of the batch size where it is worst."""
    config = baseline.plan.config
    loops = config.workload.loops
    found = {"baseline_implementations": present(len(config.implementations), "count")}
    found |= baseline.facts | baseline.lifecycle
    if "kasmina" not in config.implementations:
        return found
    for name in (
        "seeds_per_layer", "active_seeds", "gpu_sm_active_percent", "gpu_nvml_busy_percent",
        "seed_decisions_per_s", "cpu_memory_peak_bytes", "energy_per_sample_mj",
    ):  # fmt: skip
        found[name] = level(baseline, "kasmina", name)
    for stat in ("p50", "p95", "p99"):
        for mode, sizes in loops.items():
            levels = [level(baseline, "kasmina", f"{mode}_b{b}_{stat}_ms") for b in sizes]
            lacking = [x for x in levels if x.value is None]
            worst = max(levels, key=lambda x: x.value or 0.0)
            found[f"{mode}_{stat}_ms"] = lacking[0] if lacking else worst
    if "legacy" in config.implementations:
        changes = {
            e.metric: e.change for e in effects(baseline, "kasmina", "legacy")
            if re.fullmatch(r"forward_b\d+_p50_ms", e.metric)
        }  # fmt: skip
        speedups = [1 / (1 + c) for c in changes.values() if c is not None]
        found["forward_speedup_over_legacy"] = (
            present(min(speedups), "ratio")
            if len(speedups) == len(loops["forward"])
            else absent("ratio", "the latency of a batch size was not measured")
        )
    return found
