"""Running a plan on Ray Tune: trials in warm worker processes, each as soon as it can start."""

import gc
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Callback, FailureConfig
from ray.tune import RunConfig as TuneRunConfig
from ray.tune.search import Searcher

from esper.config.sweep import Resources
from esper.environment import code_hash
from esper.evidence.records import TrialRecord, write_json
from esper_experiments.peers import trial_of
from esper_experiments.plan import Planned, read_record, record_path

# how much of a trial one call from the driver runs: long enough for calls to cost nothing, short
# enough for the progress display
SLICE_S = 1.0
# a worker may die of something that is not the trial's fault
RETRIES = 2
# trials in Tune's queue: most of them must be without a worker that is being started for them
PENDING_PER_SLOT = 4

Progress = Callable[[str, dict[str, float]], None]
Finished = Callable[[TrialRecord], None]
PairsWanted = Callable[[], int]


class TrialWorker(tune.Trainable):
    """A thin shell around `Trial`; one process runs many of them, one after the other."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], plan: dict[str, Planned], folder: str, threads: int
    ) -> None:
        """Called once a process, with the first trial."""
        torch.set_num_threads(threads)
        self._plan, self._folder = plan, Path(folder)
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
        followed = planned.waits_for and read_record(self._folder, planned.waits_for)
        self._trial = trial_of(planned.config)(planned.config, planned.spec, followed or None)

    def step(self) -> dict[str, Any]:
        """Run for a while; write the record when the trial is done."""
        latest = self._trial.run_for(SLICE_S)
        if self._trial.done:
            record = self._trial.record()
            write_json(record_path(self._folder, record.trial_id), record)
        return {"done": self._trial.done, "latest": latest}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial is short: it is run again rather than checkpointed."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""


class _PlanSearcher(Searcher):
    """Hands out the planned trials in order, each once what it waits for has finished."""

    def __init__(
        self, todo: Sequence[Planned], finished: set[str], pairs_wanted: PairsWanted
    ) -> None:
        super().__init__(metric="done", mode="max")
        self._todo, self._finished = list(todo), set(finished)
        self._running: dict[str, str] = {}
        self._pairs_wanted, self._pairs = pairs_wanted, pairs_wanted()

    def suggest(self, trial_id: str) -> Any:
        planned = self._next()
        if planned is None and self._todo and not self._running:
            # all pairs of a planned look are in: either it decides, or the next ones begin
            self._pairs = self._pairs_wanted()
            planned = self._next()
        if planned is not None:
            self._todo.remove(planned)
            self._running[trial_id] = planned.spec.trial_id
            return {"trial": planned.spec.trial_id}
        return None if self._todo and self._running else Searcher.FINISHED

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
        name = self._running.pop(trial_id, None)
        if name is not None and not error:
            self._finished.add(name)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the records on disk say what is left."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _Events(Callback):
    """Passes what happens to the trials on to whoever watches."""

    def __init__(self, folder: Path, on_progress: Progress, on_finished: Finished) -> None:
        self._folder, self._on_progress, self._on_finished = folder, on_progress, on_finished
        self.errors: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks to restore a run; ours resumes from the records instead
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._on_progress(trial.config["trial"], result["latest"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_finished(read_record(self._folder, trial.config["trial"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        text = str(error).strip() if error is not None else ""
        self.errors[trial.config["trial"]] = text.splitlines()[-1] if text else "no error was kept"


def start_ray(resources: Resources) -> None:
    """Connect to the cluster this process belongs to, or start Ray on this machine.

    Raises:
        ConnectionError: If a cluster is named in RAY_ADDRESS but cannot be reached.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
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


def run_plan(
    plan: Sequence[Planned],
    finished: set[str],
    folder: Path,
    resources: Resources,
    slots: int,
    on_progress: Progress,
    on_finished: Finished,
    pairs_wanted: PairsWanted,
) -> dict[str, str]:
    """Run every trial of the plan that has no record yet.

    Args:
        plan: All trials.
        finished: Ids of those that have a record.
        folder: The sweep's folder; workers write their records there.
        resources: What each trial gets.
        slots: Trials that run at once.
        on_progress: Called with a trial's id and its latest values, about once a second.
        on_finished: Called with each new record.
        pairs_wanted: Called when all trials have ended that were begun: how many pairs to run.

    Returns:
        The trials that failed, with the last line of their error.
    """
    todo = [p for p in plan if p.spec.trial_id not in finished]
    # With a searcher Tune starts one worker at a time, and gives that one up as soon as an older
    # worker is free: with trials shorter than a worker's start, one worker would do everything.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(PENDING_PER_SLOT * slots))
    events = _Events(folder, on_progress, on_finished)
    worker = tune.with_parameters(
        TrialWorker,
        plan={p.spec.trial_id: p for p in plan},
        folder=str(folder.resolve()),
        threads=max(1, int(resources.cpus_per_trial)),
    )
    demand = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}
    tuner = tune.Tuner(
        tune.with_resources(worker, {k: v for k, v in demand.items() if v}),
        tune_config=tune.TuneConfig(
            search_alg=_PlanSearcher(todo, finished, pairs_wanted),
            num_samples=len(todo),
            reuse_actors=True,
        ),
        run_config=TuneRunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            verbose=0,
            callbacks=[events],
            failure_config=FailureConfig(max_failures=RETRIES),
        ),
    )
    tuner.fit()
    return events.errors
