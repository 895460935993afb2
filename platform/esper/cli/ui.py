"""`esper ui`: MLflow's own server on the results."""

import os
import sys


def serve_ui(tracking_uri: str, port: int) -> None:
    """Replace this process by MLflow's server on the loopback interface.

    Raises:
        ConnectionError: If the tracking URI cannot be reached.
    """
    from esper.tracking.reach import require_reachable

    require_reachable(tracking_uri)
    if tracking_uri.startswith(("http://", "https://")):
        print(f"the tracking server has its own pages: open {tracking_uri}")
        return
    print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri,
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    os.execv(sys.executable, command)
