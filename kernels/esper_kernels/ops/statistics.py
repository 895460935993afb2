"""Statistics of a site's channels in one read-only pass: what a dormant site costs.

Shapes: T = rows, D = channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.ops.device import num_sms
from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.reference.statistics import DEAD_BELOW

_DEAD_BELOW = tl.constexpr(DEAD_BELOW)
_ON_GPU = tl.constexpr(not INTERPRET)


@triton.jit
def is_dead(x):
    """1.0 where |x| < 1e-6, else 0.0, of fp32 values."""
    if _ON_GPU:
        # one operation: (1e-6 - |x|) * 2^100, clamped to [0, 1]; the scaling is exact
        return tl.inline_asm_elementwise(
            "{.reg .f32 a; abs.f32 a, $1; fma.rn.sat.f32 $0, a, 0fF1800000, 0f678637BD;}",
            "=f,f", [x], tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return (tl.abs(x) < _DEAD_BELOW).to(tl.float32)


@triton.jit
def padding_rows(T, start, step, BT: tl.constexpr):
    """How many rows past the end a program has walked over; they were read as 0."""
    blocks = tl.cdiv(T, BT)
    return tl.where((blocks - 1 - start) % step == 0, blocks * BT - T, 0).to(tl.float32)


@triton.jit
def _statistics_kernel(
    x_ptr, stats_ptr, T, D, BT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    start, step = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, BT)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    valid = column < D
    total = tl.zeros([GROUP, WIDTH], tl.float32)
    square = tl.zeros([GROUP, WIDTH], tl.float32)
    dead = tl.zeros([GROUP, WIDTH], tl.float32)
    for block in tl.range(start, tl.cdiv(T, BT), step, num_stages=STAGES):
        at = block * BT * tl.cast(D, tl.int64)
        inside = (block * BT + row)[:, None] < T
        offsets = row[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at + offsets, mask=inside & valid[None, :], other=0.0).to(tl.float32)
        # rows that one thread holds are summed first; threads meet once, at the end
        total += tl.sum(tl.reshape(x, [BT // GROUP, GROUP, WIDTH]), 0)
        square += tl.sum(tl.reshape(x * x, [BT // GROUP, GROUP, WIDTH]), 0)
        dead += tl.sum(tl.reshape(is_dead(x), [BT // GROUP, GROUP, WIDTH]), 0)
    at = stats_ptr + start * 3 * D + column
    tl.store(at, tl.sum(total, 0), mask=valid)
    tl.store(at + D, tl.sum(square, 0), mask=valid)
    padding = padding_rows(T, start, step, BT)
    tl.store(at + 2 * D, tl.sum(dead, 0) - padding, mask=valid)


# columns and rows of a block, warps, blocks in flight, programs of a multiprocessor: the fastest
# that were measured on an H200
WIDTH, BLOCK_T, WARPS, STAGES, PER_SM = 64, 64, 4, 5, 2


def column_statistics(x_TD: Tensor) -> Tensor:
    """Per channel the sum, the sum of squares and the count of |x| < 1e-6, `[3, D]` fp32."""
    T, D = x_TD.shape
    x_TD = x_TD.contiguous()
    tiles = triton.cdiv(D, WIDTH)
    splits = max(1, min(triton.cdiv(T, BLOCK_T), num_sms(x_TD.device) * PER_SM // tiles))
    stats = torch.empty(splits, 3, D, device=x_TD.device, dtype=torch.float32)
    vector = 16 // x_TD.element_size()
    _statistics_kernel[(tiles, splits)](
        x_TD, stats, T, D, BT=BLOCK_T, WIDTH=WIDTH,
        GROUP=min(BLOCK_T, max(1, WARPS * 32 * vector // WIDTH)), STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return stats[0] if splits == 1 else sum_rows(stats)


@triton.jit
def _sum_rows(partial, out, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = (col < num_cols)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * num_cols + col[None, :]
        total += tl.load(partial + at, mask=(row < num_rows)[:, None] & inside, other=0.0)
    tl.store(out + col, tl.sum(total, 0), mask=col < num_cols)


def sum_rows(partial: Tensor) -> Tensor:
    """Sum over the first axis in a fixed order; `[R, ...]` fp32 to `[...]`.

    After a forward on an H200, `torch.sum` over its few rows took 6 us longer.
    """
    out = torch.empty(partial.shape[1:], device=partial.device)
    num_cols = out.numel()
    rows = min(32, triton.next_power_of_2(len(partial)))
    cols = min(256, 2048 // rows)
    _sum_rows[(triton.cdiv(num_cols, cols),)](
        partial, out, len(partial), num_cols, ROWS=rows, COLS=cols
    )
    return out
