"""How busy the GPU is: the share of its multiprocessors at work, and what NVML calls utilisation.

NVML's own figure is the share of time in which any kernel runs, however small. The share of busy
multiprocessors comes from the GPM counters (Hopper and later).
"""

import threading
import time
from importlib import import_module
from types import TracebackType
from typing import Any

import torch

from esper.environment import nvml_handle

POLL_S = 0.05


class Utilisation:
    """Context manager; afterwards `sm_active_pct` and `nvml_pct` hold percentages.

    A figure that cannot be had is a text that says why, never a number.
    """

    def __init__(self) -> None:
        self.sm_active_pct: float | str = "not available: not measured yet"
        self.nvml_pct: float | str = self.sm_active_pct
        self._stop = threading.Event()
        self._samples: list[int] = []

    def __enter__(self) -> "Utilisation":
        """Take the first sample."""
        self._nvml: Any = None
        self._first: Any = None
        self._why = ""
        try:
            self._open()
        except Exception as error:
            self._why = f"not available: {type(error).__name__}: {str(error)[:120]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the last sample and compare it with the first."""
        if self._nvml is None:
            self.sm_active_pct = self.nvml_pct = self._why
            return
        self._stop.set()
        self._thread.join()
        if self._samples:
            self.nvml_pct = round(sum(self._samples) / len(self._samples), 1)
        else:
            self.nvml_pct = "not available: no sample was taken"
        self.sm_active_pct = self._why or self._compare()

    def _open(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("a CUDA device is needed")
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        self._device = nvml_handle(nvml)
        self._nvml = nvml
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        if not nvml.nvmlGpmQueryDeviceSupport(self._device).isSupportedDevice:
            raise RuntimeError("this GPU has no GPM counters")
        self._first = self._sample()

    def _poll(self) -> None:
        # NVML averages over its last sampling period, which may lie before the loop
        time.sleep(0.5)
        while not self._stop.wait(POLL_S):
            self._samples.append(self._nvml.nvmlDeviceGetUtilizationRates(self._device).gpu)

    def _sample(self) -> Any:
        sample = self._nvml.nvmlGpmSampleAlloc()
        self._nvml.nvmlGpmSampleGet(self._device, sample)
        return sample

    def _compare(self) -> float | str:
        nvml = self._nvml
        try:
            request = nvml.c_nvmlGpmMetricsGet_t()
            request.version = nvml.NVML_GPM_METRICS_GET_VERSION
            request.numMetrics = 1
            request.sample1, request.sample2 = self._first, self._sample()
            request.metrics[0].metricId = nvml.NVML_GPM_METRIC_SM_UTIL
            nvml.nvmlGpmMetricsGet(request)
            metric = request.metrics[0]
        except Exception as error:
            return f"not available: {type(error).__name__}: {str(error)[:120]}"
        if metric.nvmlReturn:
            return f"not available: the counter gave error {metric.nvmlReturn}"
        return round(float(metric.value), 1)
