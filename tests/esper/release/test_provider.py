"""Esper's flags through an OpenFeature client."""

import pytest
from openfeature import api
from openfeature.client import OpenFeatureClient
from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEvent
from openfeature.exception import ErrorCode

from esper.release.provider import STANDARD_REASON, EsperProvider
from esper.release.snapshot import Reason, Snapshot


@pytest.fixture
def client(make_file):
    file = make_file(
        a={"rollout_bp": 5_000, "rules": [{"when": {"n": [1]}, "serve": True}]}, b={"killed": True}
    )
    api.set_provider(EsperProvider(Snapshot(file)))
    yield api.get_client()
    api.shutdown()


def test_a_client_gets_the_snapshots_answers(client: OpenFeatureClient, make_file):
    taken = Snapshot(make_file(a={"rollout_bp": 5_000}))
    for i in range(50):
        details = client.get_boolean_details("a", True, EvaluationContext(f"m{i}"))
        answer = taken.evaluate("a", f"m{i}")
        assert (details.value, details.flag_metadata["reason"]) == (answer.enabled, answer.reason)
        assert (details.reason, details.variant) == ("SPLIT", "on" if answer.enabled else "off")


def test_attributes_models_and_reasons_travel(client: OpenFeatureClient):
    ruled = client.get_boolean_details("a", False, EvaluationContext("m", {"n": 1, "x": 1.5}))
    assert (ruled.value, ruled.reason) == (True, "TARGETING_MATCH")
    assert ruled.flag_metadata["detail"] == "rules.0"
    assert len(ruled.flag_metadata["flags_hash"]) == 64
    killed = client.get_boolean_details("b", True)
    assert (killed.value, killed.reason) == (False, "DISABLED")
    assert client.get_boolean_details("a", True).flag_metadata["reason"] == "NO_MODEL"


def test_a_flag_that_is_not_there_gives_the_callers_default(client: OpenFeatureClient):
    details = client.get_boolean_details("c", True)
    assert (details.value, details.error_code) == (True, ErrorCode.FLAG_NOT_FOUND)


@pytest.mark.parametrize(
    ("kind", "default"), [("string", "x"), ("integer", 1), ("float", 1.0), ("object", {})]
)
def test_another_type_is_a_mismatch(client: OpenFeatureClient, kind, default):
    ask = getattr(client, f"get_{kind}_details")
    assert ask("a", default).error_code == ErrorCode.TYPE_MISMATCH
    assert ask("c", default).error_code == ErrorCode.FLAG_NOT_FOUND
    assert ask("a", default).value == default


def test_another_snapshot_is_announced(client: OpenFeatureClient, make_file):
    provider, told = client.provider, []

    def hear(details):
        told.extend(details.flags_changed)

    client.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, hear)
    provider.replace(Snapshot(make_file(a={"default": True})))
    assert client.get_boolean_value("a", False)
    assert told == ["a", "b"]
    client.remove_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, hear)


def test_every_reason_has_a_standard_one():
    assert STANDARD_REASON.keys() == {*Reason}
