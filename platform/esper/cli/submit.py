"""`esper submit`: a configuration as a job on a Ray cluster, and its log, state and end.

The job runs the code of this process, which is uploaded with the configuration: see
docs/decisions/2026-11-23-submit.md.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from esper.cli.upload import MIB, Job, read_job, stage
from esper.config.base import ConfigError
from esper.config.defaults import DASHBOARD, TRACKING_URI
from esper.environment import code_hash, commit, is_dirty

if TYPE_CHECKING:
    from esper_experiments.jobs import Cluster, JobDetails


def submit(
    config: Path,
    address: str,
    results: str,
    tracking_uri: str | None,
    also: Sequence[Path],
    wait: bool,
    arguments: Sequence[str],
) -> int:
    """Check, upload and start, and follow the log to the end.

    Args:
        config: A sweep, an arena, a search, a run or a baseline.
        address: Of the cluster's dashboard.
        results: Folder on the cluster that all its nodes see.
        tracking_uri: MLflow's, as seen from the cluster; None: the configuration's.
        also: Further files and folders to upload.
        wait: False: end when the job is accepted.
        arguments: Passed on to the esper command.

    Returns:
        The job's exit code; 130 if it was stopped or Ctrl-C detached; 0 without waiting.

    Raises:
        ConfigError: If the configuration is wrong, or the same job runs already.
        ConnectionError: If the cluster cannot be reached.
        PermissionError: If the token is missing or wrong.
    """
    job = read_job(config, also)
    uri = tracking_uri or job.tracking_uri
    _require_no_password(uri)
    if not results.startswith(("/", "~")):
        raise ConfigError("--results", (f"it must be a path from / or ~, but got {results!r}.",))
    cluster = _connect(address)
    _warn_if_open(cluster.address)
    facts = {
        "config": job.config.as_posix(), "results": results, "tracking_uri": uri or "",
        "arguments": shlex.join(arguments), "code_hash": code_hash(), "commit": _commit() or "",
    }  # fmt: skip
    _require_new(cluster, facts)
    name = f"{config.stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{token_hex(2)}"
    with TemporaryDirectory() as folder:
        stage(job, Path(folder))
        print(f"uploading {len(job.files)} files, {job.num_bytes / MIB:.1f} MiB", flush=True)
        own = 1.0 if job.kind in ("run", "baseline") else 0.0
        command = _command(job, name, facts, arguments)
        gpus = float(job.uses_gpu and "--shards" not in arguments)
        cluster.submit(name, command, Path(folder), facts, own, gpus)
    _tell_places(cluster, name, facts, job)
    return attach(cluster, name) if wait else 0


def _connect(address: str) -> "Cluster":
    # Ray reads it once, when it is imported: a client without a token is told so here
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from esper_experiments.jobs import Cluster

    return Cluster.connect(address)


def _command(job: Job, name: str, facts: dict[str, str], arguments: Sequence[str]) -> str:
    options = ["--name", name, "--expect", facts["code_hash"], "--results", facts["results"]]
    for option in ("tracking_uri", "commit"):
        if facts[option]:
            options += [f"--{option.replace('_', '-')}", facts[option]]
    what = [job.kind, job.config.as_posix(), *arguments]
    return shlex.join(["python", "-m", "esper.cli.job", *options, *what])


def _commit() -> str | None:
    """Of a checkout without changes: of another one it would not say what ran."""
    return None if is_dirty() else commit()


def _require_no_password(uri: str | None) -> None:
    if uri is not None and urlsplit(uri).password:
        raise ConfigError("the tracking URI", (
            "it must hold no password, which everyone with the cluster's token could read; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the cluster is started.",
        ))  # fmt: skip


def _warn_if_open(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: the token travels unencrypted to {parts.hostname}; a tunnel hides it: "
            "ray dashboard cluster.yaml, or ssh -N -L 8265:127.0.0.1:8265 HEAD",
            file=sys.stderr,
        )


def _require_new(cluster: "Cluster", facts: dict[str, str]) -> None:
    """Two jobs must not write the same results at once."""
    same = ("config", "results", "arguments")
    for job in cluster.jobs():
        theirs = job.metadata or {}
        if not job.status.is_terminal() and all(theirs.get(k) == facts[k] for k in same):
            raise ConfigError(facts["config"], (
                f"it must not run twice at once, but {job.submission_id} runs it; look: "
                f"{_again(cluster, 'logs', str(job.submission_id))}",
            ))  # fmt: skip


def _tell_places(cluster: "Cluster", name: str, facts: dict[str, str], job: Job) -> None:
    uri = facts["tracking_uri"]
    database = job.kind != "baseline" and (not uri or uri.startswith("sqlite:"))
    print(f"job {name} on {cluster.address}")
    print(f"  results: {facts['results']} on the cluster")
    if job.kind != "baseline":
        print(f"  MLflow:  {uri or TRACKING_URI}{', in the results' if database else ''}")
    if not facts["commit"]:
        print("  commit:  none (no checkout, or one with changes); the code's sha256 is recorded")
    _tell_commands(cluster, name)


def _tell_commands(cluster: "Cluster", name: str) -> None:
    for command in ("logs", "status", "stop"):
        print(f"  {command + ':':8} {_again(cluster, command, name)}")
    sys.stdout.flush()


def _again(cluster: "Cluster", command: str, name: str) -> str:
    where = "" if cluster.address == DASHBOARD else f" --address {cluster.address}"
    return f"esper submit {command} {name}{where}"


def attach(cluster: "Cluster", name: str) -> int:
    """Print a job's log until it ends; Ctrl-C leaves the job alone.

    Returns:
        The job's exit code, 130 if it was stopped or Ctrl-C detached.
    """
    from esper_experiments.jobs import exit_code

    try:
        job = cluster.follow(name, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\ndetached; {name} goes on")
        _tell_commands(cluster, name)
        return 130
    code = exit_code(job)
    print(_ending(job, code))
    return code


def _ending(job: "JobDetails", code: int) -> str:
    name = job.submission_id
    if job.status == "STOPPED":
        return f"{name} was stopped; the same command continues what it had finished"
    if job.status == "SUCCEEDED":
        return f"{name} succeeded"
    if job.driver_exit_code is None:
        why = (job.message or "no message").strip().splitlines()
        return "\n".join([f"{name} ended without an exit code:", *why[:12]])
    more = "; the same command continues" if code == 4 or code > 128 else ""
    return f"{name} ended with exit code {code}{more}"


def show_status(address: str, name: str | None) -> int:
    """Print the cluster's jobs, or one of them.

    Returns:
        0; with a name 0 while it runs, and then its exit code.
    """
    cluster = _connect(address)
    from esper_experiments.jobs import exit_code

    if name is not None:
        job = cluster.job(name)
        print(_line(job))
        for key, value in (job.metadata or {}).items():
            if value:
                print(f"  {key}: {value}")
        _tell_commands(cluster, name)
        return exit_code(job) if job.status.is_terminal() else 0
    jobs = cluster.jobs()
    for job in jobs:
        print(_line(job))
    if not jobs:
        print(f"no jobs on {cluster.address}")
    return 0


def _line(job: "JobDetails") -> str:
    began = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
    code = "" if job.driver_exit_code is None else f", exit code {job.driver_exit_code}"
    return f"{job.submission_id}  {began:%Y-%m-%d %H:%M} UTC  {job.status.value}{code}"


def show_logs(address: str, name: str) -> int:
    """Follow a job's log again, from its beginning.

    Returns:
        As `attach`.
    """
    return attach(_connect(address), name)


def stop(address: str, name: str) -> int:
    """End a job.

    Returns:
        0 if it has ended, 3 if it still runs.
    """
    job = _connect(address).stop(name)
    print(_line(job))
    return 0 if job.status.is_terminal() else 3
