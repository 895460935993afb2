"""The safety shield: lets through what is legal, affordable and earned, and says why not."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from esper.controller.base import Controller, may_grow, memory_of, passable, remind, switch
from esper.registry import UnknownNameError
from esper.seeds import gates
from esper.seeds.actions import Action, Advance, Cull, Germinate, Rollback
from esper.seeds.lifecycle import IllegalTransitionError, advance
from esper.seeds.report import Report
from esper.seeds.state import Stage
from esper.surgery.growth_log import pack_action, unpack_action


@dataclass(frozen=True)
class Veto:
    """An action that was not let through.

    Attributes:
        interval: When.
        action: What the controller wanted.
        reason: Which limit it breaks, with the values.
    """

    interval: int
    action: Action
    reason: str


class Shield:
    """A controller that wraps another and enforces the gates and limits of the report.

    Attributes:
        vetoes: Everything that was not let through, so far.
        incidents: Times the run broke and went back, so far.
        closed: Why nothing may be germinated now; None if it may.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._failures = 0
        self.incidents = 0
        self.closed: str | None = None
        self.vetoes: list[Veto] = []

    def decide(self, report: Report) -> list[Action]:
        """The wrapped controller's actions, without those that break a limit."""
        allowed: list[Action] = []
        moved: set[tuple[str, int]] = set()
        for action in self._controller.decide(report):
            reason = self._objection(report, action)
            if reason is None and (action.site, action.seed) in moved:
                stage = Stage(int(report.site(action.site).stage[action.seed]))
                if not passable(report.growth, stage):
                    reason = "the seed was moved in this interval already"
            if reason is not None:
                self.vetoes.append(Veto(report.interval, action, reason))
                continue
            moved.add((action.site, action.seed))
            allowed.append(action)
            self._count(report, action)
            # the next action meets the stages and the budget that this one leaves
            report = report.after(action)
        return allowed

    def may_grow(self, interval: int) -> bool:
        """Whether the wrapped controller may germinate then."""
        return self.closed is None and may_grow(self._controller, interval)

    def sources(self) -> dict[str, int]:
        """Decisions by where they came from, if the wrapped controller asks others."""
        return dict(getattr(self._controller, "counts", {}))

    def switch(self, on: Set[str]) -> Set[str]:
        """Tell the wrapped controller which flags are on."""
        return switch(self._controller, on)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped controller's memory, and everything of its own."""
        return {
            "controller": self.memory(),
            "failures": self._failures,
            "incidents": self.incidents,
            "vetoes": [
                {"interval": v.interval, **pack_action(v.action), "reason": v.reason}
                for v in self.vetoes
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        remind(self._controller, state["controller"])
        self._failures, self.incidents = state["failures"], state["incidents"]
        self.vetoes = [Veto(v["interval"], unpack_action(v), v["reason"]) for v in state["vetoes"]]

    def memory(self) -> dict[str, Any]:
        """What the wrapped controller remembers: the part that goes back with the run."""
        return memory_of(self._controller)

    def go_back(self, memory: dict[str, Any]) -> None:
        """Let the wrapped controller remember what it did then.

        What went wrong since is not forgotten: failures, incidents and vetoes stay.
        """
        remind(self._controller, memory)

    def count_failures(self, seeds: int) -> None:
        """Seeds failed that the wrapped controller did not cull itself."""
        self._failures += seeds

    def _objection(self, report: Report, action: Action) -> str | None:
        """Why the action must not be applied; None if it may."""
        names = [site.name for site in report.sites]
        if action.site not in names:
            return f"site must be one of {', '.join(names)}, but got '{action.site}'"
        site = report.site(action.site)
        if not 0 <= action.seed < len(site.stage):
            return f"seed must be in 0..{len(site.stage) - 1}, but got {action.seed}"
        try:
            advance(site.state(action.seed), action)
        except (IllegalTransitionError, UnknownNameError) as error:
            return str(error)
        if isinstance(action, Germinate):
            return self._germination(report, action)
        if isinstance(action, Advance):
            gate = gates.next_gate(report, site, action.seed)
            return None if gate.passed else f"{gate.name} is shut: {gate.reason}"
        return None

    def _germination(self, report: Report, action: Germinate) -> str | None:
        site, growth = report.site(action.site), report.growth
        if self.closed is not None:
            return self.closed
        if action.blueprint not in site.seed_parameters:
            return f"blueprint '{action.blueprint}' does not fit a {site.geometry} site"
        if self._failures >= growth.max_failures:
            return f"{self._failures} seeds failed in a row, the limit is {growth.max_failures}"
        if self.incidents and self.incidents >= growth.max_rollbacks:
            return f"the run broke {self.incidents} times, the limit is {growth.max_rollbacks}"
        drift = report.host_drift_frac
        if drift is not None and drift > growth.max_drift_frac:
            return f"the host drifts by {drift:.3f} an interval, limit {growth.max_drift_frac}"
        gate = gates.resources(report, site, action.blueprint)
        return None if gate.passed else f"G0 is shut: {gate.reason}"

    def _count(self, report: Report, action: Action) -> None:
        """Failures in a row."""
        if isinstance(action, Cull | Rollback):
            self._failures += 1
        site = report.site(action.site)
        if isinstance(action, Advance) and site.stage[action.seed] == Stage.EVALUATING:
            self._failures = 0
