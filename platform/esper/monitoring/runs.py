"""Metrics of a run, set after every interval from what the trial knows anyway."""

import math
import time

from esper.monitoring.metrics import Exporter
from esper.seeds.state import Stage
from esper.trial import Trial

_LATEST = {
    "train_loss": "esper_run_train_loss",
    "held_out_loss": "esper_run_held_out_loss",
    "parameters": "esper_run_parameters",
    "grad_norm": "esper_run_grad_norm",
    "host_drift_frac": "esper_run_host_drift_frac",
    "shards": "esper_run_shards",
}


class RunMetrics:
    """Sets the metrics of one run.

    Args:
        exporter: Where.
        run: Name of the run.
        trial: The run, before its first interval or resumed.
    """

    def __init__(self, exporter: Exporter, run: str, trial: Trial) -> None:
        self._exporter, self._run = exporter, run
        self._before = time.monotonic()
        self._totals = dict[tuple[str, str], float]()
        self._count(trial, show=False)

    def interval(self, trial: Trial) -> None:
        """Set everything; to be called after every interval."""
        now = time.monotonic()
        seconds, self._before = now - self._before, now
        self._exporter.observe("esper_run_interval_seconds", seconds, run=self._run)
        self._exporter.count("esper_run_intervals_total", run=self._run)
        for curve, name in _LATEST.items():
            # what was not measured keeps no value that was measured before
            self._exporter.set(name, trial.curves[curve][-1], run=self._run)
        stages = dict(trial.health.stages)
        stages[Stage.DORMANT.name] = sum(trial.health.seeds.values()) - sum(stages.values())
        for stage in Stage:
            seeds = stages.get(stage.name, 0)
            self._exporter.set("esper_run_seeds", seeds, run=self._run, stage=stage.name)
        execution = trial.config.execution
        if trial.flags is not None:
            execution = trial.flags.execution
        for name in ("loop", "vectorised", "kernels"):
            self._exporter.set(
                "esper_run_execution", name == execution, run=self._run, execution=name
            )
        self._count(trial, show=True)

    def _count(self, trial: Trial, *, show: bool) -> None:
        """Raise counters to what the trial says; what is run again after a failure counts once."""
        controller = trial.controller
        totals: dict[tuple[str, str], float] = {
            ("esper_run_steps_total", ""): trial.health.step,
            ("esper_run_train_seconds_total", ""): trial.health.cost.seconds,
            ("esper_run_vetoes_total", ""): len(controller.vetoes),
            ("esper_run_incidents_total", ""): controller.incidents,
            ("esper_run_collapsed_total", ""): trial.collapsed,
            **{("esper_run_actions_total", name): n for name, n in trial.acted.items()},
            **{("esper_run_decisions_total", name): n for name, n in controller.sources().items()},
        }
        labels = {"esper_run_actions_total": "action", "esper_run_decisions_total": "source"}
        for key, total in totals.items():
            name, value = key
            before = self._totals.get(key, 0.0)
            more = total - before
            if show and more >= 0 and math.isfinite(more):
                extra = {labels[name]: value} if name in labels else {}
                self._exporter.count(name, more, run=self._run, **extra)
            self._totals[key] = max(total, before)
