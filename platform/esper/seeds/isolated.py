"""Isolated training: seeds in TRAINING learn without touching the host, bit for bit.

The tap sits on the site's output. Forward it passes the output on; backward it passes the
gradient on, and uses it to give the training seeds, and nobody else, a gradient of their own
objective: fit a target with the seed's contribution, on detached input.

* `desired_update`: the target is the functional gradient `-dL/dy_s`, scaled to 10 % of the
  size of the activations it is to change, so that neither the loss's scale nor the batch's
  size matters.
* `reconstruction`: the target is the activation itself.

The loss of a seed is the share of its target's energy that it does not explain, and
`explained_frac` is 1 minus that. Source of the functional gradient as a target: Verbockhaven
et al., "Growing Tiny Networks", TMLR 2024.

Shapes: T = rows, n = training seeds, C = channels of a chunk, I and O = features of a span.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esper_kernels.reference.chunk import chunk_outputs
from esper_kernels.reference.span import span_hidden

Objective = Literal["desired_update", "reconstruction"]
# loss and explained share of n seeds, given (source rows, target rows, w_in, bias, w_out)
IsolatedLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

TARGET_FRAC = 0.1


def target_of(
    objective: Objective, activation: Tensor, grad: Tensor, dims: tuple[int, ...]
) -> Tensor:
    """What the seeds are to add, with the shape of `activation`.

    Args:
        objective: Which target.
        activation: The site's output before the seeds.
        grad: Gradient of the task loss at the output, same shape.
        dims: Axes over which one seed's target is scaled.
    """
    if objective == "reconstruction":
        return activation
    size = activation.square().mean(dims, keepdim=True).sqrt()
    steep = grad.square().mean(dims, keepdim=True).sqrt()
    return torch.where(steep > 0, -grad * (TARGET_FRAC * size / steep), 0.0)


def chunk_unexplained(
    x_nTC: Tensor, target_nTC: Tensor, w_in: Tensor, bias: Tensor, w_out: Tensor,
    phi_n: Tensor, hidden_n: Tensor,
) -> Tensor:  # fmt: skip
    """Share of each chunk seed's target that it leaves unexplained, `[n]`."""
    out_nTC = chunk_outputs(x_nTC, w_in, bias, w_out, phi_n, hidden_n)
    left = (out_nTC - target_nTC).square().sum((1, 2))
    return _share(left, target_nTC.square().sum((1, 2)))


def span_unexplained(
    x_TI: Tensor, target_TO: Tensor, w_in: Tensor, bias: Tensor, w_out: Tensor, phi_n: Tensor
) -> Tensor:
    """Share of the span's target that each unit alone leaves unexplained, `[n]`.

    `|t - h w|^2 = |t|^2 - 2 (h^T t) . w + |h|^2 |w|^2`, so that no `[n, T, O]` is ever made.
    """
    h_Tn = span_hidden(x_TI, w_in, bias, phi_n)
    total = target_TO.square().sum()
    fit_n = ((h_Tn.t() @ target_TO) * w_out).sum(1)
    size_n = h_Tn.square().sum(0) * w_out.square().sum(1)
    return _share(total - 2 * fit_n + size_n, total.expand(len(phi_n)))


def _share(left: Tensor, total: Tensor) -> Tensor:
    # a target of exactly 0 asks for nothing: all of it is explained by doing nothing
    safe = torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, left / safe, 0.0)


class IsolatedTap(torch.autograd.Function):
    """`IsolatedTap.apply(y, unexplained, observe, w_in, bias, w_out)` is y; see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        unexplained: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        observe: Callable[[Tensor], None],
        rows: Tensor,
        w_in: Tensor,
        bias: Tensor,
        w_out: Tensor,
    ) -> Tensor:
        """Pass y on.

        Args:
            ctx: Autograd context.
            y: Output of the site, in any layout.
            unexplained: Maps (gradient at y, weights of the n training seeds) to `[n]`.
            observe: Receives the explained shares, `[n]`.
            rows: Indices of the training seeds in the pool, `[n]`.
            w_in: Incoming weights of the pool, `[S, ...]`; also `bias` and `w_out`.
            bias: See `w_in`.
            w_out: See `w_in`.
        """
        ctx.unexplained, ctx.observe = unexplained, observe
        ctx.save_for_backward(rows, w_in, bias, w_out)
        # a copy, because a view made here could not be modified in place by the host's next module
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The host's gradient unchanged, and each training seed's own."""
        rows, *pool = ctx.saved_tensors
        weights = [w.detach()[rows].requires_grad_() for w in pool]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            unexplained = ctx.unexplained(grad.detach(), *weights)
            # a seed's objective does not depend on the others, so the sum separates
            grads = torch.autograd.grad(unexplained.sum(), weights, allow_unused=True)
        ctx.observe(1 - unexplained.detach())
        return (
            grad, None, None, None,
            *(_spread(w, rows, g) for w, g in zip(pool, grads, strict=True)),
        )  # fmt: skip


def _spread(pool: Tensor, rows: Tensor, grad: Tensor | None) -> Tensor:
    full = torch.zeros_like(pool)
    return full if grad is None else full.index_copy(0, rows, grad.to(pool.dtype))
