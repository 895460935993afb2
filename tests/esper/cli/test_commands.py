"""The commands as a user types them, each in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from tests.esper.cli.conftest import CLI, esper, esper_process

ROOT = Path(__file__).parents[3]
CONFIG = {
    "task": {"name": "spirals", "options": {"train_samples": 200}},
    "host": {"name": "mlp", "options": {"hidden": [4]}},
    "train": {"steps": 200, "batch_size": 32, "learning_rate": 0.01, "interval_steps": 50},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 2, "hidden": 2}],
    "controller": {"name": "schedule", "options": {"at_intervals": [1]}},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


HELP_OF_ALL = """
import json, sys
from esper_experiments.entry import main
sys.argv = ["esper", "--help"]
try:
    main()
except SystemExit as ended:
    assert ended.code == 0

import typer
from esper.cli.main import app
def show(command, name):
    command.main(["--help"], prog_name=name, standalone_mode=False)
    for word, below in getattr(command, "commands", {}).items():
        show(below, f"{name} {word}")
show(typer.main.get_command(app), "esper")
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""
# each takes longer to import than a user should wait for a usage text
SLOW = {"torch", "ray", "mlflow", "numpy", "scipy", "pydantic", "matplotlib", "sklearn", "fastapi"}


def test_help_names_every_command_and_exit_code_and_loads_no_library(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("ab", "run", "ui", "doctor", "UNHEALTHY", "interrupted"):
        assert word in done.stdout
    assert "Judge one interval" in done.stdout  # of `esper rollout step`
    assert not SLOW & set(json.loads(done.stderr))


def test_run_trains_logs_saves_and_writes_json(tmp_path, config):
    done = esper_process(
        "run", config, "--seed", "3", "--save", "out", "--json", "r.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "step 200" in done.stdout
    assert "test_accuracy" in done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["seed"] == 3
    assert result["metrics"]["steps"] == 200
    assert result["mlflow_run_id"] in done.stdout
    assert (tmp_path / "mlflow.db").exists()
    (tensors,) = (tmp_path / "out").glob("tensors-*.safetensors")
    with safe_open(tensors, framework="pt") as file:
        assert "model.fc1.kasmina.w_in" in set(file.keys())


def test_a_run_that_collapses_says_so_and_is_recorded(tmp_path, config):
    wild = {**CONFIG, "train": {**CONFIG["train"], "learning_rate": 1e38, "optimizer": "sgd"}}
    config.write_text(yaml.safe_dump(wild))
    done = esper_process("run", config, "--json", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the run collapsed: training loss" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "collapsed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: {name: spirals}\ntask: {name: digits}\n", "must be given once"),
        ("steps: [", "must be YAML"),
        ("just words", "must hold keys and values"),
        ("task: {name: spirals}\n", "host must be given, but is missing"),
        ("growth: {ramp_step: 3}\n", "did you mean 'ramp_steps'?"),
        ("train: {steps: many}\n", "train.steps must be a valid integer"),
    ],
)
def test_a_wrong_config_is_refused_with_its_path_and_rule(tmp_path, config, text, message):
    config.write_text(text)
    done = esper_process("run", config, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "cuda.yaml"], 2, "device must exist, but got 'cuda:99'"),
        (["run", "run.yaml", "--tracking-uri", "file:mlruns"], 3, "a folder of files; name a data"),
        (["policy", "evaluate", "x", "--reports", "sqlite:///none.db"], 2, "there is no file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(
    tmp_path, config, monkeypatch, arguments, code, message
):
    (tmp_path / "cuda.yaml").write_text(yaml.safe_dump({**CONFIG, "device": "cuda:99"}))
    monkeypatch.chdir(tmp_path)
    done = esper(*arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert "step 50" not in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cuda.yaml", "run.yaml"]


def test_a_missing_config_is_named(tmp_path):
    done = esper_process("ab", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert "No such file" in done.stderr


def require_what_it_needs(path):
    """Skip a configuration for whose text, checkpoint or device somebody must care first."""
    import torch

    text = path.read_text()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    if "corpus: shakespeare" in text and not (cache / "esper/tinyshakespeare.txt").exists():
        pytest.skip("tinyshakespeare is not in the cache folder")
    if not all((ROOT / folder).exists() for folder in re.findall(r"pretrained: ([\w/]+)", text)):
        pytest.skip("the host that it adapts has not been trained here")
    if "device: cuda" in text and not torch.cuda.is_available():
        pytest.skip("it runs on a GPU")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/runs/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_run_builds(path):
    require_what_it_needs(path)
    from esper.config.run import load_run
    from esper.environment import fingerprint
    from esper.evidence.records import Fingerprint
    from esper.trial import Trial, TrialSpec

    spec = TrialSpec(path.stem, 0, 0, 0, "none", Fingerprint(**fingerprint("cpu")))
    trial = Trial(load_run(path), spec)
    trial.run_for(0.0)
    assert trial.curves["step"] == [load_run(path).train.interval_steps]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/sweeps/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_builds(path, monkeypatch):
    require_what_it_needs(path)
    # checkpoints are named from the root of the checkout
    monkeypatch.chdir(ROOT)
    from esper.config.sweep import load_sweep
    from esper_experiments.sweep import check

    check(load_sweep(path))


@pytest.mark.slow
def test_ui_serves_mlflow_on_loopback(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*CLI, "ui", "--port", str(port)],
        cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as page:
                    assert page.status == 200
                    break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
