"""Declared ranges and tested versions belong together."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    # what `make install` installs
    texts = PROJECT["dependencies"] + extras["dev"] + extras["docs"]
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


def test_the_page_on_dependencies_lists_each_and_every_extra():
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.-]+)` \|", page, re.MULTILINE)
    needed = [Requirement(text).name for text in PROJECT["dependencies"]]
    assert listed == [*needed, *sorted(PROJECT["optional-dependencies"], key=lambda e: e == "dev")]


def test_every_package_that_the_library_imports_is_declared():
    """And what is declared is imported."""
    brought = {"aiohttp", "fastapi", "starlette", "pydantic_core"}  # by ray[serve] and pydantic
    # imported where they are used, with an error that says what to install
    optional = {"gromo", "grafana_foundation_sdk", "hypothesis", "optuna", "peft", "transformers"}
    ours = {path.parent.name for path in ROOT.glob("*/*/py.typed")}
    renamed = {"openfeature": "openfeature-sdk", "ruamel": "ruamel-yaml", "sklearn": "scikit-learn",
               "yaml": "pyyaml"}  # fmt: skip
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    imported = set()
    for typed in ROOT.glob("*/*/py.typed"):
        for path in typed.parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
    foreign = imported - ours - set(sys.stdlib_module_names) - brought - optional
    # nvidia-ml-py is imported by name, where there is a GPU
    assert {renamed.get(n, canonicalize_name(n)) for n in foreign} == names - {"nvidia-ml-py"}


def test_the_citation_is_well_formed():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
               "vendor.citation-file-format", str(ROOT / "CITATION.cff")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
