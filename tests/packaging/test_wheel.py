"""What a user installs holds the four packages and works anywhere, not only in the checkout."""

import json
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

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
    (metadata,) = top - PACKAGES
    assert top == PACKAGES | {metadata}
    assert metadata.endswith(".dist-info")
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
