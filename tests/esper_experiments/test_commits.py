"""Two commits side by side: each runs its own code, and what became slower is found, noise not."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "experiments" / "benchmarks"
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")


def script(name):
    """A benchmark script, which lies in no package."""
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(HERE))


bench, commits = script("bench_commits"), script("commits")


def blocks(rng, number, slower, *, noise=0.02, reference=0.0):
    """Blocks of one latency, a throughput, and the workload that never changes."""

    def arm(by):
        ms = math.exp(rng.normal(by, noise))
        return {
            "forward_b1_p50_ms": ms,
            "forward_b1_throughput": 1 / math.exp(rng.normal(by, noise)),
            "step_b1_p50_ms": math.exp(rng.normal(0, noise)),
            "active_seeds": 4.0,
            "reference_ms": math.exp(rng.normal(reference if by else 0, noise)),
        }

    return [{"old": arm(0.0), "new": arm(slower)} for _ in range(number)]


def test_what_is_slower_beyond_its_margin_is_found_and_nothing_else():
    rows = bench.judged(blocks(np.random.default_rng(0), 20, 0.08))
    assert {r.metric: r.outcome for r in rows} == {
        "forward_b1_p50_ms": "WORSE",
        "forward_b1_throughput": "WORSE",
        "step_b1_p50_ms": "NOT WORSE",
    }
    assert rows[0].change == pytest.approx(math.expm1(0.08), abs=0.03)


def test_no_difference_is_rarely_called_worse_and_noise_is_not_called_a_pass():
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(40):
        alarms += any(r.outcome == "WORSE" for r in bench.judged(blocks(rng, 8, 0.0)))
    # a difference of nothing lies a margin away from the null
    assert alarms <= 2
    loud = bench.judged(blocks(rng, 8, 0.0, noise=0.3))
    assert "INCONCLUSIVE" in {r.outcome for r in loud}


def test_a_machine_that_changed_between_the_commits_decides_nothing():
    rng = np.random.default_rng(2)
    assert bench.drift(blocks(rng, 20, 0.0)) is None
    assert "the reference workload was +9.9%" in bench.drift(blocks(rng, 20, 0.1, reference=0.1))


@needs_git
def test_a_checkout_runs_its_own_code_and_goes_away():
    with commits.checkouts("HEAD", "HEAD") as (one, other):
        assert one.commit == other.commit == commits.git("rev-parse", "HEAD")
        assert one.code_hash() == other.code_hash()
        seeds = one.folder / "platform" / "esper" / "registry.py"
        seeds.write_text(seeds.read_text() + "\n")
        assert one.code_hash() != other.code_hash()
        with pytest.raises(RuntimeError, match=r"must run -c .*ended with 1:\n.*no such thing"):
            one.python("-c", "raise SystemExit('no such thing')")
    assert not one.folder.exists()
    assert str(one.folder) not in commits.git("worktree", "list")


@needs_git
@pytest.mark.parametrize("name", ["ab_commits", "bench_commits"])
def test_a_folder_with_older_evidence_is_refused(name, tmp_path):
    first = "HEAD" if name == "ab_commits" else "configs/baselines/pinned.yaml"
    command = [sys.executable, HERE / f"{name}.py", first, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out must be a new folder" in done.stderr
