"""Data flows one way: a module may import only what stands before it in LAYERS."""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels", "platform", "experiments", "serve_apps")
LEAVES = (
    *("esper.append_only", "esper.atomic", "esper.config", "esper.environment", "esper.registry"),
)
LAYERS = (
    *("esper_kernels", "esper.seeds", "esper.surgery", "esper.training", "esper.controller"),
    "esper.shards",
    # `esper` alone is the package root, which offers what stands before it
    *("esper.evidence", "esper.earlier_trials", "esper.release", "esper.trial"),
    *("esper.supervision", "esper.regress"),
    *("esper.tracking", "esper.monitoring", "esper"),
    *("esper_experiments", "esper_serve", "esper.cli", "esper_experiments.entry"),
    # scripts, no package: they import each other by bare name
    "benchmarks",
)
MAY_IMPORT_RAY = ("esper.shards", "esper_experiments", "esper_serve", "benchmarks")
KERNELS_MAY_IMPORT = {"esper_kernels", "torch", "triton", "numpy", *sys.stdlib_module_names}


def within(module: str, packages: Collection[str]) -> str | None:
    """The longest of `packages` that is `module` or holds it."""
    hits = [name for name in packages if module == name or module.startswith(name + ".")]
    return max(hits, key=len, default=None)


def layer_of(module: str) -> int | None:
    """Index in LAYERS, -1 for a leaf that all may import, None for code outside the project."""
    if within(module, LEAVES):
        return -1
    name = within(module, LAYERS)
    return None if name is None else LAYERS.index(name)


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use an absolute import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(source: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of each module of a source root."""
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def forward_imports(source: Path) -> list[str]:
    wrong = []
    for module, path in modules_of(source):
        mine = layer_of(module)
        for name in imports_of(path):
            theirs = layer_of(name)
            if mine is not None and theirs is not None and theirs > mine:
                wrong.append(f"{module} imports {name}")
    return wrong


def imports_of_ray(source: Path) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, path in modules_of(source)
        for name in imports_of(path)
        if within(name, ["ray"]) and not within(module, MAY_IMPORT_RAY)
    ]


def foreign_imports_of_kernels(source: Path) -> list[str]:
    scripts = {path.stem for path in source.glob("benchmarks/*.py")}
    return [
        f"{module} imports {name}"
        for module, path in modules_of(source)
        for name in imports_of(path)
        if name.partition(".")[0] not in KERNELS_MAY_IMPORT | scripts
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_back(source):
    wrong = forward_imports(ROOT / source)
    assert not wrong, "these imports point forward:\n" + "\n".join(wrong)


def test_every_module_has_a_layer():
    """A new package that nobody placed in LAYERS would be checked as loosely as the root."""
    unplaced = [
        module
        for source in SOURCES
        for module, _ in modules_of(ROOT / source)
        if module != "esper" and within(module, (*LEAVES, *LAYERS)) in (None, "esper")
    ]
    assert not unplaced, f"place these in LAYERS: {unplaced}"


@pytest.mark.parametrize("source", SOURCES)
def test_only_shards_experiments_and_serving_know_ray(source):
    assert not imports_of_ray(ROOT / source)


def test_kernels_need_only_torch_triton_and_numpy():
    assert not foreign_imports_of_kernels(ROOT / "kernels")


@pytest.mark.parametrize("source", [*SOURCES, "tests"])
def test_roots_are_not_packages(source):
    """`platform/__init__.py` would hide the standard library's `platform` module."""
    assert (ROOT / source).is_dir()
    assert not (ROOT / source / "__init__.py").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_source_roots_hold_no_tests(source):
    """pytest puts the folder of a `conftest.py` where it hides the `platform` module, too."""
    found = [*(ROOT / source).rglob("conftest.py"), *(ROOT / source).rglob("test_*.py")]
    assert not found


def test_platform_is_the_standard_librarys_also_in_the_repository_root():
    code = "import platform, torch; print(platform.system(), platform.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    system, file = done.stdout.split(maxsplit=1)
    assert system == sys.platform.capitalize()
    assert not Path(file).is_relative_to(ROOT / "platform")


@pytest.mark.parametrize(
    ("file", "line", "report"),
    [
        (
            "esper/seeds/bad.py",
            "from esper.training import trainer",
            "esper.seeds.bad imports esper.training.trainer",
        ),
        ("esper/config/bad.py", "import esper.seeds", "esper.config.bad imports esper.seeds"),
        (
            "esper/surgery/bad.py",
            "from esper import attach",
            "esper.surgery.bad imports esper.attach",
        ),
        ("esper/__init__.py", "from esper.cli import main", "esper imports esper.cli.main"),
        (
            "esper_experiments/bad.py",
            "def f():\n    import esper.cli.main",
            "esper_experiments.bad imports esper.cli.main",
        ),
        (
            "esper/cli/bad.py",
            "import esper_experiments.entry",
            "esper.cli.bad imports esper_experiments.entry",
        ),
    ],
)
def test_a_forward_import_is_reported(tmp_path, file, line, report):
    plant(tmp_path / file, line)
    assert forward_imports(tmp_path) == [report]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("esper/training/good.py", "from esper.seeds import state\nimport esper.config.run"),
        ("esper/cli/good.py", "import esper_experiments.sweep, esper, torch"),
        ("esper_experiments/entry.py", "from esper.cli.main import app"),
    ],
)
def test_a_backward_import_is_not_reported(tmp_path, file, line):
    plant(tmp_path / file, line)
    assert forward_imports(tmp_path) == []


def test_a_relative_import_is_reported(tmp_path):
    plant(tmp_path / "esper/seeds/bad.py", "from . import state")
    with pytest.raises(AssertionError, match="use an absolute import"):
        forward_imports(tmp_path)


def test_an_import_of_ray_outside_experiments_is_reported(tmp_path):
    plant(tmp_path / "esper/training/bad.py", "from ray import tune")
    plant(tmp_path / "esper_experiments/good.py", "from ray import tune")
    plant(tmp_path / "esper/seeds/good.py", "import rays")
    assert imports_of_ray(tmp_path) == ["esper.training.bad imports ray.tune"]


def test_a_foreign_import_of_the_kernels_is_reported(tmp_path):
    plant(tmp_path / "esper_kernels/bad.py", "import math, torch.nn, scipy.stats, esper.config")
    assert foreign_imports_of_kernels(tmp_path) == [
        "esper_kernels.bad imports scipy.stats",
        "esper_kernels.bad imports esper.config",
    ]


def plant(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n", encoding="utf-8")
