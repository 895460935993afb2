"""`cluster.yaml` is what Ray's cluster launcher takes, and starts nothing open to anyone."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def parts_of_esper(cluster: dict) -> dict[str, str]:
    mounts = cluster["file_mounts"].items()
    return {remote: local for remote, local in mounts if remote.startswith("~/esper/")}


def test_ray_accepts_it(cluster):
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_ray_would_refuse_an_unknown_key(cluster):
    with pytest.raises(jsonschema.ValidationError, match="hed_start_ray_commands"):
        validate_config(prepare_config(cluster | {"hed_start_ray_commands": []}))


@pytest.mark.parametrize("starts", STARTS)
def test_ray_starts_with_a_token_and_without_usage_statistics(cluster, starts):
    (start,) = [command for command in cluster[starts] if "ray start" in command]
    before, _, _ = start.partition("ray start")
    for setting in (
        "RAY_AUTH_MODE=token",
        "RAY_AUTH_TOKEN_PATH=",
        "RAY_USAGE_STATS_ENABLED=0",
        "MLFLOW_DISABLE_TELEMETRY=true",
    ):
        assert setting in before
    # joined by && alone: a step that fails must not be followed by an open cluster
    assert not re.search(r"\n|;(?! })|[^&]&[^&]", before)


@pytest.mark.parametrize("starts", STARTS)
def test_start_commands_are_bash(cluster, starts):
    for command in cluster[starts]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_head_is_told_its_own_address_and_keeps_the_dashboard_to_itself(cluster):
    head = cluster["provider"]["head_ip"]
    start = cluster["head_start_ray_commands"][-1]
    assert f"--node-ip-address={head} " in start
    assert "--dashboard-host=127.0.0.1" in start


def test_what_travels_is_there_and_installs(cluster):
    """Everything that the build names must be mounted, or `make install` fails on the machines."""
    mounts = parts_of_esper(cluster)
    for remote, local in mounts.items():
        assert remote == f"~/esper/{local}"
        assert (ROOT / local).exists(), local
    pyproject = (ROOT / "pyproject.toml").read_text()
    readme = re.search(r'^readme = "(.+)"', pyproject, re.MULTILINE)
    needed = {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE"}
    assert needed | ({readme[1]} if readme else set()) <= set(mounts.values())


@pytest.mark.slow
def test_what_travels_can_be_built(cluster, tmp_path):
    for local in parts_of_esper(cluster).values():
        copy = shutil.copytree if (ROOT / local).is_dir() else shutil.copy
        copy(ROOT / local, tmp_path / local)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path / "w"]
    subprocess.run([*command, tmp_path], check=True)
    assert list((tmp_path / "w").glob("esper_morphogenetic-*.whl"))
