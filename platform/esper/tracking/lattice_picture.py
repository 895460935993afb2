"""One trial's lattice over time: the stage of every seed, rebuilt from the growth log."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from esper.evidence.records import TrialRecord
from esper.tracking.style import INK, MUTED, STYLE, Floats, count, new_figure, save, set_title

# progress runs from pale to dark along one path; what ends badly is outside of it
STAGE_COLORS = {
    "DORMANT": "#ededed",
    "GERMINATED": "#fff0a8",
    "TRAINING": "#f5c242",
    "GRAFTING": "#e8871e",
    "STABILIZATION": "#b9def0",
    "EVALUATING": "#6baed6",
    "FINE_TUNING": "#2b7bba",
    "FOSSILIZED": "#0b3c6f",
    "CULLED": "#a8275c",
    "CANCELLED": "#d79bb8",
    "ROLLED_BACK": "#1a1a1a",
}
STAGES = tuple(STAGE_COLORS)


MAX_ROWS_SHOWN_WHOLE, MAX_ROWS_LABELLED = 24, 48


@dataclass(frozen=True)
class StageMatrix:
    """Stages of one trial's seeds over its intervals.

    Attributes:
        rows: Site and seed of each row, grouped by site, first woken first.
        stages: int8 `[rows, intervals]`, numbers of `STAGES`, at the end of each interval.
        asleep: Seeds of each site that never woke and have no row.
    """

    rows: tuple[tuple[str, int], ...]
    stages: npt.NDArray[np.int8]
    asleep: dict[str, int]


def stage_matrix(record: TrialRecord) -> StageMatrix:
    """Replay the growth log: the stage of each seed after what was decided up to each interval.

    All seeds get a row where the trial has at most 24, else only those that ever woke. What
    happened after the last whole interval (a collapse) shows in the last column.

    Raises:
        ValueError: If no interval was completed, or the log names a stage or a site that does not
            exist.
    """
    steps = np.asarray(record.curves["step"], dtype=np.float64)
    if steps.size == 0:
        raise ValueError(
            f"curves of {record.trial_id} must hold at least one interval, but 'step' is empty; "
            "draw a trial that got further."
        )
    woke = _woken_by_site(record)
    shown = woke
    if sum(record.sites.values()) <= MAX_ROWS_SHOWN_WHOLE:
        shown = {
            site: seeds + [s for s in range(record.sites[site]) if s not in seeds]
            for site, seeds in woke.items()
        }
    rows = tuple((site, seed) for site, seeds in shown.items() for seed in seeds)
    index = {row: i for i, row in enumerate(rows)}
    stages = np.zeros((len(rows), len(steps)), dtype=np.int8)
    for t in record.transitions:
        column = min(int(np.searchsorted(steps, t.step)), len(steps) - 1)
        if t.after not in STAGE_COLORS:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, but got {t.after}.")
        stages[index[t.site, t.seed], column:] = STAGES.index(t.after)
    asleep = {site: record.sites[site] - len(seeds) for site, seeds in shown.items()}
    return StageMatrix(rows, stages, asleep)


def _woken_by_site(record: TrialRecord) -> dict[str, list[int]]:
    """Seeds in the order in which they first woke."""
    woke: dict[str, dict[int, None]] = {site: {} for site in record.sites}
    for t in record.transitions:
        if t.site not in woke:
            raise ValueError(
                f"site must be one of {', '.join(woke)}, but the growth log of "
                f"{record.trial_id} has {t.site}; the record is damaged."
            )
        woke[t.site].setdefault(t.seed)
    return {site: list(seeds) for site, seeds in woke.items()}


def lattice_over_time(record: TrialRecord, path: Path) -> Path:
    """Draw the stage of each seed (rows, grouped by site) over the steps of one trial."""
    matrix = stage_matrix(record)
    blocks = _blocks(matrix)
    num_rows = sum(len(block.labels) for block in blocks)
    # what names a block or sums it up keeps a readable height beside hundreds of rows
    gap, summary = max(1.4, num_rows / 30), max(1.0, num_rows / 45)
    height = sum(_height(block, summary) + gap for block in blocks)
    num_woken = len({(t.site, t.seed) for t in record.transitions})
    with rc_context(STYLE):
        figure = new_figure(1.7 + min(0.19 * height, 9.0))
        axes = figure.add_subplot()
        top = 0.0
        ticks: list[tuple[float, str]] = []
        for block in blocks:
            axes.annotate(
                block.name,
                (0, top + 0.85 * gap),
                xytext=(2, 0),
                va="bottom",
                textcoords="offset points",
                fontsize=9,
                color=INK,
            )
            edges = _draw_block(axes, block, record.curves["step"], top + gap, summary)
            middles = (edges[:-1] + edges[1:]) / 2
            ticks += [
                (y, label)
                for y, label in zip(middles, block.labels, strict=True)
                if num_rows <= MAX_ROWS_LABELLED or (block.summed and y == middles[-1])
            ]
            top = edges[-1]
        axes.set_ylim(top, 0)
        axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set_xlabel("optimizer step")
        axes.set_title(_last_stages(matrix), fontsize=9.5, fontweight="normal", color=MUTED)
        set_title(
            axes,
            f"{record.trial_id}: {num_woken} of {count(sum(record.sites.values()))} seeds woke",
        )
        _stage_legend(figure, matrix)
        return save(figure, path)


@dataclass(frozen=True)
class _Block:
    """Rows drawn under one name; `summed` if the last one stands for many sleeping seeds."""

    name: str
    labels: tuple[str, ...]
    stages: npt.NDArray[np.int8]
    summed: bool


def _blocks(matrix: StageMatrix) -> list[_Block]:
    """One block a site that has rows; one more for all sites in which nothing woke."""
    blocks = []
    num_intervals = matrix.stages.shape[1]
    for site, asleep in matrix.asleep.items():
        rows = [i for i, (name, _) in enumerate(matrix.rows) if name == site]
        if rows:
            labels = [f"seed {matrix.rows[i][1]}" for i in rows]
            extra = [f"{count(asleep)} never woke"] if asleep else []
            stages = np.zeros((len(rows) + len(extra), num_intervals), np.int8)
            stages[: len(rows)] = matrix.stages[rows]
            blocks.append(_Block(site, tuple(labels + extra), stages, bool(asleep)))
    shown = {block.name for block in blocks}
    rest = {site: asleep for site, asleep in matrix.asleep.items() if site not in shown}
    if rest:
        name = ", ".join(rest) if len(rest) <= 3 else f"{len(rest)} sites"
        label = f"{count(sum(rest.values()))} never woke"
        blocks.append(_Block(name, (label,), np.zeros((1, num_intervals), np.int8), True))
    return blocks


def _height(block: _Block, summary: float) -> float:
    return len(block.labels) + (summary - 1 if block.summed else 0)


def _draw_block(
    axes: Axes, block: _Block, steps: Sequence[float], top: float, summary: float
) -> Floats:
    """A decision shows from its step on. Returns the rows' edges on the y axis."""
    heights = np.ones(len(block.labels))
    heights[-1] = summary if block.summed else 1.0
    edges = top + np.concatenate([[0.0], np.cumsum(heights)])
    # before the first decision all sleep; what the last one decided gets as much room as the others
    before = np.zeros((len(block.labels), 1), np.int8)
    last = 2 * steps[-1] - steps[-2] if len(steps) > 1 else 2 * steps[-1]
    axes.pcolormesh(
        np.array([0.0, *steps, last]),
        edges,
        np.hstack([before, block.stages]),
        vmin=-0.5,
        vmax=len(STAGES) - 0.5,
        cmap=ListedColormap(list(STAGE_COLORS.values())),
        rasterized=True,
    )
    if len(block.labels) <= MAX_ROWS_LABELLED:
        axes.hlines(edges[1:-1], 0, last, color="white", linewidth=0.8)
    return edges


def _last_stages(matrix: StageMatrix) -> str:
    """e.g. `At the end: 5 fossilized, 2 culled.`, and how to read the rows."""
    last = matrix.stages[:, -1] if matrix.stages.size else np.zeros(0, np.int8)
    numbers, counts = np.unique(last[last > 0], return_counts=True)
    parts = [f"{count(int(n))} {_spoken(STAGES[s])}" for s, n in zip(numbers, counts, strict=True)]
    ended = ", ".join(parts) or "all dormant"
    return f"At the end: {ended}. A row is a seed, the first woken on top."


def _stage_legend(figure: Figure, matrix: StageMatrix) -> None:
    present = np.union1d(np.unique(matrix.stages), [0])
    patches = [
        Patch(
            facecolor=STAGE_COLORS[STAGES[s]],
            edgecolor="#bbbbbb",
            linewidth=0.5,
            label=_spoken(STAGES[s]),
        )
        for s in present
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6))


def _spoken(stage: str) -> str:
    return stage.lower().replace("_", " ")
