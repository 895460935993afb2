"""Results by comparison (forest plot) and by arm, every pair in sight."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from esper.evidence.health import value_of
from esper.evidence.records import TrialRecord
from esper.evidence.verdict import Verdict
from esper.tracking.style import (
    INK,
    MUTED,
    STYLE,
    VERDICT_COLORS,
    Floats,
    arm_colors,
    by_arm,
    count,
    new_figure,
    number,
    save,
    scale,
    set_title,
    short,
    words,
)


def forest_plot(verdicts: Sequence[Verdict], path: Path) -> Path:
    """Draw each comparison: differences of its pairs, their mean with interval, the verdict.

    Raises:
        ValueError: If there is no verdict, or they are about different metrics.
    """
    if len({(v.metric, v.margin) for v in verdicts}) != 1:
        raise ValueError(
            "verdicts must be about one metric with one margin, but got "
            f"{sorted({v.metric for v in verdicts})}; draw one picture for each."
        )
    first = verdicts[0]
    with rc_context(STYLE):
        figure = new_figure(1.9 + 0.95 * len(verdicts))
        axes = figure.add_subplot()
        axes.axvspan(-first.margin, first.margin, color="#f0f0f0", linewidth=0, zorder=0)
        axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
        for row, verdict in enumerate(verdicts):
            _draw_comparison(axes, row, verdict)
        axes.set_yticks(range(len(verdicts)), [_versus(v) for v in verdicts], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(verdicts) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.4g}" if x else "0"))
        axes.set_xlabel(
            f"difference in {words(first.metric)}, right: treatment better "
            f"(grey: margin of equivalence, \N{PLUS-MINUS SIGN}{first.margin:g})"
        )
        set_title(
            axes,
            f"{first.treatment} against {first.control}: {first.verdict} over {first.pairs} pairs",
        )
        return save(figure, path)


def _draw_comparison(axes: Axes, row: int, verdict: Verdict) -> None:
    color = VERDICT_COLORS[verdict.verdict]
    differences = np.asarray(verdict.differences, dtype=np.float64)
    axes.scatter(
        differences,
        row - 0.2 + _spread(differences, 0.09),
        s=22,
        color=color,
        alpha=0.45,
        linewidths=0,
    )
    if verdict.mean_difference is not None:
        interval = [number(verdict.interval_low), number(verdict.interval_high)]
        axes.plot(interval, [row + 0.12] * 2, color=color, linewidth=2.5, solid_capstyle="butt")
        axes.plot([verdict.mean_difference], [row + 0.12], marker="D", color=color, markersize=8)
    beside = ("axes fraction", "data")
    axes.annotate(
        verdict.verdict,
        (1.02, row - 0.02),
        xycoords=beside,
        va="bottom",
        fontsize=10,
        fontweight="bold",
        color=color,
    )
    axes.annotate(
        _figures(verdict),
        (1.02, row + 0.02),
        xycoords=beside,
        va="top",
        fontsize=8.5,
        color=MUTED,
        linespacing=1.35,
    )


def _spread(values: Floats, by: float) -> Floats:
    """Three lines of dots, so that equal values hide each other less; the same in every run."""
    rank = np.argsort(np.argsort(values))
    return np.asarray(by * (rank % 3 - 1), dtype=np.float64)


def _versus(verdict: Verdict) -> str:
    worst = (
        f"\nworst {short(verdict.worst_treatment)} vs {short(verdict.worst_control)}"
        if verdict.differences
        else ""
    )
    return f"{verdict.treatment} \N{MINUS SIGN} {verdict.control}{worst}"


def _figures(verdict: Verdict) -> str:
    if verdict.mean_difference is None:
        return "nothing was compared"
    low, high = number(verdict.interval_low), number(verdict.interval_high)
    lines = [f"{verdict.mean_difference:+.3g} [{low:+.3g}, {high:+.3g}]", deciding_p(verdict)]
    if verdict.collapsed_treatment or verdict.collapsed_control:
        counts = f"{verdict.collapsed_treatment} vs {verdict.collapsed_control}"
        lines.append(f"collapsed {counts}, ranked worst")
    return "\n".join(lines)


def deciding_p(verdict: Verdict) -> str:
    """The one-sided p-value of what was found, e.g. `p = 0.0039` or `p (worse) = 0.012, Holm`."""
    adjusted = verdict.p_holm is not None
    better, worse, equal = (
        (verdict.p_holm, verdict.p_holm_lose, verdict.p_holm_equivalent)
        if adjusted
        else (verdict.p_value, verdict.p_value_lose, verdict.p_equivalent)
    )
    found, p = "", number(better)
    if verdict.verdict == "EQUIVALENT":
        found, p = " (equal)", number(equal)
    elif number(worse) < p:
        found, p = " (worse)", number(worse)
    return f"p{found} = {p:.2g}" + (", Holm" if adjusted else "")


def arms_overview(records: Sequence[TrialRecord], metric: str, path: Path) -> Path:
    """Draw the final metric of every trial by arm, with the mean, the worst and the parameters.

    Raises:
        ValueError: If a record lacks the metric.
    """
    for record in records:
        if metric not in record.metrics:
            raise ValueError(
                f"metrics of {record.trial_id} must hold '{metric}', but got "
                f"{', '.join(record.metrics)}; record it or name another."
            )
    arms = by_arm(records)
    colors = arm_colors(arms)
    with rc_context(STYLE):
        figure = new_figure(1.6 + 0.55 * len(arms))
        axes = figure.add_subplot()
        for row, (arm, trials) in enumerate(reversed(arms.items())):
            _draw_arm(axes, row, trials, metric, colors[arm])
        axes.set_yticks(range(len(arms)), list(reversed(arms)), color=INK, fontsize=10)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"final {words(metric)}")
        scale(axes, [value_of(r, metric) for r in records], axis="x")
        set_title(
            axes, f"Final {words(metric)} of {len(records)} trials by arm, dot: a trial, bar: mean"
        )
        return save(figure, path)


def _draw_arm(axes: Axes, row: int, trials: Sequence[TrialRecord], metric: str, color: str) -> None:
    values = np.array([value_of(t, metric) for t in trials])
    finite = values[np.isfinite(values)]
    axes.scatter(finite, row + _spread(finite, 0.11), s=26, color=color, alpha=0.5, linewidths=0)
    lines = [f"{count(float(np.mean([t.metrics['parameters'] for t in trials])))} parameters"]
    if finite.size:
        mean = float(finite.mean())
        axes.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linewidth=3, zorder=1)
        lines.insert(0, f"mean {short(mean)}")
    if len(finite) < len(values):
        lines.append(f"{len(values) - len(finite)} collapsed, not in the mean")
    axes.annotate(
        "\n".join(lines),
        (1.02, row),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8.5,
        color=MUTED,
        linespacing=1.35,
    )
