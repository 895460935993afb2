"""`esper regress`: the legacy way to compute against those that replace it, in one report."""

from pathlib import Path

import torch

from esper.config.base import ConfigError
from esper.evidence.records import CheckRecord
from esper.regress.suite import check_lines, checks, run_checks, write_report


def regress(quick: bool, device: str, only: list[str], report: Path) -> bool:
    """Run the suite, print it, and store the report.

    Args:
        quick: Fewer generated cases and pairs.
        device: Where the numerics are computed.
        only: Checks to run; empty: all. A partial report is stored as such: gates that read
            what it lacks are inconclusive.
        report: JSON file; the text is put beside it.

    Returns:
        Whether everything passed.

    Raises:
        ConfigError: If a check is unknown or the device cannot be used.
    """
    suite = checks(quick=quick, device=device)
    if unknown := [name for name in only if name not in suite]:
        raise ConfigError("--only", (
            f"checks must be among {', '.join(suite)}, but got '{unknown[0]}'.",
        ))  # fmt: skip
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("--device", (f"'{device}' cannot be used here: {error}.",)) from error
    chosen = {name: suite[name] for name in only} if only else suite
    measured = run_checks(chosen, _told)
    if only:
        # a part of the suite says nothing of the whole
        quantities = {k: v for k, v in measured.quantities.items() if k != "regression_failures"}
        measured = measured.model_copy(update={"quantities": quantities})
    settings = f"{'quick' if quick else 'full'}, {device}{', partial' if only else ''}"
    text = write_report(report, measured, settings)
    failed = [check.name for check in measured.checks if check.problems]
    print(f"{len(failed)} of {len(measured.checks)} checks failed; report: {report}, {text}")
    return not failed


def _told(record: CheckRecord) -> None:
    print("\n".join(check_lines(record)), flush=True)
