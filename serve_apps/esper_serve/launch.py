"""Starts the service on this machine, after everything that can be wrong has been looked at."""

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from esper.config.base import ConfigError, read_yaml, validate
from esper_serve.api import create_app
from esper_serve.settings import ServiceSettings
from esper_serve.tokens import Token, read_tokens

APPLICATION = "esper_serve.app:build"
# Ray's HAProxy in place of its Python proxy: see docs/decisions/2026-11-24-serve.md for what each
# is worth. What is set in the environment is left as it is.
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # a decision is quicker than handing it to another thread and back
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # a replica that hangs gets no requests after two checks
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    # to ask another replica twice the same is harmless here
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # Ray's workers step back for every other process, such as the training that asks
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


FALLBACK = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"


@dataclass(frozen=True)
class Checked:
    """A configuration that can be served.

    Attributes:
        url: Where the service will be.
        policy: The active one.
        tokens: Who may ask.
        settings: Of the service.
    """

    url: str
    policy: str
    tokens: tuple[Token, ...]
    settings: ServiceSettings


def check(config: Path) -> Checked:
    """Read Serve's configuration file and build everything that a replica builds.

    Args:
        config: Such as configs/serve/tamiyo.yaml.

    Raises:
        ConfigError: If a key, a policy, the tokens or the database is wrong, or the port is taken.
    """
    source = str(config)
    try:
        served = ServeDeploySchema.model_validate(read_yaml(config))
    except ValidationError as error:
        raise ConfigError(source, tuple(
            f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()
        )) from None  # fmt: skip
    settings = validate(
        ServiceSettings, _application(served, source).args, source=f"{source}, args"
    )
    app = create_app(settings)
    host, port = served.http_options.host, served.http_options.port
    _require_free(source, "http_options", host, port)
    # with no replica there, HAProxy asks whoever listens on this one, be it another service
    fallback = int(os.environ.get(FALLBACK, "8500"))
    _require_free(source, f"the variable {FALLBACK}", host, fallback)
    return Checked(
        url=f"http://{host}:{port}", policy=app.state.policies.active(),
        tokens=read_tokens(settings.tokens_file), settings=settings,
    )  # fmt: skip


def _require_free(source: str, key: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        # as the proxy will do it, so that a port that is only just free passes
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(source, (
                f"{key} must name a port that is free, but {host}:{port} is not "
                f"({error.strerror}); choose another port.",
            )) from None  # fmt: skip


def _application(served: ServeDeploySchema, source: str) -> ServeApplicationSchema:
    ours = [a for a in served.applications if a.import_path == APPLICATION]
    if len(ours) != 1:
        raise ConfigError(source, (
            f"applications must hold one with import_path {APPLICATION}, but {len(ours)} have it; "
            "configs/serve/tamiyo.yaml is an example.",
        ))  # fmt: skip
    return ours[0]


def become_service(config: Path, environ: Mapping[str, str]) -> Any:
    """Replace this process by Serve's own command, which ends with Ctrl-C.

    Args:
        config: A file that passed `check`.
        environ: The process's variables.
    """
    command = shutil.which("serve", path=str(Path(sys.executable).parent)) or "serve"
    os.execve(command, [command, "run", str(config)], {**ENVIRONMENT, **environ})
