"""`esper config explain`: the value of a setting of the migration, and which layer it is from."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from esper.release.errors import ReleaseError, nearest
from esper.release.flags import overrides_of, variable_of
from esper.release.phases import load_migration


class Found(NamedTuple):
    """A value and the line of the file that gives it, None where a default does."""

    value: Any
    line: int | None


def explain_key(config: Path, key: str) -> None:
    """Print value and source of one key of the migration, its phases or its flags.

    Args:
        config: The migration's settings.
        key: Such as `policy.min_pairs`, `phases.1.rollout.steps_bp` or
            `flags.kasmina.triton.rollout_bp`.

    Raises:
        ConfigError: If a file or a variable of the process is wrong.
        ReleaseError: If there is no such key.
    """
    plan = load_migration(config)
    migration = plan.migration.model_dump(mode="json")
    folder, parts = config.parent, tuple(key.split("."))
    path, whole = {
        "phases": (folder / plan.migration.phases, plan.phases.model_dump(mode="json")),
        "flags": (plan.flags_path, plan.flags.model_dump(mode="json")),
    }.get(parts[0], (config, migration))
    if len(parts) == 1 and parts[0] in ("phases", "flags"):
        path, whole = config, migration
    found = _find(whole, YAML().load(path.read_text(encoding="utf-8")), parts, key)
    print(f"{key} = {found.value}")
    print(f"  from {path}, line {found.line}" if found.line else "  the default")
    for name, is_on in overrides_of(plan.flags, os.environ).items():
        if key.startswith(f"flags.{name}."):
            print(f"  {variable_of(name)} outranks it here: the flag is {'on' if is_on else 'off'}")


def _find(whole: Any, given: Any, parts: Sequence[str], key: str, line: int | None = None) -> Found:
    """Follow the key through the validated values and, as far as it goes, through the file."""
    if not parts:
        return Found(whole, line)
    for count in range(len(parts), 0, -1):
        step: str | int = ".".join(parts[:count])
        if isinstance(whole, list) and str(step).isdigit():
            step = int(step)
        if not _holds(whole, step):
            continue
        inside = _holds(given, step)
        here = given.lc.data[step][0] + 1 if inside else None
        return _find(whole[step], given[step] if inside else None, parts[count:], key, here)
    known = [*map(str, whole)] if isinstance(whole, Mapping) else [*map(str, range(_size(whole)))]
    raise ReleaseError(f"key must lead to a setting, but '{key}' ends before '{parts[0]}'; "
                       f"{nearest(parts[0], known)}")  # fmt: skip


def _size(node: Any) -> int:
    return len(node) if isinstance(node, list) else 0


def _holds(node: Any, step: str | int) -> bool:
    if isinstance(step, int):
        return isinstance(node, list) and step < len(node)
    return isinstance(node, Mapping) and step in node
