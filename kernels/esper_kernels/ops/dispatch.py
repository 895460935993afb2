"""Which implementation runs: Triton on a GPU, plain PyTorch elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

# under the interpreter, kernels run on the CPU; only tests ask for that
INTERPRET: bool = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced = False


@contextmanager
def force_triton() -> Iterator[None]:
    """Run the kernels also on CPU tensors; needs TRITON_INTERPRET=1 before triton is imported."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def use_triton(x: Tensor) -> bool:
    """True if the kernels serve this tensor; the plain implementation serves every other."""
    return (x.is_cuda or _forced) and x.dtype in DTYPES
