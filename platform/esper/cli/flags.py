"""`esper flags`: read, explain, check and change feature flags."""

import getpass
import os
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from esper.release.audit import AuditError, audit_path, read_audit, require_current
from esper.release.change import accept_changes, basis_points, change_flag
from esper.release.errors import ReleaseError
from esper.release.flags import FULL_BP, Attribute, Flag, load_flags, variable_of
from esper.release.snapshot import Reason, bucket, snapshot


def show_flags(path: Path) -> None:
    """Print one line a flag."""
    file = load_flags(path)
    expired = file.expired(_today())
    width = max(map(len, file.flags), default=0)
    for name, flag in file.flags.items():
        late = "  EXPIRED" if name in expired else ""
        print(f"{name:<{width}}  {_state(flag):<14}  {flag.owner}, until {flag.expires}{late}")
    print(f"\nflags_hash {snapshot(path, os.environ).hash}")


def _state(flag: Flag) -> str:
    if flag.killed:
        return "killed"
    if flag.rollout_bp is not None:
        return f"{flag.rollout_bp / 100:g} % of models"
    return "on" if flag.default else "off"


def explain_flag(path: Path, name: str, model: str | None, given: Sequence[str]) -> None:
    """Print the answer for one model, what decided, and what else was asked before it."""
    file, current = load_flags(path), snapshot(path, os.environ)
    flag, attributes = file.flag(name), _attributes(given)
    answer = current.evaluate(name, model, attributes)
    said = f"{answer.reason}{f' ({answer.detail})' if answer.detail else ''}"
    print(f"{name} is {'on' if answer.enabled else 'off'} for {model or 'no model'}: {said}")
    print(f"  {_sentence(answer.reason, name, flag, model)}")
    for needed in flag.prerequisites:
        other = current.evaluate(needed, model, attributes)
        print(f"  needs {needed}: {'on' if other.enabled else 'off'} ({other.reason})")
    print(f"  flags_hash {current.hash}")


def _sentence(reason: Reason, name: str, flag: Flag, model: str | None) -> str:
    share = f"{(flag.rollout_bp or 0) / 100:g} %"
    place = f"bucket {bucket(flag.salt or name, model)} of {FULL_BP}" if model else ""
    return {
        Reason.ENVIRONMENT: f"{variable_of(name)} or the flag's environments decide.",
        Reason.KILLED: "The kill switch is set.",
        Reason.BLOCKED: "The model is on the blocklist.",
        Reason.PREREQUISITE: "A flag that it needs is off for this model.",
        Reason.ALLOWED: "The model is on the allowlist.",
        Reason.RULE: "A rule fits the attributes.",
        Reason.IN_ROLLOUT: f"The model's {place} is within {share}.",
        Reason.OUT_OF_ROLLOUT: f"The model's {place} is not within {share}.",
        Reason.NO_MODEL: "A rollout is for models with a name; give one with --model.",
        Reason.DEFAULT: "Nothing else decides.",
    }[reason]


def _attributes(given: Sequence[str]) -> dict[str, Attribute]:
    """`device=cuda n=4 fast=true` with the types that YAML would give."""
    import yaml

    attributes: dict[str, Attribute] = {}
    for item in given:
        name, sign, text = item.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if not (name and sign) or not isinstance(value, str | int | bool):
            raise ReleaseError(
                f"an attribute must be NAME=VALUE with a text, an integer, true or false, "
                f"but got '{item}'."
            )
        attributes[name] = value
    return attributes


def validate_flags(path: Path) -> bool:
    """Check file, variables, record of changes and expiry.

    Returns:
        Whether nothing is expired.

    Raises:
        ConfigError: If the file or a variable is wrong.
        AuditError: If the record of changes does not fit the file.
    """
    file, current = load_flags(path), snapshot(path, os.environ)
    require_current(read_audit(audit_path(path.resolve())), path.read_bytes(), path)
    expired = file.expired(_today())
    for name in expired:
        flag = file.flags[name]
        print(f"{name} expired on {flag.expires}: {flag.owner} removes it or gives it a new day.")
    print(f"{len(file.flags)} flags, {len(expired)} expired, flags_hash {current.hash}")
    return not expired


def set_flag(
    path: Path,
    name: str,
    fields: dict[str, Any],
    *,
    percent: str | None,
    allow: Sequence[str],
    block: Sequence[str],
    unlist: Sequence[str],
    reason: str,
    actor: str | None,
) -> None:
    """Change one flag and print what was recorded."""
    flag = load_flags(path).flag(name)
    if percent is not None:
        fields["rollout_bp"] = None if percent == "none" else basis_points(percent)
    for field, added in (("allowed", allow), ("blocked", block)):
        present: tuple[str, ...] = getattr(flag, field)
        models = [m for m in dict.fromkeys((*present, *added)) if m not in unlist]
        if tuple(models) != present:
            fields[field] = models or None
    absent = [m for m in unlist if m not in (*flag.allowed, *flag.blocked)]
    if absent:
        raise ReleaseError(f"a model must be listed to be unlisted, but '{absent[0]}' is not.")
    if not fields and not unlist:
        raise ReleaseError("a change must be asked for, but none is; see esper flags set --help.")
    record = change_flag(path, name, fields, actor=actor or getpass.getuser(), reason=reason)
    if record is None:
        print(f"{name} is so already; nothing was changed")
        return
    print(f"{name}: {record.before} -> {record.after} (record {record.number})")


def show_audit(path: Path, accept: str | None, actor: str | None) -> bool:
    """Print every change.

    Returns:
        Whether the record holds together and fits the file.
    """
    if accept is not None:
        done = accept_changes(path, actor=actor or getpass.getuser(), reason=accept)
        print("nothing to accept" if done is None else f"accepted (record {done.number})")
        return True
    path = path.resolve()
    try:
        log = read_audit(audit_path(path))
    except AuditError as error:
        print(f"damaged: {error}")
        return False
    for r in log.records:
        what = f"{r.flag} {r.before} -> {r.after}" if r.flag else "the whole file"
        print(f"{r.number:>4} {r.at:%Y-%m-%d %H:%M:%S} {r.actor} {r.action}: {what}; {r.reason}")
    if log.is_torn:
        print("the last line was never completed; the next change takes it away")
    try:
        require_current(log, path.read_bytes(), path)
    except AuditError as error:
        print(f"damaged: {error}")
        return False
    print(f"{len(log.records)} records, whole")
    return True


def _today() -> date:
    return datetime.now(UTC).date()
