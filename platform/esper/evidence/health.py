"""Checks before any verdict: trials that fail one of them decide nothing.

Every check returns the reasons why the data cannot be judged, as sentences; none means healthy.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from esper.config.sweep import Comparison, Question
from esper.evidence.records import Registration, TrialRecord, is_collapsed

ALPHA_HEALTH = 0.001
LARGEST_VALUE = 1e100
COLLAPSE = "collapse"
# of the reference workload, beside one arm against beside the other
MAX_DRIFT_FRAC = 0.03
# what is told in such a unit depends on how fast the machine is just then
_TIMED = re.compile(r".+_(seconds|s|ms|us|per_s)")
_NUM_NAMED = 8


def _named(names: Iterable[str]) -> str:
    """The first names and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - _NUM_NAMED} more" if len(every) > _NUM_NAMED else ""
    return ", ".join(every[:_NUM_NAMED]) + more


def sides_of(comparison: Comparison) -> tuple[str, str]:
    """The arms of a comparison, treatment first."""
    return comparison.treatment, comparison.control


def runs_of(records: Sequence[TrialRecord], arm: str) -> list[TrialRecord]:
    """The records of one arm in the order of their pairs."""
    return sorted((r for r in records if r.arm == arm), key=lambda r: r.pair)


def missing_runs(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    pairs: int | None = None,
) -> list[str]:
    """Registered runs of the two arms in the first pairs without a record, '<arm>-<pair:03d>'."""
    present = {(r.arm, r.pair) for r in records}
    return [
        f"{arm}-{pair:03d}"
        for arm in sides_of(comparison)
        for pair in range(pairs or registration.pairs)
        if (arm, pair) not in present
    ]


def check_comparison(registration: Registration, comparison: Comparison) -> list[str]:
    """The comparison was registered beforehand and has two different arms."""
    treatment, control = sides_of(comparison)
    reasons = []
    if treatment == control:
        reasons.append(f"treatment and control must be two arms, but both are '{treatment}'.")
    if not registration.question.asks(comparison):
        reasons.append(f"'{treatment}' against '{control}' is not a registered comparison.")
    return reasons


def check_registration(records: Sequence[TrialRecord], registration: Registration) -> list[str]:
    """The registration is unaltered, is older than every trial, and every record carries it."""
    reasons = []
    expected = registration.digest()
    if registration.registration_hash != expected:
        reasons.append("The registration was altered: its hash does not match its content.")
    foreign = [r.trial_id for r in records if r.registration_hash != registration.registration_hash]
    if foreign:
        reasons.append(
            f"{len(foreign)} records carry the hash of another registration: {_named(foreign)}."
        )
    moment = registration.registered_at
    if any((r.started_at.tzinfo is None) != (moment.tzinfo is None) for r in records):
        reasons.append("Times with and without a time zone cannot be compared.")
        return reasons
    early = [r.trial_id for r in records if r.started_at <= moment]
    if early:
        reasons.append(
            f"{len(early)} trials started before the question was registered: {_named(early)}."
        )
    return reasons


def check_pairing(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    pairs: int | None = None,
) -> list[str]:
    """Every registered pair has exactly one run of both arms, and no run is a stranger."""
    reasons = []
    missing = missing_runs(records, registration, comparison, pairs)
    if missing:
        expected = 2 * (pairs or registration.pairs)
        reasons.append(f"{len(missing)} of {expected} runs left no record: {_named(missing)}.")
    counts = Counter((r.arm, r.pair) for r in records)
    twice = [f"{arm}-{pair:03d}" for (arm, pair), count in counts.items() if count > 1]
    if twice:
        reasons.append(f"{len(twice)} runs have more than one record: {_named(twice)}.")
    strange = [
        r.trial_id
        for r in records
        if r.arm not in registration.arms or not 0 <= r.pair < registration.pairs
    ]
    if strange:
        reasons.append(f"{len(strange)} records are of no registered run: {_named(strange)}.")
    if registration.pairs < 2:
        reasons.append(f"A verdict needs at least 2 pairs, but {registration.pairs} registered.")
    return reasons


def check_fingerprint(records: Sequence[TrialRecord], registration: Registration) -> list[str]:
    """All trials ran the registered code and versions, those of a pair on one kind of device."""
    reasons = []
    codes = {r.fingerprint.code_hash for r in records}
    if len(codes) > 1:
        reasons.append(f"The trials ran {len(codes)} different states of the code.")
    elif codes - {registration.fingerprint.code_hash}:
        reasons.append("The code was changed between the registration and the trials.")
    by_pair: dict[int, set[str]] = {}
    for record in records:
        by_pair.setdefault(record.pair, set()).add(record.fingerprint.device)
    mixed = {pair: devices for pair, devices in by_pair.items() if len(devices) > 1}
    if mixed:
        devices = set().union(*mixed.values())
        reasons.append(
            f"The trials of {len(mixed)} pairs ran on different devices: {_named(devices)}."
        )
    versions = [r.fingerprint.versions for r in records]
    differing = {
        name
        for name in set().union(*versions)
        if len({version.get(name) for version in versions}) > 1
    }
    if differing:
        reasons.append(f"The trials ran different versions of: {_named(differing)}.")
    return reasons


def check_flags(records: Sequence[TrialRecord], comparison: Comparison) -> list[str]:
    """All trials of the two arms that read flags read one state of them, in every interval.

    What the flags chose may differ, where arms ask as different models.
    """
    reasons = []
    compared = [r for side in sides_of(comparison) for r in runs_of(records, side)]
    for arm in sides_of(comparison):
        runs = runs_of(records, arm)
        without = [r.trial_id for r in runs if r.flags is None]
        if without and len(without) < len(runs):
            reasons.append(f"{len(without)} trials of '{arm}' name no flags: {_named(without)}.")
    gaps = [
        r.trial_id for r in compared if r.flags is not None and len(r.flags) != _intervals_of(r)
    ]
    if gaps:
        reasons.append(f"{len(gaps)} trials have intervals without flags: {_named(gaps)}.")
    states = {ruled.hash for r in compared for ruled in r.flags or ()}
    if len(states) > 1:
        reasons.append(
            f"The trials ran under {len(states)} states of the flags: {_named(states)}; a flag was "
            "changed meanwhile, or the arms name different files or environments."
        )
    return reasons


def _intervals_of(record: TrialRecord) -> int:
    return len(record.curves.get("step", ()))


def check_seeds(
    records: Sequence[TrialRecord],
    comparison: Comparison,
    salted_arms: frozenset[str] = frozenset(),
) -> list[str]:
    """Both runs of a pair have one seed, and no two pairs of an arm share it.

    Args:
        records: Of the whole sweep.
        comparison: The two arms.
        salted_arms: Arms that add a salt to the seed; their pairs may differ from the other arm's.
    """
    reasons = []
    seeds = {arm: {r.pair: r.seed for r in runs_of(records, arm)} for arm in sides_of(comparison)}
    for arm, by_pair in seeds.items():
        if len(set(by_pair.values())) < len(by_pair):
            reasons.append(f"Pairs of '{arm}' share a random seed: they are not independent.")
    treatment, control = (seeds[arm] for arm in sides_of(comparison))
    if salted_arms.isdisjoint(sides_of(comparison)):
        unequal = [
            f"{pair:03d}"
            for pair in treatment.keys() & control.keys()
            if treatment[pair] != control[pair]
        ]
        if unequal:
            reasons.append(
                f"{len(unequal)} pairs have different seeds in their arms: {_named(unequal)}."
            )
    return reasons


def check_order(
    records: Sequence[TrialRecord],
    comparison: Comparison,
    dependent_arms: frozenset[str] = frozenset(),
) -> list[str]:
    """The treatment ran before the control in about half of the pairs (exact binomial test).

    Args:
        records: Of the whole sweep.
        comparison: The two arms.
        dependent_arms: Arms that follow another one and so cannot come in random order; a
            comparison with one of them is exempt.
    """
    if not dependent_arms.isdisjoint(sides_of(comparison)):
        return []
    treatment, control = (
        {r.pair: r.order for r in runs_of(records, arm)} for arm in sides_of(comparison)
    )
    both = sorted(treatment.keys() & control.keys())
    same = [f"{pair:03d}" for pair in both if treatment[pair] == control[pair]]
    if same:
        return [f"{len(same)} pairs give both arms the same place in the order: {_named(same)}."]
    first = sum(treatment[pair] < control[pair] for pair in both)
    if both and stats.binomtest(first, len(both)).pvalue < ALPHA_HEALTH:
        return [
            f"The order was not random: '{comparison.treatment}' ran before "
            f"'{comparison.control}' in {first} of {len(both)} pairs."
        ]
    return []


def check_split(runs_by_arm: dict[str, int]) -> list[str]:
    """As many runs of one arm as of another, up to chance (chi-square p >= 0.001)."""
    counts = np.array(list(runs_by_arm.values()), dtype=np.float64)
    if counts.size < 2 or counts.sum() == 0:
        return []
    if stats.chisquare(counts).pvalue < ALPHA_HEALTH:
        shown = ", ".join(f"{arm} {count}" for arm, count in runs_by_arm.items())
        return [f"The split over the arms is not fair: {shown} runs."]
    return []


def check_metric(records: Sequence[TrialRecord], comparison: Comparison, metric: str) -> list[str]:
    """Every record has the metric, finite if the run finished, and some run did finish.

    Values beyond 1e100 count as not finite: their squares would overflow.
    """
    absent = [r for r in records if metric not in r.metrics]
    if absent:
        known = sorted({name for r in records for name in r.metrics})
        names = _named(r.trial_id for r in absent)
        return [
            f"The metric '{metric}' is absent from {len(absent)} records ({names}); "
            f"metrics that exist: {', '.join(known) or 'none'}."
        ]
    wrong = [
        r.trial_id
        for r in records
        if r.status == "finished" and not abs(r.metrics[metric]) <= LARGEST_VALUE
    ]
    if wrong:
        return [
            f"{len(wrong)} finished runs have no finite '{metric}' within 1e100: {_named(wrong)}."
        ]
    compared = [r for r in records if r.arm in sides_of(comparison)]
    if compared and all(math.isnan(value_of(r, metric)) for r in compared):
        return [f"Every run of both arms collapsed: no value of '{metric}' is left to compare."]
    return []


def judges_time(question: Question) -> bool:
    """Whether a metric or a guardrail of a question is a time, or a rate, by its name."""
    goals = [question.goal_of(c) for c in question.comparisons]
    return any(_TIMED.fullmatch(g.metric) for g in (*goals, *question.guardrails))


def check_drift(
    records: Sequence[TrialRecord], comparison: Comparison, question: Question
) -> list[str]:
    """Where times are judged, the machine was as fast beside one arm as beside the other.

    The measure is the median over the pairs of the ratio of the reference workload's times. An
    accuracy does not depend on it.
    """
    if not judges_time(question):
        return []
    treatment, control = (
        {r.pair: r.reference_ms for r in runs_of(records, side)} for side in sides_of(comparison)
    )
    ratios = []
    for pair in sorted(treatment.keys() & control.keys()):
        ours, theirs = treatment[pair], control[pair]
        if ours is None or theirs is None or not min(ours, theirs) > 0:
            return [
                "Times are judged, so that the reference workload must be measured beside every "
                f"trial, but it was not in pair {pair:03d}."
            ]
        ratios.append(math.log(ours / theirs))
    drift = math.expm1(statistics.median(ratios)) if ratios else 0.0
    if not abs(drift) < MAX_DRIFT_FRAC:
        return [
            f"The machine was not equally fast: the reference workload took {drift:+.1%} beside "
            f"'{comparison.treatment}' against '{comparison.control}' (median of {len(ratios)} "
            f"pairs); less than {MAX_DRIFT_FRAC:.0%} is needed to judge times."
        ]
    return []


def value_of(record: TrialRecord, metric: str) -> float:
    """A run's metric, NaN if the run collapsed: one that stopped early looks cheap otherwise."""
    value = record.metrics.get(metric, math.nan)
    return math.nan if record.status == "collapsed" or is_collapsed(value) else value


def unhealthy_reasons(
    records: Sequence[TrialRecord],
    registration: Registration,
    comparison: Comparison,
    *,
    pairs: int | None = None,
    dependent_arms: frozenset[str] = frozenset(),
    salted_arms: frozenset[str] = frozenset(),
) -> list[str]:
    """All reasons why `comparison` cannot be judged from `records`; empty means healthy.

    Args:
        records: All trials of the sweep, also those of other arms.
        registration: Written before the first trial.
        comparison: The two arms.
        pairs: Pairs that a planned look sees; None: all of them.
        dependent_arms: Arms that follow another arm, exempt from the balance of the order.
        salted_arms: Arms that add a salt to the pair's seed.
    """
    question = registration.question
    metrics = [
        question.goal_of(comparison).metric,
        *(g.metric for g in question.guardrails if g.metric != COLLAPSE),
    ]
    runs_by_arm = {arm: len(runs_of(records, arm)) for arm in registration.arms}
    return [
        *check_comparison(registration, comparison),
        *check_registration(records, registration),
        *check_pairing(records, registration, comparison, pairs),
        *check_split(runs_by_arm),
        *check_fingerprint(records, registration),
        *check_flags(records, comparison),
        *check_seeds(records, comparison, salted_arms),
        *check_order(records, comparison, dependent_arms),
        *check_drift(records, comparison, question),
        *(reason for metric in metrics for reason in check_metric(records, comparison, metric)),
    ]
