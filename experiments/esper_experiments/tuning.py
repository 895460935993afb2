"""A search over growth policies with Ray Tune's searchers and schedulers, at a budget of steps."""

import json
import math
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from ray.tune import RunConfig as TuneRunConfig
from ray.tune import Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from esper.config.base import ConfigError
from esper.config.tune import Domain, TuneConfig, shown
from esper.environment import code_hash, fingerprint
from esper.evidence.records import Fingerprint, TrialRecord, read_json, write_json, write_text
from esper.shards.group import groups
from esper.shards.shard import KasminaShard
from esper.tracking.mlflow_sink import MlflowSink
from esper.trial import Trial, TrialSpec
from esper_experiments.ray_variables import set_variables
from esper_experiments.room import find_room, start_ray, stop_ray
from esper_experiments.sweep import SweepIncompleteError, check

# what a run that collapsed is worth to searchers, which know no missing value
COLLAPSED = 1e30
LEDGER = "candidates.json"
# Tune's own state, with which an interrupted search goes on
SAVED_S = 2


@dataclass
class Candidate:
    """One candidate as far as it ran.

    Attributes:
        values: By dotted key; with pbt those that it ended with.
        steps: At which it stands.
        used_steps: That were computed for it.
        value: The latest of the search's metric; None: it collapsed.
        ended: Whether it ran to its end.
        changes: With pbt: at which step which values began.
    """

    values: dict[str, Any]
    steps: int = 0
    used_steps: int = 0
    value: float | None = None
    ended: bool = False
    changes: tuple[tuple[int, dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        folder: Where its records lie.
        candidates: All of them by name.
        best: Name of the best that ran to its end.
        used_steps: That all candidates took together.
    """

    folder: Path
    candidates: dict[str, Candidate]
    best: str
    used_steps: int


class _Runner(tune.Trainable):
    """A thin shell around `Trial`: one call, one report."""

    def setup(self, config: dict[str, Any], search: TuneConfig, folder: str) -> None:  # type: ignore[override]
        torch.set_num_threads(max(1, int(search.resources.cpus_per_trial)))
        self._search, self._folder = search, Path(folder)
        self._trial: Trial | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._values = new_config["values"]
        return True

    def _begun(self) -> Trial:
        name = self.trial_id.rpartition("_")[2]
        return _begin(self._search, self._values, name, self._shards())

    def _shards(self) -> Any:
        asked = self._search.resources.shards_config
        return KasminaShard if asked is None else groups(asked)

    def step(self) -> dict[str, Any]:
        trial = self._trial = self._trial or self._begun()
        begun = trial.health.step
        latest: dict[str, float] = {}
        while not trial.done and trial.health.step - begun < self._search.every_steps:
            latest = trial.run_for(0.0)
        value = latest[self._search.metric]
        if trial.done:
            record = trial.record()
            write_json(self._folder / "trials" / f"{record.trial_id}.json", record)
            if record.status == "collapsed":
                value = math.nan
        worst = -COLLAPSED if self._search.higher_is_better else COLLAPSED
        return {
            "done": trial.done,
            "value": value if math.isfinite(value) else worst,
            "steps": trial.health.step,
            "new_steps": trial.health.step - begun,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (self._trial or self._begun()).save(Path(checkpoint_dir) / "trial")

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.cleanup()
        run = self._search.candidate(self._values)
        self._trial = Trial.resume(Path(checkpoint) / "trial", self._shards(), config=run)

    def cleanup(self) -> None:
        if self._trial is not None:
            self._trial.shard.close()
        self._trial = None


def _begin(search: TuneConfig, values: Mapping[str, Any], name: str, shards: Any) -> Trial:
    run = search.candidate(values)
    mark = Fingerprint(**fingerprint(run.device))
    spec = TrialSpec(f"candidate-{name}", 0, search.seed, 0, search.config_hash, mark)
    return Trial(run, spec, shards=shards)


def _check(search: TuneConfig) -> None:
    """Build every end of every range once, without training."""
    known = _begin(search, {}, "check", KasminaShard).metric_names()
    held_out = sorted(name for name in known if name.startswith("held_out_"))
    if search.metric not in held_out:
        raise ConfigError("metric", (
            f"metric must be one of the task's ({', '.join(held_out)}), but got "
            f"'{search.metric}'.",
        ))  # fmt: skip
    for key, domain in search.space.items():
        for end in domain.ends:
            check(search.confirmation({key: end}))


class _Ledger(Stopper):
    """Counts steps, writes down what every candidate did, and ends the search with its budget."""

    def __init__(self, search: TuneConfig, folder: Path) -> None:
        self._search, self._path = search, folder / LEDGER
        self._read()

    def _read(self) -> None:
        self.candidates = read_ledger(self._path) if self._path.exists() else {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        values = result["config"]["values"]
        c = self.candidates.setdefault(trial_id.rpartition("_")[2], Candidate(values))
        if result["steps"] == result["new_steps"]:
            # its first report; what an interruption lost is no part of the budget
            c.used_steps, c.changes = 0, ()
        if not c.changes or c.changes[-1][1] != values:
            c.changes = (*c.changes, (result["steps"] - result["new_steps"], values))
        c.values, c.steps, c.ended = values, result["steps"], result["done"]
        c.value = None if abs(result["value"]) == COLLAPSED else result["value"]
        c.used_steps += result["new_steps"]
        content = {k: asdict(v) for k, v in self.candidates.items()}
        write_text(self._path, json.dumps(content, indent=1))
        if c.ended:
            self._tell(trial_id.rpartition("_")[2], c)
        return False

    def _tell(self, name: str, c: Candidate) -> None:
        used = sum(c.used_steps for c in self.candidates.values()) / self._search.budget_steps
        value = "collapsed" if c.value is None else f"{self._search.metric} {c.value:.4g}"
        print(f"[{used:4.0%} of the budget] {name}: {value}; {shown(c.values)}", flush=True)

    def stop_all(self) -> bool:
        used = sum(c.used_steps for c in self.candidates.values())
        return used >= self._search.budget_steps


def read_ledger(path: Path) -> dict[str, Candidate]:
    """What the candidates of a search did.

    Raises:
        ConfigError: If the file is damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        return {name: Candidate(**fields) for name, fields in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(str(path), (
            f"it must be a search's list of candidates, but: {error}; move its folder away.",
        )) from None  # fmt: skip


def search_folder(search: TuneConfig) -> Path:
    """Where a search lies; another configuration or other code has another folder."""
    return search.output_dir / f"{search.name}-{search.config_hash[:8]}-{code_hash()[:8]}"


def run_search(search: TuneConfig) -> Found:
    """Search, or go on with a search that was interrupted.

    Raises:
        ConfigError: If a candidate cannot be built; nothing has started then.
        SweepIncompleteError: If candidates failed, or none ran to its end.
    """
    _check(search)
    folder = search_folder(search).resolve()
    if not (folder / "search.json").exists():
        _run(search, folder)
        write_json(folder / "search.json", search)
    candidates = read_ledger(folder / LEDGER)
    whole = {k: c.value for k, c in candidates.items() if c.ended and c.value is not None}
    if not whole:
        raise SweepIncompleteError(("every candidate",), ("all of them collapsed",))
    best = (max if search.higher_is_better else min)(whole, key=lambda k: whole[k])
    return Found(folder, candidates, best, sum(c.used_steps for c in candidates.values()))


def _run(search: TuneConfig, folder: Path) -> None:
    set_variables()
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(SAVED_S)
    resources = search.resources
    runner = tune.with_resources(
        tune.with_parameters(_Runner, search=search, folder=str(folder)), _place(search)
    )
    start_ray(resources)
    try:
        slots = find_room(resources, search.candidate({}).device).slots
        if tune.Tuner.can_restore(folder / "tune"):
            tuner = tune.Tuner.restore(
                str(folder / "tune"), runner, resume_unfinished=True, restart_errored=True
            )
        else:
            tuner = _tuner(search, folder, runner, slots)
        results = tuner.fit()
    finally:
        stop_ray()
    if results.errors:
        lines = tuple(str(error).strip().splitlines()[-1] for error in results.errors)
        raise SweepIncompleteError(tuple(f"candidate {i}" for i in range(len(lines))), lines)


def _place(search: TuneConfig) -> dict[str, float]:
    asked = search.resources
    if asked.shards > 1:
        return {"memory": 1}
    gpus = {"GPU": asked.gpus_per_trial} if asked.gpus_per_trial else {}
    return {"CPU": asked.cpus_per_trial} | gpus


def _tuner(search: TuneConfig, folder: Path, runner: Any, slots: int) -> tune.Tuner:
    # what Tune's schedulers draw with
    random.seed(search.seed)
    np.random.seed(search.seed)  # noqa: NPY002
    space = {key: _domain(domain) for key, domain in search.space.items()}
    return tune.Tuner(
        runner,
        param_space={"values": space},
        tune_config=tune.TuneConfig(
            metric="value",
            mode="max" if search.higher_is_better else "min",
            search_alg=_searcher(search, slots),
            scheduler=_scheduler(search, space),
            # of those that stop early there may be as many as the budget allows
            num_samples=-1 if search.asha else search.budget_runs,
            max_concurrent_trials=None if search.search == "random" else slots,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=TuneRunConfig(
            name="tune", storage_path=str(folder), verbose=0, stop=_Ledger(search, folder)
        ),
    )


def _domain(domain: Domain) -> Any:
    if domain.choice is not None:
        return tune.choice(list(domain.choice))
    if domain.integer is not None:
        low, high = domain.integer
        return tune.randint(low, high + 1)
    if domain.loguniform is not None:
        return tune.loguniform(*domain.loguniform)
    assert domain.uniform is not None
    return tune.uniform(*domain.uniform)


def _searcher(search: TuneConfig, slots: int) -> Any:
    if search.search == "random":
        return BasicVariantGenerator(random_state=search.seed, max_concurrent=slots)
    try:
        import optuna
    except ImportError:
        raise ConfigError("search", (
            "search optuna must have Optuna installed, but it is missing; "
            "pip install 'esper-morphogenetic[tune]'.",
        )) from None  # fmt: skip
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(sampler=optuna.samplers.TPESampler(seed=search.seed))


def _scheduler(search: TuneConfig, space: Mapping[str, Any]) -> Any:
    if search.asha is not None:
        return ASHAScheduler(
            time_attr="steps",
            max_t=search.candidate({}).train.steps,
            grace_period=search.asha.grace_steps,
            reduction_factor=search.asha.reduction_factor,
        )
    if search.pbt is not None:
        return PopulationBasedTraining(
            time_attr="steps",
            perturbation_interval=search.pbt.every_steps,
            quantile_fraction=search.pbt.quantile_frac,
            hyperparam_mutations={"values": dict(space)},
        )
    return FIFOScheduler()


def records_of(found: Found) -> list[TrialRecord]:
    """The records of the candidates that ran to their end."""
    paths = sorted((found.folder / "trials").glob("candidate-*.json"))
    remedy = "delete the file to run that candidate again"
    return [read_json(path, TrialRecord, remedy=remedy) for path in paths]


def log_candidates(search: TuneConfig, found: Found) -> None:
    """Store every candidate that ran to its end in MLflow, under one run of the search."""
    best = found.candidates[found.best]
    sink = MlflowSink.open(
        search.mlflow.tracking_uri,
        search.mlflow.experiment,
        search.name,
        found.folder.name,
        search.model_dump(mode="json", exclude={"mlflow", "output_dir", "confirm"}),
        {"config_hash": search.config_hash, "evidence": str(found.folder), "best": found.best},
    )
    for record in records_of(found):
        name = record.arm.removeprefix("candidate-")
        run = search.candidate(found.candidates[name].values)
        sink.submit_trial(record, run.model_dump(mode="json"))
    sink.log_note(
        f"Search **{search.name}**: best of {len(found.candidates)} candidates is {found.best} "
        f"with {search.metric} {best.value:.4g}: {shown(best.values)}. "
        "A search is no evidence: see the sweep that tests it."
    )
    sink.finish()
