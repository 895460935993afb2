"""Against flagd's own evaluator, on what both can say: the same models are in.

flagd has no kill switch, lists or prerequisites as such, so that they are written as targeting
rules, in our order of precedence. Left out: a missing model, for which flagd falls back on its
default with an error.
"""

import random

import pytest
from openfeature.contrib.tools.flagd.core import FlagdCore
from openfeature.evaluation_context import EvaluationContext

from esper.release.snapshot import Snapshot

MODELS = ("m", "gpt-10m/run-7", "模型", "🌱", "x" * 23, "x" * 24, "x" * 255, "x" * 256)


def targeting(name, flag):
    """One of our flags in flagd's JSON logic."""
    model = {"var": "targetingKey"}
    if flag.get("killed"):
        return {"if": [True, "off", "off"]}
    rule = "on" if flag.get("default") else "off"
    if "rollout_bp" in flag:
        share = flag["rollout_bp"]
        rule = {"fractional": [["on", share], ["off", 10_000 - share]]}
    for wanted in reversed(flag.get("rules", ())):
        conditions = [{"in": [{"var": a}, list(v)]} for a, v in wanted["when"].items()]
        rule = {"if": [{"and": conditions}, "on" if wanted["serve"] else "off", rule]}
    rule = {"if": [{"in": [model, list(flag.get("allowed", ()))]}, "on", rule]}
    return {"if": [{"in": [model, list(flag.get("blocked", ()))]}, "off", rule]}


def flagd_of(flags):
    core = FlagdCore()
    core.set_flags(
        {
            "flags": {
                name: {
                    "state": "ENABLED",
                    "variants": {"on": True, "off": False},
                    "defaultVariant": "off",
                    "targeting": targeting(name, flag),
                }
                for name, flag in flags.items()
            }
        }
    )
    return core


def draw(rng):
    flag = {}
    if rng.random() < 0.6:
        flag["rollout_bp"] = rng.choice((0, 1, 500, 3_333, 5_000, 9_999, 10_000))
    elif rng.random() < 0.5:
        flag["default"] = True
    if rng.random() < 0.1:
        flag["killed"] = True
    listed = rng.sample(MODELS, 4)
    if rng.random() < 0.5:
        flag |= {"allowed": listed[:2], "blocked": listed[2:]}
    if rng.random() < 0.5:
        when = rng.choice(({"device": ["cuda", "mps"]}, {"device": ["cpu"], "kind": ["a", "b"]}))
        flag["rules"] = [{"when": when, "serve": rng.random() < 0.5}]
    return flag


@pytest.mark.parametrize("seed", range(30))
def test_flagd_gives_the_same_answers(make_file, seed):
    rng = random.Random(seed)
    flags = {f"flag_{i}": draw(rng) for i in range(4)}
    ours, theirs = Snapshot(make_file(**flags)), flagd_of(flags)
    for name in flags:
        for model in (*MODELS, *(f"run-{rng.randrange(10**6)}" for _ in range(30))):
            attributes = {"device": rng.choice(("cpu", "cuda")), "kind": rng.choice("abc")}
            answer = ours.evaluate(name, model, attributes)
            context = EvaluationContext(model, attributes)
            other = theirs.resolve_boolean_value(name, not answer.enabled, context)
            assert other.value == answer.enabled, (flags[name], model, attributes, answer)


@pytest.mark.parametrize("bp", [1, 500, 5_000])
def test_a_share_is_of_exactly_the_same_models(make_file, bp):
    flags = {"kasmina_parallel": {"rollout_bp": bp}}
    ours, theirs = Snapshot(make_file(**flags)), flagd_of(flags)
    differing = [
        model
        for model in (f"model-{i}" for i in range(3_000))
        if ours.evaluate("kasmina_parallel", model).enabled
        != theirs.resolve_boolean_value("kasmina_parallel", False, EvaluationContext(model)).value
    ]
    assert differing == []
