"""The whole state of a trainer between two intervals, and how long it is remembered.

Before a graft begins, everything is remembered. The memory is kept while a seed is on trial that
had no part in it, and dropped once all of them have proved themselves.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esper.config.run import GrowthConfig
from esper.seeds.grafting import GraftSignals
from esper.seeds.state import SeedState, Stage

# site and index of a seed
Place = tuple[str, int]
# each is a copy of the model and of the optimizer's state
MAX_SNAPSHOTS = 4


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Host, seeds, optimizer, random generators and order of the data, as they were.

    Attributes:
        step: Optimizer steps done by then.
        model: State dict of the host with its lattice; a copy.
        optimizer: Its state dict; a copy.
        random: What `Trainer.random_state` returned.
        signals: What the paces of grafts were decided on.
        grad_norms: Gradient norms of the last intervals.
        grafted: The seeds that were grafted.
        note: What the trainer's owner wants to have back with it, as JSON.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: tuple[Tensor, ...]
    signals: GraftSignals
    grad_norms: list[float]
    grafted: frozenset[Place]
    note: Any


def on_trial(state: SeedState, growth: GrowthConfig) -> bool:
    """Whether a seed is grafted but has not proved itself yet."""
    if state.stage is Stage.FINE_TUNING:
        return state.epochs < growth.trial_intervals
    return state.stage in (Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING)


def before_grafts(past: Sequence[Snapshot], seeds: Collection[Place]) -> Snapshot | None:
    """The newest snapshot in which none of the seeds was grafted; None if there is none."""
    clean = (snapshot for snapshot in reversed(past) if snapshot.grafted.isdisjoint(seeds))
    return next(clean, None)


def still_needed(past: Sequence[Snapshot], seeds: Collection[Place]) -> list[Snapshot]:
    """The snapshots that a rollback of one or several of the seeds could ask for."""
    wanted = {id(before_grafts(past, [seed])) for seed in seeds}
    return [snapshot for snapshot in past if id(snapshot) in wanted]
