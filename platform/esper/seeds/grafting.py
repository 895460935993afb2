"""Graft strategies: how alpha goes from 0 to 1.

A strategy has a curve, alpha as a function of progress in [0, 1], and a pace, by how much
progress moves per optimizer step in units of `1 / ramp_steps`, decided once an interval.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from esper.config.run import GrowthConfig
from esper.registry import Registry


@dataclass(frozen=True)
class GraftSignals:
    """What a pace may depend on; a missing signal is an error when a strategy asks for it.

    Attributes:
        loss: Mean training loss of the last interval, in units of the task's loss.
        previous_loss: The same for the interval before.
        host_drift_frac: Relative change of the host's weights over the interval.
        grad_norm: Norm of the host's gradient at the end of the interval.
        median_grad_norm: Running median of the same.
    """

    loss: float | None = None
    previous_loss: float | None = None
    host_drift_frac: float | None = None
    grad_norm: float | None = None
    median_grad_norm: float | None = None

    def require(self, name: str, strategy: str) -> float:
        """The signal's value.

        Raises:
            ValueError: If it was not measured.
        """
        value = getattr(self, name)
        if value is None or not isfinite(value):
            raise ValueError(
                f"{name} must be measured for graft strategy '{strategy}', but got {value}; "
                "give it to `lattice.report(...)` or choose the 'linear' strategy."
            )
        return float(value)


@dataclass(frozen=True)
class GraftStrategy:
    """A curve and a pace.

    Attributes:
        curve: 'linear': alpha = p; 'cosine': alpha = (1 - cos(pi p)) / 2.
        pace: Factor of the nominal speed for the next interval; 0 holds alpha where it is.
    """

    curve: Literal["linear", "cosine"]
    pace: Callable[[GraftSignals, GrowthConfig], float]


def _always(signals: GraftSignals, growth: GrowthConfig) -> float:
    return 1.0


def _performance_linked(signals: GraftSignals, growth: GrowthConfig) -> float:
    """Full speed while the training loss falls, half while it is flat within 1 %, else wait."""
    loss = signals.require("loss", "performance_linked")
    before = signals.require("previous_loss", "performance_linked")
    if loss < before:
        return 1.0
    return 0.5 if loss <= before + 0.01 * abs(before) else 0.0


def _drift_controlled(signals: GraftSignals, growth: GrowthConfig) -> float:
    """Waits while the host's own weights change fast."""
    drift = signals.require("host_drift_frac", "drift_controlled")
    return 1.0 if drift <= growth.max_drift_frac else 0.0


def _grad_norm_gated(signals: GraftSignals, growth: GrowthConfig) -> float:
    """Waits while the gradient explodes or vanishes against its running median."""
    norm = signals.require("grad_norm", "grad_norm_gated")
    median = signals.require("median_grad_norm", "grad_norm_gated")
    limit = growth.max_grad_norm_ratio
    return 1.0 if median / limit <= norm <= median * limit else 0.0


GRAFTS: Registry[GraftStrategy] = Registry("graft strategy")
for _name, _strategy in {
    "linear": GraftStrategy("linear", _always),
    "cosine": GraftStrategy("cosine", _always),
    "performance_linked": GraftStrategy("linear", _performance_linked),
    "drift_controlled": GraftStrategy("linear", _drift_controlled),
    "grad_norm_gated": GraftStrategy("linear", _grad_norm_gated),
}.items():
    GRAFTS.register(_name)(_strategy)


def graft_id(name: str) -> int:
    """Index of a strategy in the registry, as stored in the state tensor.

    Raises:
        UnknownNameError: If nobody registered the name.
    """
    return GRAFTS.index(name)
