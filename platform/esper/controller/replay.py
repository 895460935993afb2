"""The controller that does again what the log of another run says."""

from collections.abc import Mapping, Sequence

from esper.controller.base import Stateless
from esper.seeds.actions import Action, Germinate
from esper.seeds.report import Report


class Replay(Stateless):
    """Commands given actions at the ends of given intervals, whatever the report says.

    Args:
        actions: By interval, in the order in which they are to be applied.
    """

    def __init__(self, actions: Mapping[int, Sequence[Action]]) -> None:
        self._actions = actions

    def decide(self, report: Report) -> list[Action]:
        """What was done at the end of this interval."""
        return list(self._actions.get(report.interval, []))

    def may_grow(self, interval: int) -> bool:
        """Where the log germinated."""
        return any(isinstance(a, Germinate) for a in self._actions.get(interval, []))
