"""The forward kernel of fine chunk seeds, and the statistics of what they read.

A program walks over the blocks of rows of one tile, or of two neighbouring ones, with the weights
held on the chip. It goes one of several ways: a copy where no seed is awake, a lean loop where all
that are awake share a function, else one for any mixture. Which way is data.

Shapes: T = rows, D = channels, S = seeds, C = D / S, H = hidden units of a seed, P = seeds of a
tile, N = hidden units of a tile, BT = rows of a block.
"""

import triton
import triton.language as tl

from esper_kernels.ops.phi import activate, gelu, sigmoid, silu
from esper_kernels.ops.statistics import is_dead, padding_rows
from esper_kernels.ops.tiles import (
    COPY,
    GELU,
    GLU,
    LINEAR,
    MIXED,
    RARE,
    RELU,
    SILU,
    by_group,
    diagonal_of,
    incoming,
    no_sums,
    outgoing,
    owners_of,
    sum_over_rows,
    units_of,
    way_of,
)


@triton.jit
def _forward_weights(
    tile, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr, S,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """What a tile needs for the common ways, and which way it is to take."""
    slot, seed, k, alpha, code, _there, counts = units_of(
        tile, alpha_ptr, phi_ptr, hidden_ptr, S, H, P, N)  # fmt: skip
    counts = counts & (alpha != 0)
    _channel, column, _owner, valid, _alpha, live, diagonal = owners_of(
        tile, alpha_ptr, phi_ptr, S, C, P, WIDTH)  # fmt: skip
    w1 = incoming(w1_ptr, slot, seed, k, counts, C, H, WIDTH).to(DOT)
    b1 = tl.load(b1_ptr + seed * H + k, mask=counts, other=0.0).to(tl.float32)
    w2 = outgoing(w2_ptr, slot, seed, k, counts, C, H, WIDTH)
    special = tl.max(diagonal.to(tl.int32)) + tl.max((counts & (code == GLU)).to(tl.int32))
    way = tl.where(tl.max(live.to(tl.int32)) > 0, way_of(code, counts, special), COPY)
    return column, valid, live, code, w1, b1, (w2 * alpha[:, None]).to(DOT), way


@triton.jit
def _forward_rare(
    tile, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr, S,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """What GLU and DIAGONAL seeds need besides."""
    slot, seed, k, alpha, code, _there, counts = units_of(
        tile, alpha_ptr, phi_ptr, hidden_ptr, S, H, P, N)  # fmt: skip
    gates = counts & (alpha != 0) & (code == GLU)
    w1 = incoming(w1_ptr, slot, seed, k + H // 2, gates, C, H, WIDTH).to(DOT)
    b1 = tl.load(b1_ptr + seed * H + k + H // 2, mask=gates, other=0.0).to(tl.float32)
    channel, _column, owner, _valid, blend, _live, diagonal = owners_of(
        tile, alpha_ptr, phi_ptr, S, C, P, WIDTH)  # fmt: skip
    scale, shift = diagonal_of(w2_ptr, owner, channel, diagonal, C, H)
    return w1, b1, scale * blend, shift * blend


@triton.jit
def _forward_tile(
    x_ptr, y_ptr, row, inside, D, column, valid, live, code, w1, b1, w2, rare,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
    FULL: tl.constexpr, OBSERVE: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows of one tile: y, and the sums of this block."""
    mask = inside if FULL else inside & valid[None, :]
    offsets = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    xf = x.to(tl.float32)
    if OBSERVE:
        total = sum_over_rows(x, xf, BT, GROUP, WIDTH, DOT)
        square = sum_over_rows(x * x, xf * xf, BT, GROUP, WIDTH, DOT)
        dead = by_group(is_dead(xf), BT, GROUP, WIDTH)
    else:
        total = no_sums(GROUP, WIDTH, DOT)
        square, dead = total, tl.zeros([GROUP, WIDTH], tl.float32)
    # the L2 cache is left to what is read: `.cs` marks what is written once as first to go
    if MODE == COPY:
        tl.store(y_ptr + offsets, x, mask=mask, cache_modifier=".cs")
    else:
        z = tl.dot(x.to(DOT), w1, input_precision=PRECISION) + b1[None, :]
        if MODE == RELU:
            h = tl.maximum(z, 0.0)
        elif MODE == GELU:
            h = gelu(z, FAST)
        elif MODE == SILU:
            h = silu(z, FAST)
        elif MODE == LINEAR:
            h = z
        else:
            h = activate(z, code[None, :], FAST)
        if MODE == RARE:
            w1_gate, b1_gate, scale, shift = rare
            gate = tl.dot(x.to(DOT), w1_gate, input_precision=PRECISION) + b1_gate[None, :]
            h = tl.where((code == GLU)[None, :], z * sigmoid(gate, FAST), h)
        delta = tl.dot(h.to(DOT), w2, input_precision=PRECISION)
        if MODE == RARE:
            delta += xf * scale[None, :] + shift[None, :]
        # a sleeping seed's channels keep their very bits: x + -0.0 is x also where x is -0.0
        y = xf + tl.where(live[None, :], delta, -0.0)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")
    return total, square, dead


@triton.jit
def _forward_rows(
    x_ptr, y_ptr, stats_ptr, T, D, left, right, rare_left, rare_right,
    MODE: tl.constexpr, PAIR: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr,
    GROUP: tl.constexpr, FULL: tl.constexpr, OBSERVE: tl.constexpr, DOT: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, step = tl.program_id(1), tl.num_programs(1)
    column, valid, live, code, w1, b1, w2, _way = left
    column_r, valid_r, live_r, code_r, w1_r, b1_r, w2_r, _way_r = right
    total = no_sums(GROUP, WIDTH, DOT)
    square = no_sums(GROUP, WIDTH, DOT)
    dead = tl.zeros([GROUP, WIDTH], tl.float32)
    total_r = no_sums(GROUP, WIDTH, DOT)
    square_r = no_sums(GROUP, WIDTH, DOT)
    dead_r = tl.zeros([GROUP, WIDTH], tl.float32)
    row = tl.arange(0, BT)
    for block in tl.range(start, tl.cdiv(T, BT), step, num_stages=STAGES):
        at = block * BT * tl.cast(D, tl.int64)
        inside = (block * BT + row)[:, None] < T
        a, b, c = _forward_tile(
            x_ptr + at, y_ptr + at, row, inside, D, column, valid, live, code, w1, b1, w2,
            rare_left, MODE, WIDTH, BT, GROUP, FULL, OBSERVE, DOT, FAST, PRECISION)  # fmt: skip
        if OBSERVE:
            total, square, dead = total + a, square + b, dead + c
        if PAIR:
            a, b, c = _forward_tile(
                x_ptr + at, y_ptr + at, row, inside, D, column_r, valid_r, live_r, code_r, w1_r,
                b1_r, w2_r, rare_right, MODE, WIDTH, BT, GROUP, FULL, OBSERVE, DOT, FAST,
                PRECISION)  # fmt: skip
            if OBSERVE:
                total_r, square_r, dead_r = total_r + a, square_r + b, dead_r + c
    if OBSERVE:
        padding = padding_rows(T, start, step, BT)
        at = stats_ptr + start * 3 * D + column
        tl.store(at, tl.sum(total, 0), mask=valid)
        tl.store(at + D, tl.sum(square, 0), mask=valid)
        tl.store(at + 2 * D, tl.sum(dead, 0) - padding, mask=valid)
        if PAIR:
            at = stats_ptr + start * 3 * D + column_r
            tl.store(at, tl.sum(total_r, 0), mask=valid_r)
            tl.store(at + D, tl.sum(square_r, 0), mask=valid_r)
            tl.store(at + 2 * D, tl.sum(dead_r, 0) - padding, mask=valid_r)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr, stats_ptr, T, D, S,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    BT: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr, OBSERVE: tl.constexpr,
    DOT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """One tile or a pair of them, and every `step`-th block of their rows."""
    tile = tl.program_id(0) * (2 if PAIR else 1)
    left = _forward_weights(
        tile, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr, S, C, H, P, WIDTH, N,
        DOT)  # fmt: skip
    right = left
    way = left[7]
    if PAIR:
        right = _forward_weights(
            tile + 1, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr, S, C, H, P, WIDTH,
            N, DOT)  # fmt: skip
        same = (way == right[7]) | (way == COPY) | (right[7] == COPY)
        mixed = tl.where((way == RARE) | (right[7] == RARE), RARE, MIXED)
        way = tl.where(same, tl.maximum(way, right[7]), mixed)
    if way == COPY:
        _forward_rows(x_ptr, y_ptr, stats_ptr, T, D, left, right, 0, 0, COPY, PAIR, WIDTH, BT,
                      GROUP, FULL, OBSERVE, DOT, FAST, PRECISION, STAGES)  # fmt: skip
    elif way == RELU:
        _forward_rows(x_ptr, y_ptr, stats_ptr, T, D, left, right, 0, 0, RELU, PAIR, WIDTH, BT,
                      GROUP, FULL, OBSERVE, DOT, FAST, PRECISION, STAGES)  # fmt: skip
    elif way == GELU:
        _forward_rows(x_ptr, y_ptr, stats_ptr, T, D, left, right, 0, 0, GELU, PAIR, WIDTH, BT,
                      GROUP, FULL, OBSERVE, DOT, FAST, PRECISION, STAGES)  # fmt: skip
    elif way == SILU:
        _forward_rows(x_ptr, y_ptr, stats_ptr, T, D, left, right, 0, 0, SILU, PAIR, WIDTH, BT,
                      GROUP, FULL, OBSERVE, DOT, FAST, PRECISION, STAGES)  # fmt: skip
    elif way == LINEAR:
        _forward_rows(x_ptr, y_ptr, stats_ptr, T, D, left, right, 0, 0, LINEAR, PAIR, WIDTH, BT,
                      GROUP, FULL, OBSERVE, DOT, FAST, PRECISION, STAGES)  # fmt: skip
    elif way == MIXED:
        _forward_rows(x_ptr, y_ptr, stats_ptr, T, D, left, right, 0, 0, MIXED, PAIR, WIDTH, BT,
                      GROUP, FULL, OBSERVE, DOT, FAST, PRECISION, STAGES)  # fmt: skip
    else:
        rare_left = _forward_rare(
            tile, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr, S, C, H, P, WIDTH, N,
            DOT)  # fmt: skip
        rare_right = rare_left
        if PAIR:
            rare_right = _forward_rare(
                tile + 1, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr, S, C, H, P,
                WIDTH, N, DOT)  # fmt: skip
        _forward_rows(x_ptr, y_ptr, stats_ptr, T, D, left, right, rare_left, rare_right, RARE,
                      PAIR, WIDTH, BT, GROUP, FULL, OBSERVE, DOT, FAST, PRECISION,
                      1)  # fmt: skip
