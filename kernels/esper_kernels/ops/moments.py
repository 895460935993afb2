"""Second moments of chunks, for all seeds in one launch: x^T x and x^T dy of each.

Shapes: T = rows, D = channels, S = chunks, C = D / S, P = chunks of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.ops.tiles import TL_DTYPE, num_sms, power_of_2


@triton.jit
def _moments_kernel(
    x_ptr, dy_ptr, parts_ptr, T, D, S, C: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, start, step = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channel, row = tl.arange(0, WIDTH), tl.arange(0, BT)
    column = tile * (P * C) + channel
    seed = tile * P + channel // C
    valid = (channel < P * C) & (seed < S)
    xx = tl.zeros([WIDTH, WIDTH], tl.float32)
    xg = tl.zeros([WIDTH, WIDTH], tl.float32)
    for block in tl.range(start, tl.cdiv(T, BT), step, num_stages=STAGES):
        at = block * BT * tl.cast(D, tl.int64)
        mask = ((block * BT + row)[:, None] < T) & valid[None, :]
        offsets = row[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at + offsets, mask=mask, other=0.0).to(DOT)
        g = tl.load(dy_ptr + at + offsets, mask=mask, other=0.0).to(DOT)
        xx = tl.dot(tl.trans(x), x, xx, input_precision=PRECISION)
        xg = tl.dot(tl.trans(x), g, xg, input_precision=PRECISION)
    # of the tile's product, only the blocks on the diagonal belong to a chunk
    same = (channel // C)[:, None] == (channel // C)[None, :]
    mask = same & valid[:, None] & valid[None, :]
    size = S * C * C
    to = parts_ptr + start.to(tl.int64) * 2 * size
    to += seed[:, None] * (C * C) + (channel % C)[:, None] * C + (channel % C)[None, :]
    tl.store(to, xx, mask=mask)
    tl.store(to + size, xg, mask=mask)


def chunk_moments(x_TD: Tensor, dy_TD: Tensor, num_seeds: int) -> Tensor:
    """`x_s^T x_s` and `x_s^T dy_s` of every chunk, `[2, S, C, C]` fp32; C at most 128."""
    T, D = x_TD.shape
    C = D // num_seeds
    width = max(64, power_of_2(C))
    P = width // C
    tiles = triton.cdiv(num_seeds, P)
    splits = max(1, min(triton.cdiv(T, 64), 2 * num_sms(x_TD.device) // tiles))
    parts = torch.empty(splits, 2, num_seeds, C, C, device=x_TD.device, dtype=torch.float32)
    fp32 = x_TD.dtype == torch.float32
    _moments_kernel[(tiles, splits)](
        x_TD, dy_TD, parts, T, D, num_seeds, C=C, P=P, WIDTH=width, BT=64,
        DOT=tl.float32 if INTERPRET else TL_DTYPE[x_TD.dtype],
        PRECISION="tf32x3" if fp32 else "tf32", STAGES=2 if fp32 else 3, num_warps=4,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)
