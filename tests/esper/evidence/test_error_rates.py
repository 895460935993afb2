"""How often the whole rule is wrong, and how often it finds what is there.

Thousands of experiments need a fast exact test: `exact` enumerates all sign patterns of many
experiments at once. It is first shown to give the p-values and verdicts that users get, and the
rule that is then simulated is the real `decide`.
"""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from esper.config.sweep import Guardrail
from esper.evidence.compare import ALPHA_GUARDRAIL, GuardrailResult, PValues
from esper.evidence.paired import holm, one_sided
from esper.evidence.verdict import decide

REPETITIONS = 2_000
NUM_GUARDRAILS = 3
NOISES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size),
    "lognormal": lambda rng, size: rng.lognormal(size=size),
}


def exact(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both one-sided p of the exact sign-flip test for each row of `[experiments, pairs]`."""
    n = d.shape[1]
    bits = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1
    # the other half of the patterns, with the last sign turned, has the negated sums
    signs = (1 - 2 * bits).astype(np.float32)
    greater, less = np.empty(len(d)), np.empty(len(d))
    for at in range(0, len(d), 64):
        block = d[at : at + 64].astype(np.float32)
        sums, observed = block @ signs.T, (block @ signs[0])[:, None]
        low, high = observed - 1e-5, observed + 1e-5
        greater[at : at + 64] = ((sums >= low).sum(1) + (sums <= -low).sum(1)) / 2**n
        less[at : at + 64] = ((sums <= high).sum(1) + (sums >= -high).sum(1)) / 2**n
    return greater, less


def draw(
    rng: np.random.Generator, pairs: int, *, repetitions: int, noise: str = "normal", gain=0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Differences of the metric and of the guardrails, with a standard deviation of 1.

    Both arms have the same noise, so that under A/A the two are exchangeable.
    """
    size = (repetitions, 1 + NUM_GUARDRAILS, pairs)
    d = NOISES[noise](rng, size) - NOISES[noise](rng, size)
    d /= {"normal": 2, "skewed": 2, "lognormal": 2 * np.e * (np.e - 1)}[noise] ** 0.5
    return d[:, 0] + gain, d[:, 1:]


def verdicts(d: np.ndarray, guards: np.ndarray) -> Counter:
    """The real rule on every experiment, with guardrail and equivalence margins of 1 SD."""
    better, worse = exact(d)
    equivalent = np.maximum(exact(d + 1)[0], exact(d - 1)[1])
    fine, bad = (p.reshape(guards.shape[:2]) for p in exact(guards.reshape(-1, d.shape[1]) + 1))
    counts: Counter = Counter()
    for i in range(len(d)):
        results = [
            GuardrailResult(
                metric=f"guard{k}",
                margin=1.0,
                mean_difference=0.0,
                p_value=fine[i, k],
                p_worse=bad[i, k],
                passed=bool(fine[i, k] <= ALPHA_GUARDRAIL),
                failed=bool(bad[i, k] <= ALPHA_GUARDRAIL),
                pairs_needed=None,
            )
            for k in range(NUM_GUARDRAILS)
        ]
        counts[decide(d.shape[1], PValues(better[i], worse[i], equivalent[i]), results)[0]] += 1
    return counts


def most(rate: float, repetitions: int = REPETITIONS) -> int:
    """Upper end of the 99 % band of a count with this rate."""
    return int(stats.binom.ppf(0.995, repetitions, rate))


@pytest.mark.parametrize("pairs", [6, 8, 10, 16])
def test_the_fast_test_gives_the_p_that_users_get(pairs) -> None:
    d = np.random.default_rng(pairs).normal(0.4, 1, (6, pairs))
    expected = np.array([one_sided(row) for row in d])
    np.testing.assert_allclose(np.stack(exact(d), axis=1), expected, atol=2 / 2**pairs)


def judged(plant, d: np.ndarray, guards: np.ndarray) -> Counter:
    """The verdict of each experiment the way users get it, from records."""
    counts: Counter = Counter()
    names = [f"guard{k}" for k in range(NUM_GUARDRAILS)]
    zeros = [0.0] * d.shape[1]
    rails = [Guardrail(metric=m, margin=1.0, higher_is_better=True) for m in names]
    for row, others in zip(d, guards, strict=True):
        metrics = {
            m: {"b": values.tolist(), "a": zeros} for m, values in zip(names, others, strict=True)
        }
        sweep = plant(
            {"b": row.tolist(), "a": zeros}, guarded=metrics, guardrails=rails, margin=1.0
        )
        counts[sweep.primary().verdict] += 1
    return counts


def test_the_simulated_verdicts_are_those_that_users_get(plant) -> None:
    rng = np.random.default_rng(7)
    seen = set()
    for gain in (-2.0, 0.0, 1.0):
        d, guards = draw(rng, 8, repetitions=25, gain=gain)
        for i in range(len(d)):
            row, others = d[i : i + 1], guards[i : i + 1]
            assert judged(plant, row, others) == verdicts(row, others)
            seen |= set(verdicts(row, others))
    assert seen == {"WIN", "LOSE", "EQUIVALENT", "INCONCLUSIVE"}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("pairs", "rate"), [(8, 0.015), (10, 0.021), (16, 0.018)])
def test_equal_arms_seldom_win(pairs, rate, noise) -> None:
    rng = np.random.default_rng([pairs, list(NOISES).index(noise)])
    d, guards = draw(rng, pairs, repetitions=REPETITIONS, noise=noise)
    counts = verdicts(d, guards)
    print(f"A/A {noise} {pairs} pairs: {dict(counts)} of {REPETITIONS}")
    # with heavy tails the guardrails pass less or more often, but the whole rule stays below
    assert counts["WIN"] <= most(rate if noise == "normal" else 0.025)
    assert counts["WIN"] / REPETITIONS <= 0.029
    assert counts["WIN"] > 0
    assert counts["LOSE"] <= most(0.025)


@pytest.mark.parametrize(("pairs", "power"), [(8, 0.36), (10, 0.58), (16, 0.91)])
def test_a_gain_of_one_sd_is_found(pairs, power) -> None:
    repetitions = 1_000
    rng = np.random.default_rng(100 + pairs)
    d, guards = draw(rng, pairs, repetitions=repetitions, gain=1.0)
    wins = verdicts(d, guards)["WIN"]
    print(f"gain of 1 SD, {pairs} pairs: {wins} of {repetitions} WIN")
    assert wins >= stats.binom.ppf(0.005, repetitions, power)


def test_a_difference_at_the_margin_is_seldom_called_equivalent() -> None:
    rng = np.random.default_rng(11)
    d, _ = draw(rng, 10, repetitions=REPETITIONS, gain=1.0)
    p = np.maximum(exact(d + 1)[0], exact(d - 1)[1])
    false = int((p <= 0.05).sum())
    print(f"at the margin: {false} of {REPETITIONS} EQUIVALENT")
    assert 0 < false <= most(0.05)


def test_a_guardrail_at_its_margin_seldom_passes() -> None:
    rng = np.random.default_rng(12)
    d, _ = draw(rng, 10, repetitions=REPETITIONS, gain=-1.0)
    passed = int((exact(d + 1)[0] <= ALPHA_GUARDRAIL).sum())
    assert 0 < passed <= most(0.05)


def test_four_secondary_comparisons_seldom_have_one_false_win() -> None:
    rng = np.random.default_rng(13)
    arms = rng.normal(size=(REPETITIONS, 5, 10))
    # all against one control, so that the four p-values depend on one another
    d = arms[:, 1:] - arms[:, :1]
    better = exact(d.reshape(-1, 10))[0].reshape(REPETITIONS, 4)
    least = better.min(axis=1)
    # Holm's first step is Bonferroni's; shown on some, since each call collects all garbage
    for k in np.argsort(least)[::400]:
        assert min(holm(better[k].tolist())) == pytest.approx(min(4 * least[k], 1.0))
    corrected, naive = int((4 * least <= 0.025).sum()), int((least <= 0.025).sum())
    print(f"four comparisons: {corrected} false with Holm, {naive} without, of {REPETITIONS}")
    assert corrected <= most(0.025)
    assert naive > most(0.025)


@pytest.mark.slow
def test_equal_arms_seldom_win_from_records_to_verdict(plant) -> None:
    d, guards = draw(np.random.default_rng(14), 8, repetitions=REPETITIONS)
    counts = judged(plant, d, guards)
    print(f"A/A through judge_all, 8 pairs: {dict(counts)} of {REPETITIONS}")
    assert 0 < counts["WIN"] <= most(0.015)
    assert counts == verdicts(d, guards)
