"""The `esper` command beside PyPI's game library of the same name says what is wrong, and cures it.

The fake library fails when it is imported: the command must look before it imports.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

RUN = "import sys; sys.argv[0] = 'esper'; from esper_experiments.entry import main; main()"
METADATA = "Metadata-Version: 2.1\nName: esper\nVersion: 3.9\n"


def run_esper(*arguments: str, first_on_path: Path | None = None):
    env = dict(os.environ)
    if first_on_path is not None:
        env["PYTHONPATH"] = str(first_on_path)
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments], env=env, capture_output=True, text=True
    )


@pytest.fixture
def library(tmp_path):
    (tmp_path / "esper").mkdir()
    (tmp_path / "esper" / "__init__.py").write_text("raise RuntimeError('was imported')\n")
    return tmp_path


def test_the_library_is_named_and_a_cure_is_given(library):
    (library / "esper-3.9.dist-info").mkdir()
    (library / "esper-3.9.dist-info" / "METADATA").write_text(METADATA)
    done = run_esper("--help", first_on_path=library)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"The distribution 'esper' 3.9 (a library for games, in {library})" in done.stderr
    assert "pip uninstall --yes esper" in done.stderr
    assert "pip install --force-reinstall --no-deps esper-morphogenetic" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_of_unknown_origin_is_named(library):
    done = run_esper("--help", first_on_path=library)
    assert done.returncode == 2
    assert str(library / "esper" / "__init__.py") in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_library_the_command_runs():
    done = run_esper("--help")
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_a_module_of_the_working_folder_is_found(tmp_path):
    """A console script itself does not look there; `python -P` stands for one."""
    (tmp_path / "mine.py").write_text("print('mine was imported')\n")
    config = "plugins: [mine]\ntask: {name: nowhere}\nhost: {name: mlp}\ntrain: {steps: 100}\n"
    (tmp_path / "run.yaml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, "run", "run.yaml"],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True,
    )  # fmt: skip
    assert "mine was imported" in done.stdout, done.stderr


def test_the_console_script_is_this_entry():
    (script,) = [
        point
        for point in metadata.distribution("esper-morphogenetic").entry_points
        if point.group == "console_scripts"
    ]
    assert (script.name, script.value) == ("esper", "esper_experiments.entry:main")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_library_overwrites_us_and_the_cure_works(venv, wheel, tmp_path):
    ours = (venv.packages / "esper" / "__init__.py").read_bytes()
    venv.install("esper")
    assert (venv.packages / "esper" / "__init__.py").read_bytes() != ours

    done = venv.run("esper", "--help", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "pip uninstall --yes esper" in done.stderr

    venv.run("python", "-m", "pip", "uninstall", "--yes", "esper", cwd=tmp_path)
    done = venv.run("esper", "--help", cwd=tmp_path, check=False)
    assert done.returncode == 2, "the uninstallation took our __init__.py along"

    venv.install("--force-reinstall", wheel)
    assert "doctor" in venv.run("esper", "--help", cwd=tmp_path).stdout
