"""Shards of one trial as Ray actors, each with a device of its own or a share of one.

Whoever wires the run connects to Ray first. A group is asked as one shard is; all actors do the
same, and after every interval they must be equal.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from esper.config.base import ConfigError
from esper.config.run import Execution
from esper.config.shards import ShardsConfig
from esper.environment import code_hash
from esper.seeds.actions import Action, Rollback
from esper.seeds.lifecycle import Transition
from esper.seeds.report import Report
from esper.shards.errors import ReplicasDifferError, ShardLostError
from esper.shards.replica import Replica, ReplicaTrainer
from esper.shards.shard import Health, KasminaShard, Shards, ShardSpec
from esper.training.snapshot import Place

# a process that imports torch may take long to start on a busy machine
START_S = 120.0
# after the first error, how long the other shards have to say what they know
GRACE_S = 5.0


class ShardActor:
    """A thin shell around `KasminaShard`, in a process of its own.

    Args:
        threads: Threads that it computes with.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._shard: KasminaShard | None = None

    def where(self) -> tuple[int, str, str]:
        """Its process id, an address of its node that is free now, and the hash of its code."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return os.getpid(), f"tcp://{ray.util.get_node_ip_address()}:{port}", code_hash()

    def build(self, spec: ShardSpec, replica: Replica | None) -> None:
        """Make the shard; one of several meets the others."""
        if replica is None:
            self._shard = KasminaShard(spec)
            return
        self._shard = KasminaShard(spec, partial(ReplicaTrainer, replica=replica))
        replica.join(spec.config.device)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the shard."""
        return getattr(self._shard, name)(*args, **kwargs)


class ShardGroup:
    """The shards of one trial; asked as one `Shard`.

    Args:
        spec: What each of them is made of.
        config: How many, with what resources.

    Attributes:
        pids: Process ids of the actors.

    Raises:
        ConfigError: If the cluster is too small, or a shard cannot be built.
        ShardLostError: If a shard does not start.
    """

    def __init__(self, spec: ShardSpec, config: ShardsConfig) -> None:
        self._config = config
        # what Ray makes of a class has no type of its own
        self._actors: list[Any] = []
        gpus = config.gpus_per_shard
        if gpus is None:
            gpus = float(torch.device(spec.config.device).type == "cuda")
        need = {"CPU": config.cpus_per_shard, "GPU": gpus}
        _require_room(need, config.count)
        bundle = {k: v for k, v in need.items() if v}
        self._place = placement_group([bundle] * config.count, strategy="PACK")
        try:
            wait_s = max(START_S, config.timeout_s)
            if not self._place.wait(wait_s):
                raise ShardLostError(
                    range(config.count), f"got no place on the cluster in {wait_s:g} s"
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
                Replica(rank, config.count, where[0][1], config.timeout_s)
                if config.count > 1
                else None
                for rank in range(config.count)
            ]
            self._collect(
                "build",
                [a.build.remote(spec, r) for a, r in zip(self._actors, replicas, strict=True)],
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
        return dataclasses.replace(first, cost=cost)

    def log(self) -> list[Transition]:
        """See `KasminaShard.log`."""
        log: list[Transition] = self._ask_first("log")
        return log

    def checkpoint(self, folder: str | Path, content: Mapping[str, Any]) -> None:
        """Have the first shard write what all of them can be restored from."""
        self._ask_first("checkpoint", _absolute(folder), content)

    def restore(self, folder: str | Path, execution: Execution | None = None) -> None:
        """Restore all shards; the folder must be reachable from their nodes."""
        self._ask("restore", _absolute(folder), execution)

    def save(self, folder: str | Path) -> None:
        """Have the first shard write the model."""
        self._ask_first("save", _absolute(folder))

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
        """The first shard's answer to what changes nothing."""
        return self._collect(name, [self._actors[0].call.remote(name, *args, **kwargs)])[0]

    def _collect(self, name: str, refs: Sequence[Any], least_s: float = 0.0) -> list[Any]:
        """All answers, in order; if there is none from a shard, the group is ended."""
        timeout = max(least_s, self._config.timeout_s)
        deadline = time.monotonic() + timeout
        waiting = {ref: i for i, ref in enumerate(refs)}
        answers: dict[int, Any] = {}
        dead: dict[int, str] = {}
        errors: dict[int, RayTaskError] = {}
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            at = waiting.pop(done[0])
            try:
                answers[at] = ray.get(done[0])
            except RayTaskError as error:
                errors[at] = error
            except RayError as error:
                dead[at] = str(error).strip().splitlines()[0]
            if dead or errors:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        ranks = len(self._actors) or 1
        lost = {i: e for i, e in errors.items() if isinstance(e.cause, ShardLostError)}
        if dead:
            self.close()
            raise ShardLostError(sorted({i % ranks for i in dead}), f"died: {min(dead.values())}")
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


def _absolute(folder: str | Path) -> Path:
    # an actor has a working directory of its own
    return Path(folder).resolve()


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
