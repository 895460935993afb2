"""What all pictures share: colours, typography, and how numbers and names are written.

Every arm keeps one colour in every picture. The colours are Okabe and Ito's, which readers with
colour-blindness can tell apart.

Source: Okabe, Ito, "Color Universal Design", 2008, https://jfly.uni-koeln.de/color/
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from esper.evidence.records import TrialRecord

Floats = npt.NDArray[np.float64]

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
ARM_COLORS = {
    "esper": "#D55E00",
    "static-final": "#0072B2",
    "random": "#CC79A7",
    "schedule": "#009E73",
    "host": "#7f7f7f",
}
SPARE_COLORS = ("#E69F00", "#56B4E9", "#5d3a9b", "#8c6d31", "#000000")
VERDICT_COLORS = {
    "WIN": "#009E73",
    "LOSE": "#D55E00",
    "EQUIVALENT": "#0072B2",
    "INCONCLUSIVE": "#7f7f7f",
    "UNHEALTHY": "#CC79A7",
}
# 900 pixels: fits beside the menu of MLflow's pages, which do not shrink pictures in a note
DPI, WIDTH_IN = 100, 9.0
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
}


def arm_colors(arms: Iterable[str]) -> dict[str, str]:
    """One colour an arm: fixed for the usual five, else the spare ones by order of name.

    More others than spare colours are taken for a series, such as widths, and shade from dark to
    light in the order of the numbers in their names.
    """
    others = sorted(set(arms) - set(ARM_COLORS), key=_natural)
    if len(others) <= len(SPARE_COLORS):
        colors = list(SPARE_COLORS)
    else:
        shades = colormaps["viridis"]
        colors = [to_hex(shades(0.95 * i / (len(others) - 1))) for i in range(len(others))]
    return ARM_COLORS | dict(zip(others, colors, strict=False))


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers count by their value: width-8 comes before width-16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def by_arm(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Trials of each arm, the usual arms last to first so that esper is drawn on top."""
    if not records:
        raise ValueError("records must hold at least one trial, but got none; run the sweep first.")
    usual = list(reversed(ARM_COLORS))
    names = sorted(
        {r.arm for r in records}, key=lambda a: (usual.index(a) if a in usual else -1, a)
    )
    return {arm: [r for r in records if r.arm == arm] for arm in names}


def scale(axes: Axes, values: Sequence[float], axis: str = "y") -> None:
    """A logarithmic axis for positive values over more than a factor of 30."""
    finite = [v for v in values if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) > 30 * min(finite):
        axes.set(**{f"{axis}scale": "log"})


def new_figure(height_in: float) -> Figure:
    """An empty figure of the common width, apart from pyplot's global state."""
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def set_title(axes: Axes, text: str) -> None:
    """Starts at the figure's left edge, where it has the whole width."""
    axes.figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def words(metric: str) -> str:
    """A metric's name as it is spoken."""
    return metric.replace("_", " ")


def short(value: float | None) -> str:
    """Four significant digits; `collapsed` where no run is left."""
    return f"{value:.4g}" if value is not None else "collapsed"


def number(value: float | None) -> float:
    """NaN where there is no number."""
    return math.nan if value is None else value


def count(value: Any) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"
