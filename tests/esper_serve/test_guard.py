"""Tokens, limits and deadlines, before anything is parsed."""

import asyncio

import pytest

from esper.config.base import ConfigError
from esper.controller.wire import DEADLINE_HEADER
from esper_serve.api import example
from esper_serve.tokens import add_token, identify, read_tokens


def test_only_valid_tokens_are_answered(service):
    for path in ("/v1/decide", "/v1/policies/never-1:activate"):
        for headers in (
            {}, {"authorization": "Bearer nonsense"}, {"authorization": "Bearer "},
            {"authorization": service.client_headers["authorization"].replace("Bearer", "Basic")},
            {"authorization": service.client_headers["authorization"][:-1]},
        ):  # fmt: skip
            answer = service.http.post(path, json=example(), headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/policy", "/v1/policies", "/nowhere"):
        assert service.http.get(path).status_code == 401
        assert service.get(path).status_code == (404 if path == "/nowhere" else 200)


def test_the_file_of_tokens_holds_hashes_and_is_its_owners_alone(tmp_path):
    file = tmp_path / "deep" / "tokens.yaml"
    secret = add_token(file, "trainer", "client")
    other = add_token(file, "boss", "admin")
    assert file.stat().st_mode & 0o777 == 0o600
    assert secret not in file.read_text()
    tokens = read_tokens(file)
    assert identify(tokens, f"bearer {secret}".encode()).name == "trainer"
    assert identify(tokens, f"Bearer {other}".encode()).role == "admin"
    assert identify(tokens, f"Bearer {secret}x".encode()) is None
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_tokens(file)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="'boss' is given twice"):
        add_token(file, "boss", "client")
    with pytest.raises(ConfigError, match="name must match"):
        add_token(file, "no spaces", "client")
    with pytest.raises(ConfigError, match="esper serve token"):
        read_tokens(tmp_path / "nowhere.yaml")
    file.write_text("tokens: []\n")
    with pytest.raises(ConfigError, match="at least 1"):
        read_tokens(file)


def test_a_body_that_is_too_long_is_cut_off(make_service):
    service = make_service(max_body_bytes=1000)
    headers = {**service.client_headers, "content-type": "application/json"}
    assert service.post("/v1/decide", example()).status_code == 413
    sent = []

    def endless():
        for _ in range(1000):
            sent.append(1)
            yield b" " * 100

    # chunked: nobody says how long it will be
    answer = service.http.post("/v1/decide", content=endless(), headers=headers)
    assert answer.status_code == 413
    assert "at most 1000 bytes" in answer.text
    small = service.http.post("/v1/decide", content=b" " * 999, headers=headers)
    assert small.status_code == 400


def test_a_token_that_asks_too_often_has_to_wait(make_service):
    service = make_service(rate_limit="3/minute")
    statuses = [service.get("/v1/policy").status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    answer = service.get("/v1/policy")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    # others are not kept waiting
    assert service.http.get("/v1/policy", headers=service.admin_headers).status_code == 200


@pytest.mark.parametrize("deadline", ["0", "-1", "1.5", "soon", "10001", "9" * 40, "²"])
def test_deadlines_are_milliseconds(service, deadline):
    headers = {**service.client_headers, DEADLINE_HEADER: deadline.encode()}
    answer = service.http.post("/v1/decide", json=example(), headers=headers)
    assert answer.status_code == 422
    assert f"{DEADLINE_HEADER} must be whole milliseconds in 1..10000" in answer.text


def raw(service, receive, **headers):
    """Status of the answer to a request whose body comes as `receive` says."""
    sent = []

    async def send(message):
        sent.append(message)

    given = {**service.client_headers, "content-type": "application/json", **headers}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/decide", "raw_path": b"/v1/decide", "query_string": b"", "scheme": "http",
        "headers": [(k.lower().encode(), v.encode()) for k, v in given.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "root_path": "",
    }  # fmt: skip
    asyncio.run(service.app(scope, receive, send))
    return sent[0]["status"]


def test_a_body_that_comes_too_slowly_is_not_waited_for(service):
    async def drips():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    assert raw(service, drips, **{DEADLINE_HEADER: "100"}) == 408


def test_an_answer_that_comes_too_late_is_none(service):
    from time import sleep

    from esper.controller.wire import JSON, pack

    decide = service.app.state.policies.decide

    def slowly(*args):
        sleep(0.1)
        return decide(*args)

    service.app.state.policies.decide = slowly

    async def at_once():
        return {"type": "http.request", "body": pack(example(), JSON), "more_body": False}

    assert raw(service, at_once, **{DEADLINE_HEADER: "50"}) == 503
    assert raw(service, at_once, **{DEADLINE_HEADER: "5000"}) == 200


def test_a_sender_who_goes_is_not_answered_with_a_decision(service):
    async def gone():
        return {"type": "http.disconnect"}

    assert raw(service, gone) == 400
