"""`esper regress`: the legacy way to compute against those that replace it, in one report.

`python -m esper.cli.regress --device cuda --report FILE` is the same for a machine without the
command line's libraries, Ray and MLflow.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from esper.config.base import ConfigError
from esper.evidence.records import CheckRecord
from esper.regress.suite import check_lines, checks, run_checks, write_report


def regress(
    quick: bool, device: str, only: list[str], report: Path, code: str | None = None
) -> bool:
    """Run the suite, print it, and store the report.

    Args:
        quick: Fewer generated cases and pairs.
        device: Where the numerics are computed.
        only: Checks to run; empty: all. A partial report is stored as such: gates that read
            what it lacks are inconclusive.
        report: JSON file; the text is put beside it.
        code: Commit of a copy of the sources without its checkout.

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
    measured = measured.model_copy(update={"commit": measured.commit or code})
    settings = f"{'quick' if quick else 'full'}, {device}{', partial' if only else ''}"
    text = write_report(report, measured, settings)
    failed = [check.name for check in measured.checks if check.problems]
    print(f"{len(failed)} of {len(measured.checks)} checks failed; report: {report}, {text}")
    return not failed


def _told(record: CheckRecord) -> None:
    print("\n".join(check_lines(record)), flush=True)


def main(arguments: Sequence[str]) -> int:
    """`esper regress` without typer."""
    parser = argparse.ArgumentParser(prog="python -m esper.cli.regress")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--commit")
    args = parser.parse_args(arguments)
    try:
        return 0 if regress(args.quick, args.device, args.only, args.report, args.commit) else 1
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
