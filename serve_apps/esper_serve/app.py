"""The Serve application: `serve run esper_serve.app:build`, `serve deploy configs/serve/…`."""

import gc
import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from esper.config.base import validate
from esper_serve.settings import ServiceSettings


@serve.ingress()
class Replica:
    """One replica: the HTTP interface in Serve's hands.

    Args:
        settings: Of the service.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._app: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        from esper_serve.api import create_app

        replica = serve.get_replica_context().replica_id.unique_id
        self._app = create_app(self._settings, replica)
        # what lives as long as the replica need not be searched for garbage, which takes 100 ms
        gc.collect()
        gc.freeze()
        return self._app

    async def check_health(self) -> None:
        """Decide once, on the loop that answers requests: a replica that hangs fails this."""
        if self._app is not None:
            self._app.state.policies.probe()


# how it is served; Serve's configuration file may say otherwise
Tamiyo: serve.Deployment = serve.deployment(
    name="Tamiyo",
    max_ongoing_requests=64,
    health_check_period_s=1,
    health_check_timeout_s=2,
    graceful_shutdown_timeout_s=10,
    logging_config={"enable_access_log": False},
)(Replica)


def build(args: dict[str, Any]) -> Application:
    """The application, from what stands under `args` in Serve's configuration file.

    Args:
        args: Fields of `ServiceSettings`.

    Raises:
        ConfigError: If a field is unknown or wrong.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    settings = validate(ServiceSettings, args, source="the application's args")
    bound: Application = Tamiyo.bind(settings)
    return bound
