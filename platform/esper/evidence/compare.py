"""One comparison in numbers: differences, p-values and guardrails, before any rule is applied."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from esper.config.sweep import Comparison, Guardrail
from esper.evidence.health import COLLAPSE, runs_of, sides_of, value_of
from esper.evidence.paired import (
    Floats,
    cohen_dz,
    equivalence_p,
    mcnemar_exact_p,
    one_sided,
    pairs_for_effect,
    rank_collapsed,
    shift,
)
from esper.evidence.records import Record, Registration, TrialRecord

ALPHA_GUARDRAIL = 0.05


class GuardrailResult(Record):
    """One metric that must not worsen; neither passed nor failed means that it is undecided."""

    metric: str
    margin: float = Field(description="In units of the metric.")
    mean_difference: float = Field(description="Positive: the treatment is better.")
    p_value: float | None = Field(
        description="One-sided, for 'not worse by the margin'; None for the collapse rate."
    )
    p_worse: float = Field(description="One-sided, for 'worse by more than the margin'.")
    passed: bool
    failed: bool
    pairs_needed: int | None = Field(
        description="Pairs in all that a new sweep needs to pass it; None if beyond 1,000."
    )


class PValues(NamedTuple):
    """What the rule looks at: one-sided better, one-sided worse, and equivalent."""

    better: float
    worse: float
    equivalent: float

    def at(self, share: float) -> "PValues":
        """As large as they count at a look that may spend this share of each error rate."""
        return PValues(*(min(1.0, p / share) for p in self))


@dataclass(frozen=True)
class Measured:
    """Everything about a healthy comparison that is known before the rule is applied."""

    differences: Floats
    p: PValues
    collapsed_treatment: NDArray[np.bool_]
    collapsed_control: NDArray[np.bool_]
    worst_treatment: float | None
    worst_control: float | None
    guardrails: list[GuardrailResult]


def values_of(records: Sequence[TrialRecord], arm: str, metric: str) -> Floats:
    """`[runs]` in the order of the pairs, NaN for collapsed runs."""
    return np.array([value_of(r, metric) for r in runs_of(records, arm)], dtype=np.float64)


def worst_of(values: Floats, higher_is_better: bool) -> float | None:
    """The worst run that did not collapse, None if all did."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return None
    return float(finite.min() if higher_is_better else finite.max())


def differences_of(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    goal: Guardrail,
    margin: float,
) -> Floats:
    """`[pairs]`, treatment minus control of `goal.metric`, positive where treatment is better."""
    ranked = rank_collapsed(
        {arm: values_of(records, arm, goal.metric) for arm in registration.arms},
        higher_is_better=goal.higher_is_better,
        margin=margin,
    )
    difference = ranked[comparison.treatment] - ranked[comparison.control]
    return difference if goal.higher_is_better else -difference


def measure(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    share: float = 1.0,
    collapse_share: float = 1.0,
) -> Measured:
    """All numbers of a comparison whose records passed every health check.

    Args:
        records: Of the pairs to judge.
        registration: The question.
        comparison: The two arms.
        share: What a planned look may spend of each guardrail's error rate.
        collapse_share: The same for the rate of collapses, whose test is a fixed-sample one.
    """
    question = registration.question
    goal = question.goal_of(comparison)
    seed = _seed(registration)
    d = differences_of(records, registration, comparison, goal, goal.margin)
    sides = one_sided(d, test=question.test, seed=seed)
    equivalent = equivalence_p(d, goal.margin, test=question.test, seed=seed)
    treatment, control = (values_of(records, a, goal.metric) for a in sides_of(comparison))
    return Measured(
        differences=d,
        p=PValues(sides.greater, sides.less, equivalent),
        collapsed_treatment=np.isnan(treatment),
        collapsed_control=np.isnan(control),
        worst_treatment=worst_of(treatment, goal.higher_is_better),
        worst_control=worst_of(control, goal.higher_is_better),
        guardrails=[
            *(
                _guardrail(records, registration, comparison, guardrail, share)
                for guardrail in question.guardrails
                if guardrail.metric != COLLAPSE
            ),
            _collapse_guardrail(np.isnan(treatment), np.isnan(control), collapse_share),
        ],
    )


def _seed(registration: Registration) -> int:
    """The seed of all resampling: who recomputes a verdict gets it bit for bit."""
    return int(registration.registration_hash[:16], 16)


def margin_of(
    records: Sequence[TrialRecord], comparison: Comparison, guardrail: Guardrail
) -> float:
    """The tolerated worsening in units of the metric."""
    if not guardrail.relative:
        return guardrail.margin
    control = values_of(records, comparison.control, guardrail.metric)
    finite = control[np.isfinite(control)]
    # without one control run that finished, no worsening can be put in relation to it
    return guardrail.margin * (abs(float(finite.mean())) if finite.size else 0.0)


def _guardrail(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    guardrail: Guardrail,
    share: float,
) -> GuardrailResult:
    alpha = ALPHA_GUARDRAIL * share
    margin = margin_of(records, comparison, guardrail)
    d = differences_of(records, registration, comparison, guardrail, margin)
    room = shift(d, margin)
    p = one_sided(room, test=registration.question.test, seed=_seed(registration))
    # a worsening of exactly the margin in every pair, e.g. none at all with a margin of 0, has no
    # noise that a test could judge, and it is tolerated
    exactly = not room.any()
    needed = pairs_for_effect(cohen_dz(room), alpha=alpha)
    return GuardrailResult(
        metric=guardrail.metric,
        margin=margin,
        mean_difference=float(d.mean()),
        p_value=p.greater,
        p_worse=p.less,
        passed=exactly or p.greater <= alpha,
        failed=not exactly and p.less <= alpha,
        pairs_needed=None if needed is None else max(needed, d.size + 1),
    )


def _collapse_guardrail(
    treatment: NDArray[np.bool_], control: NDArray[np.bool_], share: float
) -> GuardrailResult:
    alpha = ALPHA_GUARDRAIL * share
    p = mcnemar_exact_p(treatment, control)
    return GuardrailResult(
        metric=COLLAPSE,
        margin=0.0,
        mean_difference=float(control.mean() - treatment.mean()),
        p_value=None,
        p_worse=p,
        passed=p > alpha,
        failed=p <= alpha,
        pairs_needed=None,
    )
