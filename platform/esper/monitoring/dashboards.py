"""The Grafana dashboards, as code: `python -m esper.monitoring.dashboards FOLDER` writes them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: What it shows.
        query: PromQL.
        legend: Of each line.
        unit: Grafana's name of the unit.
        number: Whether it shows one number in place of lines.
    """

    title: str
    query: str
    legend: str = ""
    unit: str = "short"
    number: bool = False


# a rate over a time that holds four scrapes, however far one zooms in
RATE = "$__rate_interval"
OVERVIEW: dict[str, tuple[Panel, ...]] = {
    "Runs": (
        Panel("Runs that train", "count(esper_run_shards)", number=True),
        Panel("Devices", "sum(esper_run_shards)", number=True),
        Panel("Active seeds",
              'sum(esper_run_seeds{stage!~"DORMANT|CULLED|CANCELLED|ROLLED_BACK"})', number=True),
        Panel("Seeds", "sum(esper_run_seeds)", number=True),
        Panel("Steps per second", f"sum by (run) (rate(esper_run_steps_total[{RATE}]))", "{{run}}"),
        Panel("Interval, 95 %",
              "histogram_quantile(0.95, sum by (run, le) "
              f"(rate(esper_run_interval_seconds_bucket[{RATE}])))", "{{run}}", "s"),
        Panel("Training loss", "esper_run_train_loss", "{{run}}"),
        Panel("Held-out loss", "esper_run_held_out_loss", "{{run}}"),
        Panel("Parameters", "esper_run_parameters", "{{run}}"),
    ),
    "Growth": (
        Panel("Seeds by stage", "sum by (stage) (esper_run_seeds)", "{{stage}}"),
        Panel("Actions per minute",
              f"60 * sum by (action) (rate(esper_run_actions_total[{RATE}]))", "{{action}}"),
        Panel("Vetoes per minute", f"60 * sum by (run) (rate(esper_run_vetoes_total[{RATE}]))",
              "{{run}}"),
        Panel("Times the run went back", "sum by (run) (esper_run_incidents_total)", "{{run}}"),
        Panel("Drift of the host", "esper_run_host_drift_frac", "{{run}}", "percentunit"),
        Panel("Gradient norm", "esper_run_grad_norm", "{{run}}"),
        Panel("Share of time in training steps",
              f"sum by (run) (rate(esper_run_train_seconds_total[{RATE}]))", "{{run}}",
              "percentunit"),
    ),
    "Sweeps": (
        Panel("Trials by state", "sum by (sweep, state) (esper_sweep_trials)",
              "{{sweep}} {{state}}"),
        Panel("Active seeds of sweeps", "esper_sweep_active_seeds", "{{sweep}}"),
        Panel("GPUs in use", "esper_sweep_gpus_in_use", "{{sweep}}"),
        Panel("Time left", "esper_sweep_seconds_left >= 0", "{{sweep}}", "s"),
    ),
}  # fmt: skip
MIGRATION: dict[str, tuple[Panel, ...]] = {
    "Flags": (
        Panel("Rollout", "esper_flag_rollout_frac", "{{flag}}", "percentunit"),
        Panel("Kill switches on", "sum(esper_flag_killed)", number=True),
        Panel("Days until the first flag expires", "min(esper_flag_days_left)", number=True),
        Panel("Runs by implementation", "sum by (execution) (esper_run_execution)",
              "{{execution}}"),
    ),
    "Legacy against new": (
        Panel("Duration in the baseline", "esper_baseline_seconds",
              "{{implementation}} {{measure}} {{batch}}", "s"),
        Panel("Times as fast as legacy",
              'esper_baseline_seconds{implementation="legacy"} / on (measure, batch) '
              'esper_baseline_seconds{implementation!="legacy"}', "{{measure}} {{batch}}"),
        Panel("Largest forward pass of the new layer",
              'max(esper_baseline_seconds{implementation!="legacy", measure="forward"})', "", "s",
              number=True),
        Panel("Runs that went back by implementation",
              "sum by (execution) (esper_run_incidents_total * on (run) group_right () "
              "(esper_run_execution == 1))", "{{execution}}"),
    ),
}  # fmt: skip
SERVICE: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        Panel("Decisions per second",
              f"sum(rate(esper_tamiyo_decisions_total[{RATE}]))", "", "reqps"),
        Panel("Requests by status",
              f"sum by (status) (rate(esper_tamiyo_requests_total[{RATE}]))", "{{status}}",
              "reqps"),
        Panel("Time to decide",
              "histogram_quantile(0.5, sum by (le) "
              f"(rate(esper_tamiyo_decision_seconds_bucket[{RATE}])))", "50 %", "s"),
        Panel("Time to decide, 99 %",
              "histogram_quantile(0.99, sum by (le) "
              f"(rate(esper_tamiyo_decision_seconds_bucket[{RATE}])))", "99 %", "s"),
        Panel("Refused for their token or rate",
              "sum by (status) "
              f'(rate(esper_tamiyo_requests_total{{status=~"401|403|429"}}[{RATE}]))',
              "{{status}}", "reqps"),
        Panel("Replicas that answer", "count(count by (replica) (esper_tamiyo_policy_active))",
              number=True),
    ),
    "Policies": (
        Panel("Active policy", "max by (policy) (esper_tamiyo_policy_active)", "{{policy}}"),
        Panel("Share of decisions that wait",
              f'sum by (policy) (rate(esper_tamiyo_decisions_total{{kind="wait"}}[{RATE}])) / '
              f"sum by (policy) (rate(esper_tamiyo_decisions_total[{RATE}]))", "{{policy}}",
              "percentunit"),
        Panel("Germinations by blueprint",
              "sum by (policy, blueprint) "
              f"(rate(esper_tamiyo_germinations_total[{RATE}]))", "{{policy}} {{blueprint}}"),
        Panel("Vetoes", f"sum by (policy) (rate(esper_tamiyo_vetoes_total[{RATE}]))",
              "{{policy}}"),
        Panel("Field reports by outcome",
              "sum by (outcome) (esper_tamiyo_field_reports_total)", "{{outcome}}"),
        Panel("Decisions of runs by source",
              f"sum by (source) (rate(esper_run_decisions_total[{RATE}]))", "{{source}}"),
    ),
}  # fmt: skip
DASHBOARDS = {
    "morphogenetic_overview": ("Esper: runs and growth", OVERVIEW),
    "migration_progress": ("Esper: migration", MIGRATION),
    "tamiyo_service": ("Esper: Tamiyo's service", SERVICE),
}


def dashboard_json(name: str) -> str:
    """One dashboard as Grafana imports it.

    Args:
        name: Key of `DASHBOARDS`.
    """
    from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    title, rows = DASHBOARDS[name]
    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    board = (
        dashboard.Dashboard(title)
        .uid(name.replace("_", "-"))
        .tags(["esper"])
        .refresh("30s")
        .time("now-3h", "now")
        .with_variable(
            dashboard.DatasourceVariable("datasource").type("prometheus").label("Prometheus")
        )
    )
    for row, panels in rows.items():
        board = board.with_row(dashboard.Row(row))
        for panel in panels:
            made: Any = stat.Panel() if panel.number else timeseries.Panel()
            target = (
                prometheus.Dataquery().expr(panel.query).legend_format(panel.legend).ref_id("A")
            )
            board = board.with_panel(
                made.title(panel.title).unit(panel.unit).datasource(source)
                .span(6 if panel.number else 12).height(4 if panel.number else 8)
                .with_target(target.legend_format(panel.legend))
            )  # fmt: skip
    made_of = json.loads(JSONEncoder().encode(board.build()))
    for panel in made_of["panels"]:
        # options that nobody set are null, which Grafana's own types do not allow
        if panel.get("options", ...) is None:
            del panel["options"]
    return json.dumps(made_of, sort_keys=True, indent=1) + "\n"


def write(folder: Path) -> None:
    """Write all dashboards."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in DASHBOARDS:
        (folder / f"{name}.json").write_text(dashboard_json(name), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
