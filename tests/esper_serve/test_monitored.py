"""A real Prometheus scrapes a real service, run, sweep and migration: every panel has its data."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import urllib3
import yaml
from tests.esper_experiments.conftest import TINY
from tests.esper_serve.test_served import BIN, ROOT, Asker, free_port, served_with

from esper.controller.remote import TOKEN_VARIABLE
from esper.monitoring import dashboards
from esper_serve.api import example_feedback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="prometheus is not installed; Debian's package prometheus has it",
    ),
]
RUN = {
    "task": {"name": "spirals"},
    "host": {"name": "mlp", "options": {"hidden": [16]}},
    "train": {"steps": 20000000, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.01,
              "interval_steps": 20},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 4}],
    "growth": {"ramp_steps": 20},
}  # fmt: skip


class Platform:
    """Everything that is monitored, and a Prometheus that does it."""

    def __init__(self, served, folder):
        self.served, self.folder, self.processes = served, folder, []
        self.ports = {name: free_port() for name in ("run", "migration", "prometheus")}
        tree = psutil.Process(served.process.pid).children(recursive=True)
        lines = [" ".join(p.cmdline()) for p in tree]
        found = (re.search(r"--gcs-address=(\S+)", line) for line in lines)
        self.address = next(match.group(1) for match in found if match)

    def start(self, *command, **environ):
        log = (self.folder / f"{len(self.processes)}.log").open("w")
        self.processes.append(subprocess.Popen(
            [*map(str, command)], cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
            env={**self.served.environ, TOKEN_VARIABLE: self.served.tokens["client"], **environ},
        ))  # fmt: skip

    def start_all(self):
        policy = {"url": self.served.url, "model": "m", "deadline_s": 10, "rest_s": 1000,
                  "retries": 0, "max_failures": 1000}  # fmt: skip
        run = {**RUN, "controller": {"name": "remote", "options": policy}}
        (self.folder / "run.yaml").write_text(yaml.safe_dump(run))
        self.start(BIN / "esper", "run", "run.yaml", "--metrics-port", self.ports["run"])
        baseline = ROOT / "docs/baselines/phase0_h200/baseline.json"
        flags = Path(shutil.copy(ROOT / "configs/flags.yaml", self.folder))
        self.start(BIN / "esper", "monitoring", "--flags", flags, "--baseline", baseline,
                   "--port", self.ports["migration"])  # fmt: skip
        sweep = {**TINY, "run": {**TINY["run"], "train": {**TINY["run"]["train"], "steps": 6000}}}
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        self.start(BIN / "esper", "ab", "sweep.yaml", RAY_ADDRESS=self.address)
        config = yaml.safe_load((ROOT / "configs/monitoring/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        rules = (ROOT / "configs/monitoring/morphogenetic_alerts.yml").read_text()
        # a test has no ten minutes
        rules = re.sub(r"for: \d+m", "for: 3s", rules).replace("[10m]) == 0", "[6s]) == 0")
        (self.folder / "morphogenetic_alerts.yml").write_text(rules)
        (self.folder / "token").write_text(self.served.tokens["client"])
        jobs = {job["job_name"]: job for job in config["scrape_configs"]}
        # the cluster that was started last on this machine is the service's
        jobs["tamiyo"]["authorization"]["credentials_file"] = str(self.folder / "token")
        for job, port in (
            ("esper-run", self.ports["run"]), ("tamiyo", self.served.port),
            ("esper-migration", self.ports["migration"]),
        ):  # fmt: skip
            jobs[job]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.start(
            shutil.which("prometheus"),
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=tsdb",
            f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}",
        )

    def ask(self, query):
        # Prometheus itself may still be starting
        retries = urllib3.Retry(total=10, backoff_factor=0.2)
        answer = urllib3.request(
            "GET", f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/query",
            fields={"query": query.replace(dashboards.RATE, "30s")}, timeout=5, retries=retries,
        ).json()  # fmt: skip
        assert answer["status"] == "success", (query, answer)
        return answer["data"]["result"]

    def logs(self):
        return {p.name: p.read_text()[-800:] for p in sorted(self.folder.glob("*.log"))}

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    served = served_with(tmp_path_factory.mktemp("monitored"), replicas=1)
    made = Platform(served, tmp_path_factory.mktemp("prometheus"))
    try:
        made.start_all()
        yield made
    finally:
        made.stop()
        if served.process.poll() is None:
            served.stop()


def eventually(asked, seconds, say):
    ends = time.monotonic() + seconds
    while not (found := asked()):
        assert time.monotonic() < ends, say()
        time.sleep(1)
    return found


def test_every_panel_has_its_data(platform, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, platform.served.tokens["client"])
    bearer = {"authorization": f"Bearer {platform.served.tokens['client']}"}
    urllib3.request(
        "POST", platform.served.url + "/v1/feedback", json=example_feedback(), headers=bearer
    )
    with Asker(platform.served):
        empty = [
            (name, panel.title)
            for name, (_, rows) in dashboards.DASHBOARDS.items()
            for panels in rows.values()
            for panel in panels
        ]

        def filled():
            # each is seen at some moment; a sweep of some seconds does not last for ever
            for name, (_, rows) in dashboards.DASHBOARDS.items():
                for panels in rows.values():
                    for panel in panels:
                        if (name, panel.title) in empty and platform.ask(panel.query):
                            empty.remove((name, panel.title))
            platform.served.get("/v1/policy")
            return not empty

        eventually(lambda: platform.ask("up"), 60, platform.logs)
        eventually(filled, 150, lambda: (empty, platform.logs()))


def firing(platform, alert):
    return platform.ask(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')


def test_an_alert_of_each_class_really_fires(platform):
    alerts = ("EsperRunStalled", "EsperKillSwitchOn", "TamiyoDown")

    def quiet():
        # Ray still tells the last numbers of a sweep's workers for two minutes after its end
        return not any(firing(platform, alert) for alert in alerts)

    eventually(quiet, 180, platform.logs)
    flags = platform.folder / "flags.yaml"
    text = flags.read_text()
    flags.write_text(text.replace("rollout_bp: 0\n", "rollout_bp: 0\n    killed: true\n", 1))
    # the run waits ten seconds for each decision
    for replica in platform.served.replicas():
        replica.suspend()
    for alert in alerts:
        eventually(lambda name=alert: firing(platform, name), 90, platform.logs)
