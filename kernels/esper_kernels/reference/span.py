"""Span seeds in plain PyTorch: only the units whose alpha is not 0 are computed.

Shapes: T = rows, I = input features, O = output features, S = units, n = the units computed.
"""

import torch
from torch import Tensor

from esper_kernels.phi import apply_phi


def span_hidden(x_TI: Tensor, w_in_nI: Tensor, b_n: Tensor, phi_n: Tensor) -> Tensor:
    """Hidden activations of n units, `phi(x . w_in + b)`, `[T, n]`."""
    return apply_phi(torch.addmm(b_n, x_TI, w_in_nI.t()), phi_n, dim=1)


def span_seeds(
    x_TI: Tensor,
    z_TO: Tensor,
    w_in_SI: Tensor,
    b_S: Tensor,
    w_out_SO: Tensor,
    alpha_S: Tensor,
    phi_S: Tensor,
) -> Tensor:
    """See `esper_kernels.span_seeds`."""
    # units at alpha 0 are never computed, so NaN in their weights cannot reach the host
    active = alpha_S.nonzero().squeeze(1)
    if not active.numel():
        return z_TO
    dtype = torch.promote_types(z_TO.dtype, torch.float32)
    w_in, b, w_out = (w[active].to(dtype) for w in (w_in_SI, b_S, w_out_SO))
    h_Tn = span_hidden(x_TI.to(dtype), w_in, b, phi_S[active]) * alpha_S[active]
    return torch.addmm(z_TO.to(dtype), h_Tn, w_out).to(z_TO.dtype)
