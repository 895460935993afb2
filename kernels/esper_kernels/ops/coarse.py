"""Wide chunks on a GPU (C > 128): a grouped two-layer matrix product, one group a seed.

Shapes: T = rows, S = seeds, C = channels of a chunk, D = S * C, H = hidden units of a seed.
Formulas: `esper_kernels.reference.chunk`. An isolated seed leaves `e = f - t` of its target t,
with f its own output; its gradients are those of the task with `2 e / |t|^2` in place of dy.
"""

import torch
from torch import Tensor

from esper_kernels import across
from esper_kernels.learning import RECONSTRUCTION
from esper_kernels.ops.dense_gradient import weight_grad
from esper_kernels.ops.dense_hidden import hidden_backward, hidden_forward
from esper_kernels.ops.dense_project import isolated_residual, project
from esper_kernels.ops.dense_tiles import Which, unit_align
from esper_kernels.ops.statistics import column_statistics
from esper_kernels.ops.units import Units, column_squares, finish_units, pack, plan, target_scale_of


def forward(
    x_TD: Tensor, w1_SCH: Tensor, b1_SH: Tensor, w2_SHC: Tensor, alpha_S: Tensor, phi_S: Tensor,
    hidden_S: Tensor, observe: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`y_s = x_s + alpha_s * phi_s(x_s W1_s + b1_s) W2_s`.

    Args:
        x_TD: Activations, `[T, D]`; bf16, fp16 or fp32.
        w1_SCH: Incoming weights, `[S, C, H]`.
        b1_SH: Hidden biases, `[S, H]`.
        w2_SHC: Outgoing weights, `[S, H, C]`.
        alpha_S: Blend weights, `[S]`, fp32.
        phi_S: Codes, `[S]`, int32; none of those that `esper_kernels.support.needs_plain` names.
        hidden_S: Hidden units each seed uses, `[S]`, int32.
        observe: Whether to sum up x.

    Returns:
        `[T, D]` in the dtype of x; and of each column of x the sum, the sum of squares and the
        number of values below 1e-6, `[3, D]`, fp32 (`[3, 0]` without `observe`).
    """
    x = x_TD.contiguous()
    H = w1_SCH.shape[2]
    align = unit_align(x.dtype, H, backward=False)
    units = plan(alpha_S, None, hidden_S, H, align)
    w_in, _ = pack(units, w1_SCH.transpose(1, 2), x.dtype)
    w_out, _ = pack(units, w2_SHC, x.dtype)
    u = hidden_forward(units, x, w_in, b1_SH, alpha_S, phi_S)
    stats = column_statistics(x) if observe else alpha_S.new_empty(3, 0)
    return project(units, u, w_out, x), stats


def backward(
    dy_TD: Tensor, x_TD: Tensor, w1_SCH: Tensor, b1_SH: Tensor, w2_SHC: Tensor, alpha_S: Tensor,
    phi_S: Tensor, hidden_S: Tensor, learning_S: Tensor, objective: int, observe: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the task, and of the isolated objective for seeds that train on it.

    Args:
        dy_TD: Gradient of y, `[T, D]`.
        x_TD: See `forward`; also the weights, alpha, codes and hidden.
        w1_SCH: See `forward`.
        b1_SH: See `forward`.
        w2_SHC: See `forward`.
        alpha_S: See `forward`.
        phi_S: See `forward`.
        hidden_S: See `forward`.
        learning_S: What each seed learns (`esper_kernels.learning`), `[S]`, int32.
        objective: Its place in `esper_kernels.learning.OBJECTIVES`.
        observe: Whether to sum up dy.

    Returns:
        dx `[T, D]`, gradients of w1, b1 and w2, of alpha `[S]` fp32; sums of dy^2 by column
        `[D]` (`[0]` without `observe`); share that each isolated seed explains `[S]`, else 0.
    """
    x, dy = x_TD.contiguous(), dy_TD.to(x_TD.dtype).contiguous()
    S, _, H = w1_SCH.shape
    reconstruct = objective == RECONSTRUCTION
    units = plan(alpha_S, learning_S, hidden_S, H, unit_align(x.dtype, H, backward=True))
    w_in, _ = pack(units, w1_SCH.transpose(1, 2), x.dtype)
    w_out, norm_sq = pack(units, w2_SHC, x.dtype)
    grad_sq = column_squares(dy, units, always=observe)
    x_sq = column_squares(x, units, always=False)
    x_energy, energy = across.means(x_sq.view(S, -1).sum(1), grad_sq.view(S, -1).sum(1))
    energies = x_energy, energy

    left, left_sq = _isolated_residual(
        units, x, dy, (w_in, w_out), (b1_SH, alpha_S, phi_S), energies, reconstruct
    )
    h = hidden_forward(units, x, w_in, b1_SH, alpha_S, phi_S, Which.ALL)
    dz, partial = hidden_backward(
        units, h, dy, left, w_out, alpha_S, phi_S, norm_sq, *energies, reconstruct, h
    )
    of_units = finish_units(units, partial, alpha_S, norm_sq, *energies, reconstruct)
    dx = project(units, dz, w_in, dy)
    d_in = weight_grad(units, dz, x, None, of_units.gain_in, w1_SCH.transpose(1, 2))
    d_out = weight_grad(units, h, dy, left, of_units.gain_out, w2_SHC)
    explained = _explained(units, left_sq, energies, reconstruct)
    return (
        dx, d_in.transpose(1, 2), of_units.d_bias.view(S, H).to(b1_SH.dtype), d_out,
        of_units.agreement.view(S, H).sum(1), grad_sq if observe else grad_sq.new_empty(0),
        explained,
    )  # fmt: skip


def _isolated_residual(
    units: Units, x: Tensor, dy: Tensor, packed: tuple[Tensor, Tensor],
    of_seeds: tuple[Tensor, Tensor, Tensor], energies: tuple[Tensor, Tensor], reconstruct: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`f - t` of isolated seeds, `[T, D]`, and the sum of its squares, `[S]`."""
    w_in, w_out = packed
    h = hidden_forward(units, x, w_in, *of_seeds, Which.ISOLATED)
    source = x if reconstruct else dy
    left, squares = isolated_residual(units, h, w_out, source, *energies, reconstruct)
    return left, squares.view(units.groups, -1).sum(1)


def _explained(
    units: Units, left_sq: Tensor, energies: tuple[Tensor, Tensor], reconstruct: bool
) -> Tensor:
    """Share of its target that each isolated seed explains, 0 for the others."""
    _, energy = target_scale_of(*energies, reconstruct=reconstruct)
    share = torch.where(energy > 0, 1 - left_sq / energy, 1.0)
    isolated = units.ranges[:, 3] > units.ranges[:, 2]
    return torch.where(isolated, share, 0.0)
