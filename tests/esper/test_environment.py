"""Facts about code and machine: equal where they must be equal, different where they must not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esper import environment
from esper.config.base import ConfigError
from esper.evidence.records import Fingerprint


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "here" / "package"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    (folder / "sub" / "b.py").write_text("y = 2\n")
    return folder


def copy_of(package: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "there" / "package"
    folder.parent.mkdir()
    # written in another order than the original
    for name in ("sub/b.py", "a.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((package / name).read_bytes())
    return folder


def test_hash_does_not_depend_on_the_place(package, tmp_path):
    other = copy_of(package, tmp_path)
    assert environment.hash_sources([package]) == environment.hash_sources([other])


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.py").write_text("x = 2\n"),
        lambda folder: (folder / "a.py").rename(folder / "c.py"),
        lambda folder: (folder / "sub" / "b.py").unlink(),
        lambda folder: (folder / "new.py").touch(),
    ],
    ids=["edit", "rename", "delete", "new"],
)
def test_hash_depends_on_names_and_contents(package, change):
    before = environment.hash_sources([package])
    change(package)
    assert environment.hash_sources([package]) != before


def test_hash_ignores_what_is_not_source(package):
    before = environment.hash_sources([package])
    (package / "notes.txt").write_text("nothing that runs")
    assert environment.hash_sources([package]) == before


def test_code_hash_covers_the_four_packages():
    folders = [
        Path(importlib.util.find_spec(name).submodule_search_locations[0])
        for name in ("esper", "esper_kernels", "esper_experiments", "esper_serve")
    ]
    assert environment.code_hash() == environment.hash_sources(folders)


def test_a_missing_package_is_an_error():
    with pytest.raises(RuntimeError, match="package esper_absent must be importable"):
        environment._folders_of("esper_absent")


def test_fingerprint_fills_the_record():
    record = Fingerprint(**environment.fingerprint("cpu"))
    assert len(record.code_hash) == 64
    assert record.versions["torch"] == torch.__version__
    assert record.versions["esper-morphogenetic"] != "not installed"
    assert record.device


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(package):
    root = package.parent
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def test_commit_of_a_checkout(checkout):
    assert environment.commit(checkout / "package") == git(checkout, "rev-parse", "HEAD")
    assert environment.is_dirty(checkout / "package") is False


def test_an_edit_and_a_new_file_make_a_checkout_dirty(checkout):
    (checkout / "package" / "new.py").touch()
    assert environment.is_dirty(checkout / "package") is True
    (checkout / "package" / "new.py").unlink()
    (checkout / "package" / "a.py").write_text("x = 3\n")
    assert environment.is_dirty(checkout / "package") is True


def test_no_commit_outside_a_checkout_or_before_the_first(package):
    assert environment.commit(package) is None
    assert environment.is_dirty(package) is None
    git(package, "init", "--quiet")
    git(package, "add", ".")
    assert environment.commit(package) is None


def test_a_package_installed_inside_somebodys_checkout_is_not_that_commit(checkout):
    installed = checkout / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("x = 1\n")
    assert environment.commit(installed) is None


def test_a_git_hook_does_not_lead_to_another_checkout(checkout, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    expected = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert environment.commit(checkout / "package") == expected


def test_no_git_is_no_error(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit(checkout) is None


def test_cpu_has_a_name_also_without_cpuinfo(monkeypatch, tmp_path):
    assert environment.device_name("cpu").strip()
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "absent")
    assert environment.device_name("cpu").strip()


def test_cpu_name_comes_from_cpuinfo(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    assert environment.device_name("cpu") == "Some CPU @ 3 GHz"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N"):
        environment.device_name(device)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="device must exist, but got 'cuda:99'"):
        environment.device_name("cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_name():
    assert environment.device_name("cuda") == torch.cuda.get_device_name(0)


def test_environment_imports_no_third_party():
    code = (
        "import sys, importlib.util as u;"
        f"s = u.spec_from_file_location('environment', {environment.__file__!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); m.versions(); m.device_name('cpu');"
        "print(sorted({'torch', 'numpy', 'ray', 'mlflow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def test_name_clash(tmp_path, monkeypatch):
    assert environment.name_clash() is None
    metadata = tmp_path / "esper-3.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: esper\nVersion: 3.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.name_clash() == f"esper 3.9 in {tmp_path}"


def test_tested_versions_come_with_the_installation():
    tested = environment.tested_versions()
    assert {"torch", "ray", "mlflow"} <= set(tested)
    assert all(tested.values())
