"""The growth log as JSON: names in place of ids, so that another process reads it alike."""

from collections.abc import Iterable
from typing import Any

from esper.seeds.actions import Action, Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.blueprints import BLUEPRINTS, blueprint_id
from esper.seeds.grafting import GRAFTS, graft_id
from esper.seeds.lifecycle import Transition
from esper.seeds.state import SeedState, Stage

_ACTIONS: dict[str, type[Action]] = {
    kind.__name__: kind for kind in (Germinate, Promote, Advance, Cull, Cancel, Rollback)
}


def pack_log(log: Iterable[Transition]) -> list[dict[str, Any]]:
    """One mapping a transition."""
    return [
        {
            "interval": t.interval,
            "step": t.step,
            **pack_action(t.action),
            "before": _pack_state(t.before),
            "after": _pack_state(t.after),
        }
        for t in log
    ]


def unpack_log(lines: Iterable[dict[str, Any]]) -> list[Transition]:
    """The transitions again.

    Raises:
        UnknownNameError: If a blueprint or graft strategy is not registered here.
    """
    return [
        Transition(
            line["interval"],
            line["step"],
            unpack_action(line),
            _unpack_state(line["before"]),
            _unpack_state(line["after"]),
        )
        for line in lines
    ]


def pack_action(action: Action) -> dict[str, Any]:
    """Its kind and its fields."""
    return {"action": type(action).__name__, "fields": dict(vars(action))}


def unpack_action(line: dict[str, Any]) -> Action:
    """The action again."""
    return _ACTIONS[line["action"]](**line["fields"])


def _pack_state(state: SeedState) -> dict[str, Any]:
    return {
        "stage": state.stage.name,
        "blueprint": BLUEPRINTS.name_at(state.blueprint_id),
        "epochs": state.epochs,
        "graft": GRAFTS.name_at(state.graft_id),
    }


def _unpack_state(saved: dict[str, Any]) -> SeedState:
    return SeedState(
        Stage[saved["stage"]],
        blueprint_id(saved["blueprint"]),
        saved["epochs"],
        graft_id(saved["graft"]),
    )
