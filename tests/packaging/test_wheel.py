"""What a user installs holds the four packages and works anywhere, not only in the checkout."""

import json
import subprocess
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import esper

ROOT = Path(__file__).parents[2]
PACKAGES = {"esper", "esper_kernels", "esper_experiments", "esper_serve"}
WHERE = """
import importlib, json, platform
names = ["esper", "esper_kernels", "esper_experiments", "esper_serve", "esper.cli.main"]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
assert platform.system(), platform.__file__
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    metadata, data = sorted(top - PACKAGES, key=lambda name: name.endswith(".data"))
    assert top == PACKAGES | {metadata, data}
    assert metadata.endswith(".dist-info")
    configs = {n.partition("/esper-morphogenetic/")[2] for n in names if n.startswith(data)}
    tracked = ("git", "ls-files", "configs")
    assert configs == set(subprocess.check_output(tracked, cwd=ROOT, text=True).split())
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    strange = [name for name in names if "test" in Path(name).name or "conftest" in name]
    assert not strange


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)

    def read(file: str) -> bytes:
        (path,) = [name for name in archive.namelist() if name.endswith(f".dist-info/{file}")]
        return archive.read(path)

    metadata = message_from_bytes(read("METADATA"))
    assert metadata["Name"] == "esper-morphogenetic"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Version"] == esper.__version__
    assert b"esper = esper_experiments.entry:main" in read("entry_points.txt")
    assert read("extra_metadata/constraints.txt") == (ROOT / "constraints.txt").read_bytes()


@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "in the repository"])
def test_an_installed_wheel_works(venv, tmp_path, inside):
    cwd = ROOT if inside else tmp_path
    found = json.loads(venv.run("python", "-c", WHERE, cwd=cwd).stdout)
    for name, file in found.items():
        assert Path(file).is_relative_to(venv.packages), f"{name} comes from {file}"
    usage = venv.run("esper", "--help", cwd=cwd).stdout
    assert "doctor" in usage


def test_an_installed_wheel_runs_the_demo_from_its_own_configurations(venv, tmp_path):
    """The spirals of `make demo`, made short; no checkout is at hand."""
    demo = venv.folder / "share" / "esper-morphogenetic" / "configs" / "sweeps" / "ab_spirals.yaml"
    short = yaml.safe_load(demo.read_text())
    short["run"]["train"].update(steps=600, interval_steps=50)
    short["run"]["growth"].update(ramp_steps=50, fine_tuning_intervals=3)
    short["arms"]["schedule"]["controller"]["options"].update(at_intervals=[2, 4])
    short["arms"]["esper"]["controller"]["options"].update(last_interval=4)
    short["pairs"] = 6
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(short))
    done = venv.run("esper", "ab", "demo.yaml", "--json", "verdict.json", cwd=tmp_path)
    assert "esper against host" in done.stdout
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"]
    assert (tmp_path / "mlflow.db").exists()


def test_the_source_archive_holds_the_repository_and_builds_the_same_wheel(venv, wheel, tmp_path):
    venv.run("python", "-m", "pip", "install", "--quiet", "build", cwd=tmp_path)
    venv.run("python", "-m", "build", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    tracked = set(subprocess.check_output(("git", "ls-files"), cwd=ROOT, text=True).split())
    assert names == tracked | {"PKG-INFO"}
    venv.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", archive, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert again.read_bytes() == wheel.read_bytes()
