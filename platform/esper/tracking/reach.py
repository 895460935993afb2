"""Can a tracking URI be reached? Answered in seconds, where MLflow itself retries for minutes."""

import os
import socket
import sqlite3
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def require_reachable(tracking_uri: str, timeout_s: float = 5.0) -> None:
    """Ask the server or the database once.

    A URI of another kind is left to MLflow.

    Raises:
        ConnectionError: If there is no answer; it names the URI, the reason and the remedy.
    """
    scheme = urlsplit(tracking_uri).scheme.split("+")[0]
    try:
        if scheme in ("http", "https"):
            remedy = "start `mlflow server` there or correct the URI"
            _ask_server(tracking_uri, timeout_s)
        elif scheme == "sqlite":
            remedy = "name a database file in a folder that can be written"
            _open_database(tracking_uri)
        elif scheme in DEFAULT_PORTS:
            remedy = "start the database or correct the URI"
            parts = urlsplit(tracking_uri)
            address = (parts.hostname or "localhost", parts.port or DEFAULT_PORTS[scheme])
            socket.create_connection(address, timeout_s).close()
        elif scheme in ("", "file") and not os.environ.get("MLFLOW_ALLOW_FILE_STORE"):
            # MLflow would say so when the run has ended, and its numbers would be lost
            remedy = "name a database, such as sqlite:///mlflow.db"
            raise ValueError("MLflow no longer keeps runs in a folder of files")
    except (OSError, HTTPException, sqlite3.Error, ValueError) as error:
        raise unreachable(tracking_uri, error, remedy) from error


def unreachable(tracking_uri: str, error: Exception, remedy: str) -> ConnectionError:
    """The error that says which URI, why, and what to do; a password in the URI is left out."""
    parts = urlsplit(tracking_uri)
    shown = tracking_uri.replace(f":{parts.password}@", ":***@") if parts.password else tracking_uri
    return ConnectionError(
        f"mlflow.tracking_uri must be reachable, but got {shown}: {error}; {remedy}."
    )


def database_path(tracking_uri: str) -> Path | None:
    """The absolute path of a `sqlite:///` URI's file; None for any other URI."""
    parts = urlsplit(tracking_uri)
    if parts.scheme.split("+")[0] != "sqlite":
        return None
    # three slashes start a relative path, four an absolute one
    return Path(parts.path.removeprefix("/")).absolute()


def _ask_server(tracking_uri: str, timeout_s: float) -> None:
    try:
        with urlopen(f"{tracking_uri.rstrip('/')}/health", timeout=timeout_s):
            pass
    except HTTPError as error:
        # 401 or 404 is an answer: a gateway may guard or lack this page; MLflow itself tells more
        if error.code >= 500:
            raise


def _open_database(tracking_uri: str) -> None:
    path = database_path(tracking_uri)
    if path is None or path.name in ("", ":memory:"):
        raise ValueError("the URI names no file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA schema_version").fetchone()
    if not os.access(path, os.W_OK):
        raise PermissionError("the file cannot be written")
