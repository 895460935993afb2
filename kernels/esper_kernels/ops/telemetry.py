"""What a backward pass measured, put into the layout of the probe in one launch.

See `esper_kernels.probe` for the layout. D = channels, S = seeds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels import learning as codes
from esper_kernels.probe import probe_size

_ISOLATED = tl.constexpr(codes.ISOLATED)
BLOCK = 1024


@triton.jit
def _pack_kernel(
    stats_ptr, grad_sq_ptr, explained_ptr, learning_ptr, told_ptr, T, D, S,
    OBSERVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    i = first + tl.arange(0, BLOCK)
    at_seed, at_count = i - 4 * D, i - 4 * D - S
    is_seed = (at_seed >= 0) & (at_seed < S)
    value = tl.load(explained_ptr + at_seed, mask=is_seed, other=0.0)
    if OBSERVE:
        value += tl.load(stats_ptr + i, mask=i < 3 * D, other=0.0)
        is_energy = (i >= 3 * D) & (i < 4 * D)
        value += T * tl.load(grad_sq_ptr + i - 3 * D, mask=is_energy, other=0.0)
        value = tl.where(at_count == 0, T * 1.0, tl.where(at_count == 1, 1.0, value))
    if first + BLOCK > 4 * D + S + 2:
        alone = tl.zeros([BLOCK], tl.int32)
        for start in range(0, S, BLOCK):
            seed = start + tl.arange(0, BLOCK)
            learning = tl.load(learning_ptr + seed, mask=seed < S, other=0)
            alone = tl.maximum(alone, (learning == _ISOLATED).to(tl.int32))
        value = tl.where(at_count == 2, tl.max(alone).to(tl.float32), value)
    tl.store(told_ptr + i, value, mask=at_count < 3)


def pack(
    stats: Tensor,
    grad_sq: Tensor,
    explained_S: Tensor,
    learning_S: Tensor,
    rows: int,
    channels: int,
) -> Tensor:
    """The telemetry of one pass, `[probe_size(D, S)]` fp32.

    Args:
        stats: Sum, sum of squares and dead count of each channel, `[3, D]`; `[3, 0]` if the pass
            was not observed.
        grad_sq: Sum of squares of the gradient of each channel, `[D]`, or `[0]`.
        explained_S: Explained share of each seed's isolated target, 0 for the others.
        learning_S: What each seed learns.
        rows: Rows of the pass.
        channels: D.
    """
    S = len(explained_S)
    told = torch.empty(probe_size(channels, S), device=explained_S.device, dtype=torch.float32)
    _pack_kernel[(triton.cdiv(len(told), BLOCK),)](
        stats, grad_sq, explained_S, learning_S, told, rows, channels, S,
        OBSERVE=grad_sq.numel() > 0, BLOCK=BLOCK,
    )  # fmt: skip
    return told
