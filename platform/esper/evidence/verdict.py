"""Verdicts: one rule that turns the trials of a registered sweep into a decision.

`judge_all` is the entry: the primary comparison at its own level, the secondary ones corrected as
a family. `decide` is the rule itself. A verdict holds what it was decided from and is recomputed
bit for bit from the same records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import Field

from esper.config.sweep import Comparison
from esper.evidence.compare import (
    ALPHA_GUARDRAIL,
    GuardrailResult,
    Measured,
    PValues,
    measure,
)
from esper.evidence.health import (
    missing_runs,
    runs_of,
    sides_of,
    unhealthy_reasons,
)
from esper.evidence.paired import (
    ALPHA,
    ALPHA_EQUIVALENCE,
    MIN_PAIRS,
    cohen_dz,
    hodges_lehmann,
    holm,
    pairs_needed,
    t_interval,
    win_probability,
)
from esper.evidence.records import Record, Registration, TrialRecord
from esper.evidence.sequential import Look, plan_looks

VerdictName = Literal["WIN", "LOSE", "EQUIVALENT", "INCONCLUSIVE", "UNHEALTHY"]


def _is_none(value: object) -> bool:
    # verdicts without planned looks are written as they were before there were any
    return value is None


class Verdict(Record):
    """A decision about one comparison with everything it rests on.

    Differences are treatment minus control, positive where the treatment is better. The numbers
    are None in an UNHEALTHY verdict: nothing was computed.
    """

    verdict: VerdictName
    rule: str = Field(description="The rule that decided.")
    reasons: list[str] = Field(description="Sentences: why the rule applied and what to know.")
    treatment: str
    control: str
    metric: str
    higher_is_better: bool
    test: str
    margin: float
    pairs: int = Field(description="Pairs with a record of both arms.")
    missing: int = Field(description="Registered runs of the two arms without a record.")
    differences: list[float] = Field(description="In the order of the pairs.")
    mean_difference: float | None = None
    hodges_lehmann: float | None = None
    interval_low: float | None = Field(default=None, description="95 % t interval of the mean.")
    interval_high: float | None = None
    cohen_dz: float | None = None
    p_value: float | None = Field(default=None, description="One-sided, for 'treatment better'.")
    p_value_lose: float | None = Field(
        default=None, description="One-sided, for 'treatment worse'."
    )
    p_equivalent: float | None = Field(
        default=None, description="Two one-sided tests at the margin."
    )
    p_holm: float | None = Field(
        default=None, description="Holm-adjusted p_value, which decides a secondary comparison."
    )
    p_holm_lose: float | None = None
    p_holm_equivalent: float | None = None
    win_probability: float | None = Field(
        default=None, description="Among the pairs that are no ties."
    )
    win_probability_low: float | None = Field(default=None, description="95 % Wilson interval.")
    win_probability_high: float | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    worst_treatment: float | None = Field(
        default=None, description="Worst run that did not collapse; None if all did."
    )
    worst_control: float | None = None
    collapsed_treatment: int | None = None
    collapsed_control: int | None = None
    collapse_p: float | None = Field(
        default=None,
        description="Exact McNemar, one-sided, for 'the treatment collapses more often'.",
    )
    guardrails: list[GuardrailResult] = Field(default_factory=list)
    pairs_needed: int | None = Field(
        default=None,
        description="INCONCLUSIVE: pairs in all that a new sweep needs; None if beyond 1,000.",
    )
    look: int | None = Field(
        default=None, exclude_if=_is_none, description="Number of the planned look that was last."
    )
    look_share: float | None = Field(
        default=None, exclude_if=_is_none, description="What that look may spend of each rate."
    )
    commit: str | None
    registration_hash: str


class HolmAdjusted(NamedTuple):
    """P-values of a comparison after Holm's correction, and the family: its size, what it is of."""

    p: PValues
    family: int
    of: str = "secondary comparisons"


@dataclass(frozen=True)
class _Examined:
    """A comparison, and either the reasons against judging it or its measurements."""

    comparison: Comparison
    look: Look
    pairs: int
    missing: int
    reasons: list[str]
    measured: Measured | None


def decide(
    pairs: int, p: PValues, guardrails: Sequence[GuardrailResult]
) -> tuple[VerdictName, str]:
    """Apply the rule to healthy data.

    Args:
        pairs: Number of complete pairs.
        p: Holm-adjusted for a secondary comparison.
        guardrails: With the collapse rate among them.

    Returns:
        The verdict and the rule that decided, as a sentence.
    """
    failed = [g.metric for g in guardrails if g.failed]
    undecided = [g.metric for g in guardrails if not g.failed and not g.passed]
    if 0.5**pairs > ALPHA:
        return "INCONCLUSIVE", (
            f"With {pairs} pairs the smallest p-value of an exact one-sided test is "
            f"{0.5**pairs:.3g}, above {ALPHA}; at least {MIN_PAIRS} pairs are needed."
        )
    if p.better <= ALPHA and undecided and not failed:
        return "INCONCLUSIVE", (
            f"The treatment is better (p <= {ALPHA}), but these guardrails are neither passed nor "
            f"failed: {', '.join(undecided)}."
        )
    if p.better <= ALPHA and not failed:
        return "WIN", f"The treatment is better (p <= {ALPHA}) and every guardrail passed."
    if p.worse <= ALPHA:
        return "LOSE", f"The treatment is worse (p <= {ALPHA})."
    if failed:
        return "LOSE", (
            f"The treatment is worse beyond the margin (p <= {ALPHA_GUARDRAIL}) of these "
            f"guardrails: {', '.join(failed)}."
        )
    if p.equivalent <= ALPHA_EQUIVALENCE:
        return "EQUIVALENT", (
            f"The difference lies within the margin (two one-sided tests, "
            f"p <= {ALPHA_EQUIVALENCE})."
        )
    return "INCONCLUSIVE", "Neither a difference nor equivalence is shown."


def judge(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    *,
    p_holm: HolmAdjusted | None = None,
    look: Look | None = None,
    dependent_arms: frozenset[str] = frozenset(),
    salted_arms: frozenset[str] = frozenset(),
) -> Verdict:
    """Judge one registered comparison.

    Args:
        records: All trials of the sweep, also those of other arms: a collapsed run is ranked below
            the worst run of any arm.
        registration: The question, written before the first trial.
        comparison: The primary comparison, or a secondary one together with `p_holm`.
        p_holm: The adjusted p-values that decide a secondary comparison; `judge_all` finds them.
        look: The planned look; None: the last one.
        dependent_arms: Arms that follow another arm, exempt from the balance of the order.
        salted_arms: Arms that add a salt to the pair's seed.

    Raises:
        ValueError: If a secondary comparison comes without `p_holm`.
    """
    question = registration.question
    if p_holm is None and question.asks(comparison) and not question.is_primary(comparison):
        raise ValueError(
            f"p_holm must be given for the secondary comparison of '{comparison.treatment}' "
            f"against '{comparison.control}', but got {p_holm=}; call judge_all."
        )
    look = look or looks_of(registration)[-1]
    examined = _examine(records, registration, comparison, look, dependent_arms, salted_arms)
    return _conclude(examined, registration, p_holm)


def looks_of(registration: Registration) -> list[Look]:
    """When the sweep is judged."""
    question = registration.question
    if question.test != "e_process":
        return plan_looks(question.looks, registration.pairs)
    every = range(min(MIN_PAIRS, registration.pairs), registration.pairs + 1)
    return [look._replace(anytime=True) for look in plan_looks(every, registration.pairs)]


def judge_all(
    records: Sequence[TrialRecord],
    registration: Registration,
    dependent_arms: frozenset[str] = frozenset(),
    salted_arms: frozenset[str] = frozenset(),
) -> list[Verdict]:
    """Judge every registered comparison, the primary one first, at one planned look after another.

    The first look at which the primary comparison is not INCONCLUSIVE is the last one, for all
    comparisons; what was run after it is not looked at.

    Args:
        records: All trials of the sweep.
        registration: The question, written before the first trial.
        dependent_arms: Arms that follow another arm, exempt from the balance of the order.
        salted_arms: Arms that add a salt to the pair's seed.
    """
    verdicts: list[Verdict] = []
    for look in looks_of(registration):
        verdicts = judge_look(records, registration, look, dependent_arms, salted_arms)
        if verdicts[0].verdict != "INCONCLUSIVE":
            break
    return verdicts


def judge_look(
    records: Sequence[TrialRecord],
    registration: Registration,
    look: Look,
    dependent_arms: frozenset[str] = frozenset(),
    salted_arms: frozenset[str] = frozenset(),
) -> list[Verdict]:
    """Judge every registered comparison at one look, the primary one first.

    Holm's correction over the secondary comparisons is applied to each direction, and to
    equivalence, by itself: the chance of any false WIN among them stays below 0.025, and so does
    that of any false LOSE. An UNHEALTHY comparison stays in the family, with p = 1.

    Args:
        records: All trials of the sweep; those of pairs that the look does not see are left out.
        registration: The question, written before the first trial.
        look: Which pairs, and what they may spend.
        dependent_arms: Arms that follow another arm, exempt from the balance of the order.
        salted_arms: Arms that add a salt to the pair's seed.
    """
    primary, *secondary = (
        _examine(records, registration, comparison, look, dependent_arms, salted_arms)
        for comparison in registration.question.comparisons
    )
    family = [
        e.measured.p.at(look.test_share) if e.measured else PValues(1.0, 1.0, 1.0)
        for e in secondary
    ]
    better, worse, equivalent = (holm([p[i] for p in family]) for i in range(3))
    adjusted = [
        HolmAdjusted(PValues(*p), len(family)) for p in zip(better, worse, equivalent, strict=True)
    ]
    return [
        _conclude(primary, registration, None),
        *(_conclude(e, registration, p) for e, p in zip(secondary, adjusted, strict=True)),
    ]


def _examine(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    look: Look,
    dependent_arms: frozenset[str],
    salted_arms: frozenset[str],
) -> _Examined:
    # strangers are not hidden from the health checks
    records = [r for r in records if not look.pairs <= r.pair < registration.pairs]
    reasons = unhealthy_reasons(
        records,
        registration,
        comparison,
        pairs=look.pairs,
        dependent_arms=dependent_arms,
        salted_arms=salted_arms,
    )
    treatment, control = ({r.pair for r in runs_of(records, a)} for a in sides_of(comparison))
    return _Examined(
        comparison=comparison,
        look=look,
        pairs=len(treatment & control),
        missing=len(missing_runs(records, registration, comparison, look.pairs)),
        reasons=reasons,
        measured=None
        if reasons
        else measure(records, registration, comparison, look.test_share, look.share),
    )


def _conclude(
    examined: _Examined, registration: Registration, adjusted: HolmAdjusted | None
) -> Verdict:
    if examined.measured is None:
        return Verdict.model_validate(
            {
                **_identity(examined, registration),
                "verdict": "UNHEALTHY",
                "rule": "A check before the verdict failed; nothing was compared.",
                "reasons": examined.reasons,
                "differences": [],
            }
        )
    m, look = examined.measured, examined.look
    p = adjusted.p if adjusted else m.p.at(look.test_share)
    name, rule = decide(m.differences.size, p, m.guardrails)
    goal = registration.question.goal_of(examined.comparison)
    needed = _pairs_needed(m, goal.margin, look, adjusted) if name == "INCONCLUSIVE" else None
    return Verdict.model_validate(
        {
            **_identity(examined, registration),
            **_numbers(m),
            "verdict": name,
            "rule": rule,
            "reasons": [
                *_reasons(m, goal.metric, look, adjusted),
                *(_needed_reason(needed) if name == "INCONCLUSIVE" else ()),
            ],
            "p_holm": adjusted.p.better if adjusted else None,
            "p_holm_lose": adjusted.p.worse if adjusted else None,
            "p_holm_equivalent": adjusted.p.equivalent if adjusted else None,
            "pairs_needed": needed,
        }
    )


def _identity(examined: _Examined, registration: Registration) -> dict[str, object]:
    question = registration.question
    goal = question.goal_of(examined.comparison)
    return {
        "treatment": examined.comparison.treatment,
        "control": examined.comparison.control,
        "metric": goal.metric,
        "higher_is_better": goal.higher_is_better,
        "test": question.test,
        "margin": goal.margin,
        "pairs": examined.pairs,
        "missing": examined.missing,
        "look": examined.look.number if examined.look.of > 1 else None,
        "look_share": examined.look.share if examined.look.of > 1 else None,
        "commit": registration.fingerprint.commit,
        "registration_hash": registration.registration_hash,
    }


def _numbers(m: Measured) -> dict[str, object]:
    d = m.differences
    low, high = t_interval(d)
    won = win_probability(d)
    return {
        "differences": d.tolist(),
        "mean_difference": float(d.mean()),
        "hodges_lehmann": hodges_lehmann(d),
        "interval_low": low,
        "interval_high": high,
        "cohen_dz": cohen_dz(d),
        "p_value": m.p.better,
        "p_value_lose": m.p.worse,
        "p_equivalent": m.p.equivalent,
        "win_probability": won.estimate,
        "win_probability_low": won.low,
        "win_probability_high": won.high,
        "wins": won.wins,
        "ties": won.ties,
        "losses": won.losses,
        "worst_treatment": m.worst_treatment,
        "worst_control": m.worst_control,
        "collapsed_treatment": int(m.collapsed_treatment.sum()),
        "collapsed_control": int(m.collapsed_control.sum()),
        "collapse_p": m.guardrails[-1].p_worse,
        "guardrails": m.guardrails,
    }


def _pairs_needed(
    m: Measured, margin: float, look: Look, adjusted: HolmAdjusted | None
) -> int | None:
    """Pairs for the question, or for the guardrails where they alone are undecided."""
    better = adjusted.p.better if adjusted else m.p.at(look.test_share).better
    undecided = [g.pairs_needed for g in m.guardrails if not g.passed and not g.failed]
    if better <= ALPHA and undecided:
        bounded = [n for n in undecided if n is not None]
        return max(bounded) if len(bounded) == len(undecided) else None
    alpha = ALPHA * look.test_share / (adjusted.family if adjusted else 1)
    return pairs_needed(m.differences, margin, alpha=alpha)


def _needed_reason(needed: int | None) -> list[str]:
    if needed is None:
        return ["More than 1,000 pairs would be needed, if they look like these."]
    return [f"A new sweep needs about {needed} pairs to decide, if they look like these."]


def _reasons(m: Measured, metric: str, look: Look, adjusted: HolmAdjusted | None) -> list[str]:
    """What a reader must know beside the rule: effect, correction, collapses, guardrails."""
    d, n = m.differences, m.differences.size
    low, high = t_interval(d)
    reasons = [
        f"The mean difference of '{metric}' over {n} pairs is "
        f"{d.mean():+.4g} (95 % interval {low:+.4g} to {high:+.4g}; positive: treatment better); "
        f"one-sided p {m.p.better:.3g} for better, {m.p.worse:.3g} for worse, "
        f"{m.p.equivalent:.3g} for equivalent."
    ]
    if look.anytime:
        reasons.append(
            f"The sweep was judged after every pair from the {MIN_PAIRS}th to the {n}th: these are "
            "inverse values of the greatest evidence so far, which need no correction for that."
        )
    elif look.of > 1:
        reasons.append(
            f"Look {look.number} of {look.of} was the last one, after {n} pairs; it may spend "
            f"{look.share:.3g} of each error rate, so that p-values count as divided by that."
        )
    if adjusted:
        reasons.append(
            f"Holm's correction over {adjusted.family} {adjusted.of} gives "
            f"{adjusted.p.better:.3g}, {adjusted.p.worse:.3g} and {adjusted.p.equivalent:.3g}."
        )
        if adjusted.family * 0.5**n > ALPHA * look.test_share:
            reasons.append(f"{n} pairs are too few for any WIN or LOSE after that correction.")
    t, c = int(m.collapsed_treatment.sum()), int(m.collapsed_control.sum())
    if t or c:
        reasons.append(
            f"{t} of {n} runs of the treatment and {c} of the control collapsed; they are ranked "
            "worse than every run that did not."
        )
    for g in m.guardrails:
        if not g.passed:
            state = "failed" if g.failed else "is undecided"
            reasons.append(
                f"Guardrail '{g.metric}' {state}: mean difference {g.mean_difference:+.4g} "
                f"(positive: treatment better), margin {g.margin:.4g}, p {g.p_worse:.3g} for worse."
            )
    return reasons
