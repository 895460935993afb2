"""The kinds of configuration files: each has one command, and is known by keys of its own."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from esper.config.base import ConfigError, read_yaml

Kind = Literal["run", "ab", "arena", "tune", "baseline"]  # named after the commands


class _Known(NamedTuple):
    """What is known of a kind.

    Attributes:
        noun: With its article.
        command: That takes it.
        marks: Keys of which any at the top tells the kind, as no other kind knows it.
    """

    noun: str
    command: str
    marks: tuple[str, ...]


_KINDS: dict[Kind, _Known] = {
    "run": _Known("a run", "esper run", ("task", "host")),
    "ab": _Known("a sweep", "esper ab", ("arms", "question")),
    "arena": _Known("an arena", "esper arena", ("methods",)),
    "tune": _Known("a search", "esper tune", ("space",)),
    "baseline": _Known("a baseline", "esper baseline run --out FOLDER", ("workload",)),
}


def kinds_of(keys: Collection[str]) -> list[Kind]:
    """The kinds that a file with these top keys may be of; empty where nothing tells."""
    return [kind for kind, known in _KINDS.items() if any(mark in keys for mark in known.marks)]


def read_kind(path: Path, kind: Kind) -> dict[str, Any]:
    """Parse a file that is given to the command of `kind`.

    Raises:
        ConfigError: If it cannot be read, or is plainly of another kind; the message names the
            command that takes it.
    """
    keys = read_yaml(path)
    found = kinds_of(keys)
    if len(found) == 1 and kind not in found:
        wanted, given = _KINDS[kind], _KINDS[found[0]]
        mark = next(mark for mark in given.marks if mark in keys)
        raise ConfigError(str(path), (
            f"the file must be {wanted.noun}, but is {given.noun}, as its key '{mark}' tells; "
            f"its command is: {given.command} {path}",
        ))  # fmt: skip
    return keys
