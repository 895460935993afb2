# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the device can do at most, measured in the same run: copy, read, matrix product."""

from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper_kernels.timing import Times, num_sets, time_cold, time_replayed

MATMUL_SIZE = 8192
READ_CONFIGS = [(4, 4096), (8, 2048), (8, 4096), (16, 2048)]  # programs a multiprocessor, block


@triton.jit
def _read_kernel(x_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    step = tl.num_programs(0) * BLOCK
    for start in tl.range(tl.program_id(0) * BLOCK, num_elements, step, num_stages=4):
        mask = start + offsets < num_elements
        total += tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def read(x: Tensor, programs_per_multiprocessor: int, block: int) -> Tensor:
    """Read every element once and write almost nothing: partial sums, one a program."""
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    out = torch.empty(num_sms * programs_per_multiprocessor, device=x.device)
    _read_kernel[(len(out),)](x, out, x.numel(), BLOCK=block, num_warps=8)
    return out


class Ceilings:
    """The device's limits for one shape after the other; each is measured once.

    Attributes:
        device: Where everything runs.
        quick: Whether to spend less time on each.
    """

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device = device
        self.budget_s = 0.05 if quick else 0.15
        self.copy = cache(self._copy)
        self.read = cache(self._read)
        self.flops_per_s = cache(self._flops_per_s)

    def _copy(self, T: int, D: int, dtype: torch.dtype) -> tuple[Times, Times]:
        """Device-to-device copy of `[T, D]`: cold and graph-replayed."""
        sources = self._sets(T, D, dtype)
        pairs = [(torch.empty_like(x), x) for x in sources]
        calls = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
        return time_cold(calls, self.budget_s), time_replayed(calls, self.budget_s)

    def _read(self, T: int, D: int, dtype: torch.dtype) -> tuple[Times, Times]:
        """Read-only reduction of `[T, D]`: the fastest of a few configurations."""
        sets = self._sets(T, D, dtype)
        if self.device.type != "cuda":
            calls = [lambda x=x: x.sum() for x in sets]
            return time_cold(calls), time_replayed(calls)
        best: tuple[Times, Times] | None = None
        for programs, block in READ_CONFIGS:
            calls = [partial(read, x, programs, block) for x in sets]
            cold = time_cold(calls, self.budget_s / 2)
            if best is None or cold.p50 < best[0].p50:
                best = cold, time_replayed(calls, self.budget_s / 2)
        assert best is not None
        return best

    def _flops_per_s(self, dtype: torch.dtype) -> float:
        """Matrix product of random data through the library."""
        n = MATMUL_SIZE if self.device.type == "cuda" else 32
        pairs = [torch.randn(2, n, n, device=self.device, dtype=dtype) for _ in range(2)]
        calls = [lambda pair=pair: pair[0] @ pair[1] for pair in pairs]
        return 2 * n**3 / (time_cold(calls, self.budget_s).p50 * 1e-6)

    def _sets(self, T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
        number = num_sets(2 * T * D * dtype.itemsize)
        return [torch.randn(T, D, device=self.device, dtype=dtype) for _ in range(number)]

    def floor(
        self, bytes_: int, flops: int, T: int, D: int, dtype: torch.dtype, replayed: bool
    ) -> tuple[float, str]:
        """The shortest possible time in microseconds, and what binds: `bytes` or `flops`.

        The bytes are charged at the speed of a copy of `[T, D]`, timed in the same way.
        """
        copy_us = self.copy(T, D, dtype)[replayed].p50
        by_bytes = copy_us * bytes_ / (2 * T * D * dtype.itemsize)
        by_flops = flops / self.flops_per_s(dtype) * 1e6
        return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")

    def as_json(self) -> dict[str, float]:
        """The limits at large sizes, and the drift of the copy over the run."""
        main = (16384, 4096, torch.bfloat16) if self.device.type == "cuda" else (8, 16, torch.float)
        before, after = self.copy(*main)[0].p50, self._copy(*main)[0].p50
        rate = 2 * main[0] * main[1] * main[2].itemsize / 1e6
        return {
            "copy_us": before,
            "copy_tb_per_s": round(rate / before, 3),
            "copy_again_us": after,
            "read_us": self.read(*main)[0].p50,
            "read_tb_per_s": round(rate / 2 / self.read(*main)[0].p50, 3),
            "matmul_tflop_per_s": round(self.flops_per_s(main[2]) / 1e12, 1),
        }
