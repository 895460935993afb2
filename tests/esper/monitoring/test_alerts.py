"""Each alert fires on what it is for and on nothing else, as promtool says."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

RULES = Path(__file__).parents[3] / "configs/monitoring/morphogenetic_alerts.yml"
NAMES = [
    rule["alert"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
]
REQUESTS = 'esper_tamiyo_requests_total{replica="a", route="/v1/decide", status="%s"}'
DECISIONS = 'esper_tamiyo_decisions_total{replica="a", policy="learned-1", kind="%s"}'
GERMINATIONS = 'esper_tamiyo_germinations_total{replica="a", policy="learned-1", blueprint="%s"}'
BASELINE = 'esper_baseline_seconds{implementation="%s", measure="forward", batch="64"}'
SECONDS = 'esper_run_interval_seconds_bucket{run="r", le="%s"}'
SOURCE = 'esper_run_decisions_total{run="r", source="%s"}'
SLOW = 'esper_tamiyo_decision_seconds_bucket{replica="a", le="%s"}'


def steady(value):
    return f"{value}+0x400"


def rising(by, start=0):
    return f"{start}+{by}x400"


# alert: minutes, series (a value a minute) that make it fire by then, and series that must not
CASES = {
    "EsperRunStalled": (
        20, {'esper_run_steps_total{run="r"}': steady(700)},
        {'esper_run_steps_total{run="r"}': rising(1)},
    ),
    "EsperIntervalSlow": (
        186,
        # intervals of one second, then of thirty
        {SECONDS % "1": "0+10x170 1700+0x100", SECONDS % "30": "0+10x170 1700+10x100",
         SECONDS % "+Inf": "0+10x170 1700+10x100"},
        {SECONDS % "1": rising(10), SECONDS % "30": rising(10), SECONDS % "+Inf": rising(10)},
    ),
    "EsperForwardTooSlow": (
        5, {BASELINE % "kasmina": steady(0.12)},
        {BASELINE % "kasmina": steady(0.09), BASELINE % "legacy": steady(0.45)},
    ),
    "EsperKillSwitchOn": (
        5, {'esper_flag_killed{flag="f"}': steady(1)}, {'esper_flag_killed{flag="f"}': steady(0)},
    ),
    "EsperFlagExpires": (
        5, {'esper_flag_days_left{flag="f"}': steady(13)},
        {'esper_flag_days_left{flag="f"}': steady(15)},
    ),
    "EsperNewSlowerThanLegacy": (
        5, {BASELINE % "kasmina": steady(0.05), BASELINE % "legacy": steady(0.04)},
        {BASELINE % "kasmina": steady(0.01), BASELINE % "legacy": steady(0.04)},
    ),
    "EsperRunCollapsed": (
        30, {'esper_run_collapsed_total{run="r"}': "0+0x20 1+0x100"},
        {'esper_run_collapsed_total{run="r"}': steady(0)},
    ),
    "EsperRunKeepsGoingBack": (
        30, {'esper_run_incidents_total{run="r"}': "0+0x10 1+1x4 5+0x100"},
        {'esper_run_incidents_total{run="r"}': "0+0x10 1+0x100"},
    ),
    "EsperDecisionsLocal": (
        40, {SOURCE % "local": rising(3), SOURCE % "remote": rising(1)},
        {SOURCE % "local": rising(1), SOURCE % "remote": rising(3)},
    ),
    "EsperTrialsFailed": (
        5, {'esper_sweep_trials{sweep="s", state="failed", arm="a"}': steady(1)},
        {'esper_sweep_trials{sweep="s", state="failed", arm="a"}': steady(0),
         'esper_sweep_trials{sweep="s", state="collapsed", arm="a"}': steady(3)},
    ),
    "TamiyoDown": (5, {'up{job="tamiyo"}': steady(0)}, {'up{job="tamiyo"}': steady(1)}),
    "TamiyoErrorsBurnFast": (
        70, {REQUESTS % "200": rising(98), REQUESTS % "500": rising(2)},
        # a burst that is over, and failures that are the caller's
        {REQUESTS % "200": rising(99), REQUESTS % "500": "0+50x20 1000+0x400",
         REQUESTS % "422": rising(50)},
    ),
    "TamiyoErrorsBurnSlowly": (
        370, {REQUESTS % "200": rising(990), REQUESTS % "503": rising(10)},
        {REQUESTS % "200": rising(9990), REQUESTS % "503": rising(10)},
    ),
    "TamiyoSlow": (
        40, {SLOW % "0.12": rising(90), SLOW % "0.25": rising(100), SLOW % "+Inf": rising(100)},
        {SLOW % "0.06": rising(100), SLOW % "0.12": rising(100), SLOW % "+Inf": rising(100)},
    ),
    "TamiyoCollapsedToWaiting": (
        370, {DECISIONS % "wait": rising(10), DECISIONS % "grow": steady(5)},
        {DECISIONS % "wait": rising(10), DECISIONS % "grow": rising(1)},
    ),
    "TamiyoCollapsedToOneBlueprint": (
        370, {GERMINATIONS % "mlp_relu": rising(5), GERMINATIONS % "glu": steady(5)},
        {GERMINATIONS % "mlp_relu": rising(5), GERMINATIONS % "glu": rising(1)},
    ),
    "TamiyoUnauthorised": (
        20, {REQUESTS % "401": rising(120)}, {REQUESTS % "401": rising(30)},
    ),
}  # fmt: skip


def test_no_alert_is_left_out():
    assert list(CASES) == NAMES


@pytest.mark.parametrize("alert", CASES)
@pytest.mark.parametrize("fires", [True, False])
def test_it_fires_on_what_it_is_for_and_on_nothing_else(alert, fires, tmp_path):
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    minutes, *series = CASES[alert]
    shown = series[0] if fires else series[1]
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    expected = [{"labels": "{}", "value": 1}] if fires else []
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [{
            "interval": "1m",
            "input_series": [{"series": k, "values": v} for k, v in shown.items()],
            "promql_expr_test": [
                {"expr": firing, "eval_time": f"{minutes}m", "exp_samples": expected}
            ],
        }],
    }  # fmt: skip
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
