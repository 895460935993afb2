"""Ray from its start to its end, and the room that its nodes have for the trials of a sweep."""

import gc
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from esper.config.base import ConfigError
from esper.config.sweep import Resources
from esper.environment import device_name

ACCELERATOR = "accelerator_type:"


def start_ray(resources: Resources) -> None:
    """Connect to the cluster this process belongs to, or start Ray on this machine.

    Raises:
        ConnectionError: If a cluster is named in RAY_ADDRESS but cannot be reached.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        # or it would join a cluster that somebody else started on this machine
        address="local",
        num_cpus=resources.num_cpus or os.cpu_count() or 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def stop_ray() -> None:
    """Disconnect from Ray, in a way that the process survives.

    Ray ends the process at once, without a word, if any thread touches one of its objects in the
    moment of the shutdown, and Python's collector of cyclic garbage does that from whichever
    thread it runs in.
    """
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


@dataclass(frozen=True)
class Room:
    """What the cluster has for a sweep.

    Attributes:
        slots: Trials that run at once.
        gpus: GPUs of the cluster.
        kinds: If its GPUs are of several kinds: those of one pair after another, in turn.
    """

    slots: int
    gpus: float
    kinds: tuple[str, ...]


def find_room(resources: Resources, device: str) -> Room:
    """Look at the cluster's nodes.

    Args:
        resources: What each trial gets.
        device: That the trials compute on.

    Raises:
        ConfigError: If no trial fits, or the nodes' CPUs, on which it would compute, differ.
    """
    nodes = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
    need = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}
    need = {name: amount for name, amount in need.items() if amount}
    have = {name: sum(node.get(name, 0.0) for node in nodes.values()) for name in ("CPU", "GPU")}
    if resources.shards > 1:
        # shards of one trial may lie on several nodes
        slots, kinds = _fit(have, need), tuple[str, ...]()
    else:
        by_node = {name: _fit(node, need) for name, node in nodes.items()}
        slots = sum(by_node.values())
        kinds = _in_turn(nodes, by_node) if need.get("GPU") else ()
        if device == "cpu":
            _require_alike([name for name, fits in by_node.items() if fits])
    if slots < 1:
        raise ConfigError("resources", (
            f"resources must fit the cluster, which has {have['CPU']:g} CPUs and {have['GPU']:g} "
            f"GPUs on {len(nodes)} nodes, but a trial asks for {resources.cpus_per_trial:g} and "
            f"{resources.gpus_per_trial:g}; lower them.",
        ))  # fmt: skip
    return Room(slots, have["GPU"], kinds)


def _fit(have: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How many trials fit at once; resources are counted in ten-thousandths, as Ray does."""
    units = {name: round(10_000 * amount) for name, amount in need.items()}
    return min(round(10_000 * have.get(name, 0.0)) // each for name, each in units.items())


def _in_turn(
    nodes: Mapping[str, Mapping[str, float]], by_node: Mapping[str, int]
) -> tuple[str, ...]:
    """Kinds of GPUs by their slots, well mixed; empty if there is one kind alone."""
    slots: dict[str, int] = {}
    for name, fits in by_node.items():
        kind = next((key for key in nodes[name] if key.startswith(ACCELERATOR)), None)
        if fits and kind is not None:
            slots[kind] = slots.get(kind, 0) + fits
    if len(slots) < 2:
        return ()
    # the i-th of n slots of a kind stands at (i + 1/2) / n of the round
    places = [((i + 0.5) / n, kind) for kind, n in slots.items() for i in range(n)]
    return tuple(kind for _, kind in sorted(places))


def _require_alike(nodes: Sequence[str]) -> None:
    """Trials compute on CPUs: they must be of one model, on which no choice can be based."""
    if len(nodes) < 2:
        return
    ask = ray.remote(device_name)
    names = ray.get([
        ask.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote("cpu")
        for node in nodes
    ])  # fmt: skip
    if len(set(names)) > 1:
        raise ConfigError("resources", (
            f"the nodes of a sweep on CPUs must have one CPU model, but they have "
            f"{', '.join(sorted(set(names)))}: the arms of a pair would run on different ones; "
            "start the others with --num-cpus=0.",
        ))  # fmt: skip
