"""One trial: a shard that trains, a controller that decides, driven to the end and recorded.

The only place where trainer and controller meet. It knows nothing of Ray, and little of where the
shard lives.
"""

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from esper.config.base import ConfigError, validate
from esper.config.run import RunConfig, build_options
from esper.controller import CONTROLLERS, Controller, GrowthEvent, Shield
from esper.controller.base import ControllerOptions, GrowingOptions, memory_of
from esper.controller.replay import Replay
from esper.earlier_trials import commanded, kept_events
from esper.evidence.records import Fingerprint, FlagsRecord, TransitionRecord, TrialRecord
from esper.registry import UnknownNameError
from esper.seeds.actions import Rollback
from esper.seeds.lifecycle import Transition
from esper.seeds.report import Report
from esper.seeds.state import Stage
from esper.shards.shard import KasminaShard, Shards, ShardSpec, import_plugin
from esper.surgery.checkpoint_folder import CheckpointError, read_manifest
from esper.training.alarm import LossHistory, alarm
from esper.training.metrics import METRICS
from esper.training.trainer import CollapseError, Trainer

# two arms with different salts never share a seed
SALT_STRIDE = 1_000_003
# after its graft, a seed's gradient is watched for so many steps
NEW_SEED_STEPS = 100


@dataclass(frozen=True)
class TrialSpec:
    """Which trial of which sweep; travels to the worker that runs it.

    Attributes:
        arm: Name of the arm.
        pair: Index of the pair.
        seed: Seed of everything in the pair, before the arm's salt.
        order: Place of the arm in the random order of its pair.
        registration_hash: Of the question that this trial helps to answer.
        fingerprint: Of the code and machine.
    """

    arm: str
    pair: int
    seed: int
    order: int
    registration_hash: str
    fingerprint: Fingerprint

    @property
    def trial_id(self) -> str:
        """`<arm>-<pair>`."""
        return f"{self.arm}-{self.pair:03d}"


class Trial:
    """Runs one arm of one pair.

    Args:
        config: The arm's configuration.
        spec: Which trial it is.
        followed: Record of the followed arm of the same pair, if the arm follows one.
        replayed: Record whose decisions are taken again, in place of the controller's own.
        shards: Makes what trains; by default in this process.

    Attributes:
        controller: Who decides, behind the shield.
        shard: What trains.
        health: Where the shard stood at the end of the last interval.
        curves: One value an interval of everything that is watched, by name; NaN where it was
            not measured.
        acted: Actions applied in this process, by kind.
        known_collapses: Steps whose loss was no number before, too; None: whoever says so is
            believed at once.
        on_interval: Called after every interval, for whoever watches.

    Raises:
        ConfigError: If a plug-in is unknown, its options are wrong, or parts do not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: TrialSpec,
        followed: TrialRecord | None = None,
        replayed: TrialRecord | None = None,
        shards: Shards = KasminaShard,
    ) -> None:
        self.config, self.spec, self.shards = config, spec, shards
        self._followed, self._replayed = followed, replayed
        self._started = datetime.now(UTC)
        for module in config.plugins:
            import_plugin(module)
        _require_metrics(config.metrics)
        if config.kept_outputs and shards is not KasminaShard:
            raise ConfigError("kept_outputs", (
                "kept_outputs must be 0 where the network lives in other processes, but got "
                f"{config.kept_outputs}; train without shards.",
            ))  # fmt: skip
        seed = spec.seed + SALT_STRIDE * config.seed_salt
        self._seed = seed
        brain = build_options(CONTROLLERS, config.controller, "controller")
        events = () if followed is None else kept_events(followed)
        planted, events = (events, ()) if config.start == "grown" else ((), events)
        if replayed is None:
            self.controller = Shield(_build_controller(config, brain, seed, events))
        else:
            graft = brain.graft if isinstance(brain, GrowingOptions) else "linear"
            self.controller = Shield(Replay(commanded(replayed, graft)))
        self._flags = self._read_flags()
        try:
            self.shard = shards(ShardSpec(config, seed, planted))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"arm '{spec.arm}'", (str(error),)) from error
        self.curves: dict[str, list[float]] = {}
        # what ruled each interval so far
        self._ruled: list[FlagsRecord] = []
        self.acted = Counter[str]()
        self._losses = LossHistory()
        self._collapse: CollapseError | None = None
        self.known_collapses: Set[int] | None = None
        self.health = self.shard.health()
        self.on_interval: Callable[[Trial], None] = lambda trial: None

    @property
    def trainer(self) -> Trainer:
        """What trains, if that is in this process.

        Raises:
            TypeError: If it is not.
        """
        if not isinstance(self.shard, KasminaShard):
            raise TypeError(
                "the trial's shard must be in this process to show its trainer, but is a "
                f"{type(self.shard).__name__}; ask `trial.shard` or `trial.health`."
            )
        return self.shard.trainer

    @property
    def intervals(self) -> int:
        """Intervals of the whole trial."""
        return self.config.train.steps // self.config.train.interval_steps

    @property
    def done(self) -> bool:
        """Whether the trial has ended, well or badly."""
        return self._collapse is not None or self.health.step >= self.config.train.steps

    @property
    def collapsed(self) -> bool:
        """Whether the trial ended because its loss was no number."""
        return self._collapse is not None

    @property
    def flags(self) -> FlagsRecord | None:
        """What the flags chose for the last interval; None if the run names none."""
        return self._flags

    def run_for(self, seconds: float) -> dict[str, float]:
        """Run whole intervals until the time is up or the trial is done.

        Args:
            seconds: Least time to spend; at least one interval runs.

        Returns:
            The latest value of every curve.

        Raises:
            ConfigError: If the run's flags cannot be read; no interval was begun with them, and
                the call may be repeated.
        """
        deadline = time.monotonic() + seconds
        while not self.done:
            self._interval()
            if time.monotonic() >= deadline:
                break
        return {name: values[-1] for name, values in self.curves.items()}

    def _read_flags(self) -> FlagsRecord | None:
        """The flags for one interval, in force for the controller; None if the run names none."""
        config, flags = self.config, self.config.flags
        if flags is None:
            return None
        # only a run that names flags needs what they are read with
        from esper.release.choice import read_choice

        found = read_choice(flags, config.device, config.execution, os.environ)
        self.controller.closed = None if found.grows else (
            f"the flag kasmina.lifecycle is off for '{flags.model}'"
        )  # fmt: skip
        if found.policies is not None:
            heeded = self.controller.switch(frozenset(found.policies))
            if unheeded := sorted(set(found.policies) - heeded):
                raise ConfigError(str(flags.file), (
                    f"{unheeded[0]} must be off for '{flags.model}', because the run's "
                    f"controller '{config.controller.name}' does not heed it, but is on; choose "
                    f"another controller, or `esper flags set {unheeded[0]} --percent 0`.",
                ))  # fmt: skip
        return found

    def _interval(self) -> None:
        self._flags = self._read_flags()
        report, collapse = None, None
        # nothing is measured for a controller that will not germinate
        measures = self.controller.may_grow(self.health.interval + 1)
        execution = None if self._flags is None else self._flags.execution
        try:
            report = self.shard.run_interval(measures=measures, execution=execution)
        except CollapseError as error:
            # of several shards one may be broken: seeds and run are not to blame before it recurs
            known = self.known_collapses
            if known is not None and self.health.shards > 1 and error.step not in known:
                raise
            collapse = error
        reason = self._incident(report, collapse)
        suspects = [] if reason is None else self.shard.suspects()
        if suspects and self.controller.incidents < self.config.growth.max_rollbacks:
            self.controller.incidents += 1
            self._fail([Rollback(*place, str(reason)) for place in suspects])
        elif report is None:
            self._collapse = collapse
        else:
            assert report.loss is not None
            self._losses = self._losses.then(report.loss)
            self._grow(report)
        self._observe(report)

    def _incident(self, report: Report | None, collapse: CollapseError | None) -> str | None:
        """Why the interval broke the run, if it did."""
        if report is None or report.loss is None:
            return str(collapse)
        reason = alarm(report.loss, report.host_drift_frac, self._losses, self.config.growth)
        return reason and f"{reason} at step {report.step}"

    def _grow(self, report: Report) -> None:
        """Let the controller act at the end of a good interval."""
        # stages change between intervals alone, so that these are those of the interval
        training = self.health.stages.get(Stage.TRAINING.name)
        if training and (diverged := self.shard.diverged()):
            self._fail([Rollback(*place, "its own weights are no numbers") for place in diverged])
            return
        note = {"controller": self.controller.memory(), "losses": dataclasses.asdict(self._losses)}
        actions = self.controller.decide(report)
        rollbacks = [action for action in actions if isinstance(action, Rollback)]
        if rollbacks:
            # what else was decided would be undone in the same breath
            self._go_back(rollbacks)
        else:
            self.shard.apply(actions, note)
            self.acted.update(type(action).__name__ for action in actions)

    def _fail(self, rollbacks: list[Rollback]) -> None:
        """Roll seeds back that the controller did not give up itself."""
        self._go_back(rollbacks)
        self.controller.count_failures(len(rollbacks))

    def _go_back(self, rollbacks: list[Rollback]) -> None:
        self.acted[Rollback.__name__] += len(rollbacks)
        note = self.shard.roll_back(rollbacks)
        if note is not None:
            self.controller.go_back(note["controller"])
            self._losses = _losses_of(note["losses"])

    def _observe(self, report: Report | None) -> None:
        """Add a point to every curve; the last one of a run that collapsed has no metrics."""
        held_out = self.shard.evaluate("held_out")
        self.health = health = self.shard.health()
        point = {
            "step": health.step,
            "train_loss": None if report is None else report.loss,
            **(held_out if self._collapse is None else dict.fromkeys(held_out)),
            "parameters": health.parameters,
            "active_seeds": health.active_seeds,
            "grad_norm": None if report is None else report.grad_norm,
            "host_drift_frac": None if report is None else report.host_drift_frac,
            "new_seed_grad_ratio": None if report is None else self._insertion_health(report),
            "vetoes": len(self.controller.vetoes),
            "shards": health.shards,
            "train_seconds": health.cost.seconds,
        }
        for name, value in point.items():
            # a value that was not measured is recorded as such, so that all curves have one length
            self.curves.setdefault(name, []).append(math.nan if value is None else float(value))
        if self._flags is not None:
            self._ruled.append(self._flags)
        self.on_interval(self)

    def _insertion_health(self, report: Report) -> float | None:
        """Median gradient of seeds grafted at most 100 steps ago over the host's; None if none."""
        newest = NEW_SEED_STEPS / self.config.train.interval_steps
        ratios = [
            float(site.grad_ratio[seed])
            for site in report.sites
            for seed in site.seeds_in(Stage.GRAFTING, Stage.FINE_TUNING)
            if site.epochs[seed] <= newest and not math.isnan(site.grad_ratio[seed])
        ]
        return median(ratios) if ratios else None

    def save(self, folder: str | Path, wait: bool = True) -> None:
        """Write a checkpoint from which `resume` goes on; a former one is replaced.

        Bit for bit on the same device: loss curve, growth log, random numbers and order of the
        data. Nothing is pickled. `esper.load` reads the model and its lattice from it, too.

        Args:
            folder: Where: a folder, or a URI (`s3://bucket/name`).
            wait: Until it is written; otherwise the trial may go on meanwhile, and what goes wrong
                is raised by the next call or by `settle` of the shard.

        Raises:
            CheckpointError: If the folder holds something else.
            CheckpointNotWrittenError: If the disk is full or fails; a former one is as it was.
        """
        records = {"followed": self._followed, "replayed": self._replayed}
        content = {
            "config": self.config.model_dump(mode="json"),
            "spec": dataclasses.asdict(self.spec)
            | {"fingerprint": self.spec.fingerprint.model_dump(mode="json")},
            **{k: None if r is None else r.model_dump(mode="json") for k, r in records.items()},
            "started_at": self._started.isoformat(),
            "controller": self.controller.state_dict(),
            "losses": dataclasses.asdict(self._losses),
            "curves": {name: list(values) for name, values in self.curves.items()},
            "flags": [ruled.model_dump(mode="json") for ruled in self._ruled],
            "collapse": None if self._collapse is None else self._collapse.args,
        }
        self.shard.checkpoint(folder, {"trial": content}, wait=wait)

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        shards: Shards = KasminaShard,
        config: RunConfig | None = None,
    ) -> "Trial":
        """The trial whose checkpoint the folder holds, rebuilt from the file alone.

        The modules named under `plugins` must be importable, as when it was saved.

        Args:
            folder: The checkpoint.
            shards: Makes what trains, as for a new trial.
            config: To go on with, in place of the trial's own; another learning rate, growth or
                options of the controller.

        Raises:
            CheckpointError: If the folder holds no trial, is damaged, or does not fit the host
                or data that its own configuration gives now.
            ConfigError: If that configuration is not valid any more.
        """
        manifest = read_manifest(folder)
        if "trial" not in manifest:
            raise CheckpointError(
                f"{folder} must hold a trial to go on with, but holds a model alone; "
                "use `esper.load`."
            )
        saved = manifest["trial"]
        spec = TrialSpec(
            **saved["spec"] | {"fingerprint": Fingerprint(**saved["spec"]["fingerprint"])}
        )
        records = {
            k: None if saved[k] is None else TrialRecord.model_validate(saved[k])
            for k in ("followed", "replayed")
        }
        config = config or validate(RunConfig, saved["config"], source=str(folder))
        trial = cls(config, spec, **records, shards=shards)
        trial._ruled = [FlagsRecord.model_validate(ruled) for ruled in saved.get("flags", ())]
        try:
            trial.shard.restore(folder, trial._ruled[-1].execution if trial._ruled else None)
            trial.health = trial.shard.health()
        except BaseException:
            trial.shard.close()
            raise
        trial.controller.load_state_dict(saved["controller"])
        trial.curves, trial._losses = saved["curves"], _losses_of(saved["losses"])
        trial._started = datetime.fromisoformat(saved["started_at"])
        if saved["collapse"] is not None:
            trial._collapse = CollapseError(*saved["collapse"])
        return trial

    def record(self) -> TrialRecord:
        """The finished trial's evidence.

        Raises:
            RuntimeError: If the trial has not ended.
        """
        if not self.done:
            raise RuntimeError(
                f"trial {self.spec.trial_id} must be done to be recorded, "
                f"but is at step {self.health.step}; call run_for again."
            )
        spec = self.spec
        log = self.shard.log()
        return TrialRecord(
            trial_id=spec.trial_id,
            arm=spec.arm,
            pair=spec.pair,
            seed=self._seed,
            order=spec.order,
            registration_hash=spec.registration_hash,
            fingerprint=spec.fingerprint,
            started_at=self._started,
            ended_at=datetime.now(UTC),
            status="finished" if self._collapse is None else "collapsed",
            collapse_reason=None if self._collapse is None else str(self._collapse),
            metrics=self._final_metrics(log) | self._own_metrics(),
            curves=self.curves,
            flags=None if self.config.flags is None else self._ruled,
            outputs=self._outputs(),
            transitions=[_record(t) for t in log],
            sites=dict(self.health.seeds),
        )

    def _outputs(self) -> list[list[float]] | None:
        """Of the trained network, if the run keeps them."""
        if not self.config.kept_outputs or self._collapse is not None:
            return None
        kept: list[list[float]] = self.trainer.outputs(self.config.kept_outputs).tolist()
        return kept

    def metric_names(self) -> set[str]:
        """Names of the final metrics, known before the trial has run."""
        return {*self._final_metrics([]), *self.config.metrics}

    def _own_metrics(self) -> dict[str, float]:
        """Those that the configuration names; NaN in a trial that collapsed."""
        if self._collapse is not None:
            return dict.fromkeys(self.config.metrics, math.nan)
        return self.shard.own_metrics(self.config.metrics, self._seed)

    def _final_metrics(self, log: list[Transition]) -> dict[str, float]:
        metrics = self.shard.evaluate("train", "held_out", "test")
        if self._collapse is not None:
            metrics = dict.fromkeys(metrics, math.nan)
        ends = Counter(t.after.stage for t in log)
        health, cost = self.health, self.health.cost
        return metrics | {
            "parameters": float(health.parameters),
            "host_parameters": float(health.host_parameters),
            "steps": float(health.step),
            # what growing took is part of what training took
            "train_flops": cost.flops + cost.growth_flops,
            "train_seconds": cost.seconds + cost.growth_seconds,
            "growth_flops": cost.growth_flops,
            "growth_seconds": cost.growth_seconds,
            "seeds_kept": float(health.active_seeds),
            "seeds_culled": float(ends[Stage.CULLED]),
            "seeds_rolled_back": float(ends[Stage.ROLLED_BACK]),
            "vetoes": float(len(self.controller.vetoes)),
        }


def _build_controller(
    config: RunConfig, options: ControllerOptions, seed: int, events: tuple[GrowthEvent, ...]
) -> Controller:
    controller = options.build(seed, events)
    try:
        memory_of(controller)
    except ValueError as error:
        raise ConfigError("controller", (f"'{config.controller.name}': {error}",)) from None
    return controller


def _losses_of(saved: dict[str, Any]) -> LossHistory:
    return LossHistory(saved["first"], tuple(saved["recent"]))


def _require_metrics(names: tuple[str, ...]) -> None:
    try:
        for name in names:
            METRICS[name]
    except UnknownNameError as error:
        raise ConfigError("metrics", (f"metrics: {error}",)) from None


def _record(t: Transition) -> TransitionRecord:
    return TransitionRecord(
        interval=t.interval,
        step=t.step,
        site=t.action.site,
        seed=t.action.seed,
        action=type(t.action).__name__,
        before=t.before.stage.name,
        after=t.after.stage.name,
        blueprint=t.blueprint,
        reason=getattr(t.action, "reason", ""),
    )
