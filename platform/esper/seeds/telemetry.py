"""What a layer measures between two reports: one vector, gathered as the gradient of a probe.

The probe is a tensor that enters every training pass and that no result depends on. Its gradient
is what the pass measured, so autograd adds the passes up: also in a compiled graph, in a replayed
CUDA graph, and once only in a checkpointed one. `esper_kernels.probe` has the layout.

Shapes: D = channels, S = seeds, T = rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.seeds.blueprints import Geometry
from esper_kernels import column_statistics, gradient_energy, probe_size
from esper_kernels.probe import probe_parts
from esper_kernels.reference import statistics as reference


@dataclass(frozen=True)
class Told:
    """Views of one gathered vector.

    Attributes:
        activations: Sum, sum of squares and dead count of each channel, `[3 * D]`.
        energy: Gradient energy of each channel, `[D]`.
        explained: Explained share of each seed's isolated target, `[S]`.
        rows: Rows whose activations were observed, `[1]`.
        passes: Passes whose gradient was observed, `[1]`.
        isolated: Passes in which seeds learned alone, `[1]`.
    """

    activations: Tensor
    energy: Tensor
    explained: Tensor
    rows: Tensor
    passes: Tensor
    isolated: Tensor


def make_probe(channels: int, num_seeds: int, device: torch.device) -> Tensor:
    """A probe that has gathered nothing; its gradient stays at one address for good."""
    probe = torch.zeros(probe_size(channels, num_seeds), device=device)
    return with_gathered(probe, torch.zeros_like(probe))


def with_gathered(probe: Tensor, gathered: Tensor) -> Tensor:
    """The probe as a leaf whose gradient is `gathered`."""
    probe = probe.detach().requires_grad_()
    probe.grad = gathered
    return probe


def gathered(probe: Tensor) -> Tensor:
    """The gathered vector.

    Raises:
        ValueError: If somebody took it away.
    """
    if probe.grad is None:
        raise ValueError(
            "probe.grad must stay in place, but is None; call `reset_telemetry` to forget what "
            "was gathered."
        )
    return probe.grad


def told(probe: Tensor, channels: int, num_seeds: int) -> Told:
    """What the probe has gathered."""
    return Told(*gathered(probe).split(probe_parts(channels, num_seeds)))


@torch.no_grad()
def add_activations(told: Told, rows_TD: Tensor, *, plain: bool = False) -> None:
    """Gather the statistics of one pass, seen without an operator in its way.

    Args:
        told: Where.
        rows_TD: Activations.
        plain: Whether plain PyTorch must do.
    """
    statistics = reference.column_statistics if plain else column_statistics
    told.activations.add_(statistics(rows_TD).view(-1))
    told.rows.add_(len(rows_TD))


@torch.no_grad()
def add_gradient(told: Told, dy_TD: Tensor, *, plain: bool = False) -> None:
    """Gather the gradient energy of one such pass; arguments as for `add_activations`."""
    told.energy.add_((reference.gradient_energy if plain else gradient_energy)(dy_TD))
    told.passes.add_(1)


def summary(told: Told, geometry: Geometry) -> dict[str, Tensor]:
    """Means of the interval, one value a seed; NaN where nothing was measured."""
    S = len(told.explained)

    def mean_of(total: Tensor, count: Tensor) -> Tensor:
        return torch.where(count > 0, total / count, math.nan)

    def per_seed(values: Tensor) -> Tensor:
        return values.view(S, -1).mean(1) if geometry == "chunk" else values.mean().expand(S)

    mean, mean_sq, dead = mean_of(told.activations, told.rows).view(3, -1)
    return {
        "grad_energy": per_seed(mean_of(told.energy, told.passes)),
        "variance": per_seed(mean_sq - mean.square()).clamp(min=0),
        "dead_frac": per_seed(dead),
        "explained_frac": mean_of(told.explained, told.isolated),
    }
