"""The table of legal moves, and the one pure function that applies them."""

from dataclasses import dataclass

from esper.seeds.actions import Action, Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.blueprints import BLUEPRINTS, blueprint_id
from esper.seeds.grafting import graft_id
from esper.seeds.state import SeedState, Stage

_S = Stage
MOVES: dict[tuple[Stage, type[Action]], Stage] = {
    (_S.DORMANT, Germinate): _S.GERMINATED,
    (_S.GERMINATED, Promote): _S.TRAINING,
    (_S.TRAINING, Advance): _S.GRAFTING,
    (_S.GRAFTING, Advance): _S.STABILIZATION,
    (_S.STABILIZATION, Advance): _S.EVALUATING,
    (_S.EVALUATING, Advance): _S.FINE_TUNING,
    (_S.FINE_TUNING, Advance): _S.FOSSILIZED,
    (_S.CULLED, Advance): _S.DORMANT,
    (_S.CANCELLED, Advance): _S.DORMANT,
    (_S.ROLLED_BACK, Advance): _S.DORMANT,
    **{(s, Cancel): _S.CANCELLED for s in (_S.GERMINATED, _S.TRAINING)},
    **{(s, Cull): _S.CULLED for s in (_S.TRAINING, _S.GRAFTING, _S.EVALUATING, _S.FINE_TUNING)},
    **{
        (s, Rollback): _S.ROLLED_BACK
        for s in (_S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING)
    },
}


class IllegalTransitionError(ValueError):
    """An action was commanded that the seed's stage does not allow; nothing was changed."""

    def __init__(self, stage: Stage, action: Action) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(stage, action)
        self.stage, self.action = stage, action

    def __str__(self) -> str:
        legal = [kind.__name__ for stage, kind in MOVES if stage == self.stage]
        return (
            f"{type(self.action).__name__} on seed {self.action.seed} of site "
            f"'{self.action.site}' must fit its stage, but the seed is {self.stage.name}; "
            f"legal now: {', '.join(legal) or 'nothing, the stage is terminal'}."
        )


@dataclass(frozen=True)
class Transition:
    """One applied action, for the growth log.

    Attributes:
        interval: Interval at whose end it was applied.
        step: Optimizer steps done by then.
        action: What was commanded.
        before: State before.
        after: State after.
    """

    interval: int
    step: int
    action: Action
    before: SeedState
    after: SeedState

    @property
    def blueprint(self) -> str:
        """Name of the blueprint that the seed had or got."""
        state = self.after if self.after.blueprint_id else self.before
        return BLUEPRINTS.name_at(state.blueprint_id)


def advance(state: SeedState, action: Action) -> SeedState:
    """The state after `action`, a pure function of its arguments.

    Args:
        state: State before the action.
        action: What the controller commands.

    Returns:
        The new state, with `epochs` 0.

    Raises:
        IllegalTransitionError: If the stage does not allow the action.
        UnknownNameError: If a Germinate names an unknown blueprint or graft strategy.
    """
    target = MOVES.get((state.stage, type(action)))
    if target is None:
        raise IllegalTransitionError(state.stage, action)
    if isinstance(action, Germinate):
        return SeedState(target, blueprint_id(action.blueprint), 0, graft_id(action.graft))
    if target is Stage.DORMANT:
        return SeedState()
    return SeedState(target, state.blueprint_id, 0, state.graft_id)
