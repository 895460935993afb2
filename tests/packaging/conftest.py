"""The wheel, and a fresh environment that borrows this one's third-party packages."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("platform", "kernels", "experiments", "serve_apps")


@dataclass(frozen=True)
class Venv:
    """A virtual environment in `folder`."""

    folder: Path

    @property
    def packages(self) -> Path:
        (folder,) = self.folder.glob("lib/python*/site-packages")
        return folder

    def run(
        self, *command: str | Path, cwd: Path, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment's `bin`, with nothing else on the module path."""
        program, *arguments = command
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def install(self, *what: str | Path) -> None:
        """Install without dependencies: those are borrowed."""
        command = ("python", "-m", "pip", "install", "--quiet", "--no-deps", *what)
        self.run(*command, cwd=self.folder)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as a release would be."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def venv(tmp_path: Path, wheel: Path) -> Iterator[Venv]:
    """A fresh environment with the wheel in it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    venv = Venv(tmp_path / "venv")
    venv.install(wheel)
    # the path files in a folder that a path file names are not read, so that the editable Esper
    # of this environment stays out; written last, since pip would see its metadata
    third_parties = Path(torch.__file__).parents[1]
    (venv.packages / "zz_third_parties.pth").write_text(f"{third_parties}\n")
    yield venv
    shutil.rmtree(venv.folder)
