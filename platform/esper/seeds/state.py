"""The state of a seed: one int32 row `[stage, blueprint_id, epochs_in_stage, graft_strategy]`."""

from dataclasses import dataclass
from enum import IntEnum

# columns of the [S, 4] state tensor
STAGE, BLUEPRINT, EPOCHS, GRAFT = range(4)


class Stage(IntEnum):
    """The eleven stages of a seed's life."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


# weights and optimizer moments move in these stages and in no other
TRAINABLE_STAGES = frozenset({Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING})
# alpha may differ from 0 in these
GRAFTED_STAGES = frozenset(
    {Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING, Stage.FINE_TUNING, Stage.FOSSILIZED}
)
# the seed holds parameters that count towards a budget
AWAKE_STAGES = GRAFTED_STAGES | {Stage.GERMINATED, Stage.TRAINING}
# the seed waits for the controller's next move
PIPELINE_STAGES = AWAKE_STAGES - {Stage.FINE_TUNING, Stage.FOSSILIZED}
# the slot rests under an embargo before it is free again
RESTING_STAGES = frozenset({Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK})


@dataclass(frozen=True)
class SeedState:
    """One row of the state tensor.

    Attributes:
        stage: Where the seed is in its life.
        blueprint_id: Index into the blueprint registry; 0 is the no-op.
        epochs: Whole intervals spent in this stage.
        graft_id: Index into the registry of graft strategies.
    """

    stage: Stage = Stage.DORMANT
    blueprint_id: int = 0
    epochs: int = 0
    graft_id: int = 0
