"""What shards cost and what they gain: in an actor, on several devices, and in a sweep.

    python experiments/benchmarks/bench_shards.py --out shards.json [--only actor,sweep]

* actor: a GPT-2-small-sized host with 768 awake seeds a layer, in this process and in an actor;
  blocks of some intervals take turns. What an interval takes outside of its training steps.
* scaling: the same host over 1, 2, ... shards. Strong: they share one batch. Weak: each has a batch
  of its own. The share of the all-reduce that is hidden compares three ways to run N shards: with
  gradients in buckets while the backward pass goes on, in one message after it, and N shards that
  know nothing of each other. And what a message costs by its size.
* killed: a small network over N shards, of which one is killed with signal 9 in the middle, against
  the same run undisturbed.
* sweep: 64 trials by fractions of the GPUs, of a large and of a small network; in one
  sweep a process is lost to signal 9. Busy is NVML's utilisation: the share of time in which any
  kernel ran.

Without a GPU everything is tiny and shards are processes of one CPU each: that shows that the
script works, and what messages cost over gloo, and nothing about GPUs. Figures are p20, p50, p80.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from bench_models import wake_all
from gpt import Size

from esper.config.run import RunConfig
from esper.config.shards import ShardsConfig
from esper.config.sweep import Resources, SweepConfig
from esper.environment import code_hash, fingerprint, machine
from esper.evidence.progress import Progress
from esper.evidence.records import Fingerprint, read_records, write_text
from esper.evidence.utilisation import Utilisation
from esper.shards.group import ShardGroup, groups
from esper.shards.shard import KasminaShard, Shard, ShardSpec
from esper.supervision import run_through
from esper.trial import Trial, TrialSpec
from esper_experiments.ray_variables import set_variables
from esper_experiments.room import start_ray, stop_ray
from esper_experiments.sweep import SweepResult, run_sweep
from esper_experiments.watcher import Watcher
from esper_kernels.timing import synchronize

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
# larger than any model's gradients: one message after the backward pass
ONE_MESSAGE_MIB = 1e6
POLL_S = 0.05
MESSAGES_BYTES = tuple(4**k for k in range(3, 14))


@dataclass(frozen=True)
class Scale:
    """Sizes; the defaults are those of GPUs.

    Attributes:
        device: Of the shards.
        size: Of the host, with the batch of one shard.
        counts: Numbers of shards.
        steps: Of an interval.
        rounds: Intervals of each kind.
        bucket_mib: Of messages that overlap.
        networks: Of the sweeps: name, width, steps of full batches, share of a GPU of each trial.
            A process is killed in one of that name.
        pairs: Of the sweeps.
        cpus: Of the machine.
    """

    device: str = "cuda"
    size: Size = field(default_factory=Size)
    counts: tuple[int, ...] = (1,)
    steps: int = 4
    rounds: int = 8
    bucket_mib: float = 25.0
    networks: tuple[tuple[str, int, int, float], ...] = (
        ("one killed", 4096, 300, 0.0625),
        ("large", 4096, 300, 0.0625),
        ("small", 256, 1000, 0.05),
    )
    pairs: int = 32
    cpus: int = os.cpu_count() or 1


TINY = Scale(
    device="cpu",
    size=Size(layers=2, width=64, heads=2, vocabulary=256, positions=32, batch=4),
    counts=(1, 2),
    steps=4,
    rounds=8,
    bucket_mib=0.125,
    networks=(("one killed", 16, 100, 0.0), ("undisturbed", 16, 100, 0.0)),
    cpus=2,
)


def main() -> int:
    """Run the parts; 1 if one failed."""
    args = _arguments()
    gpus = torch.cuda.device_count()
    scale = TINY if not gpus else Scale(counts=tuple(n for n in (1, 2, 4, 8) if n <= gpus))
    # workers import the host from here
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    if args.networks:
        kept = tuple(n for n in scale.networks if n[0] in args.networks)
        scale = dataclasses.replace(scale, networks=kept)
    set_variables()
    document: Row = {
        "machine": {**machine(scale.device), "gpus": gpus},
        "code_hash": code_hash(),
        "torch": torch.__version__,
        "scale": asdict(scale),
        "rows": [],
    }
    failed = False
    for name in args.only:
        try:
            for row in PARTS[name](scale):
                document["rows"].append({"part": name} | row)
                print(json.dumps({"part": name} | row), flush=True)
                write_text(args.out, json.dumps(document, indent=1) + "\n")
        except Exception as error:
            # the other parts are still worth having
            failed = True
            traceback.print_exc()
            document["rows"].append({"part": name, "failed": f"{type(error).__name__}: {error}"})
            write_text(args.out, json.dumps(document, indent=1) + "\n")
    print(_table(document["rows"]))
    return int(failed)


def actor(scale: Scale) -> Iterator[Row]:
    """One shard in this process and one in an actor take turns on the same device."""
    with _ray(scale), tempfile.TemporaryDirectory() as folder:
        spec = spec_of(scale, scale.size.batch, scale.size.batch)
        here: Shard = awake(spec)
        here.checkpoint(folder, {})
        there = ShardGroup(spec, shards_config(scale, 1, share=0.5))
        there.restore(folder)
        kinds = {"in this process": here, "in an actor": there}
        for shard in kinds.values():
            interval(shard)
        taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for i in range(scale.rounds):
            for kind in sorted(kinds, reverse=bool(i % 2)):
                taken[kind].append(interval(kinds[kind]))
        same = digest_of(here) == digest_of(there)
        for kind, shard in kinds.items():
            yield {
                "where": kind,
                "parameters": shard.health().parameters,
                "awake_seeds": shard.health().active_seeds,
                "step_ms": spread([1e3 * train / scale.steps for train, _ in taken[kind]]),
                "outside_ms": spread([1e3 * (wall - train) for train, wall in taken[kind]]),
                "same_bits_as_the_other": same,
            }
            shard.close()


def scaling(scale: Scale) -> Iterator[Row]:
    """Strong and weak scaling, the hidden share of the all-reduce, and a shard that is killed."""
    most, batch = max(scale.counts), scale.size.batch
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "state"
        first = awake(spec_of(scale, batch, batch * most))
        first.checkpoint(folder, {})
        first.close()
        del first
        if scale.device == "cuda":
            torch.cuda.empty_cache()
        with _ray(scale):
            alone = 0.0
            for count in scale.counts:
                for kind, whole in (("weak", batch * count), ("strong", batch)):
                    if whole % count or (kind == "strong" and count == 1):
                        continue
                    row = _scaled(scale, folder, count, kind, whole)
                    alone = alone or row["step_ms"]["p50"]
                    ideal = alone / (1 if kind == "weak" else count)
                    yield row | {"efficiency": ideal / row["step_ms"]["p50"]}
            if most > 1:
                spec = spec_of(scale, batch, batch * most)
                with _group(spec, shards_config(scale, most), folder) as group:
                    yield {"kind": "messages", "shards": most} | _messages(group)


def killed(scale: Scale) -> Iterator[Row]:
    """One of N shards is killed in the middle of a run, which goes on from its checkpoint."""
    with tempfile.TemporaryDirectory() as scratch, _ray(scale):
        for count in scale.counts:
            yield _killed(scale, count, Path(scratch) / str(count))


def sweep(scale: Scale) -> Iterator[Row]:
    """64 trials by fractions."""
    for name, width, steps, share in scale.networks:
        with tempfile.TemporaryDirectory() as scratch:
            config = sweep_config(scale, Path(scratch), width, steps, share)
            # what a lost process costs would hide what the others leave unused
            killer, busy = _Killer(kills="killed" in name), _Busy(torch.cuda.device_count())
            with busy, Utilisation() as usage:
                result = run_sweep(config, killer)
            yield _swept(config, result, killer, busy) | {
                "network": name, "width": width, "gpus_per_trial": share,
                "sm_active_pct_of_first_gpu": usage.sm_active_pct,
            }  # fmt: skip


PARTS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "actor": actor,
    "scaling": scaling,
    "killed": killed,
    "sweep": sweep,
}


def spec_of(scale: Scale, batch: int, sequences: int) -> ShardSpec:
    """A run of the host with as many seeds a layer as it is wide."""
    size = asdict(scale.size)
    del size["batch"]
    tokens = {"vocabulary": scale.size.vocabulary, "positions": scale.size.positions}
    return ShardSpec(RunConfig.model_validate({
        "plugins": ["shard_host"],
        "device": scale.device,
        "task": {"name": "random_tokens", "options": {**tokens, "sequences": sequences}},
        "host": {"name": "factory", "options": {"path": "shard_host:build", "arguments": size}},
        "train": {
            "steps": 1_000_000, "batch_size": batch, "interval_steps": scale.steps,
            "optimizer": "adamw", "learning_rate": 6e-4,
        },
        "lattice": [{
            "sites": "blocks.*.mlp", "seeds_per_layer": scale.size.width,
            "channels": scale.size.width,
        }],
        "controller": {"name": "static"},
    }), 0)  # fmt: skip


def shards_config(
    scale: Scale, count: int, share: float = 1.0, bucket_mib: float | None = None
) -> ShardsConfig:
    """Shards with a device each, or a share of one."""
    return ShardsConfig(
        count=count,
        cpus_per_shard=1.0,
        gpus_per_shard=share if scale.device == "cuda" else 0.0,
        bucket_mib=bucket_mib or scale.bucket_mib,
        timeout_s=180.0,
    )


def awake(spec: ShardSpec) -> KasminaShard:
    """A shard in this process, all of whose seeds are awake."""
    shard = KasminaShard(spec)
    for attached in shard.trainer.lattice.attached.values():
        # small enough to leave the host's own training alone
        wake_all(attached.layer, size=0.02)
    return shard


def interval(shard: Shard) -> tuple[float, float]:
    """Seconds of training, and of all that a trial asks of a shard in an interval."""
    before, started = shard.health().cost.seconds, time.perf_counter()
    shard.run_interval()
    shard.apply([])
    shard.evaluate("held_out")
    health = shard.health()
    return health.cost.seconds - before, time.perf_counter() - started


def digest_of(shard: Any) -> Any:
    """What tells two shards apart."""
    return shard.digest() if isinstance(shard, KasminaShard) else shard._ask_first("digest")


def spread(values: Sequence[float]) -> dict[str, float]:
    """The p20, p50 and p80."""
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), float(values[0]))
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def _scaled(scale: Scale, folder: Path, count: int, kind: str, whole: int) -> Row:
    """Step time of `count` shards that share a batch, with and without overlap, and apart."""
    sequences = scale.size.batch * max(scale.counts)
    spec = spec_of(scale, whole, sequences)
    part = spec_of(scale, whole // count, sequences)
    row: Row = {"kind": kind, "shards": count, "batch": whole}
    times: dict[str, list[float]] = {}
    for way in ("overlapped", "after") if count > 1 else ("overlapped",):
        mib = scale.bucket_mib if way == "overlapped" else ONE_MESSAGE_MIB
        with _group(spec, shards_config(scale, count, bucket_mib=mib), folder) as group:
            times[way] = [interval(group)[0] / scale.steps for _ in range(scale.rounds + 1)][1:]
    row["step_ms"] = spread([1e3 * s for s in times["overlapped"]])
    if count == 1:
        return row
    times["apart"] = _apart(scale, part, count, folder)
    after, overlapped, apart = (
        statistics.median(times[k]) for k in ("after", "overlapped", "apart")
    )
    row["after_ms"] = spread([1e3 * s for s in times["after"]])
    row["apart_ms"] = spread([1e3 * s for s in times["apart"]])
    # of a message that costs next to nothing, no share can be told
    told = after > 1.02 * apart
    row["hidden_frac"] = (after - overlapped) / (after - apart) if told else None
    return row


def _apart(scale: Scale, part: ShardSpec, count: int, folder: Path) -> list[float]:
    """Seconds a step of as many shards at the same time that know nothing of each other."""
    config = shards_config(scale, 1)
    shards = [ShardGroup(part, config) for _ in range(count)]
    try:
        for shard in shards:
            shard.restore(folder)
        found: list[float] = []
        for _ in range(scale.rounds + 1):
            with ThreadPoolExecutor(count) as threads:
                taken = list(threads.map(interval, shards))
            found.append(max(train for train, _ in taken) / scale.steps)
        return found[1:]
    finally:
        for shard in shards:
            shard.close()


@contextmanager
def _group(spec: ShardSpec, config: ShardsConfig, folder: Path) -> Iterator[ShardGroup]:
    """A group that goes on from a checkpoint, and is ended."""
    group = ShardGroup(spec, config)
    try:
        group.restore(folder)
        yield group
    finally:
        group.close()


def _messages(group: ShardGroup) -> Row:
    """What a message costs by its size."""
    refs = [actor.__ray_call__.remote(_time_messages) for actor in group._actors]
    return {"us_by_bytes": ray.get(refs)[0]}


def _time_messages(shard_actor: Any) -> dict[int, dict[str, float]]:
    """Runs in an actor: all-reduce some sizes, one message after the other."""
    device = shard_actor._shard._device
    found: dict[int, dict[str, float]] = {}
    for size in MESSAGES_BYTES:
        tensor = torch.zeros(size // 4, device=device)
        taken = []
        for _ in range(22):
            dist.barrier()
            synchronize()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            synchronize()
            taken.append(1e6 * (time.perf_counter() - started))
        found[size] = spread(taken[2:])
    return found


def _killed(scale: Scale, count: int, folder: Path) -> Row:
    """Kill one of some shards in the middle; and the same run undisturbed."""
    config = RunConfig.model_validate({
        "device": scale.device,
        "task": {"name": "digits"},
        "host": {"name": "mlp", "options": {"hidden": [256, 256]}},
        "train": {"steps": 400, "batch_size": 600, "interval_steps": 50},
        "lattice": [{"sites": "fc*", "seeds_per_layer": 128}],
        # what is woken stays
        "growth": {
            "ramp_steps": 50, "training_intervals": 0, "min_gain": -1e9,
            "max_instability_frac": 1e9, "max_drift_frac": 1e9,
        },
        "controller": {"name": "random", "options": {"at_intervals": [1, 3], "count": 8}},
    })  # fmt: skip
    mark = Fingerprint(**fingerprint(scale.device))
    shards = groups(shards_config(scale, count))
    found: dict[str, Any] = {}
    for what in ("undisturbed", "killed"):
        lost: list[float] = []
        back: list[float] = []

        def disturb(trial: Trial, what: str = what, lost: list[float] = lost,
                    back: list[float] = back) -> None:  # fmt: skip
            if what == "killed" and not lost and len(trial.curves["step"]) == 5:
                lost.append(time.monotonic())
                os.kill(trial.shard.pids[-1], signal.SIGKILL)  # type: ignore[attr-defined]
            elif lost and not back:
                back.append(time.monotonic())

        trial = Trial(config, TrialSpec("bench", 0, 0, 0, "none", mark), shards=shards)
        ended, record = run_through(trial, folder / what, every=2, retries=1, on_interval=disturb)
        ended.shard.close()
        found[what] = record
        if what == "killed":
            found["seconds"] = back[0] - lost[0]
    a, b = found["undisturbed"], found["killed"]
    return {
        "shards": count,
        "transitions": len(a.transitions),
        "seconds_until_an_interval_was_done_again": found["seconds"],
        "same_decisions": [str(t) for t in a.transitions] == [str(t) for t in b.transitions],
        "same_losses": a.curves["train_loss"] == b.curves["train_loss"],
        "largest_difference_of_a_loss": max(
            abs(x - y) for x, y in zip(a.curves["train_loss"], b.curves["train_loss"], strict=True)
        ),
    }


def sweep_config(scale: Scale, folder: Path, width: int, steps: int, share: float) -> SweepConfig:
    """Pairs of a host alone and one that grows, on the digits, in full batches."""
    slots = scale.cpus if not share else round(torch.cuda.device_count() / share)
    seeds = min(128, width)
    return SweepConfig.model_validate({
        "name": "shards",
        "pairs": scale.pairs,
        "run": {
            "device": scale.device,
            "task": {"name": "digits"},
            "host": {"name": "mlp", "options": {"hidden": [width, width]}},
            "train": {"steps": steps, "interval_steps": 50, "learning_rate": 0.001},
            "lattice": [{"sites": "fc*", "seeds_per_layer": seeds}],
            "growth": {"ramp_steps": 50},
        },
        "arms": {
            "host": {"lattice": []},
            "esper": {"controller": {"name": "tamiyo", "options": {
                "patience_intervals": 1, "min_improvement_frac": 0.2, "seeds_per_wave": 4,
            }}},
        },
        "question": {
            "treatment": "esper", "control": "host", "metric": "test_accuracy", "margin": 0.01,
        },
        "resources": {
            "gpus_per_trial": share, "cpus_per_trial": math.floor(100 * scale.cpus / slots) / 100,
            "num_cpus": scale.cpus, "checkpoint_s": 5.0,
        },
        "mlflow": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
        "output_dir": str(folder),
    })  # fmt: skip


class _Killer(Watcher):
    """Kills the process of a running trial once a third of them have ended."""

    def __init__(self, kills: bool) -> None:
        self._kills, self.killed = kills, ""
        self.failures = 0

    def changed(self, progress: Progress) -> None:
        """See `Watcher.changed`."""
        self.failures = sum(t.failures for t in progress.trials.values())
        if (
            self.killed
            or not self._kills
            or 3 * progress.counts()["finished"] < len(progress.trials)
        ):
            return
        for name, trial in progress.trials.items():
            if trial.state == "running" and trial.place and trial.step:
                self.killed = name
                os.kill(int(trial.place.split("pid ")[1].split()[0]), signal.SIGKILL)
                return


class _Busy:
    """NVML's utilisation of all GPUs over time."""

    def __init__(self, gpus: int) -> None:
        self._gpus, self._stop = gpus, threading.Event()
        self._samples: list[tuple[float, float]] = []

    def __enter__(self) -> "_Busy":
        if self._gpus:
            self._nvml: Any = import_module("pynvml")
            self._nvml.nvmlInit()
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._gpus:
            self._thread.join()

    def _poll(self) -> None:
        handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._gpus)]
        while not self._stop.wait(POLL_S):
            rates = [self._nvml.nvmlDeviceGetUtilizationRates(h).gpu for h in handles]
            self._samples.append((time.time(), sum(rates) / len(rates)))

    def between(self, first: float, last: float) -> float | str:
        """Mean in percent."""
        found = [rate for at, rate in self._samples if first <= at <= last]
        return round(statistics.fmean(found), 1) if found else "not available: no GPU"


def _swept(config: SweepConfig, result: SweepResult, killer: _Killer, busy: _Busy) -> Row:
    records = read_records(result.folder)
    begins = sorted(r.started_at.timestamp() for r in records)
    ends = sorted(r.ended_at.timestamp() for r in records)
    share = config.resources.gpus_per_trial
    slots = round(torch.cuda.device_count() / share) if share else config.resources.num_cpus or 1
    # from when all places were taken to when the first of them stayed empty
    full = begins[min(slots, len(begins)) - 1], ends[-min(slots, len(ends))]
    spans = [(r.started_at.timestamp(), r.ended_at.timestamp()) for r in records]
    trial_s = [end - begin for begin, end in spans]
    worked = sum(max(0.0, min(end, full[1]) - max(begin, full[0])) for begin, end in spans)
    followed = sum(full[0] < begin < full[1] for begin, _ in spans)
    return {
        "trials": len(records),
        "at_once": slots,
        "killed": killer.killed,
        "workers_lost": killer.failures,
        "verdict": result.verdicts[0].verdict,
        "wall_s": result.timing.wall_seconds,
        "start_s": result.timing.start_seconds,
        "overhead_s_per_trial": result.timing.overhead_seconds_per_trial,
        "overhead_s_per_trial_of_warm_workers": (
            (slots * (full[1] - full[0]) - worked) / followed if followed else None
        ),
        "trial_s": spread(trial_s),
        "places_taken_frac": sum(trial_s) / (slots * (ends[-1] - begins[0])),
        "nvml_busy_pct": busy.between(begins[0], ends[-1]),
        "nvml_busy_pct_while_all_places_are_taken": busy.between(*full),
    }


@contextmanager
def _ray(scale: Scale) -> Iterator[None]:
    """Ray on this machine, for a part."""
    start_ray(Resources(num_cpus=max(scale.cpus, 2)))
    try:
        yield
    finally:
        stop_ray()


def _or_none(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['part']:8} FAILED {row['failed'][:90]}")
        elif row["part"] == "actor":
            lines.append(
                f"actor    {row['where']:16} step {row['step_ms']['p50']:9.2f} ms   outside of "
                f"training {row['outside_ms']['p50']:8.2f} ms an interval"
            )
        elif row["part"] == "sweep":
            lines.append(
                f"sweep    {row['network']:11} {row['trials']} trials, {row['at_once']} at once, "
                f"{row['wall_s']:.0f} s, overhead a trial {row['overhead_s_per_trial']:.2f} s, of "
                f"warm workers {_or_none(row['overhead_s_per_trial_of_warm_workers'])} s, "
                f"busy {row['nvml_busy_pct']} %, all places taken "
                f"{row['nvml_busy_pct_while_all_places_are_taken']} %, {row['verdict']}"
            )
        elif row["part"] == "killed":
            lines.append(
                f"killed   one of {row['shards']} shards: "
                f"{row['seconds_until_an_interval_was_done_again']:.1f} s until an interval was "
                f"done again, same decisions {row['same_decisions']}, losses {row['same_losses']}"
            )
        elif "step_ms" in row:
            hidden = row.get("hidden_frac")
            lines.append(
                f"scaling  {row['kind']:6} {row['shards']} shards  "
                f"step {row['step_ms']['p50']:9.2f} ms  efficiency {row['efficiency']:.3f}"
                + ("" if hidden is None else f"  hidden {hidden:.2f}")
            )
        elif "us_by_bytes" in row:
            times = [
                f"{int(n) / 2**20:g} MiB {t['p50']:.0f}" for n, t in row["us_by_bytes"].items()
            ]
            lines.append(f"scaling  us a message: {', '.join(times[5::2])}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON.")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS), help="Parts, by comma."
    )
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), help="Of the sweeps, by comma; all."
    )
    args = parser.parse_args()
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only must name parts ({', '.join(PARTS)}), but got {', '.join(unknown)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
