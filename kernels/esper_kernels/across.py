"""Batches whose rows are spread over processes, of which each computes its own.

A seed that learns alone has an objective that is a quotient of sums over the rows, whose target is
scaled by two of them. Those two must be of the whole batch on every process before the gradients
are made, so that the mean of the processes' gradients is the gradient of the whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# the mean over all processes; not local to a thread, since autograd has threads of its own
_mean: Callable[[Tensor], Tensor] | None = None


@contextmanager
def processes(mean: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """While this lasts, backward passes ask the other processes for their sums.

    Args:
        mean: Replaces a tensor by its mean over all processes, each with as many rows; None: there
            are no others. Every process must run the same passes.
    """
    global _mean
    before, _mean = _mean, mean
    try:
        yield
    finally:
        _mean = before


def is_spread() -> bool:
    """Whether there are others."""
    return _mean is not None


def means(*sums: Tensor) -> tuple[Tensor, ...]:
    """Sums over the rows, of one shape, each replaced by its mean over the processes."""
    if _mean is None:
        return sums
    return tuple(_mean(torch.stack(sums)))
