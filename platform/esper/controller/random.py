"""Random growth: the control that shows whether choosing where to grow is worth anything."""

from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from esper.controller.base import (
    CONTROLLERS,
    Controller,
    GrowingOptions,
    GrowthEvent,
    germinate,
    shepherd,
)
from esper.seeds.actions import Action, Germinate
from esper.seeds.report import Report
from esper.seeds.state import Stage


class RandomController:
    """Germinates at given times, at random places."""

    def __init__(self, blueprints: dict[int, list[str]], graft: str, seed: int) -> None:
        self._blueprints, self._graft = blueprints, graft
        self._rng = np.random.default_rng(seed)

    def decide(self, report: Report) -> list[Action]:
        """Shepherds the awake seeds; at its times it also wakes random dormant ones."""
        actions: list[Action] = shepherd(report)
        free = [(site, seed) for site in report.sites for seed in site.seeds_in(Stage.DORMANT)]
        for blueprint in self._blueprints.get(report.interval, []):
            if not free:
                break
            place = int(self._rng.integers(len(free)))
            if free[place][0].geometry == "span":
                # free seeds of a span are interchangeable: the lowest keeps them compact
                place = next(i for i, (site, _) in enumerate(free) if site is free[place][0])
            site, seed = free.pop(place)
            actions += germinate(
                report, Germinate(site.name, seed, blueprint, self._graft, "random place")
            )
        return actions

    def may_grow(self, interval: int) -> bool:
        """At its times."""
        return interval in self._blueprints

    def state_dict(self) -> dict[str, Any]:
        """State of the generator of the places."""
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing from there."""
        self._rng.bit_generator.state = state["rng"]


@CONTROLLERS.register("random")
class RandomOptions(GrowingOptions):
    """When and what to grow, besides what the followed arm grew, if the arm follows one."""

    at_intervals: tuple[PositiveInt, ...] = Field(
        (), description="Intervals at whose end it germinates."
    )
    count: PositiveInt = Field(1, description="Seeds each time.")

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A random controller."""
        blueprints = {i: [self.blueprint] * self.count for i in self.at_intervals}
        for event in events:
            blueprints.setdefault(event.interval, []).append(event.blueprint)
        return RandomController(blueprints, self.graft, seed)
