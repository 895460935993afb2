"""Signs of a host's health: its gradients, and how far its weights move.

Where parameters are sharded every process must ask.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from esper.seeds.local_rows import is_distributed, whole

# weights of each host tensor that the drift is measured on
DRIFT_SAMPLES = 4096


def grad_norm(params: Iterable[nn.Parameter]) -> float | None:
    """Norm of all gradients together; None if there is none."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return None
    # the norm of norms is that of all; a sharded one is summed over the processes by itself
    norms = [whole(torch.linalg.vector_norm(g)) if is_distributed(g) else g for g in grads]
    return float(nn.utils.get_total_norm(norms))


def grad_rms(params: Iterable[nn.Parameter]) -> float:
    """Root mean square of all gradients together; NaN if there is none."""
    grads = [p.grad.float() for p in params if p.grad is not None]
    size = sum(g.numel() for g in grads)
    # of a sharded one each process sums its part
    squares = sum(float(whole(g.square().sum())) for g in grads)
    return math.sqrt(squares / size) if size else math.nan


class Drift:
    """How far weights move from one call to the next, on evenly spaced ones of each tensor."""

    def __init__(self) -> None:
        self._before: list[Tensor] | None = None

    def measure(self, params: Iterable[nn.Parameter]) -> float | None:
        """Relative change since the last call; None at the first."""
        now = [
            whole(p.detach()).reshape(-1)[:: max(1, p.numel() // DRIFT_SAMPLES)].clone()
            for p in params
        ]
        before, self._before = self._before, now
        if before is None:
            return None
        # the model may have been moved to another device or dtype since
        before = [b.to(a) for a, b in zip(now, before, strict=True)]
        moved = sum(float((a - b).square().sum()) for a, b in zip(now, before, strict=True))
        size = sum(float(b.square().sum()) for b in before)
        return math.sqrt(moved / size) if size else None

    def forget(self) -> None:
        """Let the next call be the first."""
        self._before = None
