"""Growth over the steps: a metric by arm, the parameters, and when seeds woke."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from esper.evidence.records import TrialRecord
from esper.tracking.style import (
    STYLE,
    Floats,
    arm_colors,
    by_arm,
    count,
    new_figure,
    save,
    scale,
    set_title,
    words,
)


def growth_curves(
    records: Sequence[TrialRecord], metric: str, path: Path, among: Sequence[str] = ()
) -> Path:
    """Draw a metric and the parameters against the step, and when seeds woke.

    A line is the mean over the pairs that reached the step; the band spans their minimum and
    maximum, so that the worst run is in sight.

    Args:
        records: All trials of a sweep; collapsed ones count until they stop.
        metric: A curve of every record.
        path: PNG file to write.
        among: All arms of a family of pictures in which an arm is to have one colour.

    Raises:
        ValueError: If a record lacks the curve or `parameters`.
    """
    arms = by_arm(records)
    colors = arm_colors([*arms, *among])
    woken = {arm: steps for arm, trials in arms.items() if len(steps := _waking_steps(trials))}
    with rc_context(STYLE):
        figure = new_figure(6.6 + 0.22 * len(woken))
        ratios = [3.0, 2.0] + ([0.25 + 0.22 * len(woken)] if woken else [])
        panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)
        upper, lower = panels[0, 0], panels[1, 0]
        for i, (arm, trials) in enumerate(arms.items()):
            _draw_band(upper, trials, metric, colors[arm], label=_arm_label(arm, trials))
            # arms of equal size lie on each other: the lower ones are wider, so that all show
            _draw_band(
                lower,
                trials,
                "parameters",
                colors[arm],
                linewidth=2.0 + 1.0 * (len(arms) - 1 - i),
                solid_capstyle="butt",
                drawstyle="steps-post",
            )
        scale(upper, [v for r in records for v in r.curves[metric]])
        upper.set_ylabel(words(metric))
        lower.set_ylabel("parameters\n(host and awake seeds)")
        lower.yaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        pairs = len({r.pair for r in records})
        set_title(
            upper,
            f"{words(metric).capitalize()} while training: mean of {pairs} pairs, "
            "band from worst to best",
        )
        if woken:
            _draw_waking(panels[2, 0], woken, colors)
        panels[-1, 0].set_xlabel("optimizer step")
        panels[-1, 0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        figure.legend(
            *upper.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(arms), 5)
        )
        return save(figure, path)


def _draw_band(
    axes: Axes, trials: Sequence[TrialRecord], metric: str, color: str, **line: Any
) -> None:
    steps, values = curves_on_steps(trials, metric)
    known = np.isfinite(values).any(axis=0)
    steps, values = steps[known], values[:, known]
    axes.fill_between(
        steps,
        np.nanmin(values, axis=0),
        np.nanmax(values, axis=0),
        color=color,
        alpha=0.13,
        linewidth=0,
        step="post" if "drawstyle" in line else None,
    )
    axes.plot(steps, np.nanmean(values, axis=0), color=color, **{"linewidth": 2} | line)


def curves_on_steps(trials: Sequence[TrialRecord], metric: str) -> tuple[Floats, Floats]:
    """All trials' values on the union of their steps; NaN where a trial has none.

    Returns:
        Steps `[N]` and values `[trials, N]`; infinities become NaN.

    Raises:
        ValueError: If a trial lacks the curve.
    """
    for trial in trials:
        if metric not in trial.curves:
            raise ValueError(
                f"curves of {trial.trial_id} must hold '{metric}', but got "
                f"{', '.join(trial.curves)}; record it or name another."
            )
    steps = np.unique(np.concatenate([np.asarray(t.curves["step"], float) for t in trials]))
    values = np.full((len(trials), len(steps)), np.nan)
    for row, trial in zip(values, trials, strict=True):
        row[np.searchsorted(steps, trial.curves["step"])] = trial.curves[metric]
    values[~np.isfinite(values)] = np.nan
    return steps, values


def _waking_steps(trials: Sequence[TrialRecord]) -> list[int]:
    return [t.step for r in trials for t in r.transitions if t.after == "GERMINATED"]


def _draw_waking(axes: Axes, woken: dict[str, list[int]], colors: dict[str, str]) -> None:
    """One row of dots an arm; a dot's area is the number of seeds woken at that step."""
    for row, (arm, steps) in enumerate(reversed(woken.items())):
        at, counts = np.unique(steps, return_counts=True)
        axes.scatter(
            at,
            np.full(len(at), row),
            s=90 * counts / counts.max(),
            color=colors[arm],
            alpha=0.75,
            linewidths=0,
        )
    axes.set_yticks(range(len(woken)), list(reversed(woken)))
    axes.set_ylim(len(woken) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("seeds\nwoken")
    axes.spines["left"].set_visible(False)


def _arm_label(arm: str, trials: Sequence[TrialRecord]) -> str:
    collapsed = sum(t.status == "collapsed" for t in trials)
    return f"{arm} ({collapsed} collapsed)" if collapsed else arm
