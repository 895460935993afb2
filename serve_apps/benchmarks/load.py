"""Load on Tamiyo's service, beside an application that does nothing, in the same Serve instance.

    python serve_apps/benchmarks/load.py compare --out docs/benchmarks/serve_cpu.json
    python serve_apps/benchmarks/load.py curve faults soak --out docs/benchmarks/serve_cpu.json

The load comes from this process, on the same machine. Latencies under open load count from the
moment at which a request was due, so that a service that falls behind shows it. Every part starts
a service of its own and adds its results to the file.
"""

import argparse
import asyncio
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import statsmodels.api as sm
import urllib3
import yaml

from esper.controller.contract import random_reports, random_site
from esper.controller.remote import TOKEN_VARIABLE, Client, RemoteError, RemoteOptions
from esper.controller.wire import MSGPACK, DecideRequest, DecideResponse, ReportWire, pack, unpack
from esper.environment import fingerprint, machine
from esper.evidence.records import write_text
from esper_serve.api import example_feedback
from esper_serve.launch import ENVIRONMENT
from esper_serve.tokens import add_token

DECIDE = "/v1/decide"
# a rate is sustained while it is served and half of it takes no longer than this many times what
# half takes at a tenth of the rate: until then no queue has formed
KNEE_RISE = 2.0


class Connection(asyncio.Protocol):
    """One connection that is kept: HTTP/1.1 with as little work as possible on this side."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer, self._waiting = b"", asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits learns it."""
        if not self._waiting.done():
            self._waiting.set_exception(ConnectionError("the connection was closed"))

    def data_received(self, data: bytes) -> None:
        """An answer is whole when its length has come."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        told = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0].strip()
        if not told.isdigit():
            # the proxy's own refusals end with the connection
            assert self._transport is not None
            self._transport.abort()
            return
        length = int(told)
        if len(body) >= length:
            self._buffer = b""
            self._waiting.set_result(int(head[9:12]))

    @property
    def gone(self) -> bool:
        """Whether the other side has closed it, as it may do between two requests."""
        return self._transport is None or self._transport.is_closing()

    async def ask(self, request: bytes) -> int:
        """The status of the answer."""
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        status: int = await self._waiting
        return status


@dataclass(frozen=True)
class Traffic:
    """What is asked: requests that differ by their id alone.

    Attributes:
        port: Of the service.
        path: Where.
        body: With 16 zeros in place of the id.
        token: Bearer token.
    """

    port: int
    path: str
    body: bytes
    token: str

    def requests(self) -> Iterator[bytes]:
        """One request after another, each with an id of its own."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.token}\r\n"
            f"content-type: {MSGPACK}\r\naccept: {MSGPACK}\r\n"
            f"content-length: {len(self.body)}\r\n\r\n"
        ).encode()
        before, zeros, after = self.body.partition(b"0" * 16)
        number = time.time_ns() % 10**15
        while True:
            number += 1
            yield head + before + (f"{number:016d}".encode() if zeros else b"") + after


@dataclass
class Measured:
    """Latencies in ms, failures, how long it took, and how much later it ended than was due."""

    latencies: list[float]
    failures: int
    seconds: float
    behind_s: float = 0.0

    def summary(self) -> dict[str, float]:
        """Rate and percentiles."""
        p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99]).tolist()
        return {
            "per_s": len(self.latencies) / self.seconds, "failures": float(self.failures),
            "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "max_ms": max(self.latencies),
            "requests": float(len(self.latencies)), "behind_s": self.behind_s,
        }  # fmt: skip


async def closed(traffic: Traffic, connections: int, seconds: float) -> Measured:
    """Each connection asks again as soon as it has its answer."""
    made = Measured([], 0, seconds)
    requests, ends = traffic.requests(), time.perf_counter() + seconds

    async def one() -> None:
        connection = await connected(traffic.port)
        while (started := time.perf_counter()) < ends:
            if connection.gone:
                connection = await connected(traffic.port)
            try:
                made.failures += await connection.ask(next(requests)) != 200
            except ConnectionError:
                made.failures += 1
                connection = await connected(traffic.port)
            made.latencies.append(1000 * (time.perf_counter() - started))

    await asyncio.gather(*(one() for _ in range(connections)))
    return made


async def opened(traffic: Traffic, per_s: float, seconds: float, seed: int) -> Measured:
    """Requests come when they come, at a mean rate, whatever the service does."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / per_s, int(per_s * seconds))
    free, requests = [await connected(traffic.port) for _ in range(8)], traffic.requests()
    made = Measured([], 0, seconds)

    async def one(due: float) -> None:
        try:
            connection = free.pop() if free else await connected(traffic.port)
            if connection.gone:
                connection = await connected(traffic.port)
            made.failures += await connection.ask(next(requests)) != 200
            free.append(connection)
        except OSError:
            # nor does a service answer that is so far behind that nobody can connect any more
            made.failures += 1
        made.latencies.append(1000 * (time.perf_counter() - due))

    running, due = set[asyncio.Task[None]](), time.perf_counter()
    started = due
    for gap in gaps:
        due += gap
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.add(task := asyncio.create_task(one(due)))
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    made.seconds = time.perf_counter() - started
    made.behind_s = max(0.0, made.seconds - float(gaps.sum()))
    return made


async def connected(port: int) -> Connection:
    """A new connection."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


def decide_traffic(served: "Served", seeds: int, live: int) -> Traffic:
    """Decisions on one site, of which some seeds are awake."""
    report = next(random_reports(0))
    site = random_site(np.random.default_rng(0), "site", "chunk", 0.0, seeds)
    site.stage[:live] = 3
    site.blueprint_id[:live] = 1
    given = {f: getattr(report, f) for f in report.__dataclass_fields__} | {"sites": (site,)}
    request = DecideRequest(
        request_id="0" * 16, model="load", report=ReportWire.of(type(report)(**given))
    )
    return Traffic(served.port, DECIDE, pack(request.dump(binary=True), MSGPACK), served.token)


def noop(args: dict[str, Any]) -> Any:
    """The Serve application that does nothing."""
    from fastapi import FastAPI, Request
    from ray import serve

    nothing = FastAPI()

    @nothing.post("/")
    async def answer(request: Request) -> dict[str, bool]:
        await request.body()
        return {"ok": True}

    @serve.deployment(max_ongoing_requests=64, logging_config={"enable_access_log": False})
    @serve.ingress(nothing)
    class Noop:
        pass

    deployment: Any = Noop
    return deployment.bind()


def single(args: dict[str, Any]) -> Any:
    """The Serve application that decides and does nothing else."""
    return deciding(args, batched=False)


def batched(args: dict[str, Any]) -> Any:
    """The same by `serve.batch`."""
    return deciding(args, batched=True)


def deciding(args: dict[str, Any], *, batched: bool) -> Any:
    """The Serve application that decides one by one, or as many as wait together."""
    from fastapi import FastAPI, Request, Response
    from ray import serve

    from esper.monitoring.metrics import PrometheusExporter
    from esper_serve.admin_log import AdminLog
    from esper_serve.policies import Policies
    from esper_serve.settings import ServiceSettings

    api = FastAPI()

    class Deciding:
        def __init__(self) -> None:
            settings = ServiceSettings(**args)
            metrics = PrometheusExporter("esper_tamiyo", constant={"replica": "load"})
            self._policies = Policies(settings, AdminLog(settings.database_url), {}, metrics)

        @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.002)
        async def _together(self, requests: list[DecideRequest]) -> list[DecideResponse]:
            return [self._policies.decide(request, "load") for request in requests]

        @api.post("/")
        async def decide(self, request: Request) -> Response:
            asked = DecideRequest.model_validate(unpack(await request.body(), MSGPACK))
            if batched:
                answer = await self._together(asked)
            else:
                answer = self._policies.decide(asked, "load")
            return Response(pack(answer.model_dump(mode="json"), MSGPACK), media_type=MSGPACK)

    options: dict[str, Any] = {
        "max_ongoing_requests": 64, "logging_config": {"enable_access_log": False},
    }  # fmt: skip
    deployment: Any = serve.deployment(**options)(serve.ingress(api)(Deciding))
    return deployment.bind()


# applications beside the service, and the class of each
OTHERS = {"noop": "Noop", "single": "Deciding", "batched": "Deciding"}


@dataclass(frozen=True)
class Served:
    """A running service.

    Attributes:
        port: Where it listens on 127.0.0.1.
        token: A client's.
        process: `serve run`.
        config: What it was started with.
        environ: Its variables.
        folder: Of its files.
    """

    port: int
    token: str
    process: psutil.Process
    config: dict[str, Any]
    environ: dict[str, str]
    folder: Path

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The processes that serve, by what they do."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.process.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            for name, mark in ROLES.items():
                if mark in line:
                    found.setdefault(name, []).append(process)
                    break
        return found

    def memory(self) -> dict[str, Any]:
        """Resident MiB and process ids by what processes do."""
        sizes, pids = dict[str, float](), dict[str, list[int]]()
        for role, processes in self.processes().items():
            try:
                sizes[role] = sum(p.memory_info().rss for p in processes) / 2**20
            except psutil.Error:
                # replaced at this moment: the next look finds another
                continue
            pids[role] = [p.pid for p in processes]
        return {"mib": sizes, "pids": pids}

    def dashboard(self) -> str:
        """Where `serve deploy` finds it."""
        (process,) = self.processes()["dashboard"]
        # not always the port that it was told: that may be taken
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                url = f"http://127.0.0.1:{connection.laddr.port}"
                try:
                    urllib3.request("GET", url + "/api/version", retries=False, timeout=2)
                except urllib3.exceptions.HTTPError:
                    continue
                return url
        raise RuntimeError("the dashboard must answer, but does not.")

    def write(self) -> Path:
        """The configuration as it is now, in a file."""
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        return file


# what a process of the service does, by what stands in its command line
ROLES = {
    "replica": "ServeReplica:tamiyo", "controller": "ServeController",
    "proxy's manager": "ProxyActor", "haproxy": "haproxy -", "raylet": "raylet/raylet",
    "agent": "DashboardAgent", "gcs": "gcs_server", "dashboard": "dashboard/dashboard.py",
}  # fmt: skip


@contextmanager
def served(proxy: str, replicas: int = 1, others: tuple[str, ...] = ()) -> Iterator[Served]:
    """The service, and other applications beside it, behind a proxy, as `serve run` does it."""
    with tempfile.TemporaryDirectory() as name, socket_of_nobody() as port:
        folder = Path(name)
        token = add_token(folder / "tokens.yaml", "load", "client")
        each = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 0.2}}
        args = {"home": name, "rate_limit": "1000000/second"}
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 15},
            "applications": [
                {"name": "tamiyo", "route_prefix": "/", "import_path": "esper_serve.app:build",
                 "args": args, "deployments": [{"name": "Tamiyo", **each}]},
                *({"name": other, "route_prefix": f"/{other}", "import_path": f"load:{other}",
                   "args": args, "deployments": [{"name": OTHERS[other], **each}]}
                  for other in others),
            ],
        }  # fmt: skip
        command = str(Path(sys.executable).parent / "serve")
        started = Served(port, token, psutil.Process(), config, environment(folder, proxy), folder)
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [command, "run", str(started.write())], stdout=log, stderr=log, env=started.environ
            )
        try:
            _wait_for(f"http://127.0.0.1:{port}/readyz", process, folder / "log")
            for other in others:
                _wait_for(f"http://127.0.0.1:{port}/{other}/docs", process, folder / "log")
            # the proxy starts anew for each replica that comes
            time.sleep(10)
            yield replace(started, process=psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(120)


def environment(folder: Path, proxy: str) -> dict[str, str]:
    """Of a cluster that shares nothing with others on this machine."""
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    own = {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(proxy == "haproxy")), "PYTHONPATH": path,
        "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
    }  # fmt: skip
    for name in ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP"):
        with socket_of_nobody() as port:
            own[f"RAY_SERVE_{name}_PORT"] = str(port)
    return {**os.environ, **ENVIRONMENT, **own}


@contextmanager
def socket_of_nobody() -> Iterator[int]:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    yield port


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + 180
    while time.monotonic() < ends and process.poll() is None:
        try:
            if urllib3.request("GET", url, retries=False, timeout=2).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the service must start, but does not:\n{log.read_text()[-2000:]}")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Decisions beside nothing, at 1 and 32 connections, behind each proxy; and large reports."""
    return {proxy: compared(proxy, options) for proxy in options.proxy or ("python", "haproxy")}


def compared(proxy: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same behind one proxy."""
    found: dict[str, Any] = {}
    with served(proxy, options.replicas, ("noop",)) as service:
        large = decide_traffic(service, 4096, 64)
        traffics = {
            "no-op": Traffic(service.port, "/noop/", b"x" * 512, ""),
            "decide 64": decide_traffic(service, 64, 8),
        }
        # everything is compiled, cached and connected once
        for traffic in (*traffics.values(), large):
            asyncio.run(closed(traffic, 4, 2))
        found |= in_turn(traffics, (1, 32), options)
        found["decide 4096, c = 1"] = [
            asyncio.run(closed(large, 1, options.block_s)).summary() for _ in range(options.blocks)
        ]
    show(proxy, found)
    found["replicas"] = options.replicas
    return found


def batch(options: argparse.Namespace) -> dict[str, Any]:
    """Whether `serve.batch` pays: the same decisions with it and without."""
    with served("haproxy", 1, ("single", "batched")) as service:
        body = decide_traffic(service, 64, 8).body
        traffics = {name: Traffic(service.port, f"/{name}/", body, "") for name in
                    ("single", "batched")}  # fmt: skip
        for traffic in traffics.values():
            asyncio.run(closed(traffic, 4, 2))
        found = in_turn(traffics, (1, 8, 32), options)
    show("haproxy", found)
    return found


def in_turn(
    traffics: dict[str, Traffic], connections: tuple[int, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """Blocks of two kinds of traffic, and the rate of the second over that of the first."""
    found: dict[str, Any] = {}
    first, second = traffics
    for c in connections:
        for _ in range(options.blocks):
            # neighbours in time, on a machine that is not always as fast
            for name, traffic in traffics.items():
                block = asyncio.run(closed(traffic, c, options.block_s)).summary()
                found.setdefault(f"{name}, c = {c}", []).append(block)
        pairs = zip(found[f"{first}, c = {c}"], found[f"{second}, c = {c}"], strict=True)
        ratios = [other["per_s"] / one["per_s"] for one, other in pairs]
        low, middle, high = np.percentile(ratios, [20, 50, 80]).tolist()
        found[f"{second} / {first}, c = {c}"] = {"p20": low, "p50": middle, "p80": high}
    return found


def show(about: str, found: dict[str, Any]) -> None:
    """A table of medians over blocks, and of ratios."""
    for name, blocks in found.items():
        if isinstance(blocks, dict):
            print(f"{about:8} {name}: {blocks['p50']:.2f} ({blocks['p20']:.2f} to "
                  f"{blocks['p80']:.2f})", flush=True)  # fmt: skip
            continue
        say(about, name, {key: statistics.median(b[key] for b in blocks) for key in blocks[0]})


def say(about: str, name: str, point: dict[str, float]) -> None:
    """One line of the table."""
    print(f"{about:8} {name:20} {point['per_s']:7.0f}/s  p50 {point['p50_ms']:.2f}  "
          f"p95 {point['p95_ms']:.2f}  p99 {point['p99_ms']:.2f} ms  "
          f"{point['failures']:.0f} failed", flush=True)  # fmt: skip


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """Open load at growing rates, the knee, and a long run at 70 % of it.

    The knee is the highest rate up to which all are sustained. The first rate that cannot be served
    is the last one: above it, latencies tell how long the load went on, and nothing else.
    """
    with served("haproxy", options.replicas) as service:
        traffic = decide_traffic(service, 64, 8)
        asyncio.run(closed(traffic, 8, 3))
        most = asyncio.run(closed(traffic, 32, options.block_s)).summary()["per_s"]
        points, knee = [], 0.0
        for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            seconds = 3 * options.block_s
            rate, seed = share * most, int(10 * share)
            point = asyncio.run(opened(traffic, rate, seconds, seed)).summary()
            points.append({"offered_per_s": rate, **point})
            say("open", f"{rate:.0f}/s offered", point)
            if point["behind_s"] >= 0.02 * seconds or point["failures"]:
                break
            lower = knee == (points[-2]["offered_per_s"] if points[1:] else 0.0)
            if lower and point["p50_ms"] <= KNEE_RISE * points[0]["p50_ms"]:
                knee = rate
        found: dict[str, Any] = {"closed_per_s": most, "points": points, "knee_per_s": knee}
        if options.open_s and knee:
            at = asyncio.run(opened(traffic, 0.7 * knee, options.open_s, seed=7)).summary()
            found["at 70 % of the knee"] = at
            say("open", f"{0.7 * knee:.0f}/s, {options.open_s:.0f} s", at)
    return found


class Asker(threading.Thread):
    """Asks over and over by the client library, as a run does."""

    def __init__(self, service: Served, number: int, deadline_s: float) -> None:
        super().__init__()
        self._options = RemoteOptions(
            url=f"http://127.0.0.1:{service.port}", model=f"m-{number}", deadline_s=deadline_s,
            rest_s=100 * deadline_s,
        )  # fmt: skip
        self._report, self._run = ReportWire.of(next(random_reports(number))), secrets.token_hex(8)
        self.on, self.failures, self.latencies = True, list[str](), list[float]()
        self.policies = set[str]()

    def run(self) -> None:
        """Ask until told to stop."""
        client, asked = Client(self._options), 0
        while self.on:
            asked += 1
            request = DecideRequest(
                request_id=f"{self._run}.{asked}", model="m", report=self._report
            )
            started = time.perf_counter()
            try:
                self.policies.add(client.decide(request).policy)
            except RemoteError as error:
                self.failures.append(str(error))
            self.latencies.append(1000 * (time.perf_counter() - started))
            time.sleep(0.005)


def faults(options: argparse.Namespace) -> dict[str, Any]:
    """Two replicas killed and then all replaced, under the load of two runs and of plain HTTP."""
    found: dict[str, Any] = {}
    with served("haproxy", 2) as service:
        os.environ[TOKEN_VARIABLE] = service.token
        deeds = {"two replicas killed": kill_two, "rolling update": update}
        for name, deed in deeds.items():
            askers = [Asker(service, number, 5.0) for number in range(2)]
            plain = PlainLoad(decide_traffic(service, 64, 8))
            threads: tuple[Asker | PlainLoad, ...] = (*askers, plain)
            for thread in threads:
                thread.start()
            try:
                time.sleep(options.block_s)
                deed(service)
                time.sleep(options.block_s)
            finally:
                for thread in threads:
                    thread.on = False
                    thread.join()
            latencies = [ms for asker in askers for ms in asker.latencies]
            found[name] = {
                "decisions": len(latencies),
                "failed": [f for asker in askers for f in asker.failures],
                "max_ms": max(latencies), "p99_ms": float(np.percentile(latencies, 99)),
                "over_250_ms": sum(ms > 250 for ms in latencies),
                "policies": sorted(set().union(*(asker.policies for asker in askers))),
                "plain_requests": plain.asked, "plain_failed": plain.failed,
            }  # fmt: skip
            print(name, json.dumps(found[name]), flush=True)
    return found


class PlainLoad(threading.Thread):
    """Eight connections that ask and never ask again: what is lost without the library."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic
        self.on, self.asked, self.failed = True, 0, 0

    def run(self) -> None:
        """Ask until told to stop."""
        while self.on:
            block = asyncio.run(closed(self._traffic, 8, 1.0))
            self.asked += len(block.latencies)
            self.failed += block.failures


def kill_two(service: Served) -> None:
    """Kill one replica, and when there are two again another one."""
    for _ in range(2):
        victim, *_rest = service.processes()["replica"]
        victim.kill()
        victim.wait(10)
        wait_until(lambda: len(service.processes().get("replica", [])) == 2)
        time.sleep(5)


def update(service: Served) -> None:
    """Deploy another version of the policy, which replaces both replicas."""
    before = {p.pid for p in service.processes()["replica"]}
    service.config["applications"][0]["args"] |= {
        "policies": {"heuristic-1": {"name": "tamiyo"},
                     "eager-1": {"name": "tamiyo", "options": {"patience_intervals": 1}}},
        "active": "eager-1",
    }  # fmt: skip
    command = str(Path(sys.executable).parent / "serve")
    subprocess.run(
        [command, "deploy", "--address", service.dashboard(), str(service.write())],
        env=service.environ, check=True, capture_output=True,
    )  # fmt: skip
    wait_until(lambda: not {p.pid for p in service.processes().get("replica", [])} & before)


def wait_until(true: Callable[[], bool]) -> None:
    """Look again and again, for two minutes."""
    ends = time.monotonic() + 120
    while not true():
        if time.monotonic() > ends:
            raise TimeoutError("it must be so within 120 s, but is not.")
        time.sleep(0.2)


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Memory of every process of the service under a steady, low load, and its slope.

    A thousandth of the requests are large, another tells of an outcome. This process may be stopped
    for a while: what it would have asked then is not made up for.
    """
    with served("haproxy") as service:
        small, large = decide_traffic(service, 64, 8), decide_traffic(service, 4096, 64)
        told = Traffic(service.port, "/v1/feedback", outcome(), service.token)
        found = asyncio.run(steady(service, (small, large, told), options))
    found["slope_mib_per_h"] = {}
    for role in ROLES:
        kept = [(one["s"], one["mib"][role]) for one in found["memory"] if role in one["mib"]]
        if not kept:
            raise RuntimeError(f"the service must have the process '{role}', but has not.")
        found["slope_mib_per_h"][role] = [low, middle, high] = slope(kept, options.soak_s)
        print(f"soak {role}: {middle:+.2f} MiB/h (95 %: {low:+.2f} to {high:+.2f})", flush=True)
    return found


def outcome() -> bytes:
    """A field report with an id that traffic replaces."""
    told = example_feedback()
    told["reports"][0]["request_id"] = "0" * 16
    return pack(told, MSGPACK)


async def steady(
    service: Served, traffics: tuple[Traffic, Traffic, Traffic], options: argparse.Namespace
) -> dict[str, Any]:
    """Ask at a constant rate, and look at the memory every ten seconds."""
    small, large, told = (t.requests() for t in traffics)
    connection = await connected(service.port)
    found: dict[str, Any] = {"asked": 0, "failures": 0, "paused_s": [], "memory": [],
                             "per_s": options.soak_per_s}  # fmt: skip
    started = last = time.monotonic()
    looked = started - 10
    while (now := time.monotonic()) < started + options.soak_s:
        if now - last > 10:
            found["paused_s"].append([last - started, now - started])
        last = now
        if now - looked >= 10:
            looked = now
            found["memory"].append({"s": now - started, **service.memory()})
            if len(found["memory"]) % 30 == 1:
                print(json.dumps({**found, "memory": found["memory"][-1]}), flush=True)
        number = found["asked"] = found["asked"] + 1
        kind = {1: large, 2: told}.get(number % 1000, small)
        if connection.gone:
            connection = await connected(service.port)
        try:
            found["failures"] += await connection.ask(next(kind)) != 200
        except ConnectionError:
            found["failures"] += 1
            connection = await connected(service.port)
        await asyncio.sleep(max(0.0, 1 / options.soak_per_s - (time.monotonic() - now)))
    return found


def slope(sizes: list[tuple[float, float]], whole_s: float) -> list[float]:
    """MiB an hour with its 95 % interval, after a third of the time.

    Memory is what it was ten seconds before and a little more: the error allows for values that
    hang together over five minutes (Newey and West).
    """
    x, y = np.array([(s / 3600, mib) for s, mib in sizes if s > whole_s / 3]).T
    fit = sm.OLS(y, sm.add_constant(x)).fit(
        cov_type="HAC", cov_kwds={"maxlags": min(30, len(x) // 3)}
    )
    low, high = fit.conf_int()[1]
    return [float(low), float(fit.params[1]), float(high)]


PARTS = {"compare": compare, "batch": batch, "curve": curve, "faults": faults, "soak": soak}


def main() -> None:
    """Measure, print a table, write everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", choices=PARTS, nargs="+")
    parser.add_argument("--proxy", choices=("haproxy", "python"), action="append")
    parser.add_argument("--replicas", type=int, default=1, help="of Tamiyo; not for faults, soak")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--block-s", type=float, default=4)
    parser.add_argument("--open-s", type=float, default=600, help="load at 70 %% of the knee")
    parser.add_argument("--soak-s", type=float, default=3600)
    parser.add_argument("--soak-per-s", type=float, default=25)
    parser.add_argument("--note", help="what else is to be known about this run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for part in options.parts:
        made = {
            "command": " ".join(["load.py", *sys.argv[1:]]), "note": options.note,
            "machine": machine(), **fingerprint(), **PARTS[part](options),
        }  # fmt: skip
        if options.out is not None:
            known = json.loads(options.out.read_text()) if options.out.exists() else {}
            name = part if options.replicas == 1 else f"{part}, {options.replicas} replicas"
            write_text(options.out, json.dumps({**known, name: made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
