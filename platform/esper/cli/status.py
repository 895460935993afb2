"""`esper status`: where a sweep stands, from another terminal; `esper ab` shows the same table."""

import sys
import time
from pathlib import Path
from typing import get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.evidence.progress import Progress, State, find_progress, now, read_progress

STATES: tuple[State, ...] = get_args(State)
# a driver writes every second; one that is busy with a long step may be late
SILENT_S = 60.0
GONE = 4
WATCH_S = 1.0


def show_status(name: str | None, runs: Path, watch: bool) -> int:
    """Print where a sweep stands, once or until it ends.

    Args:
        name: See `find_progress`.
        runs: Folder of sweeps.
        watch: Until it ends.

    Returns:
        0; 4 if the sweep was interrupted, or its driver is gone.
    """
    path, console = find_progress(name, runs), Console()
    progress = read_progress(path)
    if watch:
        with Live(board(progress), console=console, auto_refresh=False) as live:
            while progress.outcome == "running" and progress.driver_lives is not False:
                time.sleep(WATCH_S)
                progress = read_progress(path)
                live.update(board(progress), refresh=True)
    else:
        console.print(board(progress))
    if problem := _problem(progress):
        print(f"{path.parent}: {problem}", file=sys.stderr)
        return GONE
    return 0


def _problem(progress: Progress) -> str | None:
    """Why the sweep does not go on, if it does not."""
    if progress.outcome == "ended":
        return None
    if progress.outcome == "interrupted" or progress.driver_lives is False:
        return "the sweep was interrupted; the same `esper ab` command goes on where it stopped"
    silent = (now() - progress.updated_at).total_seconds()
    if progress.driver_lives is None and silent > SILENT_S:
        return f"nothing was heard for {duration(silent)} from its driver on {progress.host}"
    return None


def board(progress: Progress) -> RenderableType:
    """The sweep as a table of its arms and one of the trials that run."""
    running = {n: t for n, t in progress.trials.items() if t.state == "running"}
    parts: list[RenderableType] = [_head(progress), _arms(progress)]
    if running:
        gpu = ["GPU"] if progress.gpus else []
        table = _table("trial", "interval", "seeds", "parameters", "loss", *gpu, "time")
        table.add_column("where", no_wrap=True)
        for name, t in running.items():
            spent = None if t.started_at is None else (progress.updated_at - t.started_at)
            table.add_row(
                name,
                f"{t.step // t.interval_steps}/{t.steps // t.interval_steps}",
                str(t.active_seeds),
                "-" if t.parameters is None else f"{t.parameters:,}",
                "-" if t.train_loss is None else f"{t.train_loss:.4g}",
                *(f"{progress.gpus_per_trial:g}" for _ in gpu),
                "-" if spent is None else duration(spent.total_seconds()),
                t.place or "starting",
            )
        parts.append(table)
    for name, t in progress.trials.items():
        if t.failures and t.state in ("waiting", "running", "failed"):
            parts.append(Text(f"{name}: {t.failures} failures, the last one: {t.note}", "red"))
    return Group(*parts)


def _head(progress: Progress) -> Table:
    counts, total = progress.counts(), len(progress.trials)
    done = counts["finished"] + counts["collapsed"]
    line = Table.grid(padding=(0, 2))
    texts = [progress.name, f"{done}/{total} trials"]
    if progress.outcome == "running" and progress.slots is not None:
        texts.append(f"{counts['running']} of {progress.slots} slots busy")
        if progress.gpus:
            texts.append(f"{progress.gpus_in_use:g} of {progress.gpus:g} GPUs in use")
        left = progress.seconds_left
        texts.append("time left unknown" if left is None else f"about {duration(left)} left")
    elif progress.outcome != "running":
        texts.append(progress.outcome)
    line.add_row(texts[0], ProgressBar(total=total, completed=done, width=30), *texts[1:])
    return line


def _arms(progress: Progress) -> Table:
    shown = [s for s in STATES if progress.counts()[s]]
    table = _table("arm", *shown)
    for arm in dict.fromkeys(t.arm for t in progress.trials.values()):
        counts = progress.counts(arm)
        table.add_row(arm, *(str(counts[s] or "-") for s in shown))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for head in others:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def duration(seconds: float) -> str:
    """In the unit that fits: `8 s`, `12 min`, `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
