"""Chunk seeds in plain PyTorch: only the seeds whose alpha is not 0 are computed.

Shapes: T = rows (batch x positions), D = channels, S = seeds, C = D / S channels of one chunk,
H = hidden units of one seed, n = the seeds computed.
"""

import torch
from torch import Tensor

from esper_kernels.phi import Phi, apply_phi


def chunk_outputs(
    x_nTC: Tensor, w1_nCH: Tensor, b1_nH: Tensor, w2_nHC: Tensor, phi_n: Tensor, hidden_n: Tensor
) -> Tensor:
    """What n seeds add to their chunks before alpha: `phi(x W1 + b1) W2`, `[n, T, C]`."""
    z_nTH = torch.baddbmm(b1_nH.unsqueeze(1), x_nTC, w1_nCH)
    h_nTH = apply_phi(z_nTH, phi_n, dim=0)
    units = torch.arange(z_nTH.shape[-1], device=hidden_n.device)
    unused_nH = units >= hidden_n.unsqueeze(1)
    h_nTH = h_nTH.masked_fill(unused_nH.unsqueeze(1), 0.0)
    delta_nTC = torch.bmm(h_nTH, w2_nHC)
    diagonal = (phi_n == Phi.DIAGONAL).nonzero().squeeze(1)
    if diagonal.numel():
        scale, shift = w2_nHC[diagonal, 0], w2_nHC[diagonal, 1]
        scaled = x_nTC[diagonal] * scale.unsqueeze(1) + shift.unsqueeze(1)
        delta_nTC = delta_nTC.index_copy(0, diagonal, scaled)
    return delta_nTC


def chunk_seeds(
    x_TD: Tensor,
    w1_SCH: Tensor,
    b1_SH: Tensor,
    w2_SHC: Tensor,
    alpha_S: Tensor,
    phi_S: Tensor,
    hidden_S: Tensor,
) -> Tensor:
    """See `esper_kernels.chunk_seeds`."""
    # seeds at alpha 0 are never computed, so NaN in their weights cannot reach the host
    active = alpha_S.nonzero().squeeze(1)
    if not active.numel():
        return x_TD
    x_STC = x_TD.unflatten(1, w1_SCH.shape[:2]).transpose(0, 1)
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x_nTC = x_STC[active].to(dtype)
    w1, b1, w2 = (w[active].to(dtype) for w in (w1_SCH, b1_SH, w2_SHC))
    delta_nTC = chunk_outputs(x_nTC, w1, b1, w2, phi_S[active], hidden_S[active])
    y_nTC = x_nTC + alpha_S[active, None, None] * delta_nTC
    y_STC = x_STC.index_copy(0, active, y_nTC.to(x_TD.dtype))
    y_TD: Tensor = y_STC.transpose(0, 1).flatten(1)
    return y_TD
