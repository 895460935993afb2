"""How GPU work is timed here: cold caches, device events, graph replays, counted launches.

A function is timed as a list of calls over different input sets, together larger than three times
the L2 cache, so that no call finds its inputs there. Outputs are kept alive for a whole rotation,
so that they rotate as well. Without a GPU everything runs on the CPU's clock: good for a smoke
test of a benchmark, and for nothing else.
"""

import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import triton

Call = Callable[[], object]

SCHEMA = 1
L2_MULTIPLE = 3
MAX_SETS = 400
# a graph runs at least this long, so that its own launch does not count
GRAPH_S = 2e-3
# the device waits at most this long for the host to queue a batch of calls
MAX_LEAD_S = 0.02
BATCH = 32
MIN_REPEATS = 3
# how long calls from Python are timed
PYTHON_S = 0.5
# of the clock that `torch.cuda._sleep` counts; too high only means a longer wait
CLOCK_HZ = 2e9


@dataclass(frozen=True)
class Times:
    """Quantiles of one call's time in microseconds, and how many samples they come from."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Times":
        """Quantiles of samples in microseconds; at least one sample."""
        if len(samples_us) == 1:
            return cls(samples_us[0], samples_us[0], samples_us[0], 1)
        fifths = quantiles(samples_us, n=10, method="inclusive")
        return cls(fifths[1], fifths[4], fifths[7], len(samples_us))

    def as_row(self) -> dict[str, float]:
        """Rounded to a hundredth of a microsecond, for JSON."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


def num_sets(bytes_of_one: int) -> int:
    """How many input sets a rotation needs so that a call's inputs have left the L2 cache."""
    if not torch.cuda.is_available():
        return 2
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    return min(MAX_SETS, max(2, math.ceil(L2_MULTIPLE * l2_bytes / max(1, bytes_of_one)) + 1))


def time_cold(calls: Sequence[Call], budget_s: float = 0.1) -> Times:
    """Device time of one call, by events around each, over rotating inputs.

    The device waits while the host queues a batch of calls, so gaps that come from a slow host are
    not counted (as far as a batch can be queued in 20 ms).

    Args:
        calls: The same function over different input sets.
        budget_s: Device time to spend; at least three samples are taken.
    """
    if not torch.cuda.is_available():
        return _time_on_cpu(calls)
    host_s, total_s = _warm_up(calls)
    repeats = int(min(max(MIN_REPEATS, budget_s / total_s), 400))
    kept: deque[object] = deque(maxlen=len(calls))
    samples: list[float] = []
    while len(samples) < repeats:
        batch = min(BATCH, repeats - len(samples))
        lead_s = min(1.5 * batch * host_s + 1e-4, MAX_LEAD_S)
        torch.cuda._sleep(int(lead_s * CLOCK_HZ))
        pairs = []
        for i in range(batch):
            start, end = _event(), _event()
            start.record()
            kept.append(calls[(len(samples) + i) % len(calls)]())
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        samples += [1e3 * start.elapsed_time(end) for start, end in pairs]
    return Times.of(samples)


def time_replayed(calls: Sequence[Call], budget_s: float = 0.1) -> Times:
    """Time of one call inside a CUDA graph that rotates over the inputs.

    A sample is the mean over one replay of the graph.

    Raises:
        RuntimeError: If the calls cannot be captured.
    """
    if not torch.cuda.is_available():
        return _time_on_cpu(calls)
    _, total_s = _warm_up(calls)
    rounds = max(1, math.ceil(GRAPH_S / (total_s * len(calls))))
    graph = torch.cuda.CUDAGraph()
    kept: deque[object] = deque(maxlen=len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                kept.append(call())
    num_calls = rounds * len(calls)
    graph.replay()
    samples = []
    for _ in range(int(min(max(10, budget_s / (total_s * num_calls)), 100))):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / num_calls)
    return Times.of(samples)


def time_from_python(call: Call, calls_per_sample: int) -> Times:
    """Wall time of one call, issued back to back from Python: the slower of host and device."""
    for _ in range(10):
        call()
    synchronize()
    samples: list[float] = []
    end_s = time.perf_counter() + PYTHON_S
    while len(samples) < 5 or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        for _ in range(calls_per_sample):
            call()
        synchronize()
        samples.append(1e6 * (time.perf_counter() - start_s) / calls_per_sample)
    return Times.of(samples)


def count_launches(call: Call) -> int:
    """Kernels, copies and fills that one call launches: the nodes of its CUDA graph.

    Raises:
        RuntimeError: If the call cannot be captured, or the driver cannot say.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA device is needed to count launches.")
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        kept = call()
    driver = ctypes.CDLL("libcuda.so.1")
    handle, number = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    _check(driver.cuGraphGetNodes(handle, None, ctypes.byref(number)))
    nodes = (ctypes.c_void_p * number.value)()
    if number.value:
        _check(driver.cuGraphGetNodes(handle, nodes, ctypes.byref(number)))
    kind, launches = ctypes.c_int(), 0
    for node in nodes:
        _check(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        # 0 kernel, 1 copy, 2 fill; the rest is bookkeeping
        launches += kind.value in (0, 1, 2)
    del kept
    return launches


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def provenance(benchmark: str) -> dict[str, Any]:
    """Where and from what a file of measurements comes: its head, without the rows."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("ESPER_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "device": _device(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace a file at once, so that a run that is cut short leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"name": f"CPU ({platform.machine()})", "driver": None}
    properties = torch.cuda.get_device_properties()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "driver": driver.split("\n")[0] if driver else None,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _warm_up(calls: Sequence[Call]) -> tuple[float, float]:
    """Compile, fill the allocator, wake the clocks; seconds a call takes host and device."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start_s, done = time.perf_counter(), 0
    while done < 3 or (time.perf_counter() - start_s < 0.02 and done < 100):
        calls[done % len(calls)]()
        done += 1
    queued_s = time.perf_counter() - start_s
    torch.cuda.synchronize()
    return queued_s / done, (time.perf_counter() - start_s) / done


def _time_on_cpu(calls: Sequence[Call]) -> Times:
    samples = []
    for i in range(MIN_REPEATS):
        start_s = time.perf_counter()
        calls[i % len(calls)]()
        samples.append(1e6 * (time.perf_counter() - start_s))
    return Times.of(samples)


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the CUDA driver could not read the graph: error {code}.")
