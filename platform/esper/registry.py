"""Named plug-ins: the one way blueprints, tasks, hosts, controllers and grafts are looked up."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

T = TypeVar("T")


class UnknownNameError(KeyError):
    """A name was asked for that nobody registered."""

    def __init__(self, kind: str, name: str, known: tuple[str, ...]) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(kind, name, known)
        self.kind, self.name, self.known = kind, name, known

    def __str__(self) -> str:
        close = get_close_matches(self.name, self.known, n=1)
        known = ", ".join(self.known) or "(none)"
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return (
            f"{self.kind} must be one of {known}, but got '{self.name}';"
            f"{hint or ' register it first or name its module under `plugins`.'}"
        )


class Registry(Generic[T]):
    """Maps a name to what was registered under it, in order of registration.

    Example:
        >>> HOSTS = Registry[type]("host")
        >>> @HOSTS.register("mlp")
        ... class Mlp: ...
        >>> HOSTS["mlp"].__name__
        'Mlp'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Register the decorated object as `name`; a name is taken once.

        Raises:
            ValueError: If the name is taken.
        """

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(
                    f"{self.kind} name must be new, but '{name}' is already registered; "
                    "choose another name."
                )
            self._items[name] = item
            return item

        return add

    def values(self) -> tuple[T, ...]:
        """What is registered, in order of registration."""
        return tuple(self._items.values())

    def index(self, name: str) -> int:
        """Place of a name in the order of registration.

        Raises:
            UnknownNameError: If nobody registered it.
        """
        self[name]
        return tuple(self._items).index(name)

    def name_at(self, index: int) -> str:
        """The name at a place in the order of registration."""
        return tuple(self._items)[index]

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise UnknownNameError(self.kind, name, tuple(self))
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
