"""Statistics of the columns of activations and gradients in plain PyTorch."""

import torch
from torch import Tensor

# an activation smaller than this says nothing to the layer behind it
DEAD_BELOW = 1e-6


def column_statistics(x_TD: Tensor) -> Tensor:
    """See `esper_kernels.column_statistics`."""
    rows = x_TD.float()
    dead = (rows.abs() < DEAD_BELOW).sum(0)
    return torch.stack([rows.sum(0), rows.square().sum(0), dead.float()])


def gradient_energy(dy_TD: Tensor) -> Tensor:
    """Number of rows times the sum of squares of each column, `[D]` fp32.

    With a mean loss, that does not depend on the size of the batch.
    """
    # scaled first: the gradient of a mean over many rows would underflow when squared
    return (dy_TD.float() * len(dy_TD)).square().mean(0)
