"""Declared ranges and tested versions belong together."""

import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [Requirement(text) for text in texts]


def pinned() -> list[tuple[str, str]]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    for pin in pins:
        assert [s.operator for s in pin.specifier] == ["=="], f"{pin} must name one version"
    return [(canonicalize_name(pin.name), next(iter(pin.specifier)).version) for pin in pins]


def test_every_direct_dependency_has_one_tested_version_and_nothing_else_has():
    names = [canonicalize_name(need.name) for need in declared()]
    assert Counter(name for name, _ in pinned()) == Counter(names)


def test_tested_versions_lie_in_the_declared_ranges():
    tested = dict(pinned())
    for need in declared():
        assert need.specifier.contains(tested[canonicalize_name(need.name)]), str(need)


def test_tested_versions_are_public_releases():
    """A local version such as 2.13.0+cpu could be installed from nowhere else."""
    assert not [name for name, version in pinned() if Version(version).local]


def test_what_runs_now_is_what_is_declared():
    """Tests that pass with other versions would say nothing about the tested ones."""
    differing = {
        name: (metadata.version(name), version)
        for name, version in pinned()
        if Version(metadata.version(name)).public != version
    }
    assert not differing, f"run `make install`: (installed, tested) are {differing}"
