"""The whole suite: every check, timed, and one report that gates can read."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from esper.environment import commit, is_dirty, versions
from esper.evidence.records import CheckRecord, write_json, write_text
from esper.regress import compiled, exact, kernels, numerics, rules, shield, training
from esper.regress.finding import Finding
from esper.release.judge import PhaseMeasurements
from esper.release.phases import Quantity

Check = Callable[[], Finding]


def checks(*, quick: bool, device: str) -> dict[str, tuple[str, Check]]:
    """Name to layer and check; where there is no Triton, there are no kernels to check.

    Args:
        quick: For every push: fewer cases of what is generated or trained.
        device: Where the numerics are computed; on a CPU, kernels are interpreted.
    """
    examples, cases, runs, pairs = (100, 5, 2, 6) if quick else (1_500, 100, 16, 16)
    sizes = (1, 7, 64) if quick else (1, 7, 64, 1024)
    suite: dict[str, tuple[str, Check]] = {
        "transitions": ("exact", lambda: exact.transitions(100_000)),
        "commanded_lattice": (
            "exact", lambda: exact.commanded_lattice(5_000 if quick else 50_000),
        ),
        "legacy_stages": ("exact", exact.legacy_stages),
        "streams": ("exact", lambda: exact.streams(10_000 if quick else 100_000)),
        "decisions": ("exact", lambda: exact.decisions(runs)),
        "dormant": ("exact", exact.dormant),
        "rollback": ("exact", exact.rollback),
        "shapes": ("numerics", lambda: numerics.shapes(examples, device)),
        "outputs": ("numerics", lambda: numerics.outputs(sizes, device)),
        "laws": ("numerics", lambda: numerics.laws(cases, device)),
        "kernels": ("numerics", lambda: kernels.kernels(device, quick=quick)),
        "recompilations": ("exact", lambda: compiled.recompilations(device)),
        "vetoes": ("exact", lambda: shield.vetoes(runs)),
        "flags": ("rules", lambda: rules.flags(20_000 if quick else 1_000_000)),
        "false_wins": ("rules", lambda: rules.false_wins(2_000 if quick else 10_000)),
        "equivalence": ("training", lambda: training.equivalence(pairs)),
    }  # fmt: skip
    if find_spec("triton") is None:
        del suite["kernels"]
    return suite


def run_checks(
    chosen: Mapping[str, tuple[str, Check]], told: Callable[[CheckRecord], None]
) -> PhaseMeasurements:
    """Run checks one after another.

    A check that raises has failed, and measured nothing: what it should have measured is missing
    from the report, so that no gate takes it for 0.

    Args:
        chosen: From `checks`.
        told: Told of each as it ends.
    """
    records, quantities = list[CheckRecord](), dict[str, Quantity]()
    for name, (layer, check) in chosen.items():
        started = time.perf_counter()
        try:
            found = check()
        except Exception as error:
            found = Finding((f"{type(error).__name__}: {error}",), 0)
        problems = found.problems or (() if found.cases else ("nothing was compared",))
        record = CheckRecord(
            name=name, layer=layer, problems=problems, cases=found.cases, notes=found.notes,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        records.append(record)
        told(record)
        quantities |= {
            name: Quantity(value=value, unit=unit)
            for name, (value, unit) in found.quantities.items()
        }
    failures = sum(bool(r.problems) for r in records)
    quantities["regression_failures"] = Quantity(value=failures, unit="count")
    return PhaseMeasurements(
        commit=commit(), ended_at=datetime.now(UTC), quantities=quantities, checks=tuple(records)
    )


def write_report(path: Path, measured: PhaseMeasurements, settings: str) -> Path:
    """Write the report as JSON and, beside it, as text; returns the latter's path."""
    write_json(path, measured)
    text = path.with_suffix(".txt")
    write_text(text, "\n".join(report_lines(measured, settings)) + "\n")
    return text


def report_lines(measured: PhaseMeasurements, settings: str) -> list[str]:
    """The report for people."""
    dirty = {True: ", with changes", False: "", None: ""}[is_dirty()]
    used = ", ".join(f"{k} {v}" for k, v in versions().items() if k in ("torch", "triton"))
    lines = [
        f"regression suite, {settings}; commit {measured.commit}{dirty}; {used}; "
        f"{measured.ended_at:%Y-%m-%d %H:%M} UTC",
    ]
    for record in measured.checks:
        lines += check_lines(record)
        lines += [f"      {note}" for note in record.notes]
    lines += [f"{name} = {q.value:g} {q.unit}" for name, q in sorted(measured.quantities.items())]
    return lines


def check_lines(record: CheckRecord) -> list[str]:
    """One check in a line, and a line for each problem."""
    verdict = "FAILED" if record.problems else "passed"
    head = (
        f"{verdict}  {record.layer:>8}  {record.name:<18} {record.cases:>7} cases  "
        f"{record.seconds:6.1f} s"
    )
    return [head, *(f"      {problem}" for problem in record.problems)]
