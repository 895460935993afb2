"""The kernel of isolated training: sums for the gradient of `|f(x) - k dy|^2`.

See `esper_kernels.reference.isolated` for the objective. Tiles without a training seed are left at
once; nothing of the host's is written.

Shapes: T = rows, D = channels, S = seeds, C = D / S, H = hidden units of a seed, P = seeds of a
tile, N = hidden units of a tile, BT = rows of a block.
"""

import triton
import triton.language as tl

from esper_kernels.ops.phi import activate_and_slope, sigmoid
from esper_kernels.ops.tiles import GLU, ISOLATED, by_group, incoming, outgoing, units_of


@triton.jit
def _isolated_rows(
    g_ptr, x_ptr, T, D, start, step, w1, b1, w2, code, w1_gate, b1_gate,
    column, valid, GATED: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, BT: tl.constexpr,
    GROUP: tl.constexpr, FULL: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # the gradient of |f - k g|^2 is linear in k, which needs sums over all rows: so both parts,
    # for f and for g, are gathered and put together at the end
    dw1_f = tl.zeros([N, WIDTH], tl.float32)
    dw1_g = tl.zeros([N, WIDTH], tl.float32)
    dw2_f = tl.zeros([N, WIDTH], tl.float32)
    dw2_g = tl.zeros([N, WIDTH], tl.float32)
    gate_f = tl.zeros([N, WIDTH], tl.float32)
    gate_g = tl.zeros([N, WIDTH], tl.float32)
    db1_f = tl.zeros([N], tl.float32)
    db1_g = tl.zeros([N], tl.float32)
    db_gate_f = tl.zeros([N], tl.float32)
    db_gate_g = tl.zeros([N], tl.float32)
    x_sum = tl.zeros([GROUP, WIDTH], tl.float32)
    x_square = tl.zeros([GROUP, WIDTH], tl.float32)
    g_sum = tl.zeros([GROUP, WIDTH], tl.float32)
    g_square = tl.zeros([GROUP, WIDTH], tl.float32)
    xg_sum = tl.zeros([GROUP, WIDTH], tl.float32)
    row = tl.arange(0, BT)
    for block in tl.range(start, tl.cdiv(T, BT), step, num_stages=STAGES):
        at = block * BT * tl.cast(D, tl.int64)
        inside = block * BT + row < T
        mask = inside[:, None] if FULL else inside[:, None] & valid[None, :]
        offsets = row[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at + offsets, mask=mask, other=0.0)
        g = tl.load(g_ptr + at + offsets, mask=mask, other=0.0)
        xf, gf = x.to(tl.float32), g.to(tl.float32)
        x_sum += by_group(xf, BT, GROUP, WIDTH)
        x_square += by_group(xf * xf, BT, GROUP, WIDTH)
        g_sum += by_group(gf, BT, GROUP, WIDTH)
        g_square += by_group(gf * gf, BT, GROUP, WIDTH)
        xg_sum += by_group(xf * gf, BT, GROUP, WIDTH)
        xd, gd = x.to(DOT), g.to(DOT)
        z = tl.dot(w1, tl.trans(xd), input_precision=PRECISION) + b1[:, None]
        h, slope = activate_and_slope(z, code[:, None], FAST)
        is_glu = (code == GLU)[:, None]
        if GATED:
            gate = tl.dot(w1_gate, tl.trans(xd), input_precision=PRECISION)
            gate = sigmoid(gate + b1_gate[:, None], FAST)
            h = tl.where(is_glu, z * gate, h)
            slope = tl.where(is_glu, gate, slope)
        # rows past the end have no x, but a bias would still speak there
        h = tl.where(inside[None, :], h, 0.0).to(DOT)
        f = tl.dot(tl.trans(h), w2, input_precision=PRECISION).to(DOT)
        dh_f = tl.dot(w2, tl.trans(f), input_precision=PRECISION)
        dh_g = tl.dot(w2, tl.trans(gd), input_precision=PRECISION)
        dz_f, dz_g = dh_f * slope, dh_g * slope
        db1_f += tl.sum(dz_f, 1)
        db1_g += tl.sum(dz_g, 1)
        dw1_f = tl.dot(dz_f.to(DOT), xd, dw1_f, input_precision=PRECISION)
        dw1_g = tl.dot(dz_g.to(DOT), xd, dw1_g, input_precision=PRECISION)
        dw2_f = tl.dot(h, f, dw2_f, input_precision=PRECISION)
        dw2_g = tl.dot(h, gd, dw2_g, input_precision=PRECISION)
        if GATED:
            bend = tl.where(is_glu, z * gate * (1.0 - gate), 0.0)
            dz_f, dz_g = dh_f * bend, dh_g * bend
            db_gate_f += tl.sum(dz_f, 1)
            db_gate_g += tl.sum(dz_g, 1)
            gate_f = tl.dot(dz_f.to(DOT), xd, gate_f, input_precision=PRECISION)
            gate_g = tl.dot(dz_g.to(DOT), xd, gate_g, input_precision=PRECISION)
    sums = (tl.sum(x_sum, 0), tl.sum(x_square, 0), tl.sum(g_sum, 0), tl.sum(g_square, 0),
            tl.sum(xg_sum, 0))  # fmt: skip
    return (dw1_f, dw1_g, dw2_f, dw2_g, gate_f, gate_g, db1_f, db1_g, db_gate_f, db_gate_g,
            sums)  # fmt: skip


@triton.jit
def isolated_kernel(
    g_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, phi_ptr, hidden_ptr, learning_ptr,
    part_w1_ptr, part_b1_ptr, part_w2_ptr, part_channel_ptr, T, D, S,
    C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    BT: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr, DOT: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile, and every `step`-th block of its rows; nothing if no seed trains there."""
    tile, start, step = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, seed, k, learning, code, there, counts = units_of(
        tile, learning_ptr, phi_ptr, hidden_ptr, S, H, P, N)  # fmt: skip
    mine = there & (learning == ISOLATED)
    if tl.max(mine.to(tl.int32)) > 0:
        counts = counts & mine
        channel = tl.arange(0, WIDTH)
        column = tile * (P * C) + channel
        owner = tile * P + channel // C
        valid = (channel < P * C) & (owner < S)
        w1 = tl.trans(incoming(w1_ptr, slot, seed, k, counts, C, H, WIDTH)).to(DOT)
        # masked after the load: with the other mask, Triton 3.6 moves the load and fails
        b1 = tl.load(b1_ptr + seed * H + k, mask=there, other=0.0).to(tl.float32)
        b1 = tl.where(counts, b1, 0.0)
        w2 = outgoing(w2_ptr, slot, seed, k, counts, C, H, WIDTH).to(DOT)
        block = ((channel // C)[None, :] == slot[:, None]) & mine[:, None]
        gated = mine & (code == GLU)
        size = S * C * H
        to_w1 = seed[:, None] * (C * H) + (channel % C)[None, :] * H + k[:, None]
        to_w2 = seed[:, None] * (C * H) + k[:, None] * C + (channel % C)[None, :]
        to_w1 = part_w1_ptr + start.to(tl.int64) * 2 * size + to_w1
        to_w2 = part_w2_ptr + start.to(tl.int64) * 2 * size + to_w2
        to_b1 = part_b1_ptr + start.to(tl.int64) * 2 * S * H + seed * H + k
        to_channel = part_channel_ptr + start * 5 * D + column
        none = tl.zeros([N], tl.float32)
        if tl.max(gated.to(tl.int32)) == 0:
            dw1_f, dw1_g, dw2_f, dw2_g, _a, _b, db1_f, db1_g, _c, _d, sums = _isolated_rows(
                g_ptr, x_ptr, T, D, start, step, w1, b1, w2, code, 0, none,
                column, valid, False, WIDTH, N, BT, GROUP, FULL, DOT, FAST, PRECISION,
                STAGES)  # fmt: skip
            tl.store(to_w1, dw1_f, mask=block)
            tl.store(to_w1 + size, dw1_g, mask=block)
            tl.store(to_b1, db1_f, mask=mine)
            tl.store(to_b1 + S * H, db1_g, mask=mine)
            tl.store(to_w2, dw2_f, mask=block)
            tl.store(to_w2 + size, dw2_g, mask=block)
        else:
            gates = counts & gated
            w1_gate = tl.trans(incoming(w1_ptr, slot, seed, k + H // 2, gates, C, H, WIDTH))
            b1_gate = tl.load(b1_ptr + seed * H + k + H // 2, mask=gates, other=0.0)
            (dw1_f, dw1_g, dw2_f, dw2_g, gate_f, gate_g, db1_f, db1_g, db_gate_f, db_gate_g,
             sums) = _isolated_rows(
                g_ptr, x_ptr, T, D, start, step, w1, b1, w2, code, w1_gate.to(DOT),
                b1_gate.to(tl.float32),
                column, valid, True, WIDTH, N, BT, GROUP, FULL, DOT, FAST, PRECISION,
                1)  # fmt: skip
            gates = gated & (k < H // 2)
            plain = mine & ((code != GLU) | (k < H // 2))
            tl.store(to_w1, dw1_f, mask=block & plain[:, None])
            tl.store(to_w1 + size, dw1_g, mask=block & plain[:, None])
            tl.store(to_w1 + H // 2, gate_f, mask=block & gates[:, None])
            tl.store(to_w1 + size + H // 2, gate_g, mask=block & gates[:, None])
            tl.store(to_b1, db1_f, mask=plain)
            tl.store(to_b1 + S * H, db1_g, mask=plain)
            tl.store(to_b1 + H // 2, db_gate_f, mask=gates)
            tl.store(to_b1 + S * H + H // 2, db_gate_g, mask=gates)
            tl.store(to_w2, dw2_f, mask=block)
            tl.store(to_w2 + size, dw2_g, mask=block)
        for i in tl.static_range(5):
            tl.store(to_channel + i * D, sums[i], mask=valid)
