"""Gradients of the seeds in plain PyTorch, by the operations that autograd would run.

The hidden units are computed again; autograd itself is asked only about functions that the
table of built-in ones does not know.

Shapes: T = rows, D = channels, I and O = features of a span, S = seeds, n = seeds computed.
`learning_S` says what a seed learns (`esper_kernels.learning`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from torch._C import DispatchKey, _SetExcludeDispatchKeyGuard

from esper_kernels.learning import ISOLATED, OBJECTIVES, TASK
from esper_kernels.phi import Phi, apply_phi
from esper_kernels.reference.isolated import chunk_unexplained, span_unexplained, target_of

# from the gradient of phi(z) to that of z
Pull: TypeAlias = Callable[[Tensor], Tensor]
# share of its target that each of n seeds leaves unexplained, given their weights
Unexplained: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunk_seeds_backward(
    dy_TD: Tensor, x_TD: Tensor, w1_SCH: Tensor, b1_SH: Tensor, w2_SHC: Tensor,
    alpha_S: Tensor, phi_S: Tensor, hidden_S: Tensor, learning_S: Tensor, objective: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of chunk seeds.

    Returns:
        Gradients of x, w1, b1, w2 and alpha, and the explained share of the isolated
        objective, `[S]`, 0 for seeds that do not learn it.
    """
    pool = w1_SCH, b1_SH, w2_SHC
    dx_TD, dalpha_S = dy_TD, torch.zeros_like(alpha_S)
    grads = [*map(torch.zeros_like, pool)]
    active = alpha_S.nonzero().squeeze(1)
    if active.numel():
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_nTC = _chunks(x_TD, w1_SCH)[active].to(dtype)
        # the layouts are those that autograd has, because products round by their layout
        dy_nTC = _chunks(dy_TD, w1_SCH).index_select(0, active).to(dtype)
        w1, b1, w2 = (w[active].to(dtype) for w in pool)
        dx_nTC, *own, dalpha = _chunk_outputs_backward(
            dy_nTC, x_nTC, w1, b1, w2, alpha_S[active], phi_S[active], hidden_S[active]
        )
        dx_STC = _chunks(dy_TD, w1_SCH).index_copy(0, active, (dy_nTC + dx_nTC).to(dy_TD.dtype))
        dx_TD = dx_STC.transpose(0, 1).flatten(1)
        _put(grads, own, active, learning_S)
        dalpha_S[active] = dalpha.to(alpha_S.dtype)

    def unexplained_by(rows: Tensor) -> Unexplained:
        x_nTC, dy_nTC = (_chunks(t, w1_SCH)[rows].to(_wide(w1_SCH)) for t in (x_TD, dy_TD))
        target_nTC = target_of(OBJECTIVES[objective], x_nTC, dy_nTC, (1, 2))
        phi, hidden = phi_S[rows], hidden_S[rows]
        return lambda w1, b1, w2: chunk_unexplained(x_nTC, target_nTC, w1, b1, w2, phi, hidden)

    explained_S = _isolated(pool, grads, learning_S, unexplained_by)
    return dx_TD, grads[0], grads[1], grads[2], dalpha_S, explained_S


def span_seeds_backward(
    dy_TO: Tensor, x_TI: Tensor, z_TO: Tensor, w_in_SI: Tensor, b_S: Tensor, w_out_SO: Tensor,
    alpha_S: Tensor, phi_S: Tensor, learning_S: Tensor, objective: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of span seeds; that of z is dy itself.

    Returns:
        Gradients of x, w_in, b, w_out and alpha, and the explained share of the isolated
        objective, `[S]`, 0 for units that do not learn it.
    """
    pool = w_in_SI, b_S, w_out_SO
    dx_TI, dalpha_S = torch.zeros_like(x_TI), torch.zeros_like(alpha_S)
    grads = [*map(torch.zeros_like, pool)]
    active = alpha_S.nonzero().squeeze(1)
    if active.numel():
        dtype = torch.promote_types(z_TO.dtype, torch.float32)
        x, dy = x_TI.to(dtype), dy_TO.to(dtype)
        w_in, b, w_out = (w[active].to(dtype) for w in pool)
        z_Tn = torch.addmm(b, x, w_in.t())
        h_Tn, pull = phi_with_gradient(z_Tn, phi_S[active], dim=1)
        dscaled_Tn = dy @ w_out.t()
        dz_Tn = pull(dscaled_Tn * alpha_S[active])
        dx_TI = (dz_Tn @ w_in).to(x_TI.dtype)
        dw_out = (h_Tn * alpha_S[active]).t() @ dy
        _put(grads, [dz_Tn.t() @ x, dz_Tn.sum(0), dw_out], active, learning_S)
        dalpha_S[active] = (dscaled_Tn * h_Tn).sum(0).to(alpha_S.dtype)

    def unexplained_by(rows: Tensor) -> Unexplained:
        x, z, dy = (t.to(_wide(w_in_SI)) for t in (x_TI, z_TO, dy_TO))
        target_TO, phi = target_of(OBJECTIVES[objective], z, dy, (0, 1)), phi_S[rows]
        return lambda w_in, b, w_out: span_unexplained(x, target_TO, w_in, b, w_out, phi)

    explained_S = _isolated(pool, grads, learning_S, unexplained_by)
    return dx_TI, grads[0], grads[1], grads[2], dalpha_S, explained_S


def _chunk_outputs_backward(
    dy_nTC: Tensor, x_nTC: Tensor, w1_nCH: Tensor, b1_nH: Tensor, w2_nHC: Tensor,
    alpha_n: Tensor, phi_n: Tensor, hidden_n: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `alpha * chunk_outputs(...)`: of x, w1, b1, w2 and alpha."""
    z_nTH = torch.baddbmm(b1_nH.unsqueeze(1), x_nTC, w1_nCH)
    h_nTH, pull = phi_with_gradient(z_nTH, phi_n, dim=0)
    units = torch.arange(z_nTH.shape[-1], device=hidden_n.device)
    unused = (units >= hidden_n.unsqueeze(1)).unsqueeze(1)
    h_nTH = h_nTH.masked_fill(unused, 0.0)
    ddelta_nTC = dy_nTC * alpha_n[:, None, None]
    dh_nTH = torch.bmm(ddelta_nTC, w2_nHC.transpose(1, 2)).masked_fill(unused, 0.0)
    dz_nTH = pull(dh_nTH)
    dx_nTC = torch.bmm(dz_nTH, w1_nCH.transpose(1, 2))
    dw1 = torch.bmm(x_nTC.transpose(1, 2), dz_nTH)
    dw2 = torch.bmm(h_nTH.transpose(1, 2), ddelta_nTC)
    dalpha_n = (dh_nTH * h_nTH).sum((1, 2)) / alpha_n
    diagonal = (phi_n == Phi.DIAGONAL).nonzero().squeeze(1)
    if diagonal.numel():
        x, dy, ddelta = (t[diagonal] for t in (x_nTC, dy_nTC, ddelta_nTC))
        scale, shift = w2_nHC[diagonal, :1], w2_nHC[diagonal, 1:2]
        dx_nTC[diagonal] += ddelta * scale
        dw2[diagonal] = 0
        dw2[diagonal, 0], dw2[diagonal, 1] = (ddelta * x).sum(1), ddelta.sum(1)
        dalpha_n[diagonal] = (dy * (x * scale + shift)).sum((1, 2))
    return dx_nTC, dw1, dz_nTH.sum(1), dw2, dalpha_n


_SLOPES: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    Phi.ZERO: lambda dh, _: torch.zeros_like(dh),
    Phi.IDENTITY: lambda dh, _: dh,
    Phi.RELU: lambda dh, z: torch.ops.aten.threshold_backward(dh, z, 0),
    Phi.GELU: torch.ops.aten.gelu_backward,
    Phi.SILU: torch.ops.aten.silu_backward,
    Phi.DIAGONAL: lambda dh, _: torch.zeros_like(dh),
}


def phi_with_gradient(z: Tensor, phi_n: Tensor, dim: int) -> tuple[Tensor, Pull]:
    """`apply_phi`, and the function that takes its gradient back to z."""
    codes = phi_n.tolist()
    if not set(codes) <= _SLOPES.keys():
        z = z.detach().requires_grad_()
        with recording():
            h = apply_phi(z, phi_n, dim)
        return h.detach(), lambda dh: torch.autograd.grad(h, z, dh, materialize_grads=True)[0]

    def pull(dh: Tensor) -> Tensor:
        if len(set(codes)) == 1:
            return _SLOPES[codes[0]](dh, z)
        dz = torch.empty_like(z)
        for code in sorted(set(codes)):
            seeds = (phi_n == code).nonzero().squeeze(1)
            slope = _SLOPES[code](dh.index_select(dim, seeds), z.index_select(dim, seeds))
            dz.index_copy_(dim, seeds, slope)
        return dz

    return apply_phi(z, phi_n, dim), pull


@contextmanager
def recording() -> Iterator[None]:
    """Record gradients, also inside an operator, below the dispatcher's autograd."""
    with (
        _SetExcludeDispatchKeyGuard(DispatchKey.AutogradFunctionality, False),
        _SetExcludeDispatchKeyGuard(DispatchKey.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def _chunks(rows_TD: Tensor, like_SCH: Tensor) -> Tensor:
    chunks_STC: Tensor = rows_TD.unflatten(1, like_SCH.shape[:2]).transpose(0, 1)
    return chunks_STC


def _wide(weights: Tensor) -> torch.dtype:
    return torch.promote_types(weights.dtype, torch.float32)


def _put(grads: Sequence[Tensor], own: Sequence[Tensor], rows: Tensor, learning_S: Tensor) -> None:
    """Set the gradients of some seeds, 0 for those that do not learn the task."""
    still = learning_S[rows] != TASK
    any_still = still.any()
    for grad, mine in zip(grads, own, strict=True):
        if any_still:
            mine = mine.masked_fill(still.view(-1, *[1] * (mine.ndim - 1)), 0)
        grad.index_copy_(0, rows, mine.to(grad.dtype))


def _isolated(
    pool: tuple[Tensor, Tensor, Tensor],
    grads: list[Tensor],
    learning_S: Tensor,
    unexplained_by: Callable[[Tensor], Unexplained],
) -> Tensor:
    """Add the gradients of the seeds that learn alone to `grads`; returns what they explain."""
    explained_S = torch.zeros(len(learning_S), device=learning_S.device)
    rows = (learning_S == ISOLATED).nonzero().squeeze(1)
    if rows.numel():
        weights = [w.detach()[rows].to(_wide(w)).requires_grad_() for w in pool]
        unexplained = unexplained_by(rows)
        with recording():
            unexplained_n = unexplained(*weights)
            # a seed's objective does not depend on the others, so the sum separates
            own = torch.autograd.grad(unexplained_n.sum(), weights, allow_unused=True)
        for grad, mine in zip(grads, own, strict=True):
            if mine is not None:
                grad.index_copy_(0, rows, mine.to(grad.dtype))
        explained_S[rows] = (1 - unexplained_n.detach()).float()
    return explained_S
