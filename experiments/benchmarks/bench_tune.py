"""Searchers and schedulers of `esper tune` against each other, at the same budget of steps.

    python experiments/benchmarks/bench_tune.py configs/tune/spirals.yaml --seeds 8 \
        --out docs/benchmarks/tune_cpu.json

For each seed, every way searches the same space for the same run; what counts is the best value of
the search's metric that it found. That is no test of what was found: `esper tune` makes that.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from esper.config.tune import Asha, Pbt, TuneConfig, load_tune
from esper.environment import code_hash, machine
from esper.evidence.paired import one_sided
from esper.evidence.records import write_text
from esper_experiments.tuning import run_search


def ways(search: TuneConfig) -> dict[str, TuneConfig]:
    """The same search in other ways."""
    run = search.candidate({}).train
    asha = search.asha or Asha(grace_steps=run.steps // 4)
    pbt = search.pbt or Pbt(every_steps=run.steps // 4)
    changes: dict[str, dict[str, Any]] = {
        "random": {"search": "random", "asha": None, "pbt": None},
        "optuna": {"search": "optuna", "asha": None, "pbt": None},
        "random and asha": {"search": "random", "asha": asha, "pbt": None},
        "optuna and asha": {"search": "optuna", "asha": asha, "pbt": None},
        "pbt": {"search": "random", "asha": None, "pbt": pbt},
    }
    return {name: search.model_copy(update=change) for name, change in changes.items()}


def main() -> None:
    """Search, compare with the first way, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="JSON.")
    args = parser.parse_args()
    base = load_tune(args.config)
    found: dict[str, list[float]] = {}
    used: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(base.seed, base.seed + args.seeds):
            for name, way in ways(base).items():
                search = way.model_copy(update={"seed": seed, "output_dir": Path(folder)})
                end = run_search(search)
                value = end.candidates[end.best].value
                assert value is not None
                found.setdefault(name, []).append(value)
                used.setdefault(name, []).append(end.used_steps)
                print(f"seed {seed}, {name}: {value:.4g} in {end.used_steps} steps", flush=True)
    first, *others = found
    # how likely differences like these are if both ways were alike
    compared = {
        name: one_sided([a - b for a, b in zip(found[name], found[first], strict=True)])
        for name in others
    }
    p_values = {n: min(1.0, 2 * min(c.greater, c.less)) for n, c in compared.items()}
    result = {
        "config": base.model_dump(mode="json"),
        "best": found,
        "used_steps": used,
        "against": first,
        "p_two_sided": p_values,
        "machine": machine(),
        "code_hash": code_hash(),
    }
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    for name, values in found.items():
        p = "" if name == first else f"  p {p_values[name]:.3g} against {first}"
        print(
            f"{name:>16}  median {statistics.median(values):.4g}  worst {max(values):.4g}"
            f"  mean steps {statistics.mean(used[name]):,.0f}{p}"
        )


if __name__ == "__main__":
    main()
