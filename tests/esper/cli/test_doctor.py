"""Each check that can fail is made to fail, by the thing itself where that can be had."""

import json
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata

import mlflow
import pytest
import torch
from tests.esper.cli.conftest import esper

from esper.cli import doctor


@pytest.fixture
def distributions(tmp_path, monkeypatch):
    """Plants the metadata of a distribution before all others."""
    monkeypatch.syspath_prepend(tmp_path)

    def plant(name: str, version: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)

    return plant


def named(checks: list[doctor.Check], name: str) -> doctor.Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def test_the_game_library_fails(distributions):
    assert doctor.check_name_clash().status == "ok"
    distributions("esper", "3.9")
    check = doctor.check_name_clash()
    assert check.status == "fail"
    assert "esper 3.9" in check.found
    assert "pip uninstall esper" in check.advice


def test_the_declared_dependencies_are_checked():
    names = {check.name for check in doctor.check_versions()}
    assert {"python", "torch", "ray", "mlflow", "pyyaml"} <= names
    assert "pytest" not in names, "a user needs no development tools"


def test_a_version_outside_the_range_fails(distributions):
    distributions("rich", "1.0")
    check = named(doctor.check_versions(), "rich")
    assert check.status == "fail"
    assert check.found.startswith("1.0, must be >=")
    assert "rich>=" in check.advice


def test_an_untested_version_warns(distributions):
    distributions("rich", "999.0")
    check = named(doctor.check_versions(), "rich")
    assert check.status == "warn"
    assert check.found.startswith("999.0, tested with ")


def test_a_missing_dependency_fails():
    check = doctor.check_version("absent", None, ">=1", None)
    assert (check.status, check.found) == ("fail", "not installed")
    assert "absent>=1" in check.advice


def test_a_build_of_the_tested_release_is_the_tested_release():
    assert doctor.check_version("torch", "2.13.0+cpu", ">=2.10", "2.13.0").status == "ok"


def test_an_old_python_fails():
    assert doctor.check_version("python", "3.10.4", ">=3.11", None).status == "fail"


def test_without_an_installation_the_ranges_are_unknown(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "not-installed-at-all")
    (check,) = doctor.check_versions()
    assert check.status == "warn"
    assert "make install" in check.advice


def test_devices_name_this_machine():
    check = doctor.check_devices()
    assert ("cuda:0" if torch.cuda.is_available() else "CPU only") in check.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_cannot_use_warns(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_devices()
    assert check.status == "warn"
    assert "CUDA build of torch" in check.advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_kernels_run_in_reference_mode(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "reference mode" in doctor.check_kernels().found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_without_a_triton_driver_fails(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "missing_build_tools", list)
    check = doctor.check_kernels()
    assert check.status == "fail"
    assert check.found
    assert "Install triton" in check.advice


def test_interpreted_kernels_warn(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.check_kernels().status == "warn"


def test_missing_build_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert doctor.missing_build_tools() == ["a C compiler", "Python.h"]
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    assert doctor.missing_build_tools() == []


def test_a_ray_that_does_not_start_fails(tmp_path, monkeypatch):
    (tmp_path / "ray.py").write_text("raise OSError('no space left on device')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_ray_start()
    assert check.status == "fail"
    assert check.found == "OSError: no space left on device"


def test_a_ray_that_hangs_fails(tmp_path, monkeypatch):
    (tmp_path / "ray.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_ray_start(timeout_s=0.5)
    assert check.status == "fail"
    assert "within 0.5 s" in check.found


def test_a_database_to_be_created_is_fine_and_is_not_created(tmp_path):
    check = doctor.check_tracking(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert check.status == "ok"
    assert "will be created" in check.found
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_cannot_be_created_fails(tmp_path):
    (tmp_path / "file").touch()
    check = doctor.check_tracking(f"sqlite:///{tmp_path}/file/mlflow.db")
    assert check.status == "fail"
    assert "cannot be created" in check.found


def test_a_damaged_database_fails(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says\n" * 50)
    check = doctor.check_tracking(f"sqlite:///{tmp_path}/mlflow.db")
    assert check.status == "fail"
    assert "not a database" in check.found


def test_a_database_of_something_else_fails_and_stays_as_it_is(tmp_path):
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE cats (name TEXT)")
    before = path.read_bytes()
    check = doctor.check_tracking(f"sqlite:///{path}")
    assert check.status == "fail"
    assert "cats" in check.found
    assert path.read_bytes() == before


def test_mlflows_own_database_is_fine_and_of_another_version_fails(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.MlflowClient(uri).create_experiment("some")
    assert doctor.check_tracking(uri).status == "ok"
    outdated = tmp_path / "outdated.db"
    outdated.write_bytes((tmp_path / "mlflow.db").read_bytes())
    with closing(sqlite3.connect(outdated)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    check = doctor.check_tracking(f"sqlite:///{outdated}")
    assert check.status == "fail"
    assert "mlflow db upgrade" in check.advice


def test_a_server_that_does_not_answer_fails_and_its_password_stays_secret():
    check = doctor.check_tracking("http://me:secret@127.0.0.1:9")
    assert check.status == "fail"
    assert "127.0.0.1:9" in check.found
    assert "secret" not in str(check)


@pytest.fixture
def web_server():
    """Some server that knows nothing of MLflow."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_not_mlflow_fails(web_server):
    check = doctor.check_tracking(web_server)
    assert check.status == "fail"
    assert "404" in check.found


def test_the_file_store_that_mlflow_refuses_fails(tmp_path):
    assert doctor.check_tracking(f"file://{tmp_path}/mlruns").status == "fail"


@pytest.mark.parametrize("check", [doctor.check_memory, None], ids=["memory", "disk"])
def test_too_little_warns_and_far_too_little_fails(check, tmp_path):
    def amount(**limits: float) -> doctor.Check:
        return check(**limits) if check else doctor.check_disk(tmp_path, **limits)

    assert amount(warn_gib=0.0, fail_gib=0.0).status == "ok"
    warning = amount(warn_gib=1e9, fail_gib=0.0)
    assert warning.status == "warn"
    assert warning.advice
    assert amount(warn_gib=1e9, fail_gib=1e9).status == "fail"


def test_more_threads_than_cpus_warn(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: doctor.num_cpus() + 1)
    check = doctor.check_cpus()
    assert check.status == "warn"
    assert f"OMP_NUM_THREADS={doctor.num_cpus()}" in check.advice


def test_a_check_that_breaks_off_is_a_finding():
    def check_anything() -> doctor.Check:
        raise OSError("libcuda.so.1: cannot open shared object file")

    check = doctor._guard(check_anything)
    assert (check.name, check.status) == ("anything", "fail")
    assert "libcuda.so.1" in check.found


def test_the_table_shows_brackets_as_they_are():
    console = doctor.Console(width=120, record=True, quiet=False)
    with console.capture() as capture:
        console.print(doctor.render([doctor.Check("x", "fail", "[Errno 2] gone", "[do] this")]))
    assert "[Errno 2] gone" in capture.get()
    assert "[do] this" in capture.get()


def test_the_command_ends_with_1_and_writes_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "check_ray_start", lambda: doctor.Check("ray start", "ok", "-"))
    file = tmp_path / "doctor.json"
    done = esper("doctor", "--tracking-uri", "http://127.0.0.1:9", "--json", file)
    assert done.exit_code == 1
    findings = json.loads(file.read_text())
    assert [f["name"] for f in findings if f["status"] == "fail"] == ["tracking"]
    assert all(f["advice"] for f in findings if f["status"] != "ok")


@pytest.mark.slow
def test_the_command_finds_this_machine_able(tmp_path):
    findings = tmp_path / "findings.json"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = esper("doctor", "--tracking-uri", uri, "--json", findings)
    assert done.exit_code == 0, done.output
    # the table wraps its cells at the terminal's width, the file does not
    found = {check["name"]: check["found"] for check in json.loads(findings.read_text())}
    assert found["ray start"].startswith(f"{metadata.version('ray')} started and stopped in")
