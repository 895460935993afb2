"""A file of flags to change, and flags from a few words."""

import shutil
from pathlib import Path

import pytest

from esper.config.base import validate
from esper.release.flags import FlagFile

ROOT = Path(__file__).parents[3]
PROSE = {"description": "for a test", "owner": "tests", "expires": "2099-01-01"}


def file_of(environments=("ci",), **flags):
    """Flags by name, with `__` for a dot."""
    named = {name.replace("__", "."): PROSE | flag for name, flag in flags.items()}
    document = {"version": 1, "environments": list(environments), "flags": named}
    return validate(FlagFile, document, source="test")


def copy_migration(folder):
    """Copy the project's migration, to be changed; the path of its settings."""
    for name in ("flags.yaml", "phases.yaml", "morphogenetic_migration.yaml"):
        shutil.copy(ROOT / "configs" / name, folder / name)
    return folder / "morphogenetic_migration.yaml"


@pytest.fixture
def make_file():
    return file_of


@pytest.fixture
def flags_path(tmp_path):
    """A copy of the project's own flags."""
    return Path(shutil.copy(ROOT / "configs/flags.yaml", tmp_path / "flags.yaml"))
