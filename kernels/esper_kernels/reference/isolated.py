"""The objective of a seed that learns alone: fit a target with what it would add to the host.

* `desired_update`: the target is the functional gradient `-dL/dy_s`, scaled to 10 % of the
  size of the activations it is to change, so that neither the loss's scale nor the batch's
  size matters.
* `reconstruction`: the target is the activation itself.

The loss of a seed is the share of its target's energy that it does not explain. Source of the
functional gradient as a target: Verbockhaven et al., "Growing Tiny Networks", TMLR 2024.

Shapes: T = rows, n = seeds, C = channels of a chunk, I and O = features of a span.
"""

import torch
from torch import Tensor

from esper_kernels import across
from esper_kernels.learning import TARGET_FRAC, Objective
from esper_kernels.reference.chunk import chunk_outputs
from esper_kernels.reference.span import span_hidden


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
    squares = (t.square().mean(dims, keepdim=True) for t in (activation, grad))
    size, steep = (square.sqrt() for square in across.means(*squares))
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
    (total,) = across.means(total)
    # a target of exactly 0 asks for nothing: all of it is explained by doing nothing
    safe = torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, left / safe, 0.0)
