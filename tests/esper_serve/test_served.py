"""The service as users start it: `esper serve`, with Ray Serve, over HTTP."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from secrets import token_hex

import psutil
import pytest
import urllib3
import yaml
from tests.esper_serve.test_remote import options

from esper.controller.contract import random_reports
from esper.controller.remote import TOKEN_VARIABLE, Client
from esper.controller.wire import DecideRequest, ReportWire

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """A running service with its configuration, tokens and processes."""

    def __init__(self, folder, replicas):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environ = {
            **os.environ,
            "RAY_ADDRESS": "local",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token_hex(32),
            # a service may run beside the tests
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        }
        self.config = yaml.safe_load((ROOT / "configs/serve/tamiyo.yaml").read_text())
        self.config["http_options"]["port"] = self.port
        (app,) = self.config["applications"]
        app["args"] |= {"home": str(folder / "home"), "rate_limit": "100000/second"}
        app["deployments"][0] |= {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 0.1}}
        self.tokens = {
            role: self.esper("serve", "token", role, "--role", role, "--home", folder / "home")
            for role in ("client", "admin")
        }
        self.file = self.write("tamiyo.yaml")

    def write(self, name):
        file = self.folder / name
        file.write_text(yaml.safe_dump(self.config))
        return file

    def esper(self, *arguments):
        command = [str(BIN / "esper"), *map(str, arguments)]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def start(self):
        self.log = (self.folder / "log").open("w")
        command = [str(BIN / "esper"), "serve", str(self.file)]
        self.process = subprocess.Popen(
            command, env=self.environ, stdout=self.log, stderr=subprocess.STDOUT
        )
        ends = time.monotonic() + 120
        while self.get("/readyz") != 200:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < ends, (self.folder / "log").read_text()
            time.sleep(0.2)

    def get(self, path, **headers):
        try:
            return urllib3.request(
                "GET", self.url + path, headers=headers, retries=False, timeout=2
            ).status
        except urllib3.exceptions.HTTPError:
            return None

    def replicas(self):
        found = []
        for p in psutil.Process(self.process.pid).children(recursive=True):
            # one may end while it is looked at
            with contextlib.suppress(psutil.NoSuchProcess):
                alive = p.status() != psutil.STATUS_ZOMBIE
                if alive and any("ServeReplica:tamiyo" in part for part in p.cmdline()):
                    found.append(p)
        return found

    def stop(self):
        self.process.terminate()
        code = self.process.wait(60)
        self.log.close()
        return code


def served_with(folder, replicas):
    served = Served(folder, replicas)
    served.start()
    return served


class Asker:
    """Asks over and over, as the library does, and keeps what went wrong and when."""

    def __init__(self, served, **more):
        self.client = Client(options(served, policy=None, **more))
        self.answers, self.failures = [], []
        self._report = ReportWire.of(next(random_reports(0)))
        self._on, self._run = True, token_hex(4)
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._on = False
        self._thread.join()

    def _ask(self):
        number = 0
        while self._on:
            number += 1
            request = DecideRequest(
                request_id=f"{self._run}-{number}", model="m", report=self._report
            )
            try:
                answer = self.client.decide(request)
                self.answers.append((time.monotonic(), answer))
            except Exception as error:
                self.failures.append((time.monotonic(), str(error)))

    def more(self, count):
        wanted, ends = len(self.answers) + count, time.monotonic() + 60
        while len(self.answers) < wanted:
            assert time.monotonic() < ends, self.failures[-5:]
            time.sleep(0.01)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    served = served_with(tmp_path_factory.mktemp("served"), replicas=1)
    yield served
    served.stop()


@pytest.fixture
def two(tmp_path, monkeypatch):
    served = served_with(tmp_path, replicas=2)
    monkeypatch.setenv(TOKEN_VARIABLE, served.tokens["client"])
    yield served
    served.stop()


def test_it_decides_over_http_for_those_with_a_token(one, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, one.tokens["client"])
    with Asker(one) as asker:
        asker.more(20)
    assert not asker.failures
    assert len({a.report_hash for _, a in asker.answers}) == 1
    assert len({str(a.actions) for _, a in asker.answers}) == 1
    assert {a.policy for _, a in asker.answers} == {"heuristic-1"}
    assert one.get("/healthz") == 200
    assert one.get("/v1/policy") == 401
    bearer = f"Bearer {one.tokens['client']}"
    assert one.get("/v1/policy", authorization=bearer) == 200


def test_it_listens_on_loopback_alone(one):
    own = {
        connection.laddr
        for p in psutil.Process(one.process.pid).children(recursive=True)
        for connection in p.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {a.ip for a in own if a.port == one.port} == {"127.0.0.1"}


def test_what_is_wrong_is_said_before_anything_starts(one):
    command = [str(BIN / "esper"), "serve", str(one.file)]
    taken = subprocess.run(command, env=one.environ, capture_output=True, text=True, check=False)
    assert taken.returncode == 2
    assert "choose another port" in taken.stderr
    one.config["applications"][0]["args"]["active"] = "nobodys"
    try:
        file = one.write("wrong.yaml")
    finally:
        one.config["applications"][0]["args"]["active"] = "heuristic-1"
    command = [str(BIN / "esper"), "serve", str(file), "--check"]
    wrong = subprocess.run(command, env=one.environ, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "active must be one of" in wrong.stderr


@pytest.mark.slow
def test_no_decision_fails_when_replicas_are_killed(two):
    with Asker(two, deadline_s=5, rest_s=500) as asker:
        for _ in range(2):
            asker.more(30)
            victim, *_ = two.replicas()
            victim.kill()
            gone = time.monotonic()
            while len(two.replicas()) < 2 or time.monotonic() < gone + 2:
                time.sleep(0.1)
            asker.more(30)
    assert asker.failures == []
    assert len(asker.answers) > 120


@pytest.mark.slow
def test_no_decision_fails_during_a_rolling_update(two):
    before = {p.pid for p in two.replicas()}
    two.config["applications"][0]["args"]["policies"]["eager-1"] = {
        "name": "tamiyo", "options": {"patience_intervals": 1},
    }  # fmt: skip
    two.config["applications"][0]["args"]["active"] = "eager-1"
    file = two.write("updated.yaml")
    with Asker(two, deadline_s=5, rest_s=500) as asker:
        asker.more(30)
        address = psutil.Process(two.process.pid)
        command = [str(BIN / "serve"), "deploy", "--address", dashboard_of(address), str(file)]
        subprocess.run(command, env=two.environ, check=True, capture_output=True)
        ends = time.monotonic() + 90
        while {p.pid for p in two.replicas()} & before:
            assert time.monotonic() < ends, two.replicas()
            time.sleep(0.2)
        asker.more(30)
    assert asker.failures == []
    policies = [a.policy for _, a in asker.answers]
    assert policies[0] == "heuristic-1"
    assert policies[-1] == "eager-1"


def dashboard_of(process):
    """The address that this cluster's dashboard listens on."""
    # not always the port that it was told: another cluster may have that
    urls = [
        f"http://127.0.0.1:{connection.laddr.port}"
        for child in process.children(recursive=True)
        if any(part.endswith("dashboard.py") for part in child.cmdline())
        for connection in child.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    for url in urls:
        with suppress(urllib3.exceptions.HTTPError):
            urllib3.request("GET", url + "/api/version", retries=False, timeout=2)
            return url
    raise AssertionError(f"no dashboard answers at {urls}")


@pytest.mark.slow
def test_a_replica_that_hangs_leaves_rotation_within_five_seconds(two):
    with Asker(two, deadline_s=0.5, rest_s=50, retries=0) as asker:
        asker.more(30)
        victim = two.replicas()[0]
        victim.suspend()
        hung = time.monotonic()
        try:
            time.sleep(15)
            asker.more(30)
        finally:
            if victim.is_running():
                victim.kill()
    late = [(at - hung, why) for at, why in asker.failures if at - hung > 5 + 0.5]
    assert late == []
    assert [at for at, _ in asker.answers if at - hung > 5]


@pytest.mark.slow
def test_replicas_come_and_go_with_the_load(tmp_path, monkeypatch):
    served = Served(tmp_path, replicas=1)
    (deployment,) = served.config["applications"][0]["deployments"]
    del deployment["num_replicas"]
    deployment["autoscaling_config"] = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 0.5,
        "upscale_delay_s": 1, "downscale_delay_s": 3, "metrics_interval_s": 1,
        "look_back_period_s": 2,
    }  # fmt: skip
    served.write("tamiyo.yaml")
    served.start()
    monkeypatch.setenv(TOKEN_VARIABLE, served.tokens["client"])

    def becomes(replicas):
        ends = time.monotonic() + 90
        while len(served.replicas()) != replicas:
            assert time.monotonic() < ends, served.replicas()
            time.sleep(0.5)

    try:
        with ExitStack() as askers:
            all_of_them = [
                askers.enter_context(Asker(served, deadline_s=5, rest_s=500)) for _ in range(6)
            ]
            becomes(2)
            all_of_them[0].more(30)
        becomes(1)
        assert [failure for asker in all_of_them for failure in asker.failures] == []
    finally:
        served.stop()
