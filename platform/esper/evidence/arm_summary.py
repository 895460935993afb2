"""One line an arm: what its runs reached and cost, also where the data cannot be judged."""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from esper.evidence.compare import values_of, worst_of
from esper.evidence.health import runs_of
from esper.evidence.paired import Floats, rank_collapsed
from esper.evidence.records import Record, Registration, TrialRecord


class ArmSummary(Record):
    """One arm's runs at a glance; None where a run lacks the number."""

    arm: str
    runs: int
    collapsed: int
    mean: float | None = Field(
        description="Of the question's metric; collapsed runs at the value they are ranked at."
    )
    sd: float | None = Field(description="Of the same values, with runs - 1; None for one run.")
    worst: float | None = Field(description="Worst run that did not collapse.")
    parameters_mean: float | None
    steps: float | None = Field(description="Mean number of optimizer steps.")
    train_seconds_mean: float | None
    train_flops_mean: float | None


def summarise(records: Sequence[TrialRecord], registration: Registration) -> dict[str, ArmSummary]:
    """One summary for each registered arm, also where the data cannot be judged."""
    question = registration.question
    values = {arm: values_of(records, arm, question.metric) for arm in registration.arms}
    complete = all(question.metric in r.metrics for r in records)
    ranked: dict[str, Floats] = {}
    if complete and any(np.isfinite(v).any() for v in values.values()):
        ranked = rank_collapsed(
            values, higher_is_better=question.higher_is_better, margin=question.margin
        )
    return {
        arm: _summary(
            arm,
            runs_of(records, arm),
            ranked.get(arm, np.empty(0)),
            worst_of(values[arm], question.higher_is_better),
        )
        for arm in registration.arms
    }


def _summary(
    arm: str, runs: Sequence[TrialRecord], ranked: Floats, worst: float | None
) -> ArmSummary:
    return ArmSummary(
        arm=arm,
        runs=len(runs),
        collapsed=sum(r.status == "collapsed" for r in runs),
        mean=float(ranked.mean()) if ranked.size else None,
        sd=float(ranked.std(ddof=1)) if ranked.size > 1 else None,
        worst=worst,
        parameters_mean=_mean_of(runs, "parameters"),
        steps=_mean_of(runs, "steps"),
        train_seconds_mean=_mean_of(runs, "train_seconds"),
        train_flops_mean=_mean_of(runs, "train_flops"),
    )


def _mean_of(runs: Sequence[TrialRecord], metric: str) -> float | None:
    values = [r.metrics.get(metric, np.nan) for r in runs]
    return float(np.mean(values)) if values and np.isfinite(values).all() else None
