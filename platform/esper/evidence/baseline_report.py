"""A baseline as one readable report: sections of text and tables, as markdown or as a web page."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.evidence.baseline import Baseline
from esper.evidence.baseline_stats import (
    P99_REQUESTS,
    REPETITIONS,
    Comparison,
    Effect,
    Noise,
    Outcome,
    drift,
    effects,
    health,
    level,
    margin_of,
    noise,
    quantities,
)
from esper.evidence.measure import Measured
from esper.evidence.paired import ALPHA

STATS = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "over_limit_percent", "throughput")
RULE = (
    "BETTER and WORSE: exact sign-flip over the block pairs, one-sided .025 after Holm over all "
    "rows. WITHIN MARGIN: not worse than the margin, one-sided .05. Anything else is INCONCLUSIVE, "
    "which is not a pass."
)


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and a table with or without rows."""

    title: str
    text: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def report(baseline: Baseline) -> list[Section]:
    """Everything that a baseline says."""
    config = baseline.plan.config
    names = config.implementations
    sections = [_origin(baseline), _health(baseline)]
    sections += [_levels(baseline, name) for name in names]
    sections.append(_other(baseline))
    for new in names[1:]:
        sections.append(_effects(new, names[0], effects(baseline, new, names[0])))
    sections += [_noise(noise(baseline, name), config.blocks) for name in names]
    sections.append(_absent(baseline))
    return sections


def comparison(
    old: Baseline, new: Baseline, judged: Sequence[Comparison], reasons: Sequence[str]
) -> list[Section]:
    """What a comparison of two stored baselines says."""
    text = [
        f"{_commit(old)} of {old.ended_at:%Y-%m-%d %H:%M} against {_commit(new)} of "
        f"{new.ended_at:%Y-%m-%d %H:%M}, on {old.plan.machine.device}.",
        f"The reference workload changed by {drift(old, new):+.1%} from one to the other. The two "
        "were not interleaved, so that every difference holds what the machine did in between.",
        *_versions(old, new),
        *_unknown(old, judged),
        *(f"UNHEALTHY: {reason}" for reason in reasons),
    ]
    sections = [Section("Two baselines", tuple(text))]
    sections += [_effects(c.implementation, "before", c.effects) for c in judged]
    return sections


def _unknown(old: Baseline, judged: Sequence[Comparison]) -> list[str]:
    """What would be judged, had anybody measured it."""
    told = {(c.implementation, e.metric) for c in judged for e in c.effects}
    lacking = [
        m
        for c in judged
        for m, found in old.of(c.implementation)[0].metrics.items()
        if margin_of(m) is not None and found.value is None and (c.implementation, m) not in told
    ]
    if not lacking:
        return []
    return [
        f"{len(lacking)} judged metrics are absent from both, and nothing is said about them: "
        f"{', '.join(sorted(set(lacking)))}."
    ]


def _versions(old: Baseline, new: Baseline) -> list[str]:
    a, b = old.plan.machine.versions, new.plan.machine.versions
    changed = [f"{k} {a.get(k)} and {b.get(k)}" for k in a | b if a.get(k) != b.get(k)]
    return [f"Libraries differ: {'; '.join(changed)}."] if changed else []


def markdown(sections: Sequence[Section], title: str) -> str:
    """The report as markdown."""
    lines = [f"# {title}", ""]
    for s in sections:
        lines += [f"## {s.title}", ""]
        for paragraph in s.text:
            lines += [paragraph, ""]
        if s.rows:
            lines += [_row(s.head), "|" + "---|" * len(s.head), *map(_row, s.rows), ""]
    return "\n".join(lines)


def page(sections: Sequence[Section], title: str) -> str:
    """The report as a web page of its own."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title>",
        "<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}"
        "th,td{border:1px solid #ccc;padding:.2em .6em;text-align:right;"
        "font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for s in sections:
        parts.append(f"<h2>{html.escape(s.title)}</h2>")
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in s.text]
        if s.rows:
            parts += ["<table>", _cells("th", s.head), *(_cells("td", r) for r in s.rows)]
            parts.append("</table>")
    return "\n".join([*parts, "</html>\n"])


def write(path: Path, sections: Sequence[Section], title: str) -> None:
    """Write a report; the ending of the name says which form, `.html` or markdown."""
    from esper.evidence.records import write_text

    form = page if path.suffix == ".html" else markdown
    write_text(path, form(sections, title))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"


def _commit(baseline: Baseline) -> str:
    commit, dirty = baseline.plan.commit, baseline.plan.dirty_hash
    name = f"commit {commit[:12]}" if commit else "an unknown commit"
    return f"{name} with changes {dirty[:12]}" if dirty else name


def _origin(baseline: Baseline) -> Section:
    plan, config = baseline.plan, baseline.plan.config
    w, m = config.workload, baseline.plan.machine
    clocks = [
        f"{what} up to {mhz:,.0f} MHz" if mhz else f"clock of the {what} not readable"
        for what, mhz in (("CPU", m.max_cpu_mhz), ("GPU", m.max_sm_mhz))
        if what == "CPU" or m.driver
    ]
    versions = ", ".join(f"{k} {v}" for k, v in m.versions.items())
    requests = "; ".join(
        f"{name} {r.forward:,} forward and {r.step:,} training"
        for name, r in config.requests.items()
    )
    text = (
        f"{w.layers} linear layer{'s' * (w.layers > 1)} of width {w.width:,} with "
        f"{w.seeds_per_layer:,} seeds each, {w.active_seeds:,} of them active ({w.blueprint}), "
        f"{w.dtype}, {w.positions:,} row{'s' * (w.positions > 1)} a sample; "
        f"batch sizes {', '.join(map(str, w.batch_sizes))}.",
        f"{config.blocks} blocks of fresh processes in random order; "
        + ", ".join(f"{n} against itself in {k}" for n, k in config.control_blocks.items())
        + f". Requests a process and batch size: {requests}.",
        f"Measured {plan.registered_at:%Y-%m-%d %H:%M} to {baseline.ended_at:%H:%M} UTC, "
        f"{_commit(baseline)}, code {m.code_hash[:12]}, configuration {plan.config_hash[:12]}.",
        f"{m.device}; {m.num_cpus} CPUs ({m.cpu}), {m.threads} thread{'s' * (m.threads > 1)}, "
        f"{m.memory_bytes / 2**30:.1f} GiB; {', '.join(clocks)}"
        + (f"; driver {m.driver}, CUDA {m.cuda}" if m.driver else "")
        + f". {versions}.",
    )
    return Section("What was measured", text)


def _health(baseline: Baseline) -> Section:
    reasons = health(baseline)
    refs = [a.metrics["reference_ms"].value or 0.0 for a in baseline.arms]
    loops = [x for a in baseline.arms for x in a.loops]
    unsteady = sum(not x.is_steady for x in loops)
    text = (
        "Healthy: nothing below is called into question."
        if not reasons
        else "UNHEALTHY: no verdict below counts. " + " ".join(reasons),
        f"Reference workload over all processes: {min(refs):.3f} to {max(refs):.3f} ms, median "
        f"{statistics.median(refs):.3f} ms. In {unsteady} of {len(loops)} series the warm-up "
        "reached its limit before three windows agreed.",
    )
    return Section("Health", text)


def _levels(baseline: Baseline, implementation: str) -> Section:
    rows = []
    for mode, sizes in baseline.plan.config.workload.loops.items():
        for batch in sizes:
            cells = [
                tell(level(baseline, implementation, f"{mode}_b{batch}_{stat}"), short=True)
                for stat in STATS
            ]
            rows.append((mode, str(batch), *cells))
    text = (
        "Median over the processes with its 95 % order-statistic interval. step: forward, backward "
        "and optimizers. Throughput: requests back to back.",
    )
    head = (
        "request", "batch", "mean ms", "P50 ms", "P95 ms", "P99 ms", "% over the limit",
        "samples/s",
    )  # fmt: skip
    return Section(implementation, text, head, tuple(rows))


def tell(m: Measured, *, short: bool = False) -> str:
    """A quantity as text."""
    if m.value is None:
        return "absent" if short else f"absent: {m.why}"
    text = number(m.value)
    if m.low is not None and m.high is not None:
        text += f" [{number(m.low)}, {number(m.high)}]"
    return text if short or m.unit in ("1", "count") else f"{text} {m.unit}"


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is readable."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.3g}"


def _other(baseline: Baseline) -> Section:
    rows = []
    timed = tuple(f"_{stat}" for stat in STATS)
    names = baseline.plan.config.implementations
    metrics = [m for m in baseline.arms[0].metrics if not m.endswith(timed)]
    known = {m for a in baseline.arms for m in a.metrics}
    for metric in (m for m in metrics if m in known):
        levels = [level(baseline, name, metric) for name in names]
        if any(x.value is not None for x in levels):
            rows.append((metric, levels[0].unit, *(tell(x, short=True) for x in levels)))
    text = ("A metric without a value anywhere is listed further below with the reason.",)
    return Section("Memory, utilisation and seeds", text, ("metric", "unit", *names), tuple(rows))


def _effects(new: str, old: str, judged: Sequence[Effect]) -> Section:
    counts = {o: sum(e.outcome is o for e in judged) for o in Outcome}
    tested = [e for e in judged if e.p_better is not None]
    text = [
        ", ".join(f"{n} {o}" for o, n in counts.items() if n) + f", of {len(judged)} metrics.",
        RULE,
    ]
    blocks = max((e.blocks for e in tested), default=0)
    if tested and len(tested) * 0.5**blocks > ALPHA:
        text.append(
            f"With {blocks} pairs and {len(tested)} metrics no p-value can pass Holm: "
            "BETTER and WORSE are out of reach."
        )
    head = ("metric", "old", "new", "change", "95 % interval", "p better", "p worse", "verdict")
    rows = tuple(
        (
            e.metric,
            *("" if x is None else number(x) for x in (e.old, e.new)),
            "" if e.change is None else _change(e, e.change),
            "" if e.low is None or e.high is None
            else f"{_change(e, e.low)} to {_change(e, e.high)}",
            *("" if p is None else f"{p:.2g}" for p in (e.p_better, e.p_worse)),
            f"{e.outcome}{f' ({e.why})' if e.why else ''}",
        )
        for e in judged
    )  # fmt: skip
    return Section(f"{new} against {old}", tuple(text), head, rows)


def _change(effect: Effect, value: float) -> str:
    if effect.metric.endswith("over_limit_percent"):
        return f"{value:+.2f} points"
    return f"{value:+.1%}"


def _noise(n: Noise, blocks: int) -> Section:
    text = [
        f"{n.pairs} pairs of fresh processes of {n.implementation} with itself, {n.metrics} "
        f"metrics: {n.alarms} alarms (BETTER or WORSE) in these pairs.",
    ]
    if n.family_rate is not None:
        text.append(
            f"False alarms of a whole baseline of {blocks} pairs: {n.family_rate:.1%} "
            f"[{n.family_low:.1%}, {n.family_high:.1%}] have any, after Holm; single uncorrected "
            f"two-sided tests at 5 %: {n.single_rate:.1%}. From {REPETITIONS} baselines drawn out "
            "of these pairs with replacement, each with a random sign for all of its metrics. That "
            "tests the rule on this noise; it supposes that pairs do not depend on each other."
        )
    text.append(
        f"Smallest visible effect: what {blocks} pairs find with power .9 in one test at one-sided "
        f".025, were the spread that of {n.implementation} against itself. The correction for "
        "many metrics asks for more."
    )
    rows = tuple((m, f"{change:.2%}") for m, change in n.smallest.items())
    return Section(f"A/A: {n.implementation}", tuple(text), ("metric", "smallest change"), rows)


def _absent(baseline: Baseline) -> Section:
    """Every quantity without a value, and why."""
    rows = []
    for name in baseline.plan.config.implementations:
        for metric in baseline.of(name)[0].metrics:
            m = level(baseline, name, metric)
            if m.value is None:
                rows.append((name, metric, str(m.why)))
    together: dict[tuple[str, str], list[str]] = {}
    for name, metric, why in rows:
        together.setdefault((name, why), []).append(metric)
    lines = [(name, ", ".join(metrics), why) for (name, why), metrics in together.items()]
    lines += [
        ("both", k, str(m.why))
        for k, m in (baseline.facts | baseline.lifecycle).items()
        if m.value is None
    ]
    text = (f"P99 is judged from {P99_REQUESTS:,} requests a process on.",)
    return Section("Not measured", text, ("of", "quantity", "why"), tuple(lines))


def summary_section(baseline: Baseline) -> Section:
    """The quantities that targets are held against."""
    rows = tuple((k, tell(m)) for k, m in quantities(baseline).items())
    text = ("A latency is that of the batch size where it is worst; a speed-up the smallest.",)
    return Section("Quantities", text, ("quantity", "value"), rows)
