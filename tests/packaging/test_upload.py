"""Ray workers run the code of an uploaded working tree, not what is installed on their machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("platform", "kernels", "experiments", "serve_apps")
DRIVER = """
import json, sys
import ray

ray.init(
    address="local",
    num_cpus=1,
    include_dashboard=False,
    log_to_driver=False,
    runtime_env={
        "working_dir": sys.argv[1],
        "env_vars": {"PYTHONPATH": "platform:kernels:experiments:serve_apps"},
    },
)

@ray.remote
def where():
    import importlib, os, platform
    names = ["esper", "esper_kernels", "esper_experiments", "esper_serve"]
    files = {name: importlib.import_module(name).__file__ for name in names}
    return {"cwd": os.getcwd(), "system": platform.system(), "files": files}

print(json.dumps(ray.get(where.remote())))
ray.shutdown()
"""


@pytest.mark.slow
def test_a_remote_task_imports_the_uploaded_packages(tmp_path):
    upload = tmp_path / "upload"
    for source in SOURCES:
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, upload / source, ignore=leave)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, upload],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["system"] == sys.platform.capitalize()
    assert not Path(found["cwd"]).is_relative_to(upload), "the worker has a copy of its own"
    for name, file in found["files"].items():
        assert Path(file).is_relative_to(found["cwd"]), f"{name} comes from {file}"
