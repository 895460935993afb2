"""Errors that a user can act on become one message and an exit code, not a traceback."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from esper.cli.codes import INCOMPLETE, INTERRUPTED, MISSING, UNREAD, WRONG
from esper.cli.output import is_unread

P = ParamSpec("P")
R = TypeVar("R")

# by name, as their modules load heavy libraries; a class that inherits from one has its code
_CODES = {
    "BaselineError": WRONG,
    "CheckpointError": WRONG,
    "ConfigError": WRONG,
    "EvidenceError": WRONG,
    "ReleaseError": WRONG,
    "CheckpointNotWrittenError": MISSING,
    "RepeatedFailureError": MISSING,
    "ReplicasDifferError": MISSING,
    "ShardLostError": MISSING,
    "TrackingError": MISSING,
    "SweepIncompleteError": INCOMPLETE,
    # a file or folder that is not there, is no such thing or may not be used; a full disk; a
    # server that does not answer
    "OSError": MISSING,
}


def explained(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that known errors print as text; anything else is our own mistake."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        unread = False
        try:
            try:
                return command(*args, **kwargs)
            finally:
                # here, and not when the interpreter ends, where nobody could explain it
                unread = is_unread()
        except KeyboardInterrupt:
            print("interrupted; the same command continues", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if unread and isinstance(error, BrokenPipeError):
                raise typer.Exit(UNREAD) from None
            code = _exit_code(error)
            if code is None:
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(code) from None

    return wrapped


def _exit_code(error: Exception) -> int | None:
    """The documented exit code of an error; None for one that nobody foresaw."""
    codes = (_CODES.get(cls.__name__) for cls in type(error).__mro__)
    return next((code for code in codes if code is not None), None)
