"""Measure one arm of a block in this process: `python -m esper.evidence.measure REQUEST RESULT`.

A fresh process says that it is ready, waits for a line, measures one implementation and ends.
Latencies are walls from the call to the finished result, device synchronised, over rotating random
inputs, after a warm-up that lasts until three windows agree. What cannot be measured here is stored
as absent, with the reason.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import AwareDatetime, Field, model_validator
from scipy import stats
from torch import Tensor

from esper import environment
from esper.config.baseline import BaselineConfig, Implementation, Requests, WarmUp
from esper.controller import Tamiyo
from esper.evidence.baseline_workload import Built, build, host, inputs
from esper.evidence.records import Record, write_json
from esper.evidence.reference import median_ms, reference_s
from esper.evidence.utilisation import Utilisation
from esper.surgery.attach import attach
from esper.surgery.lattice import Lattice
from esper_kernels.timing import count_launches, synchronize, time_cold, time_replayed

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
CONFIDENCE = 0.95
# a quarter of the timed requests is sent back to back for the throughput
THROUGHPUT_SHARE = 4
REFERENCE_REQUESTS = 20
DECISIONS = 9
READY = "ready"
_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Measured(Record):
    """A number with its unit, or the reason why there is none; never a default."""

    value: float | None
    unit: str
    low: float | None = Field(None, description="Ends of the 95 % order-statistic interval.")
    high: float | None = None
    why: str | None = Field(None, description="Reason of the absence.")

    @model_validator(mode="after")
    def _number_or_reason(self) -> "Measured":
        if (self.value is None) != (self.why is not None):
            raise ValueError("value must be a number, or None with the reason in `why`.")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"value must be finite, but got {self.value}; say why it is absent.")
        return self


def absent(unit: str, why: str) -> Measured:
    """A quantity that was not measured."""
    return Measured(value=None, unit=unit, why=why)


def present(value: float, unit: str) -> Measured:
    """A quantity that was."""
    return Measured(value=value, unit=unit)


class Machine(Record):
    """`esper.environment.machine`, and the code and libraries that ran."""

    device: str
    cpu: str
    num_cpus: int
    memory_bytes: int
    max_cpu_mhz: float | None
    driver: str | None
    cuda: str | None
    max_sm_mhz: float | None
    max_gpu_memory_mhz: float | None
    code_hash: str
    versions: dict[str, str]
    threads: int = Field(description="Of torch.")

    @classmethod
    def here(cls, config: BaselineConfig) -> "Machine":
        """This machine, as a baseline sees it."""
        facts = environment.machine(config.device)
        return cls(
            **facts, code_hash=environment.code_hash(), versions=environment.versions(),
            threads=config.threads,
        )  # fmt: skip


class Loop(Record):
    """One series of requests of a kind at one batch size."""

    mode: Literal["forward", "step"]
    batch: int
    requests: int
    windows: int = Field(description="Of warm-up.")
    is_steady: bool = Field(description="Whether the last three windows agreed.")
    cliff: float | None = Field(description="q(.995) / q(.985); None with fewer than 400 requests.")
    samples_us: tuple[float, ...] = Field(description="In order, to 0.1 us.")


class Request(Record):
    """What a process is asked for."""

    config: BaselineConfig
    kind: Literal["arm", "facts"] = "arm"
    implementation: Implementation = "kasmina"
    block: int = 0
    copy_name: Literal["a", "b"] = "a"
    order: int = Field(0, description="Place in the random order of the block.")


class ArmRecord(Record):
    """What one process measured."""

    block: int
    implementation: Implementation
    copy_name: Literal["a", "b"]
    order: int
    started_at: AwareDatetime
    ended_at: AwareDatetime
    machine: Machine
    metrics: dict[str, Measured]
    loops: tuple[Loop, ...]


class FactsRecord(Record):
    """What is counted or compared rather than timed."""

    machine: Machine
    facts: dict[str, Measured]


def main(arguments: Sequence[str]) -> None:
    """Measure what the request file asks for, and write the result file."""
    request_path, result_path = map(Path, arguments)
    request = Request.model_validate_json(request_path.read_text(encoding="utf-8"))
    torch.set_num_threads(request.config.threads)
    # the first optimizer would import it in the middle of a measurement
    import_module("torch._dynamo")
    # the processes of a block load their libraries side by side, and measure one after the other
    print(READY, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("whoever asked is gone; nothing was measured.")
    write_json(result_path, arm(request) if request.kind == "arm" else facts(request.config))


def arm(request: Request) -> ArmRecord:
    """Measure one implementation."""
    config, started = request.config, datetime.now(UTC)
    timed = reference_s(config.device, REFERENCE_REQUESTS)
    # what the reference and the inputs take is no part of what the model takes
    built = build(config, request.implementation)
    number = config.requests[request.implementation]
    metrics: dict[str, Measured] = {
        "seeds_per_layer": present(built.seeds, "count"),
        "active_seeds": present(built.active, "count"),
    }
    loops = []
    walls, cpus = time.perf_counter(), time.process_time()
    for mode, sizes in config.workload.loops.items():
        built.model.train(mode == "step")
        call = built.step if mode == "step" else partial(_forward, built)
        for batch in sizes:
            xs = inputs(config, batch)
            loop, found = _loop(mode, batch, call, xs, number, config)
            loops.append(loop)
            metrics |= found
            if mode == "forward":
                metrics |= _device_times(request, built, xs, batch)
    metrics["cpu_share_percent"] = _cpu_share(
        config, time.process_time() - cpus, time.perf_counter() - walls
    )
    metrics |= _busy(config, built, max(config.workload.loops["step"]))
    metrics |= _decisions(config, built)
    metrics |= _memory(config)
    reference = [*timed, *reference_s(config.device, REFERENCE_REQUESTS)]
    metrics["reference_ms"] = present(median_ms(reference), "ms")
    return ArmRecord(
        block=request.block, implementation=request.implementation, copy_name=request.copy_name,
        order=request.order, started_at=started, ended_at=datetime.now(UTC),
        machine=Machine.here(config), metrics=metrics, loops=tuple(loops),
    )  # fmt: skip


@torch.no_grad()
def _forward(built: Built, x: Tensor) -> Tensor:
    y: Tensor = built.model(x)
    return y


def _wall_s(call: Callable[[Tensor], object], x: Tensor) -> float:
    """Seconds from the call to its finished result."""
    started = time.perf_counter()
    call(x)
    synchronize()
    return time.perf_counter() - started


def warm_up(call: Callable[[int], float], window: int, limits: WarmUp) -> tuple[int, bool]:
    """Repeat windows of requests until the medians of three in a row agree.

    Args:
        call: Serves the request of that index and returns its seconds.
        window: Requests of a window.
        limits: What agreement is, and when to give up.

    Returns:
        Windows that ran, and whether the last three agreed.
    """
    medians: list[float] = []
    while len(medians) < limits.max_windows:
        first = len(medians) * window
        medians.append(statistics.median(call(first + i) for i in range(window)))
        last = medians[-3:]
        if len(last) == 3 and max(last) <= (1 + limits.agree_frac) * min(last):
            return len(medians), True
    return len(medians), False


def _loop(
    mode: Literal["forward", "step"],
    batch: int,
    call: Callable[[Tensor], object],
    xs: Sequence[Tensor],
    requests: Requests,
    config: BaselineConfig,
) -> tuple[Loop, dict[str, Measured]]:
    def serve(i: int) -> float:
        return _wall_s(call, xs[i % len(xs)])

    number = requests.step if mode == "step" else requests.forward
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    windows, is_steady = warm_up(serve, requests.window, config.warm_up)
    samples_us = tuple(round(1e6 * serve(i), 1) for i in range(number))
    head = f"{mode}_b{batch}"
    metrics = {f"{head}_{k}": v for k, v in summary(samples_us, config.limit_ms).items()}
    some = max(2, number // THROUGHPUT_SHARE)
    started = time.perf_counter()
    for i in range(some):
        call(xs[i % len(xs)])
    synchronize()
    per_s = batch * some / (time.perf_counter() - started)
    metrics[f"{head}_throughput"] = present(per_s, "samples/s")
    metrics[f"{head}_gpu_peak_bytes"] = (
        # without the inputs that are rotated over
        present(torch.cuda.max_memory_allocated() - sum(x.nbytes for x in xs), "bytes")
        if config.device == "cuda"
        else absent("bytes", "no GPU: torch counts no allocations on a CPU")
    )
    loop = Loop(
        mode=mode, batch=batch, requests=number, windows=windows, is_steady=is_steady,
        cliff=cliff(samples_us), samples_us=samples_us,
    )  # fmt: skip
    return loop, metrics


def summary(samples_us: Sequence[float], limit_ms: float) -> dict[str, Measured]:
    """Mean, quantiles with their order-statistic intervals, and the share over the limit.

    A quantile whose interval does not lie within the sample is absent: too few requests.
    """
    ordered = np.sort(np.asarray(samples_us)) / 1e3
    found = {"mean_ms": present(float(ordered.mean()), "ms")}
    for name, q in QUANTILES.items():
        found[f"{name}_ms"] = quantile(ordered, q, "ms")
    over = float(np.mean(ordered > limit_ms))
    return found | {"over_limit_percent": present(100 * over, "percent")}


def quantile(ordered: Any, q: float, unit: str) -> Measured:
    """A quantile of a sorted sample with its distribution-free 95 % interval.

    Source: David and Nagaraja, Order Statistics (2003), section 7.1.
    """
    m = len(ordered)
    ends = interval_ranks(m, q)
    if ends is None:
        fewest = next(n for n in range(m, 10_000) if interval_ranks(n, q) is not None)
        return absent(unit, f"{m} requests; at least {fewest} are needed for an interval")
    rank = max(1, math.ceil(m * q))
    return Measured(
        value=float(ordered[rank - 1]), unit=unit,
        low=float(ordered[ends[0] - 1]), high=float(ordered[ends[1] - 1]),
    )  # fmt: skip


def interval_ranks(m: int, q: float) -> tuple[int, int] | None:
    """Ranks (from 1) between which the q-quantile lies with 95 %; None if m is too small."""
    tail = (1 - CONFIDENCE) / 2
    low, high = int(stats.binom.ppf(tail, m, q)), int(stats.binom.ppf(1 - tail, m, q)) + 1
    return (low, high) if low >= 1 and high <= m else None


def cliff(samples_us: Sequence[float]) -> float | None:
    """q(.995) / q(.985); beyond 1.3, P99 lies on a step and says nothing stable."""
    if len(samples_us) < 400:
        return None
    high, low = np.quantile(samples_us, (0.995, 0.985))
    return float(high / low)


def _device_times(
    request: Request, built: Built, xs: Sequence[Tensor], batch: int
) -> dict[str, Measured]:
    """GPU time of a forward pass: cold by events, and replayed from a CUDA graph."""
    names = [f"forward_b{batch}_{kind}_ms" for kind in ("device_cold", "device_replayed")]
    if request.config.device != "cuda":
        return {name: absent("ms", "no GPU") for name in names}
    if request.implementation == "legacy":
        why = "one call is thousands of launches: the device waits for the host"
        return {name: absent("ms", why) for name in names}
    calls = [partial(_forward, built, x) for x in xs]
    cold = time_cold(calls, budget_s=0.05).p50 / 1e3
    replayed = time_replayed(calls, budget_s=0.05).p50 / 1e3
    return {names[0]: present(cold, "ms"), names[1]: present(replayed, "ms")}


def _cpu_share(config: BaselineConfig, cpu_s: float, wall_s: float) -> Measured:
    """How much of the time the process had its CPU; what is missing went to other programs."""
    if config.device != "cpu" or config.threads > 1:
        return absent("percent", "it is told for one thread on a CPU alone")
    return present(100 * cpu_s / wall_s, "percent")


def _busy(config: BaselineConfig, built: Built, batch: int) -> dict[str, Measured]:
    """How busy the GPU is while it trains, and what that takes in energy."""
    energy_j, why = _energy_meter(config)
    cuda = config.device == "cuda"
    found = {
        "gpu_sm_active_percent": absent("percent", "no GPU"),
        "gpu_nvml_busy_percent": absent("percent", "no GPU"),
        "gpu_sm_clock_mhz": absent("MHz", "no GPU"),
        "energy_per_sample_mj": absent("mJ", why),
    }
    if not cuda and energy_j is None:
        return found
    xs = inputs(config, batch)
    built.model.train()
    with ExitStack() as stack:
        busy = stack.enter_context(Utilisation()) if cuda else None
        before = energy_j() if energy_j else 0.0
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < config.busy_s:
            built.step(xs[steps % len(xs)])
            steps += 1
            if steps % 8 == 0:
                # or the host would run ahead of the clock
                synchronize()
        if cuda:
            found["gpu_sm_clock_mhz"] = _sm_clock()
        synchronize()
        after = energy_j() if energy_j else 0.0
    if energy_j is not None:
        found["energy_per_sample_mj"] = (
            present(1e3 * (after - before) / (steps * batch), "mJ")
            if after > before
            else absent("mJ", "the meter did not move, or began again")
        )
    if busy is not None:
        for name, value in (
            ("gpu_sm_active_percent", busy.sm_active_pct),
            ("gpu_nvml_busy_percent", busy.nvml_pct),
        ):
            found[name] = (
                absent("percent", value) if isinstance(value, str) else present(value, "percent")
            )
    return found


def _sm_clock() -> Measured:
    """The clock of the multiprocessors just now, under load."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        handle = environment.nvml_handle(nvml)
        return present(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM), "MHz")
    except Exception as error:
        return absent("MHz", f"NVML gives no clock: {type(error).__name__}: {str(error)[:100]}")


def _energy_meter(config: BaselineConfig) -> tuple[Callable[[], float] | None, str]:
    """A meter in joules, or why there is none."""
    if config.device == "cuda":
        try:
            nvml = import_module("pynvml")

            nvml.nvmlInit()
            handle = environment.nvml_handle(nvml)
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception as error:
            return None, f"NVML gives no energy: {type(error).__name__}: {str(error)[:100]}"
        return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, ""
    try:
        _RAPL.read_text(encoding="ascii")
    except OSError as error:
        return None, f"no energy counter of the CPU can be read ({_RAPL}: {error.strerror})"
    return lambda: float(_RAPL.read_text(encoding="ascii")) / 1e6, ""


def _decisions(config: BaselineConfig, built: Built) -> dict[str, Measured]:
    """Seeds about which the controller decides in a second: decide and apply, over a report."""
    name, unit = "seed_decisions_per_s", "seeds/s"
    lattice = built.lattice
    if lattice is None:
        return {name: absent(unit, "the legacy layer has no report and no controller")}
    controller, seconds = Tamiyo(), []
    x = inputs(config, min(config.workload.batch_sizes))[0]
    for _ in range(DECISIONS):
        # a report without a gradient is none to decide on
        built.step(x)
        report = lattice.report(loss=1.0)
        started = time.perf_counter()
        lattice.apply(controller.decide(report))
        synchronize()
        seconds.append(time.perf_counter() - started)
    seeds = sum(a.layer.num_seeds for a in lattice.attached.values())
    return {name: present(seeds / statistics.median(seconds), unit)}


def _memory(config: BaselineConfig) -> dict[str, Measured]:
    # kilobytes on Linux
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"cpu_memory_peak_bytes": present(peak, "bytes")}
    if config.device == "cpu":
        why = "no GPU"
        return found | {
            "gpu_reserved_peak_bytes": absent("bytes", why),
            "gpu_driver_used_bytes": absent("bytes", why),
        }
    free, total = torch.cuda.mem_get_info()
    return found | {
        "gpu_reserved_peak_bytes": present(torch.cuda.max_memory_reserved(), "bytes"),
        # of the whole device, CUDA's context and other processes included
        "gpu_driver_used_bytes": present(total - free, "bytes"),
    }


def facts(config: BaselineConfig) -> FactsRecord:
    """Launches a site, what dormant seeds change, and how far the implementations lie apart."""
    found = {
        "launches_per_site": _launches(config),
        "dormant_changed_bits": present(_changed_bits(config), "count"),
        "output_max_abs_difference": absent("1", "one implementation alone"),
    }
    if len(config.implementations) > 1:
        found["output_max_abs_difference"] = present(_largest_difference(config), "1")
    return FactsRecord(machine=Machine.here(config), facts=found)


@torch.no_grad()
def _launches(config: BaselineConfig) -> Measured:
    if config.device != "cuda":
        return absent("count", "no GPU: launches are the nodes of a CUDA graph")
    built = build(config, "kasmina")
    x = inputs(config, max(config.workload.batch_sizes))[0]
    built.model.eval()
    with_seeds = count_launches(partial(built.model, x))
    assert built.lattice is not None
    sites = len(built.lattice.attached)
    built.lattice.detach()
    bare = count_launches(partial(built.model, x))
    return present((with_seeds - bare) / sites, "count")


def _host_with_dormant_seeds(config: BaselineConfig) -> tuple[torch.nn.Module, Lattice]:
    model = host(config.workload, config.seed).to(config.device)
    return model, attach(model, "*", config.workload.seeds_per_layer)


@torch.no_grad()
def _changed_bits(config: BaselineConfig) -> int:
    """Bits of the output, in fp32, that differ with dormant seeds from what they are without."""
    x = inputs(config, max(config.workload.batch_sizes))[0].float()
    model, lattice = _host_with_dormant_seeds(config)
    model.eval()
    after = model(x)
    lattice.detach()
    differing = model(x).view(torch.int32) ^ after.view(torch.int32)
    differing = differing[differing != 0].cpu().numpy()
    return int(np.unpackbits(differing.view(np.uint8)).sum())


@torch.no_grad()
def _largest_difference(config: BaselineConfig) -> float:
    """Largest absolute difference of the two implementations' outputs in fp32."""
    exact = config.model_copy(
        update={"workload": config.workload.model_copy(update={"dtype": "float32"})}
    )
    x = inputs(exact, max(config.workload.batch_sizes))[0]
    outputs = [build(exact, name).model.eval()(x) for name in config.implementations]
    return max(float((y - outputs[0]).abs().max()) for y in outputs[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
