"""Every reason for which a sweep must not be judged, planted one by one in a healthy sweep."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest

from esper.config.sweep import Comparison, Guardrail
from esper.evidence.health import check_drift, check_split, unhealthy_reasons
from esper.evidence.records import FlagsRecord
from esper.evidence.verdict import judge

VALUES = {
    "grown": [0.90 + 0.01 * k for k in range(12)],
    "host": [0.80 + 0.01 * k + 0.001 * (k % 3) for k in range(12)],
}
COLLAPSED = {"status": "collapsed", "collapse_reason": "planted"}


@pytest.fixture
def healthy(plant):
    sweep = plant(VALUES)
    assert sweep.primary().verdict == "WIN"
    return sweep


def metrics(sweep, trial_id, **update):
    old = next(r for r in sweep.records if r.trial_id == trial_id).metrics
    return {name: v for name, v in (old | update).items() if v is not None}


def other(sweep, **update):
    return sweep.records[0].fingerprint.model_copy(update=update)


def flagged(sweep, **arms):
    """The same sweep with flags read in its one interval: arm to hash and execution."""
    records = [
        r.model_copy(
            update={
                "curves": {"step": [10.0]},
                "flags": [FlagsRecord(hash=arms[r.arm][0], execution=arms[r.arm][1], grows=True)],
            }
        )
        for r in sweep.records
    ]
    return type(sweep)(records, sweep.registration)


SAME = {"grown": ("f1", "kernels"), "host": ("f1", "loop")}
BREAKS: dict[str, tuple[Callable, str]] = {
    "missing": (lambda s: s.without("host-003"), r"1 of 24 runs left no record: host-003"),
    "twice": (
        lambda s: type(s)([*s.records, s.records[0]], s.registration),
        "more than one record: grown-000",
    ),
    "stranger": (lambda s: s.change("host-003", pair=12), "of no registered run: host-003"),
    "code": (
        lambda s: s.change("host-003", fingerprint=other(s, code_hash="new")),
        "2 different states of the code",
    ),
    "device": (
        lambda s: s.change("host-003", fingerprint=other(s, device="H200")),
        "different devices: H200, cpu",
    ),
    "versions": (
        lambda s: s.change("host-003", fingerprint=other(s, versions={"torch": "2.11"})),
        "different versions of: torch",
    ),
    "version absent": (
        lambda s: s.change("host-003", fingerprint=other(s, versions={})),
        "different versions of: torch",
    ),
    "version added": (
        lambda s: s.change(
            "host-003", fingerprint=other(s, versions={"torch": "2.10", "triton": "3.6"})
        ),
        "different versions of: triton",
    ),
    "seed": (lambda s: s.change("host-003", seed=7), "1 pairs have different seeds.*003"),
    "same seed": (
        lambda s: s.change("host-003", seed=1004).change("grown-003", seed=1004),
        "share a random seed",
    ),
    "foreign": (lambda s: s.change("host-003", registration_hash="f"), "another registration"),
    "early": (
        lambda s: s.change("host-003", started_at=s.registration.registered_at),
        "1 trials started before the question was registered: host-003",
    ),
    "zone": (
        lambda s: s.change(
            "host-003", started_at=s.registration.registered_at.replace(tzinfo=None)
        ),
        "without a time zone",
    ),
    "place": (lambda s: s.change("host-000", order=0), "same place in the order: 000"),
    "absent": (
        lambda s: s.change("host-003", metrics=metrics(s, "host-003", score=None)),
        r"'score' is absent from 1 records \(host-003\).*parameters, score, steps",
    ),
    "nan": (
        lambda s: s.change("host-003", metrics=metrics(s, "host-003", score=math.nan)),
        "1 finished runs have no finite 'score'.*host-003",
    ),
    "flags": (
        lambda s: flagged(s, grown=("f1", "loop"), host=("f2", "loop")),
        "2 states of the flags: f1, f2",
    ),
    "flags changed": (
        lambda s: flagged(s, **SAME).change(
            "host-003", flags=[FlagsRecord(hash="f3", execution="loop", grows=True)]
        ),
        "2 states of the flags: f1, f3",
    ),
    "flags of an interval": (
        lambda s: flagged(s, **SAME).change("host-003", flags=[]),
        "1 trials have intervals without flags: host-003",
    ),
    "flags of a trial": (
        lambda s: flagged(s, **SAME).change("host-003", flags=None),
        "1 trials of 'host' name no flags: host-003",
    ),
    "huge": (
        lambda s: s.change("host-003", metrics=metrics(s, "host-003", score=1e200)),
        "within 1e100: host-003",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_break_is_unhealthy_and_says_why(healthy, name) -> None:
    break_, reason = BREAKS[name]
    verdict = break_(healthy).primary()
    assert verdict.verdict == "UNHEALTHY"
    assert verdict.p_value is None
    assert verdict.differences == []
    assert any(re.search(reason, sentence) for sentence in verdict.reasons)


def test_missing_runs_are_counted(healthy) -> None:
    verdict = healthy.without("host-003").without("grown-005").primary()
    assert (verdict.missing, verdict.pairs) == (2, 10)


def test_many_names_are_shortened(healthy) -> None:
    sweep = healthy
    for pair in range(10):
        sweep = sweep.without(f"host-{pair:03d}")
    assert "host-007 and 2 more" in sweep.primary().reasons[0]


def test_no_records_at_all(healthy) -> None:
    verdict = type(healthy)([], healthy.registration).primary()
    assert (verdict.verdict, verdict.missing) == ("UNHEALTHY", 24)


def test_code_changed_after_registration(healthy) -> None:
    registration = healthy.registration.model_copy(
        update={"fingerprint": other(healthy, code_hash="older")}
    )
    verdict = type(healthy)(healthy.records, registration).primary()
    assert verdict.reasons == ["The code was changed between the registration and the trials."]


def test_an_altered_question_is_noticed(healthy) -> None:
    question = healthy.registration.question.model_copy(update={"margin": 5.0})
    registration = healthy.registration.model_copy(update={"question": question})
    verdict = type(healthy)(healthy.records, registration).primary()
    assert verdict.verdict == "UNHEALTHY"
    assert "altered" in verdict.reasons[0]


def test_order_that_was_not_random(healthy) -> None:
    records = [r.model_copy(update={"order": int(r.arm == "host")}) for r in healthy.records]
    sweep = type(healthy)(records, healthy.registration)
    assert "ran before 'host' in 12 of 12 pairs" in sweep.primary().reasons[0]
    for follower in VALUES:
        assert sweep.primary(dependent_arms=frozenset({follower})).verdict == "WIN"
    # a third arm that follows changes nothing here
    assert sweep.primary(dependent_arms=frozenset({"other"})).verdict == "UNHEALTHY"


def test_salted_arms_may_have_other_seeds_but_not_one_for_all(healthy) -> None:
    salted = [
        r.model_copy(update={"seed": r.seed + 5_000 * (r.arm == "host")}) for r in healthy.records
    ]
    sweep = type(healthy)(salted, healthy.registration)
    assert sweep.primary().verdict == "UNHEALTHY"
    assert sweep.primary(salted_arms=frozenset({"host"})).verdict == "WIN"
    constant = [r.model_copy(update={"seed": 1}) for r in healthy.records]
    sweep = type(healthy)(constant, healthy.registration)
    assert sweep.primary(salted_arms=frozenset({"host"})).verdict == "UNHEALTHY"


def test_every_run_collapsed(healthy) -> None:
    records = [
        r.model_copy(update={"metrics": r.metrics | {"score": math.nan}, **COLLAPSED})
        for r in healthy.records
    ]
    verdict = type(healthy)(records, healthy.registration).primary()
    assert verdict.reasons == [
        "Every run of both arms collapsed: no value of 'score' is left to compare."
    ]


def test_both_arms_collapsed_is_no_equivalence_beside_a_third_that_did_not(plant) -> None:
    nan = [math.nan] * 12
    sweep = plant({"a": nan, "b": nan, "c": VALUES["host"]})
    assert sweep.primary().verdict == "UNHEALTHY"


def test_a_guardrail_metric_must_exist(plant) -> None:
    sweep = plant(VALUES, guardrails=[Guardrail(metric="latency_ms", margin=1.0)])
    assert "'latency_ms' is absent from 24 records" in sweep.primary().reasons[0]


def test_a_question_that_was_not_registered(healthy) -> None:
    backwards = Comparison(treatment="host", control="grown")
    verdict = judge(healthy.records, healthy.registration, backwards)
    assert verdict.reasons == ["'host' against 'grown' is not a registered comparison."]
    itself = Comparison(treatment="host", control="host")
    assert "must be two arms" in unhealthy_reasons(healthy.records, healthy.registration, itself)[0]


def test_a_single_pair_is_unhealthy(plant) -> None:
    verdict = plant({"a": [1.0], "b": [0.0]}).primary()
    assert verdict.reasons == ["A verdict needs at least 2 pairs, but 1 registered."]


def test_fair_split() -> None:
    assert check_split({"a": 16, "b": 16}) == []
    assert check_split({"a": 16, "b": 12}) == []
    assert check_split({"a": 30, "b": 4}) == [
        "The split over the arms is not fair: a 30, b 4 runs."
    ]
    assert check_split({"a": 0, "b": 0}) == []


def test_an_arm_that_hardly_ran_is_an_unfair_split(healthy) -> None:
    grown = [r for r in healthy.records if r.arm == "grown"]
    reasons = type(healthy)(grown, healthy.registration).primary().reasons
    assert "The split over the arms is not fair: grown 12, host 0 runs." in reasons


def test_a_broken_sweep_has_all_its_reasons(healthy) -> None:
    sweep = healthy.without("host-003").change("grown-001", seed=-1)
    assert len(sweep.primary().reasons) == 2


@pytest.mark.parametrize("collapse", [{"grown"}, {"host"}])
def test_one_arm_that_always_collapses_is_judged(plant, collapse) -> None:
    values = {a: [math.nan] * 12 if a in collapse else v for a, v in VALUES.items()}
    assert plant(values).primary().verdict == ("LOSE" if "grown" in collapse else "WIN")


def test_numbers_of_a_healthy_sweep_agree_with_numpy(healthy) -> None:
    verdict = healthy.primary()
    d = np.array(VALUES["grown"]) - np.array(VALUES["host"])
    assert verdict.differences == d.tolist()
    assert verdict.mean_difference == d.mean()


def test_arms_may_be_chosen_by_the_same_flags(healthy):
    assert flagged(healthy, **SAME).primary().verdict == "WIN"


def timed(sweep, metric="train_seconds"):
    """The same sweep, with a guardrail on a time."""
    guardrail = Guardrail(metric=metric, margin=0.5, relative=True)
    return sweep.registration.question.model_copy(update={"guardrails": (guardrail,)})


def slowed(sweep, frac, arm="grown"):
    records = [
        r.model_copy(update={"reference_ms": 10.0 * (1 + frac)}) if r.arm == arm else r
        for r in sweep.records
    ]
    return type(sweep)(records, sweep.registration)


@pytest.mark.parametrize(
    ("frac", "metric", "reasons"),
    [
        (0.029, "train_seconds", 0), (0.031, "train_seconds", 1), (-0.031, "train_seconds", 1),
        (0.5, "parameters", 0), (math.nan, "train_seconds", 1), (0.031, "decisions_per_s", 1),
    ],
)  # fmt: skip
def test_a_machine_that_was_slower_beside_one_arm_spoils_times_alone(
    healthy, frac, metric, reasons
):
    found = check_drift(
        slowed(healthy, frac).records, healthy.registration.question, timed(healthy, metric)
    )
    assert len(found) == reasons


def test_times_without_the_machines_speed_are_not_judged(healthy):
    bare = [r.model_copy(update={"reference_ms": None}) for r in healthy.records]
    (reason,) = check_drift(bare, healthy.registration.question, timed(healthy))
    assert "the reference workload must be measured beside every trial" in reason


def test_a_drift_makes_a_verdict_unhealthy(plant):
    guardrail = Guardrail(metric="train_seconds", margin=0.5, relative=True)
    sweep = plant(VALUES, guardrails=[guardrail])
    assert sweep.primary().verdict == "WIN"
    verdict = slowed(sweep, 0.05).primary()
    assert verdict.verdict == "UNHEALTHY"
    assert "took +5.0% beside 'grown' against 'host'" in verdict.reasons[0]
