"""`esper monitoring`: the migration's files as metrics."""

import threading
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from rich.console import Console

from esper.config.base import ConfigError
from esper.monitoring.migration import MigrationCollector


def export(flags: Path, baseline: Path | None, port: int) -> None:
    """Serve until Ctrl-C."""
    registry = CollectorRegistry()
    registry.register(MigrationCollector(flags, baseline))
    try:
        start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        raise ConfigError("--port", (
            f"the port must be free, but {port} is not ({error.strerror}); choose another.",
        )) from None  # fmt: skip
    Console().print(f"http://127.0.0.1:{port}/metrics; Ctrl-C ends it")
    threading.Event().wait()
