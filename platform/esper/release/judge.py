"""The judge of a rollout: one interval's evidence in, one decision out, and nothing else.

The unit is a pair: a fresh process with the new path and one with the old, in random order, each
giving one number a guarded metric. Per guard, the harm of a pair is how much worse the new path was
than the margin allows. An e-process bets that there is harm, and another that there is none; both
may be looked at after every pair, so that a rollback need not wait for the end of the interval.

    ROLLBACK       harm is shown by any guard, or an alert that demands it fires
    INCONCLUSIVE   anything is missing, no number, stale, too little, or measured under other flags
    HOLD           all is there; an alert fires, or harm is not yet excluded by every guard
    ADVANCE        harm beyond the margin is excluded by every guard

A rollout is rolled back without harm beyond a margin with probability at most `alpha_rollback`,
which is shared among its guards and planned intervals.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from pydantic import AwareDatetime, Field

from esper.evidence.paired import shift
from esper.evidence.records import CheckRecord, Record
from esper.evidence.sequential import Floats, e_process
from esper.release.phases import Alert, Assertion, Guard, Policy, Quantity, check

# a run that gave no number is worse than any that did: its harm in margins
_COLLAPSED = 1e6


class Decision(StrEnum):
    """What becomes of a rollout after an interval."""

    ADVANCE = "ADVANCE"
    HOLD = "HOLD"
    ROLLBACK = "ROLLBACK"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        """The exit code that tells it to scripts."""
        return {"ADVANCE": 0, "HOLD": 10, "ROLLBACK": 20, "INCONCLUSIVE": 30}[self]


class Series(Record):
    """One metric of all pairs, in the order in which they were measured.

    None: not measured. NaN or infinite: the run collapsed, which for the new path is harm.
    """

    unit: str
    treatment: tuple[float | None, ...]
    control: tuple[float | None, ...]


class IntervalMeasurements(Record):
    """What was measured in one interval of a rollout."""

    rollout: str = Field(description="Name of the rollout that it is about.")
    step: int = Field(ge=1, description="Step of the ramp that was in force, from 1.")
    flags_hash: str = Field(
        description="Of the snapshot in force, without what forces the two sides of a pair apart."
    )
    started_at: AwareDatetime
    ended_at: AwareDatetime = Field(description="When the last pair ended.")
    pairs: dict[str, Series]
    gauges: dict[str, Quantity] = Field(description="What alerts ask for.")


class Evidence(Record):
    """Measurements and what they are held against; enough to judge them again at any time."""

    measurements: IntervalMeasurements
    rollout: str
    step: int
    interval: int = Field(ge=1, description="Of the rollout, from 1.")
    flags_hash: str = Field(description="Of the flags in force when it was judged.")
    judged_at: AwareDatetime


class PhaseMeasurements(Record):
    """What targets and gates of a phase are held against, such as a baseline."""

    commit: str | None = Field(description="Of the code that was measured.")
    ended_at: AwareDatetime
    quantities: dict[str, Quantity]
    checks: tuple[CheckRecord, ...] = Field(
        (), description="What the regression suite checked, for people; no gate reads it."
    )


class GateEvidence(Record):
    """What was measured before a rollout, and when it was judged."""

    measured: PhaseMeasurements
    judged_at: AwareDatetime


class GuardResult(Record):
    """One guard's evidence, as natural logarithms of e-values."""

    metric: str
    pairs: int
    collapsed: int
    median_harm: float | None = Field(description="Above the margin; None without pairs.")
    log_e_worse: float
    log_e_within: float
    is_worse: bool
    is_within: bool


class Verdict(Record):
    """A decision, and everything that led to it."""

    decision: Decision
    reasons: tuple[str, ...]
    guards: tuple[GuardResult, ...]


def judge(evidence: Evidence, policy: Policy, alerts: Sequence[Alert] = ()) -> Verdict:
    """Decide what becomes of a rollout.

    Args:
        evidence: Of one interval.
        policy: Guards and error rates, fixed before the rollout began.
        alerts: What must not be so while it runs.
    """
    foreign = _foreign(evidence, policy)
    if foreign:
        return Verdict(decision=Decision.INCONCLUSIVE, reasons=tuple(foreign), guards=())
    measured = evidence.measurements
    problems: list[str] = []
    if evidence.interval > policy.planned_intervals:
        problems.append(f"the {policy.planned_intervals} planned intervals are used up")
    results = []
    for guard in policy.guards:
        harms, collapsed, lacking = _harms(guard, measured.pairs.get(guard.metric), policy)
        problems += lacking
        results.append(_result(guard, harms, collapsed, policy))
    fired: dict[str, list[str]] = {"rollback": [], "hold": []}
    for alert, checked in zip(alerts, check(alerts, measured.gauges), strict=True):
        if checked.holds is None:
            problems.append(f"alert {alert.name}: {checked.why}")
        elif checked.holds:
            fired[alert.on_firing].append(f"alert {alert.name} fires: {checked.why}")
    harm = [_told(r, "worse by more than its margin") for r in results if r.is_worse]
    undecided = [_told(r, "not yet shown to be within its margin")
                 for r in results if not r.is_within]  # fmt: skip
    if harm or fired["rollback"]:
        decision, reasons = Decision.ROLLBACK, [*harm, *fired["rollback"], *problems]
    elif problems:
        decision, reasons = Decision.INCONCLUSIVE, problems
    elif undecided or fired["hold"]:
        decision, reasons = Decision.HOLD, [*fired["hold"], *undecided]
    else:
        decision, reasons = Decision.ADVANCE, [_told(r, "within its margin") for r in results]
    return Verdict(decision=decision, reasons=tuple(reasons), guards=tuple(results))


def judge_gate(evidence: GateEvidence, assertions: Sequence[Assertion], policy: Policy) -> Verdict:
    """Decide whether a phase may be rolled out: ADVANCE only if every assertion was measured true.

    Args:
        evidence: What was measured.
        assertions: Targets and gates of the phase.
        policy: Says how old a measurement may be.
    """
    age_s = (evidence.judged_at - evidence.measured.ended_at).total_seconds()
    results = check(assertions, evidence.measured.quantities)
    missing = [r.why for r in results if r.holds is None]
    if not 0 <= age_s <= policy.max_gate_age_s:
        missing.append(
            f"measurements must be 0 to {policy.max_gate_age_s:g} s old, but are {age_s:.0f} s old"
        )
    missed = [r.why for r in results if r.holds is False]
    if missing or not results:
        decision, reasons = Decision.INCONCLUSIVE, [*missing, *missed]
    elif missed:
        decision, reasons = Decision.HOLD, missed
    else:
        decision, reasons = Decision.ADVANCE, [r.why for r in results]
    return Verdict(decision=decision, reasons=tuple(reasons), guards=())


def _told(r: GuardResult, what: str) -> str:
    return (
        f"{r.metric} is {what} (log e-values over {r.pairs} pairs: {r.log_e_worse:.2f} for worse, "
        f"{r.log_e_within:.2f} for within)"
    )


def _foreign(evidence: Evidence, policy: Policy) -> list[str]:
    """Why evidence says nothing about what runs now; such evidence is not looked into."""
    m, reasons = evidence.measurements, []
    for name in ("rollout", "step", "flags_hash"):
        got, wanted = getattr(m, name), getattr(evidence, name)
        if got != wanted:
            reasons.append(f"{name} must be {wanted}, but the evidence is of {got}")
    age_s = (evidence.judged_at - m.ended_at).total_seconds()
    if m.started_at > m.ended_at or age_s < 0:
        reasons.append(
            f"times must be in order, but the evidence is from {m.started_at} to {m.ended_at}, "
            f"judged at {evidence.judged_at}"
        )
    elif age_s > policy.max_age_s:
        reasons.append(f"evidence is {age_s:.0f} s old, at most {policy.max_age_s:g} s are allowed")
    return reasons


def _harms(guard: Guard, series: Series | None, policy: Policy) -> tuple[Floats, int, list[str]]:
    """Harm beyond the margin of each usable pair, collapsed runs, and what is lacking."""
    nothing = np.empty(0)
    if series is None:
        return nothing, 0, [f"{guard.metric} was not measured"]
    if series.unit != guard.unit:
        return nothing, 0, [f"{guard.metric} must be in {guard.unit}, but is in {series.unit}"]
    if len(series.treatment) != len(series.control):
        counts = f"{len(series.treatment)} and {len(series.control)} values"
        return nothing, 0, [f"{guard.metric} must be in pairs, but has {counts}"]
    worse_by: list[float] = []
    collapsed = unusable = 0
    margin = guard.scaled(guard.margin)
    for new, old in zip(series.treatment, series.control, strict=True):
        if new is None or not _usable(guard, old):
            unusable += 1
        elif not math.isfinite(new):
            collapsed += 1
            worse_by.append(_COLLAPSED * margin)
        elif not _usable(guard, new):
            unusable += 1
        else:
            assert old is not None
            change = math.log(new / old) if guard.compare == "ratio" else new - old
            worse_by.append(change if guard.worse == "higher" else -change)
    lacking = []
    if unusable:
        lacking.append(f"{guard.metric} has {unusable} pairs without two usable numbers")
    if collapsed:
        lacking.append(f"{guard.metric} was no number in {collapsed} runs of the new path")
    if len(worse_by) < policy.min_pairs:
        pairs = len(worse_by)
        lacking.append(f"{guard.metric} has {pairs} pairs, at least {policy.min_pairs} needed")
    return shift(worse_by, -margin) if worse_by else nothing, collapsed, lacking


def _usable(guard: Guard, value: float | None) -> bool:
    """Whether a value can stand on either side of a comparison."""
    if value is None or not math.isfinite(value):
        return False
    return value > 0 or guard.compare == "difference"


def threshold_worse(policy: Policy) -> float:
    """Natural logarithm of the e-value at which one guard shows harm in one interval."""
    shares = policy.planned_intervals * len(policy.guards)
    return math.log(shares / policy.alpha_rollback)


def _result(guard: Guard, harms: Floats, collapsed: int, policy: Policy) -> GuardResult:
    # the highest value so far counts: evidence that was once enough stays enough (Ville)
    worse = float(e_process(harms).max()) if harms.size else 0.0
    within = float(e_process(-harms).max()) if harms.size else 0.0
    return GuardResult(
        metric=guard.metric,
        pairs=harms.size,
        collapsed=collapsed,
        median_harm=float(np.median(harms)) if harms.size else None,
        log_e_worse=worse,
        log_e_within=within,
        is_worse=worse >= threshold_worse(policy),
        is_within=within >= -math.log(policy.alpha_advance),
    )


def pairs_for(
    guard: Guard, policy: Policy, *, power: float = 0.99, trials: int = 1_000, seed: int = 0
) -> int | None:
    """Pairs an interval needs so that the guard's fault is rolled back within it.

    Found by simulation: normal differences with the guard's `pair_sd`.

    Returns:
        The fewest pairs with at least that power; None if more than 400.
    """
    rng = np.random.default_rng(seed)
    mean = guard.scaled(guard.fault) - guard.scaled(guard.margin)
    limit, most = threshold_worse(policy), 400
    first = np.full(trials, most + 1)
    for i in range(trials):
        reached = np.flatnonzero(e_process(rng.normal(mean, guard.pair_sd, most)) >= limit)
        if reached.size:
            first[i] = reached[0] + 1
    pairs = int(np.sort(first)[math.ceil(power * trials) - 1])
    return pairs if pairs <= most else None
