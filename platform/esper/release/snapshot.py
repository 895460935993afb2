"""Answers to "is this flag on for this model?", each with its reason, from a frozen copy.

The first of these that has something to say decides:

    environment    a variable of the process, else what the flag says of the named environment
    kill switch    off
    blocklist      off
    prerequisites  off unless every one of them is on for the same model
    allowlist      on
    rules          on or off
    rollout        on if the model's bucket lies below the share; without a model always off
    default        on or off

A bucket is a number 0 to 9,999 made of integers alone: `(h * 10_000) >> 32`, where h is the 32-bit
murmur3 of the CBOR list `[salt, model]`. A model keeps its bucket for ever, so that a growing share
only adds models and a shrinking one only removes them; another salt gives other buckets. They are
the buckets of flagd's `fractional` operator, for the flag whose name is the salt.
"""

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import mmh3

from esper.release.errors import ReleaseError, UnknownFlagError
from esper.release.flags import (
    FULL_BP,
    Attribute,
    Flag,
    FlagFile,
    Rule,
    environment_of,
    load_flags,
    overrides_of,
)

_NO_ATTRIBUTES: Mapping[str, Attribute] = {}
# what people read, but no answer depends on
_PROSE = {"description", "owner", "expires"}


class Reason(StrEnum):
    """What decided."""

    ENVIRONMENT = "ENVIRONMENT"
    KILLED = "KILLED"
    BLOCKED = "BLOCKED"
    PREREQUISITE = "PREREQUISITE"
    ALLOWED = "ALLOWED"
    RULE = "RULE"
    IN_ROLLOUT = "IN_ROLLOUT"
    OUT_OF_ROLLOUT = "OUT_OF_ROLLOUT"
    NO_MODEL = "NO_MODEL"
    DEFAULT = "DEFAULT"


class Answer(NamedTuple):
    """Whether a flag is on, what decided, and which variable, prerequisite or rule it was."""

    enabled: bool
    reason: Reason
    detail: str = ""


def _text_header(size: int) -> bytes:
    """How CBOR begins a text of `size` bytes (RFC 8949, major type 3)."""
    if size < 24:
        return bytes([0x60 + size])
    for code, width in ((0x78, 1), (0x79, 2), (0x7A, 4)):
        if size < 1 << (8 * width):
            return bytes([code]) + size.to_bytes(width, "big")
    raise ReleaseError(f"a model's name must have less than 4 GiB, but has {size} bytes.")


_HEADERS = tuple(_text_header(size) for size in range(256))


def _prefix(salt: str) -> bytes:
    encoded = salt.encode()
    return b"\x82" + _text_header(len(encoded)) + encoded


def _bucket(prefix: bytes, model: str) -> int:
    encoded = model.encode()
    size = len(encoded)
    header = _HEADERS[size] if size < 256 else _text_header(size)
    return (mmh3.hash(prefix + header + encoded, 0, False) * FULL_BP) >> 32


def bucket(salt: str, model: str) -> int:
    """Place of a model among the 10,000 of a salt: it is in a rollout of more basis points."""
    return _bucket(_prefix(salt), model)


class _Compiled:
    """One flag, ready to be asked many times: every answer it can give is made beforehand."""

    __slots__ = ("allowed", "blocked", "default", "fixed", "needs", "prefix", "rollout_bp", "rules")

    def __init__(
        self, name: str, flag: Flag, fixed: Answer | None, known: Mapping[str, "_Compiled"]
    ) -> None:
        self.fixed = fixed or (Answer(False, Reason.KILLED) if flag.killed else None)
        self.blocked, self.allowed = frozenset(flag.blocked), frozenset(flag.allowed)
        self.needs = tuple(
            (known[needed], Answer(False, Reason.PREREQUISITE, needed))
            for needed in flag.prerequisites
        )
        self.rules = tuple(_compiled(i, rule) for i, rule in enumerate(flag.rules))
        self.prefix, self.rollout_bp = _prefix(flag.salt or name), flag.rollout_bp
        self.default = Answer(flag.default, Reason.DEFAULT)

    def answer(self, model: str | None, attributes: Mapping[str, Attribute]) -> Answer:
        if self.fixed is not None:
            return self.fixed
        if model in self.blocked:
            return _BLOCKED
        for needed, refusal in self.needs:
            if not needed.answer(model, attributes)[0]:
                return refusal
        if model in self.allowed:
            return _ALLOWED
        for wanted, served in self.rules:
            if all((type(v := attributes.get(a)), v) in values for a, values in wanted):
                return served
        if self.rollout_bp is None:
            return self.default
        if not model:
            return _NO_MODEL
        return _IN if _bucket(self.prefix, model) < self.rollout_bp else _OUT


_BLOCKED = Answer(False, Reason.BLOCKED)
_ALLOWED = Answer(True, Reason.ALLOWED)
_NO_MODEL = Answer(False, Reason.NO_MODEL)
_IN, _OUT = Answer(True, Reason.IN_ROLLOUT), Answer(False, Reason.OUT_OF_ROLLOUT)

_Conditions = tuple[tuple[str, tuple[tuple[type, Attribute], ...]], ...]


def _compiled(index: int, rule: Rule) -> tuple[_Conditions, Answer]:
    # with its type: 1 is not True here
    wanted = tuple((a, tuple((type(v), v) for v in vs)) for a, vs in rule.when.items())
    return wanted, Answer(rule.serve, Reason.RULE, f"rules.{index}")


class Snapshot:
    """The flags as they were at one moment; what it answers never changes.

    Attributes:
        hash: sha256 (hex) of everything that an answer can depend on; it goes with every metric
            that was measured under these flags. Descriptions, owners and expiry do not count.
    """

    def __init__(
        self,
        file: FlagFile,
        environment: str | None = None,
        overrides: Mapping[str, bool] | None = None,
    ) -> None:
        self._file, self._environment = file, environment
        self._overrides = dict(sorted((overrides or {}).items()))
        for name in self._overrides:
            file.flag(name)
        if environment is not None and environment not in file.environments:
            raise ReleaseError(
                f"environment must be one of {', '.join(file.environments) or 'none'}, "
                f"but got '{environment}'; name it in the file first."
            )
        self._flags: dict[str, _Compiled] = {}
        for name in file.flags:
            self._compile(name)
        deciding = {n: f.model_dump(mode="json", exclude=_PROSE) for n, f in file.flags.items()}
        content = {"flags": deciding, "environment": environment, "overrides": self._overrides}
        self.hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _compile(self, name: str) -> None:
        if name in self._flags:
            return
        flag = self._file.flags[name]
        for needed in flag.prerequisites:
            self._compile(needed)
        self._flags[name] = _Compiled(name, flag, self._fixed(name, flag), self._flags)

    def _fixed(self, name: str, flag: Flag) -> Answer | None:
        if name in self._overrides:
            return Answer(self._overrides[name], Reason.ENVIRONMENT, "process")
        if self._environment in flag.environments:
            return Answer(flag.environments[self._environment], Reason.ENVIRONMENT, "file")
        return None

    def evaluate(
        self,
        flag: str,
        model: str | None = None,
        attributes: Mapping[str, Attribute] = _NO_ATTRIBUTES,
    ) -> Answer:
        """Whether a flag is on, and why.

        Args:
            flag: Its name.
            model: Name of the model that asks; without one no rollout applies.
            attributes: What rules may ask for, such as `{"device": "cuda"}`.

        Raises:
            UnknownFlagError: If there is no such flag; there is no default to fall back on.
        """
        compiled = self._flags.get(flag)
        if compiled is None:
            raise UnknownFlagError(flag, self._flags)
        return compiled.answer(model, attributes)

    def names(self) -> tuple[str, ...]:
        """Names of all flags, in the order of the file."""
        return tuple(self._file.flags)

    def __reduce__(self) -> tuple[type["Snapshot"], tuple[object, ...]]:
        return Snapshot, (self._file, self._environment, self._overrides)


def snapshot(path: Path, environ: Mapping[str, str]) -> Snapshot:
    """Read the flags for one interval of this process.

    Args:
        path: The file of flags.
        environ: The process's variables, `os.environ`.

    Raises:
        ConfigError: If the file or a variable is wrong.
    """
    file = load_flags(path)
    return Snapshot(file, environment_of(file, environ), overrides_of(file, environ))
