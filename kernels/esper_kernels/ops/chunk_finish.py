"""The last kernel of a backward pass: partial sums become gradients.

Adds the sums of all programs in a fixed order, so that two runs agree bit for bit.

Shapes: T = rows, D = channels, S = seeds, C = D / S, H = hidden units of a seed, P = seeds of a
tile, N = hidden units of a tile, BT = rows of a block.
"""

import triton
import triton.language as tl

from esper_kernels.ops.tiles import DIAGONAL, ISOLATED, TASK


@triton.jit
def _sum_parts(ptr, stride, mask, SPLITS: tl.constexpr):
    total = tl.load(ptr, mask=mask, other=0.0)
    for i in range(1, SPLITS):
        total += tl.load(ptr + i * stride, mask=mask, other=0.0)
    return total


@triton.jit
def finish_kernel(
    task_w1_ptr, task_b1_ptr, task_w2_ptr, task_channel_ptr,
    own_w1_ptr, own_b1_ptr, own_w2_ptr, own_channel_ptr,
    w2_ptr, alpha_ptr, phi_ptr, learning_ptr, dw1_ptr, db1_ptr, dw2_ptr, dalpha_ptr,
    grad_sq_ptr, explained_ptr, energies_ptr, T, S, D,
    C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, TASK_SPLITS: tl.constexpr,
    OWN_SPLITS: tl.constexpr, OBSERVE: tl.constexpr, RECONSTRUCT: tl.constexpr,
    TARGET_FRAC: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Gradients, blend and explained share of G seeds."""
    seed = tl.program_id(0) * G + tl.arange(0, G)
    there = seed < S
    alpha = tl.load(alpha_ptr + seed, mask=there, other=0.0)
    code = tl.load(phi_ptr + seed, mask=there, other=0)
    learning = tl.load(learning_ptr + seed, mask=there, other=0)
    awake = there & (alpha != 0)
    task = awake & (learning == TASK)
    own = there & (learning == ISOLATED)
    diagonal = code == DIAGONAL
    size = S * C * H

    c = tl.arange(0, BLOCK_C)
    channel = seed[:, None] * C + c[None, :]
    in_chunk = there[:, None] & (c < C)[None, :]
    if OBSERVE:
        square = _sum_parts(task_channel_ptr + 3 * D + channel, 5 * D, in_chunk, TASK_SPLITS)
        tl.store(grad_sq_ptr + channel, square, mask=in_chunk)

    # factors of the isolated objective |f - k g|^2 / |t|^2 with t = k g
    on = in_chunk & own[:, None]
    x_sum = _sum_parts(own_channel_ptr + channel, 5 * D, on, OWN_SPLITS)
    x_square = _sum_parts(own_channel_ptr + D + channel, 5 * D, on, OWN_SPLITS)
    g_sum = _sum_parts(own_channel_ptr + 2 * D + channel, 5 * D, on, OWN_SPLITS)
    g_square = _sum_parts(own_channel_ptr + 3 * D + channel, 5 * D, on, OWN_SPLITS)
    xg_sum = _sum_parts(own_channel_ptr + 4 * D + channel, 5 * D, on, OWN_SPLITS)
    if GIVEN:
        xx = tl.load(energies_ptr + seed, mask=own, other=0.0)
        gg = tl.load(energies_ptr + S + seed, mask=own, other=0.0)
    else:
        xx, gg = tl.sum(x_square, 1), tl.sum(g_square, 1)
    if RECONSTRUCT:
        ratio = tl.where(own, 1.0, 0.0)
    else:
        ratio = tl.where(gg > 0, -TARGET_FRAC * tl.sqrt(xx / tl.where(gg > 0, gg, 1.0)), 0.0)
    total = ratio * ratio * gg
    asked = total > 0
    of_f = tl.where(asked, 2.0 / tl.where(asked, total, 1.0), 0.0)
    of_g = -ratio * of_f

    # DIAGONAL: y = x * scale + shift, so all its sums are sums over channels
    flat = on & diagonal[:, None]
    at = seed[:, None] * (C * H) + c[None, :]
    scale = tl.load(w2_ptr + at, mask=flat, other=0.0).to(tl.float32)
    shift = tl.load(w2_ptr + at + C, mask=flat, other=0.0).to(tl.float32)
    f_x = scale * x_square + shift * x_sum
    f_1 = scale * x_sum + shift * T
    ff = tl.sum(scale * f_x + shift * f_1, 1)
    fg = tl.sum(scale * xg_sum + shift * g_sum, 1)
    own_scale = of_f[:, None] * f_x + of_g[:, None] * xg_sum
    own_shift = of_f[:, None] * f_1 + of_g[:, None] * g_sum
    tasked = in_chunk & awake[:, None] & diagonal[:, None]
    g_sum = _sum_parts(task_channel_ptr + 2 * D + channel, 5 * D, tasked, TASK_SPLITS)
    xg_sum = _sum_parts(task_channel_ptr + 4 * D + channel, 5 * D, tasked, TASK_SPLITS)
    scale = tl.load(w2_ptr + at, mask=tasked, other=0.0).to(tl.float32)
    shift = tl.load(w2_ptr + at + C, mask=tasked, other=0.0).to(tl.float32)
    dalpha = tl.sum(scale * xg_sum + shift * g_sum, 1)
    learns = tl.where(task, alpha, 0.0)[:, None]
    d_scale = learns * xg_sum + own_scale
    d_shift = learns * g_sum + own_shift

    unit = tl.arange(0, BLOCK_H)
    in_bias = there[:, None] & (unit < H)[None, :]
    at_bias = seed[:, None] * H + unit[None, :]
    db1 = _sum_parts(task_b1_ptr + at_bias, 2 * S * H, in_bias & task[:, None], TASK_SPLITS)
    own_bias = in_bias & own[:, None]
    db1 += of_f[:, None] * _sum_parts(own_b1_ptr + at_bias, 2 * S * H, own_bias, OWN_SPLITS)
    db1 += of_g[:, None] * _sum_parts(own_b1_ptr + S * H + at_bias, 2 * S * H, own_bias, OWN_SPLITS)
    # a DIAGONAL seed has no hidden units
    db1 = tl.where(diagonal[:, None], 0.0, db1)
    tl.store(db1_ptr + at_bias, db1.to(db1_ptr.dtype.element_ty), mask=in_bias)

    for first in range(0, C * H, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = there[:, None] & (e < C * H)[None, :]
        spot = seed[:, None] * (C * H) + e[None, :]
        units = ~diagonal[:, None]
        on_task = inside & awake[:, None] & units
        on_own = inside & own[:, None] & units
        d_in = _sum_parts(task_w1_ptr + spot, 2 * size, on_task & task[:, None], TASK_SPLITS)
        d_in += of_f[:, None] * _sum_parts(own_w1_ptr + spot, 2 * size, on_own, OWN_SPLITS)
        d_in += of_g[:, None] * _sum_parts(own_w1_ptr + size + spot, 2 * size, on_own, OWN_SPLITS)
        tl.store(dw1_ptr + spot, d_in.to(dw1_ptr.dtype.element_ty), mask=inside)
        w_out = tl.load(w2_ptr + spot, mask=on_task | on_own, other=0.0).to(tl.float32)
        hg = _sum_parts(task_w2_ptr + spot, 2 * size, on_task, TASK_SPLITS)
        # weights of hidden units that a seed does not use may hold anything
        dalpha += tl.sum(tl.where(hg != 0, w_out * hg, 0.0), 1)
        hf_own = _sum_parts(own_w2_ptr + spot, 2 * size, on_own, OWN_SPLITS)
        hg_own = _sum_parts(own_w2_ptr + size + spot, 2 * size, on_own, OWN_SPLITS)
        ff += tl.sum(tl.where(hf_own != 0, w_out * hf_own, 0.0), 1)
        fg += tl.sum(tl.where(hg_own != 0, w_out * hg_own, 0.0), 1)
        d_out = learns * hg + of_f[:, None] * hf_own + of_g[:, None] * hg_own
        # rows 0 and 1 of a DIAGONAL seed's W2 are its scale and its shift, stored below
        inside = inside & (units | (e >= 2 * C)[None, :])
        tl.store(dw2_ptr + spot, d_out.to(dw2_ptr.dtype.element_ty), mask=inside)
    flat = in_chunk & diagonal[:, None]
    tl.store(dw2_ptr + at, d_scale.to(dw2_ptr.dtype.element_ty), mask=flat)
    if H > 1:
        tl.store(dw2_ptr + at + C, d_shift.to(dw2_ptr.dtype.element_ty), mask=flat)
    tl.store(dalpha_ptr + seed, dalpha, mask=there)
    left = tl.where(asked, (ff - 2.0 * ratio * fg + total) / tl.where(asked, total, 1.0), 0.0)
    tl.store(explained_ptr + seed, tl.where(own, 1.0 - left, 0.0), mask=there)
