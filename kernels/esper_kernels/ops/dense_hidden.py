# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator"
"""The hidden layer of spans and wide chunks, forward and backward; see `dense_tiles`.

Shapes: T = rows, G = groups, P = slots of a group, K = columns of one group (channels of a chunk,
features of a span), N = units of a group in the pool.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.ops.dense_tiles import (
    ALL,
    AWAKE,
    ISOLATED,
    Tile,
    Which,
    load_tile,
    operands_of,
    programs_of,
    sources_of,
    strips_of,
    tile_for,
)
from esper_kernels.ops.device import dot_dtype
from esper_kernels.ops.phi import activate, activate_and_slope
from esper_kernels.ops.units import Units, read_ranges, target_scale


def _widths(kernel: str, dtype: torch.dtype, units: int) -> tuple[Tile, list[Tile]]:
    """Wide tile, and the tiles of the launches: the narrow one serves where few units are left."""
    wide, narrow = tile_for(kernel, dtype, units), tile_for("hidden_narrow", dtype, units)
    return wide, [wide] if narrow.cols >= wide.cols else [wide, narrow]


@triton.jit
def _times_weights(
    a, w, row, a_col, slot, num_cols, T, num_slots, stride_a, stride_w,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`A[row:, a_col : a_col + num_cols] W[slot:]^T`, fp32 `[ROWS, SLOTS]`."""
    acc = tl.zeros((ROWS, SLOTS), tl.float32)
    a_end = a_col + num_cols
    for k in range(0, num_cols, DEPTH):
        a_tile = load_tile(a, row, a_col + k, T, a_end, stride_a, ROWS, DEPTH, TMA)
        w_tile = load_tile(w, slot, k, num_slots, num_cols, stride_w, SLOTS, DEPTH, TMA)
        acc = tl.dot(a_tile.to(DOT), w_tile.to(DOT).T, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _unit_tiles(count, serves, WIDE: tl.constexpr, NARROW: tl.constexpr, SLOTS: tl.constexpr):
    """First slot and number of this launch's tiles over `count` units in a row.

    The last tile is narrow if at most `NARROW` units are left for it; 0: there are no narrow ones.
    """
    wide = (count + (WIDE - 1 - NARROW)) // WIDE
    if SLOTS < WIDE:
        first, tiles = wide * WIDE, tl.cdiv(count, WIDE) - wide
    else:
        first, tiles = wide * 0, wide
    return first, tl.where(serves, tiles, 0)


@triton.jit
def _hidden_tiles(
    ranges, group, WHICH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """First slot, number of tiles and end of the awake units, and of the isolated ones."""
    _, end, isolated_begin, isolated_end = read_ranges(ranges, group)
    first, tiles = _unit_tiles(end, WHICH != ISOLATED, WIDE, NARROW, SLOTS)
    isolated_first, isolated_tiles = _unit_tiles(
        isolated_end - isolated_begin, WHICH != AWAKE, WIDE, NARROW, SLOTS
    )
    return first, tiles, end, isolated_begin + isolated_first, isolated_tiles, isolated_end


@triton.jit
def _of_unit(values, unit, N, valid, JOINT: tl.constexpr):
    """A number of each unit's seed; 0 in slots without a unit."""
    seed = unit
    if JOINT:
        seed = unit // N
    return tl.load(values + seed, mask=valid, other=0)


@triton.jit
def _hidden_forward(
    x, w_in, bias, alpha, phi, ranges, unit_of, u, kept, T, N, num_cols, stride_x, stride_w,
    P: tl.constexpr, JOINT: tl.constexpr, WHICH: tl.constexpr, KEEP: tl.constexpr,
    FAST: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    awake_first, num_awake, awake_end, isolated_first, num_isolated, isolated_end = _hidden_tiles(
        ranges, group, WHICH, WIDE, NARROW, SLOTS
    )
    num_unit_tiles = num_awake + num_isolated
    if num_unit_tiles == 0:
        return
    width = P * tl.num_programs(1)
    WIDTH: tl.constexpr = 16 if SLOTS >= 64 else SLOTS
    rows, slots = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    num_tiles = tl.cdiv(T, ROWS) * num_unit_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        # slots fastest: programs that share rows of x run together
        unit_tile = tile % num_unit_tiles
        row = tile // num_unit_tiles * ROWS
        isolated = unit_tile >= num_awake
        first = tl.where(
            isolated,
            isolated_first + (unit_tile - num_awake) * WIDE,
            awake_first + unit_tile * WIDE,
        )
        end = tl.where(isolated, isolated_end, awake_end)
        at = group * P + first
        acc = _times_weights(
            x, w_in, row, group * num_cols, at, num_cols, T, width, stride_x, stride_w,
            ROWS, SLOTS, DEPTH, DOT, TMA,
        )  # fmt: skip
        start = (tl.full((), 0, tl.int64) + row) * width + at
        strips = strips_of(acc, WIDTH)
        for i in tl.static_range(len(strips)):
            slot = i * WIDTH + slots
            valid = first + slot < end
            unit = tl.load(unit_of + at + slot, mask=valid, other=0)
            code = _of_unit(phi, unit, N, valid, JOINT)
            h = strips[i] + tl.load(bias + unit, mask=valid, other=0.0)[None, :]
            here = start + rows[:, None] * width + slot[None, :]
            if KEEP:
                tl.store(kept + here, h.to(kept.dtype.element_ty), mask=(row + rows < T)[:, None])
            if KEEP or WHICH != ALL:
                h = activate(h, code[None, :], FAST)
            if KEEP or WHICH == AWAKE:
                h *= _of_unit(alpha, unit, N, valid, JOINT)[None, :]
            h = tl.where(valid[None, :], h, 0.0).to(u.dtype.element_ty)
            tl.store(u + here, h, mask=(row + rows < T)[:, None])


def hidden_forward(
    units: Units, x: Tensor, w_in: Tensor, bias: Tensor, alpha: Tensor, phi: Tensor,
    which: Which = Which.AWAKE, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`alpha * phi(x W_in^T + b)` of awake units, `phi(...)` of isolated ones.

    Args:
        units: The plan.
        x: `[T, G * K]`, contiguous.
        w_in: Packed incoming weights, `[G * P, K]`.
        bias: `[G * N]`, fp32.
        alpha: `[S]`, fp32.
        phi: `[S]`, int32.
        which: Which of them; ALL: `x W_in^T + b` before phi, of both.
        kept: Takes `x W_in^T + b` of all units, `[T, G * P]`; the result is then that of AWAKE.

    Returns:
        `[T, G * P]` in the dtype of x; only tiles with a unit in use are written.
    """
    T, K = len(x), w_in.shape[1]
    u = torch.empty(T, units.row, dtype=x.dtype, device=x.device)
    if kept is not None:
        which = Which.ALL
    wide, tiles = _widths("hidden_forward", x.dtype, units.units)
    for tile in tiles:
        (x_op, w_op), tma = operands_of(
            (x, tile.rows, tile.depth), (w_in, tile.cols, tile.depth),
            group_cols=(K, tile.depth) if units.groups > 1 else None,
        )  # fmt: skip
        programs = programs_of(triton.cdiv(T, tile.rows) * units.slots // wide.cols, tile, x.device)
        _hidden_forward[(programs, units.groups)](
            x_op, w_op, bias, alpha, phi, units.ranges, units.unit_of, u, kept,
            T, units.units, K, x.stride(0), w_in.stride(0),
            P=units.slots, JOINT=units.joint, WHICH=int(which), KEEP=kept is not None,
            FAST=x.dtype != torch.float32, WIDE=wide.cols,
            NARROW=tiles[-1].cols if len(tiles) > 1 else 0, FLATTEN=tile.flatten and tma,
            ROWS=tile.rows, SLOTS=tile.cols, DEPTH=tile.depth, DOT=dot_dtype(x.dtype), TMA=tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return u


@triton.jit
def _hidden_backward(
    h, dy, w_out, alpha, phi, ranges, unit_of, norm_sq, activation_sq, grad_sq,
    activated, dz, partial, T, N, num_cols, stride_dy, stride_w,
    P: tl.constexpr, JOINT: tl.constexpr, WHICH: tl.constexpr, RECONSTRUCT: tl.constexpr,
    FAST: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    awake_first, num_awake, awake_end, isolated_first, num_isolated, isolated_end = _hidden_tiles(
        ranges, group, WHICH, WIDE, NARROW, SLOTS
    )
    num_unit_tiles = num_awake + num_isolated
    if num_unit_tiles == 0:
        return
    if JOINT:
        isolated_factor = 2.0
    else:
        scale, _energy = target_scale(tl.load(activation_sq), tl.load(grad_sq), RECONSTRUCT)
        isolated_factor = -2.0 * scale
    width = P * tl.num_programs(1)
    WIDTH: tl.constexpr = 16 if SLOTS >= 64 else SLOTS
    rows, slots = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    num_tiles = tl.cdiv(T, ROWS) * num_unit_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        unit_tile = tile % num_unit_tiles
        row_tile = tile // num_unit_tiles
        row = row_tile * ROWS
        isolated = unit_tile >= num_awake
        first = tl.where(
            isolated,
            isolated_first + (unit_tile - num_awake) * WIDE,
            awake_first + unit_tile * WIDE,
        )
        end = tl.where(isolated, isolated_end, awake_end)
        at = group * P + first
        acc = _times_weights(
            dy, w_out, row, group * num_cols, at, num_cols, T, width, stride_dy, stride_w,
            ROWS, SLOTS, DEPTH, DOT, TMA,
        )  # fmt: skip
        in_rows = (row + rows < T)[:, None]
        start = (tl.full((), 0, tl.int64) + row) * width + at
        sums = partial + (tl.full((), 0, tl.int64) + row_tile) * (3 * width) + at
        strips = strips_of(acc, WIDTH)
        for i in tl.static_range(len(strips)):
            slot = i * WIDTH + slots
            valid = first + slot < end
            unit = tl.load(unit_of + at + slot, mask=valid, other=0)
            code = _of_unit(phi, unit, N, valid, JOINT)
            offsets = start + rows[:, None] * width + slot[None, :]
            du = strips[i]
            z = tl.load(h + offsets, mask=in_rows, other=0.0).to(tl.float32)
            value, slope = activate_and_slope(z, code[None, :], FAST)
            # in rows beyond T z and du are 0, and phi(0) is 0 for every function
            inside = valid[None, :]
            value = tl.where(inside, value, 0.0)
            factor = tl.where(isolated, isolated_factor, _of_unit(alpha, unit, N, valid, JOINT))
            d_value = factor[None, :] * du
            if not JOINT:
                ridge = 2.0 * tl.load(norm_sq + at + slot, mask=valid & isolated, other=0.0)
                d_value += tl.where(ridge[None, :] != 0, ridge[None, :] * value, 0.0)
            d_z = tl.where(inside, d_value * slope, 0.0)
            tl.store(activated + offsets, value.to(h.dtype.element_ty), mask=in_rows)
            tl.store(dz + offsets, d_z.to(dz.dtype.element_ty), mask=in_rows)
            tl.store(sums + slot, tl.sum(d_z, 0))
            tl.store(sums + width + slot, tl.sum(value * du, 0))
            if FLATTEN:
                # the compiler cannot flatten a loop with this branch
                tl.store(sums + 2 * width + slot, tl.sum(value * value, 0), mask=valid & isolated)
            else:
                if isolated:
                    tl.store(sums + 2 * width + slot, tl.sum(value * value, 0))


def hidden_backward(
    units: Units, h: Tensor, dy: Tensor, other: Tensor | None, w_out: Tensor,
    alpha: Tensor, phi: Tensor, norm_sq: Tensor, activation_sq_G: Tensor,
    grad_sq_G: Tensor, reconstruct: bool, activated: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply phi and compute the gradients before phi.

    Args:
        units: The plan.
        h: `x W_in^T + b` of all units, `[T, G * P]`.
        dy: Gradient of the output, `[T, G * K]`, contiguous.
        other: What isolated units learn from in place of dy, same shape; None: dy.
        w_out: Packed outgoing weights, `[G * P, K]`.
        alpha: `[S]`, fp32.
        phi: `[S]`, int32.
        norm_sq: Squared norm of each slot's outgoing weights, `[G * P]`; spans only.
        activation_sq_G: Energy of each group's activations, `[G]`, fp32.
        grad_sq_G: Energy of each group's gradient, `[G]`, fp32.
        reconstruct: Whether the isolated objective is reconstruction.
        activated: Takes phi of h, `[T, G * P]`; may be h.

    Returns:
        dz `[T, G * P]` in the dtype of h, of isolated units without the factor 1 / energy of the
        target; and sums over each row tile of dz, h * du and, of isolated units, h * h,
        `[tiles, 3, G * P]`, fp32.
    """
    T, K = len(h), w_out.shape[1]
    dz = torch.empty_like(h)
    wide, tiles = _widths("hidden_backward", h.dtype, units.units)
    # every launch has the same row tiles, for the sums
    tiles = [tile._replace(rows=wide.rows) for tile in tiles]
    row_tiles = triton.cdiv(T, wide.rows)
    partial = torch.empty(row_tiles, 3, units.row, device=h.device)
    for (source, which), tile in product(sources_of(dy, other), tiles):
        operands, tma = operands_of(
            (source, tile.rows, tile.depth), (w_out, tile.cols, tile.depth),
            group_cols=(K, tile.depth) if units.groups > 1 else None,
        )  # fmt: skip
        programs = programs_of(row_tiles * units.slots // wide.cols, tile, h.device)
        _hidden_backward[(programs, units.groups)](
            h, *operands, alpha, phi, units.ranges, units.unit_of, norm_sq,
            activation_sq_G, grad_sq_G, activated, dz, partial, T, units.units, K,
            source.stride(0), w_out.stride(0),
            P=units.slots, JOINT=units.joint, WHICH=int(which), RECONSTRUCT=reconstruct,
            FAST=h.dtype != torch.float32, WIDE=wide.cols,
            NARROW=tiles[-1].cols if len(tiles) > 1 else 0, FLATTEN=tile.flatten and tma,
            ROWS=tile.rows, SLOTS=tile.cols, DEPTH=tile.depth,
            DOT=dot_dtype(h.dtype), TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dz, partial
