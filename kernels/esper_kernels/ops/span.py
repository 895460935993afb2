"""Spans on a GPU: values and every gradient of all units of a site.

Shapes: T = rows, I = input features, O = output features, S = units.
Formulas: `esper_kernels.reference.span`; isolated units: the energy of the target that unit n
leaves, `|t|^2 - 2 (h_n^T t) . w_n + |h_n|^2 |w_n|^2` over `|t|^2`, needs only sums over rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from esper_kernels import across
from esper_kernels.learning import RECONSTRUCTION
from esper_kernels.ops.dense_gradient import weight_grad
from esper_kernels.ops.dense_hidden import hidden_backward, hidden_forward
from esper_kernels.ops.dense_project import project
from esper_kernels.ops.dense_tiles import unit_align
from esper_kernels.ops.statistics import column_statistics
from esper_kernels.ops.units import (
    NUM_RANGES,
    column_squares,
    finish_units,
    num_slots,
    pack,
    plan,
    units_of_span,
)


class Kept(NamedTuple):
    """What a forward keeps for its backward; P slots of units (see `esper_kernels.ops.units`).

    Attributes:
        hidden_TP: `x W_in^T + b` of the awake and the isolated units, `[T, P]`.
        w_in: Their incoming weights, `[P, I]`, rows padded to whole 16-byte words.
        w_out: Their outgoing weights, `[P, O]`, padded likewise.
        norm_sq_P: Squared norm of each unit's outgoing weights, `[P]`, fp32.
        table: Which unit has which slot, int32.
    """

    hidden_TP: Tensor
    w_in: Tensor
    w_out: Tensor
    norm_sq_P: Tensor
    table: Tensor


def kept_shapes(
    T: int, I: int, O: int, S: int, dtype: torch.dtype  # noqa: E741 (the legend's names)
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """Shapes of `Kept`."""
    slots = num_slots(S, unit_align(dtype, S, backward=True), mixed=True)
    widths = (-(-n // 8) * 8 for n in (I, O))
    return (T, slots), *((slots, n) for n in widths), (slots,), (NUM_RANGES.value + slots + S,)


def forward(
    x_TI: Tensor, z_TO: Tensor, w_in_SI: Tensor, b_S: Tensor, w_out_SO: Tensor, alpha_S: Tensor,
    phi_S: Tensor, learning_S: Tensor, observe: bool, keep: bool,
) -> tuple[Tensor, Tensor, Kept | None]:  # fmt: skip
    """`y = z + sum_s alpha_s * phi_s(x . w_in_s + b_s) * w_out_s`.

    Args:
        x_TI: Input of the span, `[T, I]`; bf16, fp16 or fp32.
        z_TO: Output of the span, `[T, O]`.
        w_in_SI: Incoming weights, `[S, I]`.
        b_S: Biases, `[S]`.
        w_out_SO: Outgoing weights, `[S, O]`.
        alpha_S: Blend weights, `[S]`, fp32.
        phi_S: Codes of elementwise functions, `[S]`, int32.
        learning_S: See `backward`; y is that of the awake units in any case.
        observe: Whether to sum up z.
        keep: Whether a backward will follow.

    Returns:
        `[T, O]` in the dtype of z; and of each column of z the sum, the sum of squares and the
        number of values below 1e-6, `[3, O]`, fp32 (`[3, 0]` without `observe`); and what
        `backward` needs (None without `keep`).
    """
    dtype = torch.promote_types(x_TI.dtype, z_TO.dtype)
    x, z = x_TI.to(dtype).contiguous(), z_TO.to(dtype).contiguous()
    # the same plan with and without `keep`: sums over units have one order
    align = unit_align(dtype, len(w_in_SI), backward=True)
    units = plan(alpha_S, learning_S, None, len(w_in_SI), align)
    w_in, _ = pack(units, w_in_SI[None], dtype)
    w_out, norm_sq = pack(units, w_out_SO[None], dtype, norm=keep)
    hidden = x.new_empty(len(x), units.row) if keep else None
    u = hidden_forward(units, x, w_in, b_S, alpha_S, phi_S, kept=hidden)
    y = project(units, u, w_out, z)
    # a pass of its own reads at memory speed; in the product's epilogue it took three times that
    stats = column_statistics(z) if observe else b_S.new_empty(3, 0)
    kept = None
    if hidden is not None:
        kept = Kept(hidden, _whole(w_in), _whole(w_out), norm_sq, units.table)
    return y.to(z_TO.dtype), stats, kept


def _whole(packed: Tensor) -> Tensor:
    """Packed weights with the words that pad their rows."""
    return packed.as_strided((len(packed), packed.stride(0)), (packed.stride(0), 1))


def backward(
    dy_TO: Tensor, x_TI: Tensor, z_TO: Tensor, z_sq: Tensor, w_in_SI: Tensor, b_S: Tensor,
    w_out_SO: Tensor, alpha_S: Tensor, phi_S: Tensor, hidden_TP: Tensor, w_in: Tensor,
    w_out: Tensor, norm_sq_P: Tensor, table: Tensor, objective: int, observe: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the task, and of the isolated objective for units that train on it.

    Args:
        dy_TO: Gradient of y, and so of z, `[T, O]`.
        x_TI: See `forward`; also the weights, alpha and codes.
        z_TO: The span's output for the objective reconstruction; else `[0]`.
        z_sq: Sum of the squares of z, 0-dim fp32.
        w_in_SI: See `forward`.
        b_S: See `forward`.
        w_out_SO: See `forward`.
        alpha_S: See `forward`.
        phi_S: See `forward`.
        hidden_TP: See `Kept`; also all up to `table`. The plan holds what the units learn.
        w_in: See `Kept`.
        w_out: See `Kept`.
        norm_sq_P: See `Kept`.
        table: See `Kept`.
        objective: Its place in `esper_kernels.learning.OBJECTIVES`.
        observe: Whether to sum up dy.

    Returns:
        dx `[T, I]`, gradients of w_in, b and w_out, of alpha `[S]` fp32; sums of dy^2 by column
        `[O]` (`[0]` without `observe`); share that each isolated unit explains `[S]`, else 0.
    """
    dtype = torch.promote_types(x_TI.dtype, dy_TO.dtype)
    x, dy = x_TI.to(dtype).contiguous(), dy_TO.to(dtype).contiguous()
    reconstruct = objective == RECONSTRUCTION
    other = z_TO.to(dtype).contiguous() if reconstruct else None
    units = units_of_span(table, len(w_in_SI), unit_align(dtype, len(w_in_SI), backward=True))
    w_in, w_out = w_in[:, : w_in_SI.shape[1]], w_out[:, : w_out_SO.shape[1]]
    grad_sq = column_squares(dy, units, always=observe)
    z_energy, energy = across.means(z_sq, grad_sq.sum())
    energies = z_energy, energy

    h = torch.empty_like(hidden_TP)
    dz, partial = hidden_backward(
        units, hidden_TP, dy, other, w_out, alpha_S, phi_S, norm_sq_P, *energies, reconstruct, h
    )
    of_units = finish_units(units, partial, alpha_S, norm_sq_P, *energies, reconstruct)
    dx = project(units, dz, w_in, None)
    d_in = weight_grad(units, dz, x, None, of_units.gain_in, w_in_SI[None])
    d_out = weight_grad(units, h, dy, other, of_units.gain_out, w_out_SO[None], of_units.ridge)
    return (
        dx.to(x_TI.dtype), d_in[0], of_units.d_bias.to(b_S.dtype), d_out[0], of_units.agreement,
        grad_sq if observe else grad_sq.new_empty(0), of_units.explained,
    )  # fmt: skip
