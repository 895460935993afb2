"""Changes of the file of flags: checked before, atomic, comments kept, each one recorded."""

import io
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from esper.atomic import write_atomically
from esper.config.base import read_yaml, validate
from esper.release.audit import (
    Action,
    AuditError,
    AuditRecord,
    AuditWriter,
    audit_path,
    digest,
    locked,
    require_current,
)
from esper.release.errors import ReleaseError
from esper.release.flags import FlagFile, load_flags


def basis_points(percent: str) -> int:
    """Read a share such as `5` or `12.5` (percent) as basis points.

    Raises:
        ReleaseError: If it is no number from 0 to 100 with at most two decimals.
    """
    try:
        scaled = Decimal(percent) * 100
        fits = 0 <= scaled <= 10_000 and scaled == int(scaled)
    except (InvalidOperation, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ReleaseError(
            f"percent must be 0 to 100 with at most two decimals, but got '{percent}'."
        )
    return int(scaled)


def change_flag(
    path: Path,
    name: str,
    fields: Mapping[str, Any],
    *,
    actor: str,
    reason: str,
    action: Action = "set",
    at_once: bool = False,
) -> AuditRecord | None:
    """Set fields of one flag.

    The record is on disk before the file is replaced: a change that nobody recorded cannot happen.
    A rollback does it the other way round, since nothing may keep it waiting.

    Args:
        path: The file of flags.
        name: Of the flag.
        fields: New values in YAML's terms; None removes the field, which gives its default.
        actor: Who asks.
        reason: Why.
        action: What the record calls it.
        at_once: Replace the file before anything else can fail.

    Returns:
        The record, or None if the flag had these values already.

    Raises:
        ConfigError: If the file is wrong, or would be with these values.
        UnknownFlagError: If there is no such flag.
        AuditError: If the record was tampered with, or the file was changed without it.
    """
    if not reason.strip():
        raise ReleaseError("reason must be given, but is empty; say why the flag changes.")
    path = path.resolve()
    with locked(audit_path(path)) as audit:
        old = path.read_bytes()
        new = _edited(path, old, name, fields)
        if new == old and not at_once:
            return None
        flag = load_flags(path).flag(name).model_dump(mode="json")
        entry = {
            "at": datetime.now(UTC),
            "actor": actor,
            "action": action,
            "flag": name,
            "before": {k: flag[k] for k in fields},
            "after": dict(fields),
            "reason": reason,
            "file_before": digest(old),
            "file_after": digest(new),
        }
        if at_once:
            write_atomically(path, new)
            try:
                _settle(audit, path, old, accept=actor)
                return audit.append(**entry)
            except AuditError as error:
                raise AuditError(
                    f"{name} was changed, but could not be recorded: {error}"
                ) from None
        _settle(audit, path, old)
        record = audit.append(**entry)
        write_atomically(path, new)
        return record


def accept_changes(path: Path, *, actor: str, reason: str) -> AuditRecord | None:
    """Record that the file of flags was changed by hand; None if it was not.

    Raises:
        ConfigError: If the file is wrong.
        AuditError: If the record was tampered with.
    """
    if not reason.strip():
        raise ReleaseError("reason must be given, but is empty; say why the file was changed.")
    path = path.resolve()
    load_flags(path)
    with locked(audit_path(path)) as audit:
        content, records = path.read_bytes(), audit.read().records
        if records and records[-1].file_after == digest(content):
            return None
        before = records[-1].file_after if records else digest(content)
        return _whole_file(audit, "accept", before, digest(content), actor, reason)


def _whole_file(
    audit: AuditWriter, action: Action, before: str, after: str, actor: str, reason: str
) -> AuditRecord:
    return audit.append(
        at=datetime.now(UTC), actor=actor, action=action, flag=None, before={}, after={},
        reason=reason, file_before=before, file_after=after,
    )  # fmt: skip


def _settle(audit: AuditWriter, path: Path, content: bytes, accept: str | None = None) -> None:
    """Bring record and file together, or refuse.

    Args:
        audit: The locked record.
        path: The file of flags.
        content: What it held before the present change.
        accept: Who accepts changes made by hand; None: nobody does.
    """
    log, now = audit.read(), digest(content)
    if not log.records or log.records[-1].file_after == now:
        return
    last = log.records[-1]
    if last.file_before == now:
        why = f"record {last.number} was written, but its change was never made"
        _whole_file(audit, "abandoned", last.file_after, now, last.actor, why)
    elif accept is not None:
        why = "the file had been changed by hand before a rollback"
        _whole_file(audit, "accept", last.file_after, now, accept, why)
    else:
        require_current(log, content, path)


def _edited(path: Path, old: bytes, name: str, fields: Mapping[str, Any]) -> bytes:
    """The file's new content, checked to say the same but for these fields."""
    before = load_flags(path)
    before.flag(name)
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(old.decode())
    flag = document["flags"][name]
    for field, value in fields.items():
        if value is None:
            _remove(flag, field)
        elif field in flag:
            flag[field] = _as_yaml(value)
        else:
            # what stands between two flags hangs on the last field, which therefore stays last
            flag.insert(len(flag) - 1, field, _as_yaml(value))
    text = io.StringIO()
    yaml.dump(document, text)
    new = text.getvalue().encode()
    wanted = before.model_dump(mode="json", exclude_defaults=True)
    wanted["flags"][name] = {
        k: v for k, v in (wanted["flags"][name] | dict(fields)).items() if v is not None
    }
    expected = validate(FlagFile, wanted, source=str(path))
    if _parsed(path, new) != expected:
        raise ReleaseError(
            f"{path} must be YAML that can be edited without changing its meaning, but is not; "
            "change it by hand, then: esper flags audit --accept REASON."
        )
    return new


def _remove(flag: CommentedMap, field: str) -> None:
    """Take a field away; what stands below the last one stays below the new last one."""
    below = flag.ca.items.pop(field, None) if field == next(reversed(flag), None) else None
    flag.pop(field, None)
    if below is not None and flag:
        flag.ca.items.setdefault(next(reversed(flag)), below)


def _as_yaml(value: Any) -> Any:
    """Lists on one line."""
    if not isinstance(value, list | tuple):
        return value
    sequence = CommentedSeq(value)
    sequence.fa.set_flow_style()
    return sequence


def _parsed(path: Path, content: bytes) -> FlagFile:
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
        file.write(content)
        file.flush()
        return validate(FlagFile, read_yaml(Path(file.name)), source=str(path))
