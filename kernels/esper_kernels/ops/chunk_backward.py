"""The backward kernel of fine chunk seeds: dx, and sums for the gradients of the weights.

Recomputes the hidden units rather than storing them. `dW2 = alpha h^T dy` and
`dalpha = <W2, h^T dy>`, so what a seed has put out is not needed again. Each program writes its own
partial sums; `chunk_finish` adds them in a fixed order.

Shapes: T = rows, D = channels, S = seeds, C = D / S, H = hidden units of a seed, P = seeds of a
tile, N = hidden units of a tile, BT = rows of a block.
"""

import triton
import triton.language as tl

from esper_kernels.ops.phi import activate_and_slope, gelu_and_slope, sigmoid, silu_and_slope
from esper_kernels.ops.tiles import (
    COPY,
    DIAGONAL,
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
    outgoing,
    units_of,
    way_of,
)


@triton.jit
def _backward_rows(
    dy_ptr, x_ptr, dx_ptr, T, D, start, step, w1, b1, w2, code, w1_gate, b1_gate, live,
    scale, column, valid, MODE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    BT: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr, OBSERVE: tl.constexpr,
    DOT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # units are the rows of every product here: what they hold goes from one tensor-core
    # operation to the next in registers, and sums over rows of x stay within four threads
    dw1 = tl.zeros([N, WIDTH], tl.float32)
    dw2 = tl.zeros([N, WIDTH], tl.float32)
    db1 = tl.zeros([N], tl.float32)
    dw1_gate = tl.zeros([N, WIDTH], tl.float32)
    db1_gate = tl.zeros([N], tl.float32)
    g_sum = tl.zeros([GROUP, WIDTH], tl.float32)
    g_square = tl.zeros([GROUP, WIDTH], tl.float32)
    xg_sum = tl.zeros([GROUP, WIDTH], tl.float32)
    row = tl.arange(0, BT)
    for block in tl.range(start, tl.cdiv(T, BT), step, num_stages=STAGES):
        at = block * BT * tl.cast(D, tl.int64)
        inside = (block * BT + row)[:, None] < T
        mask = inside if FULL else inside & valid[None, :]
        offsets = row[:, None] * D + column[None, :]
        g = tl.load(dy_ptr + at + offsets, mask=mask, other=0.0)
        gf = g.to(tl.float32)
        if OBSERVE:
            g_square += by_group(gf * gf, BT, GROUP, WIDTH)
        if MODE == COPY:
            tl.store(dx_ptr + at + offsets, g, mask=mask)
        else:
            x = tl.load(x_ptr + at + offsets, mask=mask, other=0.0)
            xd, gd = x.to(DOT), g.to(DOT)
            z = tl.dot(w1, tl.trans(xd), input_precision=PRECISION) + b1[:, None]
            dh = tl.dot(w2, tl.trans(gd), input_precision=PRECISION)
            if MODE == RELU:
                h = tl.maximum(z, 0.0)
                dz = tl.where(z > 0, dh, 0.0)
            elif MODE == GELU:
                h, slope = gelu_and_slope(z, FAST)
                dz = dh * slope
            elif MODE == SILU:
                h, slope = silu_and_slope(z, FAST)
                dz = dh * slope
            elif MODE == LINEAR:
                h, dz = z, dh
            else:
                h, slope = activate_and_slope(z, code[:, None], FAST)
                dz = dh * slope
            if MODE == RARE:
                is_glu = (code == GLU)[:, None]
                gate = tl.dot(w1_gate, tl.trans(xd), input_precision=PRECISION)
                gate = sigmoid(gate + b1_gate[:, None], FAST)
                h = tl.where(is_glu, z * gate, h)
                dz = tl.where(is_glu, dh * gate, dz)
                d_gate = tl.where(is_glu, dh * z * gate * (1.0 - gate), 0.0)
                db1_gate += tl.sum(d_gate, 1)
                d_gate = d_gate.to(DOT)
                dw1_gate = tl.dot(d_gate, xd, dw1_gate, input_precision=PRECISION)
                g_sum += by_group(gf, BT, GROUP, WIDTH)
                xg_sum += by_group(gf * x.to(tl.float32), BT, GROUP, WIDTH)
            db1 += tl.sum(dz, 1)
            dz = dz.to(DOT)
            dw1 = tl.dot(dz, xd, dw1, input_precision=PRECISION)
            dw2 = tl.dot(h.to(DOT), gd, dw2, input_precision=PRECISION)
            delta = tl.dot(tl.trans(dz), w1, input_precision=PRECISION)
            if MODE == RARE:
                delta += tl.dot(tl.trans(d_gate), w1_gate, input_precision=PRECISION)
                delta += gf * scale[None, :]
            dx = gf + tl.where(live[None, :], delta, -0.0)
            tl.store(dx_ptr + at + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dw1, db1, dw2, dw1_gate, db1_gate, g_sum, g_square, xg_sum


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, dx_ptr, w1_ptr, b1_ptr, w2_ptr, alpha_ptr, phi_ptr, hidden_ptr,
    part_w1_ptr, part_b1_ptr, part_w2_ptr, part_channel_ptr, T, D, S,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    BT: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr, OBSERVE: tl.constexpr,
    DOT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile, and every `step`-th block of its rows."""
    tile, start, step = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, seed, k, alpha, code, there, counts = units_of(
        tile, alpha_ptr, phi_ptr, hidden_ptr, S, H, P, N)  # fmt: skip
    counts = counts & (alpha != 0)
    channel = tl.arange(0, WIDTH)
    column = tile * (P * C) + channel
    owner = tile * P + channel // C
    valid = (channel < P * C) & (owner < S)
    owner_alpha = tl.load(alpha_ptr + owner, mask=valid, other=0.0)
    owner_code = tl.load(phi_ptr + owner, mask=valid, other=0)
    live = owner_alpha != 0
    diagonal = live & (owner_code == DIAGONAL)
    special = tl.max((diagonal | (live & (owner_code == GLU))).to(tl.int32))
    any_live = tl.max(live.to(tl.int32))
    way = way_of(code, counts, special)
    zero = tl.zeros([WIDTH], tl.float32)
    none = tl.zeros([N], tl.float32)
    to_channel = part_channel_ptr + start * 5 * D + column
    if any_live == 0:
        _a, _b, _c, _d, _e, _f, g_square, _g = _backward_rows(
            dy_ptr, x_ptr, dx_ptr, T, D, start, step, 0, none, 0, code, 0, none, live, zero,
            column, valid, COPY, WIDTH, N, BT, GROUP, FULL, OBSERVE, DOT, FAST, PRECISION,
            STAGES)  # fmt: skip
    else:
        w1 = tl.trans(incoming(w1_ptr, slot, seed, k, counts, C, H, WIDTH)).to(DOT)
        b1 = tl.load(b1_ptr + seed * H + k, mask=counts, other=0.0).to(tl.float32)
        w2 = outgoing(w2_ptr, slot, seed, k, counts, C, H, WIDTH)
        w2 = (w2 * alpha[:, None]).to(DOT)
        mine = ((channel // C)[None, :] == slot[:, None]) & there[:, None]
        plain = there & ((code != GLU) | (k < H // 2))
        size = S * C * H
        to_w1 = seed[:, None] * (C * H) + (channel % C)[None, :] * H + k[:, None]
        to_w2 = seed[:, None] * (C * H) + k[:, None] * C + (channel % C)[None, :]
        to_w1 = part_w1_ptr + start.to(tl.int64) * 2 * size + to_w1
        to_w2 = part_w2_ptr + start.to(tl.int64) * 2 * size + to_w2
        to_b1 = part_b1_ptr + start.to(tl.int64) * 2 * S * H + seed * H + k
        if way == RELU:
            dw1, db1, dw2, _h, _i, _j, g_square, _k = _backward_rows(
                dy_ptr, x_ptr, dx_ptr, T, D, start, step, w1, b1, w2, code, 0, none, live,
                zero, column, valid, RELU, WIDTH, N, BT, GROUP, FULL, OBSERVE, DOT, FAST,
                PRECISION, STAGES)  # fmt: skip
            tl.store(to_w1, dw1, mask=mine)
            tl.store(to_b1, db1, mask=there)
            tl.store(to_w2, dw2, mask=mine)
        elif way == GELU:
            dw1, db1, dw2, _h, _i, _j, g_square, _k = _backward_rows(
                dy_ptr, x_ptr, dx_ptr, T, D, start, step, w1, b1, w2, code, 0, none, live,
                zero, column, valid, GELU, WIDTH, N, BT, GROUP, FULL, OBSERVE, DOT, FAST,
                PRECISION, STAGES)  # fmt: skip
            tl.store(to_w1, dw1, mask=mine)
            tl.store(to_b1, db1, mask=there)
            tl.store(to_w2, dw2, mask=mine)
        elif way == SILU:
            dw1, db1, dw2, _h, _i, _j, g_square, _k = _backward_rows(
                dy_ptr, x_ptr, dx_ptr, T, D, start, step, w1, b1, w2, code, 0, none, live,
                zero, column, valid, SILU, WIDTH, N, BT, GROUP, FULL, OBSERVE, DOT, FAST,
                PRECISION, STAGES)  # fmt: skip
            tl.store(to_w1, dw1, mask=mine)
            tl.store(to_b1, db1, mask=there)
            tl.store(to_w2, dw2, mask=mine)
        elif way == LINEAR:
            dw1, db1, dw2, _h, _i, _j, g_square, _k = _backward_rows(
                dy_ptr, x_ptr, dx_ptr, T, D, start, step, w1, b1, w2, code, 0, none, live,
                zero, column, valid, LINEAR, WIDTH, N, BT, GROUP, FULL, OBSERVE, DOT, FAST,
                PRECISION, STAGES)  # fmt: skip
            tl.store(to_w1, dw1, mask=mine)
            tl.store(to_b1, db1, mask=there)
            tl.store(to_w2, dw2, mask=mine)
        elif way == MIXED:
            dw1, db1, dw2, _h, _i, _j, g_square, _k = _backward_rows(
                dy_ptr, x_ptr, dx_ptr, T, D, start, step, w1, b1, w2, code, 0, none, live,
                zero, column, valid, MIXED, WIDTH, N, BT, GROUP, FULL, OBSERVE, DOT, FAST,
                PRECISION, STAGES)  # fmt: skip
            tl.store(to_w1, dw1, mask=mine)
            tl.store(to_b1, db1, mask=there)
            tl.store(to_w2, dw2, mask=mine)
        else:
            gates = counts & (code == GLU)
            w1_gate = tl.trans(incoming(w1_ptr, slot, seed, k + H // 2, gates, C, H, WIDTH))
            b1_gate = tl.load(b1_ptr + seed * H + k + H // 2, mask=gates, other=0.0)
            scale, _ = diagonal_of(w2_ptr, owner, channel, diagonal, C, H)
            dw1, db1, dw2, dw1_gate, db1_gate, g_sum, g_square, xg_sum = _backward_rows(
                dy_ptr, x_ptr, dx_ptr, T, D, start, step, w1, b1, w2, code, w1_gate.to(DOT),
                b1_gate.to(tl.float32), live, scale * owner_alpha,
                column, valid, RARE, WIDTH, N, BT, GROUP, FULL, OBSERVE, DOT, FAST, PRECISION,
                1)  # fmt: skip
            tl.store(to_w1, dw1, mask=mine & plain[:, None])
            tl.store(to_b1, db1, mask=plain)
            tl.store(to_w2, dw2, mask=mine)
            gates = there & (code == GLU) & (k < H // 2)
            tl.store(to_w1 + H // 2, dw1_gate, mask=mine & gates[:, None])
            tl.store(to_b1 + H // 2, db1_gate, mask=gates)
            tl.store(to_channel + 2 * D, tl.sum(g_sum, 0), mask=valid)
            tl.store(to_channel + 4 * D, tl.sum(xg_sum, 0), mask=valid)
    if OBSERVE:
        tl.store(to_channel + 3 * D, tl.sum(g_square, 0), mask=valid)
