"""Render measured JSON as markdown, goals beside values, so that no number is typed by hand.

Usage: python kernels/benchmarks/report.py docs/benchmarks/*.json [--into PAGE]

With `--into`, what stands between the page's markers is replaced; without, it is printed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from goals import GOALS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SCHEMA = 1

Document = dict[str, Any]
Row = dict[str, Any]


def main() -> int:
    """Print the report, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="page whose measured part is replaced")
    args = parser.parse_args()
    documents = [read(path) for path in args.files]
    text = render(documents)
    if args.into is None:
        print(text)
    else:
        page = args.into.read_text(encoding="utf-8")
        args.into.write_text(replaced(page, text), encoding="utf-8")
    return 0


def read(path: Path) -> Document:
    """One file of measurements.

    Raises:
        ValueError: If the file is of another schema.
    """
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(
            f"schema of {path} must be {SCHEMA}, but got {document.get('schema')}; measure again."
        )
    return document | {"file": path.name}


def replaced(page: str, text: str) -> str:
    """The page with `text` between its markers.

    Raises:
        ValueError: If the page has no markers.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page must hold the markers {BEGIN} and {END}; add them.")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def render(documents: Sequence[Document]) -> str:
    """Everything: where it was measured, goals beside values, all rows."""
    parts = [_smoke_warning(documents), _origins(documents), goals_table(documents)]
    for document in documents:
        parts += _seed_tables(document) if document["benchmark"] == "seeds" else []
        parts += _model_tables(document) if document["benchmark"] == "models" else []
    return "\n\n".join(part for part in parts if part)


def goals_table(documents: Sequence[Document]) -> str:
    """One line for each goal: what was measured, and whether that reaches it."""
    # a smoke test reaches no goal, whatever it measured
    rows = [row for d in documents if not d.get("smoke") for row in d["rows"]]
    lines = []
    for goal in GOALS:
        measured = goal.measure(rows)
        lines.append((goal.quantity, goal.probe, goal.goal, *(measured or ("not measured", ""))))
    return table(("quantity", "probe", "goal", "measured", "reached"), lines)


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    texts = [" | ".join(str(cell) for cell in line) for line in lines]
    rule = "|".join("---" for _ in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {text} |" for text in texts)])


def _smoke_warning(documents: Sequence[Document]) -> str:
    if any(document.get("smoke") for document in documents):
        return "**These are smoke tests of the scripts: the times mean nothing.**"
    return ""


def _origins(documents: Sequence[Document]) -> str:
    lines = []
    for d in documents:
        versions = ", ".join(f"{name} {version}" for name, version in d["versions"].items())
        device = f"{d['device']['name']}, driver {d['device']['driver'] or 'unknown'}"
        ceilings = ", ".join(f"{k} {v}" for k, v in d.get("ceilings", {}).items())
        lines += [
            f"* `{d.get('file', d['benchmark'])}`: `{d['command']}`, {d['date']}, "
            f"commit {d['commit'] or 'unknown'}; {device}; {versions}."
            + (f" Tests before: {d['tests']}." if "tests" in d else "")
            + (f" Ceilings of the run: {ceilings}." if ceilings else "")
        ]
    return "\n".join(lines)


def _seed_tables(document: Document) -> list[str]:
    parts = []
    for mode in dict.fromkeys(row["mode"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["mode"] == mode]
        head = (
            "case", "provider", "cold p20 / p50 / p80 us", "graph p20 / p50 / p80 us", "MB",
            "GFLOP", "share of the limit", "time in copies", "launches", "error",
        )  # fmt: skip
        parts += [f"### {mode}", table(head, [_seed_line(row) for row in rows])]
    return parts


def _seed_line(row: Row) -> tuple[object, ...]:
    case = f"T {row['T']:,}, S {row['S']:,}, C {row['C']:,}, H {row['H']:,}, {row['phi']}"
    case += f", {row['active']} awake, {row['dtype']}"
    case += f", {row['isolated']} isolated" if row["isolated"] else ""
    case += "" if row["observe"] else ", no statistics"
    if "cold_us" not in row:
        why = f"failed: {row['failed']}" if "failed" in row else row["skipped"]
        return case, row["provider"], why.replace("|", "/"), *[""] * 7
    share = f"{_best(row, 'share'):.2f} ({row['bound']})"
    provider = row["provider"] + (f" ({row['kernel']})" if "kernel" in row else "")
    return (
        case, provider, _quantiles(row["cold_us"]), _quantiles(row.get("graph_us")),
        f"{row['bytes'] / 1e6:,.1f}", f"{row['flops'] / 1e9:,.2f}", share,
        f"{_best(row, 'copies'):.2f}", row.get("launches", "unknown"), f"{row['error_norm']:.1e}",
    )  # fmt: skip


def _model_tables(document: Document) -> list[str]:
    titles = {
        "layers": "Six layers of width 4,096",
        "gpt": "A GPT of 124M parameters",
        "call": "One layer called from Python",
    }
    parts = []
    for part in dict.fromkeys(row["part"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["part"] == part]
        keys = list(dict.fromkeys(key for row in rows for key in row if key != "part"))
        lines = [[_cell(row.get(key, "")) for key in keys] for row in rows]
        parts += [f"### {titles.get(part, part)}", table(keys, lines)]
    return parts


def _best(row: Row, what: str) -> float:
    return float(row[f"{what}_graph"] if f"{what}_graph" in row else row[f"{what}_cold"])


def _quantiles(times: dict[str, float] | None) -> str:
    return " / ".join(f"{times[q]:,.1f}" for q in ("p20", "p50", "p80")) if times else ""


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{value[q]:,.4g}" for q in ("p20", "p50", "p80") if q in value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
