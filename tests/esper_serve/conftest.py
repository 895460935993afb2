"""A service in this process, without Ray: the same application that a replica runs."""

import pytest
from starlette.testclient import TestClient

from esper.config.base import validate
from esper_serve.api import create_app
from esper_serve.settings import ServiceSettings
from esper_serve.tokens import add_token

POLICIES = {
    "heuristic-1": {"name": "tamiyo"},
    "eager-1": {"name": "tamiyo", "options": {"patience_intervals": 1, "seeds_per_wave": 8}},
    "never-1": {"name": "static"},
}


class Service:
    """An application, and headers with the tokens of a client and an admin."""

    def __init__(self, home, **settings):
        self.client_headers, self.admin_headers = (
            {"authorization": f"Bearer {add_token(home / 'tokens.yaml', role, role)}"}
            for role in ("client", "admin")
        )
        self.settings = validate(
            ServiceSettings, {"home": str(home), "policies": POLICIES, **settings}, source="test"
        )
        self.app = create_app(self.settings)
        self.http = TestClient(self.app, raise_server_exceptions=False)

    def get(self, path, **more):
        return self.http.get(path, headers=self.client_headers, **more)

    def post(self, path, body, headers=None, **more):
        return self.http.post(path, json=body, headers=headers or self.client_headers, **more)


@pytest.fixture
def make_service(tmp_path):
    return lambda **settings: Service(tmp_path / "home", **settings)


@pytest.fixture
def service(make_service):
    return make_service()
