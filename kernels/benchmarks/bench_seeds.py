"""Time the kernels of the seed lattice against their baselines and the device's own limits.

Usage: python kernels/benchmarks/bench_seeds.py [--json FILE] [--plan goals] [--only MODE,...]

The kernels' tests run first, and nothing is timed while one fails. Each provider's outputs are
compared with fp64 on fresh random inputs, with every output poisoned beforehand, before it is
timed; a wrong one is not. Times are cold (inputs rotate beyond the L2 cache), once by events around
single calls and once inside a CUDA graph. Modes: forward, backward, isolated, dormant, optimizer,
span forward, span backward; `span` stands for both.
"""

import argparse
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import plan
import report
import torch
from cases import Case, Mode, Outputs, SkipError, forget_compiled
from ceilings import Ceilings
from chunk_modes import Backward, Dormant, Forward, Isolated, chunk_kernel
from pool_mode import Optimizer
from span_modes import SpanBackward, SpanForward
from torch import Tensor

from esper_kernels.ops.dispatch import INTERPRET, force_triton
from esper_kernels.timing import (
    Call,
    Times,
    count_launches,
    num_sets,
    provenance,
    synchronize,
    time_cold,
    time_replayed,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]
MODES: dict[str, Mode] = {
    "forward": Forward(),
    "backward": Backward(),
    "isolated": Isolated(),
    "dormant": Dormant(),
    "optimizer": Optimizer(),
    "span forward": SpanForward(),
    "span backward": SpanBackward(),
}
# largest |out - ref| / |ref| over all, and largest single error over the largest value
NORM_LIMIT = {"bf16": 2e-2, "fp16": 1e-2, "fp32": 1e-3}
MAX_LIMIT = {"bf16": 1e-1, "fp16": 5e-2, "fp32": 1e-2}
# where x or a weight is rounded across the kink of a ReLU, its whole gradient comes or goes; in
# bf16, plain PyTorch is 0.03 off in norm there
KINK_LIMIT = {"bf16": (6e-2, 0.6), "fp16": (2e-2, 0.6), "fp32": (1e-3, 0.6)}
# a graph of more than this would take longer to capture than it is worth
MAX_REPLAYED_US = 50_000


def main() -> int:
    """Run the benchmark; 1 if a test, a check or a row failed, 2 without a device."""
    args = _arguments()
    if args.smoke and not torch.cuda.is_available() and not INTERPRET:
        return _refuse("TRITON_INTERPRET=1 must be set to smoke-test the kernels without a GPU.")
    if not args.smoke and not torch.cuda.is_available():
        return _refuse("a CUDA device is needed; --smoke tests the script without one.")
    tests = "skipped on request" if args.skip_tests else run_tests(args.jobs)
    document = provenance("seeds") | {"smoke": args.smoke, "tests": tests, "rows": []}
    if tests.startswith("failed"):
        return _refuse(f"the kernels' tests must pass before anything is timed, but {tests}.")
    plans = {"smoke": plan.smoke, "quick": plan.quick, "goals": plan.goals, "full": plan.full}
    planned = list(plans["smoke" if args.smoke else args.plan]())
    if args.jobs:
        compile_all(planned, args.only, args.jobs)
    bench = Bench(
        "cuda" if torch.cuda.is_available() else "cpu", quick=args.smoke or args.plan == "quick"
    )
    with force_triton():
        for row in bench.rows(planned, args.only, time.perf_counter() + args.limit_s):
            document["rows"].append(row)
            _print(row)
            if args.json:
                write_json(args.json, document)
    document["ceilings"] = bench.ceilings.as_json()
    if args.json:
        write_json(args.json, document)
    print(f"\nceilings: {document['ceilings']}\n\n{report.goals_table([document])}")
    return int(any("failed" in row for row in document["rows"]))


class Bench:
    """Checks and times one row after the other.

    Args:
        device: `cuda`, or `cpu` for a smoke test.
        quick: Spend less time on each.
    """

    def __init__(self, device: str, quick: bool) -> None:
        self.device = torch.device(device)
        self.budget_s = 0.05 if quick else 0.1
        self.ceilings = Ceilings(self.device, quick)

    def rows(
        self, planned: Iterable[plan.Planned], only: set[str] | None, end_s: float
    ) -> Iterator[dict[str, Any]]:
        """One row a case and provider, each case once.

        Args:
            planned: Cases and their providers.
            only: Modes to run; None: all.
            end_s: `time.perf_counter()` after which rows are skipped.
        """
        seen: set[tuple[Case, str]] = set()
        for case, providers in planned:
            if only is not None and not {case.mode, case.mode.split()[0]} & only:
                continue
            for provider in providers:
                if (case, provider) in seen or provider not in MODES[case.mode].providers:
                    continue
                seen.add((case, provider))
                row = asdict(case) | {"D": case.D, "provider": provider}
                if time.perf_counter() > end_s:
                    yield row | {"skipped": "the time limit was reached"}
                else:
                    yield row | self._row(case, provider)

    def _row(self, case: Case, provider: str) -> dict[str, Any]:
        start_s = time.perf_counter()
        try:
            row = self._measure(case, provider)
        except SkipError as reason:
            return {"skipped": str(reason)}
        # one broken row must not cost all others
        except Exception as error:
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            forget_compiled()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return row | {"took_s": round(time.perf_counter() - start_s, 2)}

    def _measure(self, case: Case, provider: str) -> dict[str, Any]:
        mode = MODES[case.mode]
        inputs = mode.inputs(case, self.device)
        row: dict[str, Any] = {"bytes": mode.bytes(case), "flops": mode.flops(case)}
        if provider == "triton" and case.mode in ("forward", "backward", "isolated"):
            row["kernel"] = chunk_kernel(case).__name__.rpartition(".")[2]
        row |= self._check(mode, case, provider, inputs)
        if "failed" in row:
            return row
        sets = [inputs]
        sets += [mode.inputs(case, self.device) for _ in range(num_sets(_bytes_of(inputs)) - 1)]
        if provider == "legacy":
            sets = sets[:1]
        calls = [mode.call(case, provider, one) for one in sets]
        cold = time_cold(calls, self.budget_s)
        row["cold_us"] = cold.as_row()
        replayed: Times | None = None
        if cold.p50 < MAX_REPLAYED_US and provider != "legacy":
            replayed, why = _attempt(lambda: time_replayed(calls, self.budget_s))
            row |= {"graph_us": replayed.as_row()} if replayed else {"no_graph": why}
        if provider == "legacy" and case.mode == "backward":
            # its forward ran before, on a stream that no graph captures
            return row | self._limits(case, row, cold, replayed)
        launches, why = _attempt(lambda: count_launches(calls[0]))
        row |= {"launches": launches} if launches is not None else {"no_launches": why}
        return row | self._limits(case, row, cold, replayed)

    def _limits(
        self, case: Case, row: dict[str, Any], cold: Times, replayed: Times | None
    ) -> dict[str, Any]:
        shape = case.T, case.D, case.torch_dtype
        if case.mode == "optimizer":
            shape = max(1, row["bytes"] // (8 * plan.MAIN_D)), plan.MAIN_D, torch.float32
        limits: dict[str, Any] = {}
        for name, times in (("cold", cold), ("graph", replayed)):
            if times is None:
                continue
            by_graph = name == "graph"
            floor_us, bound = self.ceilings.floor(row["bytes"], row["flops"], *shape, by_graph)
            if case.mode == "dormant":
                floor_us, bound = self.ceilings.read(*shape)[by_graph].p50, "read"
            copy_us = self.ceilings.copy(*shape)[by_graph].p50
            limits |= {
                "bound": bound,
                f"floor_{name}_us": round(floor_us, 2),
                f"share_{name}": round(floor_us / times.p50, 4),
                f"copies_{name}": round(times.p50 / copy_us, 4),
            }
        return limits

    def _check(self, mode: Mode, case: Case, provider: str, inputs: Any) -> dict[str, Any]:
        """Errors against fp64; `failed` if one is too large."""
        reference = mode.reference(case, inputs)
        call = mode.call(case, provider, inputs)
        outputs: Outputs = poisoned(call) if provider == "triton" else call()
        outputs = mode.comparable(case, inputs, outputs)
        norm = largest = 0.0
        # not strict: the baselines do not return every last statistic
        for out, ref in zip(outputs, reference, strict=False):
            if out is None or ref is None or not ref.numel():
                continue
            if out.shape != ref.shape:
                return {"failed": f"shape {tuple(out.shape)} where {tuple(ref.shape)} is right"}
            error = out.double() - ref
            norm = _worse(norm, _ratio(error.norm(), ref.norm()))
            largest = _worse(largest, _ratio(error.abs().max(), ref.abs().max()))
        errors = {"error_norm": norm, "error_max": largest}
        # NaN is not below any limit
        limits = NORM_LIMIT[case.dtype], MAX_LIMIT[case.dtype]
        if case.mode in ("backward", "isolated", "span backward") and case.phi in ("relu", "mixed"):
            limits = KINK_LIMIT[case.dtype]
        if not (norm <= limits[0] and largest <= limits[1]):
            return {k: str(v) if v != v else v for k, v in errors.items()} | {
                "failed": f"wrong result: error {norm:.2g} in norm, {largest:.2g} at most"
            }
        return errors


def compile_all(planned: Iterable[plan.Planned], only: set[str] | None, jobs: int) -> None:
    """Run every row once in some processes, so that all is compiled before the clock runs.

    A row that fails here will fail again where it is recorded.
    """
    rows = [(case, p) for case, providers in planned for p in providers if p != "legacy"]
    rows = [(case, p) for case, p in rows if not only or {case.mode, case.mode.split()[0]} & only]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        reasons = [reason for reason in pool.map(_compile, rows) if reason]
    for reason in reasons:
        print(reason, file=sys.stderr)
    done = len(rows) - len(reasons)
    print(f"compiled {done} of {len(rows)} rows in {jobs} processes", flush=True)


def _compile(row: tuple[Case, str]) -> str:
    case, provider = row
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with force_triton():
            MODES[case.mode].call(case, provider, MODES[case.mode].inputs(case, device))()
            synchronize()
    except Exception as error:
        return f"{case} {provider}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        forget_compiled()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return ""


def poisoned(call: Call) -> Any:
    """The call's outputs, with NaN in all memory that it allocates and does not write."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def run_tests(jobs: int) -> str:
    """Run the kernels' tests in so many processes (0: one); the last line of what they say."""
    folder = ROOT / "tests/esper_kernels"
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-x", "-p", "no:cacheprovider"]
    # the tests of the benchmarks would run this script again
    command += ["--ignore", str(folder / "test_benchmarks.py")]
    if jobs:
        command += ["-n", str(jobs), "--dist", "worksteal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"]
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return f"{'failed' if done.returncode else 'passed'}: {lines[-1].strip('= ')}"


def _attempt(what: Any) -> tuple[Any, str]:
    try:
        return what(), ""
    except (RuntimeError, AttributeError, OSError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def _ratio(error: Tensor, size: Tensor) -> float:
    # where all is 0, the error itself
    return float(error / size) if float(size) else float(error)


def _worse(one: float, other: float) -> float:
    return other if math.isnan(other) else max(one, other)


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes_of, value)) if isinstance(value, tuple | list) else 0


def _print(row: dict[str, Any]) -> None:
    sizes = f"T={row['T']} S={row['S']} C={row['C']} H={row['H']} {row['phi']} {row['dtype']}"
    extra = f"{row['active']}{'' if row['observe'] else ' unobserved'}"
    name = f"{row['mode']:14} {row['provider']:18} {sizes} {extra} isolated={row['isolated']}"
    if "cold_us" not in row:
        reason = f"FAILED {row['failed']}" if "failed" in row else f"skipped: {row['skipped']}"
        print(f"{name}: {reason}", flush=True)
        return
    graph = row.get("graph_us", {}).get("p50")
    print(
        f"{name}: cold {row['cold_us']['p50']} us, graph {graph} us, share of {row['bound']} "
        f"{row.get('share_graph', row['share_cold'])}, launches {row.get('launches')}, "
        f"error {row['error_norm']:.1e}",
        flush=True,
    )


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument(
        "--plan", choices=("full", "goals", "quick"), default="full", help="how many cases"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="processes that test, and compile beforehand"
    )
    modes = set(MODES) | {"span"}
    parser.add_argument(
        "--only", type=lambda text: set(text.split(",")), help=f"modes: {', '.join(sorted(modes))}"
    )
    parser.add_argument("--skip-tests", action="store_true", help="the file will say so")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--limit-s", type=float, default=480, help="rows after that are skipped")
    args = parser.parse_args()
    if args.only and not args.only <= modes:
        parser.error(f"--only must name some of {', '.join(sorted(modes))}, but got {args.only}.")
    return args


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
