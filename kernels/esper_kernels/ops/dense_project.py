# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator"
"""From the hidden units of spans and wide chunks to their output; see `dense_tiles`.

Shapes: T = rows, G = groups, P = slots of a group, K = columns of one group (channels of a chunk,
features of a span), N = units of a group in the pool.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.ops.dense_tiles import (
    Tile,
    load_tile,
    operands_of,
    programs_of,
    strips_of,
    tile_for,
)
from esper_kernels.ops.device import dot_dtype
from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.ops.statistics import sum_rows
from esper_kernels.ops.units import Units, read_ranges, target_scale

# awake units of a group that project_narrow serves
PROJECT_NARROW = 16 if INTERPRET else 64


@triton.jit
def _project(
    u, w, base, out, ranges, partial, activation_sq, grad_sq, T, num_cols, stride_w,
    P: tl.constexpr, HAS_BASE: tl.constexpr, ISOLATED: tl.constexpr, RECONSTRUCT: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, FLATTEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    _, awake_end, isolated_begin, isolated_end = read_ranges(ranges, group)
    begin, end = awake_end * 0, awake_end
    if ISOLATED:
        begin, end = isolated_begin, isolated_end
    if (end - begin < LEAST) | (end - begin > MOST):
        return
    scale = 1.0
    if ISOLATED:
        scale, _energy = target_scale(
            tl.load(activation_sq + group), tl.load(grad_sq + group), RECONSTRUCT
        )
        scale = -scale

    WIDTH: tl.constexpr = min(64, COLS)
    STRIPS: tl.constexpr = COLS // WIDTH
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    width = num_cols * tl.num_programs(1)
    row_length = P * tl.num_programs(1)
    group_end = group * P + P
    num_col_tiles = tl.cdiv(num_cols, COLS)
    num_tiles = tl.cdiv(T, ROWS) * num_col_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        # columns fastest: programs that share rows of u run together
        col = tile % num_col_tiles * COLS
        row_tile = tile // num_col_tiles
        row = row_tile * ROWS
        start = (tl.full((), 0, tl.int64) + row) * width + group * num_cols + col
        offsets = rows[:, None] * width + cols[None, :]
        in_rows = (row + rows < T)[:, None]
        raw = ()
        if HAS_BASE and not FLATTEN:
            # asked for before the products, which hide the way from memory; flattened, the loop
            # would carry it in registers that it lacks
            for i in tl.static_range(STRIPS):
                mask = in_rows & (col + i * WIDTH + cols < num_cols)[None, :]
                raw += (tl.load(base + start + i * WIDTH + offsets, mask=mask, other=0.0),)
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(begin, end, DEPTH):
            at = group * P + k
            u_tile = load_tile(u, row, at, T, group_end, row_length, ROWS, DEPTH, TMA)
            w_tile = load_tile(w, at, col, group_end, num_cols, stride_w, DEPTH, COLS, TMA)
            acc = tl.dot(u_tile.to(DOT), w_tile.to(DOT), acc, input_precision="tf32x3")
        strips = strips_of(acc, WIDTH)
        for i in tl.static_range(STRIPS):
            in_cols = col + i * WIDTH + cols < num_cols
            value = strips[i]
            if HAS_BASE:
                if FLATTEN:
                    mask = in_rows & in_cols[None, :]
                    source = tl.load(base + start + i * WIDTH + offsets, mask=mask, other=0.0)
                else:
                    source = raw[i]
                value += scale * source.to(tl.float32)
            result = value.to(out.dtype.element_ty)
            if HAS_BASE and LEAST == 0:
                # the very bits, also of a NaN
                result = tl.where(begin == end, source, result)
            if ISOLATED:
                left = partial + (tl.full((), 0, tl.int64) + row_tile) * width
                energy = tl.sum(tl.where(in_rows, value * value, 0.0), 0)
                tl.store(left + group * num_cols + col + i * WIDTH + cols, energy, mask=in_cols)
            tl.store(out + start + i * WIDTH + offsets, result, mask=in_rows & in_cols[None, :])


def project(units: Units, u: Tensor, w: Tensor, base: Tensor | None) -> Tensor:
    """`base + u W` over the awake units.

    Args:
        units: The plan.
        u: `[T, G * P]`.
        w: Packed weights, `[G * P, K]`.
        base: `[T, G * K]`, contiguous; None: 0.

    Returns:
        `[T, G * K]` in the dtype of u, the base itself bit for bit in groups without an awake unit.
    """
    out = torch.empty(len(u), units.groups * w.shape[1], dtype=u.dtype, device=u.device)
    kernels = "project" if base is not None else "project_alone", "project_narrow"
    wide, narrow = (tile_for(kernel, u.dtype, units.units) for kernel in kernels)
    _launch_project(units, u, w, base, out, narrow, 0, PROJECT_NARROW)
    _launch_project(units, u, w, base, out, wide, PROJECT_NARROW + 1, units.slots)
    return out


def isolated_residual(
    units: Units, h: Tensor, w: Tensor, source: Tensor, activation_sq_G: Tensor,
    grad_sq_G: Tensor, reconstruct: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`h W - target` of the isolated groups, and the sums of its squares by column.

    Args:
        units: The plan.
        h: Hidden activations of isolated units, `[T, G * P]`.
        w: Packed outgoing weights, `[G * P, K]`.
        source: What the target is a multiple of, `[T, G * K]`, contiguous.
        activation_sq_G: Energy of each group's activations, `[G]`, fp32.
        grad_sq_G: Energy of each group's gradient, `[G]`, fp32.
        reconstruct: Which objective.

    Returns:
        `[T, G * K]` and `[G * K]`; undefined in groups that are not isolated.
    """
    out = torch.empty_like(source)
    tile = tile_for("project", h.dtype, units.units)
    partial = torch.empty(triton.cdiv(len(h), tile.rows), source.shape[1], device=h.device)
    energies = partial, activation_sq_G, grad_sq_G
    _launch_project(units, h, w, source, out, tile, 1, units.slots, energies, reconstruct)
    return out, sum_rows(partial)


def _launch_project(
    units: Units, u: Tensor, w: Tensor, base: Tensor | None, out: Tensor, tile: Tile,
    least: int, most: int, energies: tuple[Tensor, Tensor, Tensor] | None = None,
    reconstruct: bool = False,
) -> None:  # fmt: skip
    """Groups with `least` to `most` units; of isolated units if there are energies."""
    T, K = len(u), w.shape[1]
    (u_op, w_op), tma = operands_of((u, tile.rows, tile.depth), (w, tile.depth, tile.cols))
    tiles = triton.cdiv(T, tile.rows) * triton.cdiv(K, tile.cols)
    _project[(programs_of(tiles, tile, u.device), units.groups)](
        u_op, w_op, base, out, units.ranges, *(energies or (None, None, None)), T, K, w.stride(0),
        P=units.slots, HAS_BASE=base is not None, ISOLATED=energies is not None,
        RECONSTRUCT=reconstruct, LEAST=least, MOST=most, FLATTEN=tile.flatten and tma,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, DOT=dot_dtype(u.dtype), TMA=tma,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
