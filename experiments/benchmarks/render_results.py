"""Write docs/results/README.md from the JSON files beside it, so that no number is typed by hand.

python experiments/benchmarks/render_results.py docs/results
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """# Results

Rendered from the JSON files in this folder by `experiments/benchmarks/render_results.py`. Each was
written by `esper ab configs/sweeps/NAME.yaml --json docs/results/NAME.json`; the same command makes
it again. Means are over pairs of random seeds; FLOPs and seconds of training include what growing
took. Every sweep's file says what its arms are, and on which seeds its settings were chosen. In
sweeps of commits before 61de9e8, the FLOPs of choosing matched units are missing (docs/log.md,
2026-11-23). `ab_gpt_growth` ran on two H200 with ten trials on each, `ab_mnist1d` on that machine's
32 cores (Python 3.12, torch 2.11). `ab_size_spirals` and `ab_geometries` ran on 5 cores of another
machine (Intel Xeon, Python 3.12, torch 2.11), from an archive without its history: their commit was
entered by the hash of the code in their records; `arena_growth` ran on 16. `ab_adapt_gpt` ran on
one H200, twelve trials at a time beside other work; its commit was entered likewise. All others ran
on two cores (Python 3.11, torch 2.13), those of 2026-11-29 beside other work; seconds are at best
comparable within a sweep only.
"""
COLUMNS = ("arm", "mean", "sd", "worst", "parameters", "steps", "training MFLOP", "seconds")


def table(result: dict[str, Any]) -> list[str]:
    """One row an arm."""
    share = "accuracy" in result["metric"]
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for name, arm in result["arms"].items():
        scores = [f"{100 * arm[k]:.2f} %" if share else f"{arm[k]:.4f}"
                  for k in ("mean", "sd", "worst")]  # fmt: skip
        cells = [
            name, *scores, f"{arm['parameters']:,.0f}", f"{arm['steps']:.0f}",
            f"{arm['train_flops'] / 1e6:,.0f}", f"{arm['train_seconds']:.1f}",
        ]  # fmt: skip
        collapsed = f" ({arm['collapsed']} collapsed)" if arm["collapsed"] else ""
        lines.append(f"| {' | '.join(cells)}{collapsed} |")
    return lines


def section(path: Path) -> str:
    """One sweep: its table and its verdicts."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"## {path.stem}",
        "",
        f"`{result['metric']}`, {result['pairs']} pairs, commit {str(result['commit'])[:7]}.",
        "",
        *table(result),
        "",
    ]
    for i, verdict in enumerate([result, *result["secondary"]]):
        p = verdict["p_value"] if verdict.get("p_holm") is None else verdict["p_holm"]
        # the p stored is that of "better", which says nothing of an equivalence or a loss
        by = f", p {p:.2g}" if verdict["verdict"] in ("WIN", "INCONCLUSIVE") else ""
        corrected = ", Holm-corrected" if i else ""
        difference = verdict["mean_difference"]
        lines.append(
            f"* **{verdict['verdict']}** {verdict['treatment']} against {verdict['control']}: "
            f"mean difference {difference:+.4g} (positive: better){by}{corrected}."
        )
    return "\n".join(lines)


def arena(path: Path) -> str:
    """One arena: a table for each task, with the treatment's verdict against each method."""
    result = json.loads(path.read_text(encoding="utf-8"))
    treatment = result["treatment"]
    # a file that is not named after the arena alone holds some of its tasks
    part = path.stem != f"arena_{result['arena']}"
    only = "".join(f" --task {task}" for task in result["tasks"]) if part else ""
    lines = [
        f"## {path.stem}",
        "",
        f"`esper arena configs/arenas/{result['arena']}.yaml{only}`, commit "
        f"{str(result['commit'])[:7]}; "
        "p is Holm-corrected over the tasks. Score: interquartile mean of all runs, 0 is the host "
        "and 1 the better static network.",
        "",
        "| method | score | 95 % interval |",
        "|---|---|---|",
        *(
            f"| {name} | {a['iqm']:.3f} | {a['iqm_low']:.3f} to {a['iqm_high']:.3f} |"
            for name, a in sorted(result["aggregates"].items(), key=lambda item: -item[1]["iqm"])
        ),
    ]
    for name, task in result["tasks"].items():
        share = "accuracy" in task["metric"]
        lines += [
            "",
            f"### {name}: `{task['metric']}`, {task['pairs']} pairs",
            "",
            f"| method | mean | worst | parameters | training MFLOP | {treatment} against it | p |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, entry in task["methods"].items():
            arm, verdict = entry["arm"], task["verdicts"].get(method)
            scores = [f"{100 * arm[k]:.2f} %" if share else f"{arm[k]:.4f}"
                      for k in ("mean", "worst")]  # fmt: skip
            judged = ("", "")
            if verdict is not None:
                p = verdict["p_holm"] if verdict["p_holm"] is not None else verdict["p_value"]
                judged = f"{verdict['verdict']} {verdict['mean_difference']:+.4g}", f"{p:.2g}"
            cells = [
                method, *scores, f"{arm['parameters_mean']:,.0f}",
                f"{arm['train_flops_mean'] / 1e6:,.0f}", *judged,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Render the page."""
    sections = [arena(path) for path in sorted(folder.glob("arena_*.json"))]
    sections += [section(path) for path in sorted(folder.glob("a[ab]_*.json"))]
    (folder / "README.md").write_text("\n\n".join([HEAD.rstrip(), *sections]) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
