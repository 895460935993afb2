"""Whatever is asked, right or wrong by the OpenAPI document: an answer, and never a fault."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.esper_serve.conftest import Service

OPERATIONS = 8


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return Service(tmp_path_factory.mktemp("service"), rate_limit="100000000/minute")


def varies(operation):
    return bool(operation.body or operation.path_parameters or operation.query)


def cases_of(operation):
    """Requests that the document allows and, if there is anything to get wrong, that it forbids."""
    modes = [GenerationMode.POSITIVE]
    if varies(operation):
        modes.append(GenerationMode.NEGATIVE)
    return st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])


def ask(service, operation, cases):
    """How often there was which answer; fails at the first fault."""
    answers = Counter()

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases_of(operation))
    def asked(case):
        response = case.call(headers={**(case.headers or {}), **service.admin_headers})
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        answers[operation.label, response.status_code] += 1

    asked()
    return answers


def ask_everything(service, cases):
    """Ask every operation, those with nothing to vary once; how often there was which answer."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == OPERATIONS
    share = -(-cases // sum(map(varies, operations)))
    answers = Counter()
    for operation in operations:
        answers += ask(service, operation, share if varies(operation) else 1)
    return answers


def test_500_requests_of_all_kinds_are_answered(service):
    answers = ask_everything(service, 500)
    assert sum(answers.values()) >= 500
    # not only refusals, and not only what is right
    assert answers["GET /v1/policy", 200]
    assert answers["POST /v1/decide", 422]
    assert answers["POST /v1/feedback", 422]
    assert answers["POST /v1/policies/{version}:activate", 404]


@pytest.mark.slow
def test_10000_requests_of_all_kinds_are_answered(service):
    assert sum(ask_everything(service, 10_000).values()) >= 10_000
