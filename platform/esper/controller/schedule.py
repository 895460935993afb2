"""Fixed-schedule growth: the control that shows whether choosing when to grow is worth anything."""

from typing import Any

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


class ScheduleController:
    """Germinates at given times, the lowest dormant seed of each site in turn."""

    def __init__(self, options: "ScheduleOptions") -> None:
        self._options = options
        self._turn = 0

    def decide(self, report: Report) -> list[Action]:
        """Shepherds the awake seeds; at its times it also wakes the next ones."""
        actions: list[Action] = shepherd(report)
        if report.interval not in self._options.at_intervals:
            return actions
        free = {site.name: site.seeds_in(Stage.DORMANT) for site in report.sites}
        for _ in range(self._options.count):
            open_sites = [name for name, seeds in free.items() if seeds]
            if not open_sites:
                break
            site = open_sites[self._turn % len(open_sites)]
            self._turn += 1
            o = self._options
            seed = free[site].pop(0)
            actions += germinate(report, Germinate(site, seed, o.blueprint, o.graft, "on schedule"))
        return actions

    def may_grow(self, interval: int) -> bool:
        """At its times."""
        return interval in self._options.at_intervals

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is."""
        return {"turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that turn."""
        self._turn = state["turn"]


@CONTROLLERS.register("schedule")
class ScheduleOptions(GrowingOptions):
    """When, how many and what."""

    at_intervals: tuple[PositiveInt, ...] = Field(description="Intervals at whose end it grows.")
    count: PositiveInt = Field(1, description="Seeds each time.")

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A schedule controller."""
        return ScheduleController(self)
