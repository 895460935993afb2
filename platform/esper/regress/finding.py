"""What one check of the suite found."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        problems: What does not hold, as sentences; none: passed.
        cases: Comparisons made. A check that made none has failed.
        quantities: What the gates of phases read: name to value and unit.
        notes: Further measurements for the report.
    """

    problems: tuple[str, ...]
    cases: int
    quantities: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def changed_bits(actual: Tensor, expected: Tensor) -> int:
    """Bits that differ between two tensors; all of them if shapes or types differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return 8 * expected.numel() * expected.element_size()
    a, e = (
        t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for t in (actual, expected)
    )
    return int(np.unpackbits(a ^ e).sum())


def capped(problems: list[str], most: int = 8) -> tuple[str, ...]:
    """The first problems and how many more there are."""
    more = len(problems) - most
    return (*problems[:most], *([f"and {more} more"] if more > 0 else []))
