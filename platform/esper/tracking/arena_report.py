"""The report of an arena: one HTML file that needs nothing else, written from the summary."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from esper.evidence.arena import ArenaSummary, TaskResult
from esper.evidence.verdict import Verdict
from esper.tracking.result_pictures import deciding_p
from esper.tracking.style import VERDICT_COLORS, words

STYLESHEET = """
body { font: 15px/1.5 "DejaVu Sans", Verdana, sans-serif; color: #222; max-width: 1000px;
       margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: .88em; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e6e6e6; text-align: right; }
th:first-child, td:first-child, table.v th, table.v td { text-align: left; }
th { color: #6b6b6b; font-weight: normal; }
table.v b { font-size: .92em; } table.v small { display: block; }
small, .muted { color: #6b6b6b; }
img { max-width: 100%; display: block; margin: 1em 0; }
tr.treatment td { font-weight: bold; } .bad { color: #b00020; }
summary { cursor: pointer; } code { background: #f4f4f4; padding: 0 .25em; }
"""

METHOD_HEADS = (
    "method", "mean", "sd", "worst", "score", "parameters", "steps", "training MFLOP", "seconds",
    "collapsed", "on the front of",
)  # fmt: skip


def write_report(
    summary: ArenaSummary,
    pictures: Mapping[str, Path],
    task_pictures: Mapping[str, Mapping[str, Path]],
    command: str,
    path: Path,
) -> Path:
    """Write the report.

    Args:
        summary: What the arena found.
        pictures: Caption and PNG file of the pictures over all tasks.
        task_pictures: The same for each task.
        command: What to type to make it again.
        path: HTML file to write.
    """
    parts = [
        f"<h1>Arena {escape(summary.arena)}: {escape(headline(summary))}</h1>",
        f'<p class="muted">{escape(_what_ran(summary))}</p>',
        f"<h2>Verdicts on {escape(summary.treatment)}</h2>",
        _verdict_table(summary),
        "<p>A cell is the verdict on the paired runs of one task against one control, the mean "
        "difference (positive: treatment better) and the one-sided p-value of the exact "
        "sign-flip test, corrected by Holm over the tasks of its row, not over the rows.</p>",
        "<h2>All tasks together</h2>",
        _aggregates(summary),
        *(_picture(caption, file) for caption, file in pictures.items()),
        *(
            _task(name, task, summary.treatment, task_pictures.get(name, {}))
            for name, task in summary.tasks.items()
        ),
        "<h2>How this was computed</h2>",
        _method_notes(summary, command),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Arena {escape(summary.arena)}</title><style>{STYLESHEET}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def headline(summary: ArenaSummary) -> str:
    """The answer in one line, e.g. `esper: 5 WIN, 1 LOSE, 2 INCONCLUSIVE of 8 comparisons`."""
    verdicts = [v.verdict for v in summary.verdicts()]
    counts = [f"{verdicts.count(name)} {name}" for name in VERDICT_COLORS if name in verdicts]
    return f"{summary.treatment}: {', '.join(counts)} of {len(verdicts)} comparisons"


def markdown_verdicts(summary: ArenaSummary) -> str:
    """The verdicts as a Markdown table: controls down, tasks across."""
    tasks = list(summary.tasks)
    lines = [f"| against | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for control in summary.controls:
        cells = []
        for task in summary.tasks.values():
            verdict = task.verdicts.get(control)
            cells.append(
                "not applicable"
                if verdict is None
                else f"{verdict.verdict} {_difference(verdict)}".strip()
            )
        lines.append(f"| {control} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _what_ran(summary: ArenaSummary) -> str:
    methods = len(summary.controls) + 1
    pairs = ", ".join(sorted({str(t.pairs) for t in summary.tasks.values()}))
    runs = sum(m.arm.runs for t in summary.tasks.values() for m in t.methods.values())
    return (
        f"{methods} methods over {len(summary.tasks)} tasks, {pairs} pairs of random seeds each, "
        f"{runs} runs on {summary.device}; commit {(summary.commit or 'unknown')[:12]}; question "
        f"registered {summary.registered_at:%Y-%m-%d %H:%M} UTC before the first run, sha256 "
        f"{summary.registration_hash[:16]}."
    )


def _verdict_table(summary: ArenaSummary) -> str:
    rows = [
        [escape(f"against {control}"), *(_cell(t, control) for t in summary.tasks.values())]
        for control in summary.controls
    ]
    return _table(["", *(escape(name) for name in summary.tasks)], rows, kind="v")


def _cell(task: TaskResult, control: str) -> str:
    verdict = task.verdicts.get(control)
    if verdict is None:
        return f"<small>not applicable: {escape(task.absent[control])}</small>"
    color = VERDICT_COLORS[verdict.verdict]
    title = escape(" ".join([verdict.rule, *verdict.reasons]), quote=True)
    detail = f"{_difference(verdict)}, {deciding_p(verdict)}" if verdict.differences else ""
    return (
        f'<b style="color:{color}" title="{title}">{verdict.verdict}</b>'
        f"<small>{escape(detail)}</small>"
    )


def _difference(verdict: Verdict) -> str:
    return "" if verdict.mean_difference is None else f"{verdict.mean_difference:+.3g}"


def _aggregates(summary: ArenaSummary) -> str:
    if not summary.aggregates:
        reasons = [f"{n}: {t.no_scale_reason}" for n, t in summary.tasks.items() if not t.scale]
        return f'<p class="bad">No scores over tasks. {escape(" ".join(reasons))}</p>'
    ordered = sorted(summary.aggregates.items(), key=lambda item: -item[1].iqm)
    rows = [
        [
            escape(name), f"{a.iqm:z.3f}", f"{a.iqm_low:z.3f} to {a.iqm_high:z.3f}",
            f"{len(a.tasks)} of {len(summary.tasks)}", f"{a.treatment_iqm:z.3f}",
        ]
        for name, a in ordered
    ]  # fmt: skip
    heads = (
        "method", "IQM score", "95 % interval", "tasks",
        f"{escape(summary.treatment)} on the same tasks",
    )  # fmt: skip
    return _table(heads, rows, bold=summary.treatment)


def _task(name: str, task: TaskResult, treatment: str, pictures: Mapping[str, Path]) -> str:
    better = "higher" if task.higher_is_better else "lower"
    parts = [
        f"<h2>{escape(name)}</h2>",
        f"<p>Final {escape(words(task.metric))}, {better} is better, margin of equivalence "
        f"{task.margin:g}, {task.pairs} pairs. {escape(_scale(task))}</p>",
        _table(METHOD_HEADS, [_method_row(task, m) for m in task.methods], bold=treatment),
        *(
            f'<p class="muted">{escape(method)} does not apply: {escape(reason)}.</p>'
            for method, reason in task.absent.items()
        ),
        *(_picture(caption, file) for caption, file in pictures.items()),
        "<details><summary>Every verdict with its reasons</summary>",
        *(_reasons(v) for v in task.verdicts.values()),
        "</details>",
    ]
    return "\n".join(parts)


def _scale(task: TaskResult) -> str:
    if task.scale is None:
        return f"No scores: {task.no_scale_reason}"
    return f"Score 0 is {task.scale[0]:.4g}, score 1 is {task.scale[1]:.4g}."


def _method_row(task: TaskResult, name: str) -> list[str]:
    method = task.methods[name]
    arm = method.arm
    mflop = None if arm.train_flops_mean is None else arm.train_flops_mean / 1e6
    on = {"parameters": method.parameters_front, "FLOPs": method.flops_front}
    return [
        escape(name), _figure(arm.mean), _figure(arm.sd), _figure(arm.worst),
        _figure(method.score, ".3f"), _figure(arm.parameters_mean, ",.0f"),
        _figure(arm.steps, ",.0f"), _figure(mflop, ",.0f"), _figure(arm.train_seconds_mean, ".1f"),
        str(arm.collapsed), ", ".join(k for k, v in on.items() if v),
    ]  # fmt: skip


def _reasons(verdict: Verdict) -> str:
    items = "".join(f"<li>{escape(r)}</li>" for r in (verdict.rule, *verdict.reasons))
    return f"<p>{verdict.verdict} against {escape(verdict.control)}</p><ul>{items}</ul>"


def _method_notes(summary: ArenaSummary, command: str) -> str:
    notes = [
        "All methods of a task make the same number of optimizer steps on the same data, and grow "
        "within one parameter budget; parameters reached and training FLOPs, growing included, "
        "stand beside each result.",
        "A pair is one random seed of everything, run once with each method. Verdicts follow the "
        "exact sign-flip test at one-sided 0.025 and the margin of the task.",
        f"A score is linear in the metric: 0 is the mean of {summary.scale.zero}, 1 the better "
        f"mean of {', '.join(summary.scale.one)}; nothing is clipped. The bootstrap draws runs "
        "again within each task (2,000 times) and holds "
        "the scale fixed. Its intervals describe; they decide nothing.",
        "A run that collapsed is ranked worse than every run of its task that did not. It is "
        "never dropped, and its method is on no FLOP front, since it stopped early.",
    ]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul><p>To make it again: <code>{escape(command)}</code></p>"


def _figure(value: float | None, spec: str = ".4g") -> str:
    # rounding leaves a minus where nothing but a zero is left
    return "-" if value is None else format(value, f"z{spec}")


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "", bold: str = ""
) -> str:
    """An HTML table; cells are HTML already. `bold` is the first cell of a row to stress."""
    lines = ["".join(f"<th>{h}</th>" for h in heads)]
    for first, *others in rows:
        cells = "".join(f"<td>{c}</td>" for c in others)
        lines.append(f"<td>{first}</td>{cells}")
    stressed = [False, *(bool(bold) and row[0] == escape(bold) for row in rows)]
    body = "".join(
        f'<tr class="treatment">{line}</tr>' if stress else f"<tr>{line}</tr>"
        for line, stress in zip(lines, stressed, strict=True)
    )
    return f'<table class="{kind}">{body}</table>'


def _picture(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
