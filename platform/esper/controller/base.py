"""The controller contract, the registry, and what all growing controllers have in common."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeGuard, runtime_checkable

from pydantic import Field, ValidationInfo, field_validator

from esper.config.base import Config
from esper.config.run import GrowthConfig
from esper.registry import Registry, UnknownNameError
from esper.seeds import gates
from esper.seeds.actions import Action, Advance, Cull, Germinate, Promote, Rollback
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.grafting import GRAFTS
from esper.seeds.lifecycle import MOVES
from esper.seeds.report import Report, SiteReport
from esper.seeds.state import Stage


class Controller(Protocol):
    """Turns a report into actions. It may remember; it must not change the report."""

    def decide(self, report: Report) -> list[Action]:
        """Actions for the end of this interval, in the order in which they are to be applied."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """What a controller with a memory has besides.

    Its memory goes back when the run goes back, and into checkpoints.
    """

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as JSON; later decisions must not change it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned, and nothing else."""
        ...


@runtime_checkable
class Stopping(Protocol):
    """What a controller has besides that knows when it will grow no more."""

    def may_grow(self, interval: int) -> bool:
        """Whether it may germinate at the end of this interval; if not, nothing is measured."""
        ...


@cache
def _implements(kind: type, protocol: type) -> bool:
    """`isinstance` of a protocol would look at every attribute anew for each decision."""
    return issubclass(kind, protocol)


def _remembers(controller: Controller) -> TypeGuard[Remembering]:
    return _implements(type(controller), Remembering)


def _stops(controller: Controller) -> TypeGuard[Stopping]:
    return _implements(type(controller), Stopping)


def may_grow(controller: Controller, interval: int) -> bool:
    """Whether new seeds must be reckoned with at the end of an interval."""
    return not _stops(controller) or controller.may_grow(interval)


@runtime_checkable
class Switched(Protocol):
    """What a controller has besides that a feature flag can put back to what was there before."""

    def switch(self, on: Set[str]) -> Set[str]:
        """Heed the flags that are on until told otherwise.

        Returns:
            Names of the flags, on or off, that it heeds.
        """
        ...


def switch(controller: Controller, on: Set[str]) -> Set[str]:
    """Tell a controller which flags are on; returns those that it heeds."""
    return controller.switch(on) if isinstance(controller, Switched) else frozenset()


class Stateless:
    """For a controller whose attributes never change."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to remember."""


def memory_of(controller: Controller) -> dict[str, Any]:
    """What a controller remembers; nothing for one without attributes.

    Raises:
        ValueError: If it has attributes but no `state_dict`: a part of it would be forgotten.
    """
    if _remembers(controller):
        return controller.state_dict()
    if getattr(controller, "__dict__", None):
        raise ValueError(
            "controller must define state_dict and load_state_dict, but "
            f"{type(controller).__name__} has attributes and lacks them; inherit "
            "esper.controller.base.Stateless if the attributes never change."
        )
    return {}


def remind(controller: Controller, memory: dict[str, Any]) -> None:
    """Let a controller remember what `memory_of` returned."""
    if _remembers(controller):
        controller.load_state_dict(memory)


@dataclass(frozen=True)
class GrowthEvent:
    """One seed that another run germinated and kept.

    Attributes:
        interval: When.
        site: Where.
        seed: Which.
        blueprint: What.
    """

    interval: int
    site: str
    seed: int
    blueprint: str


class ControllerOptions(Config):
    """Options of a controller; subclasses add their own and `build`."""

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A controller at the start of a run.

        Args:
            seed: Seed of its random draws.
            events: What the followed arm grew, if this arm follows one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(seed, events).")


def registered(name: str, registry: Registry[Any]) -> str:
    """A name that is registered, for a field's validator.

    Raises:
        ValueError: If it is not; pydantic makes a problem of the field of it.
    """
    try:
        registry[name]
    except UnknownNameError as error:
        raise ValueError(str(error)) from None
    return name


class GrowingOptions(ControllerOptions):
    """What a controller that germinates seeds needs to know about them."""

    blueprint: str = Field("mlp_gelu", description="What new seeds compute.")
    graft: str = Field("linear", description="How new seeds are blended in.")

    @field_validator("blueprint", "graft")
    @classmethod
    def _registered(cls, name: str, info: ValidationInfo) -> str:
        return registered(name, BLUEPRINTS if info.field_name == "blueprint" else GRAFTS)


CONTROLLERS: Registry[type[ControllerOptions]] = Registry("controller")


def passable(growth: GrowthConfig, stage: Stage) -> bool:
    """Whether a stage may take no time; in others something must be measured in it first."""
    if stage is Stage.EVALUATING:
        return growth.min_gain is None
    return stage in (Stage.GERMINATED, Stage.TRAINING, Stage.STABILIZATION)


def shepherd(report: Report) -> list[Action]:
    """Moves every awake seed along its life as the gates allow.

    Seeds that fail G5 are culled at once; seeds whose gate stays shut for
    `growth.patience_intervals` are given up.
    """
    return [
        action
        for site in report.sites
        for seed in site.seeds_in(*(set(Stage) - {Stage.DORMANT, Stage.FOSSILIZED}))
        for action in _moves(report, site, seed)
    ]


def germinate(report: Report, action: Germinate) -> list[Action]:
    """A germination, and what may follow in the same interval."""
    if report.growth.training_intervals:
        return [action]
    after = report.after(action)
    return [action, *_moves(after, after.site(action.site), action.seed)]


def _moves(report: Report, site: SiteReport, seed: int) -> Iterator[Action]:
    """The moves of one seed; a stage that needs no time is passed at once."""
    while action := _move(report, site, seed):
        yield action
        if not passable(report.growth, MOVES[Stage(int(site.stage[seed])), type(action)]):
            return
        report = report.after(action)
        site = report.site(site.name)


def _move(report: Report, site: SiteReport, seed: int) -> Action | None:
    state = site.state(seed)
    if state.stage is Stage.GERMINATED:
        return Promote(site.name, seed, "a training slot is free")
    if state.epochs and site.silent_frac[seed] == 1 and (state.stage, Cull) in MOVES:
        return Cull(site.name, seed, "dead: no hidden unit is active for any sample")
    gate = gates.next_gate(report, site, seed)
    reason = f"{gate.name}: {gate.reason}"
    if gate.passed:
        return Advance(site.name, seed, reason)
    if state.stage is Stage.EVALUATING:
        return Cull(site.name, seed, reason)
    if state.epochs >= report.growth.patience_intervals:
        if state.stage in (Stage.TRAINING, Stage.GRAFTING):
            return Cull(site.name, seed, f"gave up after {state.epochs} intervals; {reason}")
        if state.stage is Stage.STABILIZATION:
            return Rollback(site.name, seed, f"the host did not settle; {reason}")
    return None
