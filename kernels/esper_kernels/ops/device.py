"""What a launch must know of the device that it runs on."""

from functools import cache

import torch
import triton.language as tl

from esper_kernels.ops.dispatch import INTERPRET

_DOT_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """In which activations of a dtype are multiplied.

    Under the interpreter fp32, since it would compute 16-bit products in 16 bits.
    """
    return tl.float32 if INTERPRET else _DOT_DTYPES[dtype]


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; 1 for the CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
