"""Controllers: who decides where, when and what to grow. All speak one method, `decide`."""

from typing import Any

from esper.controller.adaptations import ReportedOptions
from esper.controller.base import CONTROLLERS, Controller, ControllerOptions, GrowthEvent
from esper.controller.heuristic import TamiyoOptions
from esper.controller.learned import LearnedOptions
from esper.controller.random import RandomOptions
from esper.controller.remote import RemoteOptions
from esper.controller.schedule import ScheduleOptions
from esper.controller.shield import Shield, Veto
from esper.controller.static import StaticOptions

__all__ = [
    "CONTROLLERS", "Controller", "ControllerOptions", "GrowthEvent", "LearnedOptions",
    "RandomOptions", "RemoteOptions", "ReportedOptions", "ScheduleOptions", "Shield",
    "StaticOptions", "Tamiyo", "TamiyoOptions", "Veto",
]  # fmt: skip


def Tamiyo(seed: int = 0, **options: Any) -> Shield:
    """The heuristic controller behind its safety shield; options as in `TamiyoOptions`.

    Args:
        seed: Seed of its random draws.
        options: Fields of `TamiyoOptions`.

    Raises:
        pydantic.ValidationError: If an option is unknown or out of range.
    """
    return Shield(TamiyoOptions(**options).build(seed))
