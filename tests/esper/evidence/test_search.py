"""Successive halving over recorded runs: who wins, and what it would have cost."""

import pytest

from esper.config.base import ConfigError, validate
from esper.config.sweep import Search, SweepConfig
from esper.evidence.search import halve, search_records

# held-out losses after 1/8, 1/4, 1/2 and all of the steps
CURVES = {
    "a": [4, 4, 4, 4, 4, 4, 4, 0.0],  # would be best in the end, but is dropped at once
    "b": [1, 1, 1, 1, 1, 1, 1, 1.0],
    "c": [2, 2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9],
    "d": [3, 3, 3, 3, 3, 3, 3, 3.0],
}


@pytest.fixture
def runs(plant):
    sweep = plant({arm: [0.1 * i, 0.1 * i + 0.01] for i, arm in enumerate(CURVES)})
    return [
        r.model_copy(update={
            "curves": {"step": [10.0 * k for k in range(1, 9)], "held_out_loss": CURVES[r.arm]},
            "metrics": r.metrics | {"train_flops": 800.0, "train_seconds": 8.0},
        })
        for r in sweep.records
    ]  # fmt: skip


def test_the_winner_of_the_halving_with_the_cost_of_all(runs):
    found = search_records(runs, {"search": Search(over=tuple(CURVES))})
    assert [r.trial_id for r in found] == ["search-000", "search-001"]
    first = found[0]
    # 4 runs a quarter, the better 2 (b and c) a half, c to the end
    assert first.metrics["score"] == pytest.approx(0.2)
    assert first.metrics["train_flops"] == 800 * (2 * 0.25 + 0.5 + 1.0)
    assert first.metrics["train_seconds"] == 8 * (2 * 0.25 + 0.5 + 1.0)
    assert first.curves["held_out_loss"] == CURVES["c"]


def test_a_larger_eta_is_cheaper_and_greedier(runs):
    pair = [r for r in runs if r.pair == 0]
    found = halve("search", Search(over=tuple(CURVES), eta=4), pair)
    assert found.metrics["score"] == pytest.approx(0.1)
    assert found.metrics["train_flops"] == 800 * (3 * 0.25 + 1.0)


def test_a_power_of_eta_takes_as_many_rungs_as_its_exponent(runs):
    pair = [runs[0].model_copy(update={"trial_id": f"r-{i}"}) for i in range(125)]
    found = halve("search", Search(over=tuple(CURVES), eta=5), pair)
    # of 125 runs 100 end after 1/125 of the steps, 20 after 1/25, 4 after 1/5
    assert found.metrics["train_flops"] == pytest.approx(800 * (100 / 125 + 20 / 25 + 4 / 5 + 1))


def test_higher_may_be_better_and_a_collapsed_run_never_is(runs):
    pair = [r for r in runs if r.pair == 0]
    best = Search(over=tuple(CURVES), higher_is_better=True)
    assert halve("s", best, pair).metrics["score"] == pytest.approx(0.0)
    broken = [r if r.arm != "a" else r.model_copy(update={"status": "collapsed"}) for r in pair]
    assert halve("s", best, broken).metrics["score"] == pytest.approx(0.3)


def test_a_pair_that_lacks_a_candidate_has_no_result_yet(runs):
    some = [r for r in runs if r.trial_id != "c-001"]
    found = search_records(some, {"search": Search(over=tuple(CURVES))})
    assert [r.pair for r in found] == [0]


def test_a_curve_that_nobody_recorded_is_an_error(runs):
    with pytest.raises(ValueError, match="has no 'held_out_accuracy', only step, held_out_loss"):
        search_records(runs, {"s": Search(over=("a", "b"), metric="held_out_accuracy")})


@pytest.mark.parametrize(
    ("searches", "message"),
    [
        ({"search": {"over": ["a", "x"]}}, r"searches\.search\.over must name arms .*got 'x'"),
        ({"a": {"over": ["a", "b"]}}, "searches must have names of their own, but 'a' is an arm"),
        ({"search": {"over": ["a"]}}, "at least 2 items"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(searches, message):
    sweep = {
        "name": "s", "run": {}, "arms": {"a": {}, "b": {}}, "searches": searches,
        "question": {"treatment": "a", "control": "b", "metric": "m", "margin": 1.0},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        validate(SweepConfig, sweep, source="s")
