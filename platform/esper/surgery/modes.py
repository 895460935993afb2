"""Evaluation for a while, and then every module in the mode that it was in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while this lasts."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # each its own: a host may keep some of its modules in eval mode while it trains
        for module, mode in modes:
            module.training = mode
