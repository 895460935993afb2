# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Which hidden units a pass computes: the needed ones, in compact slots, found on the device.

A site is one or more groups of hidden units: a span is one group with its S units, a wide chunk is
one group with its H units. The plan gives every needed unit of a group a slot, in the order

    awake with gradient of the task | awake, frozen | padding to a whole tile | isolated

so that the matrix products run over dense ranges of slots, their work follows the number of awake
units wherever these lie in the pool, and no tile mixes awake and isolated units. Nothing is read
by the host: ranges and slots stay on the device.

Shapes: G = groups, N = units of a group, P = slots of a group, S = seeds, T = rows, K = columns.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels import learning as codes
from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.ops.statistics import sum_rows

NUM_RANGES = tl.constexpr(4)
_TARGET_FRAC = tl.constexpr(codes.TARGET_FRAC)
_TASK, _ISOLATED = tl.constexpr(codes.TASK), tl.constexpr(codes.ISOLATED)


@dataclass(frozen=True)
class Units:
    """The plan of one pass.

    Args:
        ranges: `[G, 4]`, int32: ends of the units with a gradient of the task and of the awake
            units; begin and end of the isolated units. All are slots within the group.
        unit_of: Unit of each slot, numbered over all groups, `[G * P]`, int32; only slots in use.
        slot_of: Slot of each unit, numbered over all groups, `[G * N]`, int32; -1 if not needed.
        groups: G.
        units: N.
        slots: P, a multiple of `align`.
        align: Isolated units begin at a multiple of this.
        joint: Whether a group shares one alpha, function, and isolated objective (wide chunks).
        table: `ranges`, `unit_of` and `slot_of`, one after the other in one memory.
    """

    ranges: Tensor
    unit_of: Tensor
    slot_of: Tensor
    groups: int
    units: int
    slots: int
    align: int
    joint: bool
    table: Tensor

    @property
    def row(self) -> int:
        """Slots of all groups: the row length of a `[T, slots]` buffer."""
        return self.groups * self.slots


def num_slots(units: int, align: int, *, mixed: bool) -> int:
    """Slots of a group: whole tiles, with `mixed` also where isolated units begin a new one."""
    return -(-(units + (align - 1 if mixed else 0)) // align) * align


def units_of_span(table: Tensor, units: int, align: int) -> Units:
    """The plan of a span from its table.

    Args:
        table: `Units.table`, `[4 + P + N]`, int32.
        units: N.
        align: See `plan`.
    """
    slots = len(table) - NUM_RANGES.value - units
    ranges, unit_of, slot_of = table.split((NUM_RANGES.value, slots, units))
    return Units(ranges.view(1, -1), unit_of, slot_of, 1, units, slots, align, False, table)


@triton.jit
def read_ranges(ranges, group):
    """The four numbers of a group: ends of task and awake, begin and end of isolated."""
    at = ranges + group * NUM_RANGES
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def target_scale(activation_sq, grad_sq, RECONSTRUCT: tl.constexpr):
    """Scale from an isolated objective's source to its target, and the target's energy.

    The source is the activation (reconstruction) or the gradient dy (desired update).
    """
    if RECONSTRUCT:
        scale = tl.zeros_like(activation_sq) + 1.0
        energy = activation_sq
    else:
        steep = grad_sq > 0
        ratio = activation_sq / tl.where(steep, grad_sq, 1.0)
        scale = tl.where(steep, -_TARGET_FRAC * tl.sqrt(ratio), 0.0)
        energy = scale * scale * grad_sq
    return scale, energy


def target_scale_of(
    activation_sq: Tensor, grad_sq: Tensor, *, reconstruct: bool
) -> tuple[Tensor, Tensor]:
    """The same outside of kernels."""
    if reconstruct:
        return torch.ones_like(activation_sq), activation_sq
    ratio = activation_sq / torch.where(grad_sq > 0, grad_sq, 1.0)
    scale = torch.where(grad_sq > 0, -_TARGET_FRAC.value * ratio.sqrt(), 0.0)
    return scale, scale * scale * grad_sq


@triton.jit
def _plan(
    alpha, learning, hidden, ranges, unit_of, slot_of, N,
    P: tl.constexpr, ALIGN: tl.constexpr, JOINT: tl.constexpr, LEARNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    used = N
    if JOINT:
        used = tl.minimum(tl.load(hidden + group), N)
    end = tl.zeros((), tl.int32)
    for kind in tl.static_range(3):
        if kind == 2:
            end = tl.cdiv(end, ALIGN) * ALIGN
            tl.store(ranges + group * NUM_RANGES + 2, end)
        for start in range(0, N, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            inside = unit < used
            seed = unit
            if JOINT:
                seed = unit * 0 + group
            awake = inside & (tl.load(alpha + seed, mask=inside, other=0.0) != 0)
            mode = inside.to(tl.int32)
            if LEARNS:
                mode = tl.load(learning + seed, mask=inside, other=0)
            isolated = inside & (mode == _ISOLATED) & (awake == 0)
            if kind == 0:
                member = awake & (mode == _TASK)
                idle = (unit < N) & (awake == 0) & (isolated == 0)
                tl.store(slot_of + group * N + unit, -1, mask=idle)
            elif kind == 1:
                member = awake & (mode != _TASK)
            else:
                member = isolated
            count = member.to(tl.int32)
            slot = end + tl.cumsum(count, 0) - 1
            tl.store(unit_of + group * P + slot, group * N + unit, mask=member)
            tl.store(slot_of + group * N + unit, group * P + slot, mask=member)
            end += tl.sum(count, 0)
        if kind == 2:
            tl.store(ranges + group * NUM_RANGES + 3, end)
        else:
            tl.store(ranges + group * NUM_RANGES + kind, end)


def plan(
    alpha_S: Tensor, learning_S: Tensor | None, hidden_S: Tensor | None, units: int, align: int
) -> Units:
    """Give every needed unit a slot; one launch.

    Args:
        alpha_S: Blend weight per seed, `[S]`, fp32.
        learning_S: What each learns, `[S]`, int32; None: forward, none is isolated.
        hidden_S: Hidden units each seed uses, `[S]`, int32: each seed is a group of `units`. None:
            each seed is a unit of the one group.
        units: N.
        align: Unit tile of the kernels that will use the plan.
    """
    joint = hidden_S is not None
    groups = len(alpha_S) if joint else 1
    slots = num_slots(units, align, mixed=learning_S is not None and not joint)
    sizes = groups * NUM_RANGES.value, groups * slots, groups * units
    table = torch.empty(sum(sizes), dtype=torch.int32, device=alpha_S.device)
    ranges, unit_of, slot_of = table.split(sizes)
    _plan[(groups,)](
        alpha_S, learning_S, hidden_S, ranges, unit_of, slot_of, units,
        P=slots, ALIGN=align, JOINT=joint, LEARNS=learning_S is not None,
        BLOCK=min(1024, triton.next_power_of_2(units)),
    )  # fmt: skip
    ranges = ranges.view(groups, -1)
    return Units(ranges, unit_of, slot_of, groups, units, slots, align, joint, table)


@triton.jit
def _pack(
    weights, ranges, unit_of, packed, norm_sq, N, num_cols, stride_group, stride_unit, stride_col,
    stride_packed, P: tl.constexpr, ALIGN: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    _, awake_end, isolated_begin, isolated_end = read_ranges(ranges, group)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tl.cdiv(isolated_end, ALIGN) * ALIGN:
        return
    valid = (slot < awake_end) | ((slot >= isolated_begin) & (slot < isolated_end))
    unit = tl.load(unit_of + group * P + slot, mask=valid, other=0) - group * N
    source = weights + group.to(tl.int64) * stride_group + unit.to(tl.int64) * stride_unit
    target = packed + (group * P + slot).to(tl.int64) * stride_packed
    energy = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = (col < num_cols)[None, :]
        offsets = col.to(tl.int64)[None, :] * stride_col
        w = tl.load(source[:, None] + offsets, mask=valid[:, None] & inside, other=0.0)
        w = w.to(tl.float32)
        tl.store(target[:, None] + col[None, :], w.to(packed.dtype.element_ty), mask=inside)
        if NORM:
            energy += tl.sum(w * w, 1)
    if NORM:
        tl.store(norm_sq + group * P + slot, energy)


def pack(
    units: Units, weights_GNK: Tensor, dtype: torch.dtype, norm: bool = False
) -> tuple[Tensor, Tensor]:
    """Weights of the needed units, by slot, in the dtype of the matrix products.

    Args:
        units: The plan.
        weights_GNK: Pool, `[G, N, K]`, any strides.
        dtype: Of the copy.
        norm: Whether to sum the squares of each unit's weights.

    Returns:
        `[G * P, K]`, rows padded to whole 16-byte words, 0 in slots that pad a tile; and the sums
        of squares `[G * P]`, fp32 (empty without `norm`).
    """
    K = weights_GNK.shape[2]
    width = triton.cdiv(K, 8) * 8
    packed = torch.empty(units.row, width, dtype=dtype, device=weights_GNK.device)[:, :K]
    norm_sq = torch.empty(units.row if norm else 0, device=weights_GNK.device)
    by_rows = weights_GNK.stride(2) == 1
    # rows: one program a unit, coalesced; columns of a chunk's W1: square tiles
    rows, cols = (1, min(4096, triton.next_power_of_2(K))) if by_rows else (32, 64)
    _pack[(units.slots // rows, units.groups)](
        weights_GNK, units.ranges, units.unit_of, packed, norm_sq, units.units, K,
        *weights_GNK.stride(), packed.stride(0),
        P=units.slots, ALIGN=units.align, NORM=norm, ROWS=rows, COLS=cols,
    )  # fmt: skip
    return packed, norm_sq


@triton.jit
def _column_squares(
    x, ranges, partial, T, num_cols,
    ALWAYS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, APART: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    if not ALWAYS:
        _, _, isolated_begin, isolated_end = read_ranges(ranges, group)
        if isolated_end == isolated_begin:
            return
    width = num_cols * tl.num_programs(2)
    first, step = tl.program_id(1), tl.num_programs(1)
    rows = tl.arange(0, ROWS)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = col < num_cols
    total = tl.zeros((APART, COLS), tl.float32)
    offsets = rows[:, None] * width + group * num_cols + col[None, :]
    for tile in tl.range(first, tl.cdiv(T, ROWS), step, num_stages=STAGES):
        start = x + (tl.full((), 0, tl.int64) + tile) * ROWS * width
        mask = (tile * ROWS + rows < T)[:, None] & inside[None, :]
        v = tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
        # rows that one thread holds are summed first; threads meet once, at the end
        total += tl.sum(tl.reshape(v * v, (ROWS // APART, APART, COLS)), 0)
    at = partial + first.to(tl.int64) * width + group * num_cols + col
    tl.store(at, tl.sum(total, 0), mask=inside)


def column_squares(x_TD: Tensor, units: Units, always: bool) -> Tensor:
    """Sum of squares of every column, `[D]`, fp32.

    Args:
        x_TD: `[T, D]`, contiguous, D = G groups of columns.
        units: The plan.
        always: False: groups without an isolated unit are skipped, their sums are undefined.
    """
    T, D = x_TD.shape
    rows, cols, warps, stages, programs = (32, 128, 4, 1, 4) if INTERPRET else (32, 256, 4, 4, 528)
    width = D // units.groups
    tiles = triton.cdiv(width, cols) * units.groups
    splits = max(1, min(triton.cdiv(T, rows), programs // tiles))
    partial = torch.empty(splits, D, device=x_TD.device)
    _column_squares[(tiles // units.groups, splits, units.groups)](
        x_TD, units.ranges, partial, T, width,
        ALWAYS=always, ROWS=rows, COLS=cols,
        APART=min(rows, max(1, warps * 32 * 16 // x_TD.element_size() // cols)),
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return sum_rows(partial)


@triton.jit
def _finish_units(
    partial, ranges, slot_of, alpha, norm_sq, activation_sq, grad_sq,
    d_bias, agreement, explained, gain_in, gain_out, ridge, num_row_tiles, N, num_units,
    P: tl.constexpr, JOINT: tl.constexpr, RECONSTRUCT: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums over rows of each unit, and what scales the gradients of its weights."""
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < num_units
    group = unit // N
    slot = tl.load(slot_of + unit, mask=inside, other=-1)
    needed = slot >= 0
    local = slot - group * P
    at = ranges + group * NUM_RANGES
    task = needed & (local < tl.load(at, mask=inside, other=0))
    awake = needed & (local < tl.load(at + 1, mask=inside, other=0))
    isolated = needed & (awake == 0)

    row_len = P * tl.cdiv(num_units, N)
    dz_sum = tl.zeros((STEP, BLOCK), tl.float32)
    fit_sum = tl.zeros((STEP, BLOCK), tl.float32)
    h_sq = tl.zeros((STEP, BLOCK), tl.float32)
    tiles = tl.where(tl.max(needed.to(tl.int32)) > 0, num_row_tiles, 0)
    for start in range(0, tiles, STEP):
        tile = start + tl.arange(0, STEP)
        mask = (tile < tiles)[:, None] & needed[None, :]
        where = partial + tile.to(tl.int64)[:, None] * (3 * row_len) + slot[None, :]
        dz_sum += tl.load(where, mask=mask, other=0.0)
        fit_sum += tl.load(where + row_len, mask=mask, other=0.0)
        h_sq += tl.load(where + 2 * row_len, mask=mask & isolated[None, :], other=0.0)
    dz = tl.sum(dz_sum, 0)
    fit = tl.sum(fit_sum, 0)
    size = tl.sum(h_sq, 0)

    scale, energy = target_scale(
        tl.load(activation_sq + group, mask=isolated, other=0.0),
        tl.load(grad_sq + group, mask=isolated, other=0.0), RECONSTRUCT,
    )  # fmt: skip
    share = tl.where(energy > 0, 1.0 / tl.where(energy > 0, energy, 1.0), 0.0)
    seed = unit
    if JOINT:
        seed = group
    blend = tl.load(alpha + seed, mask=inside, other=0.0)
    tl.store(gain_in + unit, tl.where(task, 1.0, tl.where(isolated, share, 0.0)), mask=inside)
    d_b = tl.where(task, dz, tl.where(isolated & (energy > 0), dz * share, 0.0))
    tl.store(d_bias + unit, d_b, mask=inside)
    tl.store(agreement + unit, tl.where(awake, fit, 0.0), mask=inside)
    if JOINT:
        slope = 2.0 * share
    else:
        slope = -2.0 * scale * share
        norm = tl.load(norm_sq + slot, mask=isolated, other=0.0)
        tl.store(ridge + unit, tl.where(isolated, 2.0 * size * share, 0.0), mask=inside)
        gained = (2.0 * scale * fit - size * norm) * share
        # a target of exactly 0 is explained by doing nothing
        gained = tl.where(energy > 0, gained, 1.0)
        tl.store(explained + unit, tl.where(isolated, gained, 0.0), mask=inside)
    tl.store(gain_out + unit, tl.where(task, blend, tl.where(isolated, slope, 0.0)), mask=inside)


@dataclass(frozen=True)
class UnitGradients:
    """Per unit, `[G * N]`, fp32: sums over the rows, and scales of the weights' gradients.

    Args:
        d_bias: Gradient of the biases.
        agreement: `<dL/dy, the unit's contribution before alpha>` of awake units; 0 for the rest.
        explained: Share of its target that an isolated unit explains; empty for joint groups.
        gain_in: Scale of the incoming weights' gradient.
        gain_out: Scale of the outgoing weights' gradient.
        ridge: Multiple of the outgoing weights that their gradient also holds; empty if joint.
    """

    d_bias: Tensor
    agreement: Tensor
    explained: Tensor
    gain_in: Tensor
    gain_out: Tensor
    ridge: Tensor


def finish_units(
    units: Units, partial: Tensor, alpha_S: Tensor, norm_sq: Tensor, activation_sq_G: Tensor,
    grad_sq_G: Tensor, reconstruct: bool,
) -> UnitGradients:  # fmt: skip
    """Sum the row tiles' partial results `[tiles, 3, G * P]` in a fixed order."""
    num_units = units.groups * units.units
    own = 0 if units.joint else num_units
    sizes = (num_units, num_units, own, num_units, num_units, own)
    out = UnitGradients(*(torch.empty(n, device=partial.device) for n in sizes))
    block = 32
    _finish_units[(triton.cdiv(num_units, block),)](
        partial, units.ranges, units.slot_of, alpha_S, norm_sq, activation_sq_G, grad_sq_G,
        out.d_bias, out.agreement, out.explained, out.gain_in, out.gain_out, out.ridge,
        len(partial), units.units, num_units,
        P=units.slots, JOINT=units.joint, RECONSTRUCT=reconstruct, BLOCK=block, STEP=32,
    )  # fmt: skip
    return out
