"""The state of a seed: one int32 row `[stage, blueprint_id, epochs_in_stage, graft_strategy]`."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import overload

import numpy as np
from numpy.typing import NDArray

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


class SeedTable:
    """The states of all seeds of a layer: a sequence of `SeedState`, kept as the numbers they are.

    A site may have a million seeds, of which few are looked at one by one.

    Args:
        rows: The state tensor, int32 `[S, 4]`; not copied.

    Attributes:
        rows: The same.
    """

    def __init__(self, rows: NDArray[np.int32]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, states: Sequence[SeedState]) -> "SeedTable":
        """A table of some states."""
        rows = [[s.stage, s.blueprint_id, s.epochs, s.graft_id] for s in states]
        return cls(np.array(rows, dtype=np.int32).reshape(-1, 4))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, seed: int) -> SeedState: ...

    @overload
    def __getitem__(self, seed: slice) -> list[SeedState]: ...

    def __getitem__(self, seed: int | slice) -> SeedState | list[SeedState]:
        if isinstance(seed, slice):
            return [self[i] for i in range(len(self))[seed]]
        stage, kind, epochs, graft = self.rows[seed].tolist()
        return SeedState(Stage(stage), kind, epochs, graft)

    def __setitem__(self, seed: int, state: SeedState) -> None:
        self.rows[seed] = state.stage, state.blueprint_id, state.epochs, state.graft_id

    def __iter__(self) -> Iterator[SeedState]:
        return (self[seed] for seed in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeedTable) and bool(np.array_equal(self.rows, other.rows))

    __hash__ = None  # type: ignore[assignment]

    def seeds_in(self, stages: Collection[Stage]) -> list[int]:
        """Indices of the seeds in any of the stages, ascending."""
        found: list[int] = np.flatnonzero(np.isin(self.rows[:, STAGE], list(stages))).tolist()
        return found

    def stages(self) -> dict[Stage, int]:
        """How many seeds are in each stage in which there is one.

        Raises:
            ValueError: If a number is no stage.
        """
        stages, counts = np.unique(self.rows[:, STAGE], return_counts=True)
        return {Stage(int(s)): int(n) for s, n in zip(stages, counts, strict=True)}
