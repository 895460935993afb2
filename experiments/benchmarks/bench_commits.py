"""Has anything become slower since the pinned commit? Both are measured again here, interleaved.

    python experiments/benchmarks/bench_commits.py CONFIG --out build/bench

A block is one fresh process of each commit, in random order; each runs its own commit's
`esper.evidence.measure`, the measuring code of `esper baseline`. The differences of a metric are
the logarithms of its ratios, one a block; a metric is suspected if it is worse by more than its
margin, corrected over all metrics. What is suspected is measured in as many new blocks, and is a
regression if it is worse there, too. Exit code 0: nothing is worse; 20: a regression; 30: none is
shown, but something could not be decided; 5: UNHEALTHY.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from commits import ROOT, Checkout, checkouts

from esper.config.base import read_yaml
from esper.evidence import baseline_stats
from esper.evidence.baseline_stats import MAX_DRIFT_FRAC
from esper.evidence.paired import holm, one_sided, shift
from esper.evidence.records import write_text

PIN = ROOT / ".ci" / "pinned-commit"
ALPHA = 0.05
READY_TIMEOUT_S = 600
EXIT_CODES = {"UNHEALTHY": 5, "WORSE": 20, "INCONCLUSIVE": 30, "NOT WORSE": 0}
# ends of the names of what is judged; a P99 asks for more requests than this job has time for
JUDGED = ("_p50_ms", "_p95_ms", "_throughput", "_gpu_peak_bytes", "memory_peak_bytes")


@dataclass(frozen=True)
class Row:
    """One metric, new against old.

    Attributes:
        metric: Its name.
        change: exp(median difference) - 1, positive where it became worse.
        p_worse: For "worse by more than the margin", corrected.
        p_not_worse: For "worse by less than the margin".
        margin: Tolerated worsening, as a share.
    """

    metric: str
    change: float
    p_worse: float
    p_not_worse: float
    margin: float

    @property
    def outcome(self) -> str:
        """WORSE, NOT WORSE, or INCONCLUSIVE: what cannot be decided has not passed."""
        if self.p_worse <= ALPHA:
            return "WORSE"
        return "NOT WORSE" if self.p_not_worse <= ALPHA else "INCONCLUSIVE"


def main() -> None:
    """Measure, judge, measure again what is suspected, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="of `esper baseline run`")
    parser.add_argument("--pinned", default=None, help=f"a commit; default: that in {PIN.name}")
    parser.add_argument("--branch", default="HEAD")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out must be a new folder, but {options.out} is there")
    if options.blocks < 8:
        parser.error(f"--blocks must be at least 8, but got {options.blocks}")
    pinned = options.pinned or PIN.read_text(encoding="utf-8").split("#")[0].strip()
    with checkouts(pinned, options.branch) as (old, new):
        text, outcome = compare(old, new, options.config, options.blocks, options.out)
    write_text(options.out / "verdict.md", text)
    print(text)
    sys.exit(EXIT_CODES[outcome])


def compare(old: Checkout, new: Checkout, config: Path, blocks: int, out: Path) -> tuple[str, str]:
    """Both strikes; the text to show and the outcome."""
    requests = read_yaml(config)
    first = measured(old, new, requests, range(blocks), out)
    rows, problem = judged(first), drift(first)
    suspected = [r.metric for r in rows if r.outcome == "WORSE"]
    confirmed: list[str] = []
    if suspected and problem is None:
        second = measured(old, new, requests, range(blocks, 2 * blocks), out)
        again = judged(second, suspected)
        confirmed, problem = [r.metric for r in again if r.outcome == "WORSE"], drift(second)
    outcome = (
        "UNHEALTHY" if problem
        else "WORSE" if confirmed
        else "INCONCLUSIVE" if any(r.outcome == "INCONCLUSIVE" for r in rows)
        else "NOT WORSE"
    )  # fmt: skip
    lines = [
        f"### {outcome}: `{new.commit[:12]}` against the pinned `{old.commit[:12]}`", "",
        f"{blocks} blocks of fresh processes, interleaved; suspected: "
        f"{', '.join(suspected) or 'nothing'}; worse twice: {', '.join(confirmed) or 'nothing'}.",
        *([f"Nothing can be concluded: {problem}"] if problem else []),
        "", "| metric | change (positive: worse) | margin | p worse, Holm | p not worse | |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{r.metric}` | {r.change:+.1%} | {r.margin:.0%} | {r.p_worse:.3g} | "
            f"{r.p_not_worse:.3g} | {r.outcome} |"
            for r in rows
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n", outcome


Block = dict[str, dict[str, float]]


def measured(
    old: Checkout, new: Checkout, config: dict[str, Any], blocks: range, out: Path
) -> list[Block]:
    """The metrics of both commits, block by block; every file is kept."""
    found = []
    for block in blocks:
        arms = [("old", old), ("new", new)]
        if np.random.default_rng([int(new.commit[:8], 16), block]).random() < 0.5:
            arms.reverse()
        found.append(
            {name: one(arm, config, block, out / f"{block:03d}-{name}.json") for name, arm in arms}
        )
        print(f"block {block}: {' before '.join(name for name, _ in arms)}", flush=True)
    return found


def one(arm: Checkout, config: dict[str, Any], block: int, result: Path) -> dict[str, float]:
    """What one fresh process of a commit measures.

    Raises:
        RuntimeError: If it fails, or the commit has no measuring code yet.
    """
    request = result.with_suffix(".request").resolve()
    write_text(request, json.dumps({"config": config, "implementation": "kasmina", "block": block}))
    process = subprocess.Popen(
        [sys.executable, "-m", "esper.evidence.measure", str(request), str(result.resolve())],
        cwd=arm.folder, env=arm.environment(), text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, errors = process.communicate("go\n", timeout=READY_TIMEOUT_S)
    if process.returncode or not result.exists():
        raise RuntimeError(
            f"commit {arm.commit[:12]} must measure itself with esper.evidence.measure, but ended "
            f"with {process.returncode}; pin one that can:\n{errors.strip()[-2000:]}"
        )
    metrics = json.loads(result.read_text("utf-8"))["metrics"]
    return {k: m["value"] for k, m in metrics.items() if m["value"] is not None}


def judged(blocks: list[Block], metrics: list[str] | None = None) -> list[Row]:
    """Every metric of the old commit that has a margin, or those that are named.

    Raises:
        RuntimeError: If a process did not measure one of them.
    """
    known = sorted({name for block in blocks for name in block["old"]})
    names = [name for name in (metrics or known) if margin_of(name)]
    for name in names:
        if any(name not in arm for block in blocks for arm in block.values()):
            raise RuntimeError(
                f"{name} must be measured by both commits in every block, but is missing in some; "
                "see build/bench for what each process measured, and pin a commit that fits."
            )
    worse, not_worse, changes = [], [], []
    for name in names:
        sign = -1.0 if name.endswith("_throughput") else 1.0
        d = [sign * math.log(b["new"][name] / b["old"][name]) for b in blocks]
        over = one_sided(shift(d, -math.log1p(margin_of(name))))
        worse.append(over.greater)
        not_worse.append(over.less)
        changes.append(math.expm1(statistics.median(d)))
    return [
        Row(name, change, p, q, margin_of(name))
        for name, change, p, q in zip(names, changes, holm(worse), not_worse, strict=True)
    ]


def margin_of(metric: str) -> float:
    """Tolerated worsening as a share; 0 for a metric that is not judged."""
    return (baseline_stats.margin_of(metric) or 0.0) if metric.endswith(JUDGED) else 0.0


def drift(blocks: list[Block]) -> str | None:
    """Why nothing can be concluded: the unchanging workload was not equally fast for both."""
    ratios = [math.log(b["new"]["reference_ms"] / b["old"]["reference_ms"]) for b in blocks]
    change = math.expm1(statistics.median(ratios))
    if abs(change) < MAX_DRIFT_FRAC:
        return None
    return f"the reference workload was {change:+.1%} beside the new code."


if __name__ == "__main__":
    main()
