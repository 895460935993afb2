"""What a user of flags and rollouts asked for and cannot have."""

from collections.abc import Iterable
from difflib import get_close_matches


class ReleaseError(ValueError):
    """A request that was refused; nothing was changed."""


class UnknownFlagError(ReleaseError):
    """A flag was asked for that the file does not hold."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(name, tuple(known))

    def __str__(self) -> str:
        name, known = self.args
        return f"flag must be one of the file's, but got '{name}'; {nearest(name, known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the names there are."""
    names = tuple(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}."
