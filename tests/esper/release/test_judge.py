"""The judge finds what harms, lets pass what does not, and is never sure without evidence."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.release.judge import (
    Decision,
    Evidence,
    GateEvidence,
    IntervalMeasurements,
    PhaseMeasurements,
    Series,
    judge,
    judge_gate,
    pairs_for,
    threshold_worse,
)
from esper.release.phases import Alert, Quantity, load_migration

PLAN = load_migration(Path(__file__).parents[3] / "configs/morphogenetic_migration.yaml")
POLICY = PLAN.migration.policy
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
REQUESTS = 250
ALERTS = (
    Alert(metric="faults", comparison=">", value=0, unit="count", name="faults",
          on_firing="rollback", owner="o"),
    Alert(metric="load", comparison=">", value=90, unit="percent", name="load",
          on_firing="hold", owner="o"),
)  # fmt: skip
GAUGES = {"faults": Quantity(value=0, unit="count"), "load": Quantity(value=50, unit="percent")}
# what the new path does to latency (factor), accuracy (points), memory (factor), errors (share)
HEALTHY = {"latency": 1.0, "accuracy": 0.0, "memory": 1.0, "errors": 0.0}
FAULTS = {
    "latency +5 %": {"latency": 1.05},
    "accuracy -0.5 points": {"accuracy": -0.5},
    "memory +10 %": {"memory": 1.1},
    "errors 1 %": {"errors": 0.01},
}
NOISES = {
    "normal": lambda rng, n: rng.normal(size=n),
    # the same spread with heavy tails (Student, 3 degrees of freedom), as of rare stalls
    "heavy": lambda rng, n: rng.standard_t(3, size=n) / math.sqrt(3),
}


def measure(rng, fault, noise="normal", pairs=POLICY.min_pairs):
    """One interval as the policy plans for it: its pairs, its spreads, 250 requests a block."""
    sd = {g.metric: g.pair_sd for g in POLICY.guards}
    does = HEALTHY | fault

    def series(unit, new, old):
        return Series(unit=unit, treatment=tuple(new.tolist()), control=tuple(old.tolist()))

    def jitter(metric):
        return sd[metric] * NOISES[noise](rng, pairs)

    latency, memory = np.full(pairs, 20.0), np.full(pairs, 1e9)
    accuracy = 90 + rng.normal(0, 1, pairs)
    errors = [rng.binomial(REQUESTS, p, pairs) / REQUESTS * 100
              for p in (1e-4 + does["errors"], 1e-4)]  # fmt: skip
    return {
        "latency_p50_ms": series(
            "ms", latency * does["latency"] * np.exp(jitter("latency_p50_ms")), latency
        ),
        "accuracy_points": series(
            "points", accuracy + does["accuracy"] + jitter("accuracy_points"), accuracy
        ),
        "memory_peak_bytes": series(
            "bytes", memory * does["memory"] * np.exp(jitter("memory_peak_bytes")), memory
        ),
        "error_percent": series("percent", *errors),
    }


def evidence_of(pairs, *, interval=1, gauges=GAUGES, age_s=60.0, **changed):
    common = {"rollout": "r", "step": 1, "flags_hash": "h"}
    measured = {
        "started_at": NOW - timedelta(seconds=age_s + 600),
        "ended_at": NOW - timedelta(seconds=age_s),
        "pairs": pairs,
        "gauges": gauges,
    }
    return Evidence(
        measurements=IntervalMeasurements(**common | measured | changed),
        interval=interval,
        judged_at=NOW,
        **common,
    )


def decide(pairs, **options):
    return judge(evidence_of(pairs, **options), POLICY, ALERTS).decision


def decisions(fault, noise, trials, seed=0):
    rng = np.random.default_rng(seed)
    drawn = [decide(measure(rng, fault, noise)) for _ in range(trials)]
    return {d: drawn.count(d) / trials for d in Decision}


@pytest.fixture
def healthy():
    return measure(np.random.default_rng(7), {})


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_rolled_back_within_one_interval(fault, noise):
    shares = decisions(FAULTS[fault], noise, 1_000)
    assert shares[Decision.ROLLBACK] >= 0.99
    assert shares[Decision.ADVANCE] == 0


def rolled_back(fault, noise, trials, intervals=POLICY.planned_intervals):
    """Share of rollouts with any rollback in all planned intervals."""
    rng = np.random.default_rng(1)
    return np.mean(
        [
            any(
                decide(measure(rng, fault, noise), interval=i + 1) == Decision.ROLLBACK
                for i in range(intervals)
            )
            for _ in range(trials)
        ]
    )


@pytest.mark.parametrize("noise", NOISES)
def test_a_healthy_rollout_is_not_rolled_back_and_gets_on(noise):
    assert rolled_back({}, noise, 100) == 0
    shares = decisions({}, noise, 300)
    assert shares[Decision.ROLLBACK] == 0
    assert shares[Decision.ADVANCE] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_of_a_thousand_healthy_rollouts_hardly_one_is_rolled_back(noise):
    assert rolled_back({}, noise, 1_000) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_at_the_margin_itself_the_promised_share_is_rolled_back_at_most(noise):
    at_margin = {"latency": 1.03, "accuracy": -0.2, "memory": 1.02}
    assert rolled_back(at_margin, noise, 1_000) <= POLICY.alpha_rollback + 0.0095


def test_the_error_rate_is_shared_among_guards_and_intervals():
    shares = len(POLICY.guards) * POLICY.planned_intervals
    assert math.exp(-threshold_worse(POLICY)) * shares == pytest.approx(POLICY.alpha_rollback)


def test_the_plan_knows_how_much_evidence_that_takes():
    needed = {g.metric: pairs_for(g, POLICY) for g in POLICY.guards}
    assert all(n is not None and n <= POLICY.min_pairs for n in needed.values()), needed
    noisy = POLICY.guards[0].model_copy(update={"pair_sd": 0.2})
    assert pairs_for(noisy, POLICY, trials=200) is None


def spoiled(series, side, value):
    values = list(getattr(series, side))
    values[5] = value
    return series.model_copy(update={side: tuple(values)})


@given(
    metric=st.sampled_from([g.metric for g in POLICY.guards]),
    side=st.sampled_from(["treatment", "control"]),
    value=st.sampled_from([None, math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 1_000),
)
def test_one_missing_or_wrong_number_never_advances(metric, side, value, seed):
    # enough pairs without that one
    pairs = measure(np.random.default_rng(seed), {}, pairs=POLICY.min_pairs + 8)
    pairs[metric] = spoiled(pairs[metric], side, value)
    assert decide(pairs) == Decision.INCONCLUSIVE


@pytest.mark.parametrize("metric", [g.metric for g in POLICY.guards])
def test_a_missing_metric_never_advances(healthy, metric):
    assert decide({k: v for k, v in healthy.items() if k != metric}) == Decision.INCONCLUSIVE
    other_unit = healthy[metric].model_copy(update={"unit": "furlong"})
    assert decide(healthy | {metric: other_unit}) == Decision.INCONCLUSIVE
    unpaired = healthy[metric].model_copy(update={"control": healthy[metric].control[:-1]})
    assert decide(healthy | {metric: unpaired}) == Decision.INCONCLUSIVE


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_ratio_of_what_is_not_positive_is_not_taken(healthy, value):
    for side in ("treatment", "control"):
        bad = spoiled(healthy["latency_p50_ms"], side, value)
        assert decide(healthy | {"latency_p50_ms": bad}) == Decision.INCONCLUSIVE


def test_too_few_pairs_never_advance():
    rng = np.random.default_rng(3)
    assert decide(measure(rng, {}, pairs=POLICY.min_pairs - 1)) == Decision.INCONCLUSIVE
    empty = measure(rng, {}, pairs=0)
    assert decide(empty) == Decision.INCONCLUSIVE


@pytest.mark.parametrize(
    "changed",
    [
        {"age_s": POLICY.max_age_s + 1},
        {"age_s": -1.0},
        {"started_at": NOW},
        {"rollout": "other"},
        {"step": 2},
        {"flags_hash": "other"},
    ],
)
def test_stale_or_foreign_evidence_decides_nothing(healthy, changed):
    assert decide(healthy, **changed) == Decision.INCONCLUSIVE
    harmful = measure(np.random.default_rng(0), FAULTS["memory +10 %"])
    assert decide(harmful, **changed) == Decision.INCONCLUSIVE


def test_evidence_of_the_allowed_age_counts(healthy):
    assert decide(healthy, age_s=POLICY.max_age_s) == Decision.ADVANCE


def test_no_interval_beyond_the_plan_advances(healthy):
    assert decide(healthy, interval=POLICY.planned_intervals) == Decision.ADVANCE
    assert decide(healthy, interval=POLICY.planned_intervals + 1) == Decision.INCONCLUSIVE


def test_harm_counts_however_much_else_is_missing():
    pairs = measure(np.random.default_rng(0), FAULTS["latency +5 %"])
    alone = {"latency_p50_ms": pairs["latency_p50_ms"]}
    assert decide(alone, gauges={}, interval=99) == Decision.ROLLBACK


def test_a_new_path_that_collapses_is_rolled_back(healthy):
    """NaN of the new path is harm, not a gap; of the old path it is a gap."""
    count = POLICY.min_pairs
    nan = (math.nan,) * count
    collapsed = healthy["accuracy_points"].model_copy(update={"treatment": nan})
    assert decide(healthy | {"accuracy_points": collapsed}) == Decision.ROLLBACK
    blind = healthy["accuracy_points"].model_copy(update={"control": nan})
    assert decide(healthy | {"accuracy_points": blind}) == Decision.INCONCLUSIVE


@pytest.mark.parametrize(
    ("gauges", "decision"),
    [
        ({"faults": Quantity(value=1, unit="count")}, Decision.ROLLBACK),
        ({"load": Quantity(value=95, unit="percent")}, Decision.HOLD),
        ({"faults": Quantity(value=math.nan, unit="count")}, Decision.INCONCLUSIVE),
        ({"load": Quantity(value=0.5, unit="ratio")}, Decision.INCONCLUSIVE),
        ({}, Decision.ADVANCE),
    ],
)
def test_alerts_are_heard(healthy, gauges, decision):
    assert decide(healthy, gauges=GAUGES | gauges) == decision
    if gauges:
        (name,) = gauges
        rest = {k: v for k, v in GAUGES.items() if k != name}
        assert decide(healthy, gauges=rest) == Decision.INCONCLUSIVE


def test_what_is_neither_harm_nor_shown_to_be_none_holds():
    """Just inside the margin: no interval of this size can tell."""
    shares = decisions({"latency": 1.0295}, "normal", 100)
    assert shares[Decision.HOLD] >= 0.9


@pytest.mark.parametrize("pairs", [64, 200])
def test_rounding_is_not_harm(pairs):
    """Exactly at the margin in every pair: nothing is shown, either way."""
    for metric, unit, old, new in (
        ("latency_p50_ms", "ms", 10.0, 10.3),
        ("memory_peak_bytes", "bytes", 1e9, 1.02e9),
        ("accuracy_points", "points", 90.1, 89.9),
        ("error_percent", "percent", 0.1, 0.3),
    ):
        exact = measure(np.random.default_rng(0), {}, pairs=pairs)
        exact[metric] = Series(unit=unit, treatment=(new,) * pairs, control=(old,) * pairs)
        assert decide(exact) == Decision.HOLD, metric


def test_a_verdict_tells_the_guard_and_survives_the_disk(healthy):
    pairs = healthy | measure(np.random.default_rng(0), FAULTS["errors 1 %"])
    evidence = evidence_of(pairs)
    verdict = judge(evidence, POLICY, ALERTS)
    assert verdict.reasons[0].startswith("error_percent is worse by more than its margin")
    stored = Evidence.model_validate_json(evidence.model_dump_json())
    again = judge(stored, POLICY, ALERTS)
    assert again.model_dump_json() == verdict.model_dump_json()


def gate(quantities, age_s=60.0):
    phase = PLAN.phases.phase(1)
    measured = PhaseMeasurements(
        commit=None, ended_at=NOW - timedelta(seconds=age_s), quantities=quantities
    )
    evidence = GateEvidence(measured=measured, judged_at=NOW)
    return judge_gate(evidence, (*phase.gates, *phase.targets), POLICY).decision


def test_a_gate_wants_every_target_measured_true_and_fresh():
    good = {
        a.metric: Quantity(value={"<": 50, ">=": 2_000}.get(a.comparison, a.value), unit=a.unit)
        for a in (*PLAN.phases.phase(1).gates, *PLAN.phases.phase(1).targets)
    }
    assert gate(good) == Decision.ADVANCE
    for metric in good:
        rest = {k: v for k, v in good.items() if k != metric}
        assert gate(rest) == Decision.INCONCLUSIVE
        nan = Quantity(value=math.nan, unit=good[metric].unit)
        assert gate(good | {metric: nan}) == Decision.INCONCLUSIVE
    slow = {"forward_p50_ms": Quantity(value=100, unit="ms")}
    assert gate(good | slow) == Decision.HOLD
    assert gate(good, age_s=POLICY.max_gate_age_s + 1) == Decision.INCONCLUSIVE
    assert gate(good, age_s=-1) == Decision.INCONCLUSIVE


def test_exit_codes():
    assert {d: d.exit_code for d in Decision} == {
        "ADVANCE": 0, "HOLD": 10, "ROLLBACK": 20, "INCONCLUSIVE": 30
    }  # fmt: skip
