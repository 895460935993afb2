"""The controller that never grows: the host alone, and topologies trained from scratch."""

from esper.controller.base import CONTROLLERS, Controller, ControllerOptions, GrowthEvent
from esper.seeds.actions import Action
from esper.seeds.report import Report


class StaticController:
    """Does nothing, whatever happens."""

    def decide(self, report: Report) -> list[Action]:
        """No action."""
        return []

    def may_grow(self, interval: int) -> bool:
        """Never."""
        return False


@CONTROLLERS.register("static")
class StaticOptions(ControllerOptions):
    """No options."""

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A static controller."""
        return StaticController()
