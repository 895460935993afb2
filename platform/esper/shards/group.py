"""Shards of one trial as Ray actors, each with a device of its own or a share of one.

Whoever wires the run connects to Ray first. A group is asked as one shard is; all actors do the
same, and after every interval they must be equal.
"""

import dataclasses
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from esper.config.base import ConfigError
from esper.config.run import Execution
from esper.config.shards import ShardsConfig
from esper.environment import code_hash
from esper.seeds.actions import Action, Rollback
from esper.seeds.lifecycle import Transition
from esper.seeds.report import Report
from esper.shards.affinity import stay_near
from esper.shards.errors import (
    NoRoomError,
    ReplicasDifferError,
    ShardLostError,
    ShardMemoryError,
)
from esper.shards.replica import Replica, ReplicaTrainer, is_lost_touch
from esper.shards.shard import Health, KasminaShard, Shards, ShardSpec
from esper.surgery.checkpoint_place import absolute
from esper.training.snapshot import Place

# a process that imports torch may take long to start on a busy machine
START_S = 120.0
# after the first error, how long the other shards have to say what they know
GRACE_S = 5.0
# how long a smaller group may take to be placed
FEWER_S = 2.0


class ShardActor:
    """A thin shell around `KasminaShard`, in a process of its own.

    Args:
        threads: Threads that it computes with.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._shard: KasminaShard | None = None
        self._rank = 0

    def where(self) -> tuple[int, str, str]:
        """Its process id, an address of its node that is free now, and the hash of its code."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return os.getpid(), f"tcp://{ray.util.get_node_ip_address()}:{port}", code_hash()

    def build(self, spec: ShardSpec, replica: Replica | None, parallel: str) -> None:
        """Make the shard; one of several meets the others."""
        stay_near(spec.config.device)
        self._rank = 0 if replica is None else replica.rank
        if replica is None:
            self._shard = KasminaShard(spec)
        elif parallel == "data":
            self._shard = KasminaShard(spec, partial(ReplicaTrainer, replica=replica))
            replica.join(spec.config.device)
        else:
            from esper.shards.seed_parallel import SeedShard

            replica.join(spec.config.device)
            self._shard = SeedShard(spec, replica)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the shard.

        Raises:
            ShardLostError: If it needed others, who did not answer.
        """
        try:
            return getattr(self._shard, name)(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, ShardLostError) or not is_lost_touch(error):
                raise
            what = f"lost touch with the others: {error}"
            raise ShardLostError((self._rank,), what) from error


class ShardGroup:
    """The shards of one trial; asked as one `Shard`.

    Args:
        spec: What each of them is made of.
        config: How many, with what resources.
        wait_s: How long to wait for room that the cluster may not have now; None: it must have it.

    Attributes:
        pids: Process ids of the actors.

    Raises:
        ConfigError: If the cluster is too small, or a shard cannot be built.
        NoRoomError: If there was no room in time.
        ShardLostError: If a shard does not start.
    """

    def __init__(self, spec: ShardSpec, config: ShardsConfig, wait_s: float | None = None) -> None:
        self._config = config
        # what Ray makes of a class has no type of its own
        self._actors: list[Any] = []
        gpus = config.gpus_per_shard
        if gpus is None:
            gpus = float(torch.device(spec.config.device).type == "cuda")
        need = {"CPU": config.cpus_per_shard, "GPU": gpus}
        if wait_s is None:
            _require_room(need, config.count)
            wait_s = max(START_S, config.timeout_s)
        bundle = {k: v for k, v in need.items() if v}
        self._place = placement_group([bundle] * config.count, strategy="PACK")
        try:
            if not self._place.wait(wait_s):
                raise NoRoomError(
                    range(config.count), f"got no room on the cluster in {wait_s:g} s"
                )
            threads = max(1, int(config.cpus_per_shard))
            self._actors = [
                ray.remote(ShardActor).options(
                    num_cpus=config.cpus_per_shard,
                    num_gpus=gpus,
                    # a new actor would know nothing: the trial restores it from a checkpoint
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        self._place, placement_group_bundle_index=rank
                    ),
                ).remote(threads)
                for rank in range(config.count)
            ]  # fmt: skip
            where = self._collect("where", [a.where.remote() for a in self._actors], START_S)
            self.pids = [pid for pid, _, _ in where]
            _require_same_code([code for _, _, code in where])
            replicas = [
                Replica(
                    rank, config.count, where[0][1], config.timeout_s,
                    int(config.bucket_mib * 2**20),
                )
                if config.count > 1
                else None
                for rank in range(config.count)
            ]  # fmt: skip
            self._collect(
                "build",
                [
                    a.build.remote(spec, r, config.parallel)
                    for a, r in zip(self._actors, replicas, strict=True)
                ],
                START_S,
            )
        except BaseException:
            self.close()
            raise

    def run_interval(
        self,
        steps: int | None = None,
        *,
        measures: bool = True,
        execution: Execution | None = None,
    ) -> Report:
        """Train all shards; see `KasminaShard.run_interval`."""
        report: Report = self._ask("run_interval", steps, measures=measures, execution=execution)
        return report

    def apply(self, actions: Sequence[Action], note: Any = None) -> list[Transition]:
        """Apply the same actions to all shards; see `Trainer.apply`."""
        transitions: list[Transition] = self._ask("apply", actions, note)
        return transitions

    def suspects(self) -> list[Place]:
        """See `Trainer.suspects`."""
        places: list[Place] = self._ask_first("suspects")
        return places

    def diverged(self) -> list[Place]:
        """See `Trainer.diverged`."""
        places: list[Place] = self._ask_first("diverged")
        return places

    def roll_back(self, rollbacks: Sequence[Rollback]) -> Any:
        """Roll all shards back; see `Trainer.roll_back`."""
        return self._ask("roll_back", rollbacks)

    def evaluate(self, *splits: str) -> dict[str, float]:
        """See `KasminaShard.evaluate`."""
        metrics: dict[str, float] = self._ask_first("evaluate", *splits)
        return metrics

    def own_metrics(self, names: Sequence[str], seed: int) -> dict[str, float]:
        """See `KasminaShard.own_metrics`."""
        metrics: dict[str, float] = self._ask_first("own_metrics", names, seed)
        return metrics

    def health(self) -> Health:
        """Where the shards stand, with what all of them together computed.

        Raises:
            ReplicasDifferError: If they are not equal.
        """
        if (count := self._config.count) == 1:
            health: Health = self._ask_first("health")
            return health
        calls = ("health", "digest")
        answers = self._collect(
            "health", [a.call.remote(name) for name in calls for a in self._actors]
        )
        first: Health = answers[0]
        _require_equal(first.interval, answers[count:])
        cost = dataclasses.replace(
            first.cost,
            flops=first.cost.flops * count,
            growth_flops=first.cost.growth_flops * count,
        )
        return dataclasses.replace(first, shards=count, cost=cost)

    def log(self) -> list[Transition]:
        """See `KasminaShard.log`."""
        log: list[Transition] = self._ask_first("log")
        return log

    def checkpoint(self, folder: str | Path, content: Mapping[str, Any], wait: bool = True) -> None:
        """Have the first shard write what all of them can be restored from."""
        self._ask_first("checkpoint", absolute(folder), content, wait=wait)

    def settle(self) -> None:
        """See `KasminaShard.settle`."""
        self._ask_first("settle")

    def restore(self, folder: str | Path, execution: Execution | None = None) -> None:
        """Restore all shards; the folder must be reachable from their nodes."""
        self._ask("restore", absolute(folder), execution)

    def save(self, folder: str | Path) -> None:
        """Have the first shard write the model."""
        self._ask_first("save", absolute(folder))

    def where(self) -> tuple[str, dict[str, str]]:
        """See `KasminaShard.where`; several kinds of devices are all named."""
        answers = self._collect("where", [a.call.remote("where") for a in self._actors])
        devices = dict.fromkeys(device for device, _ in answers)
        return " + ".join(devices), answers[0][1]

    def close(self) -> None:
        """End the actors and give their place back."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        remove_placement_group(self._place)

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The first shard's answer, when all have done the same."""
        refs = [actor.call.remote(name, *args, **kwargs) for actor in self._actors]
        return self._collect(name, refs)[0]

    def _ask_first(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The first shard's answer to what changes nothing; if it needs the others, they help."""
        if self._config.parallel == "seed":
            return self._ask(name, *args, **kwargs)
        return self._collect(name, [self._actors[0].call.remote(name, *args, **kwargs)])[0]

    def _collect(self, name: str, refs: Sequence[Any], least_s: float = 0.0) -> list[Any]:
        """All answers, in order; if there is none from a shard, the group is ended."""
        timeout = max(least_s, self._config.timeout_s)
        deadline = time.monotonic() + timeout
        waiting = {ref: i for i, ref in enumerate(refs)}
        answers: dict[int, Any] = {}
        dead: dict[int, str] = {}
        errors: dict[int, RayTaskError] = {}
        memory: dict[int, str] = {}
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            at = waiting.pop(done[0])
            try:
                answers[at] = ray.get(done[0])
            except RayTaskError as error:
                errors[at] = error
                if _is_memory(error.cause):
                    memory[at] = _first_line(error.cause) or type(error.cause).__name__
            except OutOfMemoryError as error:
                memory[at] = _first_line(error)
            except RayError as error:
                dead[at] = _death(error)
            if dead or memory or errors:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        ranks = len(self._actors) or 1
        lost = {i: e for i, e in errors.items() if isinstance(e.cause, ShardLostError)}
        if memory:
            self.close()
            raise ShardMemoryError(sorted({i % ranks for i in memory}), min(memory.values()))
        if dead:
            self.close()
            raise ShardLostError(sorted({i % ranks for i in dead}), min(dead.values()))
        if waiting and len(errors) == len(lost):
            self.close()
            raise ShardLostError(
                sorted({i % ranks for i in waiting.values()}),
                f"gave no answer to '{name}' in {timeout:g} s",
            )
        if lost:
            self.close()
        for raised in errors.values():
            # the cause as it was raised there; its traceback is in the text of Ray's error
            raise raised.cause from raised
        return [answers[i] for i in range(len(refs))]


def groups(config: ShardsConfig) -> Shards:
    """What makes the shards of trials in actors."""
    return partial(ShardGroup, config=config)


def replacements(config: ShardsConfig) -> Shards:
    """What makes the shards that take the place of lost ones, by the policy of `config`.

    With `on_loss: shrink` they may be fewer; a later replacement asks for all again.
    """
    return partial(_replace, config=config)


def _replace(spec: ShardSpec, config: ShardsConfig) -> ShardGroup:
    wait_s, count = config.wait_s, config.count
    while True:
        try:
            return ShardGroup(spec, config.model_copy(update={"count": count}), wait_s)
        except NoRoomError:
            count = _fewer(spec, config, count)
            if config.on_loss != "shrink" or not count:
                raise
            # whoever is to come back had its time
            wait_s = FEWER_S


def _fewer(spec: ShardSpec, config: ShardsConfig, count: int) -> int:
    """The next smaller number that cuts batch or seeds into equal parts; 0 if there is none."""
    if config.parallel == "seed":
        seeds = [site.seeds_per_layer for site in spec.config.lattice]
        return next((n for n in range(count - 1, 0, -1) if not any(s % n for s in seeds)), 0)
    # how many samples make the whole set is not known here; one shard takes them all
    batch = spec.config.train.batch_size or 1
    return next((n for n in range(count - 1, 0, -1) if batch % n == 0), 0)


def _is_memory(error: BaseException) -> bool:
    # torch has a class of its own for GPUs alone
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _death(error: RayError) -> str:
    """What happened to an actor that is no more, as Ray tells it."""
    told = str(error)
    if "its node has died" in told:
        # Ray cannot know which of the two
        address = re.search(r"^\s*ip: (\S+)", told, re.MULTILINE)
        where = "" if address is None else f" {address[1]}"
        return (
            f"was lost with its node{where}, which died or cannot be reached: "
            f"{told.strip().splitlines()[-1].strip()}"
        )
    return (
        f"died: {_first_line(error)} (if it was killed for memory, as `dmesg` says, lower "
        "train.batch_size or give it a larger machine)"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _require_room(need: Mapping[str, float], count: int) -> None:
    have = ray.cluster_resources()
    for name, each in need.items():
        if each * count > have.get(name, 0):
            raise ConfigError("shards", (
                f"shards must fit the cluster, which has {have.get(name, 0):g} {name}s, but "
                f"{count} shards ask for {each:g} each; ask for less.",
            ))  # fmt: skip


def _require_same_code(codes: Sequence[str]) -> None:
    for rank, code in enumerate(codes):
        if code != code_hash():
            raise RuntimeError(
                f"the shards' code must be the driver's (sha256 {code_hash()[:12]}), but that of "
                f"shard {rank} is {code[:12]}; install the same version on every node."
            )


def _require_equal(interval: int, digests: Sequence[Mapping[str, str]]) -> None:
    first = digests[0]
    ranks = [rank for rank, digest in enumerate(digests) if digest != first]
    if ranks:
        names = dict.fromkeys(
            name
            for rank in ranks
            for name in {**first, **digests[rank]}
            if first.get(name) != digests[rank].get(name)
        )
        raise ReplicasDifferError(interval, ranks, tuple(names))
