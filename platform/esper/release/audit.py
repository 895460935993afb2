"""The record of every change of a flag: one JSON line each, only ever appended, chained by hashes.

Each record holds the hash of the one before it, so that a line which was edited, removed or put in
between is found. Removing lines from the end is found by comparing with the file of flags, whose
hash the last record holds. A last line without its newline is a write that never completed: its
change was not made either, and the next change takes it away.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from esper.evidence.records import Record
from esper.release.errors import ReleaseError

FIRST = "0" * 64

Action = Literal["set", "advance", "rollback", "accept", "abandoned"]


class AuditError(ReleaseError):
    """The record does not hold together."""


class AuditRecord(Record):
    """One change."""

    number: int
    at: datetime
    actor: str
    action: Action
    flag: str | None
    before: dict[str, Any]
    after: dict[str, Any]
    reason: str
    file_before: str
    file_after: str
    previous: str
    hash: str


class AuditLog(NamedTuple):
    """What is on disk: the records, and how many bytes they take without a torn last line."""

    records: tuple[AuditRecord, ...]
    size: int
    is_torn: bool


def audit_path(flags: Path) -> Path:
    """Where the changes of a file of flags are recorded: beside it."""
    return flags.with_suffix(".audit.jsonl")


def digest(content: bytes) -> str:
    """sha256 (hex) of a file's content."""
    return hashlib.sha256(content).hexdigest()


def parse_audit(content: bytes, source: str) -> AuditLog:
    """Read and verify a record.

    Raises:
        AuditError: At the first line that does not fit the one before it.
    """
    whole = content[: content.rfind(b"\n") + 1]
    records: list[AuditRecord] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        record = _record(line, f"{source}, line {number},")
        previous = records[-1].hash if records else FIRST
        if (record.number, record.previous) != (number, previous):
            raise AuditError(
                f"{source}, line {number}, must follow the line before it, but does not: a line "
                "was removed, added or moved; restore the file from version control."
            )
        records.append(record)
    return AuditLog(tuple(records), len(whole), len(whole) < len(content))


def _record(line: bytes, where: str) -> AuditRecord:
    try:
        record = AuditRecord.model_validate_json(line)
    except ValidationError:
        record = None
    if record is None or line != _line(record) or record.hash != _hash(record):
        raise AuditError(
            f"{where} must be as it was written, but was changed; "
            "restore the file from version control."
        )
    return record


def _line(record: AuditRecord) -> bytes:
    return json.dumps(record.model_dump(mode="json"), sort_keys=True).encode()


def _hash(record: AuditRecord) -> str:
    content = record.model_dump(mode="json", exclude={"hash"})
    return digest(json.dumps(content, sort_keys=True).encode())


def read_audit(path: Path) -> AuditLog:
    """The verified record of a file; empty if nothing was ever changed.

    Raises:
        AuditError: If it was tampered with.
    """
    content = path.read_bytes() if path.exists() else b""
    return parse_audit(content, str(path))


def require_current(log: AuditLog, content: bytes, flags: Path) -> None:
    """Check that the file of flags is the one that the last change left.

    Raises:
        AuditError: If it was changed by hand, the record lost its end, or a change was recorded
            and never made.
    """
    if log.records and log.records[-1].file_after != digest(content):
        raise AuditError(
            f"{flags} must be as the last record left it, but is not; if it was changed by hand "
            "on purpose: esper flags audit --accept REASON."
        )


class AuditWriter:
    """The record while it is locked: nobody else appends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> AuditLog:
        """The verified record.

        Raises:
            AuditError: If it was tampered with.
        """
        return read_audit(self._path)

    def append(self, **fields: Any) -> AuditRecord:
        """Write one record behind the last whole one, and wait until the disk has it."""
        log = self.read()
        draft = AuditRecord(
            number=len(log.records) + 1,
            previous=log.records[-1].hash if log.records else FIRST,
            hash="",
            **fields,
        )
        record = draft.model_copy(update={"hash": _hash(draft)})
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate(log.size)
            file.seek(log.size)
            file.write(_line(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return record


@contextmanager
def locked(path: Path) -> Iterator[AuditWriter]:
    """Lock a record of changes for writing, and wait for whoever has it."""
    # the folder is what is locked: a change that is refused leaves no file behind
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield AuditWriter(path)
    finally:
        os.close(folder)
