"""How often the whole rule is wrong, and how often it finds what is there.

Thousands of experiments need the fast exact test of `planning`, which has tests of its own. It is
first shown to give the verdicts that users get; the rule that is simulated is the real `decide`.
"""

from collections import Counter

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from esper.config.sweep import Guardrail
from esper.evidence import planning
from esper.evidence.compare import ALPHA_GUARDRAIL
from esper.evidence.paired import holm
from esper.evidence.planning import sign_flips

REPETITIONS = 2_000
NUM_GUARDRAILS = 3
QUICK_AND_SLOW = pytest.mark.parametrize(
    "repetitions", [REPETITIONS, pytest.param(10_000, marks=pytest.mark.slow)]
)
NOISES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: rng.exponential(size=size),
    "lognormal": lambda rng, size: rng.lognormal(size=size),
}


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
    return planning.verdicts(d, guards, 1.0, [1.0] * NUM_GUARDRAILS)


def most(rate: float, repetitions: int = REPETITIONS) -> int:
    """Upper end of the 99 % band of a count with this rate."""
    return int(stats.binom.ppf(0.995, repetitions, rate))


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


@QUICK_AND_SLOW
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("pairs", [8, 10, 16])
def test_equal_arms_seldom_win(pairs, noise, repetitions) -> None:
    rng = np.random.default_rng([pairs, list(NOISES).index(noise)])
    d, guards = draw(rng, pairs, repetitions=repetitions, noise=noise)
    counts = verdicts(d, guards)
    print(f"A/A {noise} {pairs} pairs: {dict(counts)} of {repetitions}")
    # multiples of 2^-pairs up to 0.025, times the chance that three guardrails pass by Student's t
    passing = TTestPower().power(1.0, pairs, ALPHA_GUARDRAIL, alternative="larger")
    rate = np.floor(0.025 * 2**pairs) / 2**pairs * passing**NUM_GUARDRAILS
    # with heavy tails the guardrails pass less or more often, but the whole rule stays below
    assert counts["WIN"] <= most(rate if noise == "normal" else 0.025, repetitions)
    assert counts["WIN"] >= stats.binom.ppf(
        0.005, repetitions, rate if noise == "normal" else 0.005
    )
    assert counts["WIN"] / repetitions <= 0.029
    # the band of nine checks together
    assert counts["LOSE"] <= stats.binom.ppf(1 - 0.005 / 9, repetitions, 0.025)


@pytest.mark.parametrize(("pairs", "power"), [(8, 0.36), (10, 0.58), (16, 0.91)])
def test_a_gain_of_one_sd_is_found(pairs, power) -> None:
    repetitions = 2_000
    rng = np.random.default_rng(100 + pairs)
    d, guards = draw(rng, pairs, repetitions=repetitions, gain=1.0)
    wins = verdicts(d, guards)["WIN"]
    print(f"gain of 1 SD, {pairs} pairs: {wins} of {repetitions} WIN")
    assert wins >= stats.binom.ppf(0.005, repetitions, power)
    assert pairs < 16 or wins >= 0.9 * repetitions


def test_a_difference_at_the_margin_is_seldom_called_equivalent() -> None:
    rng = np.random.default_rng(11)
    d, _ = draw(rng, 10, repetitions=REPETITIONS, gain=1.0)
    p = np.maximum(sign_flips(d + 1)[0], sign_flips(d - 1)[1])
    false = int((p <= 0.05).sum())
    print(f"at the margin: {false} of {REPETITIONS} EQUIVALENT")
    assert 0 < false <= most(0.05)


def test_a_guardrail_at_its_margin_seldom_passes() -> None:
    rng = np.random.default_rng(12)
    d, _ = draw(rng, 10, repetitions=REPETITIONS, gain=-1.0)
    passed = int((sign_flips(d + 1)[0] <= ALPHA_GUARDRAIL).sum())
    assert 0 < passed <= most(0.05)


def test_four_secondary_comparisons_seldom_have_one_false_win() -> None:
    rng = np.random.default_rng(13)
    arms = rng.normal(size=(REPETITIONS, 5, 10))
    # all against one control, so that the four p-values depend on one another
    d = arms[:, 1:] - arms[:, :1]
    better = sign_flips(d.reshape(-1, 10))[0].reshape(REPETITIONS, 4)
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
