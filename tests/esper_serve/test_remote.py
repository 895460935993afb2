"""Training asks over HTTP, and goes on whatever the service does."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from pydantic import ValidationError
from tests.esper_serve.conftest import Service

from esper.config.base import ConfigError, validate
from esper.config.run import RunConfig
from esper.controller import Shield, TamiyoOptions
from esper.controller.contract import ControllerContract, random_reports
from esper.controller.field_reports import FieldReports
from esper.controller.remote import TOKEN_VARIABLE, RemoteOptions
from esper.environment import fingerprint
from esper.evidence.records import Fingerprint
from esper.release.change import change_flag
from esper.trial import Trial, TrialSpec

ROOT = Path(__file__).parents[2]


class Server:
    """The service's application on a port of its own, which can go and come again."""

    def __init__(self, service):
        self.service, self._running = service, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self, app=None):
        config = uvicorn.Config(
            app or self.service.app, host="127.0.0.1", port=self.port, log_level="error"
        )
        self._running = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._running.run)
        self._thread.start()
        while not self._running.started:
            time.sleep(0.005)

    def stop(self):
        self._running.should_exit = self._running.force_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(Service(tmp_path_factory.mktemp("service"), rate_limit="1000000/second"))
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def token(server, monkeypatch):
    secret = server.service.client_headers["authorization"].removeprefix("Bearer ")
    monkeypatch.setenv(TOKEN_VARIABLE, secret)


@pytest.fixture
def outage(server):
    """The service is gone while this lasts."""

    @contextlib.contextmanager
    def gone(app=None):
        server.stop()
        if app is not None:
            server.start(app)
        try:
            yield
        finally:
            if app is not None:
                server.stop()
            server.start()

    return gone


def options(server, **more):
    given = {"url": server.url, "model": "m", "policy": "eager-1", "deadline_s": 2, "rest_s": 200}
    return RemoteOptions(**given | more)


class TestRemote(ControllerContract):
    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server

    def make(self, seed):
        return options(self.server).build(seed)


class TestBehindTheShield(TestRemote):
    def make(self, seed):
        return Shield(super().make(seed))


class TestDown(ControllerContract):
    """The contract holds without a service, too."""

    def make(self, seed):
        return RemoteOptions(url="http://127.0.0.1:9", model="m").build(seed)


def test_the_service_decides_and_every_action_says_so(server):
    remote = options(server).build(0)
    here = TamiyoOptions(patience_intervals=1, seeds_per_wave=8).build(0)
    for report in random_reports(0, 10):
        expected = Shield(here).decide(report)
        got = remote.decide(report)
        assert [dataclasses.replace(a, reason="") for a in got] == [
            dataclasses.replace(a, reason="") for a in expected
        ]
        assert all(a.reason.endswith("[eager-1]") for a in got)
    assert remote.sources == [{"interval": 1, "source": "remote", "cause": "eager-1"}]
    assert remote.counts == {"remote": 10, "local": 0}


def test_in_an_outage_the_local_controller_goes_on_from_where_it_would_be(server, outage):
    remote = options(server, policy="never-1").build(0)
    here = TamiyoOptions().build(0)
    reports = list(random_reports(0))
    for report in reports[:10]:
        assert remote.decide(report) == []
        here.decide(report)
    with outage():
        for report in reports[10:20]:
            expected = here.decide(report)
            got = remote.decide(report)
            assert [(type(a), a.site, a.seed) for a in got] == [
                (type(a), a.site, a.seed) for a in expected
            ]
            assert all(a.reason.endswith("[local]") for a in got)
    remote._shut_until = 0
    assert remote.decide(reports[20]) == []
    assert [s["source"] for s in remote.sources] == ["remote", "local", "remote"]
    assert "refused" in remote.sources[1]["cause"]
    assert remote.counts == {"remote": 11, "local": 10}


def test_a_service_that_hangs_costs_a_deadline_and_then_nothing(outage, server):
    asked = []

    async def hangs(scope, receive, send):
        import asyncio

        if scope["type"] == "http":
            asked.append(1)
            await asyncio.sleep(3)

    remote = options(server, deadline_s=0.2, rest_s=20, max_failures=2).build(0)
    reports = list(random_reports(0))
    with outage(hangs):
        started = time.perf_counter()
        for report in reports:
            remote.decide(report)
        spent = time.perf_counter() - started
    # two decisions of three tries each
    assert len(asked) == 6
    # the local controller takes some milliseconds a report
    assert 0.4 <= spent < 2
    assert remote.counts == {"remote": 0, "local": 30}


def test_a_try_that_hangs_leaves_time_for_another(outage, server):
    """As one does whose replica was killed. Its request id is the same: nothing is done twice."""
    service, hung = server.service.app, []

    async def hangs_once(scope, receive, send):
        import asyncio

        if scope["type"] == "http" and not hung:
            hung.append(1)
            await asyncio.sleep(30)
            return
        await service(scope, receive, send)

    remote = options(server, deadline_s=6, rest_s=600).build(0)
    with outage(hangs_once):
        remote.decide(next(iter(random_reports(0))))
    assert hung
    assert remote.counts == {"remote": 1, "local": 0}


def drip(status, content):
    async def app(scope, receive, send):
        import asyncio

        if scope["type"] != "http":
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for byte in content:
            await asyncio.sleep(0.02)
            message = {"type": "http.response.body", "body": bytes([byte]), "more_body": True}
            await send(message)

    return app


def test_an_answer_that_drips_is_not_waited_for(server, outage):
    remote = options(server, deadline_s=0.2, rest_s=20, retries=0).build(0)
    with outage(drip(200, b" " * 200)):
        started = time.perf_counter()
        remote.decide(next(random_reports(0)))
        assert time.perf_counter() - started < 0.5
    assert remote.sources[0]["cause"] == "the answer did not come in time."


def at_once(status, content):
    calls = []

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body", False):
            body += message["body"]
        calls.append(body + message["body"])
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app, calls


@pytest.mark.parametrize(
    ("status", "content", "tries", "says"),
    [
        (503, b"{}", 3, "503"),
        (500, b"oops", 3, "500: oops"),
        (429, b"{}", 1, "429"),
        (302, b"", 1, "302"),
        (422, b'{"error": {"message": "bad.", "problems": ["a: b"]}}', 1, "422: bad. a: b"),
        (200, b"[]", 1, "must be a DecideResponse"),
        (200, b"\x00", 1, "must be a DecideResponse"),
        (200, json.dumps({
            "request_id": "another", "policy": "p", "report_hash": "0", "actions": [],
            "vetoes": [], "memory": {}, "may_grow": True, "deadline_ms": None,
        }).encode(), 1, "must be to this report"),
    ],
)  # fmt: skip
def test_only_what_may_pass_is_tried_again_and_with_the_same_id(
    server, outage, status, content, tries, says
):
    app, calls = at_once(status, content)
    remote = options(server).build(0)
    with outage(app):
        remote.decide(next(random_reports(0)))
    assert len(calls) == tries
    assert len(set(calls)) == 1
    assert says in remote.sources[0]["cause"]


def test_growth_that_has_stopped_there_is_not_measured_for_here(server):
    given = {"policy": None, "local": {"name": "tamiyo"}}
    service = server.service
    remote = options(server, **given).build(0)
    # no seed is under way, or no wave could begin whoever says so
    idle = next(r for r in random_reports(0) if not any(site.stage.any() for site in r.sites))
    for interval in (1, 2):
        remote.decide(dataclasses.replace(idle, interval=interval))
    assert remote.may_grow(3)
    service.app.state.policies.versions["heuristic-1"] = TamiyoOptions(last_interval=2)
    try:
        assert remote.decide(dataclasses.replace(idle, interval=3)) == []
    finally:
        service.app.state.policies.versions["heuristic-1"] = TamiyoOptions()
    assert not remote.may_grow(4)


CONFIG = {
    "task": {"name": "spirals"},
    "host": {"name": "mlp", "options": {"hidden": [16]}},
    "train": {"steps": 240, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.01,
              "interval_steps": 20},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 4}],
    "growth": {"ramp_steps": 20},
}  # fmt: skip
EAGER = {"patience_intervals": 1, "seeds_per_wave": 8}


def trial_with(controller, **more):
    mark = Fingerprint(**fingerprint("cpu"))
    config = validate(RunConfig, {**CONFIG, **more, "controller": controller}, source="test")
    return Trial(config, TrialSpec("arm", 0, 0, 0, "none", mark))


def remote_trial(server, **more):
    given = options(server, **more).model_dump(mode="json", exclude_none=True)
    return trial_with({"name": "remote", "options": given})


def decisions(trial):
    log = trial.shard.log()
    return [(t.interval, type(t.action), t.action.site, t.action.seed) for t in log]


def test_a_trial_grows_as_with_the_policy_in_its_process(server):
    local, remote = trial_with({"name": "tamiyo", "options": EAGER}), remote_trial(server)
    for trial in (local, remote):
        while not trial.done:
            trial.run_for(60)
    assert decisions(remote) == decisions(local)
    assert len(decisions(local)) > 4
    for name in set(local.curves) - {"train_seconds"}:
        np.testing.assert_array_equal(remote.curves[name], local.curves[name])


def test_a_trial_goes_on_through_an_outage_and_takes_no_decision_twice(server, outage):
    trial = remote_trial(server, rest_s=200)
    for _ in range(4):
        trial.run_for(0)
    with outage():
        for _ in range(4):
            trial.run_for(0)
    trial.controller._controller._shut_until = 0
    while not trial.done:
        trial.run_for(60)
    made = decisions(trial)
    assert len(set(made)) == len(made)
    reasons = [t.action.reason for t in trial.shard.log()]
    assert {r.rpartition(" [")[2] for r in reasons} >= {"eager-1]"}
    assert trial.controller._controller.counts["local"] == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rest_s": 10}, "rest_s must be at least 100 deadlines"),
        ({"local": {"name": "remote"}}, "but got 'remote'"),
        ({"local": {"name": "tamyo"}}, "tamyo"),
        ({"url": "tamiyo:8000"}, "url"),
    ],
)
def test_wrong_options_are_refused(server, change, says):
    with pytest.raises(ValidationError, match=says):
        options(server, **change)


def test_without_a_token_nothing_starts(server, monkeypatch, tmp_path):
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(ConfigError, match="esper serve token"):
        options(server).build(0)
    (tmp_path / "token").write_text("two words")
    with pytest.raises(ConfigError, match="must hold the service's token"):
        options(server, token_file=tmp_path / "token").build(0)


def test_what_became_of_adaptations_reaches_the_service_even_after_an_outage(server, outage):
    table = FieldReports(server.service.settings.database_url)
    before = len(table.read())
    given = options(server, model="reporter").model_dump(mode="json", exclude_none=True)
    train = {**CONFIG["train"], "steps": 480}
    trial = trial_with({"name": "remote", "options": given}, train=train)
    remote = trial.controller._controller
    # decisions go on while reports wait
    remote._mute_until = float("inf")
    for _ in range(6):
        trial.run_for(0)
    with outage():
        trial.run_for(0)
    while not remote._outbox:
        trial.run_for(0)
    waiting = len(remote._outbox)
    remote._mute_until = 0
    while not trial.done:
        trial.run_for(60)
    assert waiting
    assert remote._outbox == {}
    told = [r for r in table.read()[before:] if r.model == "reporter"]
    assert len({r.request_id for r in told}) == len(told) >= waiting
    assert {r.policy for r in told} <= {"eager-1", "local"}


def test_feedback_that_fails_rests_and_costs_no_deadline_each_interval(server):
    app, service = [], server.service.app

    async def without_feedback(scope, receive, send):
        import asyncio

        if scope["type"] == "http" and scope["path"] == "/v1/feedback":
            app.append(1)
            await asyncio.sleep(3)
        await service(scope, receive, send)

    server.stop()
    server.start(without_feedback)
    try:
        trial = remote_trial(server, deadline_s=0.2, rest_s=20)
        while not trial.done:
            trial.run_for(60)
    finally:
        server.stop()
        server.start()
    remote = trial.controller._controller
    # one request, of three tries
    assert len(app) == 3
    assert remote._outbox
    assert remote.counts["local"] == 0


def test_with_its_flag_off_the_service_is_not_asked(server, tmp_path):
    flags = tmp_path / "flags.yaml"
    flags.write_text((ROOT / "configs/flags.yaml").read_text())

    def turn(name, on):
        change_flag(flags, name, {"rollout_bp": 10_000 * on}, actor="a", reason="test")

    for name in ("release.snapshots", "kasmina.parallel", "kasmina.lifecycle"):
        turn(name, True)
    given = options(server).model_dump(mode="json", exclude_none=True)
    plugin, named = {"name": "remote", "options": given}, {"file": str(flags), "model": "m"}
    trial = trial_with(plugin, flags=named)
    remote = trial.controller._controller
    trial.run_for(0)
    assert remote.sources[-1]["cause"] == "the flag tamiyo.remote is off."
    turn("tamiyo.remote", True)
    trial.run_for(0)
    assert remote.counts == {"remote": 1, "local": 1}
    turn("tamiyo.learned", True)
    with pytest.raises(ConfigError, match=r"tamiyo\.learned must be off"):
        trial.run_for(0)
