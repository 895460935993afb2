"""Time whole models with and without seeds.

Usage: python experiments/benchmarks/bench_models.py [--json FILE] [--only layers,gpt,call]

* layers: six linear layers of width 4,096 with 1,024 awake chunk seeds each, T = 16,384, bf16: the
  legacy loop against the lattice, forward of the seeds alone and a whole training step.
* gpt: a GPT-2-small-sized host under `torch.compile`: bare, with 768 dormant seeds a layer, and
  with all of them awake. The three take turns, in random order within a block, so that drift
  cancels; the ratio to the bare host is taken within each block.
* call: one layer of 1,024 awake seeds at T = 32, called from Python: eager, compiled, replayed.

`python kernels/benchmarks/report.py FILE` renders the file.
"""

import argparse
import math
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpt import GPT, Size, make_optimizer
from torch import Tensor, nn

import esper
from esper.evidence.utilisation import Utilisation
from esper.seeds import legacy
from esper.seeds.blueprints import BLUEPRINTS, blueprint_id
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.optimizer import SeedOptimizer
from esper.seeds.state import SeedState, Stage
from esper_kernels.timing import (
    Call,
    Times,
    provenance,
    synchronize,
    time_cold,
    time_from_python,
    time_replayed,
    write_json,
)

Row = dict[str, Any]
WHAT_FORWARD, WHAT_STEP = "forward of the lattices", "training step"
FLOOR = "compile, nn.Hardtanh in place of the layer"


@dataclass(frozen=True)
class Scale:
    """Sizes of all parts; the defaults are those of the goals.

    Attributes:
        rows: T of the six layers.
        width: Their width.
        layers: How many there are.
        seeds: Seeds of each.
        gpt: The GPT host.
        blocks: Rounds over the three arms.
        steps: Timed steps of an arm in a round.
        busy_s: Seconds of training during which utilisation is read.
        backend: Of `torch.compile`.
    """

    rows: int = 16384
    width: int = 4096
    layers: int = 6
    seeds: int = 1024
    gpt: Size = field(default_factory=Size)
    blocks: int = 20
    steps: int = 3
    busy_s: float = 3.0
    backend: str = "inductor"


SMOKE = Scale(
    rows=8, width=8, layers=2, seeds=4, blocks=2, steps=1, busy_s=0.0, backend="eager",
    gpt=Size(layers=1, width=8, heads=2, vocabulary=16, positions=8, batch=2),
)  # fmt: skip


def main() -> int:
    """Run the benchmark; 1 if a part failed, 2 without a device."""
    args = _arguments()
    if not args.smoke and not torch.cuda.is_available():
        print("a CUDA device is needed; --smoke tests the script without one.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # three hosts of one class are three compilations of the same code
    torch._dynamo.config.recompile_limit = 64
    document = provenance("models") | {"smoke": args.smoke, "rows": []}
    failed = False
    for name in args.only:
        try:
            for row in PARTS[name](SMOKE if args.smoke else Scale(blocks=args.blocks), device):
                document["rows"].append({"part": name} | row)
                print({"part": name} | row, flush=True)
                if args.json:
                    write_json(args.json, document)
        except Exception as error:
            # the other parts are still worth having
            failed = True
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            document["rows"].append({"part": name, "failed": reason})
            print(f"{name} FAILED: {reason}", file=sys.stderr, flush=True)
        if args.json:
            write_json(args.json, document)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed)


def layers(scale: Scale, device: torch.device) -> Iterator[Row]:
    """Six layers: the legacy loop against the lattice."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(scale.rows, scale.width, device=device, dtype=dtype)
    host, lattice = _six_layers(scale, device, dtype)
    seeds = [a.layer for a in lattice.attached.values()]
    yield from _lattice_forward(seeds, x)
    yield from _lattice_steps(host, lattice, x, scale)
    old = [_legacy_layer(layer, scale, device, dtype) for layer in seeds]
    del host, lattice
    with torch.no_grad():
        ms = _in_ms(time_cold([partial(_seeds_alone, old, x)], budget_s=2.0))
    yield {"what": WHAT_FORWARD, "variant": "legacy", "ms": ms}
    model = nn.Sequential(*old)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = partial(_step, model, [optimizer], x)
    yield {"what": WHAT_STEP, "variant": "legacy", "ms": _in_ms(time_cold([step], 2.0))}


def gpt(scale: Scale, device: torch.device) -> Iterator[Row]:
    """The GPT host: bare, all seeds dormant, all seeds awake."""
    arms: dict[str, Arm] = {}
    for name in ("bare", "dormant", "active"):
        arms[name] = Arm(name, scale, device)
        arms[name].warm_up()
    samples: dict[str, list[list[float]]] = {name: [] for name in arms}
    for _ in range(scale.blocks):
        for name in random.sample(list(arms), len(arms)):
            samples[name].append(arms[name].time_steps(scale.steps))
    for name, arm in arms.items():
        times = Times.of([1e3 * ms for block in samples[name] for ms in block])
        pairs = zip(samples[name], samples["bare"], strict=True)
        ratios = [math.log(median(mine) / median(bare)) for mine, bare in pairs]
        over = Times.of([math.exp(ratio) for ratio in ratios])
        tokens = scale.gpt.batch * scale.gpt.positions
        yield {
            "arm": name,
            "step_ms": _in_ms(times),
            "over_bare": {"p20": over.p20, "p50": over.p50, "p80": over.p80},
            "tokens_per_s": round(tokens / (times.p50 * 1e-6)),
            "loss": round(arm.last_loss(), 3),
        } | arm.usage(scale.busy_s)


def call(scale: Scale, device: torch.device) -> Iterator[Row]:
    """One layer at T = 32, called from Python."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for mode in ("eval", "training"):
        layer = KasminaLayer(scale.width, scale.seeds, device=device)
        wake_all(layer)
        layer.train(mode == "training")
        x = torch.randn(32, scale.width, device=device, dtype=dtype)
        x.requires_grad_(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            yield {"variant": "eager", "mode": mode, "us": _from_python(partial(layer, x))}
            # what a compiled module costs that does next to nothing
            floor = torch.compile(nn.Hardtanh(), fullgraph=True, backend=scale.backend)
            yield {"variant": FLOOR, "mode": mode, "us": _from_python(partial(floor, x))}
            compiled = torch.compile(layer, fullgraph=True, backend=scale.backend)
            yield {"variant": "compile", "mode": mode, "us": _from_python(partial(compiled, x))}
            if device.type == "cuda":
                with_graph = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
                yield {
                    "variant": "compile, reduce-overhead",
                    "mode": mode,
                    "us": _from_python(partial(with_graph, x)),
                }
                replay = _captured(partial(layer, x))
                yield {"variant": "graph", "mode": mode, "us": _from_python(replay)}


PARTS: dict[str, Callable[[Scale, torch.device], Iterator[Row]]] = {
    "layers": layers,
    "gpt": gpt,
    "call": call,
}


class Arm:
    """One host with its optimizers, and its own share of the memory.

    Args:
        name: `bare`, `dormant` or `active`.
        scale: Sizes.
        device: Where.
    """

    def __init__(self, name: str, scale: Scale, device: torch.device) -> None:
        self._before_bytes = _allocated()
        # the same host in all arms
        torch.manual_seed(0)
        self.device = device
        model = GPT(scale.gpt).to(device)
        self.params = list(model.parameters())
        self.optimizers = [make_optimizer(self.params)]
        if name != "bare":
            width = scale.gpt.width
            lattice = esper.attach(model, "blocks.*.mlp", width, channels=width)
            self.optimizers.append(SeedOptimizer(lattice, lr=6e-4))
            self.params += list(lattice.parameters())
            if name == "active":
                for attached in lattice.attached.values():
                    # small enough to leave the host's own training alone
                    wake_all(attached.layer, size=0.02)
        self.model = torch.compile(model, backend=scale.backend)
        tokens = scale.gpt.batch, scale.gpt.positions + 1
        self.batches = [
            torch.randint(scale.gpt.vocabulary, tokens, device=device) for _ in range(4)
        ]
        self.steps = 0
        self.loss = torch.zeros(())

    def warm_up(self) -> None:
        """Compile, make the optimizers' state, and note what stays in memory."""
        for _ in range(5):
            self.step()
        synchronize()
        self._own_bytes = _allocated() - self._before_bytes

    def step(self) -> None:
        """One training step."""
        batch = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        with torch.autocast(self.device.type, torch.bfloat16):
            self.loss = self.model(batch[:, :-1], batch[:, 1:])
        self.loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def time_steps(self, number: int) -> list[float]:
        """Milliseconds of each of some steps in a row, after one that is not counted."""
        self.step()
        marks = [_mark()]
        for _ in range(number):
            self.step()
            marks.append(_mark())
        synchronize()
        return [_between_ms(a, b) for a, b in pairwise(marks)]

    def last_loss(self) -> float:
        """Loss of the last step, in nats."""
        return float(self.loss.detach())

    def usage(self, busy_s: float) -> Row:
        """Peak memory of this arm alone, and how busy the GPU is while it trains."""
        others_bytes = _allocated() - self._own_bytes
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step_ms = max(1e-3, *self.time_steps(1))
        with Utilisation() as busy:
            for _ in range(max(1, int(busy_s * 1e3 / step_ms))):
                self.step()
            synchronize()
        peak: float | str = "not available: a CUDA device is needed"
        if self.device.type == "cuda":
            peak = round((torch.cuda.max_memory_allocated() - others_bytes) / 2**30, 3)
        return {
            "peak_gib": peak, "sm_active_pct": busy.sm_active_pct, "nvml_pct": busy.nvml_pct,
        }  # fmt: skip


@torch.no_grad()
def wake_all(layer: KasminaLayer, blueprint: str = "mlp_relu", size: float = 0.5) -> None:
    """Wake every seed of a layer at once, with random weights and alpha 1.

    Args:
        layer: The layer.
        blueprint: What all of its seeds become.
        size: Of what a seed adds, over the size of its input, roughly.
    """
    awake = SeedState(Stage.FINE_TUNING, blueprint_id(blueprint))
    layer.write_states([awake] * layer.num_seeds)
    w_in, bias, w_out = layer.pool()
    w_in.normal_(std=layer.fan_in**-0.5)
    bias.normal_(std=0.1)
    w_out.normal_(std=size * layer.hidden**-0.5)
    layer.alpha.fill_(1.0)
    layer.progress.fill_(1.0)


def _six_layers(
    scale: Scale, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, esper.Lattice]:
    linears = (nn.Linear(scale.width, scale.width) for _ in range(scale.layers))
    host = nn.Sequential(*linears).to(device, dtype)
    lattice = esper.attach(host, "*", scale.seeds)
    for attached in lattice.attached.values():
        wake_all(attached.layer)
    return host, lattice


def _lattice_forward(seeds: list[KasminaLayer], x: Tensor) -> Iterator[Row]:
    """The lattices alone, one after the other on the last one's output."""
    source = x.clone().requires_grad_()
    for layer in seeds:
        layer.train()
    with_statistics, head = partial(_seeds_alone, seeds, source), {"what": WHAT_FORWARD}
    yield head | {
        "variant": "esper, eager, with statistics", "ms": _in_ms(time_cold([with_statistics])),
    }  # fmt: skip
    yield head | {
        "variant": "esper, graph replay, with statistics",
        "ms": _in_ms(time_replayed([with_statistics])),
    }
    for layer in seeds:
        layer.eval()
    with torch.no_grad():
        plain = partial(_seeds_alone, seeds, x)
        ms = _in_ms(time_replayed([plain]))
        yield head | {"variant": "esper, graph replay, eval mode", "ms": ms}
    for layer in seeds:
        layer.train()


def _lattice_steps(
    host: nn.Module, lattice: esper.Lattice, x: Tensor, scale: Scale
) -> Iterator[Row]:
    fused = x.is_cuda
    optimizers = [
        torch.optim.AdamW(lattice.host_parameters(), lr=1e-4, fused=fused),
        SeedOptimizer(lattice, lr=1e-4),
    ]
    compiled = torch.compile(host, backend=scale.backend)
    for variant, model in (("esper, eager", host), ("esper, torch.compile", compiled)):
        step = partial(_step, model, optimizers, x)
        ms = _in_ms(time_cold([step], budget_s=0.5))
        yield {"what": WHAT_STEP, "variant": variant, "ms": ms}
    lattice.detach()
    bare = torch.compile(host, backend=scale.backend)
    ms = _in_ms(time_cold([partial(_step, bare, optimizers[:1], x)], budget_s=0.5))
    yield {"what": WHAT_STEP, "variant": "bare host, torch.compile", "ms": ms}


def _legacy_layer(
    layer: KasminaLayer, scale: Scale, device: torch.device, dtype: torch.dtype
) -> legacy.SequentialLayer:
    """The legacy layer with the same seeds, and a linear layer of its own."""
    old = legacy.SequentialLayer(scale.width, scale.width, scale.seeds).to(device)
    weights = [w.detach().to(dtype).unbind() for w in layer.pool()]
    seeds: list[Any] = list(old.seeds)
    for i, seed in enumerate(seeds):
        # one by one `load_kernel` would take minutes
        seed.blueprint = BLUEPRINTS["mlp_relu"]
        seed.w1.data, seed.b1.data, seed.w2.data = (w[i].clone() for w in weights)
        old.set_seed_alpha(i, 1.0)
    old.default_transform.to(dtype)
    return old


def _seeds_alone(seeds: list[Any], x: Tensor) -> Tensor:
    """The seeds of one layer after the other; of a legacy layer without its linear part."""
    for layer in seeds:
        linear = getattr(layer, "default_transform", None)
        if linear is not None:
            layer.default_transform = nn.Identity()
        x = layer(x)
        if linear is not None:
            layer.default_transform = linear
    return x


def _step(
    model: Callable[[Tensor], Tensor], optimizers: list[torch.optim.Optimizer], x: Tensor
) -> None:
    loss = model(x).float().square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _captured(function: Call) -> Call:
    """Replays one call from a CUDA graph."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def _mark() -> torch.cuda.Event | float:
    """A point in the device's work, or in time where there is none."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_ms(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return 1e3 * (end - start)
    return float(start.elapsed_time(end))


def _from_python(function: Call) -> dict[str, float]:
    number = 200 if torch.cuda.is_available() else 2
    return time_from_python(function, calls_per_sample=number).as_row()


def _in_ms(times: Times) -> dict[str, float]:
    return {
        "p20": times.p20 / 1e3, "p50": times.p50 / 1e3, "p80": times.p80 / 1e3,
        "repeats": times.repeats,
    }  # fmt: skip


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS),
        help=f"parts: {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--blocks", type=int, default=Scale.blocks, help="rounds over the arms")
    args = parser.parse_args()
    if not set(args.only) <= set(PARTS):
        parser.error(f"--only must name some of {', '.join(PARTS)}, but got {args.only}.")
    return args


if __name__ == "__main__":
    sys.exit(main())
