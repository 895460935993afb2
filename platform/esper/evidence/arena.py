"""Evidence over tasks: verdicts corrected over tasks, and scores on one scale.

The verdicts decide; scores, profiles and intervals describe. A score is a final metric on the
task's own scale: 0 is the mean of one method (the host alone), 1 that of another (the best static
network). Nothing is clipped, and a collapsed run has the value at which it is ranked, worse than
every run that did not collapse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from pydantic import Field

from esper.config.arena import Scale
from esper.config.sweep import Comparison
from esper.evidence.arm_summary import ArmSummary, summarise
from esper.evidence.compare import PValues, measure, values_of
from esper.evidence.health import unhealthy_reasons
from esper.evidence.paired import Floats, holm, rank_collapsed
from esper.evidence.records import Record, Registration, TrialRecord, canonical_hash
from esper.evidence.scores import front, iqm, profile, stratified_bootstrap, tau_grid
from esper.evidence.verdict import HolmAdjusted, Verdict, judge

_ALL_ONES = PValues(1.0, 1.0, 1.0)


@dataclass(frozen=True)
class TaskEvidence:
    """All that was measured on one task.

    Attributes:
        registration: Of the task's sweep.
        records: Of all its trials.
        dependent_arms: Methods that follow another one.
        salted_arms: Methods that add a salt to the pair's seed.
        absent: Methods that do not apply, each with the reason.
    """

    registration: Registration
    records: Sequence[TrialRecord]
    dependent_arms: frozenset[str] = frozenset()
    salted_arms: frozenset[str] = frozenset()
    absent: Mapping[str, str] = field(default_factory=dict)


class ArenaRegistration(Record):
    """What an arena is to decide, written before its first trial."""

    arena: str
    treatment: str
    controls: list[str] = Field(description="Each is one family of comparisons, over the tasks.")
    scale: Scale
    sweeps: dict[str, str] = Field(description="Hash of each task's registered question.")
    absent: dict[str, dict[str, str]]
    registered_at: datetime
    registration_hash: str = Field(description="sha256 of all but the time.")

    def digest(self) -> str:
        """What `registration_hash` must be."""
        return canonical_hash(
            self, "arena", "treatment", "controls", "scale", "sweeps", "absent"
        )  # fmt: skip


class MethodResult(Record):
    """One method on one task."""

    arm: ArmSummary
    score: float | None = Field(description="Mean score; None where the task has no scale.")
    parameters_front: bool = Field(description="No other method is as good with fewer parameters.")
    flops_front: bool = Field(description="No other method is as good with fewer training FLOPs.")


class TaskResult(Record):
    """One task: its methods, the verdicts on the treatment, what did not apply."""

    metric: str
    higher_is_better: bool
    margin: float
    pairs: int
    methods: dict[str, MethodResult]
    verdicts: dict[str, Verdict] = Field(description="By control; Holm-corrected over tasks.")
    absent: dict[str, str]
    scale: tuple[float, float] | None = Field(description="Metric at score 0 and at score 1.")
    no_scale_reason: str | None
    registration_hash: str


class Aggregate(Record):
    """One method over all tasks on which it was run."""

    tasks: list[str]
    iqm: float = Field(description="Interquartile mean of the scores of all runs.")
    iqm_low: float = Field(description="95 % stratified bootstrap interval.")
    iqm_high: float
    treatment_iqm: float = Field(description="The treatment's over the same tasks.")
    profile: list[float] = Field(description="Share of runs with a score above each tau.")
    profile_low: list[float]
    profile_high: list[float]


class ArenaSummary(Record):
    """Everything an arena found; from it the report is written."""

    arena: str
    treatment: str
    controls: list[str]
    scale: Scale
    tasks: dict[str, TaskResult]
    taus: list[float]
    aggregates: dict[str, Aggregate] = Field(description="Empty if a task has no scale.")
    commit: str | None
    device: str
    registered_at: datetime
    registration_hash: str

    def verdicts(self) -> list[Verdict]:
        """Every verdict, task by task."""
        return [v for task in self.tasks.values() for v in task.verdicts.values()]


def summarise_arena(
    registration: ArenaRegistration, tasks: Mapping[str, TaskEvidence]
) -> ArenaSummary:
    """Judge and describe an arena: a pure function of registrations and records.

    Args:
        registration: Written before the first trial.
        tasks: Evidence of each registered task.

    Raises:
        ValueError: If the registration was altered, or the tasks are not those it names.
    """
    _check(registration, tasks)
    treatment = registration.treatment
    verdicts = {c: judge_over_tasks(tasks, treatment, c) for c in registration.controls}
    scored: dict[str, dict[str, Floats]] = {}
    results = {}
    for name, evidence in tasks.items():
        try:
            ends, scored[name] = scores(evidence, registration.scale)
            reason = None
        except ValueError as error:
            ends, reason = None, str(error)
        results[name] = _task_result(
            evidence,
            {c: v[name] for c, v in verdicts.items() if name in v},
            scored.get(name, {}),
            ends,
            reason,
        )
    taus = tau_grid(scored)
    whole = len(scored) == len(tasks)
    seed = int(registration.registration_hash[:16], 16)
    first = next(iter(tasks.values())).registration.fingerprint
    return ArenaSummary(
        arena=registration.arena,
        treatment=treatment,
        controls=registration.controls,
        scale=registration.scale,
        tasks=results,
        taus=taus.tolist(),
        aggregates=aggregate_all(scored, treatment, taus, seed) if whole else {},
        commit=first.commit,
        device=first.device,
        registered_at=registration.registered_at,
        registration_hash=registration.registration_hash,
    )


def _check(registration: ArenaRegistration, tasks: Mapping[str, TaskEvidence]) -> None:
    if registration.registration_hash != registration.digest():
        raise ValueError(
            "the arena's registration must be unaltered, but its hash does not match its content; "
            "run the arena under another name."
        )
    given = {name: t.registration.registration_hash for name, t in tasks.items()}
    if given != registration.sweeps:
        raise ValueError(
            f"tasks must be the registered sweeps of {', '.join(registration.sweeps)}, "
            f"but got others for {', '.join(given)}; run the arena's own sweeps."
        )


def judge_over_tasks(
    tasks: Mapping[str, TaskEvidence], treatment: str, control: str
) -> dict[str, Verdict]:
    """A verdict for each task on which the control was run.

    Holm's correction over these tasks is applied to each direction, and to equivalence, by itself:
    the chance of any false WIN against this control stays below 0.025. It is not corrected over
    controls. An UNHEALTHY task stays in the family, with p = 1.
    """
    comparison = Comparison(treatment=treatment, control=control)
    family = {n: t for n, t in tasks.items() if control in t.registration.arms}
    found = [_p_values(evidence, comparison) for evidence in family.values()]
    better, worse, equivalent = (holm([p[i] for p in found]) for i in range(3))
    adjusted = [PValues(*p) for p in zip(better, worse, equivalent, strict=True)]
    return {
        name: judge(
            evidence.records,
            evidence.registration,
            comparison,
            p_holm=HolmAdjusted(p, len(family), "tasks"),
            dependent_arms=evidence.dependent_arms,
            salted_arms=evidence.salted_arms,
        )
        for (name, evidence), p in zip(family.items(), adjusted, strict=True)
    }


def _p_values(evidence: TaskEvidence, comparison: Comparison) -> PValues:
    records, registration = evidence.records, evidence.registration
    reasons = unhealthy_reasons(
        records, registration, comparison,
        dependent_arms=evidence.dependent_arms, salted_arms=evidence.salted_arms,
    )  # fmt: skip
    return _ALL_ONES if reasons else measure(records, registration, comparison).p


def ranked_values(evidence: TaskEvidence) -> dict[str, Floats]:
    """`[pairs]` of each method: its final metric, collapsed runs ranked worst.

    Raises:
        ValueError: If every run of every method collapsed.
    """
    question = evidence.registration.question
    return rank_collapsed(
        {a: values_of(evidence.records, a, question.metric) for a in evidence.registration.arms},
        higher_is_better=question.higher_is_better,
        margin=question.margin,
    )


def scores(
    evidence: TaskEvidence, scale: Scale
) -> tuple[tuple[float, float], dict[str, Floats]]:  # fmt: skip
    """Scores `[pairs]` of each method on one task, and the metric's values at 0 and at 1.

    Raises:
        ValueError: If nothing that could be 1 is better than what is 0, so that there is no scale,
            or if every run collapsed.
    """
    values = ranked_values(evidence)
    sign = 1.0 if evidence.registration.question.higher_is_better else -1.0
    zero = float(values[scale.zero].mean())
    one = max((float(values[a].mean()) for a in scale.one if a in values), key=lambda m: sign * m)
    if sign * (one - zero) <= 0:
        raise ValueError(
            f"scale.one must be better than '{scale.zero}' for scores to mean anything, but the "
            f"means are {one:.4g} and {zero:.4g}."
        )
    return (zero, one), {a: (v - zero) / (one - zero) for a, v in values.items()}


def aggregate_all(
    scored: Mapping[str, Mapping[str, Floats]], treatment: str, taus: Floats, seed: int
) -> dict[str, Aggregate]:
    """Each method over its tasks, every run with the same weight.

    Args:
        scored: Scores by task and method.
        treatment: Summed up over the same tasks beside each method.
        taus: Where to evaluate profiles.
        seed: Of the bootstrap.
    """
    methods = dict.fromkeys(m for by_method in scored.values() for m in by_method)
    return {m: _aggregate(scored, m, treatment, taus, seed) for m in methods}


def _aggregate(
    scored: Mapping[str, Mapping[str, Floats]], method: str, treatment: str,
    taus: Floats, seed: int,
) -> Aggregate:  # fmt: skip
    tasks = [name for name, by_method in scored.items() if method in by_method]
    strata = [scored[name][method] for name in tasks]
    low, high = stratified_bootstrap(strata, lambda x: iqm(x, axis=1), seed)
    profile_low, profile_high = stratified_bootstrap(strata, lambda x: profile(x, taus), seed)
    return Aggregate(
        tasks=tasks,
        iqm=float(iqm(np.concatenate(strata))),
        iqm_low=float(low),
        iqm_high=float(high),
        treatment_iqm=float(iqm(np.concatenate([scored[name][treatment] for name in tasks]))),
        profile=profile(np.concatenate(strata), taus).tolist(),
        profile_low=profile_low.tolist(),
        profile_high=profile_high.tolist(),
    )


def _task_result(
    evidence: TaskEvidence,
    verdicts: dict[str, Verdict],
    scored: Mapping[str, Floats],
    ends: tuple[float, float] | None,
    no_scale_reason: str | None,
) -> TaskResult:
    registration = evidence.registration
    question = registration.question
    arms = summarise(evidence.records, registration)
    sign = 1.0 if question.higher_is_better else -1.0
    values = {name: None if a.mean is None else sign * a.mean for name, a in arms.items()}
    parameters = front(values, {name: a.parameters_mean for name, a in arms.items()})
    # a run that collapsed stopped early, which made it cheap but is no merit
    costs = {name: None if a.collapsed else a.train_flops_mean for name, a in arms.items()}
    flops = front(values, costs)
    return TaskResult(
        metric=question.metric,
        higher_is_better=question.higher_is_better,
        margin=question.margin,
        pairs=registration.pairs,
        methods={
            name: MethodResult(
                arm=arm,
                score=float(scored[name].mean()) if name in scored else None,
                parameters_front=name in parameters,
                flops_front=name in flops,
            )
            for name, arm in arms.items()
        },
        verdicts=verdicts,
        absent=dict(evidence.absent),
        scale=ends,
        no_scale_reason=no_scale_reason,
        registration_hash=registration.registration_hash,
    )
