"""The rule: what wins, loses, is equivalent or undecided, and what a verdict records."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.config.sweep import Guardrail, Secondary
from esper.evidence.arm_summary import summarise
from esper.evidence.compare import GuardrailResult, PValues
from esper.evidence.paired import equivalence_p, one_sided, pairs_for_effect
from esper.evidence.verdict import Verdict, decide, judge, judge_all

NAN = math.nan
BASE = [0.80, 0.82, 0.79, 0.81, 0.83, 0.80, 0.78, 0.84, 0.80, 0.81]
NOISE = [0.01, -0.01, 0.02, -0.02, 0.0, 0.01, -0.01, 0.015, -0.015, 0.0]
MIRROR = {"WIN": "LOSE", "LOSE": "WIN"}
DIFFERENCES = st.lists(st.integers(-20, 20), min_size=6, max_size=8)


def plus(values, by, noise=NOISE):
    return [v + by + e for v, e in zip(values, noise, strict=True)]


@pytest.mark.parametrize(
    ("by", "expected"),
    [(0.2, "WIN"), (-0.2, "LOSE"), (0.0, "EQUIVALENT"), (0.03, "WIN"), (-0.03, "LOSE")],
)
def test_planted_effects(plant, by, expected) -> None:
    verdict = plant({"b": plus(BASE, by), "a": BASE}, margin=0.02).primary()
    assert verdict.verdict == expected


def test_an_undecided_effect_says_how_many_pairs_it_needs(plant) -> None:
    verdict = plant({"b": plus(BASE, 0.005), "a": BASE}, margin=0.006).primary()
    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.pairs_needed is not None
    assert verdict.pairs_needed > verdict.pairs
    assert any(f"about {verdict.pairs_needed} pairs" in r for r in verdict.reasons)
    zero = plant({"b": plus(BASE, 0.0), "a": BASE}, margin=1e-6).primary()
    assert (zero.verdict, zero.pairs_needed) == ("INCONCLUSIVE", None)


def test_lower_is_better_turns_the_sign(plant) -> None:
    values = {"b": plus(BASE, 0.2), "a": BASE}
    up, down = plant(values).primary(), plant(values, higher_is_better=False).primary()
    assert (up.verdict, down.verdict) == ("WIN", "LOSE")
    assert down.differences == [-d for d in up.differences]
    assert (up.worst_control, down.worst_control) == (min(BASE), max(BASE))


@pytest.mark.parametrize("pairs", [2, 5])
def test_too_few_pairs_decide_nothing(plant, pairs) -> None:
    verdict = plant({"b": [5.0 + k for k in range(pairs)], "a": [0.0] * pairs}).primary()
    assert verdict.verdict == "INCONCLUSIVE"
    assert "at least 6 pairs" in verdict.rule
    assert verdict.pairs_needed == 6


def test_six_pairs_can_decide(plant) -> None:
    assert plant({"b": [5.0 + k for k in range(6)], "a": [0.0] * 6}).primary().verdict == "WIN"


@settings(max_examples=40, deadline=None)
@given(differences=DIFFERENCES, margin=st.integers(1, 12))
def test_swapping_the_arms_mirrors_the_verdict(plant, differences, margin) -> None:
    zeros = [0.0] * len(differences)
    d = [v / 10 for v in differences]
    one = plant({"b": d, "a": zeros}, margin=margin / 10).primary()
    two = plant({"a": zeros, "b": d}, margin=margin / 10).primary()
    assert two.verdict == MIRROR.get(one.verdict, one.verdict)
    assert (two.p_value, two.p_value_lose) == (one.p_value_lose, one.p_value)
    assert two.p_equivalent == one.p_equivalent
    assert two.mean_difference == pytest.approx(-one.mean_difference)
    assert (two.wins, two.ties, two.losses) == (one.losses, one.ties, one.wins)


@settings(max_examples=30, deadline=None)
@given(differences=DIFFERENCES, data=st.data())
def test_the_order_of_the_pairs_means_nothing(plant, differences, data) -> None:
    order = data.draw(st.permutations(range(len(differences))))
    d = [v / 10 for v in differences]
    zeros = [0.0] * len(d)
    one = plant({"b": d, "a": zeros}).primary()
    two = plant({"b": [d[i] for i in order], "a": zeros}).primary()
    assert two.verdict == one.verdict
    assert (two.p_value, two.p_equivalent) == (one.p_value, one.p_equivalent)
    assert two.pairs_needed == one.pairs_needed


@settings(max_examples=30, deadline=None)
@given(differences=DIFFERENCES, gain=st.integers(41, 90))
def test_a_gain_above_the_margin_is_never_equivalent_nor_lost(plant, differences, gain) -> None:
    d = [(v + gain) / 10 for v in differences]
    verdict = plant({"b": d, "a": [0.0] * len(d)}, margin=2.0).primary()
    assert verdict.verdict == "WIN"
    assert verdict.p_equivalent == 1.0


def test_a_verdict_is_recomputed_bit_for_bit_whatever_the_order_of_the_files(plant) -> None:
    rng = np.random.default_rng(3)
    # 20 pairs: resampled, so that the seed matters
    sweep = plant({"b": rng.normal(0.4, 1, 20).tolist(), "a": [0.0] * 20})
    backwards = type(sweep)(sweep.records[::-1], sweep.registration)
    assert sweep.primary() == backwards.primary()


def test_a_verdict_survives_json(plant) -> None:
    verdict = plant({"b": [1.5] * 8, "a": [1.0] * 8}).primary()
    assert verdict.cohen_dz == math.inf
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_the_registered_test_decides(plant) -> None:
    d = [9.0, 0.1, 0.2, -0.3, 0.4, 0.5, 0.6, 0.7]
    for test in ("sign_flip", "wilcoxon"):
        verdict = plant({"b": d, "a": [0.0] * 8}, test=test, margin=1.0).primary()
        assert verdict.p_value == one_sided(d, test=test).greater
        assert verdict.p_equivalent == equivalence_p(d, 1.0, test=test)


def test_dropping_collapsed_runs_would_give_another_verdict(plant) -> None:
    better = plus(BASE, 0.2)
    kept = plant({"b": better[3:], "a": BASE[3:]}).primary()
    ranked = plant({"b": [NAN] * 3 + better[3:], "a": BASE}).primary()
    assert kept.verdict == "WIN"
    assert ranked.verdict == "INCONCLUSIVE"
    assert (ranked.pairs, ranked.collapsed_treatment, len(ranked.differences)) == (10, 3, 10)
    assert max(ranked.differences[:3]) < min(ranked.differences[3:])
    assert any("3 of 10 runs of the treatment" in r for r in ranked.reasons)


def test_a_collapsed_control_counts_for_the_treatment(plant) -> None:
    verdict = plant({"b": plus(BASE, 0.03), "a": [NAN, *BASE[1:]]}).primary()
    assert verdict.verdict == "WIN"
    assert verdict.differences[0] == max(verdict.differences)
    assert (verdict.collapsed_control, verdict.worst_control) == (1, 0.78)


def test_more_collapses_lose_even_where_the_rest_is_better(plant) -> None:
    # five against none: McNemar 1/32
    better = [v + 5 for v in range(30)]
    verdict = plant({"b": [NAN] * 5 + better[5:], "a": [0.0] * 30}, margin=0.1).primary()
    assert verdict.p_value <= 0.025
    assert verdict.verdict == "LOSE"
    assert "collapse" in verdict.rule
    assert verdict.collapse_p == 1 / 32
    four = plant({"b": [NAN] * 4 + better[4:], "a": [0.0] * 30}, margin=0.1).primary()
    assert four.verdict == "WIN"


def test_a_collapse_never_hides_within_a_wide_margin(plant) -> None:
    values = [1.0, 1.01, 0.99, 1.0, 1.01, 0.99]
    verdict = plant({"b": [NAN] * 6, "a": values}, margin=1000.0).primary()
    assert verdict.verdict == "LOSE"
    assert verdict.p_equivalent == 1.0


def test_a_run_that_stopped_early_does_not_look_cheap(plant) -> None:
    seconds = {"b": [1.0] * 5 + [9.0] * 5, "a": [5.0] * 10}
    guard = Guardrail(metric="seconds", margin=1.0)
    verdict = plant(
        {"b": [NAN] * 5 + plus(BASE, 0.2)[5:], "a": BASE},
        guarded={"seconds": seconds},
        guardrails=[guard],
    ).primary()
    assert verdict.guardrails[0].failed
    assert verdict.guardrails[0].mean_difference < -4


def guarded(plant, worse, noise=0.5, **guard):
    """A clear gain, with a latency that is `worse` ms higher on average."""
    spread = noise * np.array([-1, 1, -0.6, 0.6, -0.3, 0.3, -0.8, 0.8, 0.1, -0.1])
    latency = {"b": (10 + worse + spread).tolist(), "a": [10.0] * 10}
    guardrail = Guardrail(**({"metric": "latency_ms", "margin": 1.0} | guard))
    return plant(
        {"b": plus(BASE, 0.2), "a": BASE},
        guarded={"latency_ms": latency},
        guardrails=[guardrail],
    ).primary()


def test_a_guardrail_that_passes(plant) -> None:
    verdict = guarded(plant, worse=0.0)
    assert verdict.verdict == "WIN"
    assert [g.metric for g in verdict.guardrails] == ["latency_ms", "collapse"]
    assert all(g.passed for g in verdict.guardrails)


def test_a_guardrail_that_fails_loses_a_clear_gain(plant) -> None:
    verdict = guarded(plant, worse=2.0)
    assert verdict.verdict == "LOSE"
    assert "latency_ms" in verdict.rule
    assert verdict.p_value <= 0.025


def test_an_undecided_guardrail_blocks_a_clear_gain(plant) -> None:
    verdict = guarded(plant, worse=0.9)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "latency_ms" in verdict.rule
    result = verdict.guardrails[0]
    assert not result.passed
    assert not result.failed
    assert verdict.pairs_needed == result.pairs_needed
    assert verdict.pairs_needed > 10
    # at or beyond the margin no number of pairs helps
    assert guarded(plant, worse=1.0).pairs_needed is None


def test_a_relative_margin_is_a_share_of_the_control(plant) -> None:
    assert guarded(plant, worse=0.9, margin=0.2, relative=True).guardrails[0].margin == 2.0
    assert guarded(plant, worse=0.9, margin=0.2, relative=True).verdict == "WIN"
    assert guarded(plant, worse=0.9, margin=0.03, relative=True).verdict == "LOSE"


def test_a_guardrail_where_higher_is_better(plant) -> None:
    assert guarded(plant, worse=2.0, higher_is_better=True).verdict == "WIN"
    assert guarded(plant, worse=-2.0, higher_is_better=True).verdict == "LOSE"


@pytest.mark.parametrize(("worse", "margin"), [(0.0, 0.0), (0.25, 0.25)])
def test_a_metric_without_noise_passes_at_its_margin(plant, worse, margin) -> None:
    assert guarded(plant, worse=worse, noise=0.0, margin=margin).verdict == "WIN"
    assert guarded(plant, worse=worse + 0.1, noise=0.0, margin=margin).verdict == "LOSE"


def test_a_named_collapse_guardrail_is_the_implicit_one(plant) -> None:
    sweep = plant(
        {"b": plus(BASE, 0.2), "a": BASE}, guardrails=[Guardrail(metric="collapse", margin=0.0)]
    )
    assert [g.metric for g in sweep.primary().guardrails] == ["collapse"]


def guard_result(*, passed: bool, failed: bool) -> GuardrailResult:
    return GuardrailResult(
        metric="m",
        margin=1.0,
        mean_difference=0.0,
        p_value=0.5,
        p_worse=0.5,
        passed=passed,
        failed=failed,
        pairs_needed=None,
    )


PASSED = guard_result(passed=True, failed=False)
FAILED = guard_result(passed=False, failed=True)
OPEN = guard_result(passed=False, failed=False)


@pytest.mark.parametrize(
    ("pairs", "p", "guards", "expected"),
    [
        (16, (0.025, 0.98, 0.9), [PASSED], "WIN"),
        (16, (0.0251, 0.98, 0.9), [PASSED], "INCONCLUSIVE"),
        (16, (0.98, 0.025, 0.9), [PASSED], "LOSE"),
        (16, (0.98, 0.0251, 0.9), [PASSED], "INCONCLUSIVE"),
        (16, (0.5, 0.5, 0.05), [PASSED], "EQUIVALENT"),
        (16, (0.5, 0.5, 0.051), [PASSED], "INCONCLUSIVE"),
        (16, (0.01, 0.98, 0.01), [PASSED], "WIN"),
        (16, (0.98, 0.01, 0.01), [PASSED], "LOSE"),
        (16, (0.01, 0.98, 0.01), [PASSED, OPEN], "INCONCLUSIVE"),
        (16, (0.01, 0.98, 0.01), [OPEN, FAILED], "LOSE"),
        (16, (0.5, 0.5, 0.01), [FAILED], "LOSE"),
        (16, (0.5, 0.5, 0.01), [OPEN], "EQUIVALENT"),
        (16, (NAN, NAN, NAN), [PASSED], "INCONCLUSIVE"),
        (5, (0.0, 1.0, 0.0), [PASSED], "INCONCLUSIVE"),
        (5, (1.0, 0.0, 0.0), [FAILED], "INCONCLUSIVE"),
        (6, (0.016, 1.0, 1.0), [], "WIN"),
    ],
)
def test_the_rule(pairs, p, guards, expected) -> None:
    assert decide(pairs, PValues(*p), guards)[0] == expected


def test_secondary_comparisons_are_holm_corrected(plant) -> None:
    noise = [1.0, -0.4, 0.9, 0.5, -0.3, 1.2, 0.7, 0.8, 0.6, -0.2]
    slight = [0.05 * e for e in noise]
    arms = {"b": plus(BASE, 0.2), "a": BASE} | {
        f"s{k}": [v + e for v, e in zip(BASE, slight, strict=True)] for k in range(4)
    }
    secondary = [(f"s{k}", "a") for k in range(4)]
    alone = plant({"s0": arms["s0"], "a": BASE}).primary()
    assert alone.verdict == "WIN"
    verdicts = judge_all(*vars(plant(arms, secondary=secondary)).values())
    assert [v.treatment for v in verdicts] == ["b", "s0", "s1", "s2", "s3"]
    assert verdicts[0].p_holm is None
    for verdict in verdicts[1:]:
        assert verdict.p_value == pytest.approx(alone.p_value)
        assert verdict.p_holm == pytest.approx(4 * alone.p_value)
        assert verdict.verdict != "WIN"
        assert any("Holm" in r for r in verdict.reasons)


def test_holm_guards_both_directions(plant) -> None:
    arms = {"b": plus(BASE, 0.2), "a": BASE, "worse": plus(BASE, -0.2), "same": plus(BASE, 0)}
    sweep = plant(arms, secondary=[("worse", "a"), ("same", "a")])
    _, worse, same = judge_all(sweep.records, sweep.registration)
    assert (worse.verdict, same.verdict) == ("LOSE", "EQUIVALENT")
    assert worse.p_holm_lose == pytest.approx(2 * worse.p_value_lose)
    assert same.p_holm_equivalent == pytest.approx(2 * same.p_equivalent)


def test_pairs_needed_allows_for_the_size_of_the_family(plant) -> None:
    slight = plus(BASE, 0.005)
    names = ["c0", "c1", "c2", "c3"]
    arms = {"b": slight, "a": BASE} | dict.fromkeys(names, slight)
    sweep = plant(arms, secondary=[(name, "a") for name in names], margin=0.001)
    primary, first, *_ = judge_all(sweep.records, sweep.registration)
    assert (primary.verdict, first.verdict) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert primary.pairs_needed == pairs_for_effect(primary.cohen_dz, alpha=0.025)
    assert first.pairs_needed == pairs_for_effect(primary.cohen_dz, alpha=0.025 / 4)
    assert first.pairs_needed > primary.pairs_needed


def test_an_unhealthy_member_does_not_shrink_the_family(plant) -> None:
    arms = {"b": plus(BASE, 0.2), "a": BASE, "c": plus(BASE, 0.2), "d": plus(BASE, 0.2)}
    sweep = plant(arms, secondary=[("c", "a"), ("d", "a")]).without("d-000")
    primary, healthy, broken = judge_all(sweep.records, sweep.registration)
    assert (primary.verdict, healthy.verdict, broken.verdict) == ("WIN", "WIN", "UNHEALTHY")
    assert healthy.p_holm == pytest.approx(2 * healthy.p_value)
    assert broken.p_holm is None


def test_a_secondary_comparison_is_not_judged_uncorrected(plant) -> None:
    sweep = plant({"b": BASE, "a": BASE, "c": BASE}, secondary=[("c", "a")])
    question = sweep.registration.question
    with pytest.raises(ValueError, match="p_holm must be given for the secondary"):
        judge(sweep.records, sweep.registration, question.comparisons[1])
    assert judge(sweep.records, sweep.registration, question.comparisons[0]) == sweep.primary()


def test_a_verdict_names_the_rule_the_data_and_the_commit(plant) -> None:
    sweep = plant({"b": plus(BASE, 0.2), "a": BASE})
    verdict = sweep.primary()
    assert verdict.rule == "The treatment is better (p <= 0.025) and every guardrail passed."
    assert verdict.commit == "abc123"
    assert verdict.registration_hash == sweep.registration.registration_hash
    assert verdict.interval_low < verdict.mean_difference < verdict.interval_high
    assert (verdict.wins, verdict.losses, verdict.win_probability) == (10, 0, 1.0)


def test_summaries_of_all_arms(plant) -> None:
    sweep = plant({"b": [NAN, 3.0, 5.0], "a": [1.0, 2.0, 3.0]}, margin=1.0)
    summary = summarise(sweep.records, sweep.registration)
    # the collapsed run is ranked at 1 - (5 - 1) - 1
    assert summary["b"].mean == pytest.approx((-4 + 3 + 5) / 3)
    assert (summary["b"].runs, summary["b"].collapsed, summary["b"].worst) == (3, 1, 3.0)
    assert (summary["a"].mean, summary["a"].sd, summary["a"].worst) == (2.0, 1.0, 1.0)
    assert (summary["a"].parameters_mean, summary["a"].steps) == (100.0, 50.0)
    assert (summary["a"].train_seconds_mean, summary["a"].train_flops_mean) == (2.0, 1e6)
    mean = plant({"b": [NAN, 3.0, 5.0], "a": [1.0, 2.0, 3.0]}, margin=1.0).primary()
    assert summary["b"].mean - summary["a"].mean == pytest.approx(mean.mean_difference)


def test_summaries_of_data_that_cannot_be_judged(plant) -> None:
    sweep = plant({"b": [NAN] * 2, "a": [NAN] * 2})
    summary = summarise(sweep.records, sweep.registration)
    assert (summary["b"].mean, summary["b"].worst, summary["b"].collapsed) == (None, None, 2)
    empty = summarise([], sweep.registration)
    assert (empty["a"].runs, empty["a"].mean, empty["a"].steps) == (0, None, None)
    short = sweep.change("a-000", metrics={"steps": 5.0})
    assert summarise(short.records, short.registration)["a"].parameters_mean is None


SIXTEEN = [v + 0.001 * k for k, v in enumerate(BASE + BASE[:6])]


def shifted(by, values=SIXTEEN):
    return [v + by + 0.3 * e for v, e in zip(values, NOISE + NOISE[:6], strict=True)]


def test_the_first_look_that_decides_is_the_last_one(plant) -> None:
    sweep = plant({"b": shifted(0.2), "a": SIXTEEN, "c": shifted(-0.2)}, looks=(8, 12, 16),
                  secondary=[("c", "a")])  # fmt: skip
    win, secondary = judge_all(sweep.records, sweep.registration)
    assert (win.verdict, win.pairs, win.look, win.look_share) == ("WIN", 8, 1, 0.25)
    assert (secondary.verdict, secondary.pairs, secondary.look) == ("LOSE", 8, 1)
    assert secondary.p_holm_lose == pytest.approx(4 * secondary.p_value_lose)
    # what was not run after it is not missing, and what was run is not looked at
    early = [r for r in sweep.records if r.pair < 8]
    assert judge_all(early, sweep.registration) == [win, secondary]
    # the same data in a sweep without looks, and all of them at a last look
    plain = plant({"b": shifted(0.2), "a": SIXTEEN}).primary()
    assert (plain.verdict, plain.pairs, plain.look) == ("WIN", 16, None)
    last = judge(sweep.records, sweep.registration, sweep.registration.question.comparisons[0])
    assert (last.pairs, last.look, last.p_value) == (16, 3, plain.p_value)


def test_a_look_may_spend_its_share_alone(plant) -> None:
    """p = 3 / 256 at the first look: enough for 0.025, not for a quarter of it."""
    d = [1.0] * 7 + [-0.9] + [0.01, -0.01] * 4
    assert plant({"b": d[:8], "a": [0.0] * 8}, margin=1e-6).primary().verdict == "WIN"
    sweep = plant({"b": d, "a": [0.0] * 16}, margin=1e-6, looks=(8, 16))
    verdict = sweep.primary()
    assert (verdict.look, verdict.pairs) == (2, 16)


def test_an_e_process_may_decide_after_any_pair(plant) -> None:
    noisy = [0.2 + 0.01 * (i % 3) for i in range(16)]
    sweep = plant({"b": noisy, "a": [0.0] * 16}, margin=0.01, test="e_process")
    win = sweep.primary()
    # the first pair only sets the scale, and each bet at most doubles
    assert (win.verdict, win.test, win.pairs, win.look) == ("WIN", "e_process", 8, 3)
    assert win.p_value < 0.025 < 1 == win.p_value_lose
    # what still ran then is not looked at, and no pair of the first ones may be missing
    early = [r for r in sweep.records if r.pair < 8]
    assert judge_all(early, sweep.registration)[0] == win
    assert sweep.without("b-003").primary().verdict == "UNHEALTHY"
    lose = plant({"b": [-x for x in noisy], "a": [0.0] * 16}, margin=0.01, test="e_process")
    assert (lose.primary().verdict, lose.primary().pairs) == ("LOSE", 8)
    alike = plant({"b": [0.001, -0.001] * 8, "a": [0.0] * 16}, margin=0.01, test="e_process")
    assert (alike.primary().verdict, alike.primary().pairs) == ("EQUIVALENT", 7)


def test_an_e_process_reads_the_differences_in_their_order(plant) -> None:
    """It bets on the size of what came before: other orders give other evidence."""
    d = [3.0, 0.1, 0.2, 0.1, -0.1, 0.3, 0.1, 0.2]
    forth, back = (
        plant({"b": list(v), "a": [0.0] * 8}, margin=1e-6, test="e_process").primary()
        for v in (d, d[::-1])
    )
    assert forth.p_value != back.p_value


@pytest.mark.slow
def test_an_e_process_that_is_looked_at_always_seldom_errs_also_with_collapses(plant) -> None:
    rng, wins, losses = np.random.default_rng(5), 0, 0
    for _ in range(600):
        b, a = (
            [math.nan if rng.random() < 0.1 else float(x) for x in rng.normal(size=24)]
            for _ in range(2)
        )
        verdict = plant({"b": b, "a": a}, margin=1e-6, test="e_process").primary().verdict
        wins, losses = wins + (verdict == "WIN"), losses + (verdict == "LOSE")
    # 600 * 0.025 = 15, and its 99 % binomial band; a LOSE may come from the collapses, too
    assert wins <= 26
    assert losses <= 600 * 0.075 + 17


def test_a_look_is_unhealthy_where_its_own_pairs_are(plant) -> None:
    sweep = plant({"b": shifted(0.2), "a": SIXTEEN}, looks=(8, 16))
    assert sweep.without("b-009").primary().verdict == "WIN"
    broken = sweep.without("b-007").primary()
    assert (broken.verdict, broken.missing, broken.look) == ("UNHEALTHY", 1, 1)


def test_a_secondary_comparison_may_have_a_metric_of_its_own(plant) -> None:
    times = {"b": [2.0 + 0.01 * k for k in range(10)], "a": [1.0 + 0.01 * k for k in range(10)]}
    seconds = {"metric": "seconds", "higher_is_better": False, "margin": 0.1}
    own = Secondary(treatment="b", control="a", **seconds)
    sweep = plant({"b": plus(BASE, 0.2), "a": BASE}, guarded={"seconds": times}, secondary=[own])
    win, slower = judge_all(sweep.records, sweep.registration)
    assert (win.verdict, win.metric) == ("WIN", "score")
    assert (slower.verdict, slower.metric, slower.margin) == ("LOSE", "seconds", 0.1)
    assert slower.mean_difference == pytest.approx(-1.0)
    assert not slower.higher_is_better
    lost = sweep.change("b-003", metrics={"score": 1.0})
    win, unhealthy = judge_all(lost.records, sweep.registration)
    assert (win.verdict, unhealthy.verdict) == ("WIN", "UNHEALTHY")


def test_questions_and_verdicts_without_looks_are_written_as_they_were_before_there_were_any(
    plant,
) -> None:
    """Or the hashes of stored registrations would not be theirs any more."""
    sweep = plant({"b": BASE, "a": BASE, "c": BASE}, secondary=[("c", "a")])
    question = sweep.registration.question.model_dump(mode="json")
    assert set(question) == {
        "treatment", "control", "metric", "higher_is_better", "margin", "test", "guardrails",
        "secondary",
    }  # fmt: skip
    assert question["secondary"] == [{"treatment": "c", "control": "a"}]
    assert not {"look", "look_share"} & set(sweep.primary().model_dump())
