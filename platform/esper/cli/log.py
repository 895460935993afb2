"""`esper log`: the decisions of a run, and where those of two runs part.

A run is the record of a finished trial (`esper run --json`, or a file in a sweep's `trials/`) or
the folder of a checkpoint (`esper run --checkpoint`).
"""

import json
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.config.base import ConfigError, validate

if TYPE_CHECKING:
    from esper.evidence.records import TransitionRecord, TrialRecord

# equal decisions shown on either side of a difference
CONTEXT = 3


def show(run: Path) -> None:
    """Print every decision of a run with its reason."""
    for t in read_log(run):
        print(f"{_decision(t)}  {t.reason}".rstrip())


def diff(first: Path, second: Path) -> bool:
    """Print where two runs part and their decisions side by side.

    Two decisions are equal if interval, step, seed, action, stages and blueprint are; reasons are
    for people, and may differ in a digit.

    Returns:
        Whether all decisions are equal.
    """
    logs = read_log(first), read_log(second)
    texts = [_decision(t) for t in logs[0]], [_decision(t) for t in logs[1]]
    if texts[0] == texts[1]:
        print(f"equal: {len(texts[0])} decisions")
        return True
    parted = next(
        (i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]),
        min(map(len, texts)),
    )
    print(f"the runs part at decision {parted + 1}:")
    for name, log in zip((first, second), logs, strict=True):
        line = f"{_decision(log[parted])}  {log[parted].reason}" if parted < len(log) else "(end)"
        print(f"  {name}: {line.rstrip()}")
    print()
    _side_by_side(*logs)
    return False


def read_log(run: Path) -> "Sequence[TransitionRecord]":
    """The growth log of a record or of a checkpoint.

    Raises:
        ConfigError: If the file is no record.
        CheckpointError: If the folder is no checkpoint.
    """
    if not run.is_dir():
        return read_trial(run).transitions
    from esper.surgery.checkpoint_folder import read_manifest

    return [_record(line) for line in read_manifest(run)["lattice"]["log"]]


def read_trial(file: Path) -> "TrialRecord":
    """The record of a finished trial, also one that `esper run --json` wrote.

    Raises:
        ConfigError: If the file is no record.
    """
    from esper.evidence.records import TrialRecord

    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            str(file), (f"the file must be a trial's record, but: {error}",)
        ) from None
    if isinstance(content, dict):
        content.pop("mlflow_run_id", None)
    return validate(TrialRecord, content, source=str(file))


def _record(line: dict[str, Any]) -> "TransitionRecord":
    """A line of a checkpoint's log, by names alone: its plug-ins need not be installed here."""
    from esper.evidence.records import TransitionRecord

    before, after = line["before"], line["after"]
    named = after if after["blueprint"] != "noop" else before
    return TransitionRecord(
        interval=line["interval"],
        step=line["step"],
        site=line["fields"]["site"],
        seed=line["fields"]["seed"],
        action=line["action"],
        before=before["stage"],
        after=after["stage"],
        blueprint=named["blueprint"],
        reason=line["fields"]["reason"],
    )


def _decision(t: "TransitionRecord") -> str:
    return (
        f"interval {t.interval}, step {t.step}: {t.action} {t.site}:{t.seed} "
        f"{t.before} -> {t.after} ({t.blueprint})"
    )


def _side_by_side(
    first: "Sequence[TransitionRecord]", second: "Sequence[TransitionRecord]"
) -> None:
    """Rows of both logs; runs of equal decisions are cut short."""
    left, right = ([_decision(t) for t in log] for log in (first, second))
    width = max(map(len, map(_short, first)), default=0)
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    for tag, a, b, c, d in blocks:
        rows = list(zip_longest(map(_short, first[a:b]), map(_short, second[c:d]), fillvalue=""))
        if tag == "equal" and len(rows) > 2 * CONTEXT:
            cut = len(rows) - 2 * CONTEXT
            rows[CONTEXT:-CONTEXT] = [(f"... {cut} equal", f"... {cut} equal")]
        mark = " " if tag == "equal" else "|"
        for one, other in rows:
            print(f"{one:<{width}} {mark} {other}".rstrip())


def _short(t: "TransitionRecord") -> str:
    return f"{t.interval:>4} {t.site}:{t.seed} {t.action} {t.after}"
