"""Pictures of an arena, drawn from its summary: scores, performance profiles, fronts."""

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from esper.evidence.arena import ArenaSummary, MethodResult, TaskResult
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
    colors = arm_colors(methods)
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
                f"{a.iqm:.3f} [{a.iqm_low:.3f}, {a.iqm_high:.3f}]", (1.02, row),
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
    colors = arm_colors(summary.aggregates)
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


def fronts(task: TaskResult, name: str, path: Path) -> Path:
    """Draw the mean result of each method against its parameters and its training FLOPs."""
    colors = arm_colors(task.methods)
    panels: tuple[tuple[str, Callable[[MethodResult], float | None], str], ...] = (
        ("parameters at the end", lambda m: m.arm.parameters_mean, "parameters_front"),
        ("training MFLOP, growing included", _mflop, "flops_front"),
    )
    with rc_context(STYLE):
        figure = new_figure(4.3)
        axes_of = figure.subplots(1, len(panels), sharey=True)
        for axes, (label, cost, on_front) in zip(axes_of, panels, strict=True):
            _draw_front(axes, task.methods, colors, cost, on_front)
            axes.set_xlabel(label)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes_of[0].set_ylabel(f"mean {words(task.metric)}")
        scale(axes_of[0], [number(m.arm.mean) for m in task.methods.values()])
        if not task.higher_is_better:
            # up is better in every picture
            axes_of[0].invert_yaxis()
        set_title(
            axes_of[0], f"{name}: {words(task.metric)} and its cost (up is better; line: front)"
        )
        handles, labels = axes_of[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        return save(figure, path)


def _draw_front(
    axes: Axes,
    methods: Mapping[str, MethodResult],
    colors: Mapping[str, str],
    cost: Callable[[MethodResult], float | None],
    on_front: str,
) -> None:
    line = sorted(
        (number(cost(m)), number(m.arm.mean)) for m in methods.values() if getattr(m, on_front)
    )
    axes.step([x for x, _ in line], [y for _, y in line], where="post",
              color=MUTED, linewidth=1.2, zorder=1)  # fmt: skip
    for i, (name, method) in enumerate(methods.items()):
        axes.scatter(
            [number(cost(method))], [number(method.arm.mean)], s=75, color=colors[name],
            marker=_MARKERS[i % len(_MARKERS)], label=name, alpha=0.9, linewidths=0, zorder=2,
        )  # fmt: skip


def _mflop(method: MethodResult) -> float | None:
    flops = method.arm.train_flops_mean
    return None if flops is None else flops / 1e6


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
