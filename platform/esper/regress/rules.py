"""What rules the migration itself: the flags' ramps, and how often equal arms are told apart."""

import time
from statistics import median

import numpy as np

from esper.config.base import validate
from esper.evidence import planning
from esper.regress.finding import Finding
from esper.release.flags import FlagFile
from esper.release.snapshot import Snapshot

# shares of a rollout, in basis points
RAMP_BP = (0, 1, 100, 500, 1_000, 2_500, 5_000, 9_999, 10_000)
# the rule is promised for as many pairs, with guardrails whose margins are one standard deviation
PAIRS, GUARDRAILS = 16, 3
# a false WIN more often than that breaks the promise of 2.5 % beyond chance
MOST_FALSE_WINS_PERCENT = 2.9
_PROSE = {"description": "of the suite", "owner": "suite", "expires": "2099-01-01"}


def flags(models: int) -> Finding:
    """A growing share only adds models, and an answer is quick.

    Args:
        models: Names that are asked for at every share.
    """
    takens = [_snapshot(rollout_bp=share) for share in RAMP_BP]
    violations = 0
    for i in range(models):
        ons = [taken.evaluate("asked", f"model-{i}").enabled for taken in takens]
        violations += ons != sorted(ons) or ons[0] or not ons[-1]
    problems = [f"{violations} of {models} models are lost by a larger share, or gained by none"]
    quantities = {
        "flag_ramp_violations": (float(violations), "count"),
        "flag_evaluation_p50_us": (_p50_us(), "us"),
    }
    return Finding(tuple(problems if violations else ()), models * len(RAMP_BP), quantities)


def false_wins(experiments: int) -> Finding:
    """How often the real rule calls one of two equal arms better.

    Args:
        experiments: Simulated A/A experiments of normal noise.
    """
    rng = np.random.default_rng(0)
    size = experiments, 1 + GUARDRAILS, PAIRS
    d = (rng.normal(size=size) - rng.normal(size=size)) / 2**0.5
    counts = planning.verdicts(d[:, 0], d[:, 1:], 1.0, [1.0] * GUARDRAILS)
    percent = 100 * counts["WIN"] / experiments
    problems = []
    if percent > MOST_FALSE_WINS_PERCENT:
        problems.append(f"{percent:.2f} % of equal arms win, more than {MOST_FALSE_WINS_PERCENT} %")
    notes = (f"verdicts on equal arms: {dict(sorted(counts.items()))}",)
    quantities = {"aa_false_win_percent": (percent, "percent")}
    return Finding(tuple(problems), experiments, quantities, notes)


def _snapshot(**asked: object) -> Snapshot:
    needed = _PROSE | {"default": True}
    document = {
        "version": 1, "environments": ["ci"], "flags": {"asked": _PROSE | asked, "needed": needed},
    }  # fmt: skip
    return Snapshot(validate(FlagFile, document, source="the regression suite"))


def _p50_us() -> float:
    """Median time of an answer that a prerequisite, two lists and two rules come before.

    The least of five medians: the others tell of what else the machine does.
    """
    rules = [{"when": {"device": ["tpu"]}, "serve": True}, {"when": {"n": [7]}, "serve": True}]
    evaluate = _snapshot(
        prerequisites=["needed"], allowed=["x"], blocked=["y"], rules=rules, rollout_bp=5_000
    ).evaluate
    attributes: dict[str, str | int | bool] = {"device": "cuda", "n": 1}

    def once() -> float:
        times_ns = []
        for _ in range(5_000):
            started = time.perf_counter_ns()
            evaluate("asked", "gpt-10m/run-0042", attributes)
            times_ns.append(time.perf_counter_ns() - started)
        return median(times_ns) / 1_000

    return min(once() for _ in range(5))
