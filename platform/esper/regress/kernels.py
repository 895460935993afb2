"""The Triton kernels against the plain reference: real ones on a GPU, interpreted ones on a CPU.

Triton's interpreter computes what a kernel says, without compiling it. So what it shows has a name
of its own, and only a GPU tells the quantity that the gate of the kernels' rollout asks for.

Shapes: T = rows, S = seeds, C = channels of a seed, H = hidden units, I and O = features of a span.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.regress.finding import Finding, capped, changed_bits
from esper.seeds.optimizer import SeedOptimizer
from esper.seeds.state import SeedState, Stage
from esper.surgery.attach import attach
from esper_kernels import Phi, chunk_seeds, probe_size, span_seeds
from esper_kernels.learning import OBJECTIVES

# greatest norm of a difference, as a share of the norm of what is right
MOST_FRAC = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# T, S, C, H: a tile's edges on every side, and a seed too wide for one tile
QUICK_CHUNKS = [(33, 5, 3, 4), (20, 4, 20, 40)]
CHUNKS = [*QUICK_CHUNKS, (1, 1, 1, 1), (63, 40, 2, 2), (65, 7, 8, 32), (33, 1, 140, 5)]
GPU_CHUNKS = [(1000, 33, 4, 4), (2048, 512, 4, 4), (300, 48, 64, 64), (1000, 7, 130, 200)]
# T, I, O, S
QUICK_SPANS = [(20, 7, 5, 9)]
SPANS = [*QUICK_SPANS, (1, 2, 3, 1), (40, 17, 33, 70)]
GPU_SPANS = [(1000, 200, 100, 300), (130, 63, 1030, 1024)]
PARTS = ("sum", "squares", "dead", "energy", "explained", "counts")
# seeds take turns: they learn from the task, learn alone, sleep, or are awake and frozen
AWAKE, ALONE, ASLEEP, FROZEN = range(4)
LEARNING = {AWAKE: 1, ALONE: 2, ASLEEP: 1, FROZEN: 0}
STEPS = 12
LIMIT_S = 1800

MOST_PROCESSES = 8

Call = Callable[..., Tensor]
Errors = dict[str, tuple[float, float]]


class Case(NamedTuple):
    """One site, or without a shape the optimizer's step of one."""

    geometry: str
    shape: tuple[int, int, int, int] | None
    dtype: torch.dtype = torch.float32
    objective: str = OBJECTIVES[0]


def kernels(device: str = "cpu", *, quick: bool = False) -> Finding:
    """Output, every gradient, telemetry and optimizer step of the kernels against the reference.

    Args:
        device: A GPU, or the CPU, where the kernels are interpreted, in a process of their own
            unless this one interprets kernels already.
        quick: Fewer and smaller sites.

    Raises:
        RuntimeError: If that process does not end well.
    """
    import triton

    if torch.device(device).type == "cuda" or triton.knobs.runtime.interpret:
        return _compared(device, quick=quick)
    done = subprocess.run(
        [sys.executable, "-m", "esper.regress.kernels", *["--quick"] * quick],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the interpreter must end well, but: {done.stderr.strip()[-500:]}")
    told = json.loads(done.stdout)
    return Finding(
        tuple(told["problems"]), told["cases"],
        {name: (value, unit) for name, (value, unit) in told["quantities"].items()},
        tuple(told["notes"]),
    )  # fmt: skip


def _compared(device: str, *, quick: bool) -> Finding:
    real = torch.device(device).type == "cuda"
    cases = _cases(real=real, quick=quick)
    # a GPU waits for Triton's compiler, which takes one kernel at a time in each process
    workers = min(MOST_PROCESSES, os.cpu_count() or 1) if real else 1
    problems, worst = list[str](), dict[str, float]()
    for name, found in _computed(cases, device, workers):
        for part, (error, allowed) in found.items():
            key = name.partition(" ")[0]
            worst[key] = max(worst.get(key, 0.0), error)
            # a NaN is not within anything
            if not error <= allowed:
                problems.append(f"{name}, {part}: {error:.2g} of its norm, beyond {allowed:.2g}")
    how = f"compiled for {torch.cuda.get_device_name()}" if real else "interpreted on the CPU"
    notes = [f"kernels {how}"]
    notes += [f"largest error of {name}: {error:.2g}" for name, error in sorted(worst.items())]
    quantity = "kernel_reference_failures" if real else "interpreted_kernel_failures"
    failures = float(len(problems))
    return Finding(capped(problems), len(cases), {quantity: (failures, "count")}, tuple(notes))


def _cases(*, real: bool, quick: bool) -> list[Case]:
    # arithmetic of 16 bits is another one in the interpreter
    dtypes = tuple(MOST_FRAC) if real else (torch.float32,)
    chunks, spans = (QUICK_CHUNKS, QUICK_SPANS) if quick else (CHUNKS, SPANS)
    sites = [("chunk", shape) for shape in chunks + GPU_CHUNKS * real]
    sites += [("span", shape) for shape in spans + GPU_SPANS * real]
    cases = [
        Case(geometry, shape, dtype, objective)
        for geometry, shape in sites
        for dtype in dtypes
        for objective in OBJECTIVES
    ]
    return [*cases, Case("chunk", None), Case("span", None)]


def _computed(cases: list[Case], device: str, workers: int) -> Iterator[tuple[str, Errors]]:
    if workers == 1:
        yield from (_case(case, device) for case in cases)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(cases)), context, torch.set_num_threads, (1,)
    ) as pool:
        # a site's objectives share most of what is compiled
        yield from pool.map(_case, cases, repeat(device), chunksize=len(OBJECTIVES))


def _case(case: Case, device: str) -> tuple[str, Errors]:
    """Name of a case, and error and what is allowed of every tensor."""
    if case.shape is None:
        return f"step/{case.geometry}", _step(case.geometry, device)
    kind = str(case.dtype).removeprefix("torch.")
    name = f"{case.geometry}/{kind} {case.shape}, {case.objective}"
    return name, _site(case.geometry, case.shape, case.dtype, case.objective, device)


def _site(
    geometry: str, shape: tuple[int, int, int, int], dtype: torch.dtype, objective: str, device: str
) -> Errors:
    """Error and what is allowed, of every tensor of one site."""
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        # exact in the type, or rounding would take hidden units across the kink of a ReLU
        return torch.randn(*size, generator=generator).to(dtype)

    codes = [Phi.GELU, Phi.RELU, Phi.SILU, Phi.IDENTITY]
    if geometry == "chunk":
        T, S, C, H = shape
        call: Call = chunk_seeds
        width = S * C
        rows = [draw(T, S * C)]
        pool = [draw(S, C, H) * C**-0.5, draw(S, H), draw(S, H, C) * H**-0.5]
        hidden = [torch.tensor([max(1, H - 3 * (s % 2)) for s in range(S)], dtype=torch.int32)]
    else:
        T, I, O, S = shape  # noqa: E741 (the legend's names of features)
        call, width = span_seeds, O
        rows = [draw(T, I), draw(T, O)]
        pool = [draw(S, I) * I**-0.5, draw(S), draw(S, O) * S**-0.5]
        hidden = []
    fate = torch.arange(S) % 4
    alpha = torch.where((fate == AWAKE) | (fate == FROZEN), draw(S).float().abs().clamp(0.1, 1), 0)
    learning = torch.tensor([LEARNING[f] for f in fate.tolist()], dtype=torch.int32)
    phi = torch.tensor([codes[s // 4 % 4] for s in range(S)], dtype=torch.int32)
    pool = [w.to(dtype).float() for w in pool]
    for weights in pool:
        # what sleeps may hold anything
        weights[fate == ASLEEP] = float("nan")
    dy = draw(T, width)
    fixed = [phi, *hidden]
    run = partial(call, learning_S=learning, objective=objective, observe=True)
    truth = _passed(
        partial(run, plain=True), [t.double() for t in rows], [w.double() for w in pool],
        alpha, fixed, dy.double(), probe_size(width, S),
    )  # fmt: skip
    there = [[t.to(device) for t in ts] for ts in (rows, pool, fixed)]
    with _forced():
        ours = _passed(
            partial(run, learning_S=learning.to(device)), there[0], there[1], alpha.to(device),
            there[2], dy.to(device), probe_size(width, S),
        )  # fmt: skip
    found = {
        name: (_error(mine, right), MOST_FRAC[dtype])
        for name, mine, right in _named(ours, truth, geometry, width, S)
    }
    if geometry == "chunk":
        still = (alpha == 0).repeat_interleave(width // S)
        bits = changed_bits(ours[0].cpu()[:, still], rows[0][:, still])
        found["sleeping chunks"] = float(bits), 0.0
    return found


def _forced() -> Any:
    # importing the dispatcher is what turns interpreted kernels on
    from esper_kernels.ops.dispatch import force_triton

    return force_triton()


def _passed(
    call: Call, rows: list[Tensor], pool: list[Tensor], alpha: Tensor, fixed: list[Tensor],
    dy: Tensor, probe_numel: int,
) -> list[Tensor]:  # fmt: skip
    """Output, gradients of rows, pool and alpha, and the telemetry, of one pass."""
    leaves = [t.clone().requires_grad_() for t in (*rows, *pool, alpha)]
    probe = torch.zeros(probe_numel, device=alpha.device).requires_grad_()
    y = call(*leaves, *fixed, probe=probe)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, probe], dy)]


def _named(
    ours: list[Tensor], truth: list[Tensor], geometry: str, width: int, num_seeds: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    names = ["output", *(["input"] if geometry == "chunk" else ["source", "input"])]
    names += ["w_in", "bias", "w_out", "alpha"]
    for i, name in enumerate(names):
        yield name, ours[i], truth[i]
    sizes = [width] * 4 + [num_seeds, 3]
    told = zip(PARTS, ours[-1].split(sizes), truth[-1].split(sizes), strict=True)
    yield from told


def _error(mine: Tensor, right: Tensor) -> float:
    """Norm of the difference, as a share of the norm of what is right."""
    a, e = mine.double().cpu(), right.double().cpu()
    if a.shape != e.shape:
        return float("inf")
    size = float(e.norm())
    difference = float((a - e).norm())
    return difference / size if size else difference


def _step(geometry: str, device: str) -> Errors:
    """The optimizer's kernel against its definition on the CPU: pool, moments and grafts."""
    sites = "0" if geometry == "chunk" else "0->2"
    pairs = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8)).to(place)
        options: dict[str, Any] = {"hidden": 5} if geometry == "chunk" else {"geometry": "span"}
        lattice = attach(model, sites, 8, **options)
        layer = lattice.layer(sites)
        layer.write_states(
            [SeedState(stage, 1) for stage in (
                Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION,
                Stage.EVALUATING, Stage.FINE_TUNING, Stage.FOSSILIZED, Stage.CULLED,
            )]
        )  # fmt: skip
        pairs.append((layer, SeedOptimizer(lattice, lr=0.05, weight_decay=0.1)))
    generator = torch.Generator().manual_seed(1)
    for weights, others in zip(*(layer.pool() for layer, _ in pairs), strict=True):
        drawn = torch.randn(weights.shape, generator=generator)
        for w in (weights, others):
            with torch.no_grad():
                w.copy_(drawn)
    for _ in range(STEPS):
        for weights, others in zip(*(layer.pool() for layer, _ in pairs), strict=True):
            drawn = torch.randn(weights.shape, generator=generator)
            for w in (weights, others):
                w.grad = drawn.to(w.device)
        pairs[0][1].step()
        with _forced():
            pairs[1][1].step()
    (right, _), (mine, _) = pairs
    allowed = MOST_FRAC[torch.float32]
    names = ("w_in", "bias", "w_out")
    found = {
        name: (_error(a.detach(), e.detach()), allowed)
        for name, a, e in zip(names, mine.pool(), right.pool(), strict=True)
    }
    for name in ("alpha", "progress", "ramped_steps"):
        found[name] = _error(getattr(mine, name), getattr(right, name)), allowed
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(asdict(_compared("cpu", quick="--quick" in sys.argv))))
