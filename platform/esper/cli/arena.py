"""`esper arena`: progress task by task, then the verdicts of every task and where to look."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from esper.cli.ab import COLOURS, SweepProgress
from esper.cli.codes import UNHEALTHY
from esper.cli.output import write_result
from esper.config.arena import load_arena
from esper.config.sweep import SweepConfig

if TYPE_CHECKING:
    from esper.evidence.arena import ArenaSummary
    from esper.evidence.verdict import Verdict


def run_arena_command(
    config: Path,
    tasks: Sequence[str],
    pairs: int | None,
    json_file: Path | None,
    html_file: Path | None,
) -> int:
    """Run the arena and print what it found.

    Returns:
        The exit code.
    """
    console = Console()
    arena = load_arena(config)
    if tasks:
        arena = arena.only(tasks)
    if pairs is not None:
        arena = arena.with_pairs(pairs)
    trials = sum(len(s.arms) * s.pairs for s in arena.sweeps.values())
    console.print(f"{len(arena.sweeps)} tasks, {trials} trials; checking every arm ...")
    from esper_experiments.arena import run_arena

    def watch(task: str, sweep: SweepConfig) -> SweepProgress:
        place = list(arena.sweeps).index(task) + 1
        console.print(f"task {place} of {len(arena.sweeps)}: {task}, {len(sweep.arms)} methods")
        return SweepProgress(console, sweep)

    command = f"esper arena {config}" + "".join(f" --task {task}" for task in tasks)
    command += "" if pairs is None else f" --pairs {pairs}"
    result = run_arena(arena, watch, command=command)
    show(console, result.summary)
    if json_file is not None:
        write_result(json_file, json.loads(result.summary.model_dump_json()))
        console.print(f"JSON: {json_file}", soft_wrap=True)
    if html_file is not None:
        html_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result.report, html_file)
    console.print(f"report: {html_file or result.report}", soft_wrap=True)
    uri = arena.config.mlflow.tracking_uri
    console.print(
        f"MLflow run {result.mlflow_run_id} in {uri}; see it with: esper ui --tracking-uri {uri}",
        soft_wrap=True,
    )
    unhealthy = any(v.verdict == "UNHEALTHY" for v in result.summary.verdicts())
    return UNHEALTHY if unhealthy else 0


def show(console: Console, summary: "ArenaSummary") -> None:
    """The verdicts, tasks across and controls down, and the scores over all tasks."""
    title = f"{summary.arena}: {summary.treatment} against each method, Holm over tasks"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("against", no_wrap=True)
    for name in summary.tasks:
        table.add_column(name, overflow="fold")
    for control in summary.controls:
        cells = [_cell(t.verdicts.get(control)) for t in summary.tasks.values()]
        table.add_row(control, *cells)
    console.print(table)
    for name, task in summary.tasks.items():
        for method, reason in task.absent.items():
            console.print(f"{method} does not apply to {name}: {reason}", soft_wrap=True)
        if task.no_scale_reason is not None:
            console.print(f"no scores on {name}: {task.no_scale_reason}", soft_wrap=True)
    ordered = sorted(summary.aggregates.items(), key=lambda item: -item[1].iqm)
    for method, a in ordered:
        tasks = f"{len(a.tasks)} tasks" if len(a.tasks) > 1 else "1 task"
        console.print(
            f"{method:14} IQM score {a.iqm:z.3f} ({a.iqm_low:z.3f} to {a.iqm_high:z.3f}), {tasks}",
            highlight=False,
        )


def _cell(verdict: "Verdict | None") -> str:
    if verdict is None:
        return "not applicable"
    colour = COLOURS.get(verdict.verdict, "magenta")
    d = verdict.mean_difference
    return f"[{colour}]{verdict.verdict}[/]" + ("" if d is None else f" {d:+.3g}")
