# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator"
"""Gradients of the weights of spans and wide chunks; see `dense_tiles`.

Shapes: T = rows, G = groups, P = slots of a group, K = columns of one group (channels of a chunk,
features of a span), N = units of a group in the pool.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.ops.dense_tiles import (
    AWAKE,
    ISOLATED,
    load_tile,
    operands_of,
    sources_of,
    strips_of,
    tile_for,
)
from esper_kernels.ops.device import dot_dtype
from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.ops.units import Units, read_ranges

# programs of weight_grad: one for each multiprocessor of an H200
SPLIT_PROGRAMS = 4 if INTERPRET else 132


@triton.jit
def _skips(isolated, WHICH: tl.constexpr):
    """Whether a tile of isolated or awake units is not for this launch."""
    skips = isolated & False
    if WHICH == AWAKE:
        skips = isolated
    elif WHICH == ISOLATED:
        skips = isolated == 0
    return skips


@triton.jit
def _split_tiles(ranges, group, num_cols, programs, steps, SLOTS: tl.constexpr, COLS: tl.constexpr):
    """Unit tiles with a gradient of the task, tiles in all, and parts the rows are split into."""
    task_end, _, isolated_begin, isolated_end = read_ranges(ranges, group)
    task_tiles = tl.cdiv(task_end, SLOTS)
    unit_tiles = task_tiles + tl.cdiv(isolated_end - isolated_begin, SLOTS)
    tiles = unit_tiles * tl.cdiv(num_cols, COLS)
    splits = tl.maximum(tl.minimum(programs // tl.maximum(tiles, 1), steps), 1)
    return task_tiles, tiles, splits, isolated_begin


@triton.jit
def _store_grad(
    total, gain, ridge, weights, grad, first_unit, group, unit, learns, isolated, col, mask,
    stride_group, stride_unit, stride_col, RIDGE: tl.constexpr,
):  # fmt: skip
    """Scale `P^T Q` of some units and put it where the pool has them."""
    total *= tl.load(gain + first_unit + unit, mask=learns, other=0.0)[:, None]
    where = (tl.full((), 0, tl.int64) + group) * stride_group
    where += unit.to(tl.int64)[:, None] * stride_unit + col.to(tl.int64)[None, :] * stride_col
    if RIDGE:
        factor = tl.load(ridge + first_unit + unit, mask=learns & isolated, other=0.0)[:, None]
        w = tl.load(weights + where, mask=mask & (learns & isolated)[:, None], other=0.0)
        total += factor * w
    tl.store(grad + where, total.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _weight_grad(
    p, q, ranges, unit_of, gain, ridge, weights, grad, partial, T, N, num_cols, stride_q,
    stride_group, stride_unit, stride_col,
    P: tl.constexpr, WHICH: tl.constexpr, DIRECT: tl.constexpr, RIDGE: tl.constexpr,
    SLOTS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    programs = tl.num_programs(0)
    steps = tl.cdiv(T, DEPTH)
    task_end, _, isolated_begin, isolated_end = read_ranges(ranges, group)
    task_tiles, tiles, splits, _ = _split_tiles(
        ranges, group, num_cols, programs, steps, SLOTS, COLS
    )
    safe = tl.maximum(tiles, 1)
    part = tl.program_id(0) // safe
    unit_tile = tl.program_id(0) % safe // tl.cdiv(num_cols, COLS)
    col = tl.program_id(0) % tl.cdiv(num_cols, COLS) * COLS
    isolated = unit_tile >= task_tiles
    if (tl.program_id(0) >= tiles * splits) | _skips(isolated, WHICH):
        return
    skip = tl.where(isolated, isolated_begin - task_tiles * SLOTS, 0)
    first = unit_tile * SLOTS + skip
    at = group * P + first

    width = P * tl.num_programs(1)
    per_part = tl.cdiv(steps, splits) * DEPTH
    begin = part * per_part
    end = tl.minimum(begin + per_part, T)
    q_end = group * num_cols + num_cols
    q_col = group * num_cols + col
    acc = tl.zeros((SLOTS, COLS), tl.float32)
    for t in range(begin, end, DEPTH):
        p_tile = load_tile(p, t, at, T, width, width, DEPTH, SLOTS, TMA)
        q_tile = load_tile(q, t, q_col, T, q_end, stride_q, DEPTH, COLS, TMA)
        acc = tl.dot(p_tile.to(DOT).T, q_tile.to(DOT), acc, input_precision="tf32x3")
    slots, cols = tl.arange(0, SLOTS), tl.arange(0, COLS)
    if DIRECT and splits == 1:
        learns = first + slots < tl.where(isolated, isolated_end, task_end)
        unit = tl.load(unit_of + at + slots, mask=learns, other=group * N) - group * N
        WIDTH: tl.constexpr = min(64, COLS)
        here = col + tl.arange(0, WIDTH)
        strips = strips_of(acc, WIDTH)
        for i in tl.static_range(len(strips)):
            mask = learns[:, None] & (here + i * WIDTH < num_cols)[None, :]
            _store_grad(
                strips[i], gain, ridge, weights, grad, group * N, group, unit, learns, isolated,
                here + i * WIDTH, mask, stride_group, stride_unit, stride_col, RIDGE,
            )  # fmt: skip
    else:
        block = (group * programs + tl.program_id(0)).to(tl.int64) * (SLOTS * COLS)
        tl.store(partial + block + slots[:, None] * COLS + cols[None, :], acc)


@triton.jit
def _finish_weight_grad(
    partial, gain, ridge, weights, grad, ranges, slot_of, N, num_cols, programs, steps,
    stride_group, stride_unit, stride_col,
    P: tl.constexpr, DIRECT: tl.constexpr, RIDGE: tl.constexpr,
    SLOTS: tl.constexpr, COLS: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    task_tiles, tiles, splits, isolated_begin = _split_tiles(
        ranges, group, num_cols, programs, steps, SLOTS, COLS
    )
    task_end = tl.load(ranges + group * 4)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    in_units = unit < N
    slot = tl.load(slot_of + group * N + unit, mask=in_units, other=-1)
    local = slot - group * P
    isolated = (slot >= 0) & (local >= isolated_begin)
    learns = (slot >= 0) & ((local < task_end) | isolated)
    if DIRECT:
        # already in place
        in_units = in_units & ((splits > 1) | (learns == 0))
        learns = learns & (splits > 1)
    skip = tl.where(isolated, isolated_begin - task_tiles * SLOTS, 0)
    local = tl.where(learns, local - skip, 0)

    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    in_cols = col < num_cols
    tile = (local // SLOTS)[:, None] * tl.cdiv(num_cols, COLS) + (col // COLS)[None, :]
    within = (local % SLOTS)[:, None] * COLS + (col % COLS)[None, :]
    block = (group * programs + tile).to(tl.int64) * (SLOTS * COLS) + within
    mask = in_units[:, None] & in_cols[None, :]
    total = tl.zeros((UNITS, WIDTH), tl.float32)
    parts = tl.where(tl.max(learns.to(tl.int32)) > 0, splits, 0)
    for part in range(parts):
        at = block + (tl.full((), 0, tl.int64) + part * tiles) * (SLOTS * COLS)
        total += tl.load(partial + at, mask=mask & learns[:, None], other=0.0)
    _store_grad(
        total, gain, ridge, weights, grad, group * N, group, unit, learns, isolated, col, mask,
        stride_group, stride_unit, stride_col, RIDGE,
    )  # fmt: skip


def weight_grad(
    units: Units, p: Tensor, q: Tensor, other: Tensor | None, gain: Tensor,
    weights_GNK: Tensor, ridge: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`gain * P^T Q (+ ridge * W)` of the units with a gradient, 0 for all others.

    Args:
        units: The plan.
        p: `[T, G * P]`.
        q: `[T, G * K]`, contiguous.
        other: Takes the place of q for isolated units; None: q.
        gain: Per unit, `[G * N]`, fp32.
        weights_GNK: The pool's weights, `[G, N, K]`, any strides.
        ridge: Per unit, `[G * N]`, fp32; None: 0.

    Returns:
        A gradient with the memory layout and the dtype of `weights_GNK`.
    """
    T, K = len(p), weights_GNK.shape[2]
    tile = tile_for("weight_grad", p.dtype, units.units)
    slots, cols = tile.rows, tile.cols
    programs = max(
        triton.cdiv(SPLIT_PROGRAMS, units.groups), units.slots // slots * triton.cdiv(K, cols)
    )
    partial = torch.empty(units.groups * programs, slots, cols, device=p.device)
    grad = torch.empty_strided(
        weights_GNK.shape, weights_GNK.stride(), dtype=weights_GNK.dtype, device=p.device
    )
    by_rows = weights_GNK.stride(2) == 1
    for source, which in sources_of(q, other):
        operands, tma = operands_of(
            (p, tile.depth, slots), (source, tile.depth, cols),
            first_cols=K if units.groups > 1 else 0,
        )  # fmt: skip
        _weight_grad[(programs, units.groups)](
            *operands, units.ranges, units.unit_of, gain, ridge, weights_GNK, grad, partial,
            T, units.units, K, source.stride(0), *weights_GNK.stride(),
            P=units.slots, WHICH=int(which), DIRECT=by_rows, RIDGE=ridge is not None,
            SLOTS=slots, COLS=cols, DEPTH=tile.depth,
            DOT=dot_dtype(p.dtype), TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    count, width = (4, 256) if by_rows else (32, 64)
    _finish_weight_grad[(triton.cdiv(K, width), triton.cdiv(units.units, count), units.groups)](
        partial, gain, ridge, weights_GNK, grad, units.ranges, units.slot_of, units.units, K,
        programs, triton.cdiv(T, tile.depth), *weights_GNK.stride(),
        P=units.slots, DIRECT=by_rows, RIDGE=ridge is not None, SLOTS=slots, COLS=cols,
        UNITS=count, WIDTH=width,
    )  # fmt: skip
    return grad
