"""Fine chunk seeds: all seeds of a site in one launch, packed into tiles for the tensor cores.

What is read from memory is x (and dy), what is written y (or dx); weights stay on the chip.
Sums over rows (weight gradients, statistics) are kept in registers over a program's whole walk.

A value that is not finite in a row of x may spread to the awake seeds of the same tile and row.

Shapes: T = rows, D = channels, S = seeds, C = D / S, H = hidden units of a seed.
"""

from dataclasses import replace
from functools import cache, partial

import torch
import triton
from torch import Tensor

from esper_kernels import across
from esper_kernels.learning import RECONSTRUCTION, TARGET_FRAC
from esper_kernels.ops.chunk_backward import backward_kernel
from esper_kernels.ops.chunk_finish import finish_kernel
from esper_kernels.ops.chunk_forward import forward_kernel
from esper_kernels.ops.chunk_isolated import isolated_kernel
from esper_kernels.ops.statistics import sum_rows
from esper_kernels.ops.tiles import Tiling, launch_of, width_of, within_memory
from esper_kernels.support import power_of_2

# the fastest that were measured on an H200; FORWARD for chunks of at least as many channels as
# hidden units
FORWARD = Tiling(32, True, block_t=64, warps=4, stages=4, registers=255, per_sm=2)
BACKWARD = Tiling(64, False, block_t=64, warps=4, stages=4, registers=255, per_sm=2)
ISOLATED = Tiling(64, False, block_t=32, warps=4, stages=2, registers=255, per_sm=2)


@cache
def forward_tiling(C: int, H: int, dtype: torch.dtype) -> Tiling:
    """How to pack chunks of that size for the forward pass."""
    if H <= C <= FORWARD.width:
        return within_memory(FORWARD, C, H, dtype, streams=1)
    width = width_of(C, H, 64)
    rows = 128 if width <= 32 else 64
    tiling = replace(FORWARD, width=width, pair=False, block_t=rows, stages=4)
    return within_memory(tiling, C, H, dtype, streams=1)


@cache
def backward_tiling(C: int, H: int, dtype: torch.dtype) -> Tiling:
    """As `forward_tiling`, for the backward pass."""
    return within_memory(replace(BACKWARD, width=width_of(C, H, 64)), C, H, dtype, streams=2)


@cache
def isolated_tiling(C: int, H: int, dtype: torch.dtype) -> Tiling:
    """As `forward_tiling`, for isolated training."""
    return within_memory(replace(ISOLATED, width=width_of(C, H, 64)), C, H, dtype, streams=2)


def forward(
    x_TD: Tensor, w1_SCH: Tensor, b1_SH: Tensor, w2_SHC: Tensor,
    alpha_S: Tensor, phi_S: Tensor, hidden_S: Tensor, observe: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`y = x + alpha * phi(x W1 + b1) W2` of all seeds, with statistics of x in the same pass.

    Args:
        x_TD: fp32, bf16 or fp16, contiguous; others as for `esper_kernels.chunk_seeds`.
        w1_SCH: See there; so also the rest.
        b1_SH: See there.
        w2_SHC: See there.
        alpha_S: See there.
        phi_S: See there.
        hidden_S: See there.
        observe: Whether to gather the statistics.

    Returns:
        y, and per channel of x the sum, the sum of squares and the count of |x| < 1e-6,
        `[3, D]` fp32 (`[3, 0]` if not observed).
    """
    (T, D), (S, C, H) = x_TD.shape, w1_SCH.shape
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    dtype, device = x_TD.dtype, x_TD.device
    launch = launch_of(T, dtype, device, S, C, H, forward_tiling(C, H, dtype))
    splits = launch.grid[1]
    stats = torch.empty(splits, 3, D if observe else 0, device=x_TD.device, dtype=torch.float32)
    if T == 0:
        return y_TD, stats.zero_().sum(0)
    forward_kernel[launch.grid](
        x_TD, y_TD, w1_SCH, b1_SH, w2_SHC, alpha_S, phi_S, hidden_S, stats, T, D, S,
        OBSERVE=observe, PAIR=launch.pair, **launch.meta, **launch.options,
    )  # fmt: skip
    return y_TD, stats[0] if splits == 1 else sum_rows(stats)


def backward(
    dy_TD: Tensor, x_TD: Tensor, w1_SCH: Tensor, b1_SH: Tensor, w2_SHC: Tensor,
    alpha_S: Tensor, phi_S: Tensor, hidden_S: Tensor, learning_S: Tensor,
    objective: int, observe: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the task for awake seeds and of the isolated objective for training ones.

    Args:
        dy_TD: Gradient at y; dtype and shape of x.
        x_TD: What `forward` was given; so also the rest.
        w1_SCH: See `forward`.
        b1_SH: See `forward`.
        w2_SHC: See `forward`.
        alpha_S: See `forward`.
        phi_S: See `forward`.
        hidden_S: See `forward`.
        learning_S: What each seed learns (`esper_kernels.learning`), `[S]`, int32.
        objective: Its place in `esper_kernels.learning.OBJECTIVES`.
        observe: Whether to gather the squares of the gradient.

    Returns:
        dx, dW1, db1, dW2, dalpha, the sum of dy^2 per channel (`[0]` if not observed), and the
        share of its target that each training seed explains (0 for the others).
    """
    (T, D), (S, C, H) = x_TD.shape, w1_SCH.shape
    dy_TD, x_TD = dy_TD.contiguous(), x_TD.contiguous()
    weights = (w1_SCH, b1_SH, w2_SHC)
    dx_TD = torch.empty_like(x_TD)
    grads = [torch.empty_like(w) for w in weights]
    empty = partial(torch.empty, device=x_TD.device, dtype=torch.float32)
    dalpha, explained = empty(2, S)
    grad_sq = empty(D if observe else 0)
    if T == 0:
        zeros = (t.zero_() for t in (*grads, dalpha, grad_sq, explained))
        return dx_TD, *zeros
    shape = T, x_TD.dtype, x_TD.device, S, C, H
    task = launch_of(*shape, backward_tiling(C, H, x_TD.dtype))
    own = launch_of(*shape, isolated_tiling(C, H, x_TD.dtype))
    sizes = (2 * S * C * H, 2 * S * H, 2 * S * C * H, 5 * D)
    task_parts = [empty(task.grid[1], n) for n in sizes]
    own_parts = [empty(own.grid[1], n) for n in sizes]
    backward_kernel[task.grid](
        dy_TD, x_TD, dx_TD, *weights, alpha_S, phi_S, hidden_S, *task_parts, T, D, S,
        OBSERVE=observe, **task.meta, **task.options,
    )  # fmt: skip
    reconstruct = objective == RECONSTRUCTION
    isolated_kernel[own.grid](
        x_TD if reconstruct else dy_TD, x_TD, *weights, phi_S, hidden_S, learning_S,
        *own_parts, T, D, S, **own.meta, **own.options,
    )  # fmt: skip
    # the kernel sums up what is here; what other processes have comes to it ready
    given = across.is_spread()
    energies = explained
    if given:
        sums = own_parts[3].view(-1, 5, S, C).sum((0, 3))
        energies = torch.stack(across.means(sums[1], sums[3]))
    block = min(4096, power_of_2(C * H))
    # few seeds a program: its sums are a chain of loads, which many programs hide
    seeds_at_once = max(1, min(power_of_2(S), 256 // max(block, power_of_2(C), power_of_2(H))))
    finish_kernel[(triton.cdiv(S, seeds_at_once),)](
        *task_parts, *own_parts, w2_SHC, alpha_S, phi_S, learning_S, *grads, dalpha,
        grad_sq, explained, energies, T, S, D, C=C, H=H, G=seeds_at_once, BLOCK_C=power_of_2(C),
        BLOCK_H=power_of_2(H), BLOCK=block, TASK_SPLITS=task.grid[1], OWN_SPLITS=own.grid[1],
        OBSERVE=observe, RECONSTRUCT=reconstruct, TARGET_FRAC=TARGET_FRAC, GIVEN=given,
    )  # fmt: skip
    return dx_TD, *grads, dalpha, grad_sq, explained
