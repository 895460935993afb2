"""What phase 4 asks of Tamiyo's service, measured by a client, for `esper gate --phase 4`.

    esper serve token evidence        # prints a token
    esper serve configs/serve/tamiyo.yaml &
    ESPER_TAMIYO_TOKEN=... python experiments/benchmarks/service_evidence.py --out service.json
    esper gate --phase 4 --measured service.json --measured runs/regress.json

One client asks one decision after another and compares each with what the same policy decides here.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import urllib3

from esper.config.base import ConfigError
from esper.controller import Shield, TamiyoOptions
from esper.controller.contract import random_reports, without_reasons
from esper.controller.remote import Client, RemoteError, RemoteOptions
from esper.controller.wire import DecideRequest, ReportWire
from esper.environment import commit
from esper.evidence.records import write_json
from esper.release.judge import PhaseMeasurements
from esper.release.phases import Quantity

# reports of one run, whose policy remembers the ones before
RUN = 30
PATHS = ("/v1/decide", "/v1/feedback")
STRANGERS: tuple[dict[str, str], ...] = (
    {}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"},
    {"authorization": "Basic d3Jvbmc6d3Jvbmc="},
)  # fmt: skip


def decided(options: RemoteOptions, number: int) -> tuple[list[float], int, int]:
    """Ask for decisions one by one.

    Returns:
        Milliseconds of each answer, decisions that never came, and those that differ from the
        heuristic controller's in this process.
    """
    client, times_ms, lost, differing = Client(options), list[float](), 0, 0
    for start in range(0, number, RUN):
        here, memory = TamiyoOptions().build(0), None
        for report in random_reports(start, min(RUN, number - start)):
            # the service keeps nothing of a run: failures are counted by the run's own shield
            expected = Shield(here).decide(report)
            request = DecideRequest(
                request_id=f"evidence-{start}-{report.interval}-{time.time_ns()}",
                model=options.model, policy=options.policy, seed=0, memory=memory,
                report=ReportWire.of(report),
            )  # fmt: skip
            began = time.perf_counter()
            try:
                answer = client.decide(request)
            except RemoteError as error:
                print(f"lost: {error}", file=sys.stderr)
                lost += 1
                # the policy there does not remember what this one has seen
                break
            times_ms.append(1e3 * (time.perf_counter() - began))
            memory = answer.memory
            decided = without_reasons(a.unpack() for a in answer.actions)
            differing += decided != without_reasons(expected)
    return times_ms, lost, differing


def served_to_strangers(url: str) -> int:
    """Requests without a right token that were answered with anything but a refusal."""
    return sum(
        urllib3.request("POST", url + path, json={}, headers=headers, retries=False).status
        not in (401, 403)
        for path in PATHS
        for headers in STRANGERS
    )


def main() -> None:
    """Ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--policy", default="heuristic-1", help="the heuristic one, with defaults")
    parser.add_argument("--decisions", type=int, default=1_200, help="at least 400, for a P99")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.decisions < 400:
        parser.error(f"--decisions must be at least 400, but got {asked.decisions}")
    options = RemoteOptions(
        url=asked.url, model="evidence", policy=asked.policy, deadline_s=2, rest_s=200
    )
    try:
        times_ms, lost, differing = decided(options, asked.decisions)
    except ConfigError as error:
        parser.error(str(error))
    found = {
        "decisions_lost": (float(lost), "count"),
        "remote_decisions_differing": (float(differing), "count"),
        "unauthenticated_requests_served": (float(served_to_strangers(asked.url)), "count"),
    }
    if len(times_ms) >= 400:
        found["decision_p50_ms"] = float(np.percentile(times_ms, 50)), "ms"
        found["decision_p99_ms"] = float(np.percentile(times_ms, 99)), "ms"
    quantities = {name: Quantity(value=v, unit=unit) for name, (v, unit) in found.items()}
    measured = PhaseMeasurements(commit=commit(), ended_at=datetime.now(UTC), quantities=quantities)
    write_json(asked.out, measured)
    for name, (value, unit) in found.items():
        print(f"{name} = {value:.4g} {unit}")


if __name__ == "__main__":
    main()
