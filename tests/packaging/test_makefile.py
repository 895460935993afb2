"""`make install` refuses what cannot work, and does nothing twice."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from esper.cli.main import app

ROOT = Path(__file__).parents[2]
DAY_S = 86_400


def make(*arguments: str, cwd: Path = ROOT):
    # a test started by make would inherit its flags
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def installed(tmp_path):
    """A copy in which everything is installed, or so the stamp says."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    return tmp_path


def test_help_is_the_default_and_lists_the_targets():
    done = make()
    assert done.returncode == 0
    for target in ("install", "demo", "test", "test-all", "lint", "types", "format", "clean"):
        assert f"make {target} " in done.stdout


def test_a_second_install_does_nothing(installed):
    assert "pip install" not in make("-n", "install", cwd=installed).stdout


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(installed, changed):
    later_s = (installed / changed).stat().st_mtime + DAY_S
    os.utime(installed / changed, (later_s, later_s))
    done = make("-n", "install", cwd=installed)
    assert "pip install --quiet -c constraints.txt -e '.[dev,docs]'" in done.stdout


def test_an_old_python_is_refused(installed):
    (installed / ".venv" / ".installed").unlink()
    old = installed / "old-python"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make("install", f"PYTHON={old}", cwd=installed)
    assert done.returncode != 0
    assert "Python must be 3.11 or newer" in done.stderr
    assert "Python 3.9.2" in done.stderr
    assert not (installed / ".venv" / "bin").exists()


def test_nothing_reports_to_third_parties(installed):
    with (installed / "Makefile").open("a") as makefile:
        makefile.write("\nshow: ; @env\n")
    shown = make("show", cwd=installed).stdout
    assert "RAY_USAGE_STATS_ENABLED=0" in shown
    assert "MLFLOW_DISABLE_TELEMETRY=true" in shown


def esper_lines():
    """Every command of Esper's that a make target types, without its values."""
    text = (ROOT / "Makefile").read_text()
    return [
        line.split("$(BIN)/esper ")[1].split()
        for line in text.splitlines()
        if "$(BIN)/esper" in line
    ]


@pytest.mark.parametrize("words", esper_lines(), ids=" ".join)
def test_targets_name_commands_and_options_that_exist(words):
    command, left = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        # a group without a subcommand's name runs
        command = command.commands[left.pop(0) if left[0] in command.commands else "run"]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
