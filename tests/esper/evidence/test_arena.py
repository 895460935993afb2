"""Evidence over tasks: scales, Holm over tasks, absent methods, collapsed runs."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from esper.config.arena import Scale
from esper.config.sweep import Question, Secondary
from esper.evidence.arena import (
    ArenaRegistration,
    TaskEvidence,
    scores,
    summarise_arena,
)
from esper.evidence.records import Fingerprint, Registration, TrialRecord

PAIRS = 8
MARK = Fingerprint(code_hash="c", commit="abc", versions={}, device="test CPU")
NOW = datetime(2026, 11, 23, tzinfo=UTC)
RNG = np.random.default_rng(0)
NOISE = {arm: RNG.normal(0, 0.01, PAIRS) for arm in ("host", "static", "random", "esper")}


def task(higher=True, collapsed=(), **means):
    """A task whose arms have these means up to noise; `collapsed` are (arm, pair)."""
    arms = list(means)
    treatment, *controls = reversed(arms)
    comparisons = [Secondary(treatment=treatment, control=c) for c in controls]
    question = Question(
        treatment=treatment, control=controls[0], metric="m", higher_is_better=higher,
        margin=0.05, secondary=tuple(comparisons[1:]),
    )  # fmt: skip
    draft = Registration(
        sweep="s", config_hash=str(means), question=question, pairs=PAIRS, arms=arms,
        fingerprint=MARK, registered_at=NOW, registration_hash="",
    )  # fmt: skip
    digest = draft.digest()
    records = []
    for place, (arm, mean) in enumerate(means.items()):
        for pair in range(PAIRS):
            broken = (arm, pair) in collapsed
            value = mean + (1 if higher else -1) * NOISE[arm][pair]
            records.append(TrialRecord(
                trial_id=f"{arm}-{pair:03d}", arm=arm, pair=pair, seed=pair,
                order=(place + pair) % len(arms), registration_hash=digest, fingerprint=MARK,
                started_at=NOW.replace(hour=1), ended_at=NOW.replace(hour=2),
                status="collapsed" if broken else "finished",
                metrics={"m": np.nan if broken else value, "parameters": 10.0 * place,
                         "steps": 5.0, "train_flops": 100.0 - place, "train_seconds": 1.0},
                curves={}, transitions=[], sites={},
            ))  # fmt: skip
    registration = draft.model_copy(update={"registration_hash": digest})
    return TaskEvidence(registration, records)


def arena(**tasks):
    draft = ArenaRegistration(
        arena="a", treatment="esper", controls=["host", "static", "random"],
        scale=Scale(one=("static",)),
        sweeps={name: t.registration.registration_hash for name, t in tasks.items()},
        absent={name: {} for name in tasks}, registered_at=NOW, registration_hash="",
    )  # fmt: skip
    return draft.model_copy(update={"registration_hash": draft.digest()})


def summary_of(**tasks):
    return summarise_arena(arena(**tasks), tasks)


LOW = {"host": 0.5, "static": 0.9, "random": 0.8, "esper": 0.95}


def test_a_method_with_seeds_of_its_own_is_told_to_the_checks():
    plain = task(**LOW)
    salted = [
        r.model_copy(update={"seed": r.seed + 1000}) if r.arm == "random" else r
        for r in plain.records
    ]
    strange = TaskEvidence(plain.registration, salted)
    known = replace(strange, salted_arms=frozenset({"random"}))
    found = [
        summary_of(t=evidence).tasks["t"].verdicts["random"].verdict
        for evidence in (strange, known)
    ]
    assert found == ["UNHEALTHY", "WIN"]


def test_a_score_is_0_at_the_host_and_1_at_the_best_static_whichever_way_is_better():
    (zero, one), scored = scores(task(**LOW), Scale(one=("static", "random")))
    assert scored["host"].mean() == pytest.approx(0, abs=1e-12)
    assert scored["static"].mean() == pytest.approx(1)
    assert scored["esper"].mean() == pytest.approx(1.125, abs=0.02)
    mirrored = {arm: 2 - mean for arm, mean in LOW.items()}
    (high, low), again = scores(task(higher=False, **mirrored), Scale(one=("static", "random")))
    assert (2 - high, 2 - low) == pytest.approx((zero, one))
    for arm in LOW:
        np.testing.assert_allclose(again[arm], scored[arm], atol=1e-9)


def test_a_collapsed_run_scores_below_every_other_and_is_not_dropped():
    _, scored = scores(task(collapsed=[("esper", 3)], **LOW), Scale(one=("static",)))
    assert scored["esper"].size == PAIRS
    rest = np.concatenate([np.delete(v, 3) if a == "esper" else v for a, v in scored.items()])
    assert scored["esper"][3] < rest.min() - 1


def test_without_a_better_static_network_there_is_no_scale():
    bad = task(**LOW | {"static": 0.4})
    with pytest.raises(ValueError, match=r"scale.one must be better than 'host'"):
        scores(bad, Scale(one=("static",)))
    summary = summary_of(good=task(**LOW), bad=bad)
    assert summary.aggregates == {}
    assert "must be better than 'host'" in summary.tasks["bad"].no_scale_reason
    assert summary.tasks["good"].methods["static"].score == pytest.approx(1)
    assert summary.tasks["bad"].verdicts["host"].verdict == "WIN"


def test_holm_is_over_the_tasks_of_one_control():
    tasks = {
        "a": task(**LOW),
        "b": task(**LOW),
        "c": task(**LOW | {"random": LOW["esper"]}),
        "d": task(host=0.5, static=0.9, esper=0.95),
    }
    summary = summary_of(**tasks)
    smallest = 0.5**PAIRS
    against_host = [t.verdicts["host"] for t in summary.tasks.values()]
    assert [v.p_value for v in against_host] == [smallest] * 4
    assert [v.p_holm for v in against_host] == pytest.approx([4 * smallest] * 4)
    assert {v.verdict for v in against_host} == {"WIN"}
    assert "over 4 tasks gives" in against_host[0].reasons[1]
    against_random = {n: t.verdicts["random"] for n, t in summary.tasks.items() if n != "d"}
    assert against_random["a"].p_holm == pytest.approx(3 * smallest)
    assert against_random["c"].verdict != "WIN"
    assert "random" not in summary.tasks["d"].verdicts


def test_a_method_that_a_task_lacks_is_summed_up_over_its_own_with_the_treatment_beside_it():
    summary = summary_of(a=task(**LOW), d=task(host=0.5, static=0.9, esper=0.7))
    random, esper = summary.aggregates["random"], summary.aggregates["esper"]
    assert random.tasks == ["a"]
    assert random.treatment_iqm == pytest.approx(1.125, abs=0.02)
    assert esper.tasks == ["a", "d"]
    assert esper.treatment_iqm == esper.iqm < random.treatment_iqm
    assert esper.iqm_low <= esper.iqm <= esper.iqm_high


def test_a_missing_run_is_unhealthy_and_no_verdict():
    whole = task(**LOW)
    holed = TaskEvidence(whole.registration, whole.records[1:])
    verdict = summary_of(a=task(**LOW), b=holed).tasks["b"].verdicts["host"]
    assert verdict.verdict == "UNHEALTHY"
    assert "1 of 16 runs left no record: host-000" in verdict.reasons[0]


def test_other_tasks_than_registered_are_refused():
    tasks = {"a": task(**LOW)}
    with pytest.raises(ValueError, match="must be the registered sweeps"):
        summarise_arena(arena(**tasks), {"a": task(**LOW | {"host": 0.4})})
    altered = arena(**tasks).model_copy(update={"controls": ["host"]})
    with pytest.raises(ValueError, match="registration must be unaltered"):
        summarise_arena(altered, tasks)


def test_the_summary_is_the_same_each_time_and_survives_json():
    tasks = {"a": task(**LOW), "b": task(collapsed=[("random", 1)], **LOW)}
    first = summary_of(**tasks)
    assert first == summary_of(**tasks)
    assert type(first).model_validate_json(first.model_dump_json()) == first


def test_a_method_with_a_collapsed_run_is_on_no_flops_front():
    results = summary_of(a=task(collapsed=[("esper", 0)], **LOW | {"esper": 5.0}))
    esper = results.tasks["a"].methods["esper"]
    assert esper.arm.collapsed == 1
    assert esper.parameters_front
    assert not esper.flops_front
