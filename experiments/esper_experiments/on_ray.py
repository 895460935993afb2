"""Running a plan on Ray Tune: trials in warm worker processes, each as soon as it can start."""

import dataclasses
import gc
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Callback, FailureConfig, PlacementGroupFactory, Stopper
from ray.tune import RunConfig as TuneRunConfig
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from esper.config.base import ConfigError
from esper.config.sweep import Resources
from esper.environment import code_hash, device_name
from esper.evidence.progress import Progress
from esper.evidence.records import TrialRecord, write_json
from esper.evidence.reference import TRIAL_REQUESTS, median_ms, reference_s
from esper.monitoring.runs import RunMetrics
from esper.shards.group import groups
from esper.shards.shard import KasminaShard
from esper.surgery.checkpoint_folder import CheckpointError, CheckpointNotWrittenError
from esper.trial import Trial
from esper_experiments.board import Board
from esper_experiments.peers import trial_of
from esper_experiments.plan import Planned, checkpoint_path, read_record, record_path
from esper_experiments.ray_metrics import RayExporter

# how much of a trial one call from the driver runs: long enough for calls to cost nothing, short
# enough for the progress display
SLICE_S = 1.0
# a worker may die of something that is not the trial's fault
RETRIES = 2
# trials in Tune's queue: most of them must be without a worker that is being started for them
PENDING_PER_SLOT = 4
ACCELERATOR = "accelerator_type:"

Finished = Callable[[TrialRecord], None]
PairsWanted = Callable[[], int]


class TrialWorker(tune.Trainable):
    """A thin shell around `Trial`; one process runs many of them, one after the other."""

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        plan: dict[str, Planned],
        folder: str,
        resources: Resources,
    ) -> None:
        """Called once a process, with the first trial."""
        torch.set_num_threads(max(1, int(resources.cpus_per_trial / resources.shards)))
        self._plan, self._folder = plan, Path(folder)
        self._shards, self._checkpoint_s = resources.shards_config, resources.checkpoint_s
        self._trial: Trial | None = None
        self._exporter = RayExporter()
        self._start(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called for every further trial."""
        self._start(new_config["trial"])
        return True

    def _start(self, trial_id: str) -> None:
        planned = self._plan[trial_id]
        expected = planned.spec.fingerprint.code_hash
        if code_hash() != expected:
            raise RuntimeError(
                f"the worker's code must be the driver's (sha256 {expected[:12]}), but is "
                f"{code_hash()[:12]}; install the same version on every node."
            )
        self._close()
        self._saved = time.monotonic()
        self._unwritten = ""
        self._checkpoint = checkpoint_path(self._folder, trial_id)
        self._trial = self._resumed(planned) or self._new(planned)
        self._timed = planned.is_timed
        self._reference_s = self._reference()
        run = f"{self._folder.name} {trial_id}"
        self._trial.on_interval = RunMetrics(self._exporter, run, self._trial).interval

    def _reference(self) -> list[float]:
        """How fast the machine is just now, where the question judges times."""
        assert self._trial is not None
        return reference_s(self._trial.config.device, TRIAL_REQUESTS) if self._timed else []

    def _new(self, planned: Planned) -> Trial:
        followed = planned.waits_for and read_record(self._folder, planned.waits_for)
        kind = trial_of(planned.config)
        given = (planned.config, planned.spec, followed or None)
        # a peer's network is none that a shard could hold
        trial = Trial(*given, shards=self._makes_shards()) if kind is Trial else kind(*given)
        return self._marked(trial)

    def _resumed(self, planned: Planned) -> Trial | None:
        """The trial where a lost worker or driver left it, if that can be continued here."""
        if not self._checkpoint.exists():
            return None
        try:
            trial = Trial.resume(self._checkpoint, self._makes_shards())
        except CheckpointError:
            # it is a matter of time alone: run again, the trial is the same
            return None
        then = trial.spec.fingerprint
        if self._marked(trial).spec.fingerprint != then or trial.config != planned.config:
            trial.shard.close()
            return None
        return trial

    def _makes_shards(self) -> Any:
        return KasminaShard if self._shards is None else groups(self._shards)

    def _marked(self, trial: Trial) -> Trial:
        """Put down what it really runs on, which need not be the driver's machine."""
        device, libraries = trial.shard.where()
        mark = trial.spec.fingerprint.model_copy(update={"device": device, "versions": libraries})
        trial.spec = dataclasses.replace(trial.spec, fingerprint=mark)
        return trial

    def step(self) -> dict[str, Any]:
        """Run for a while; write the record when the trial is done."""
        trial = self._trial
        assert trial is not None
        latest = trial.run_for(SLICE_S)
        if trial.done:
            path = record_path(self._folder, trial.spec.trial_id)
            # a worker that was cut off from the cluster may come later than who took its place
            if not path.exists():
                write_json(path, self._record(trial))
            self._close()
            shutil.rmtree(self._checkpoint, ignore_errors=True)
        elif time.monotonic() - self._saved > self._checkpoint_s and type(trial) is Trial:
            self._save(trial)
        where = (
            ray.util.get_node_ip_address(),
            f"pid {os.getpid()}",
            trial.spec.fingerprint.device,
        )
        place = " ".join(where)
        return {"done": trial.done, "latest": latest, "place": place, "unwritten": self._unwritten}

    def _record(self, trial: Trial) -> TrialRecord:
        record = trial.record()
        if not self._timed:
            return record
        reference = median_ms([*self._reference_s, *self._reference()])
        return record.model_copy(update={"reference_ms": reference})

    def _save(self, trial: Trial) -> None:
        self._saved = time.monotonic()
        try:
            trial.save(self._checkpoint, wait=False)
        except CheckpointNotWrittenError as error:
            # of this one or the one before; the trial loses nothing but its insurance
            self._unwritten = str(error)

    def _close(self) -> None:
        if self._trial is not None:
            self._trial.shard.close()
        self._trial = None

    def cleanup(self) -> None:
        """Called when the process is not needed any more."""
        self._close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Trials keep their own checkpoints, which a new driver finds, too."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""


class _PlanSearcher(Searcher):
    """Hands out the planned trials in order, each once what it waits for has finished."""

    def __init__(
        self,
        todo: Sequence[Planned],
        finished: set[str],
        pairs_wanted: PairsWanted,
        kinds: Sequence[str],
        at_once: int,
    ) -> None:
        super().__init__(metric="done", mode="max")
        self._todo, self._finished = list(todo), set(finished)
        self._running: dict[str, Planned] = {}
        self._pairs_wanted, self._pairs = pairs_wanted, pairs_wanted()
        self._kinds, self._at_once = kinds, at_once

    def suggest(self, trial_id: str) -> Any:
        if len(self._running) >= self._at_once:
            return None
        planned = self._next()
        if planned is not None:
            self._todo.remove(planned)
            self._running[trial_id] = planned
            # both arms of a pair on the same kind of device
            kind = self._kinds[planned.spec.pair % len(self._kinds)] if self._kinds else None
            return {"trial": planned.spec.trial_id, "kind": kind}
        return None if self._todo and self._running else Searcher.FINISHED

    @property
    def decided(self) -> bool:
        """Whether the question needs none of the trials that run, nor any other."""
        return all(p.spec.pair >= self._pairs for p in (*self._running.values(), *self._todo))

    def _next(self) -> Planned | None:
        """The first trial that may begin: in a pair that is wanted, after what it waits for."""
        for planned in self._todo:
            ready = planned.waits_for is None or planned.waits_for in self._finished
            if ready and planned.spec.pair < self._pairs:
                return planned
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        planned = self._running.pop(trial_id, None)
        if planned is not None and not error:
            self._finished.add(planned.spec.trial_id)

    def look(self) -> None:
        """There is another record: the last one of a look may decide, or begin the next pairs."""
        self._pairs = self._pairs_wanted()

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the records on disk say what is left."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _Events(Callback):
    """Passes what happens to the trials on to whoever watches."""

    def __init__(
        self, folder: Path, board: Board, finished: Finished, searcher: _PlanSearcher
    ) -> None:
        self._folder, self._board, self._finished = folder, board, finished
        self._searcher = searcher
        self._metrics = _Metrics(board.progress.name)
        self.errors: dict[str, str] = {}
        self.unwritten: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks to restore a run; ours resumes from the records instead
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._board.running(trial.config["trial"], result["latest"], result["place"])
        if result["unwritten"]:
            self.unwritten[trial.config["trial"]] = result["unwritten"]

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._board.tick()
        self._metrics.show(self._board.progress)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._board.started(trial.config["trial"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # one that the decision came before has none
        if record_path(self._folder, trial.config["trial"]).exists():
            self._finished(read_record(self._folder, trial.config["trial"]))
            self._searcher.look()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failed(trial, again=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.errors[trial.config["trial"]] = self._failed(trial, again=False)

    def _failed(self, trial: Any, *, again: bool) -> str:
        error = trial.get_error()
        text = str(error).strip() if error is not None else ""
        last = text.splitlines()[-1] if text else "no error was kept"
        self._board.failed(trial.config["trial"], trial.num_failures, last, again)
        return last


class _Metrics:
    """The board's facts as metrics of the Ray process, which the cluster's exporter serves."""

    def __init__(self, sweep: str) -> None:
        self._sweep, self._exporter = sweep, RayExporter()
        self._shown = 0.0

    def show(self, progress: Progress) -> None:
        """Set all gauges, if the progress is a new one."""
        at = progress.updated_at.timestamp()
        if at == self._shown:
            return
        self._shown = at
        for arm in {t.arm for t in progress.trials.values()}:
            counts = progress.counts(arm)
            for state in ("waiting", "running", "finished", "collapsed", "failed"):
                self._set("trials", counts[state], state=state, arm=arm)
        self._set("active_seeds", progress.active_seeds)
        self._set("gpus_in_use", progress.gpus_in_use)
        left = progress.seconds_left
        self._set("seconds_left", -1.0 if left is None else left)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._exporter.set(f"esper_sweep_{name}", value, sweep=self._sweep, **labels)


class _Decided(Stopper):
    """Ends what still runs when the question is decided."""

    def __init__(self, searcher: _PlanSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._searcher.decided


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


@dataclasses.dataclass(frozen=True)
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


def _bundles(resources: Resources) -> Callable[[dict[str, Any]], PlacementGroupFactory]:
    """What Tune asks for: a trial's place, or that of a driver whose shards find their own."""
    bundle = {"CPU": resources.cpus_per_trial}
    if resources.gpus_per_trial:
        bundle["GPU"] = resources.gpus_per_trial
    if resources.shards > 1:
        # a byte, of what every node has: any share of a CPU would be missing to the shards
        bundle = {"memory": 1}

    def of(config: dict[str, Any]) -> PlacementGroupFactory:
        kind = config["kind"]
        return PlacementGroupFactory([bundle | ({kind: 0.001} if kind else {})])

    return of


def run_plan(
    plan: Sequence[Planned],
    finished: set[str],
    folder: Path,
    resources: Resources,
    room: Room,
    board: Board,
    on_finished: Finished,
    pairs_wanted: PairsWanted,
) -> dict[str, str]:
    """Run every trial of the plan that has no record yet.

    A worker that is lost is replaced, and the trial goes on from its last checkpoint, like one
    that the driver of an interrupted sweep left behind.

    Args:
        plan: All trials.
        finished: Ids of those that have a record.
        folder: The sweep's folder, which all nodes see; workers write their records there.
        resources: What each trial gets.
        room: What the cluster has.
        board: Told what happens to trials before they end.
        on_finished: Called with each new record.
        pairs_wanted: Called after each trial: how many pairs to run.

    Returns:
        The trials that failed, with the last line of their error.
    """
    todo = [p for p in plan if p.spec.trial_id not in finished]
    # With a searcher Tune starts one worker at a time, and gives that one up as soon as an older
    # worker is free: with trials shorter than a worker's start, one worker would do everything.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(PENDING_PER_SLOT * room.slots))
    worker = tune.with_parameters(
        TrialWorker,
        plan={p.spec.trial_id: p for p in plan},
        folder=str(folder.resolve()),
        resources=resources,
    )
    # a driver of shards takes no room, and would wait for it with all the others
    at_once = room.slots if resources.shards > 1 else len(todo)
    searcher = _PlanSearcher(todo, finished, pairs_wanted, room.kinds, at_once)
    events = _Events(folder, board, on_finished, searcher)
    tuner = tune.Tuner(
        tune.with_resources(worker, _bundles(resources)),
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=len(todo), reuse_actors=True),
        run_config=TuneRunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            verbose=0,
            callbacks=[events],
            stop=_Decided(searcher),
            failure_config=FailureConfig(max_failures=RETRIES),
        ),
    )
    tuner.fit()
    for trial, why in sorted(events.unwritten.items()):
        logging.getLogger(__name__).warning("%s: no checkpoint was written: %s", trial, why)
    return events.errors
