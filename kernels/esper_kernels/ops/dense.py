# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator"
"""The matrix products of spans and wide chunks: a grouped two-layer product over slots of units.

    hidden_forward   u  = alpha * phi(x W_in^T + b)                  awake units
    project          y  = base + u W_out                             and dx = base + dz W_in
    hidden_backward  dz = alpha * phi' * (dy W_out^T)                awake and isolated units
    weight_grad      dW_in = dz^T x, dW_out = h^T dy                 units with a gradient

The programs of a launch walk over its tiles, as many as the multiprocessors hold: where all units
are dormant a launch ends at once. Where few units are awake (a tile would be nearly empty, and the
pass is bound by memory) a second launch with small tiles serves. Sums over rows are split into
partial sums that are added in a fixed order.

Shapes: T = rows, G = groups, P = slots of a group, K = columns of one group (channels of a chunk,
features of a span), N = units of a group in the pool. The slots of all groups lie side by side.
"""

from enum import IntEnum
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.ops.phi import activate, activate_and_slope
from esper_kernels.ops.statistics import sum_rows
from esper_kernels.ops.units import Units, read_ranges, target_scale


class Which(IntEnum):
    """Units that a launch serves."""

    ALL = 0
    AWAKE = 1
    ISOLATED = 2


_ALL = tl.constexpr(int(Which.ALL))
_AWAKE = tl.constexpr(int(Which.AWAKE))
_ISOLATED = tl.constexpr(int(Which.ISOLATED))


class Tile(NamedTuple):
    """Tile of one kernel.

    Attributes:
        rows: Of the result: T, or slots for `weight_grad`.
        cols: Of the result: slots for the hidden kernels, else K.
        depth: Of one step of the inner product; for `project` at most the slots of a narrow tile.
        warps: Of a program.
        stages: Steps in flight.
        per_sm: Programs of a multiprocessor, each walks over tiles; 0: a program for each tile.
        flatten: Whether the first steps of a tile are loaded during the last ones of the previous.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    per_sm: int = 1
    flatten: bool = False


def tile_for(kernel: str, dtype: torch.dtype, units: int) -> Tile:
    """Tile of a kernel.

    Args:
        kernel: 'hidden_forward', 'hidden_backward', 'hidden_narrow' (both of these, where a wide
            tile would be nearly empty), 'project', 'project_alone' (without a base),
            'project_narrow' (where few units are awake) or 'weight_grad'.
        dtype: Of the activations.
        units: Units of a group, N.
    """
    narrow = kernel == "hidden_narrow"
    if INTERPRET:
        return Tile(32, 16 if narrow else 32, 16, 4, 1)
    slots = max(64, min(256, triton.next_power_of_2(units)))
    if dtype == torch.float32:
        # three tf32 products for each fp32 one keep their splits in registers
        return Tile(64, 32 if narrow else 64, 32, 4, 2, per_sm=2)
    match kernel:
        case "hidden_forward":
            return Tile(128 if slots < 128 else 256, min(128, slots), 64, 8, 4, flatten=True)
        case "hidden_backward":
            return Tile(128, slots, 64, 8, 4)
        case "hidden_narrow":
            return Tile(128, 64, 64, 8, 6)
        case "project":
            return Tile(128, 128, 64, 4, 3, per_sm=2, flatten=True)
        case "project_alone":
            return Tile(128, 256, 64, 8, 3, flatten=True)
        case "project_narrow":
            return Tile(128, 64, 64, 4, 1, per_sm=3)
    return Tile(min(128, slots), 256, 64, 8, 4)


# awake units of a group that project_narrow serves
PROJECT_NARROW = 16 if INTERPRET else 64
# programs of weight_grad: one for each multiprocessor of an H200
SPLIT_PROGRAMS = 4 if INTERPRET else 132


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(tiles: int, tile: Tile, device: torch.device) -> int:
    """Programs that walk over at most so many tiles."""
    return min(tiles, _multiprocessors(device) * tile.per_sm) if tile.per_sm else tiles


def unit_align(dtype: torch.dtype, units: int, *, backward: bool) -> int:
    """Slots of the widest unit tile of a pass."""
    if not backward:
        return tile_for("hidden_forward", dtype, units).cols
    hidden = tile_for("hidden_backward", dtype, units).cols
    forward = tile_for("hidden_forward", dtype, units).cols
    return max(hidden, forward, tile_for("weight_grad", dtype, units).rows)


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    # the interpreter computes 16-bit products in 16 bits
    if INTERPRET:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype
    ]


def _operands(
    *operands: tuple[Tensor, int, int],
    group_cols: tuple[int, int] | None = None,
    first_cols: int = 0,
) -> tuple[list[TensorDescriptor | Tensor], bool]:
    """Matrices as descriptors for the bulk copy engine if all of them qualify, else as they are.

    Args:
        *operands: Matrix and the rows and columns of its tile.
        group_cols: Columns of one of several groups, and the width of a tile that must not reach
            into the next group.
        first_cols: Tiles begin at multiples of this many columns, and at whole tiles from there.
    """
    fits = not INTERPRET and (group_cols is None or group_cols[0] % group_cols[1] == 0)
    # an H200 stops with an illegal instruction where a tile begins within a 16-byte word
    fits &= all(first_cols * matrix.element_size() % 16 == 0 for matrix, _, _ in operands)
    for matrix, _, _ in operands:
        pitch = matrix.stride(0) * matrix.element_size()
        fits &= matrix.numel() > 0 and matrix.data_ptr() % 16 == 0 and pitch % 16 == 0
        fits &= matrix.stride(1) == 1
    if not fits:
        return [matrix for matrix, _, _ in operands], False
    return [
        TensorDescriptor(m, list(m.shape), [m.stride(0), 1], [r, c]) for m, r, c in operands
    ], True


def _sources(task: Tensor, isolated: Tensor | None) -> list[tuple[Tensor, Which]]:
    # a choice within a kernel would double its buffers in shared memory
    if isolated is None:
        return [(task, Which.ALL)]
    return [(task, Which.AWAKE), (isolated, Which.ISOLATED)]


def _widths(kernel: str, dtype: torch.dtype, units: int) -> tuple[Tile, list[Tile]]:
    """Wide tile, and the tiles of the launches: the narrow one serves where few units are left."""
    wide, narrow = tile_for(kernel, dtype, units), tile_for("hidden_narrow", dtype, units)
    return wide, [wide] if narrow.cols >= wide.cols else [wide, narrow]


@triton.jit
def _load_tile(
    source, row, col, row_end, col_end, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`source[row : row + ROWS, col : col + COLS]`, 0 outside the matrix."""
    if TMA:
        tile = source.load([row, col])
    else:
        rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
        inside = (row + rows < row_end)[:, None] & (col + cols < col_end)[None, :]
        # a loop variable is a plain int under the interpreter
        start = source + (tl.full((), 0, tl.int64) + row) * stride + col
        tile = tl.load(start + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    return tile


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
        a_tile = _load_tile(a, row, a_col + k, T, a_end, stride_a, ROWS, DEPTH, TMA)
        w_tile = _load_tile(w, slot, k, num_slots, num_cols, stride_w, SLOTS, DEPTH, TMA)
        acc = tl.dot(a_tile.to(DOT), w_tile.to(DOT).T, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _skips(isolated, WHICH: tl.constexpr):
    """Whether a tile of isolated or awake units is not for this launch."""
    skips = isolated & False
    if WHICH == _AWAKE:
        skips = isolated
    elif WHICH == _ISOLATED:
        skips = isolated == 0
    return skips


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
    first, tiles = _unit_tiles(end, WHICH != _ISOLATED, WIDE, NARROW, SLOTS)
    isolated_first, isolated_tiles = _unit_tiles(
        isolated_end - isolated_begin, WHICH != _AWAKE, WIDE, NARROW, SLOTS
    )
    return first, tiles, end, isolated_begin + isolated_first, isolated_tiles, isolated_end


@triton.jit
def _halves(tile):
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    return tile.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def _strips(tile, WIDTH: tl.constexpr):
    """Tiles of so many columns, side by side: numbers of all columns would not fit registers."""
    if tile.shape[1] <= WIDTH:
        strips = (tile,)
    else:
        left, right = _halves(tile)
        strips = _strips(left, WIDTH) + _strips(right, WIDTH)
    return strips


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
        strips = _strips(acc, WIDTH)
        for i in tl.static_range(len(strips)):
            slot = i * WIDTH + slots
            valid = first + slot < end
            unit = tl.load(unit_of + at + slot, mask=valid, other=0)
            code = _of_unit(phi, unit, N, valid, JOINT)
            h = strips[i] + tl.load(bias + unit, mask=valid, other=0.0)[None, :]
            here = start + rows[:, None] * width + slot[None, :]
            if KEEP:
                tl.store(kept + here, h.to(kept.dtype.element_ty), mask=(row + rows < T)[:, None])
            if KEEP or WHICH != _ALL:
                h = activate(h, code[None, :], FAST)
            if KEEP or WHICH == _AWAKE:
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
        (x_op, w_op), tma = _operands(
            (x, tile.rows, tile.depth), (w_in, tile.cols, tile.depth),
            group_cols=(K, tile.depth) if units.groups > 1 else None,
        )  # fmt: skip
        programs = _programs(triton.cdiv(T, tile.rows) * units.slots // wide.cols, tile, x.device)
        _hidden_forward[(programs, units.groups)](
            x_op, w_op, bias, alpha, phi, units.ranges, units.unit_of, u, kept,
            T, units.units, K, x.stride(0), w_in.stride(0),
            P=units.slots, JOINT=units.joint, WHICH=int(which), KEEP=kept is not None,
            FAST=x.dtype != torch.float32, WIDE=wide.cols,
            NARROW=tiles[-1].cols if len(tiles) > 1 else 0, FLATTEN=tile.flatten and tma,
            ROWS=tile.rows, SLOTS=tile.cols, DEPTH=tile.depth, DOT=_dot_dtype(x.dtype), TMA=tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return u


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
            u_tile = _load_tile(u, row, at, T, group_end, row_length, ROWS, DEPTH, TMA)
            w_tile = _load_tile(w, at, col, group_end, num_cols, stride_w, DEPTH, COLS, TMA)
            acc = tl.dot(u_tile.to(DOT), w_tile.to(DOT), acc, input_precision="tf32x3")
        strips = _strips(acc, WIDTH)
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
    (u_op, w_op), tma = _operands((u, tile.rows, tile.depth), (w, tile.depth, tile.cols))
    tiles = triton.cdiv(T, tile.rows) * triton.cdiv(K, tile.cols)
    _project[(_programs(tiles, tile, u.device), units.groups)](
        u_op, w_op, base, out, units.ranges, *(energies or (None, None, None)), T, K, w.stride(0),
        P=units.slots, HAS_BASE=base is not None, ISOLATED=energies is not None,
        RECONSTRUCT=reconstruct, LEAST=least, MOST=most, FLATTEN=tile.flatten and tma,
        ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, DOT=_dot_dtype(u.dtype), TMA=tma,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


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
        strips = _strips(acc, WIDTH)
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
    for (source, which), tile in product(_sources(dy, other), tiles):
        operands, tma = _operands(
            (source, tile.rows, tile.depth), (w_out, tile.cols, tile.depth),
            group_cols=(K, tile.depth) if units.groups > 1 else None,
        )  # fmt: skip
        programs = _programs(row_tiles * units.slots // wide.cols, tile, h.device)
        _hidden_backward[(programs, units.groups)](
            h, *operands, alpha, phi, units.ranges, units.unit_of, norm_sq,
            activation_sq_G, grad_sq_G, activated, dz, partial, T, units.units, K,
            source.stride(0), w_out.stride(0),
            P=units.slots, JOINT=units.joint, WHICH=int(which), RECONSTRUCT=reconstruct,
            FAST=h.dtype != torch.float32, WIDE=wide.cols,
            NARROW=tiles[-1].cols if len(tiles) > 1 else 0, FLATTEN=tile.flatten and tma,
            ROWS=tile.rows, SLOTS=tile.cols, DEPTH=tile.depth,
            DOT=_dot_dtype(h.dtype), TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dz, partial


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
        p_tile = _load_tile(p, t, at, T, width, width, DEPTH, SLOTS, TMA)
        q_tile = _load_tile(q, t, q_col, T, q_end, stride_q, DEPTH, COLS, TMA)
        acc = tl.dot(p_tile.to(DOT).T, q_tile.to(DOT), acc, input_precision="tf32x3")
    slots, cols = tl.arange(0, SLOTS), tl.arange(0, COLS)
    if DIRECT and splits == 1:
        learns = first + slots < tl.where(isolated, isolated_end, task_end)
        unit = tl.load(unit_of + at + slots, mask=learns, other=group * N) - group * N
        WIDTH: tl.constexpr = min(64, COLS)
        here = col + tl.arange(0, WIDTH)
        strips = _strips(acc, WIDTH)
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
    for source, which in _sources(q, other):
        operands, tma = _operands(
            (p, tile.depth, slots), (source, tile.depth, cols),
            first_cols=K if units.groups > 1 else 0,
        )  # fmt: skip
        _weight_grad[(programs, units.groups)](
            *operands, units.ranges, units.unit_of, gain, ridge, weights_GNK, grad, partial,
            T, units.units, K, source.stride(0), *weights_GNK.stride(),
            P=units.slots, WHICH=int(which), DIRECT=by_rows, RIDGE=ridge is not None,
            SLOTS=slots, COLS=cols, DEPTH=tile.depth,
            DOT=_dot_dtype(p.dtype), TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    count, width = (4, 256) if by_rows else (32, 64)
    _finish_weight_grad[(triton.cdiv(K, width), triton.cdiv(units.units, count), units.groups)](
        partial, gain, ridge, weights_GNK, grad, units.ranges, units.slot_of, units.units, K,
        programs, triton.cdiv(T, tile.depth), *weights_GNK.stride(),
        P=units.slots, DIRECT=by_rows, RIDGE=ridge is not None, SLOTS=slots, COLS=cols,
        UNITS=count, WIDTH=width,
    )  # fmt: skip
    return grad


__all__ = [
    "Tile",
    "Which",
    "hidden_backward",
    "hidden_forward",
    "isolated_residual",
    "project",
    "tile_for",
    "unit_align",
    "weight_grad",
]
