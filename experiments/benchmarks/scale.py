"""What one shard costs per seed, each formula of docs/scale.md against a measured case.

    python experiments/benchmarks/scale.py --out docs/benchmarks/scale_cpu.json

A perceptron with one hidden layer carries S chunk seeds on it, for growing S. Sizes in bytes are
counted and must match their formulas within 2 %; times are medians, and a straight line through
the smaller cases is compared with the largest. At last, a controller that sees only what each part
of the site would send up must decide as it does with the whole report.

Not covered: GPUs, networks, the training step itself (see kernels/benchmarks).
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper.config.run import RunConfig, build_options
from esper.controller import CONTROLLERS, Controller, Shield
from esper.environment import code_hash, machine
from esper.evidence.records import write_text
from esper.seeds.report import Report
from esper.seeds.state import Stage
from esper.shards.shard import KasminaShard, ShardSpec

# channels and hidden units of a seed, seeds of a wave
C, H, WAVE = 4, 4, 32
PARAMETERS = 2 * C * H + H
# formulas, in bytes for each seed; docs/scale.md says where each number is from
REPORT = 16 * 4
STATE = 16 + 5 * 4 + 3 * 1 + 3 * 4
DERIVED = 1 + 4 + 1 + 4 + 4 + 4
PROBE = 4 * (4 * C + 1)
HOST_PARAMETERS = 5 * C
# weights, gradient and two moments
MEMORY = 4 * 4 * (PARAMETERS + HOST_PARAMETERS) + STATE + DERIVED + 2 * PROBE
CHECKPOINT = 3 * 4 * (PARAMETERS + HOST_PARAMETERS) + STATE
# before the first seed wakes, the pool has neither gradient nor moments
ASLEEP = MEMORY - 3 * 4 * PARAMETERS
FORMULAS = {
    "report_bytes": REPORT,
    "memory_asleep_bytes": ASLEEP,
    "memory_bytes": MEMORY,
    "snapshot_bytes": CHECKPOINT,
    "checkpoint_bytes": CHECKPOINT,
    "all_reduce_bytes_an_interval": PROBE,
}


def measure(seeds: int, repeats: int) -> tuple[dict[str, float], Report]:
    """Bytes and seconds of one shard with so many seeds; its last report."""
    config = RunConfig.model_validate({
        "task": {"name": "spirals", "options": {"held_out_samples": 32, "test_samples": 32}},
        "host": {"name": "mlp", "options": {"hidden": [seeds * C]}},
        "train": {"steps": 10**6, "batch_size": 16, "optimizer": "adam", "interval_steps": 2},
        "lattice": [{"sites": "fc1", "seeds_per_layer": seeds, "hidden": H}],
        "growth": {"ramp_steps": 4, "training_intervals": 0},
        "controller": {"name": "tamiyo"},
    })  # fmt: skip
    shard = KasminaShard(ShardSpec(config, 0))
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = call()
        times.setdefault(f"{name}_s", []).append(time.perf_counter() - started)
        return result

    # the optimizer has its moments after a step, and every seed its score after an interval
    report = shard.run_interval()
    asleep = count(held(shard))
    for _ in range(repeats):
        actions = timed("decide", lambda: decide(config, report))
        assert isinstance(actions, list)
        # each seed of the wave germinates, is promoted and begins its graft
        assert len(actions) == 3 * WAVE
        timed("health", shard.health)
        timed("digest", shard.digest)
        timed("report", lambda: shard.trainer.lattice.report(1.0))
    timed("apply", lambda: shard.apply(actions))
    # what a rollback would go back to is counted by itself
    shard.trainer.past.clear()
    shard.run_interval()
    memory = count(held(shard))
    probes = [a.layer.probe for a in shard.trainer.lattice.attached.values()]
    snapshot = shard.trainer._snapshot(None)
    with tempfile.TemporaryDirectory() as folder:
        shard.checkpoint(folder, {})
        checkpoint = sum(f.stat().st_size for f in Path(folder).iterdir())
    sizes = {
        "report_bytes": len(pickle.dumps(report, protocol=5)),
        "memory_asleep_bytes": asleep,
        "memory_bytes": memory,
        "snapshot_bytes": count(tensors_in([snapshot.model, snapshot.optimizer["state"]])),
        "checkpoint_bytes": checkpoint,
        "all_reduce_bytes_an_interval": count(probes),
        "digest_bytes": len(pickle.dumps(shard.digest())),
        "action_bytes": len(pickle.dumps(actions, protocol=5)) / len(actions),
    }
    shard.close()
    return {**sizes, **{k: statistics.median(v) for k, v in times.items()}}, report


def count(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def tensors_in(nested: Iterable[Mapping[object, object]]) -> Iterator[Tensor]:
    """The tensors of nested dictionaries, but for counters of one number."""
    for mapping in nested:
        for value in mapping.values():
            if isinstance(value, Mapping):
                yield from tensors_in([value])
            elif torch.is_tensor(value) and value.numel() > 1:
                yield value


def trained(shard: KasminaShard) -> Iterator[Tensor]:
    """Every parameter that the optimizer holds."""
    return (p for group in shard.trainer.optimizer.param_groups for p in group["params"])


def held(shard: KasminaShard) -> Iterator[Tensor]:
    """Every tensor that a shard holds between two steps, but for its data."""
    trainer = shard.trainer
    yield from trained(shard)
    yield from (p.grad for p in trained(shard) if p.grad is not None)
    yield from trainer.model.buffers()
    yield from tensors_in(trainer.optimizer.state.values())
    for attached in trainer.lattice.attached.values():
        probe = attached.layer.probe
        yield from (probe, *([] if probe.grad is None else [probe.grad]))


def controller(config: RunConfig) -> Controller:
    """Tamiyo, who finds a plateau at once."""
    options = {"seeds_per_wave": WAVE, "patience_intervals": 1, "min_improvement_frac": 0.99}
    plugin = config.controller.model_copy(update={"options": options})
    return Shield(build_options(CONTROLLERS, plugin, "controller").build(0))


def decide(config: RunConfig, report: Report) -> list[object]:
    """The second decision on the same report, which is a plateau's; the first takes no wave."""
    tamiyo = controller(config)
    # the first sight of a loss is an improvement, and costs no wave
    tamiyo.decide(replace(report, sites=()))
    return list(tamiyo.decide(report))


def candidates(report: Report, parts: int) -> tuple[Report, int]:
    """The report without the dormant seeds that no part would send up, and how many are left.

    A part sends its `WAVE` best: no other can be among the `WAVE` best of all.
    """
    (site,) = report.sites
    kept = np.concatenate([
        part[np.argsort(-site.grad_energy[part], kind="stable")[:WAVE]]
        for part in np.array_split(np.arange(len(site.stage)), parts)
    ])  # fmt: skip
    stage = np.full_like(site.stage, Stage.FOSSILIZED)
    stage[kept] = site.stage[kept]
    return replace(report, sites=(replace(site, stage=stage),)), len(kept)


def check(cases: dict[int, dict[str, float]]) -> list[dict[str, object]]:
    """Every formula, and every straight line, against what was measured.

    Raises:
        ValueError: If a formula is wrong by more than 2 %.
    """
    found: list[dict[str, object]] = []
    *small, largest = cases
    for name in cases[largest]:
        measured = cases[largest][name]
        if name in FORMULAS:
            said, kind = FORMULAS[name] * largest, f"{FORMULAS[name]} bytes a seed"
            if abs(measured / said - 1) > 0.02:
                raise ValueError(
                    f"{name} of {largest} seeds must be {said} by its formula, but is {measured}; "
                    "correct the formula here and in docs/scale.md."
                )
        else:
            slope, start = np.polyfit(small, [cases[s][name] for s in small], 1)
            said, kind = start + slope * largest, f"{start:.3g} + {slope:.3g} a seed"
        found.append({"quantity": name, "said": said, "measured": measured, "formula": kind})
    return found


def main() -> None:
    """Measure, check, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[16384, 65536, 262144, 1048576])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--parts", type=int, default=64, help="Shards that would share the site.")
    parser.add_argument("--out", type=Path, required=True, help="JSON.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[int, dict[str, float]] = {}
    for seeds in args.seeds:
        cases[seeds], report = measure(seeds, args.repeats)
        print(seeds, {k: float(f"{v:.4g}") for k, v in cases[seeds].items()}, flush=True)
    config = RunConfig.model_validate({
        "task": {"name": "spirals"}, "host": {"name": "mlp"},
        "train": {"steps": 100}, "controller": {"name": "tamiyo"},
    })  # fmt: skip
    brief, kept = candidates(report, args.parts)
    if decide(config, brief) != decide(config, report):
        raise ValueError("candidates must give the decisions of the whole report, but do not.")
    found = check(cases)
    result = {
        "cases": {str(k): v for k, v in cases.items()},
        "checks": found,
        "candidates": {"parts": args.parts, "seeds": max(cases), "sent": kept, "wave": WAVE},
        "machine": machine(),
        "code_hash": code_hash(),
    }
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    for line in found:
        print(
            f"{line['quantity']:>28}  said {line['said']:.4g}  measured {line['measured']:.4g}"
            f"  ({line['formula']})"
        )
    print(f"{kept} candidates of {max(cases)} seeds gave the same wave")


if __name__ == "__main__":
    main()
