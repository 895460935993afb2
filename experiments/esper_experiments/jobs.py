"""Jobs on a Ray cluster through its Jobs API, and what a job looks at before it begins.

Errors say which command to type next. Nothing here prints.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import aiohttp
import ray
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails as JobDetails
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from esper.config.base import ConfigError
from esper.environment import code_hash
from esper_experiments.ray_variables import VARIABLES
from esper_experiments.room import stop_ray

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
    "PYTHONUNBUFFERED": "1",
    # or Tune says of every trial that its own files, which nobody asked for, are not there
    "RAY_LOGGER_LEVEL": "error",
}
CHATTY = (
    "dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk",
    "_private.runtime_env.packaging",
)  # fmt: skip
STOPPED, LOST = 130, 3
ANSWER_S = 10.0
STOP_S = 60.0
NODES_S = 120.0
PENDING_S = 15.0
# the dashboard may be away for a moment; the job is not
ATTEMPTS, PAUSE_S = 5, 3.0


class Cluster:
    """A cluster's Jobs API; build it with `connect`."""

    def __init__(self, client: JobSubmissionClient, address: str) -> None:
        self._client, self.address = client, address

    @classmethod
    def connect(cls, address: str) -> "Cluster":
        """Ask the cluster once, with and without the token.

        Args:
            address: Of the dashboard: `http://127.0.0.1:8265`.

        Raises:
            ConfigError: If the address is none.
            ConnectionError: If nothing answers there, or something else than Ray.
            PermissionError: If there is no token here, it is not the cluster's, or the cluster
                asks for none.
        """
        address = _require_http(address)
        _require_guarded(address)
        # it would outrank the address
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        for module in CHATTY:
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
        try:
            return cls(JobSubmissionClient(address), address)
        except AuthenticationError as error:
            raise PermissionError(_token_advice(address, str(error))) from None

    def submit(
        self,
        job_id: str,
        command: str,
        folder: Path,
        metadata: Mapping[str, str],
        cpus: float,
        gpus: float,
    ) -> None:
        """Upload the folder, unless the cluster has it, and start the command in a copy of it.

        Args:
            job_id: New and unique.
            command: A line of shell.
            folder: Becomes the working directory of the job and its workers, and the first entry
                of their module path.
            metadata: Kept by Ray beside the job.
            cpus: CPUs reserved for the command itself, beside those of its trials.
            gpus: The same for GPUs.
        """
        # on a cluster the workers' environment is not that of the process which starts the trials
        variables = {**VARIABLES, **ENVIRONMENT}
        self._client.submit_job(
            entrypoint=command,
            submission_id=job_id,
            runtime_env={"working_dir": str(folder), "env_vars": variables},
            metadata=dict(metadata),
            entrypoint_num_cpus=cpus,
            entrypoint_num_gpus=gpus,
        )

    def jobs(self) -> list[JobDetails]:
        """Submitted jobs that the cluster remembers, the oldest first."""
        jobs = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def job(self, job_id: str) -> JobDetails:
        """One job.

        Raises:
            ConfigError: If the cluster knows none of this name.
        """
        try:
            return self._client.get_job_info(job_id)
        except RuntimeError as error:
            if "404" not in str(error):
                raise
            raise ConfigError(job_id, (
                f"the job must be one of the cluster at {self.address}, which knows none of this "
                "name; list its jobs: esper submit status",
            )) from None  # fmt: skip

    def follow(self, job_id: str, write: Callable[[str], None]) -> JobDetails:
        """Pass the log on, from its beginning, until the job ends.

        Raises:
            ConfigError: If there is no such job.
            ConnectionError: If the cluster does not answer any more.
        """
        self.job(job_id)
        written = 0
        for attempt in range(ATTEMPTS):
            try:
                for _ in range(ATTEMPTS):
                    self._wait_to_begin(job_id, write)
                    # after a break the log comes again from its beginning
                    written = asyncio.run(self._tail(job_id, write, written))
                    job = self.job(job_id)
                    if job.status.is_terminal():
                        return job
                    time.sleep(1.0)
            except (OSError, RuntimeError, aiohttp.ClientError):
                if attempt == ATTEMPTS - 1:
                    break
                time.sleep(PAUSE_S)
        raise ConnectionError(
            f"the cluster at {self.address} does not answer any more; the job may go on.\n"
            f"Look again: esper submit logs {job_id} --address {self.address}\n"
            "If the cluster is gone, the same submission on a new one continues."
        )

    def _wait_to_begin(self, job_id: str, write: Callable[[str], None]) -> None:
        """Say why, if the job does not begin soon: a GPU that nobody has keeps it for ever."""
        began, said = time.monotonic(), False
        while (job := self.job(job_id)).status == JobStatus.PENDING:
            if not said and time.monotonic() - began > PENDING_S:
                write(f"not begun after {PENDING_S:g} s: {job.message}\n")
                said = True
            time.sleep(0.5)

    async def _tail(self, job_id: str, write: Callable[[str], None], skip: int) -> int:
        seen = 0
        async for text in self._client.tail_job_logs(job_id):
            if seen + len(text) > skip:
                write(text[max(0, skip - seen) :])
            seen += len(text)
        return max(seen, skip)

    def stop(self, job_id: str) -> JobDetails:
        """End a job and wait until it has ended; one that has ended is left alone."""
        self.job(job_id)
        self._client.stop_job(job_id)
        end = time.monotonic() + STOP_S
        while not (job := self.job(job_id)).status.is_terminal() and time.monotonic() < end:
            time.sleep(0.5)
        return job


def exit_code(job: JobDetails) -> int:
    """Of the job's command; 130 if it was stopped, 3 if it never ran or its machine was lost."""
    if job.status == JobStatus.STOPPED:
        return STOPPED
    if job.driver_exit_code is None:
        return 0 if job.status == JobStatus.SUCCEEDED else LOST
    code = int(job.driver_exit_code)
    return code if code >= 0 else 128 - code


def _require_http(address: str) -> str:
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("--address", (
            f"it must be the address of the dashboard, such as http://127.0.0.1:8265, but got "
            f"{address!r}.",
        ))  # fmt: skip
    return parts.geturl().rstrip("/")


def _require_guarded(address: str) -> None:
    """A Ray dashboard answers there within seconds, and refuses who has no token."""
    try:
        with urlopen(Request(f"{address}/api/version"), timeout=ANSWER_S) as answer:
            body = json.loads(answer.read(10_000))
        if "ray_version" not in body:
            raise ValueError("its answer is not Ray's")
    except HTTPError as error:
        if error.code in (401, 403):
            return
        raise ConnectionError(_unreachable(address, f"{error}")) from None
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionError(_unreachable(address, f"{error}")) from None
    if os.environ.get("RAY_AUTH_MODE") != "disabled":
        raise PermissionError(
            f"the cluster at {address} takes jobs from anyone who reaches it: it was started "
            "without a token.\n"
            "Start it with one: RAY_AUTH_MODE=token ray start --head ... (cluster.yaml does)\n"
            "Or, on a network of your own, do without: RAY_AUTH_MODE=disabled esper submit ..."
        )


def _unreachable(address: str, reason: str) -> str:
    return (
        f"a Ray dashboard must answer at {address}, but: {reason}\n"
        "A cluster of cluster.yaml, forwarded in another terminal: ray dashboard cluster.yaml\n"
        "On Kubernetes: kubectl port-forward service/esper-head-svc 8265\n"
        "On this machine: RAY_AUTH_MODE=token ray start --head\n"
        "Elsewhere: esper submit CONFIG --address http://HOST:PORT"
    )


def _token_advice(address: str, error: str) -> str:
    if "couldn't find" in error:
        found = "there is no token here"
    elif "Invalid" in error or "Forbidden" in error:
        found = "the token of this machine is not the cluster's"
    else:
        found = error.splitlines()[0].partition(". ")[0]
    place = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        place = "the variable RAY_AUTH_TOKEN, which outranks files"
    return (
        f"{address} wants the cluster's token, but {found} (looked in {place}).\n"
        "Copy it from the head: scp HEAD:.ray/auth_token ~/.ray/auth_token\n"
        "On Kubernetes: export RAY_AUTH_TOKEN=$(kubectl get secret esper-token "
        "-o jsonpath={.data.auth_token} | base64 -d)\n"
        "In another file: export RAY_AUTH_TOKEN_PATH=FILE"
    )


def require_nodes(folder: Path) -> list[str]:
    """Every node of the cluster sees the folder and runs this process's code.

    Args:
        folder: Where results go.

    Returns:
        One line a node: its name and what it has.

    Raises:
        ConnectionError: Naming the nodes where it is not so.
    """
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    marker = folder / f".seen-by-all-nodes-{os.getpid()}"
    marker.touch()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        look = ray.remote(num_cpus=0)(_look)
        asked = {
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(marker)): node
            for node in nodes
        }
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_S)
        wrong = [f"  {_name(asked[ref])} did not answer in {NODES_S:g} s" for ref in silent]
        for ref in answered:
            wrong += _problems(_name(asked[ref]), folder, ref)
        if wrong:
            raise ConnectionError("\n".join(["the nodes must be alike, but", *sorted(wrong)]))
        return [f"{_name(node)}: {_resources(node['Resources'])}" for node in nodes]
    finally:
        marker.unlink()
        stop_ray()


def _look(marker: str) -> tuple[bool, str]:
    return Path(marker).exists(), code_hash()


def _problems(node: str, folder: Path, seen: "ray.ObjectRef[tuple[bool, str]]") -> list[str]:
    try:
        sees, code = ray.get(seen)
    except RayError as error:
        return [f"  {node} could not run a task: {str(error).strip().splitlines()[-1]}"]
    problems = []
    if not sees:
        problems.append(
            f"  {node} does not see {folder}; name a folder that all nodes share (NFS): --results"
        )
    if code != code_hash():
        problems.append(f"  {node} imports other code of Esper ({code[:12]})")
    return problems


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _resources(have: Mapping[str, float]) -> str:
    return f"{have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
