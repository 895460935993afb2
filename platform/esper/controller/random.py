"""Random growth: the control that shows whether choosing where to grow is worth anything."""

import numpy as np
from pydantic import PositiveInt

from esper.controller.base import (
    CONTROLLERS,
    Controller,
    ControllerOptions,
    GrowthEvent,
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
        dormant = [
            (site.name, seed) for site in report.sites for seed in site.seeds_in(Stage.DORMANT)
        ]
        for blueprint in self._blueprints.get(report.interval, []):
            if not dormant:
                break
            site, seed = dormant.pop(int(self._rng.integers(len(dormant))))
            actions.append(Germinate(site, seed, blueprint, self._graft, "random place"))
        return actions


@CONTROLLERS.register("random")
class RandomOptions(ControllerOptions):
    """When and what to grow, unless the arm follows another: then its times and blueprints."""

    at_intervals: tuple[PositiveInt, ...] = ()
    count: PositiveInt = 1
    blueprint: str = "mlp_gelu"
    graft: str = "linear"

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A random controller."""
        blueprints = {i: [self.blueprint] * self.count for i in self.at_intervals}
        for event in events:
            blueprints.setdefault(event.interval, []).append(event.blueprint)
        return RandomController(blueprints, self.graft, seed)
