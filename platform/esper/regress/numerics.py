"""What must agree within rounding: outputs, every gradient and telemetry, against fp64.

The judge is the legacy loop in fp64 on the same inputs. The legacy loop in fp32 is measured beside
the others: it shows what rounding alone does.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.config.base import ConfigError
from esper.config.run import Execution
from esper.evidence.similarity import compare_models, compare_runs, told
from esper.regress.exact import EXECUTIONS
from esper.regress.finding import Finding, capped
from esper.seeds import legacy
from esper.seeds.blueprints import BLUEPRINTS, Geometry
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import GRAFTED_STAGES, SeedState, Stage
from esper_kernels import Phi

# greatest error, as a share of the largest element without cancellation
FP32_FRAC, FP64_FRAC = 1e-5, 1e-11
# what is handed over in bf16 is rounded once more, to 8 bits
BF16_FRAC = 2.0**-7
# so far from the kink of a ReLU, rounding does not take a unit to its other side
KINK_FRAC = 1e-4
STAGES = (
    Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING,
    Stage.FINE_TUNING, Stage.FOSSILIZED, Stage.CULLED,
)  # fmt: skip
ALPHAS = (0.0, 1e-8, 0.5, 1.0)


@dataclass(frozen=True)
class Case:
    """One generated site; `seeds` holds a stage, a blueprint and an alpha for each seed."""

    geometry: Geometry
    width: int
    hidden: int
    rows: int
    scale: float
    objective: str
    seeds: tuple[tuple[Stage, int, float], ...]
    draw: int


class _KinkError(Exception):
    """The case has a hidden unit too close to the kink of its function."""


def shapes(examples: int, device: str = "cpu") -> Finding:
    """Generated sites: odd sizes, single rows, tiny and huge activations, every stage together.

    Args:
        examples: Sites.
        device: Where all but the fp64 judge compute.

    Raises:
        ConfigError: If hypothesis is not installed.
    """
    try:
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import strategies as st
    except ImportError:
        raise ConfigError("hypothesis", (
            "hypothesis must be installed to generate cases; "
            "python -m pip install 'esper-morphogenetic[dev]'.",
        )) from None  # fmt: skip

    problems, counts = list[str](), {"cases": 0, "near a kink": 0}
    worst: dict[str, float] = {}
    chunk = [i for i, n in enumerate(BLUEPRINTS) if "chunk" in BLUEPRINTS[n].geometries]
    span = [i for i, n in enumerate(BLUEPRINTS) if "span" in BLUEPRINTS[n].geometries]

    def seeds_of(kinds: list[int]) -> st.SearchStrategy[tuple[tuple[Stage, int, float], ...]]:
        one = st.tuples(st.sampled_from(STAGES), st.sampled_from(kinds), st.sampled_from(ALPHAS))
        return st.lists(one, min_size=1, max_size=9).map(tuple)

    def of(geometry: Geometry, kinds: list[int]) -> st.SearchStrategy[Case]:
        return st.builds(
            Case, geometry=st.just(geometry), width=st.sampled_from([1, 2, 3, 5, 16, 31]),
            hidden=st.sampled_from([2, 4, 6]), rows=st.sampled_from([1, 2, 7, 63]),
            scale=st.sampled_from([1e-3, 1.0, 1e3]), seeds=seeds_of(kinds),
            objective=st.sampled_from(["desired_update", "reconstruction"]),
            draw=st.integers(0, 2**16),
        )  # fmt: skip

    # derandomised: the same cases in every run, so that a failure is one of the code
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(of("chunk", chunk), of("span", span)))
    def examine(case: Case) -> None:
        try:
            found = _examined(case, device)
        except _KinkError:
            counts["near a kink"] += 1
            return
        counts["cases"] += 1
        for name, (error, allowed) in found.items():
            key = name.partition(" ")[0]
            worst[key] = max(worst.get(key, 0.0), error)
            # a NaN is not within anything
            if not error <= allowed:
                problems.append(f"{name}: {error:.2g} of the largest, beyond {allowed:.2g}; {case}")

    examine()
    if counts["cases"] < examples // 2:
        problems.append(f"only {counts['cases']} of {examples} cases could be compared")
    notes = [f"largest error of {name}: {error:.2g}" for name, error in sorted(worst.items())]
    notes.append(f"{counts['near a kink']} sites lay too near a kink to be compared")
    return Finding(capped(problems), counts["cases"], notes=tuple(notes))


def _examined(case: Case, device: str) -> dict[str, tuple[float, float]]:
    """Error and what is allowed, by implementation, type and tensor."""
    layer, x, source, dy = _site(case)
    found: dict[str, tuple[float, float]] = {}
    for dtype, frac in ((torch.float32, FP32_FRAC), (torch.bfloat16, BF16_FRAC)):
        ins = [t if t is None else t.to(dtype) for t in (x, source, dy)]
        judge = copy.deepcopy(layer).double()
        wide = [t if t is None else t.double() for t in ins]
        _require_smooth(judge, wide[0], wide[1])
        right = passed(judge, "loop", *wide)
        twice = passed(judge, "vectorised", *wide)
        sizes = _sizes(judge, *wide)
        for name, truth in right.items():
            found[f"fp64 {name}"] = _error(twice[name], truth, sizes[name]), FP64_FRAC
        near = [t if t is None else t.to(device) for t in ins]
        there = copy.deepcopy(layer).to(device)
        for execution in EXECUTIONS:
            got = passed(there, execution, *near)
            for name, truth in right.items():
                # gradients of the pool and telemetry stay in fp32
                handed = name in ("output", "input", "source")
                # a rounded z moves a curved function by a share of z, however large that is
                curved = FP32_FRAC * max(1.0, case.scale / 10)
                allowed = max(frac, curved) if handed else curved
                kind = str(dtype).removeprefix("torch.")
                found[f"{execution}/{kind} {name}"] = (
                    _error(got[name].cpu(), truth, sizes[name]),
                    allowed,
                )
    return found


def _site(case: Case) -> tuple[KasminaLayer, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(case.draw)
    S = len(case.seeds)
    chunk = case.geometry == "chunk"
    channels = S * case.width if chunk else case.width
    layer = KasminaLayer(
        channels, S, geometry=case.geometry, hidden=case.hidden if chunk else None,
        in_features=None if chunk else 5,
    )  # fmt: skip
    layer.objective = case.objective  # type: ignore[assignment]
    layer.write_states([SeedState(stage, kind) for stage, kind, _ in case.seeds])
    with torch.no_grad():
        for weights in layer.pool():
            weights.normal_()
        # one that is grafted may still be at 0; one that is not, never is at anything else
        alphas = [a if stage in GRAFTED_STAGES else 0.0 for stage, _, a in case.seeds]
        layer.alpha.copy_(torch.tensor(alphas))
    x = case.scale * torch.randn(case.rows, channels)
    source = None if chunk else torch.randn(case.rows, 5)
    return layer, x, source, torch.randn(case.rows, channels)


def _require_smooth(layer: KasminaLayer, x: Tensor | None, source: Tensor | None) -> None:
    assert x is not None
    for seed in (layer.phi == Phi.RELU).nonzero().flatten().tolist():
        if source is None:
            read = x[:, seed * layer.fan_in : (seed + 1) * layer.fan_in]
            z = read @ layer.w_in[seed] + layer.bias[seed]
        else:
            z = source @ layer.w_in[seed] + layer.bias[seed]
        if bool((z.abs() < KINK_FRAC * z.abs().max()).any()):
            raise _KinkError


def passed(
    layer: KasminaLayer, execution: Execution, x: Tensor | None, source: Tensor | None,
    dy: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Output, every gradient and the shares explained, of one training pass of a copy."""
    assert x is not None
    layer = copy.deepcopy(layer)
    layer.execution = execution
    x = x.clone().requires_grad_()
    source = None if source is None else source.clone().requires_grad_()
    y = layer(x * 1, source)
    y.backward(dy)
    leaves = {"input": x, "w_in": layer.w_in, "bias": layer.bias, "w_out": layer.w_out}
    if source is not None:
        leaves["source"] = source
    # where nothing comes back, the gradient is 0
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
    told = torch.nan_to_num(layer.telemetry()["explained_frac"], nan=-7.0)
    return {"output": y.detach(), **grads, "telemetry": told}


def _sizes(
    layer: KasminaLayer, x: Tensor | None, source: Tensor | None, dy: Tensor | None
) -> dict[str, Tensor]:
    """What would come out if no terms cancelled and no function were flat.

    Rounding is a share of this. Far out on a GELU, the gradient itself is smaller than the rounding
    of the two terms that it is the difference of, in every implementation.
    """
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for weights in layer.pool():
            weights.abs_()
        flat = (layer.phi == Phi.DIAGONAL) | (layer.phi == Phi.ZERO)
        layer.phi.copy_(torch.where(flat, layer.phi, int(Phi.IDENTITY)))
    return passed(layer, "loop", *(t if t is None else t.abs() for t in (x, source, dy)))


def _error(actual: Tensor, truth: Tensor, least: Tensor | None = None) -> float:
    """Largest difference, as a share of the largest element of what is right, or of `least`."""
    if actual.shape != truth.shape:
        return math.inf
    difference = (actual.double() - truth.double()).abs().max()
    size = truth.double().abs().max()
    if least is not None:
        size = torch.maximum(size, least.double().abs().max())
    return float(difference / size) if size > 0 else float(difference)


def outputs(sizes: tuple[int, ...], device: str = "cpu") -> Finding:
    """The old interface's layer against the parallel one: output similarity, legacy run twice.

    Args:
        sizes: Numbers of seeds, each of 4 channels, half of them awake.
        device: Where both compute.
    """
    problems, notes, largest = list[str](), list[str](), 0.0
    for num_seeds in sizes:
        torch.manual_seed(num_seeds)
        old = legacy.SequentialLayer(8, 4 * num_seeds, num_seeds, hidden=4).to(device)
        new = KasminaLayer(4 * num_seeds, num_seeds, hidden=4).to(device).eval()
        kinds = [i for i, n in enumerate(BLUEPRINTS) if "chunk" in BLUEPRINTS[n].geometries]
        new.write_states(
            [
                SeedState(Stage.FINE_TUNING, kinds[i % len(kinds)]) if i % 2 else SeedState()
                for i in range(num_seeds)
            ]
        )
        with torch.no_grad():
            generator = torch.Generator().manual_seed(num_seeds)
            for seed in range(num_seeds):
                new.initialise({seed: generator}, outgoing=True)
                new.alpha[seed] = (seed % 2) * (1 + seed % 4) / 4
        old.copy_seeds(new)
        parallel = torch.nn.Sequential(old.default_transform, new)
        x = torch.randn(64, 8, device=device)
        judged = compare_models(parallel, old, x)
        notes.append(f"{num_seeds} seeds, new against legacy: {told(judged.treatment)}")
        notes.append(f"{num_seeds} seeds, legacy against itself: {told(judged.noise)}")
        for execution in EXECUTIONS:
            new.execution = execution
            with torch.no_grad():
                now, then = parallel(x), old(x)
            found = compare_runs(now, then, then).treatment
            largest = max(largest, found.max_abs)
            if not found.max_abs <= 1e-5:
                problems.append(f"{num_seeds} seeds, {execution}: differs by {found.max_abs:.2g}")
    return Finding(
        capped(problems), len(sizes) * len(EXECUTIONS),
        {"output_max_abs_difference": (largest, "1")}, tuple(notes),
    )  # fmt: skip


def laws(cases: int, device: str = "cpu") -> Finding:
    """Permuted seeds give permuted outputs; a split batch gives the same rows and gradients."""
    problems, asked = list[str](), 0
    for draw in range(cases):
        for execution in EXECUTIONS:
            case = Case("chunk", 3, 4, 12, 1.0, "desired_update", tuple(
                (Stage.FINE_TUNING, kind % len(BLUEPRINTS), (draw + kind) % 3 / 2)
                for kind in range(6)
            ), draw)  # fmt: skip
            layer, x, _, dy = _site(case)
            layer, x, dy = layer.to(device), x.to(device), dy.to(device)
            whole = passed(layer, execution, x, None, dy)
            for name, error in {
                "permuted": _permuted(layer, execution, x, dy, whole),
                "split": _split(layer, execution, x, dy, whole),
            }.items():
                asked += 1
                if not error <= 1e-5:
                    problems.append(f"{name}, {execution}, draw {draw}: {error:.2g}")
    return Finding(capped(problems), asked)


def _permuted(
    layer: KasminaLayer, execution: Execution, x: Tensor, dy: Tensor, whole: dict[str, Tensor]
) -> float:
    order = torch.randperm(layer.num_seeds)
    channels = torch.arange(layer.channels).view(layer.num_seeds, -1)[order].flatten()
    other = copy.deepcopy(layer)
    states = layer.states()
    other.write_states([states[i] for i in order.tolist()])
    with torch.no_grad():
        for mine, theirs in zip(other.pool(), layer.pool(), strict=True):
            mine.copy_(theirs[order])
        other.alpha.copy_(layer.alpha[order])
    got = passed(other, execution, x[:, channels], None, dy[:, channels])
    errors = [_error(got[n], whole[n][:, channels]) for n in ("output", "input")]
    return max(errors + [_error(got[n], whole[n][order]) for n in ("w_in", "bias", "w_out")])


def _split(
    layer: KasminaLayer, execution: Execution, x: Tensor, dy: Tensor, whole: dict[str, Tensor]
) -> float:
    halves = [
        passed(layer, execution, a, None, b) for a, b in zip(x.split(5), dy.split(5), strict=True)
    ]
    rows = [_error(torch.cat([h[n] for h in halves]), whole[n]) for n in ("output", "input")]
    total = {n: sum((h[n] for h in halves), torch.zeros(())) for n in ("w_in", "bias", "w_out")}
    return max(rows + [_error(t, whole[n]) for n, t in total.items()])
