"""A workload that never changes: how fast a machine is just now."""

import statistics
import time

import torch
from torch import Tensor

from esper_kernels.timing import synchronize

SIZE = {"cpu": 384, "cuda": 4096}
# products a request: as long as a slow request, or the scheduler's slices would go unseen
PRODUCTS = 20
# requests before a trial, and as many after it
TRIAL_REQUESTS = 5


def reference_s(device: str, requests: int) -> list[float]:
    """Seconds of each request, after one to warm up.

    Args:
        device: 'cpu' or 'cuda', also of one GPU.
        requests: How many.
    """
    kind = torch.device(device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    x = torch.ones(SIZE[kind], SIZE[kind], device=device, dtype=dtype)
    return [_request_s(x) for _ in range(1 + requests)][1:]


def _request_s(x: Tensor) -> float:
    started = time.perf_counter()
    for _ in range(PRODUCTS):
        x.matmul(x)
    synchronize()
    return time.perf_counter() - started


def median_ms(seconds: list[float]) -> float:
    """The median, in milliseconds."""
    return 1e3 * statistics.median(seconds)
