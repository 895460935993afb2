"""Running a plan on Ray Tune: trials in warm worker processes, each as soon as it can start."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, FailureConfig, PlacementGroupFactory, Stopper
from ray.tune import RunConfig as TuneRunConfig
from ray.tune.search import Searcher

from esper.config.sweep import Resources
from esper.evidence.progress import Progress
from esper.evidence.records import TrialRecord
from esper_experiments.board import Board
from esper_experiments.plan import Planned, read_record, record_path
from esper_experiments.ray_metrics import RayExporter
from esper_experiments.room import Room
from esper_experiments.worker import TrialWorker

# a worker may die of something that is not the trial's fault
RETRIES = 2
# trials in Tune's queue: most of them must be without a worker that is being started for them
PENDING_PER_SLOT = 4

Finished = Callable[[TrialRecord], None]
PairsWanted = Callable[[], int]


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
