"""Metrics of a user's own, computed once a trial, after its last step.

Example:
    >>> @metric("weight_norm", unit="", higher_is_better=False)
    ... def weight_norm(trained: Trained) -> float:
    ...     return math.sqrt(sum(float(p.square().sum()) for p in trained.model.parameters()))

A module with such functions is named under a run's `plugins`, and the metrics that it shall compute
under `metrics`. Their values stand in the trial's record beside the others: a question may ask for
them, and its guardrails may.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn

from esper.registry import Registry
from esper.training.tasks import TaskData

# what every trial records already, and the name that a guardrail on collapsed runs has
RESERVED = frozenset(
    {
        "collapse", "step", "steps", "parameters", "host_parameters", "train_flops",
        "train_seconds", "growth_flops", "growth_seconds", "seeds_kept", "seeds_culled",
        "seeds_rolled_back", "vetoes", "active_seeds", "grad_norm", "host_drift_frac",
        "new_seed_grad_ratio", "shards",
    }
)  # fmt: skip
# and what a task's own metrics begin with
RESERVED_STARTS = ("train_", "held_out_", "test_")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Trained:
    """What a metric is computed from.

    Attributes:
        model: As it ended, with its lattice, in evaluation mode, on `device`. A metric must leave
            it as it is.
        data: The trial's data, on the CPU.
        device: Of the model.
    """

    model: nn.Module
    data: TaskData
    device: str


Function = Callable[[Trained], float]


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        name: In records, questions and MLflow.
        unit: For readers, e.g. `ms`; empty for a pure number.
        higher_is_better: A question that says otherwise is refused.
        function: What computes it.
    """

    name: str
    unit: str
    higher_is_better: bool
    function: Function


METRICS = Registry[Metric]("metric")


class MetricError(RuntimeError):
    """A metric could not be computed; the trial has no record, and can be run again."""

    def __init__(self, name: str, why: str) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"metric '{self.name}' must return one number, but {self.why}; correct its function."


def metric(name: str, *, unit: str, higher_is_better: bool) -> Callable[[Function], Function]:
    """Register the decorated function of a `Trained` trial as a metric.

    The function is called with the random numbers seeded by the trial. It is not called for a
    trial that collapsed: its value is NaN, and a verdict ranks the run worst. NaN from the function
    itself makes a verdict UNHEALTHY.

    Args:
        name: A new name of small letters, digits and underscores.
        unit: For readers; empty for a pure number.
        higher_is_better: The better direction.

    Raises:
        ValueError: If the name is taken, one of those that every trial records, or not well formed.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"metric name must be small letters, digits and underscores, but got '{name}'."
        )
    if name in RESERVED or name.startswith(RESERVED_STARTS):
        raise ValueError(
            f"metric name must not be that of what every trial records, nor begin with "
            f"{', '.join(RESERVED_STARTS)}, but got '{name}'; choose another name."
        )

    def add(function: Function) -> Function:
        METRICS.register(name)(Metric(name, unit, higher_is_better, function))
        return function

    return add


def compute(names: Sequence[str], trained: Trained, seed: int) -> dict[str, float]:
    """The values of some metrics.

    Args:
        names: Registered ones.
        trained: What they are computed from.
        seed: Of the random numbers of each; those of the caller go on as if nothing had been drawn.

    Raises:
        MetricError: If a function fails or does not return a number.
    """
    trained.model.eval()
    return {name: _value(METRICS[name], trained, seed) for name in names}


def _value(kind: Metric, trained: Trained, seed: int) -> float:
    with torch.random.fork_rng(_gpus(trained.device)):
        torch.manual_seed(seed)
        try:
            value = kind.function(trained)
        except Exception as error:
            raise MetricError(kind.name, f"{type(error).__name__}: {error}") from error
    if not isinstance(value, Real) or isinstance(value, bool):
        raise MetricError(kind.name, f"got {type(value).__name__} {value!r}")
    return float(value)


def _gpus(device: str) -> list[int]:
    place = torch.device(device)
    return [place.index or 0] if place.type == "cuda" else []
