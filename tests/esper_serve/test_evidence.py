"""What a client measures of the service is what phase 4 asks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.esper_serve.conftest import Service
from tests.esper_serve.test_remote import Server

from esper.controller.remote import TOKEN_VARIABLE
from esper.release.phases import check, load_migration
from esper.release.rollout import read_measured

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/benchmarks/service_evidence.py"


@pytest.mark.slow
def test_a_healthy_service_meets_the_targets_that_a_client_can_tell(tmp_path):
    server = Server(Service(tmp_path / "home", rate_limit="1000000/second"))
    secret = server.service.client_headers["authorization"].removeprefix("Bearer ")
    out = tmp_path / "service.json"
    try:
        done = subprocess.run(
            [sys.executable, SCRIPT, "--url", server.url, "--decisions", "400", "--out", out],
            env=os.environ | {TOKEN_VARIABLE: secret}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    phase = load_migration(ROOT / "configs/morphogenetic_migration.yaml").phases.phase(4)
    asked = [a for a in (*phase.targets, *phase.gates) if a.metric != "regression_failures"]
    found = check(asked, read_measured([out]).quantities)
    assert {f.assertion.metric: f.holds for f in found} == dict.fromkeys(
        ["decision_p99_ms", "decisions_lost", "remote_decisions_differing",
         "unauthenticated_requests_served"], True,
    )  # fmt: skip
