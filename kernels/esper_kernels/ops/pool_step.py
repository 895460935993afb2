"""One optimizer step of a site's pool in one launch: all three tensors, all seeds, all books.

A program owns some columns of some seeds. It looks at their flags first: where no seed trains or
begins again, it has nothing else to read. Rows of the other seeds in a tile are masked, so their
weights, gradients and moments are not touched either.

The flags are read by every program of a seed and written by the last one that arrives, which an
integer counter tells. Narrow seeds have one program each, and need no counter.

Shapes: S = seeds, n = the seeds whose weights this process holds, N = elements of one seed in one
tensor; a tile has BLOCK_S seeds and BLOCK_N elements of each.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.ops.dispatch import use_triton
from esper_kernels.reference import pool_step as reference
from esper_kernels.reference.pool_step import PoolTensor, Ramp, Rule, SeedFlags

# elements of a tile: 4 warps with one vector of 16 bytes a thread for narrow seeds, two for wide
NARROW_TILE = 512
WIDE_TILE = 1024


@torch.no_grad()
def pool_step(
    pool: tuple[PoolTensor, PoolTensor, PoolTensor],
    flags: SeedFlags,
    ramp: Ramp,
    rule: Rule,
    first_row: int = 0,
) -> None:
    """Step one site's pool in place, by AdamW or SGD, and move its grafts on.

    Nothing is read back from the device, and no data decides what is launched: the step can be
    captured in a CUDA graph, and a later replay follows the flags as they are then. fp32 pools on
    a GPU take the kernel; pools on the CPU, and fp64 ones, the plain implementation.

    Args:
        pool: Incoming weights, biases, outgoing weights.
        flags: What to do with each seed.
        ramp: The grafts.
        rule: How weights move.
        first_row: Seed of the first row of the weights, where they are a shard of the pool.
    """
    weights = pool[0].weights
    rule = rule._replace(lr=_on(weights.device, rule.lr))
    if use_triton(weights) and weights.dtype == torch.float32:
        launch(pool, flags, ramp, rule, first_row)
    else:
        reference.pool_step(pool, flags, ramp, rule, first_row)


def launch(
    pool: tuple[PoolTensor, PoolTensor, PoolTensor],
    flags: SeedFlags,
    ramp: Ramp,
    rule: Rule,
    first_row: int = 0,
) -> None:
    """The kernel; arguments as for `pool_step`, all tensors, also the rate, on one GPU."""
    S, rows = len(flags.trainable), len(pool[0].weights)
    # a shard may be empty
    sizes = [t.weights[0].numel() if rows else 0 for t in pool]
    blocks = [min(triton.next_power_of_2(max(n, 1)), WIDE_TILE) for n in sizes]
    block_s = max(1, NARROW_TILE // max(blocks))
    num_blocks = triton.cdiv(max(max(sizes), 1), max(blocks))
    beta1, beta2 = rule.betas
    grads = [None if t.grad is None else t.grad.contiguous() for t in pool]
    dummy = flags.steps
    _pool_step_kernel[(triton.cdiv(S, block_s), num_blocks)](
        *_pointers(pool[0], grads[0], dummy),
        *_pointers(pool[1], grads[1], dummy),
        *_pointers(pool[2], grads[2], dummy),
        flags.trainable, flags.fresh, flags.lr_scale, flags.steps, flags.arrivals,
        ramp.ramping, ramp.pace, ramp.cosine, ramp.ramped_steps, ramp.progress, ramp.alpha,
        rule.lr,
        beta1, 1 - beta1, _log(beta1), beta2, 1 - beta2, _log(beta2),
        rule.eps, rule.decay, rule.momentum, float(ramp.ramp_steps),
        S, first_row, first_row + rows,
        *sizes, *(g is not None for g in grads),
        ADAM=rule.adam, MOMENTUM=pool[0].first is not None, DECOUPLED=rule.decoupled,
        LR_ON_DEVICE=isinstance(rule.lr, Tensor),
        BLOCK_S=block_s, BLOCK_IN=blocks[0], BLOCK_BIAS=blocks[1], BLOCK_OUT=blocks[2],
        NUM_BLOCKS=num_blocks,
    )  # fmt: skip


def _pointers(tensor: PoolTensor, grad: Tensor | None, dummy: Tensor) -> list[Tensor]:
    for t in (tensor.weights, tensor.first, tensor.second):
        assert t is None or t.is_contiguous()
    every = (tensor.weights, grad, tensor.first, tensor.second, tensor.age)
    return [dummy if t is None else t for t in every]


def _on(device: torch.device, lr: float | Tensor) -> float | Tensor:
    # a number kept on the CPU is read there, without waiting for the GPU
    return float(lr) if isinstance(lr, Tensor) and lr.device != device else lr


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


# a shard's rows and the rate of a schedule must not compile the kernel anew
@triton.jit(do_not_specialize=["lr", "S", "first_row", "end_row"])
def _pool_step_kernel(
    w_in, g_in, m_in, v_in, age_in,
    w_bias, g_bias, m_bias, v_bias, age_bias,
    w_out, g_out, m_out, v_out, age_out,
    trainable_S, fresh_3S, lr_scale_S, steps, arrivals_S,
    ramping_S, pace_S, cosine_S, ramped_steps_S, progress_S, alpha_S,
    lr, beta1, rest1, log1, beta2, rest2, log2, eps, decay, momentum, ramp_steps,
    S, first_row, end_row,
    N_IN: tl.constexpr, N_BIAS: tl.constexpr, N_OUT: tl.constexpr,
    GRAD_IN: tl.constexpr, GRAD_BIAS: tl.constexpr, GRAD_OUT: tl.constexpr,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, DECOUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    seeds = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    known = seeds < S
    trains = tl.load(trainable_S + seeds, mask=known, other=0) != 0
    fresh_in = tl.load(fresh_3S + seeds, mask=known, other=0) != 0
    fresh_bias = tl.load(fresh_3S + S + seeds, mask=known, other=0) != 0
    fresh_out = tl.load(fresh_3S + 2 * S + seeds, mask=known, other=0) != 0
    ramps = tl.load(ramping_S + seeds, mask=known, other=0.0) > 0
    if tile + block == 0:
        tl.store(steps, tl.load(steps) + 1)
    stirs = trains | fresh_in | fresh_bias | fresh_out | ramps
    if tl.max(stirs.to(tl.int32), axis=0) > 0:
        rate = tl.load(lr_scale_S + seeds, mask=trains, other=0.0)
        if LR_ON_DEVICE:
            rate *= tl.load(lr).to(tl.float32)
        else:
            rate *= lr
        row = (seeds - first_row).to(tl.int64)
        here = known & (seeds >= first_row) & (seeds < end_row)
        new_in = _new_age(age_in, seeds, known, trains, fresh_in, GRAD_IN, ADAM)
        new_bias = _new_age(age_bias, seeds, known, trains, fresh_bias, GRAD_BIAS, ADAM)
        new_out = _new_age(age_out, seeds, known, trains, fresh_out, GRAD_OUT, ADAM)
        _step_tile(
            w_in, g_in, m_in, v_in, row, here, trains, fresh_in, new_in, rate, block,
            beta1, rest1, log1, beta2, rest2, log2, eps, decay, momentum,
            N_IN, GRAD_IN, ADAM, MOMENTUM, DECOUPLED, BLOCK_IN,
        )  # fmt: skip
        _step_tile(
            w_bias, g_bias, m_bias, v_bias, row, here, trains, fresh_bias, new_bias, rate, block,
            beta1, rest1, log1, beta2, rest2, log2, eps, decay, momentum,
            N_BIAS, GRAD_BIAS, ADAM, MOMENTUM, DECOUPLED, BLOCK_BIAS,
        )  # fmt: skip
        _step_tile(
            w_out, g_out, m_out, v_out, row, here, trains, fresh_out, new_out, rate, block,
            beta1, rest1, log1, beta2, rest2, log2, eps, decay, momentum,
            N_OUT, GRAD_OUT, ADAM, MOMENTUM, DECOUPLED, BLOCK_OUT,
        )  # fmt: skip
        # every warp has read the flags before one of them writes
        tl.debug_barrier()
        last = True
        if NUM_BLOCKS > 1:
            last = tl.atomic_add(arrivals_S + tile, 1) == NUM_BLOCKS - 1
        if last:
            if NUM_BLOCKS > 1:
                tl.store(arrivals_S + tile, 0)
            if ADAM:
                tl.store(age_in + seeds, new_in, mask=known)
                tl.store(age_bias + seeds, new_bias, mask=known)
                tl.store(age_out + seeds, new_out, mask=known)
            nothing = tl.zeros([BLOCK_S], tl.int1)
            tl.store(fresh_3S + seeds, nothing, mask=known)
            tl.store(fresh_3S + S + seeds, nothing, mask=known)
            tl.store(fresh_3S + 2 * S + seeds, nothing, mask=known)
            _move_grafts(
                pace_S, cosine_S, ramped_steps_S, progress_S, alpha_S, seeds, ramps, ramp_steps
            )


@triton.jit
def _new_age(age_S, seeds, known, trains, fresh, HAS_GRAD: tl.constexpr, ADAM: tl.constexpr):
    if ADAM:
        age = tl.where(fresh, 0.0, tl.load(age_S + seeds, mask=known, other=0.0))
        if HAS_GRAD:
            age += trains.to(tl.float32)
        return age
    return tl.zeros_like(seeds).to(tl.float32)


@triton.jit
def _step_tile(
    weights, grads, first, second, row, here, trains, fresh, age, rate, block,
    beta1, rest1, log1, beta2, rest2, log2, eps, decay, momentum,
    N: tl.constexpr, HAS_GRAD: tl.constexpr, ADAM: tl.constexpr, MOMENTUM: tl.constexpr,
    DECOUPLED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The formulas of the reference for BLOCK_N elements of each seed of the tile."""
    if block * BLOCK_N < N:
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at = row[:, None] * N + column[None, :]
        mine = here[:, None] & (column < N)[None, :]
        moving = mine & trains[:, None]
        # the moments of a fresh seed are not read at all, since they may hold anything
        lasting = moving & (fresh == 0)[:, None]
        written = mine & (trains | fresh)[:, None]
        if HAS_GRAD:
            w = tl.load(weights + at, mask=moving, other=0.0)
            g = tl.load(grads + at, mask=moving, other=0.0)
            if DECOUPLED:
                w *= (1.0 - rate * decay)[:, None]
            else:
                g += decay * w
            if ADAM:
                m = beta1 * tl.load(first + at, mask=lasting, other=0.0) + rest1 * g
                v = beta2 * tl.load(second + at, mask=lasting, other=0.0) + rest2 * g * g
                t = tl.maximum(age, 1.0)
                size = rate / _debias(t, log1)
                spread = tl.sqrt(v) / tl.sqrt(_debias(t, log2))[:, None] + eps
                w -= size[:, None] * (m / spread)
                tl.store(second + at, v, mask=written)
                tl.store(first + at, m, mask=written)
            elif MOMENTUM:
                m = momentum * tl.load(first + at, mask=lasting, other=0.0) + g
                w -= rate[:, None] * m
                tl.store(first + at, m, mask=written)
            else:
                w -= rate[:, None] * g
            tl.store(weights + at, w, mask=moving)
        else:
            restarted = mine & fresh[:, None]
            nothing = tl.zeros([row.shape[0], BLOCK_N], tl.float32)
            if MOMENTUM:
                tl.store(first + at, nothing, mask=restarted)
            if ADAM:
                tl.store(second + at, nothing, mask=restarted)


@triton.jit
def _debias(age, log_beta):
    """`1 - beta^age`; in fp64, since at first little is left of the 1."""
    power = tl.exp(age.to(tl.float64) * log_beta)
    return (1.0 - power).to(tl.float32)


@triton.jit
def _move_grafts(pace_S, cosine_S, ramped_steps_S, progress_S, alpha_S, seeds, ramps, ramp_steps):
    """As `move_grafts` of the reference."""
    steps = tl.load(ramped_steps_S + seeds, mask=ramps, other=0.0)
    steps += tl.load(pace_S + seeds, mask=ramps, other=0.0)
    progress = tl.minimum(tl.div_rn(steps, tl.zeros_like(steps) + ramp_steps), 1.0)
    eased = (1.0 - tl.cos(3.141592653589793 * progress)) / 2.0
    # the ends are exact, whatever the device makes of the cosine
    eased = tl.where(progress >= 1.0, 1.0, eased)
    alpha = tl.where(tl.load(cosine_S + seeds, mask=ramps, other=0) != 0, eased, progress)
    tl.store(ramped_steps_S + seeds, steps, mask=ramps)
    tl.store(progress_S + seeds, progress, mask=ramps)
    tl.store(alpha_S + seeds, alpha, mask=ramps)
