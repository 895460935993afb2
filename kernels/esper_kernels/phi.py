"""What a seed's hidden units compute: a table from an int32 code to a function of z.

The code, not the function, is stored per seed, so that waking a seed only changes data.
Codes below `FIRST_CUSTOM` are built in; `register_phi` adds a user's own above them.
"""

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST_CUSTOM = 64


class Phi(IntEnum):
    """Codes of the built-in functions."""

    ZERO = 0
    IDENTITY = 1
    RELU = 2
    GELU = 3
    SILU = 4
    GLU = 5  # first half of the hidden units, gated by the sigmoid of the second half
    DIAGONAL = 6  # no hidden units: y = x * W2[0] + W2[1], per channel; chunk seeds only


def _glu(z: Tensor) -> Tensor:
    value, gate = z.chunk(2, dim=-1)
    return torch.cat([value * torch.sigmoid(gate), torch.zeros_like(value)], dim=-1)


PHI: dict[int, Callable[[Tensor], Tensor]] = {
    Phi.ZERO: torch.zeros_like,
    Phi.IDENTITY: lambda z: z,
    Phi.RELU: F.relu,
    Phi.GELU: F.gelu,
    Phi.SILU: F.silu,
    Phi.GLU: _glu,
    # DIAGONAL reads x itself, so it has no function of z; the reference handles it
    Phi.DIAGONAL: torch.zeros_like,
}


def register_phi(function: Callable[[Tensor], Tensor]) -> int:
    """Add a function of the hidden units and return its code.

    Args:
        function: Maps z of shape `[T, n, H]` (span sites: `[T, n]`) to the same shape and dtype.

    Returns:
        The new code, `FIRST_CUSTOM` or above, in order of registration.
    """
    code = max(FIRST_CUSTOM - 1, *PHI) + 1
    PHI[code] = function
    return code


def apply_phi(z: Tensor, phi_n: Tensor, dim: int) -> Tensor:
    """Apply to each seed's z its own function.

    Args:
        z: Pre-activations of n seeds, with the seeds along `dim`.
        phi_n: Codes, `[n]`, int32.
        dim: Axis of the seeds.

    Returns:
        Shape and dtype of `z`.

    Raises:
        KeyError: If a code was never registered.
    """
    codes = phi_n.tolist()
    if len(set(codes)) == 1:
        return PHI[codes[0]](z)
    h = torch.empty_like(z)
    for code in sorted(set(codes)):
        seeds = (phi_n == code).nonzero().squeeze(1)
        h = h.index_copy(dim, seeds, PHI[code](z.index_select(dim, seeds)))
    return h
