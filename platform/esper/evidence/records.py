"""Evidence: what every finished trial leaves on disk, from which any verdict is computed again."""

import math
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from esper.atomic import write_atomically
from esper.config.base import content_hash
from esper.config.run import Execution
from esper.config.sweep import Question

REGISTRATION = "registration.json"  # the name of its file in the folder of a sweep or an arena

R = TypeVar("R", bound="Record")


class EvidenceError(ValueError):
    """Stored evidence cannot be used: it is damaged, or answers another question."""


class Record(BaseModel):
    """A frozen record; NaN and infinity survive the JSON round trip as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class TransitionRecord(Record):
    """One line of the growth log."""

    interval: int
    step: int
    site: str
    seed: int
    action: str = Field(description="Name of the action, e.g. 'Germinate'.")
    before: str = Field(description="Stage name, e.g. 'DORMANT'.")
    after: str
    blueprint: str
    reason: str


class FlagsRecord(Record):
    """The flags that were in force in one interval, and what they chose."""

    hash: str = Field(description="Of the snapshot, as `esper flags list` prints it.")
    execution: Execution
    grows: bool = Field(description="Whether new seeds could be woken.")
    policies: tuple[str, ...] | None = Field(
        None, description="Flags of controllers that were on; None: the run's settings applied."
    )


class Fingerprint(Record):
    """What the trial ran on; equal fingerprints may be compared."""

    code_hash: str = Field(description="sha256 over the sources of the four packages.")
    commit: str | None = Field(description="Commit of the checkout; None outside a checkout.")
    versions: dict[str, str]
    device: str = Field(description="Name of the CPU or GPU model.")


class TrialRecord(Record):
    """One arm of one pair, finished or collapsed; never dropped."""

    trial_id: str = Field(description="'<arm>-<pair:03d>'")
    arm: str
    pair: int
    seed: int = Field(description="Random seed of everything in this trial.")
    order: int = Field(description="Place of this arm in the random order of its pair.")
    registration_hash: str
    fingerprint: Fingerprint
    started_at: datetime
    ended_at: datetime
    status: Literal["finished", "collapsed"]
    collapse_reason: str | None = None
    metrics: dict[str, float] = Field(
        description="Final values; among them 'parameters', 'steps', 'train_flops', "
        "'train_seconds' and the task's own, e.g. 'test_accuracy'. "
        "A collapsed trial has NaN for the task's own metrics."
    )
    curves: dict[str, list[float]] = Field(
        description="One list a metric, all as long as 'step': one value an interval."
    )
    flags: list[FlagsRecord] | None = Field(
        None,
        description="What ruled each interval, one a point of the curves; None: no flags were "
        "read, in a run that names none.",
    )
    reference_ms: float | None = Field(
        None,
        exclude_if=lambda ms: ms is None,
        description="A workload that never changes, before and after the trial, in a sweep that "
        "judges times.",
    )
    outputs: list[list[float]] | None = Field(
        None,
        exclude_if=lambda outputs: outputs is None,
        description="What the trained network says of the first held-out rows, where the run keeps "
        "them (`kept_outputs`) and finished: numbers of fp32.",
    )
    transitions: list[TransitionRecord]
    sites: dict[str, int] = Field(description="Number of seeds of each lattice site.")


class CheckRecord(Record):
    """One check of the regression suite."""

    name: str
    layer: str = Field(description="'exact', 'numerics', 'rules' or 'training'.")
    problems: tuple[str, ...] = Field(description="What does not hold; empty: passed.")
    cases: int = Field(description="Comparisons made.")
    notes: tuple[str, ...]
    seconds: float


class Registration(Record):
    """The question, written down and hashed before the first trial runs."""

    sweep: str
    config_hash: str
    question: Question
    pairs: int
    arms: list[str]
    fingerprint: Fingerprint
    registered_at: datetime
    registration_hash: str = Field(
        description="sha256 of sweep, config_hash, question, pairs and arms."
    )

    def digest(self) -> str:
        """What `registration_hash` must be."""
        return canonical_hash(self, "sweep", "config_hash", "question", "pairs", "arms")


def write_json(path: Path, record: BaseModel) -> None:
    """Write a record atomically."""
    write_text(path, record.model_dump_json(indent=1))


def write_text(path: Path, text: str) -> None:
    """Write atomically: readers see the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8"))


def read_json(path: Path, kind: type[R], *, remedy: str) -> R:
    """Read what `write_json` wrote.

    Args:
        path: The file.
        kind: What it must hold.
        remedy: What to do about a damaged file, for the error.

    Raises:
        EvidenceError: If it is damaged.
        OSError: If it cannot be read.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvidenceError(
            f"{path} must be a {kind.__name__}, but is damaged: {error}; {remedy}."
        ) from error


def read_records(folder: Path) -> list[TrialRecord]:
    """All trial records of a sweep folder's `trials/`, sorted by arm and pair.

    Raises:
        EvidenceError: If a file is damaged; it is named, and nothing is skipped.
    """
    records = [
        read_json(path, TrialRecord, remedy="delete the file to run that trial again")
        for path in sorted((folder / "trials").glob("*.json"))
    ]
    return sorted(records, key=lambda r: (r.arm, r.pair))


def is_collapsed(value: float) -> bool:
    """NaN and infinities mark a run that collapsed."""
    return not math.isfinite(value)


def canonical_hash(record: BaseModel, *fields: str) -> str:
    """sha256 of the given fields as canonical JSON."""
    return content_hash(record.model_dump(mode="json", include=set(fields)))
