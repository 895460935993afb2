"""Routes: decisions are those of the policy, and what is wrong is said."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.config.base import ConfigError
from esper.controller import Tamiyo
from esper.controller.contract import random_reports
from esper.controller.field_reports import FieldReports
from esper.controller.wire import (
    DEADLINE_HEADER,
    MSGPACK,
    DecideRequest,
    DecideResponse,
    ReportWire,
    pack,
    unpack,
)
from esper_serve.admin_log import AdminLog, AdminLogError
from esper_serve.api import create_app, example, example_feedback


def ask(report, request_id="r-1", **more):
    request = DecideRequest(
        request_id=request_id, model="m", report=ReportWire.of(report), **more
    )  # fmt: skip
    return request.dump(binary=False)


def decided(answer):
    assert answer.status_code == 200, answer.text
    return DecideResponse.model_validate(answer.json())


def test_decisions_over_a_run_are_those_of_the_policy_in_the_process(service):
    here, memory = Tamiyo(patience_intervals=1, seeds_per_wave=8), None
    seen = 0
    for i, report in enumerate(random_reports(0)):
        answer = decided(
            service.post("/v1/decide", ask(report, f"r-{i}", policy="eager-1", memory=memory))
        )
        memory = answer.memory
        # the service's shield knows of this report alone
        here.count_failures(-here._failures)
        expected = here.decide(report)
        assert [a.unpack() for a in answer.actions] == expected
        assert (answer.request_id, answer.policy) == (f"r-{i}", "eager-1")
        seen += len(expected)
    assert seen > 100


def test_messagepack_and_json_get_the_same_answer(service):
    report = next(random_reports(0))
    plain = decided(service.post("/v1/decide", ask(report)))
    request = DecideRequest(request_id="r-2", model="m", report=ReportWire.of(report))
    answer = service.http.post(
        "/v1/decide", content=pack(request.dump(binary=True), MSGPACK),
        headers={**service.client_headers, "content-type": MSGPACK, "accept": MSGPACK},
    )  # fmt: skip
    assert answer.headers["content-type"] == MSGPACK
    packed = DecideResponse.model_validate(unpack(answer.content, MSGPACK))
    assert packed == plain.model_copy(update={"request_id": "r-2"})


def test_a_request_id_stands_for_one_request(service):
    first, second = list(random_reports(0))[:2]
    before = service.post("/v1/decide", ask(first))
    assert service.post("/v1/decide", ask(first)).json() == before.json()
    refused = service.post("/v1/decide", ask(second))
    assert refused.status_code == 409
    assert "'r-1' was used" in refused.json()["error"]["message"]
    # an id is its asker's own
    assert service.post("/v1/decide", ask(second), service.admin_headers).status_code == 200


def test_a_retry_after_an_activation_gets_the_first_answer(service):
    before = service.post("/v1/decide", ask(next(random_reports(0))))
    body = {"reason": "a test"}
    assert service.post("/v1/policies/never-1:activate", body, service.admin_headers).is_success
    assert service.post("/v1/decide", ask(next(random_reports(0)))).json() == before.json()


def test_an_admin_activates_a_policy_and_it_is_recorded(service):
    assert service.get("/v1/policy").json()["version"] == "heuristic-1"
    path, body = "/v1/policies/never-1:activate", {"reason": "growth is off today"}
    refused = service.post(path, body)
    assert refused.status_code == 403
    assert service.get("/v1/policy").json()["version"] == "heuristic-1"
    assert service.post(path, body, service.admin_headers).json()["active"] is True
    assert [p["version"] for p in service.get("/v1/policies").json() if p["active"]] == ["never-1"]
    answer = decided(service.post("/v1/decide", ask(next(random_reports(0)))))
    assert (answer.policy, answer.actions) == ("never-1", ())
    log = AdminLog(service.settings.database_url)
    (record,) = log.records()
    assert (record.actor, record.policy, record.reason) == ("admin", "never-1", body["reason"])
    # another replica, or this one after a restart, finds it
    assert create_app(service.settings).state.policies.active() == "never-1"
    unknown = service.post("/v1/policies/nobodys:activate", body, service.admin_headers)
    assert unknown.status_code == 404
    assert "heuristic-1, eager-1, never-1" in unknown.json()["error"]["message"]


def test_records_of_admins_are_never_changed(service):
    log = AdminLog(service.settings.database_url)
    for version in ("never-1", "eager-1", "never-1"):
        log.activate(version, "admin", "a test")
    assert [r.number for r in log.records()] == [1, 2, 3]
    import sqlite3

    with sqlite3.connect(service.settings.folder / "tamiyo.db") as database:
        for deed in ("DELETE FROM tamiyo_admin", "UPDATE tamiyo_admin SET actor = 'x'"):
            with pytest.raises(sqlite3.IntegrityError, match="never changed"):
                database.execute(deed)
        database.execute("DROP TRIGGER tamiyo_admin_no_update")
        database.execute("UPDATE tamiyo_admin SET actor = 'x' WHERE number = 2")
    with pytest.raises(AdminLogError, match="record 2"):
        log.records()


def test_activations_at_once_all_find_their_turn(service):
    logs = [AdminLog(service.settings.database_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda log: log.activate("never-1", "admin", "a test"), logs))
    assert [r.number for r in logs[0].records()] == [1, 2, 3, 4]


def test_a_rollout_gives_a_share_of_the_models_another_policy(make_service, tmp_path):
    flags = tmp_path / "flags.yaml"
    flags.write_text(
        "version: 1\nenvironments: []\nflags:\n  tamiyo.learned:\n    description: d.\n"
        "    owner: o\n    expires: 2030-01-01\n    rollout_bp: 3000\n"
    )
    service = make_service(rollout={"policy": "eager-1", "flags": str(flags)})
    report = next(random_reports(0))

    def versions():
        answers = [ask(report, f"{i}", memory=None) | {"model": f"m-{i}"} for i in range(200)]
        return [decided(service.post("/v1/decide", a)).policy for a in answers]

    first = versions()
    assert service.http.get("/healthz").status_code == 200
    assert set(first) == {"eager-1", "heuristic-1"}
    assert 35 <= first.count("eager-1") <= 85
    assert versions() == first
    flags.write_text("broken: [")
    service.app.state.policies._flags = None
    answer = service.post("/v1/decide", ask(report, "new"))
    assert answer.status_code == 503
    assert "flags" in answer.text
    with pytest.raises(ConfigError):
        create_app(service.settings)


MEMORY = {"best": 1.0, "stale": 0, "gain": None, "unpaid": 0, "under_way": False}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"request_id": "with spaces"}, 422, "request_id must match pattern"),
        ({"policy": "nobodys"}, 404, "policy must be one of"),
        ({"seed": -1}, 422, "seed must be greater than or equal to 0"),
        ({"extra": 1}, 422, "extra must be a known key"),
        ({"report": {}}, 422, "report.interval must be given"),
        ({"memory": {"nonsense": 1}}, 422, "can decide, but: KeyError"),
        ({"memory": MEMORY | {"best": "x"}}, 422, "TypeError"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(service, change, status, says):
    answer = service.post("/v1/decide", ask(next(random_reports(0))) | change)
    assert answer.status_code == status
    assert says in answer.text
    assert "Traceback" not in answer.text


def test_a_report_without_what_the_policy_needs_is_refused(service):
    body = ask(next(random_reports(0)))
    body["report"]["loss"] = None
    body["report"]["sites"] = []
    answer = service.post("/v1/decide", body)
    assert answer.status_code == 422
    assert "loss must be measured for the plateau rule" in answer.json()["error"]["message"]


def test_bodies_that_are_none(service):
    headers = {**service.client_headers, "content-type": "application/json"}
    for content, kind, status in (
        (b"{", "application/json", 400), (b"\xc1", MSGPACK, 400), (b"{}", "text/plain", 415),
        (b"[]", "application/json", 422), (b"", "application/json", 400),
    ):  # fmt: skip
        answer = service.http.post(
            "/v1/decide", content=content, headers={**headers, "content-type": kind}
        )
        assert answer.status_code == status, answer.text


def test_the_deadline_comes_back(service):
    headers = {**service.client_headers, DEADLINE_HEADER: "5000"}
    assert decided(service.post("/v1/decide", example(), headers)).deadline_ms == 5000
    plain = ask(next(random_reports(0)), "without")
    assert decided(service.post("/v1/decide", plain)).deadline_ms is None


def test_health_and_documentation_need_no_token(service):
    for path in ("/healthz", "/readyz"):
        answer = service.http.get(path)
        assert answer.status_code == 200
        assert answer.json()["policy"] == "heuristic-1"
    schema = service.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/decide"]["post"]["requestBody"]["content"]
    (given,) = body["application/json"]["examples"].values()
    decided(service.post("/v1/decide", given["value"]))
    assert "SiteWire" in schema["components"]["schemas"]


def test_the_database_is_part_of_being_ready(service):
    (service.settings.folder / "tamiyo.db").write_bytes(b"no database" * 100)
    answer = service.http.get("/readyz")
    assert answer.status_code == 503
    assert "the database must answer" in answer.text


def test_wrong_settings_are_refused_before_anything_starts(make_service):
    with pytest.raises(ConfigError, match=r"policies\.bad.*nonsense"):
        make_service(policies={"bad": {"name": "nonsense"}}, active="bad")


def test_the_answer_to_a_fault_holds_no_trace(service):
    def fails(*_):
        raise ZeroDivisionError("a secret")

    service.app.state.policies.decide = fails
    answer = service.post("/v1/decide", example())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert json.loads(answer.text)["error"]["status"] == 500


def test_feedback_is_stored_once(service):
    body = example_feedback()
    told = service.post("/v1/feedback", body)
    assert told.json() == {"stored": 1, "known": 0}
    assert service.post("/v1/feedback", body).json() == {"stored": 0, "known": 1}
    (stored,) = FieldReports(service.settings.database_url).read()
    assert stored.model_dump(mode="json") == body["reports"][0]
    body["reports"][0]["ended"] = 0
    refused = service.post("/v1/feedback", body)
    assert refused.status_code == 422
    assert refused.json()["error"]["problems"] == [
        "reports.0.ended must be greater than or equal to 1, but got 0."
    ]
    assert service.http.post("/v1/feedback", json=body).status_code == 401
