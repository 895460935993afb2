"""Every metric: its name, kind, unit and labels, and how many series it can have at most.

Two exporters set them: that of `prometheus_client` for a process that serves its own /metrics
(Tamiyo's service, `esper run --metrics-port`), and that of Ray for workers of a cluster, whose
names Ray prefixes with `ray_`; docs/monitoring.md has the rule that takes the prefix off.

No metric has a label for a seed or a site: a layer of a million seeds costs as many series as one
of ten.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from esper.seeds.state import Stage

Kind = Literal["counter", "gauge", "histogram"]
# what the bound on the number of series reckons with
MOST: dict[str, int] = {
    "run": 64, "sweep": 16, "arm": 16, "state": 5, "stage": len(Stage), "action": 6, "source": 2,
    "execution": 3, "flag": 16, "implementation": 2, "measure": 2, "batch": 8, "replica": 8,
    "route": 12, "status": 14, "policy": 8, "kind": 2, "blueprint": 8, "outcome": 4,
}  # fmt: skip
MAX_SERIES = 10_000
# of intervals of training, and of decisions
_INTERVAL_S = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_DECISION_S = (0.0003, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5, 1)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: With its unit as its end; counters end in `_total`.
        kind: What it is.
        help: What it counts or measures.
        labels: Names of its labels; `MOST` has how many values of each there may be at once.
        buckets: Upper bounds of a histogram.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> int:
        """The most series that it can have."""
        each = len(self.buckets) + 3 if self.kind == "histogram" else 1
        return each * math.prod(MOST[label] for label in self.labels)


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        # runs, set after every interval
        Metric("esper_run_steps_total", "counter", "Training steps.", ("run",)),
        Metric("esper_run_intervals_total", "counter", "Intervals.", ("run",)),
        Metric("esper_run_interval_seconds", "histogram",
               "Duration of an interval, with report, decision and evaluation.", ("run",),
               _INTERVAL_S),
        Metric("esper_run_train_seconds_total", "counter",
               "Time in training steps; the rest of an interval is growth.", ("run",)),
        Metric("esper_run_train_loss", "gauge", "Mean training loss of the interval.", ("run",)),
        Metric("esper_run_held_out_loss", "gauge", "Held-out loss.", ("run",)),
        Metric("esper_run_parameters", "gauge", "Parameters of host and awake seeds.", ("run",)),
        Metric("esper_run_seeds", "gauge", "Seeds by stage.", ("run", "stage")),
        Metric("esper_run_grad_norm", "gauge", "Norm of the host's gradient.", ("run",)),
        Metric("esper_run_host_drift_frac", "gauge",
               "Relative change of the host's weights in an interval.", ("run",)),
        Metric("esper_run_actions_total", "counter", "Actions applied to seeds.",
               ("run", "action")),
        Metric("esper_run_vetoes_total", "counter", "Actions that the shield refused.", ("run",)),
        Metric("esper_run_incidents_total", "counter",
               "Times the run broke and went back.", ("run",)),
        Metric("esper_run_collapsed_total", "counter", "Runs that ended by a collapse.", ("run",)),
        Metric("esper_run_decisions_total", "counter",
               "Decisions of a remote controller by their source.", ("run", "source")),
        Metric("esper_run_shards", "gauge", "Devices that train the run.", ("run",)),
        Metric("esper_run_execution", "gauge", "1 for how the run's seeds compute.",
               ("run", "execution")),
        # sweeps, set by their driver
        Metric("esper_sweep_trials", "gauge", "Trials of a sweep, by state.",
               ("sweep", "state", "arm")),
        Metric("esper_sweep_active_seeds", "gauge",
               "Seeds that live in the trials that run.", ("sweep",)),
        Metric("esper_sweep_gpus_in_use", "gauge",
               "GPUs that the running trials were given.", ("sweep",)),
        Metric("esper_sweep_seconds_left", "gauge",
               "Until the sweep ends; -1 while nothing is known.", ("sweep",)),
        # the migration, by `esper monitoring export`
        Metric("esper_flag_rollout_frac", "gauge", "Share of the models that get it.", ("flag",)),
        Metric("esper_flag_killed", "gauge", "1 if its kill switch is on.", ("flag",)),
        Metric("esper_flag_days_left", "gauge", "Days until it expires.", ("flag",)),
        Metric("esper_baseline_seconds", "gauge", "Median duration in a stored baseline.",
               ("implementation", "measure", "batch")),
        # Tamiyo's service, by its replicas
        Metric("esper_tamiyo_requests_total", "counter", "Requests.",
               ("replica", "route", "status")),
        Metric("esper_tamiyo_decision_seconds", "histogram", "Time to decide, without transport.",
               ("replica",), _DECISION_S),
        Metric("esper_tamiyo_decisions_total", "counter",
               "Decisions: 'grow' if a seed is germinated, else 'wait'.",
               ("replica", "policy", "kind")),
        Metric("esper_tamiyo_germinations_total", "counter", "Seeds germinated.",
               ("replica", "policy", "blueprint")),
        Metric("esper_tamiyo_vetoes_total", "counter", "Actions that the shield refused.",
               ("replica", "policy")),
        Metric("esper_tamiyo_policy_active", "gauge", "1 for the active policy.",
               ("replica", "policy")),
        Metric("esper_tamiyo_field_reports_total", "counter", "Field reports stored.",
               ("replica", "outcome")),
    )
}  # fmt: skip


class Exporter(Protocol):
    """Sets metrics of the table."""

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""


class PrometheusExporter:
    """Keeps metrics in a registry of `prometheus_client`.

    Args:
        prefixes: Of the metrics that this process sets; others are not shown.
        constant: Labels that are the same for all of this process.
    """

    def __init__(self, *prefixes: str, constant: Mapping[str, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._constant = dict(constant or {})
        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._made: dict[str, Any] = {}
        for metric in METRICS.values():
            if metric.name.startswith(prefixes):
                more = {"buckets": metric.buckets} if metric.buckets else {}
                self._made[metric.name] = kinds[metric.kind](
                    metric.name, metric.help, metric.labels, registry=self.registry, **more
                )

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._of(name, labels).inc(by)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._of(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        self._of(name, labels).observe(value)

    def _of(self, name: str, labels: dict[str, str]) -> Any:
        metric = self._made[name]
        own = {k: v for k, v in self._constant.items() if k in METRICS[name].labels}
        return metric.labels(**own, **labels) if METRICS[name].labels else metric


def most_series(prefixes: Sequence[str] = ("",)) -> int:
    """The most series that all metrics together can have."""
    return sum(m.series for m in METRICS.values() if m.name.startswith(tuple(prefixes)))
