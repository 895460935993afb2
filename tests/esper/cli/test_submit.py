"""`esper submit` against a real Ray head of its own, with a token, on ports of its own."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
import yaml
from tests.esper.cli.conftest import CLI, esper

from esper.cli import upload
from esper.cli.job import _run_command
from esper.cli.job import main as job_main
from esper.cli.upload import read_job
from esper.config.base import ConfigError
from esper.environment import PACKAGES
from esper.surgery.checkpoint_folder import write_checkpoint

ROOT = Path(__file__).parents[3]
RUN = {
    "task": {"name": "spirals", "options": {"train_samples": 200, "held_out_samples": 100}},
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 100, "batch_size": 64, "learning_rate": 0.01, "interval_steps": 50},
}
SWEEP = {
    "name": "tiny", "pairs": 6, "run": RUN,
    "arms": {"a": {}, "b": {"host": {"name": "mlp", "options": {"hidden": [16]}}}},
    "question": {"treatment": "b", "control": "a", "metric": "test_accuracy", "margin": 0.05},
}  # fmt: skip
LONG = {**RUN["train"], "steps": 5000}


@dataclass(frozen=True)
class Head:
    """A Ray head that runs, and a client's environment and folder."""

    address: str
    token: Path
    folder: Path
    agent_port: int

    def env(self, **changes):
        """Of a client: finds this checkout, and the token by its file alone."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        paths = {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_TOKEN_PATH": str(self.token)}
        env |= {"RAY_API_SERVER_ADDRESS": self.address, "HOME": str(self.folder), **paths}
        return {k: v for k, v in {**env, **changes}.items() if v is not None}

    def start(self, *arguments, **changes):
        return subprocess.Popen(
            [*CLI, "submit", *map(str, arguments)], cwd=self.folder, env=self.env(**changes),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # a shell's background job ignores Ctrl-C, and so would everything it starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def submit(self, *arguments, **changes):
        """Run `esper submit` to its end: exit code and output."""
        process = self.start(*arguments, **changes)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def commands(self, **commands):
        """Start bare commands as jobs, as `esper submit` does it."""
        (self.folder / "empty").mkdir()
        script = (
            "import json, sys\nfrom pathlib import Path\n"
            "from esper_experiments.jobs import Cluster\n"
            "cluster = Cluster.connect(sys.argv[1])\n"
            "for name, command in json.loads(sys.argv[2]).items():\n"
            "    cluster.submit(name, command, Path('empty'), {}, 0.0, 0.0)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, self.address, json.dumps(commands)],
            cwd=self.folder, env=self.env(RAY_AUTH_MODE="token"), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def ray_head(**auth):
    """Start a head; at the end, end its processes and no others."""
    # Ray's sockets lie below, and a socket's path must be short
    folder = Path(tempfile.mkdtemp(prefix="esper-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard, agent, client, metrics = free_ports(5)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "PYTHON"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0",
        f"--temp-dir={folder / 'ray'}", "--object-store-memory=100000000",
    ]  # fmt: skip
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
        env={**env, "PATH": path, "HOME": str(folder), **{k: v(token) for k, v in auth.items()}},
    )  # fmt: skip
    try:
        _wait_for(dashboard, process)
        _wait_for(agent, process)
        (folder / "client").mkdir()
        yield Head(f"http://127.0.0.1:{dashboard}", token, folder / "client", agent)
    finally:
        mine = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs(mine, timeout=8)
        for survivor in alive:
            survivor.kill()
        process.wait(15)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port, process):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing answers on port {port}")


@pytest.fixture(scope="module")
def head():
    with ray_head(RAY_AUTH_MODE=lambda _: "token", RAY_AUTH_TOKEN_PATH=str) as head:
        yield head


@pytest.fixture(scope="module")
def jobs(head):
    """Two jobs: one fails at once, one would go on for long."""
    head.commands(seven="echo some output; exit 7", sleeper="echo begun; sleep 1000")


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


# --- the cluster cannot be used: one screen, with the next command


def test_an_address_where_nothing_answers(head):
    (port,) = free_ports(1)
    code, output = head.submit("status", "--address", f"http://127.0.0.1:{port}")
    assert code == 3
    assert f"must answer at http://127.0.0.1:{port}" in output
    assert "ray dashboard cluster.yaml" in output
    assert len(output.splitlines()) < 10


def test_a_wrong_and_a_missing_token(head, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    code, output = head.submit("status", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert code == 3
    assert "the token of this machine is not the cluster's" in output
    code, output = head.submit("status", RAY_AUTH_TOKEN_PATH=None)
    assert code == 3
    assert "there is no token here (looked in ~/.ray/auth_token)" in output
    for line in ("scp HEAD:.ray/auth_token", "kubectl get secret"):
        assert line in output
    assert len(output.splitlines()) < 10


@pytest.mark.slow
def test_a_cluster_that_asks_for_no_token_is_refused():
    with ray_head() as open_head:
        code, output = open_head.submit("status")
        assert code == 3
        assert "takes jobs from anyone" in output
        assert "RAY_AUTH_MODE=token ray start --head" in output
        code, output = open_head.submit("status", RAY_AUTH_MODE="disabled")
        assert (code, output) == (0, f"no jobs on {open_head.address}\n")


def test_the_probes_of_kubernetes_need_no_token(head):
    manifest = yaml.safe_load((ROOT / "configs/kuberay/raycluster.yaml").read_text())
    (container,) = manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    path = container["readinessProbe"]["httpGet"]["path"]
    with urlopen(f"http://127.0.0.1:{head.agent_port}{path}", timeout=5) as answer:
        assert answer.status == 200


# --- a job's exit code, log, state and end


def test_the_exit_code_of_a_job_is_that_of_the_command(head, jobs):
    code, output = head.submit("logs", "seven")
    assert code == 7
    assert "some output" in output
    assert "seven ended with exit code 7" in output
    code, output = head.submit("status", "seven")
    assert code == 7
    assert "FAILED, exit code 7" in output


def test_ctrl_c_detaches_and_stop_ends_the_job(head, jobs):
    attached = head.start("logs", "sleeper")
    read = ""
    while "begun" not in read.splitlines():
        line = attached.stdout.readline()
        assert line, f"the log ended: {read}"
        read += line
    attached.send_signal(signal.SIGINT)
    rest, _ = attached.communicate(timeout=30)
    assert attached.returncode == 130
    assert "detached; sleeper goes on" in rest
    assert f"esper submit stop sleeper --address {head.address}" in rest
    code, output = head.submit("stop", "sleeper")
    assert code == 0
    assert "STOPPED" in output
    assert head.submit("status", "sleeper")[0] == 130


def test_a_job_that_is_not_there(head):
    code, output = head.submit("logs", "nobody")
    assert code == 2
    assert "list its jobs: esper submit status" in output


@pytest.mark.slow
def test_a_sweep_runs_to_its_verdict_from_the_uploaded_code(head):
    write(head.folder / "tiny.yaml", {**SWEEP, "run": {**RUN, "plugins": ["mine"]}})
    (head.folder / "mine.py").write_text("LOADED = True\n")
    results = head.folder / "results"
    code, output = head.submit("tiny.yaml", "--results", results)
    assert code == 0, output
    assert "[12/12]" in output
    assert "b against a" in output
    (verdict,) = results.glob("runs/tiny-*/verdicts/*.json")
    assert json.loads(verdict.read_text())["pairs"] == 6
    assert (results / "mlflow.db").is_file()
    (submitted,) = results.glob("submitted/tiny-*.yaml")
    assert "code " in submitted.read_text().splitlines()[0]
    # the head has no PYTHONPATH: what the job imported is what was uploaded
    sessions = list((head.folder.parent / "ray").glob("session_2*/runtime_resources/*/*/mine.py"))
    assert sessions


@pytest.mark.slow
def test_a_sweep_that_is_stopped_in_the_middle_is_continued_to_the_verdict(head):
    write(head.folder / "stopped.yaml", {
        **SWEEP, "name": "stopped", "run": {**RUN, "train": LONG}, "pairs": 8,
    })  # fmt: skip
    results = head.folder / "results-of-stopped"
    submitted = head.start("stopped.yaml", "--results", results)
    for line in submitted.stdout:
        if line.startswith("job "):
            name = line.split()[1]
        if line.startswith("[3/16]"):
            break
    code, output = head.submit("stopped.yaml", "--results", results)
    assert code == 2
    assert f"must not run twice at once, but {name} runs it" in output
    assert head.submit("stop", name)[0] == 0
    rest, _ = submitted.communicate(timeout=60)
    assert submitted.returncode == 130
    assert "was stopped; the same command continues" in rest
    kept = {p: p.read_bytes() for p in results.glob("runs/*/trials/*.json")}
    assert 3 <= len(kept) < 16
    code, output = head.submit("stopped.yaml", "--results", results)
    assert code == 0, output
    assert f"{len(kept)} of 16 trials had finished before" in output
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert len(list(results.glob("runs/*/verdicts/*.json"))) == 1


@pytest.mark.slow
def test_a_run_leaves_a_checkpoint_and_the_same_command_goes_on_from_it(head):
    write(head.folder / "run.yaml", RUN)
    results = head.folder / "results-of-run"
    arguments = ("run.yaml", "--results", results, "--", "--seed", "3")
    code, output = head.submit(*arguments)
    assert code == 0, output
    (folder,) = results.glob("checkpoints/run-*")
    assert f"checkpoints in {folder}" in output
    code, output = head.submit(*arguments)
    assert code == 0, output
    assert f"going on from the checkpoint in {folder}" in output


@pytest.mark.slow
def test_a_tracking_server_that_the_cluster_does_not_reach(head):
    write(head.folder / "server.yaml", SWEEP)
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    results = head.folder / "results-of-server"
    code, output = head.submit("server.yaml", "--results", results, "--tracking-uri", uri)
    assert code == 3
    assert f"must be reachable, but got {uri}" in output
    assert "mlflow server --host" in output
    assert not list(results.glob("runs/*"))


@pytest.mark.slow
def test_a_tracking_server_gets_the_runs_and_keeps_the_artifacts_where_it_is_told(head):
    write(head.folder / "shared.yaml", {**SWEEP, "name": "shared"})
    (port,) = free_ports(1)
    store = head.folder / "store"
    server = subprocess.Popen(
        [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{store}.db",
            "--artifacts-destination", store.as_uri(),
        ],
        cwd=head.folder, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for(port, server)
        uri, results = f"http://127.0.0.1:{port}", head.folder / "results-of-shared"
        code, output = head.submit("shared.yaml", "--results", results, "--tracking-uri", uri)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
    assert code == 0, output
    assert f"in {uri}; see it with: esper ui --tracking-uri {uri}" in output
    assert list(store.rglob("forest_plot.png"))
    assert not (results / "mlflow.db").exists()
    assert not (results / "mlartifacts").exists()


# --- what travels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_travels_with_the_code_its_plugins_and_what_is_asked_for(folder):
    config = write(folder / "tiny.yaml", {**SWEEP, "run": {**RUN, "plugins": ["mine.deep"]}})
    for name in ("mine/__init__.py", "mine/deep.py", "data/a.txt", "data/.git/x", "data/runs/y"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "mlflow.db").write_text("not this")
    job = read_job(config, [Path("data")])
    mine = {n for n in job.files if n.partition("/")[0] not in PACKAGES}
    assert mine == {"tiny.yaml", "mine/__init__.py", "mine/deep.py", "data/a.txt"}
    for package in PACKAGES:
        assert f"{package}/__init__.py" in job.files
    assert "esper/cli/job.py" in job.files
    assert not [name for name in job.files if "__pycache__" in name]
    assert (job.kind, job.config, job.uses_gpu) == ("ab", Path("tiny.yaml"), False)


def test_a_search_is_told_from_a_sweep():
    job = read_job(Path("configs/tune/spirals.yaml"), [])
    assert job.kind == "tune"
    assert "configs/tune/spirals.yaml" in job.files
    assert job.tracking_uri == "sqlite:///mlflow.db"


def test_an_arena_travels_with_its_sweeps():
    job = read_job(Path("configs/arenas/growth.yaml"), [])
    assert job.kind == "arena"
    assert {"configs/arenas/growth.yaml", "configs/sweeps/ab_digits.yaml"} <= set(job.files)


def test_a_run_on_a_gpu_asks_for_one_and_brings_its_flags(folder):
    (folder / "flags.yaml").write_text("")
    flags = {"file": "flags.yaml", "model": "m"}
    job = read_job(write(folder / "run.yaml", {**RUN, "device": "cuda", "flags": flags}), [])
    assert (job.kind, job.uses_gpu) == ("run", True)
    assert "flags.yaml" in job.files


def test_what_is_too_large_is_named_before_anything_is_sent(folder, monkeypatch):
    (folder / "big.bin").write_bytes(bytes(3 * upload.MIB))
    monkeypatch.setattr(upload, "MAX_UPLOAD_MIB", 2)
    with pytest.raises(ConfigError, match=r"at most 2 MiB, but is \d+ MiB(?s:.*)3.0 MiB  big.bin"):
        read_job(write(folder / "run.yaml", RUN), [Path("big.bin")])


@pytest.mark.parametrize(
    ("also", "plugins", "message"),
    [
        (["/etc"], [], "must lie in"),
        (["nowhere"], [], "must exist"),
        ([], ["nobody_wrote_this"], "there is no module 'nobody_wrote_this'"),
    ],
)
def test_what_cannot_travel(folder, also, plugins, message):
    config = write(folder / "run.yaml", {**RUN, "plugins": plugins})
    with pytest.raises(ConfigError, match=message):
        read_job(config, [Path(name) for name in also])


def test_a_runs_checkpoint_may_lie_where_its_options_say(tmp_path):
    state = tmp_path / "elsewhere"
    given = Namespace(config=Path("r.yaml"), rest=["--seed", "3", "--checkpoint", str(state)])
    tracked = ["--tracking-uri", "sqlite:///m.db"]
    first = _run_command(given, tmp_path / "default", tracked[1])
    assert first == ["run", "r.yaml", "--checkpoint", str(state), *tracked, "--seed", "3"]
    write_checkpoint(state, {}, {})
    # seed and decisions are the checkpoint's
    assert _run_command(given, tmp_path, tracked[1]) == ["run", "--resume", str(state), *tracked]


def test_a_password_in_the_tracking_uri_is_refused(folder):
    from esper.cli.submit import submit

    config = write(folder / "run.yaml", RUN)
    with pytest.raises(ConfigError, match="must hold no password"):
        submit(config, "http://127.0.0.1:1", "~/r", "http://me:pw@host:5000", [], True, [])
    with pytest.raises(ConfigError, match="a path from / or ~"):
        submit(config, "http://127.0.0.1:1", "relative", None, [], True, [])


def test_the_operators_page_names_commands_and_options_that_are_there():
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    lines = re.findall(r"^esper (submit .*?)(?: -- .*)?(?: +#.*)?$", page, re.MULTILINE)
    assert len(lines) > 6
    for line in lines:
        command, *words = line.split()
        known = [w for w in words[:1] if w in ("status", "logs", "stop")] or ["run"]
        shown = esper(command, *known, "--help", env={"COLUMNS": "200"}).stdout
        for option in re.findall(r"--[a-z-]+", line):
            assert option in shown, line
    for name in re.findall(r"configs/[\w/]+\.yaml|\bcluster\.yaml|constraints\.txt", page):
        assert (ROOT / name).is_file(), name


# --- what the job looks at before it begins


def test_other_code_than_was_submitted_is_refused(folder, capsys):
    config = write(folder / "tiny.yaml", SWEEP)
    code = job_main(["--results", str(folder / "r"), "--expect", "0" * 64, "ab", str(config)])
    assert code == 3
    assert "must run the code that was submitted (sha256 000000000000)" in capsys.readouterr().err
    assert not (folder / "r").exists()


def test_results_that_cannot_be_written_are_refused(folder, capsys):
    config = write(folder / "tiny.yaml", SWEEP)
    (folder / "file").write_text("")
    assert job_main(["--results", str(folder / "file"), "ab", str(config)]) == 3
    assert "--results FOLDER" in capsys.readouterr().err


def test_a_cluster_whose_python_lacks_the_libraries_is_told_so(folder):
    config = write(folder / "tiny.yaml", SWEEP)
    sources = [path for path in sys.path if "site-packages" not in path]
    # -S: without site-packages
    done = subprocess.run(
        [sys.executable, "-S", "-m", "esper.cli.job", "--results", folder / "r", "ab", config],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sources)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert f"Python on the cluster ({sys.executable}) has no module" in done.stderr
    assert "make install" in done.stderr
