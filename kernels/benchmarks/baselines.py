"""What the kernels are compared with, written for speed, and the references that judge them.

The vectorised versions compute all seeds with batched matrix products in the dtype of x; they may
assume what a general function may not: which functions the seeds have (`codes`), and that no
weight is NaN. Run in fp64, the same forward and autograd are the reference of every check.

Shapes: T = rows, D = channels, S = seeds, C = channels of a chunk, H = hidden units, I and O =
input and output features of a span.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_kernels import Phi

DEAD_BELOW = 1e-6
TARGET_FRAC = 0.1


class Chunks(NamedTuple):
    """What one chunk site computes with; pool in fp32, alpha fp32, codes and sizes int32."""

    x_TD: Tensor
    w1_SCH: Tensor
    b1_SH: Tensor
    w2_SHC: Tensor
    alpha_S: Tensor
    phi_S: Tensor
    hidden_S: Tensor


class Span(NamedTuple):
    """What one span site computes with."""

    x_TI: Tensor
    z_TO: Tensor
    w_in_SI: Tensor
    b_S: Tensor
    w_out_SO: Tensor
    alpha_S: Tensor
    phi_S: Tensor


def function(code: int, z: Tensor) -> Tensor:
    """phi(z) of one of the elementwise functions."""
    match code:
        case Phi.RELU:
            return F.relu(z)
        case Phi.SILU:
            return F.silu(z)
        case Phi.GELU:
            return F.gelu(z)
    return z


def slope(code: int, z: Tensor) -> Tensor:
    """phi'(z)."""
    match code:
        case Phi.RELU:
            return (z > 0).to(z.dtype)
        case Phi.SILU:
            s = torch.sigmoid(z)
            return s + z * s * (1 - s)
        case Phi.GELU:
            cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
            return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return torch.ones_like(z)


def statistics(x: Tensor) -> Tensor:
    """Sums, sums of squares and counts of dead values per column, `[3, D]`, fp32 (fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dead = (wide.abs() < DEAD_BELOW).to(wide.dtype)
    return torch.stack([wide.sum(0), wide.square().sum(0), dead.sum(0)])


def chunk_forward(
    site: Chunks, codes: Sequence[int], observe: bool
) -> tuple[Tensor, Tensor | None]:
    """`y = x + alpha * phi(x W1 + b1) W2` by batched products; y and the statistics."""
    x_STC = _by_seed(site.x_TD, site.w1_SCH.shape[0])
    z_STH = _hidden(x_STC, site)
    h_STH = _phi(z_STH, site, codes)
    w2 = (site.w2_SHC * site.alpha_S.view(-1, 1, 1)).to(x_STC.dtype)
    delta = h_STH * w2.transpose(1, 2) if _is_scalar(site) else torch.bmm(h_STH, w2)
    y_TD = (x_STC + delta).transpose(0, 1).reshape(site.x_TD.shape)
    return y_TD, statistics(site.x_TD) if observe else None


def chunk_forward_sums(
    site: Chunks, codes: Sequence[int], observe: bool
) -> tuple[Tensor, Tensor | None]:
    """The same without a matrix product: sums that a compiler can fuse; for small chunks."""
    S, C, _ = site.w1_SCH.shape
    x_TSC = site.x_TD.view(-1, S, C).float()
    z_TSH = site.b1_SH + sum(x_TSC[..., c, None] * site.w1_SCH[:, c] for c in range(C))
    h_TSH = _phi(z_TSH.transpose(0, 1), site, codes).transpose(0, 1)
    w2 = site.w2_SHC * site.alpha_S.view(-1, 1, 1)
    delta = sum(h_TSH[..., h, None] * w2[:, h] for h in range(w2.shape[1]))
    y_TD = (x_TSC + delta).to(site.x_TD.dtype).reshape(site.x_TD.shape)
    return y_TD, statistics(site.x_TD) if observe else None


def chunk_backward(
    dy_TD: Tensor, site: Chunks, codes: Sequence[int], observe: bool
) -> tuple[Tensor, ...]:
    """Gradients of `chunk_forward` by hand, the hidden units recomputed: dx, dw1, db1, dw2, ..."""
    S = site.w1_SCH.shape[0]
    x_STC, g_STC = (_by_seed(t, S) for t in (site.x_TD, dy_TD))
    z_STH = _hidden(x_STC, site)
    h_STH, used = _phi(z_STH, site, codes), _used(site, codes)
    raw_SHC = torch.bmm(h_STH.transpose(1, 2), g_STC).to(site.w2_SHC.dtype)
    alpha = site.alpha_S.view(-1, 1, 1)
    w2 = (site.w2_SHC * alpha).to(x_STC.dtype)
    dz_STH = torch.bmm(g_STC, w2.transpose(1, 2)) * _select(slope, z_STH, site.phi_S, codes)
    if used is not None:
        dz_STH = dz_STH.masked_fill(~used, 0.0)
    dw1 = torch.bmm(x_STC.transpose(1, 2), dz_STH).to(site.w1_SCH.dtype)
    db1 = dz_STH.sum(1, dtype=site.b1_SH.dtype)
    dx_STC = g_STC + torch.bmm(dz_STH, site.w1_SCH.to(x_STC.dtype).transpose(1, 2))
    dalpha = (site.w2_SHC * raw_SHC).sum((1, 2))
    dx_TD = dx_STC.transpose(0, 1).reshape(dy_TD.shape)
    grads = dx_TD, dw1, db1, raw_SHC * alpha, dalpha * (site.alpha_S != 0)
    return (*grads, dy_TD.float().square().sum(0)) if observe else grads


def chunk_loop(
    x_TD: Tensor, seeds: Sequence[tuple[Tensor, Tensor, Tensor]], alphas: list[float], code: int
) -> Tensor:
    """One seed after the other, as the legacy layer does it.

    Args:
        x_TD: Activations.
        seeds: Weights `[C, H]`, `[H]` and `[H, C]` of each seed, in the dtype of x.
        alphas: Their blend weights; the legacy layer keeps them as Python numbers.
        code: Their function.
    """
    chunks = list(x_TD.chunk(len(seeds), dim=1))
    for s, (w1, b1, w2) in enumerate(seeds):
        if alphas[s] != 0.0:
            h = function(code, chunks[s] @ w1 + b1)
            chunks[s] = chunks[s] + alphas[s] * (h @ w2)
    return torch.cat(chunks, dim=1)


def chunk_isolated(
    dy_TD: Tensor, site: Chunks, codes: Sequence[int], rows: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the isolated objective `desired_update` of the seeds `rows`.

    Returns:
        dw1, db1, dw2 of those seeds and the explained share of each.
    """
    S = site.w1_SCH.shape[0]
    wide = torch.promote_types(site.x_TD.dtype, torch.float32)
    x, grad = (_by_seed(t, S)[rows].detach().to(wide) for t in (site.x_TD, dy_TD))
    weights = [w[rows].detach().to(wide).requires_grad_() for w in site[1:4]]
    few = site._replace(
        w1_SCH=weights[0], b1_SH=weights[1], w2_SHC=weights[2],
        phi_S=site.phi_S[rows], hidden_S=site.hidden_S[rows],
    )  # fmt: skip
    with torch.enable_grad():
        out = torch.bmm(_phi(_hidden(x, few), few, codes), few.w2_SHC)
        size = x.square().mean((1, 2), keepdim=True).sqrt()
        steep = grad.square().mean((1, 2), keepdim=True).sqrt()
        target = -grad * (TARGET_FRAC * size / steep)
        left = (out - target).square().sum((1, 2)) / target.square().sum((1, 2))
        grads = torch.autograd.grad(left.sum(), weights)
    return *grads, 1 - left.detach()


def span_forward(site: Span, codes: Sequence[int], observe: bool) -> tuple[Tensor, Tensor | None]:
    """`y = z + (phi(x W_in + b) * alpha) W_out` by two matrix products; y and the statistics."""
    dtype = site.x_TI.dtype
    h_TS = _select(function, span_hidden(site), site.phi_S, codes, dim=1)
    w_out = (site.w_out_SO * site.alpha_S[:, None]).to(dtype)
    y_TO = torch.addmm(site.z_TO, h_TS, w_out)
    return y_TO, statistics(site.z_TO) if observe else None


def span_hidden(site: Span) -> Tensor:
    """`x W_in + b`, `[T, S]`: what a forward keeps for `span_backward`."""
    dtype = site.x_TI.dtype
    return torch.addmm(site.b_S.to(dtype), site.x_TI, site.w_in_SI.to(dtype).t())


def span_backward(
    dy_TO: Tensor, site: Span, u_TS: Tensor, codes: Sequence[int], observe: bool
) -> tuple[Tensor, ...]:
    """Gradients of `span_forward` by hand: dx, dw_in, db, dw_out, dalpha, ..."""
    dtype = site.x_TI.dtype
    w_in = site.w_in_SI.to(dtype)
    h_TS = _select(function, u_TS, site.phi_S, codes, dim=1)
    raw_SO = (h_TS.t() @ dy_TO).to(site.w_out_SO.dtype)
    alpha = site.alpha_S[:, None]
    scaled = (site.w_out_SO * alpha).to(dtype)
    du_TS = (dy_TO @ scaled.t()) * _select(slope, u_TS, site.phi_S, codes, dim=1)
    grads = (
        du_TS @ w_in, (du_TS.t() @ site.x_TI).to(site.w_in_SI.dtype),
        du_TS.sum(0, dtype=site.b_S.dtype), raw_SO * alpha, (raw_SO * site.w_out_SO).sum(1),
    )  # fmt: skip
    return (*grads, dy_TO.float().square().sum(0)) if observe else grads


def _by_seed(rows: Tensor, num_seeds: int) -> Tensor:
    by_seed: Tensor = rows.unflatten(1, (num_seeds, -1)).transpose(0, 1)
    return by_seed


def _is_scalar(site: Chunks) -> bool:
    """One channel a chunk: an elementwise product is faster than a product of matrices."""
    return site.w1_SCH.shape[1] == 1 and site.w1_SCH.shape[2] == 1


def _hidden(x_STC: Tensor, site: Chunks) -> Tensor:
    w1, b1 = site.w1_SCH.to(x_STC.dtype), site.b1_SH.to(x_STC.dtype).unsqueeze(1)
    return x_STC * w1 + b1 if _is_scalar(site) else torch.baddbmm(b1, x_STC, w1)


def _used(site: Chunks, codes: Sequence[int]) -> Tensor | None:
    """Mask of the hidden units in use, or None where all are."""
    if len(codes) == 1:
        return None
    units = torch.arange(site.w1_SCH.shape[2], device=site.hidden_S.device)
    return (units < site.hidden_S.unsqueeze(1)).unsqueeze(1)


def _phi(z_STH: Tensor, site: Chunks, codes: Sequence[int]) -> Tensor:
    h_STH = _select(function, z_STH, site.phi_S, codes)
    used = _used(site, codes)
    return h_STH if used is None else h_STH.masked_fill(~used, 0.0)


def _select(
    what: Callable[[int, Tensor], Tensor],
    z: Tensor,
    phi_S: Tensor,
    codes: Sequence[int],
    dim: int = 0,
) -> Tensor:
    """`what(code, z)` of each seed's own code, with the seeds along `dim`."""
    out: Tensor = what(codes[0], z)
    shape = [1] * z.ndim
    shape[dim] = -1
    for code in codes[1:]:
        out = torch.where(phi_S.view(shape) == code, what(code, z), out)
    return out
