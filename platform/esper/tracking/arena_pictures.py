"""Pictures of an arena, drawn from its summary: scores, performance profiles, fronts."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from esper.evidence.arena import ArenaSummary
from esper.tracking.style import (
    INK,
    MUTED,
    STYLE,
    arm_colors,
    count,
    new_figure,
    number,
    save,
    scale,
    set_title,
    words,
)

_MARKERS = "osD^vPX*<>"


def score_intervals(summary: ArenaSummary, path: Path) -> Path:
    """Draw the interquartile mean score of each method with its interval, the best on top.

    Raises:
        ValueError: If the arena has no scores.
    """
    _require_scores(summary)
    methods = sorted(summary.aggregates, key=lambda m: summary.aggregates[m].iqm)
    colors = _colors(summary)
    with rc_context(STYLE):
        figure = new_figure(1.7 + 0.42 * len(methods))
        axes = figure.add_subplot()
        for at, name in enumerate(_ends(summary)):
            axes.axvline(at, color=MUTED, linewidth=1, linestyle=":", zorder=1)
            axes.annotate(
                name, (at, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 1),
                textcoords="offset points", va="bottom", fontsize=8.5, color=MUTED,
            )  # fmt: skip
        for row, name in enumerate(methods):
            a = summary.aggregates[name]
            axes.plot([a.iqm_low, a.iqm_high], [row, row], color=colors[name], linewidth=6,
                      alpha=0.35, solid_capstyle="butt")  # fmt: skip
            axes.plot([a.iqm], [row], marker="D", color=colors[name], markersize=8)
            axes.annotate(
                f"{a.iqm:z.3f} [{a.iqm_low:z.3f}, {a.iqm_high:z.3f}]", (1.02, row),
                xycoords=("axes fraction", "data"), va="center", fontsize=9, color=MUTED,
            )  # fmt: skip
        labels = [_label(summary, name) for name in methods]
        axes.set_yticks(range(len(methods)), labels, color=INK, fontsize=10)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("interquartile mean of the scores, 95 % stratified bootstrap interval")
        set_title(axes, f"Scores over {len(summary.tasks)} tasks")
        return save(figure, path)


def performance_profiles(summary: ArenaSummary, path: Path) -> Path:
    """Draw, for each method, the share of runs above each score; the treatment with its interval.

    Raises:
        ValueError: If the arena has no scores.
    """
    _require_scores(summary)
    colors = _colors(summary)
    with rc_context(STYLE):
        figure = new_figure(5.2)
        axes = figure.add_subplot()
        for name, a in summary.aggregates.items():
            treated = name == summary.treatment
            axes.step(
                summary.taus, a.profile, where="post", label=_label(summary, name),
                color=colors[name], linewidth=2.8 if treated else 1.6, zorder=3 if treated else 2,
            )  # fmt: skip
            if treated:
                axes.fill_between(summary.taus, a.profile_low, a.profile_high, step="post",
                                  color=colors[name], alpha=0.15, linewidth=0)  # fmt: skip
        axes.axvline(1, color=MUTED, linewidth=1, linestyle=":", zorder=1)
        axes.set_xlim(summary.taus[0], summary.taus[-1])
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
        axes.set_xlabel("score (0: {}, 1: {})".format(*_ends(summary)))
        axes.set_ylabel("runs above the score")
        set_title(axes, "Performance profiles: the higher the curve, the better")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return save(figure, path)


def fronts(summary: ArenaSummary, task: str, path: Path) -> Path:
    """Draw the mean result of each method on a task against its parameters and training FLOPs.

    An accuracy is drawn as an error, whose scale also tells 99.5 % from 99.9 %.
    """
    result = summary.tasks[task]
    label, flip = words(result.metric), result.metric.endswith("_accuracy")
    if flip:
        label = label.replace("accuracy", "error")
    values = {
        name: (1 - number(m.arm.mean)) if flip else number(m.arm.mean)
        for name, m in result.methods.items()
    }
    with rc_context(STYLE):
        figure = new_figure(4.3)
        axes_of = figure.subplots(1, 2, sharey=True)
        parameters = {n: number(m.arm.parameters_mean) for n, m in result.methods.items()}
        mflop = {n: number(m.arm.train_flops_mean) / 1e6 for n, m in result.methods.items()}
        on = [n for n, m in result.methods.items() if m.parameters_front]
        _draw_front(axes_of[0], summary, parameters, values, on)
        on = [n for n, m in result.methods.items() if m.flops_front]
        _draw_front(axes_of[1], summary, mflop, values, on)
        axes_of[0].set_xlabel("parameters at the end")
        axes_of[1].set_xlabel("training MFLOP, growing included")
        axes_of[0].set_ylabel(f"mean {label}")
        scale(axes_of[0], list(values.values()))
        if flip or not result.higher_is_better:
            axes_of[0].invert_yaxis()
        set_title(axes_of[0], f"{task}: {label} and its cost (up is better, line: front)")
        figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return save(figure, path)


def _draw_front(
    axes: Axes,
    summary: ArenaSummary,
    costs: Mapping[str, float],
    values: Mapping[str, float],
    on_front: Sequence[str],
) -> None:
    line = sorted((costs[name], values[name]) for name in on_front)
    axes.step([x for x, _ in line], [y for _, y in line], where="post",
              color=MUTED, linewidth=1.2, zorder=1)  # fmt: skip
    colors, markers = _colors(summary), dict(zip(_methods(summary), cycle(_MARKERS), strict=False))
    for name, cost in costs.items():
        axes.scatter(
            [cost], [values[name]], s=75, color=colors[name], marker=markers[name], label=name,
            alpha=0.9, linewidths=0, zorder=2,
        )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))


def _methods(summary: ArenaSummary) -> list[str]:
    return [*summary.controls, summary.treatment]


def _colors(summary: ArenaSummary) -> dict[str, str]:
    """One colour a method in all pictures, whichever tasks it applies to."""
    return arm_colors(_methods(summary))


def _ends(summary: ArenaSummary) -> tuple[str, str]:
    """What a score of 0 and of 1 is."""
    one = summary.scale.one
    return summary.scale.zero, one[0] if len(one) == 1 else f"best of {', '.join(one)}"


def _label(summary: ArenaSummary, method: str) -> str:
    """The name, with the number of tasks where it is not all of them."""
    ran, every = len(summary.aggregates[method].tasks), len(summary.tasks)
    return method if ran == every else f"{method} ({ran} of {every} tasks)"


def _require_scores(summary: ArenaSummary) -> None:
    if not summary.aggregates:
        reasons = [t.no_scale_reason for t in summary.tasks.values() if t.no_scale_reason]
        raise ValueError(f"every task must have a scale to be drawn, but: {' '.join(reasons)}")
