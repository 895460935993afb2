"""The table of metrics, the exporters, and that dashboards and alerts speak of it alone."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from esper.config.base import validate
from esper.config.run import RunConfig
from esper.environment import fingerprint
from esper.evidence.records import Fingerprint
from esper.monitoring import dashboards
from esper.monitoring.metrics import MAX_SERIES, METRICS, MOST, PrometheusExporter, most_series
from esper.monitoring.migration import MigrationCollector
from esper.monitoring.runs import RunMetrics
from esper.trial import Trial, TrialSpec

ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "configs/monitoring/morphogenetic_alerts.yml"
QUERIES = [
    panel.query
    for _, rows in dashboards.DASHBOARDS.values()
    for panels in rows.values()
    for panel in panels
]


def metrics_in(query):
    names = re.findall(r"\besper_\w+", query)
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}


def test_all_metrics_together_stay_within_the_bound():
    assert most_series() <= MAX_SERIES


def test_no_label_grows_with_the_number_of_seeds():
    labels = {label for m in METRICS.values() for label in m.labels}
    assert labels == set(MOST)
    assert not labels & {"seed", "site", "layer"}


@pytest.mark.parametrize("seeds", [4, 1_000_000])
def test_a_run_of_a_million_seeds_has_as_many_series_as_one_of_four(seeds):
    site = {"sites": "fc1->out", "seeds_per_layer": seeds, "geometry": "span"}
    trial = new_trial({**CONFIG, "lattice": [site], "controller": {"name": "static"}})
    exporter = PrometheusExporter("esper_run")
    trial.on_interval = RunMetrics(exporter, "r", trial).interval
    trial.run_for(0)
    assert value(exporter, "esper_run_seeds", run="r", stage="DORMANT") == seeds
    lines = generate_latest(exporter.registry).decode().splitlines()
    assert sum(not line.startswith("#") for line in lines) == 45


def test_names_have_their_units_and_kinds():
    for metric in METRICS.values():
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert metric.help.endswith(".")


@pytest.mark.parametrize("name", sorted(dashboards.DASHBOARDS))
def test_the_committed_dashboards_are_what_the_code_makes(name):
    committed = ROOT / f"configs/monitoring/grafana/{name}.json"
    assert committed.read_text() == dashboards.dashboard_json(name), "run `make monitoring`"
    panels = [p for p in json.loads(committed.read_text())["panels"] if p["type"] != "row"]
    assert len({p["title"] for p in panels}) == len(panels)
    assert len({json.dumps(p["gridPos"]) for p in panels}) == len(panels)


def test_dashboards_and_alerts_ask_for_metrics_that_there_are():
    rules = [r for g in yaml.safe_load(ALERTS.read_text())["groups"] for r in g["rules"]]
    for query in [*QUERIES, *(rule["expr"] for rule in rules)]:
        assert metrics_in(query) <= set(METRICS), query
    # every metric is looked at somewhere
    asked = {m for q in [*QUERIES, *(rule["expr"] for rule in rules)] for m in metrics_in(q)}
    assert set(METRICS) - asked <= {"esper_run_intervals_total"}
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "action"} <= set(rule["annotations"])


CONFIG = {
    "task": {"name": "spirals"},
    "host": {"name": "mlp", "options": {"hidden": [16]}},
    "train": {"steps": 240, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.01,
              "interval_steps": 20},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 4}],
    "growth": {"ramp_steps": 20},
    "controller": {"name": "tamiyo", "options": {"patience_intervals": 1}},
}  # fmt: skip


def new_trial(config=CONFIG):
    mark = Fingerprint(**fingerprint("cpu"))
    config = validate(RunConfig, config, source="test")
    return Trial(config, TrialSpec("arm", 0, 0, 0, "none", mark))


def value(exporter, name, **labels):
    return exporter.registry.get_sample_value(name, labels)


def test_a_run_sets_every_metric_of_runs():
    exporter, trial = PrometheusExporter("esper_run"), new_trial()
    trial.on_interval = RunMetrics(exporter, "r", trial).interval
    while not trial.done:
        trial.run_for(60)
    assert value(exporter, "esper_run_steps_total", run="r") == 240
    assert value(exporter, "esper_run_intervals_total", run="r") == 12
    assert value(exporter, "esper_run_interval_seconds_count", run="r") == 12
    for stage, seeds in trial.health.stages.items():
        assert value(exporter, "esper_run_seeds", run="r", stage=stage) == seeds
    log = trial.shard.log()
    for action in ("Germinate", "Advance"):
        made = sum(type(t.action).__name__ == action for t in log)
        assert value(exporter, "esper_run_actions_total", run="r", action=action) == made > 0
    assert value(exporter, "esper_run_parameters", run="r") == trial.health.parameters
    assert value(exporter, "esper_run_train_loss", run="r") == trial.curves["train_loss"][-1]
    assert value(exporter, "esper_run_collapsed_total", run="r") == 0
    spent = value(exporter, "esper_run_train_seconds_total", run="r")
    assert spent == pytest.approx(trial.health.cost.seconds)


def test_what_is_run_again_after_a_failure_counts_once(tmp_path):
    exporter, trial = PrometheusExporter("esper_run"), new_trial()
    metrics = RunMetrics(exporter, "r", trial)
    trial.on_interval = metrics.interval
    for _ in range(4):
        trial.run_for(0)
    trial.save(tmp_path / "saved")
    for _ in range(3):
        trial.run_for(0)
    again = Trial.resume(tmp_path / "saved")
    again.on_interval = metrics.interval
    while not again.done:
        again.run_for(60)
    assert value(exporter, "esper_run_steps_total", run="r") == 240


def test_watching_a_run_costs_less_than_a_thousandth():
    trial = new_trial()
    exporter = PrometheusExporter("esper_run")
    metrics = RunMetrics(exporter, "r", trial)
    trial.run_for(0)
    import time

    started = time.perf_counter()
    for _ in range(200):
        metrics.interval(trial)
    # intervals of a real run take a second and more
    assert (time.perf_counter() - started) / 200 < 1e-3


def test_the_migration_is_what_its_files_say(tmp_path):
    flags = tmp_path / "flags.yaml"
    flags.write_text(
        "version: 1\nenvironments: []\nflags:\n  a.b:\n    description: d.\n    owner: o\n"
        "    expires: 2030-01-01\n    rollout_bp: 2500\n    killed: true\n"
    )
    baseline = ROOT / "docs/baselines/phase0_h200/baseline.json"
    found = {
        (s.name, *s.labels.values()): s.value
        for family in MigrationCollector(flags, baseline).collect()
        for s in family.samples
    }
    assert found["esper_flag_rollout_frac", "a.b"] == 0.25
    assert found["esper_flag_killed", "a.b"] == 1
    assert found["esper_flag_days_left", "a.b"] > 0
    legacy = found["esper_baseline_seconds", "legacy", "forward", "64"]
    assert legacy > 20 * found["esper_baseline_seconds", "kasmina", "forward", "64"]


def test_the_exporter_shows_what_it_was_made_for():
    exporter = PrometheusExporter("esper_tamiyo", constant={"replica": "r1"})
    exporter.count("esper_tamiyo_decisions_total", policy="p", kind="wait")
    text = generate_latest(exporter.registry).decode()
    assert 'esper_tamiyo_decisions_total{kind="wait",policy="p",replica="r1"} 1.0' in text
    assert "esper_run" not in text
