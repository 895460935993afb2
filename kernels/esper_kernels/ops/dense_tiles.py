# mypy: disable-error-code="assignment,no-untyped-def,untyped-decorator"
"""The matrix products of spans and wide chunks: a grouped two-layer product over slots of units.

    hidden_forward   u  = alpha * phi(x W_in^T + b)                  awake units
    project          y  = base + u W_out                             and dx = base + dz W_in
    hidden_backward  dz = alpha * phi' * (dy W_out^T)                awake and isolated units
    weight_grad      dW_in = dz^T x, dW_out = h^T dy                 units with a gradient

The first and the third are in `dense_hidden`, the others in `dense_project` and `dense_gradient`;
here is what they have in common: the sizes of their tiles, and how these are read.

The programs of a launch walk over its tiles, as many as the multiprocessors hold: where all units
are dormant a launch ends at once. Where few units are awake (a tile would be nearly empty, and the
pass is bound by memory) a second launch with small tiles serves. Sums over rows are split into
partial sums that are added in a fixed order.

Shapes: T = rows, G = groups, P = slots of a group, K = columns of one group (channels of a chunk,
features of a span), N = units of a group in the pool. The slots of all groups lie side by side.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from esper_kernels.ops.device import num_sms
from esper_kernels.ops.dispatch import INTERPRET


class Which(IntEnum):
    """Units that a launch serves."""

    ALL = 0
    AWAKE = 1
    ISOLATED = 2


# the same, as kernels read it
ALL, AWAKE, ISOLATED = (tl.constexpr(int(which)) for which in Which)


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


def programs_of(tiles: int, tile: Tile, device: torch.device) -> int:
    """Programs that walk over at most so many tiles."""
    # at least two, so that one program walks over several tiles also where there is no GPU
    return min(tiles, max(2, num_sms(device)) * tile.per_sm) if tile.per_sm else tiles


def unit_align(dtype: torch.dtype, units: int, *, backward: bool) -> int:
    """Slots of the widest unit tile of a pass."""
    if not backward:
        return tile_for("hidden_forward", dtype, units).cols
    hidden = tile_for("hidden_backward", dtype, units).cols
    forward = tile_for("hidden_forward", dtype, units).cols
    return max(hidden, forward, tile_for("weight_grad", dtype, units).rows)


def operands_of(
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


def sources_of(task: Tensor, isolated: Tensor | None) -> list[tuple[Tensor, Which]]:
    """What a product reads, and for which units, in each of its launches.

    A choice within a kernel would double its buffers in shared memory.
    """
    if isolated is None:
        return [(task, Which.ALL)]
    return [(task, Which.AWAKE), (isolated, Which.ISOLATED)]


@triton.jit
def load_tile(
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
def _halves(tile):
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    return tile.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def strips_of(tile, WIDTH: tl.constexpr):
    """Tiles of so many columns, side by side: numbers of all columns would not fit registers."""
    if tile.shape[1] <= WIDTH:
        strips = (tile,)
    else:
        left, right = _halves(tile)
        strips = strips_of(left, WIDTH) + strips_of(right, WIDTH)
    return strips
