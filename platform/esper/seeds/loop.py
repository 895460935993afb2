"""One awake seed after another in a Python loop: how the legacy layer computes.

The seeds, their state and what a pass measures are those of `KasminaLayer`; the signatures are
those of `esper_kernels`. Gradients come from autograd through slices of the pool, and every seed
that learns alone is fitted by itself, so that nothing here shares code with what it is compared
with but the functions of the hidden units. The loop waits for the device.

Shapes: T = rows, D = channels, S = seeds, C = D / S, H = hidden units of a chunk seed, I and O =
features of a span.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from esper_kernels import PHI, Phi, across
from esper_kernels.learning import ISOLATED, TASK, Objective
from esper_kernels.reference.isolated import target_of
from esper_kernels.reference.statistics import column_statistics, gradient_energy

Pool: TypeAlias = tuple[Tensor, Tensor, Tensor]
# share of its target that one seed leaves unexplained, given its weights
Unexplained: TypeAlias = Callable[[int, Sequence[Tensor], Tensor], Tensor]


def seed_output(
    x_TC: Tensor, w1_CH: Tensor, b1_H: Tensor, w2_HC: Tensor, phi: int, used: int
) -> Tensor:
    """What one chunk seed adds to its chunk before alpha.

    Args:
        x_TC: The chunk, `[..., C]`.
        w1_CH: Incoming weights.
        b1_H: Biases.
        w2_HC: Outgoing weights.
        phi: Code of its function.
        used: Hidden units that it uses; the others have no effect.
    """
    if phi == Phi.DIAGONAL:
        return x_TC * w2_HC[0] + w2_HC[1]
    h: Tensor = PHI[phi](x_TC @ w1_CH + b1_H)
    return h[..., :used] @ w2_HC[:used]


def chunk_seeds(
    x_TD: Tensor, w1_SCH: Tensor, b1_SH: Tensor, w2_SHC: Tensor, alpha_S: Tensor, phi_S: Tensor,
    hidden_S: Tensor, *, learning_S: Tensor, probe: Tensor | None, objective: Objective,
    observe: bool,
) -> Tensor:  # fmt: skip
    """See `esper_kernels.chunk_seeds`."""
    pool = w1_SCH, b1_SH, w2_SHC
    phi, used = phi_S.tolist(), hidden_S.tolist()
    with torch.autocast(x_TD.device.type, enabled=False):
        chunks = list(x_TD.split(w1_SCH.shape[1], dim=1))
        for seed, weights in _awake(pool, alpha_S, learning_S, x_TD.dtype):
            w1, b1, w2 = weights
            x = chunks[seed].to(w1.dtype)
            y = x + alpha_S[seed] * seed_output(x, w1, b1, w2, phi[seed], used[seed])
            chunks[seed] = y.to(x_TD.dtype)
        y_TD = torch.cat(chunks, dim=1)

    def unexplained(seed: int, weights: Sequence[Tensor], dy_TD: Tensor) -> Tensor:
        width = slice(seed * w1_SCH.shape[1], (seed + 1) * w1_SCH.shape[1])
        x, dy = (t[:, width].detach().to(weights[0].dtype) for t in (x_TD, dy_TD))
        w1, b1, w2 = weights
        out = seed_output(x, w1, b1, w2, phi[seed], used[seed])
        return _share(out, target_of(objective, x, dy, (0, 1)))

    return _taught(y_TD, x_TD, pool, learning_S, probe, observe, unexplained)


def span_seeds(
    x_TI: Tensor, z_TO: Tensor, w_in_SI: Tensor, b_S: Tensor, w_out_SO: Tensor, alpha_S: Tensor,
    phi_S: Tensor, *, learning_S: Tensor, probe: Tensor | None, objective: Objective,
    observe: bool,
) -> Tensor:  # fmt: skip
    """See `esper_kernels.span_seeds`."""
    pool = w_in_SI, b_S, w_out_SO
    phi = phi_S.tolist()

    def unit(seed: int, weights: Sequence[Tensor]) -> Tensor:
        # as matrices, which torch counts as operations
        w_in_I1, b, w_out_1O = weights[0].unsqueeze(1), weights[1], weights[2].unsqueeze(0)
        h_T1: Tensor = PHI[phi[seed]](x_TI.to(b.dtype) @ w_in_I1 + b)
        return h_T1 @ w_out_1O

    with torch.autocast(z_TO.device.type, enabled=False):
        y_TO = z_TO
        for seed, weights in _awake(pool, alpha_S, learning_S, z_TO.dtype):
            y_TO = y_TO.to(weights[0].dtype) + alpha_S[seed] * unit(seed, weights)
        y_TO = y_TO.to(z_TO.dtype)

    def unexplained(seed: int, weights: Sequence[Tensor], dy_TO: Tensor) -> Tensor:
        z, dy = (t.detach().to(weights[0].dtype) for t in (z_TO, dy_TO))
        return _share(unit(seed, weights), target_of(objective, z, dy, (0, 1)))

    return _taught(y_TO, z_TO, pool, learning_S, probe, observe, unexplained)


def _awake(
    pool: Pool, alpha_S: Tensor, learning_S: Tensor, dtype: torch.dtype
) -> list[tuple[int, list[Tensor]]]:
    """Every seed whose alpha is not 0, with its weights; without a gradient if it is frozen."""
    wide = torch.promote_types(dtype, torch.float32)
    # cut once: the gradients of all slices are then put together once
    rows = [w.unbind() for w in pool]
    learns = (learning_S == TASK).tolist()
    return [
        (seed, [(w[seed] if learns[seed] else w[seed].detach()).to(wide) for w in rows])
        for seed in alpha_S.nonzero().flatten().tolist()
    ]


def _share(out: Tensor, target: Tensor) -> Tensor:
    """Share of the target's energy that is left; 0 if there is none."""
    total = target.square().sum()
    left = (out - target).square().sum()
    (total,) = across.means(total)
    return torch.where(total > 0, left / torch.where(total > 0, total, 1.0), 0.0)


def _taught(
    y: Tensor,
    site: Tensor,
    pool: Pool,
    learning_S: Tensor,
    probe: Tensor | None,
    observe: bool,
    unexplained: Unexplained,
) -> Tensor:
    """The output in its own memory, whose gradient teaches seeds that learn alone."""
    statistics = column_statistics(site.detach()).view(-1) if observe else None

    def learn(dy: Tensor) -> tuple[Tensor, ...]:
        grads = [torch.zeros_like(w) for w in pool]
        explained_S = torch.zeros(len(learning_S), device=dy.device)
        alone = (learning_S == ISOLATED).nonzero().flatten().tolist()
        for seed in alone:
            wide = torch.promote_types(pool[0].dtype, torch.float32)
            weights = [w[seed].detach().to(wide).requires_grad_() for w in pool]
            with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
                left = unexplained(seed, weights, dy)
                # a constant seed has nothing to learn
                own = torch.autograd.grad(left, weights, allow_unused=True) if (
                    left.requires_grad
                ) else [None] * len(weights)  # fmt: skip
            for grad, mine in zip(grads, own, strict=True):
                if mine is not None:
                    grad[seed] = mine
            explained_S[seed] = 1 - left.detach()
        rows, channels = dy.shape
        counts = explained_S.new_tensor([rows, 1.0] if observe else [0.0, 0.0])
        energy = gradient_energy(dy) if observe else explained_S.new_zeros(channels)
        seen = explained_S.new_zeros(3 * channels) if statistics is None else statistics
        isolated = explained_S.new_tensor([float(bool(alone))])
        return (*grads, torch.cat([seen, energy, explained_S, counts, isolated]))

    taught: Tensor = _Taught.apply(y, *pool, probe, learn)  # type: ignore[no-untyped-call]
    return taught


class _Taught(Function):
    """A copy; its gradient goes on as it came, and to pool and probe what `learn` makes of it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *args: Any) -> Tensor:
        ctx.learn = args[-1]
        return y.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        learned = (dy, *ctx.learn(dy), None)
        wanted = zip(learned, ctx.needs_input_grad, strict=True)
        return tuple(grad if needed else None for grad, needed in wanted)
