"""Metrics of the table through Ray, whose agent on each node serves them to Prometheus."""

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from esper.monitoring.metrics import METRICS


class RayExporter:
    """Keeps metrics in the process's worker of Ray; names get the prefix `ray_`."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        if by > 0:
            self._of(name).inc(by, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._of(name).set(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        self._of(name).observe(value, labels)

    def _of(self, name: str) -> Any:
        if name not in self._made:
            metric = METRICS[name]
            kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
            more = {"boundaries": list(metric.buckets)} if metric.buckets else {}
            self._made[name] = kinds[metric.kind](
                metric.name, metric.help, tag_keys=metric.labels, **more
            )
        return self._made[name]
