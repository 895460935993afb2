"""What a controller may command: frozen, comparable, and easy to send anywhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """Moves one seed of one site.

    Every action has a `reason` besides: why the controller does it; it goes to the growth log.

    Attributes:
        site: Name of the site in the lattice.
        seed: Index of the seed in the site.
    """

    site: str
    seed: int


@dataclass(frozen=True)
class Germinate(Action):
    """DORMANT -> GERMINATED: choose what the seed computes and how it will be blended in."""

    blueprint: str
    graft: str = "linear"
    reason: str = ""


@dataclass(frozen=True)
class Promote(Action):
    """GERMINATED -> TRAINING: give the seed a training slot."""

    reason: str = ""


@dataclass(frozen=True)
class Advance(Action):
    """To the next stage of the main path; a resting slot becomes DORMANT again."""

    reason: str = ""


@dataclass(frozen=True)
class Cull(Action):
    """To CULLED: the seed did not earn its keep."""

    reason: str = ""


@dataclass(frozen=True)
class Cancel(Action):
    """To CANCELLED: the seed is withdrawn before it ever touched the host's output."""

    reason: str = ""


@dataclass(frozen=True)
class Rollback(Action):
    """To ROLLED_BACK: the run goes back to its last good checkpoint without this seed."""

    reason: str = ""
