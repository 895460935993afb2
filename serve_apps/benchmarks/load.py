"""Load on Tamiyo's service, beside an application that does nothing, in the same Serve instance.

    python serve_apps/benchmarks/load.py --out docs/benchmarks/tamiyo_service_cpu.json
    python serve_apps/benchmarks/load.py --proxy haproxy --open-s 600 --soak-s 3600

The load comes from this process, on the same machine. Latencies under open load count from the
moment at which a request was due, so that a service that falls behind shows it.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import urllib3
import yaml
from scipy import stats

from esper.controller.contract import random_reports, random_site
from esper.controller.wire import MSGPACK, DecideRequest, ReportWire, pack
from esper.environment import code_hash, machine
from esper.evidence.records import write_text
from esper_serve.launch import ENVIRONMENT
from esper_serve.tokens import add_token

PORT = 8700
NOOP, DECIDE = "/noop", "/v1/decide"
# a rate is sustained while it is served and its slowest hundredth takes less than this many medians
KNEE_TAIL = 5.0


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
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            self._buffer = b""
            self._waiting.set_result(int(head[9:12]))

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
        path: Where.
        body: With 16 zeros in place of the id.
        token: Bearer token.
    """

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
        connection = await connected()
        while (started := time.perf_counter()) < ends:
            try:
                made.failures += await connection.ask(next(requests)) != 200
            except ConnectionError:
                made.failures += 1
                connection = await connected()
            made.latencies.append(1000 * (time.perf_counter() - started))

    await asyncio.gather(*(one() for _ in range(connections)))
    return made


async def opened(traffic: Traffic, per_s: float, seconds: float, seed: int) -> Measured:
    """Requests come when they come, at a mean rate, whatever the service does."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / per_s, int(per_s * seconds))
    free, requests = [await connected() for _ in range(8)], traffic.requests()
    made = Measured([], 0, seconds)

    async def one(due: float) -> None:
        connection = free.pop() if free else await connected()
        try:
            made.failures += await connection.ask(next(requests)) != 200
            free.append(connection)
        except ConnectionError:
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


async def connected() -> Connection:
    """A new connection."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", PORT)
    return connection


def decide_traffic(token: str, seeds: int, live: int) -> Traffic:
    """Decisions on one site, of which some seeds are awake."""
    report = next(random_reports(0))
    site = random_site(np.random.default_rng(0), "site", "chunk", 0.0, seeds)
    site.stage[:live] = 3
    site.blueprint_id[:live] = 1
    given = {f: getattr(report, f) for f in report.__dataclass_fields__} | {"sites": (site,)}
    request = DecideRequest(
        request_id="0" * 16, model="load", report=ReportWire.of(type(report)(**given))
    )
    return Traffic(DECIDE, pack(request.dump(binary=True), MSGPACK), token)


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

    return Noop.bind()


@contextmanager
def served(proxy: str, folder: Path) -> Iterator[str]:
    """Both applications behind a proxy, as `serve run` does it; gives a client's token."""
    home = folder / proxy
    token = add_token(home / "tokens.yaml", "load", "client")
    deployment = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.5}}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": PORT, "request_timeout_s": 15},
        "applications": [
            {"name": "noop", "route_prefix": NOOP, "import_path": "load:noop",
             "deployments": [{"name": "Noop", **deployment}]},
            {"name": "tamiyo", "route_prefix": "/", "import_path": "esper_serve.app:build",
             "args": {"home": str(home), "rate_limit": "1000000/second"},
             "deployments": [{"name": "Tamiyo", "max_ongoing_requests": 64, **deployment}]},
        ],
    }  # fmt: skip
    file = folder / f"{proxy}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    here = str(Path(__file__).parent)
    environ = {**os.environ, **ENVIRONMENT, "PYTHONPATH": here}
    environ["RAY_SERVE_ENABLE_HA_PROXY"] = str(int(proxy == "haproxy"))
    command = [str(Path(sys.executable).parent / "serve"), "run", "--app-dir", here, str(file)]
    with (folder / f"{proxy}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
    try:
        _wait_for(f"http://127.0.0.1:{PORT}/readyz", process, folder / f"{proxy}.log")
        yield token
    finally:
        process.terminate()
        process.wait(120)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends and process.poll() is None:
        try:
            if urllib3.request("GET", url, retries=False, timeout=2).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the service must start, but does not:\n{log.read_text()[-2000:]}")


def replica_memory() -> int:
    """Resident bytes of Tamiyo's replicas."""
    found = [
        p.info["memory_info"].rss
        for p in psutil.process_iter(["cmdline", "memory_info"])
        if any("ServeReplica:tamiyo" in part for part in p.info["cmdline"] or [])
    ]
    if not found:
        raise RuntimeError("a replica of Tamiyo must run, but none was found.")
    return sum(found)


def compare(traffics: dict[str, Traffic], blocks: int, seconds: float) -> dict[str, Any]:
    """Every kind of traffic at 1 and 32 connections, in turn, several times."""
    found: dict[str, Any] = {}
    for connections in (1, 32):
        for _ in range(blocks):
            for name, traffic in traffics.items():
                measured = asyncio.run(closed(traffic, connections, seconds)).summary()
                found.setdefault(f"{name}, c = {connections}", []).append(measured)
    return found


def curve(traffic: Traffic, most_per_s: float, seconds: float) -> tuple[list[Any], float]:
    """Open load at growing rates, and the knee: the highest rate that is sustained."""
    points, knee = [], 0.05 * most_per_s
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        rate = share * most_per_s
        point = asyncio.run(opened(traffic, rate, seconds, seed=int(10 * share))).summary()
        points.append({"offered_per_s": rate, **point})
        sustained = point["behind_s"] < 0.02 * seconds and not point["failures"]
        if not sustained or point["p99_ms"] > KNEE_TAIL * point["p50_ms"]:
            break
        knee = rate
    return points, knee


def soak(traffic: Traffic, per_s: float, seconds: float) -> dict[str, Any]:
    """Memory of the replica under steady load, and its slope with a 95 % interval."""
    times, sizes, failures = [], [], 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        failures += asyncio.run(opened(traffic, per_s, 20, seed=len(times))).failures
        times.append(time.monotonic())
        sizes.append(replica_memory() / 2**20)
    # what is filled once, such as the memory of answers, is over by the middle
    half = len(times) // 2
    x, y = np.array(times[half:]) / 3600, np.array(sizes[half:])
    fit = stats.linregress(x, y)
    reach = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    return {
        "mib": sizes, "failures": failures, "per_s": per_s, "seconds": seconds,
        "slope_mib_per_h": [fit.slope - reach, fit.slope, fit.slope + reach],
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--proxy", choices=("haproxy", "python"), action="append")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--block-s", type=float, default=4)
    parser.add_argument("--open-s", type=float, default=0, help="load at 70 % of the knee")
    parser.add_argument("--soak-s", type=float, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "code_hash": code_hash(), "proxies": {}}
    with tempfile.TemporaryDirectory() as folder:
        for proxy in options.proxy or ("python", "haproxy"):
            with served(proxy, Path(folder)) as token:
                result["proxies"][proxy] = measured_behind(proxy, token, options)
    if options.out is not None:
        write_text(options.out, json.dumps(result, indent=1) + "\n")


def measured_behind(proxy: str, token: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything behind one proxy."""
    small, large = decide_traffic(token, 64, 8), decide_traffic(token, 4096, 64)
    traffics = {"no-op": Traffic(NOOP + "/", b"x" * 512, ""), "decide 64": small}
    # everything is compiled, cached and connected once
    for traffic in (*traffics.values(), large):
        asyncio.run(closed(traffic, 4, 2))
    found: dict[str, Any] = {"compared": compare(traffics, options.blocks, options.block_s)}
    rates = {
        name: statistics.median(block["per_s"] for block in blocks)
        for name, blocks in found["compared"].items()
    }
    for name, blocks in found["compared"].items():
        tails = [statistics.median(b[k] for b in blocks) for k in ("p50_ms", "p95_ms", "p99_ms")]
        print(
            f"{proxy:8} {name:18} {rates[name]:7.0f}/s  p50 {tails[0]:.2f}  p95 {tails[1]:.2f}  "
            f"p99 {tails[2]:.2f} ms", flush=True,
        )  # fmt: skip
    for c in (1, 32):
        found[f"ratio, c = {c}"] = ratio = rates[f"decide 64, c = {c}"] / rates[f"no-op, c = {c}"]
        print(f"{proxy:8} decide / no-op at c = {c}: {ratio:.2f}", flush=True)
    found["decide 4096"] = big = asyncio.run(closed(large, 1, 10)).summary()
    print(
        f"{proxy:8} 4,096 seeds: {4096 * big['per_s'] / 1e6:.2f} million seeds/s, "
        f"p50 {big['p50_ms']:.2f}, p99 {big['p99_ms']:.2f} ms", flush=True,
    )  # fmt: skip
    if options.open_s:
        found["curve"], knee = curve(small, rates["decide 64, c = 32"], options.block_s * 3)
        for point in found["curve"]:
            print(f"{proxy:8} open {point['offered_per_s']:7.0f}/s  p50 {point['p50_ms']:.2f}  "
                  f"p95 {point['p95_ms']:.2f}  p99 {point['p99_ms']:.2f} ms",
                  flush=True)  # fmt: skip
        found["knee_per_s"] = knee
        found["at 70 % of the knee"] = at = asyncio.run(
            opened(small, 0.7 * knee, options.open_s, seed=7)
        ).summary()
        print(f"{proxy:8} {0.7 * knee:.0f}/s for {options.open_s:.0f} s: p99 / p50 "
              f"{at['p99_ms'] / at['p50_ms']:.1f}, {at['failures']:.0f} failed",
              flush=True)  # fmt: skip
    if options.soak_s:
        found["soak"] = held = soak(small, 0.5 * rates["decide 64, c = 32"], options.soak_s)
        low, middle, high = held["slope_mib_per_h"]
        print(f"{proxy:8} memory: {middle:+.2f} MiB/h (95 %: {low:+.2f} to {high:+.2f})")
    return found


if __name__ == "__main__":
    main()
