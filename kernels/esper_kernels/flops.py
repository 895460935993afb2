"""Floating point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

Only the seeds that compute are counted, and only matrix products, as the counter does for all
of PyTorch. What the backward pass computes a second time to save memory does not count.

Shapes: T = rows, C = channels of a chunk, H = hidden units, I and O = features of a span,
S = seeds.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from esper_kernels import library as _library  # noqa: F401 (defines the operators)
from esper_kernels.learning import ISOLATED


def _count(mask_S: Tensor) -> int:
    """Seeds that a mask selects; all where there is no data to look at."""
    blind = isinstance(mask_S, FakeTensor) or mask_S.is_meta
    return len(mask_S) if blind else int(mask_S.count_nonzero())


@register_flop_formula(torch.ops.esper.chunk_seeds, get_raw=True)
def _chunk(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, *_: Any, **__: Any) -> int:
    C, H = w1.shape[1:]
    return 4 * len(x) * C * H * _count(alpha)


@register_flop_formula(torch.ops.esper.chunk_seeds_backward, get_raw=True)
def _chunk_backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, phi: Tensor,
    hidden: Tensor, learning: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    C, H = w1.shape[1:]
    product = 2 * len(x) * C * H
    awake = 4 if x.requires_grad else 3
    # a seed that learns alone also computes its output here, and passes no gradient on
    return product * (awake * _count(alpha) + (2 + 3) * _count(learning == ISOLATED))


@register_flop_formula(torch.ops.esper.span_seeds, get_raw=True)
def _span(
    x: Tensor, z: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor, alpha: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * len(x) * (x.shape[1] + z.shape[1]) * _count(alpha)


@register_flop_formula(torch.ops.esper.span_seeds_backward, get_raw=True)
def _span_backward(
    dy: Tensor, x: Tensor, z: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor, alpha: Tensor,
    phi: Tensor, learning: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    T, I, O = len(x), x.shape[1], dy.shape[1]  # noqa: E741 (the legend's names)
    awake = 2 * T * ((2 if x.requires_grad else 1) * I + 2 * O)
    return awake * _count(alpha) + 4 * T * (I + O) * _count(learning == ISOLATED)
