"""What checkpoints cost a trial's training, with and without waiting for the disk.

    python experiments/benchmarks/bench_checkpoints.py --out docs/benchmarks/checkpoints_cpu.json

A block is some intervals of one shard, with a checkpoint before it that is written meanwhile
(`behind`), one that is waited for (`waited`), or none; blocks of the three kinds follow each other
in random order. The cost is what a block takes longer than one without, in seconds: the copy, and
what the writing thread takes from the training.

Not covered: GPUs; shared file systems.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from esper.config.run import RunConfig, TrainConfig
from esper.environment import code_hash, machine
from esper.evidence.records import write_text
from esper.shards.shard import KasminaShard, ShardSpec
from esper.surgery.checkpoint_folder import MANIFEST

# intervals from one checkpoint of `esper run` to the next
EVERY = 10
KINDS = ("none", "behind", "waited")


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run all blocks."""
    shard = KasminaShard(ShardSpec(run_config(args.hidden, args.steps), 0))
    shard.run_interval()
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    held: dict[str, list[float]] = {"behind": [], "waited": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        for _ in range(args.blocks):
            for kind in draw.sample(KINDS, len(KINDS)):
                started = time.perf_counter()
                if kind != "none":
                    shard.checkpoint(folder, {}, wait=kind == "waited")
                    held[kind].append(time.perf_counter() - started)
                for _ in range(args.every):
                    shard.run_interval()
                seconds[kind].append(time.perf_counter() - started)
                shard.settle()
        content = sum(f.stat().st_size for f in folder.iterdir())
        assert (folder / MANIFEST).exists()
    # blocks of one round are neighbours in time, on a machine that is not always as fast
    cost = {
        kind: spread([a - b for a, b in zip(seconds[kind], seconds["none"], strict=True)])
        for kind in ("behind", "waited")
    }
    step_s = statistics.median(seconds["none"]) / (args.every * args.steps)
    between = EVERY * TrainConfig.model_fields["interval_steps"].default
    return {
        "case": {
            "parameters": shard.health().parameters, "checkpoint_bytes": content,
            "steps_of_a_block": args.every * args.steps, "blocks": args.blocks,
            "threads": torch.get_num_threads(),
        },
        "block_s": {k: spread(v) for k, v in seconds.items()},
        "held_up_s": {k: spread(v) for k, v in held.items()},
        "cost_s": cost,
        "step_s": step_s,
        "steps_between_checkpoints_by_default": between,
        "cost_frac_by_default": {
            kind: {q: s / (step_s * between) for q, s in values.items()}
            for kind, values in cost.items()
        },
        "machine": machine(),
        "code_hash": code_hash(),
    }  # fmt: skip


def run_config(hidden: int, steps: int) -> RunConfig:
    """A wide perceptron with seeds, whose state is mostly weights and moments."""
    return RunConfig.model_validate({
        "task": {"name": "spirals", "options": {"train_samples": 1000}},
        "host": {"name": "mlp", "options": {"hidden": [hidden, hidden]}},
        "train": {"steps": 1_000_000, "batch_size": 256, "interval_steps": steps},
        "lattice": [{"sites": "fc*", "seeds_per_layer": 64, "hidden": 4}],
        "controller": {"name": "static"},
    })  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """The p20, p50 and p80."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="Width of the host's two layers.")
    parser.add_argument("--steps", type=int, default=10, help="Steps of an interval.")
    parser.add_argument("--every", type=int, default=1, help="Intervals of a block.")
    parser.add_argument("--blocks", type=int, default=60, help="Blocks of each kind.")
    parser.add_argument("--folder", help="Where checkpoints are written; a temporary folder.")
    parser.add_argument("--out", type=Path, required=True, help="JSON.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(given)
    write_text(given.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
