"""One trial: a task, a host with its lattice, a controller, trained to the end and recorded.

The only place where trainer and controller meet. It knows nothing of Ray.
"""

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError

from esper.config.base import ConfigError, explain
from esper.config.run import Plugin, RunConfig
from esper.controller import CONTROLLERS, GrowthEvent, Shield
from esper.evidence.records import Fingerprint, TransitionRecord, TrialRecord
from esper.registry import Registry, UnknownNameError
from esper.seeds.lifecycle import Transition
from esper.seeds.report import Report
from esper.seeds.state import AWAKE_STAGES, Stage
from esper.surgery.lattice import Lattice, attach
from esper.training.hosts import HOSTS
from esper.training.tasks import TASKS
from esper.training.trainer import CollapseError, Trainer

M = TypeVar("M", bound=BaseModel)
# two arms with different salts never share a seed
SALT_STRIDE = 1_000_003


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

    Raises:
        ConfigError: If a plug-in is unknown, its options are wrong, or parts do not fit.
    """

    def __init__(
        self, config: RunConfig, spec: TrialSpec, followed: TrialRecord | None = None
    ) -> None:
        self._config, self._spec = config, spec
        self._started = datetime.now(UTC)
        for module in config.plugins:
            _import_plugin(module)
        seed = spec.seed + SALT_STRIDE * config.seed_salt
        self._seed = seed
        # every arm of a pair draws the same host and the same data
        torch.manual_seed(seed)
        task = build_options(TASKS, config.task, "task")
        host = build_options(HOSTS, config.host, "host")
        brain = build_options(CONTROLLERS, config.controller, "controller")
        _require_device(config.device)
        data = task.load(seed)
        events = () if followed is None else kept_events(followed)
        try:
            model = host.build(data).to(config.device)
            lattice = _attach_all(model, config, seed)
            if config.start == "grown":
                for event in events:
                    lattice.plant(event.site, event.seed, event.blueprint)
                events = ()
            self.trainer = Trainer(
                data, model, lattice, config.train, seed=seed, device=config.device
            )
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"arm '{spec.arm}'", (str(error),)) from error
        self.controller = Shield(brain.build(seed, events))
        self.curves: dict[str, list[float]] = {}
        self._transitions: list[Transition] = []
        self._collapse: CollapseError | None = None

    @property
    def intervals(self) -> int:
        """Intervals of the whole trial."""
        return self._config.train.steps // self._config.train.interval_steps

    @property
    def done(self) -> bool:
        """Whether the trial has ended, well or badly."""
        return self._collapse is not None or self.trainer.step >= self._config.train.steps

    def run_for(self, seconds: float) -> dict[str, float]:
        """Run whole intervals until the time is up or the trial is done.

        Args:
            seconds: Least time to spend; at least one interval runs.

        Returns:
            The latest value of every curve.
        """
        deadline = time.monotonic() + seconds
        while not self.done:
            self._interval()
            if time.monotonic() >= deadline:
                break
        return {name: values[-1] for name, values in self.curves.items()}

    def _interval(self) -> None:
        try:
            report = self.trainer.run_interval()
        except CollapseError as error:
            self._collapse = error
            self._observe(None)
            return
        self._transitions += self.trainer.apply(self.controller.decide(report))
        self._observe(report)

    def _observe(self, report: Report | None) -> None:
        """Add a point to every curve; the last one of a run that collapsed has no metrics."""
        held_out = self.trainer.evaluate("held_out")
        point = {
            "step": self.trainer.step,
            "train_loss": None if report is None else report.loss,
            **(dict.fromkeys(held_out) if report is None else held_out),
            "parameters": self.trainer.lattice.count_parameters(),
            "active_seeds": self.trainer.lattice.count_awake(),
            "grad_norm": None if report is None else report.grad_norm,
            "host_drift_frac": None if report is None else report.host_drift_frac,
            "vetoes": len(self.controller.vetoes),
            "train_seconds": self.trainer.cost.seconds,
        }
        for name, value in point.items():
            # a value that was not measured is recorded as such, so that all curves have one length
            self.curves.setdefault(name, []).append(math.nan if value is None else float(value))

    def record(self) -> TrialRecord:
        """The finished trial's evidence.

        Raises:
            RuntimeError: If the trial has not ended.
        """
        if not self.done:
            raise RuntimeError(
                f"trial {self._spec.trial_id} must be done to be recorded, "
                f"but is at step {self.trainer.step}; call run_for again."
            )
        spec, lattice = self._spec, self.trainer.lattice
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
            metrics=self._final_metrics(),
            curves=self.curves,
            transitions=[_record(t) for t in self._transitions],
            sites={name: a.layer.num_seeds for name, a in lattice.attached.items()},
        )

    def metric_names(self) -> set[str]:
        """Names of the final metrics, known before the trial has run."""
        return set(self._final_metrics())

    def _final_metrics(self) -> dict[str, float]:
        trainer = self.trainer
        metrics = {k: v for split in ("train", "held_out", "test")
                   for k, v in trainer.evaluate(split).items()}  # fmt: skip
        if self._collapse is not None:
            metrics = dict.fromkeys(metrics, math.nan)
        culled = sum(t.after.stage is Stage.CULLED for t in self._transitions)
        return metrics | {
            "parameters": float(trainer.lattice.count_parameters()),
            "host_parameters": float(sum(p.numel() for p in trainer.lattice.host_parameters())),
            "steps": float(trainer.step),
            "train_flops": trainer.cost.flops,
            "train_seconds": trainer.cost.seconds,
            "seeds_kept": float(trainer.lattice.count_awake()),
            "seeds_culled": float(culled),
            "vetoes": float(len(self.controller.vetoes)),
        }


def build_options(registry: Registry[type[M]], plugin: Plugin, path: str) -> M:
    """The options of a plug-in, checked.

    Raises:
        ConfigError: With the path of the wrong name or option.
    """
    try:
        kind = registry[plugin.name]
    except UnknownNameError as error:
        raise ConfigError(path, (f"{path}.name: {error}",)) from None
    try:
        return kind.model_validate(plugin.options)
    except ValidationError as error:
        raise ConfigError(path, explain(kind, error, at=f"{path}.options")) from None


def kept_events(record: TrialRecord) -> tuple[GrowthEvent, ...]:
    """What a finished trial germinated and still had at its end, in order."""
    last: dict[tuple[str, int], TransitionRecord] = {}
    germinated: dict[tuple[str, int], TransitionRecord] = {}
    for t in record.transitions:
        key = (t.site, t.seed)
        last[key] = t
        if t.action == "Germinate":
            germinated[key] = t
    awake = {stage.name for stage in AWAKE_STAGES}
    kept = [germinated[key] for key, t in last.items() if t.after in awake]
    kept.sort(key=lambda t: t.interval)
    return tuple(GrowthEvent(t.interval, t.site, t.seed, t.blueprint) for t in kept)


def _attach_all(model: torch.nn.Module, config: RunConfig, seed: int) -> Lattice:
    lattice = Lattice(model, seed)
    lattice.growth = config.growth
    for site in config.lattice:
        options = site.model_dump()
        pattern = options.pop("sites")
        lattice = attach(model, pattern, **options, growth=config.growth, seed=seed)
    return lattice


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch without CUDA asserts
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", (
            f"device must be usable on this machine, but '{device}' is not: {error}.",
        )) from error  # fmt: skip


def _import_plugin(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigError("plugins", (
            f"plugins must be importable modules, but '{module}' is not: {error}; "
            "install it or set PYTHONPATH.",
        )) from error  # fmt: skip


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
