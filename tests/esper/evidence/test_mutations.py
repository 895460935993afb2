"""Wrong procedures are caught: each fails the very band that the right one passes.

A band is the 99 % interval of the binomial count of false winners at the stated rate. Where the
truth is that the treatment is not better, but not equal either, only its upper end is asked for.
"""

import numpy as np
import pytest
from scipy import stats

from esper.evidence import compare, paired, verdict
from esper.evidence.paired import rank_collapsed
from esper.evidence.planning import sign_flips
from esper.evidence.sequential import Look, e_process, plan_looks

ALPHA = 0.025
QUICK_AND_SLOW = pytest.mark.parametrize(
    "repetitions", [2_000, pytest.param(10_000, marks=pytest.mark.slow)]
)


class Band:
    """The 99 % binomial band of a count."""

    def __init__(self, repetitions: int, rate: float = ALPHA) -> None:
        self.repetitions = repetitions
        low, high = stats.binom.ppf([0.005, 0.995], repetitions, rate)
        self.low, self.high = int(low), int(high)

    def says(self, found: np.ndarray) -> str:
        count = int(np.count_nonzero(found))
        print(f"{count} of {self.repetitions}; band {self.low} to {self.high}")
        return "too few" if count < self.low else "too many" if count > self.high else "in"


def exact_rate(pairs: int, alpha: float = ALPHA) -> float:
    """What the exact test rejects at: its p-values are multiples of 2^-pairs."""
    return np.floor(alpha * 2**pairs) / 2**pairs


@QUICK_AND_SLOW
@pytest.mark.parametrize("pairs", [8, 10, 16])
def test_the_exact_test_rejects_equal_arms_at_its_rate(pairs, repetitions):
    d = np.random.default_rng([1, pairs]).normal(size=(repetitions, pairs))
    band = Band(repetitions, exact_rate(pairs))
    better, worse = sign_flips(d)
    assert band.says(better <= ALPHA) == "in"
    assert band.says(worse <= ALPHA) == "in"


@QUICK_AND_SLOW
def test_pooling_requests_is_caught(repetitions):
    rng, blocks, requests = np.random.default_rng(2), 12, 50
    # a process is slower or faster than another by 3 %, its requests differ by 5 %
    process = rng.normal(0, 0.03, (repetitions, 2, blocks, 1))
    latency = np.exp(process + rng.normal(0, 0.05, (repetitions, 2, blocks, requests)))
    band = Band(repetitions, exact_rate(blocks))
    ratios = np.log(latency[:, 0].mean(axis=-1) / latency[:, 1].mean(axis=-1))
    assert band.says(sign_flips(ratios)[0] <= ALPHA) == "in"
    pooled = latency.reshape(repetitions, 2, -1)
    welch = stats.ttest_ind(
        pooled[:, 0], pooled[:, 1], axis=1, equal_var=False, alternative="greater"
    )
    assert band.says(welch.pvalue <= ALPHA) == "too many"


def collapsing(rng: np.random.Generator, repetitions: int, pairs: int) -> np.ndarray:
    """`[repetitions, 2, pairs]`: equal arms, but the treatment's bad runs end in NaN."""
    values = rng.normal(size=(repetitions, 2, pairs))
    treatment = values[:, 0]
    treatment[treatment < stats.norm.ppf(0.3)] = np.nan
    return values


@QUICK_AND_SLOW
def test_dropping_collapsed_runs_is_caught(repetitions):
    values = collapsing(np.random.default_rng(3), repetitions, 16)
    ranked = [
        rank_collapsed({"t": t, "c": c}, higher_is_better=True, margin=0.1) for t, c in values
    ]
    right = np.array([arms["t"] - arms["c"] for arms in ranked])
    band = Band(repetitions)
    assert band.says(sign_flips(right)[0] <= ALPHA) != "too many"
    d = values[:, 0] - values[:, 1]
    # a difference of 0 adds nothing to any sum: the pair is dropped
    dropped = sign_flips(np.nan_to_num(d))[0]
    assert band.says(dropped <= ALPHA) == "too many"


@QUICK_AND_SLOW
def test_an_unpaired_test_on_paired_data_is_caught(repetitions):
    rng, pairs = np.random.default_rng(4), 16
    seeds = rng.normal(0, 2, (repetitions, 1, pairs))
    values = seeds + rng.normal(size=(repetitions, 2, pairs))
    unpaired = stats.ttest_ind(values[:, 0], values[:, 1], axis=1, alternative="greater")
    band = Band(repetitions, exact_rate(pairs))
    assert band.says(sign_flips(values[:, 0] - values[:, 1])[0] <= ALPHA) == "in"
    # it sees the seeds' noise, and so finds nothing, also where there is something
    assert band.says(unpaired.pvalue <= ALPHA) == "too few"
    values[:, 0] += np.sqrt(2)
    unpaired = stats.ttest_ind(values[:, 0], values[:, 1], axis=1, alternative="greater")
    assert np.mean(sign_flips(values[:, 0] - values[:, 1])[0] <= ALPHA) >= 0.9
    assert np.mean(unpaired.pvalue <= ALPHA) < 0.5


@QUICK_AND_SLOW
def test_uncorrected_peeking_is_caught(repetitions):
    d = np.random.default_rng(5).normal(size=(repetitions, 30))
    alpha, looks = 0.05, range(5, 31)
    # an e-process stops rather less often than its bound: only too many would be wrong
    band = Band(repetitions, alpha)
    e = np.array([e_process(row).max() for row in d]) >= -np.log(alpha)
    assert band.says(e) != "too many"
    assert e.mean() <= 0.056
    peeks = [
        stats.ttest_1samp(d[:, :n], 0, axis=1, alternative="two-sided").pvalue <= alpha
        for n in looks
    ]
    naive = np.any(peeks, axis=0)
    assert band.says(naive) == "too many"
    assert naive.mean() > 0.2
    # the single look that was planned is right
    assert band.says(peeks[-1]) == "in"


LOOKS = (12, 20, 30)


def stopping(d: np.ndarray, looks: list[Look]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which experiments end with "better" or "worse", and after how many pairs they stop."""
    better, worse = np.zeros(len(d), dtype=bool), np.zeros(len(d), dtype=bool)
    pairs = np.full(len(d), looks[-1].pairs)
    for look in looks:
        going = ~(better | worse)
        p = sign_flips(d[going, : look.pairs])
        better[going], worse[going] = (side <= ALPHA * look.share for side in p)
        pairs[going & (better | worse)] = look.pairs
    return better, worse, pairs


@QUICK_AND_SLOW
def test_uncorrected_looks_are_caught(repetitions):
    d = np.random.default_rng(9).normal(size=(repetitions, LOOKS[-1]))
    looks = plan_looks(LOOKS, LOOKS[-1])
    band, both = Band(repetitions), Band(repetitions, 2 * ALPHA)
    better, worse, _ = stopping(d, looks)
    # the looks are not independent, so that the shares' sum is a bound
    for found in (better, worse):
        assert band.says(found) != "too many"
    assert both.says(better | worse) != "too many"
    assert (better | worse).mean() <= 0.056
    better, worse, _ = stopping(d, [look._replace(share=1.0) for look in looks])
    assert band.says(better) == "too many"
    assert both.says(better | worse) == "too many"


def test_planned_looks_find_one_standard_deviation_with_half_of_the_pairs():
    d = np.random.default_rng(10).normal(1, 1, size=(1_000, LOOKS[-1]))
    better, _, pairs = stopping(d, plan_looks(LOOKS, LOOKS[-1]))
    print(f"{better.mean():.1%} after {pairs.mean():.1f} pairs")
    assert better.mean() >= 0.99
    assert pairs.mean() <= 17


def test_the_real_judge_stops_where_the_simulated_rule_does(plant):
    d = np.random.default_rng(11).normal(0.6, 1, size=(12, 16))
    better, worse, pairs = stopping(d, plan_looks((8, 12, 16), 16))
    assert {8, 12, 16} == set(pairs.tolist())
    for row, up, down, stop in zip(d, better, worse, pairs, strict=True):
        sweep = plant({"t": row.tolist(), "c": [0.0] * 16}, looks=(8, 12, 16), margin=1e-6)
        said = sweep.primary()
        assert said.pairs == stop
        assert said.verdict == ("WIN" if up else "LOSE" if down else "INCONCLUSIVE")


@QUICK_AND_SLOW
@pytest.mark.parametrize("metrics", [4, 40])
def test_alpha_for_each_metric_is_caught(metrics, repetitions):
    rng, pairs = np.random.default_rng(6), 16
    d = rng.normal(size=(repetitions * metrics, pairs))
    p = sign_flips(d)[0].reshape(repetitions, metrics)
    band = Band(repetitions)
    # below alpha, because the exact test's p-values are discrete and the union bound is one
    candidates = np.flatnonzero(p.min(axis=1) <= ALPHA)
    right = [min(paired.holm(p[i].tolist())) <= ALPHA for i in candidates]
    assert band.says(np.array(right)) != "too many"
    assert any(right)
    assert band.says(p.min(axis=1) <= ALPHA) == "too many"


def winners(sweeps: list, place: int) -> np.ndarray:
    """Whether each planted sweep has a WIN among its comparisons from `place` on."""
    return np.array(
        [
            any(v.verdict == "WIN" for v in verdict.judge_all(s.records, s.registration)[place:])
            for s in sweeps
        ]
    )


def drop_collapsed(values_by_arm: dict, **_: object) -> dict:
    """Mutant of `rank_collapsed`: pairs with a collapsed run do not count."""
    alive = np.all([np.isfinite(v) for v in values_by_arm.values()], axis=0)
    return {arm: np.where(alive, v, 0.0) for arm, v in values_by_arm.items()}


def test_the_real_judge_without_ranking_is_caught(plant, monkeypatch):
    sweeps = [
        plant({"t": t.tolist(), "c": c.tolist()})
        for t, c in collapsing(np.random.default_rng(7), 100, 12)
    ]
    band = Band(len(sweeps))
    assert band.says(winners(sweeps, 0)) != "too many"
    monkeypatch.setattr(compare, "rank_collapsed", drop_collapsed)
    assert band.says(winners(sweeps, 0)) == "too many"


def test_the_real_judge_without_holm_is_caught(plant, monkeypatch):
    rng, names = np.random.default_rng(8), [f"v{k}" for k in range(12)]
    sweeps = [
        plant(
            {arm: rng.normal(size=10).tolist() for arm in ("t", "c", *names)},
            secondary=[(name, "c") for name in names],
        )
        for _ in range(40)
    ]
    band = Band(len(sweeps))
    assert band.says(winners(sweeps, 1)) != "too many"
    monkeypatch.setattr(verdict, "holm", lambda p_values: list(p_values))
    assert band.says(winners(sweeps, 1)) == "too many"
