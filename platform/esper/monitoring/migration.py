"""Metrics of the migration: what its files say, read when Prometheus asks."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily

from esper.evidence import baseline as baselines
from esper.evidence.baseline_stats import level
from esper.monitoring.metrics import METRICS
from esper.release.flags import FULL_BP, load_flags


class MigrationCollector:
    """Collects for `prometheus_client`. A file that cannot be read fails the scrape, and says so.

    Args:
        flags: File of flags.
        baseline: A stored baseline; None: there is none.

    Raises:
        ConfigError: If the flags cannot be read.
        BaselineError: If the baseline cannot be read.
    """

    def __init__(self, flags: Path, baseline: Path | None) -> None:
        self._flags, self._baseline = flags, baseline
        list(self.collect())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All metrics as they are now."""
        today = datetime.now(UTC).date()
        shares, killed, days = (
            _family(f"esper_flag_{name}") for name in ("rollout_frac", "killed", "days_left")
        )
        for name, flag in load_flags(self._flags).flags.items():
            share = float(flag.default) if flag.rollout_bp is None else flag.rollout_bp / FULL_BP
            shares.add_metric([name], share)
            killed.add_metric([name], float(flag.killed))
            days.add_metric([name], (flag.expires - today).days)
        yield from (shares, killed, days)
        if self._baseline is not None:
            yield self._durations(self._baseline)

    def _durations(self, path: Path) -> GaugeMetricFamily:
        stored, family = baselines.read(path), _family("esper_baseline_seconds")
        for implementation in stored.plan.config.implementations:
            for mode, sizes in stored.plan.config.workload.loops.items():
                for batch in sizes:
                    found = level(stored, implementation, f"{mode}_b{batch}_p50_ms")
                    if found.value is not None:
                        family.add_metric([implementation, mode, str(batch)], found.value / 1000)
        return family


def _family(name: str) -> GaugeMetricFamily:
    metric = METRICS[name]
    return GaugeMetricFamily(name, metric.help, labels=metric.labels)
