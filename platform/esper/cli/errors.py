"""Errors that a user can act on become one message and an exit code, not a traceback."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")


def explained(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that known errors print as text; anything else is our own mistake."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted; the same command continues", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(code) from None

    return wrapped


def _exit_code(error: Exception) -> int | None:
    """The documented exit code of an error; None for one that nobody foresaw."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"BaselineError", "CheckpointError", "ConfigError", "ReleaseError"}:
        return 2
    if "SweepIncompleteError" in names:
        return 4
    if names & {
        "CheckpointNotWrittenError",
        "RepeatedFailureError",
        "ReplicasDifferError",
        "ShardLostError",
    }:
        return 3
    if names & {"ConnectionError", "TrackingError", "FileNotFoundError", "PermissionError"}:
        return 3
    return None
