"""Answers follow the specification; buckets are sticky, monotone and independent."""

import json
import pickle
import runpy
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from esper.config.base import ConfigError, validate
from esper.release.errors import ReleaseError, UnknownFlagError
from esper.release.flags import FlagFile
from esper.release.snapshot import Reason, Snapshot, bucket, snapshot

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "vectors.json").read_text(encoding="utf-8"))


def ask(file, flag="a", model="m", **attributes):
    return Snapshot(file).evaluate(flag, model, attributes)


def test_every_answer_and_reason_is_as_specified():
    files = [validate(FlagFile, d, source="vectors") for d in VECTORS["documents"]]
    assert len(VECTORS["cases"]) >= 600
    for case in VECTORS["cases"]:
        taken = Snapshot(files[case["document"]], case["environment"], case["overrides"])
        answer = taken.evaluate(case["flag"], case["model"], case["attributes"])
        assert (answer.enabled, answer.reason) == (case["enabled"], case["reason"]), case


def test_the_vectors_are_those_of_their_script():
    written = runpy.run_path(str(HERE / "make_vectors.py"))["vectors"]()
    assert written == (HERE / "vectors.json").read_text(encoding="utf-8")


def test_the_vectors_reach_every_reason():
    assert {case["reason"] for case in VECTORS["cases"]} == {*Reason}


def test_every_bucket_is_as_specified():
    for case in VECTORS["buckets"]:
        assert bucket(case["salt"], case["model"]) == case["bucket"], case


def test_each_step_of_the_precedence_outranks_all_below(make_file):
    """All steps speak at once; the first is taken away again and again."""
    speaking = {
        "environments": {"ci": True}, "killed": True, "blocked": ["m"], "prerequisites": ["off"],
        "allowed": [], "rules": [{"when": {"d": [1]}, "serve": False}], "rollout_bp": 10_000,
    }  # fmt: skip
    seen = []
    for field in (None, "environments", "killed", "blocked", "prerequisites", "rules"):
        if field == "prerequisites":
            # from here on the model may be listed
            speaking["allowed"] = ["m"]
            del speaking[field]
            taken = Snapshot(make_file(a=speaking, off={}), "ci")
            seen.append(taken.evaluate("a", "m", {"d": 1}).reason)
            speaking["allowed"] = []
        elif field:
            del speaking[field]
        taken = Snapshot(make_file(a=speaking, off={}), "ci")
        seen.append(taken.evaluate("a", "m", {"d": 1}).reason)
    assert seen == [
        Reason.ENVIRONMENT, Reason.KILLED, Reason.BLOCKED, Reason.PREREQUISITE, Reason.ALLOWED,
        Reason.RULE, Reason.IN_ROLLOUT,
    ]  # fmt: skip


def test_a_variable_outranks_the_kill_switch_and_says_so(make_file):
    file = make_file(a={"killed": True})
    assert Snapshot(file, overrides={"a": True}).evaluate("a") == (True, "ENVIRONMENT", "process")
    with pytest.raises(UnknownFlagError):
        Snapshot(file, overrides={"b": True})
    with pytest.raises(ReleaseError, match="environment must be one of ci, but got 'prod'"):
        Snapshot(file, "prod")


@pytest.mark.parametrize("model", [None, ""])
def test_a_missing_model_is_never_in_a_rollout(make_file, model):
    assert ask(make_file(a={"rollout_bp": 10_000}), model=model) == (False, "NO_MODEL", "")


def test_a_prerequisite_is_asked_for_the_same_model(make_file):
    file = make_file(a={"prerequisites": ["b"], "default": True}, b={"rollout_bp": 5_000})
    taken = Snapshot(file)
    for i in range(100):
        assert taken.evaluate("a", f"m{i}").enabled == taken.evaluate("b", f"m{i}").enabled
    assert ask(make_file(a={"prerequisites": ["b"], "allowed": ["m"]}, b={})).detail == "b"


def test_one_is_not_true_in_a_rule(make_file):
    file = make_file(a={"rules": [{"when": {"n": ["x", 1]}, "serve": True}]})
    assert ask(file, n=1) == ask(file, n="x") == (True, "RULE", "rules.0")
    for other in (True, "1", 2, None, [1]):
        assert not ask(file, n=other).enabled
    assert not ask(file).enabled


def buckets_of(salt, count):
    return np.fromiter((bucket(salt, f"model-{i}") for i in range(count)), np.int64, count)


def violations(make_file, count):
    """Models that a larger share loses or a smaller one gains, over a ramp up and down."""
    ramp = (0, 1, 100, 500, 1_000, 2_500, 5_000, 9_999, 10_000)
    takens = [Snapshot(make_file(a={"rollout_bp": bp})) for bp in ramp]
    lost, on = 0, np.zeros(len(ramp), np.int64)
    for i in range(count):
        ons = [t.evaluate("a", f"model-{i}").enabled for t in takens]
        on += ons
        lost += ons != sorted(ons)
    return lost, dict(zip(ramp, (on / count).tolist(), strict=True))


def test_a_ramp_is_monotone_both_ways(make_file):
    lost, shares = violations(make_file, 20_000)
    assert lost == 0
    assert (shares[0], shares[10_000]) == (0, 1)
    assert shares[500] == pytest.approx(0.05, abs=0.006)
    assert shares[5_000] == pytest.approx(0.5, abs=0.014)


@pytest.mark.slow
def test_a_ramp_is_monotone_over_a_million_models(make_file):
    lost, shares = violations(make_file, 1_000_000)
    assert lost == 0
    for bp, share in shares.items():
        assert share == pytest.approx(bp / 10_000, abs=0.002)


def test_buckets_are_uniform_and_independent_between_flags():
    a, b = buckets_of("kasmina.parallel", 50_000), buckets_of("kasmina.triton", 50_000)
    assert stats.chisquare(np.bincount(a // 100, minlength=100)).pvalue > 1e-3
    joint, *_ = np.histogram2d(a, b, bins=(10, 10), range=((0, 10_000), (0, 10_000)))
    assert stats.chi2_contingency(joint).pvalue > 1e-3
    assert stats.chisquare(joint.ravel()).pvalue > 1e-3


def test_flags_with_one_salt_take_the_same_models(make_file):
    taken = Snapshot(make_file(a={"rollout_bp": 3_000, "salt": "s"},
                               b={"rollout_bp": 3_000, "salt": "s"}))  # fmt: skip
    ons = [(taken.evaluate("a", f"{i}").enabled, taken.evaluate("b", f"{i}").enabled)
           for i in range(200)]  # fmt: skip
    assert {*ons} == {(True, True), (False, False)}


def test_the_hash_is_of_what_answers_depend_on(make_file):
    base = Snapshot(make_file(a={})).hash
    assert Snapshot(make_file(a={"owner": "b", "expires": "2030-01-01"})).hash == base
    others = [
        Snapshot(make_file(a={"killed": True})),
        Snapshot(make_file(a={"salt": "s"})),
        Snapshot(make_file(b={})),
        Snapshot(make_file(a={}), "ci"),
        Snapshot(make_file(a={}), overrides={"a": False}),
    ]
    assert len({base, *(o.hash for o in others)}) == len(others) + 1


def test_a_snapshot_answers_alike_in_another_process(make_file):
    taken = Snapshot(make_file(a={"rollout_bp": 5_000}), "ci", {})
    other = pickle.loads(pickle.dumps(taken))
    assert other.hash == taken.hash
    for i in range(50):
        assert other.evaluate("a", f"m{i}") == taken.evaluate("a", f"m{i}")


def test_a_snapshot_does_not_see_the_file_change(flags_path):
    taken = snapshot(flags_path, {"ESPER_FLAG_TAMIYO_REMOTE": "on"})
    assert taken.evaluate("tamiyo.remote").enabled
    flags_path.write_text(flags_path.read_text().replace("rollout_bp: 0", "rollout_bp: 10000"))
    assert not taken.evaluate("kasmina.parallel", "m").enabled
    later = snapshot(flags_path, {})
    assert later.evaluate("kasmina.parallel", "m").enabled
    assert later.hash != taken.hash
    flags_path.write_text("version: 1\nflags: 3\n")
    with pytest.raises(ConfigError, match="flags must"):
        snapshot(flags_path, {})


def test_an_unknown_flag_is_an_error_not_off(make_file):
    with pytest.raises(UnknownFlagError, match="got 'b'"):
        Snapshot(make_file(a={})).evaluate("b", "m")


def test_an_answer_takes_two_microseconds_at_most(make_file):
    """With a prerequisite, lists, two rules and a rollout; best of some tries on a busy machine."""
    rules = [{"when": {"device": ["tpu"]}, "serve": True}, {"when": {"n": [7]}, "serve": True}]
    file = make_file(
        a={"prerequisites": ["b"], "allowed": ["x"], "blocked": ["y"], "rules": rules,
           "rollout_bp": 5_000},
        b={"default": True},
    )  # fmt: skip
    evaluate, attributes = Snapshot(file).evaluate, {"device": "cuda", "n": 1}

    def p50_us():
        times_ns = []
        for _ in range(5_000):
            start = time.perf_counter_ns()
            evaluate("a", "gpt-10m/run-0042", attributes)
            times_ns.append(time.perf_counter_ns() - start)
        return np.median(times_ns) / 1_000

    assert min(p50_us() for _ in range(5)) <= 2
