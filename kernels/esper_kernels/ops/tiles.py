"""Tiles of fine chunk seeds: how seeds are packed, and what kernels read of them.

A chunk of 1 to 128 channels is too small for a matrix unit, so P neighbouring seeds share a tile
of WIDTH channels and N = P * H hidden units. Their weights become one block-diagonal matrix, made
on the chip by every program from the weights of its own tile.

Shapes: T = rows, D = channels, S = seeds, C = D / S, H = hidden units of a seed, P = seeds of a
tile, N = hidden units of a tile, BT = rows of a block.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from esper_kernels import learning
from esper_kernels.ops.device import dot_dtype, num_sms
from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.phi import Phi
from esper_kernels.support import power_of_2

ZERO = tl.constexpr(int(Phi.ZERO))
GLU = tl.constexpr(int(Phi.GLU))
DIAGONAL = tl.constexpr(int(Phi.DIAGONAL))
CODE_IDENTITY = tl.constexpr(int(Phi.IDENTITY))
CODE_RELU = tl.constexpr(int(Phi.RELU))
CODE_GELU = tl.constexpr(int(Phi.GELU))
CODE_SILU = tl.constexpr(int(Phi.SILU))
# the ways of a tile: no seed awake; one function for all that are awake; several; any at all
COPY, RELU, GELU, SILU, LINEAR, MIXED, RARE = (tl.constexpr(i) for i in range(7))
# what a seed learns
TASK, ISOLATED = tl.constexpr(learning.TASK), tl.constexpr(learning.ISOLATED)


@triton.jit
def units_of(tile, alpha_ptr, phi_ptr, hidden_ptr, S,
           H: tl.constexpr, P: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """The hidden units of a tile: whose they are, and which reach in and out."""
    unit = tl.arange(0, N)
    slot, k = unit // H, unit % H
    seed = tile * P + slot
    there = (slot < P) & (seed < S)
    alpha = tl.load(alpha_ptr + seed, mask=there, other=0.0)
    code = tl.load(phi_ptr + seed, mask=there, other=0)
    used = tl.load(hidden_ptr + seed, mask=there, other=0)
    # the second half of a GLU's units gates the first
    used = tl.where(code == GLU, tl.minimum(used, H // 2), used)
    counts = there & (code != ZERO) & (code != DIAGONAL) & (k < used)
    return slot, seed, k, alpha, code, there, counts


@triton.jit
def way_of(code, counts, special):
    """Which way a tile takes; `special` says whether a seed looks across it."""
    relu = tl.max((counts & (code == CODE_RELU)).to(tl.int32))
    gelu = tl.max((counts & (code == CODE_GELU)).to(tl.int32))
    silu = tl.max((counts & (code == CODE_SILU)).to(tl.int32))
    linear = tl.max((counts & (code == CODE_IDENTITY)).to(tl.int32))
    # with no unit that counts, any way will do
    way = tl.where(gelu > 0, GELU, tl.where(silu > 0, SILU, LINEAR))
    way = tl.where(relu > 0, RELU, way)
    way = tl.where(relu + gelu + silu + linear > 1, MIXED, way)
    return tl.where(special > 0, RARE, way)


@triton.jit
def incoming(w1_ptr, slot, seed, k, reads, C: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr):
    """Block-diagonal W1 of the tile, `[WIDTH, N]`, fp32."""
    channel = tl.arange(0, WIDTH)
    offsets = seed[None, :] * (C * H) + (channel % C)[:, None] * H + k[None, :]
    mine = (channel // C)[:, None] == slot[None, :]
    return tl.load(w1_ptr + offsets, mask=mine & reads[None, :], other=0.0).to(tl.float32)


@triton.jit
def outgoing(w2_ptr, slot, seed, k, counts, C: tl.constexpr, H: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """Block-diagonal W2 of the tile, `[N, WIDTH]`, fp32."""
    channel = tl.arange(0, WIDTH)
    offsets = seed[:, None] * (C * H) + k[:, None] * C + (channel % C)[None, :]
    mine = (channel // C)[None, :] == slot[:, None]
    return tl.load(w2_ptr + offsets, mask=mine & counts[:, None], other=0.0).to(tl.float32)


@triton.jit
def diagonal_of(w2_ptr, seed, channel, on, C: tl.constexpr, H: tl.constexpr):
    """Scale and shift of the DIAGONAL seeds, per channel; 0 elsewhere."""
    at = w2_ptr + seed * (C * H) + channel % C
    scale = tl.load(at, mask=on, other=0.0).to(tl.float32)
    return scale, tl.load(at + C, mask=on, other=0.0).to(tl.float32)


@triton.jit
def by_group(values, BT: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Sum rows that one thread holds, `[GROUP, WIDTH]`; no thread talks to another."""
    return tl.sum(tl.reshape(values, [BT // GROUP, GROUP, WIDTH]), axis=0)


@triton.jit
def sum_over_rows(values, exact, BT: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """Sums over rows, spread over the rows of the result as those of `no_sums` are.

    Of bf16 the matrix unit adds the values as they are, truncating as it goes (1e-4 off after
    16,384 rows); others are added in fp32 from `exact`.
    """
    if tl.bfloat16 == DOT:
        sums = tl.dot(tl.full([16, BT], 1.0 / 16, tl.bfloat16), values)
    else:
        sums = by_group(exact, BT, GROUP, WIDTH)
    return sums


@triton.jit
def no_sums(GROUP: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Where `sum_over_rows` begins."""
    ROWS: tl.constexpr = 16 if tl.bfloat16 == DOT else GROUP
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def owners_of(tile, alpha_ptr, phi_ptr, S, C: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a tile: where they lie, whose they are, and whether that seed is awake."""
    channel = tl.arange(0, WIDTH)
    owner = tile * P + channel // C
    valid = (channel < P * C) & (owner < S)
    alpha = tl.load(alpha_ptr + owner, mask=valid, other=0.0)
    code = tl.load(phi_ptr + owner, mask=valid, other=0)
    live = alpha != 0
    return channel, tile * (P * C) + channel, owner, valid, alpha, live, live & (code == DIAGONAL)


@dataclass(frozen=True)
class Tiling:
    """How a site's seeds are packed, and how many programs walk over its rows.

    Attributes:
        width: Channels of a tile, a power of two of at least 16.
        pair: Whether a program walks over two neighbouring tiles; forward only.
        block_t: Rows of a block.
        warps: Warps of a program.
        stages: Blocks in flight.
        registers: Of a thread at most; rare ways may spill, so that more programs fit.
        per_sm: Programs that one multiprocessor is to hold at once.
    """

    width: int
    pair: bool
    block_t: int
    warps: int
    stages: int
    registers: int
    per_sm: int


def width_of(C: int, H: int, units: int) -> int:
    """Channels of a tile: as many as have about that many hidden units, at most 64."""
    width = max(16, power_of_2(C))
    while width < 64 and power_of_2(2 * width // C * H) <= units:
        width *= 2
    return width


# shared memory of a program, with room for what the compiler adds
MEMORY_BYTES = 190_000


def within_memory(tiling: Tiling, C: int, H: int, dtype: torch.dtype, streams: int) -> Tiling:
    """The tiling with as few blocks in flight, and as short ones, as its weights leave room for.

    Args:
        tiling: The one that would be fastest.
        C: Channels of a chunk.
        H: Hidden units of a seed.
        dtype: Of the activations.
        streams: Activations that are read.
    """
    units = max(16, power_of_2(max(1, tiling.width // C) * H))
    tiles = 2 if tiling.pair else 1
    # the weights are held once for each way they are read
    weights = 2 * tiles * tiling.width * units * dtype.itemsize
    while True:
        block = tiling.block_t * tiling.width * dtype.itemsize
        scratch = tiling.block_t * max(tiling.width, units) * 4
        if weights + tiling.stages * tiles * streams * block + scratch <= MEMORY_BYTES:
            return tiling
        if tiling.stages > 1:
            tiling = replace(tiling, stages=tiling.stages - 1)
        elif tiling.block_t > 16:
            tiling = replace(tiling, block_t=tiling.block_t // 2)
        else:
            return tiling


@dataclass(frozen=True)
class Launch:
    """Grid, constants and options of one launch.

    Attributes:
        grid: Tiles (or pairs of them), and programs that share the rows of each.
        meta: Compile-time constants.
        pair: Whether a program walks over two tiles.
        options: Warps and registers.
    """

    grid: tuple[int, int]
    meta: dict[str, Any]
    pair: bool
    options: dict[str, int]


# computed once a shape: a small layer's call has no time for it
@lru_cache(4096)
def launch_of(
    T: int, dtype: torch.dtype, device: torch.device, S: int, C: int, H: int, tiling: Tiling
) -> Launch:
    """How to launch one kernel over all tiles of a site."""
    P = max(1, min(S, tiling.width // C))
    tiles = triton.cdiv(S, P)
    pair = tiling.pair and tiles > 1
    programs = triton.cdiv(tiles, 2) if pair else tiles
    # a test on the CPU has few rows, and a real GPU no use for tiny blocks
    block_t = min(tiling.block_t, max(16, power_of_2(T)))
    slots = num_sms(device) * tiling.per_sm
    splits = max(1, min(triton.cdiv(T, block_t), slots // programs))
    vector = 16 // dtype.itemsize
    meta = {
        "C": C, "H": H, "P": P, "WIDTH": tiling.width, "N": max(16, power_of_2(P * H)),
        "BT": block_t, "GROUP": min(block_t, max(1, tiling.warps * 32 * vector // tiling.width)),
        "FULL": S % (2 * P if pair else P) == 0 and tiling.width == P * C,
        "DOT": dot_dtype(dtype),
        "FAST": dtype != torch.float32,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "STAGES": tiling.stages,
    }  # fmt: skip
    options = {"num_warps": tiling.warps, "maxnreg": tiling.registers}
    return Launch((programs, splits), meta, pair, {} if INTERPRET else options)
