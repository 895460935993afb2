"""What travels to a cluster: a configuration, the files and plug-ins it names, Esper's code."""

import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from esper.config.arena import load_arena
from esper.config.base import ConfigError, read_yaml, validate
from esper.config.baseline import load_baseline_config
from esper.config.kinds import Kind, kinds_of
from esper.config.run import RunConfig, load_run
from esper.config.sweep import load_sweep
from esper.config.tune import load_tune
from esper.environment import PACKAGES

MIB = 2**20
MAX_UPLOAD_MIB = 100
# Ray would leave out what an ignore file names, also what the user asked for
LEFT_OUT = (
    ".git", ".venv", ".gitignore", ".rayignore", "__pycache__", "*.pyc", ".*_cache", ".hypothesis",
    "runs", "mlruns", "mlartifacts", "mlflow.db*", "*.egg-info",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a configuration asks for.

    Attributes:
        kind: The command that runs it.
        root: The folder that becomes the job's working directory.
        config: Its file, relative to `root`.
        files: All files that travel, by their path in the working directory.
        tracking_uri: As written in the configuration; None where it names none.
        uses_gpu: Whether the command itself, rather than its trials, computes on a GPU.
    """

    kind: Kind
    root: Path
    config: Path
    files: dict[str, Path]
    tracking_uri: str | None
    uses_gpu: bool

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def read_job(config: Path, also: Sequence[Path]) -> Job:
    """Check a configuration, and find what it needs besides Esper's libraries.

    Args:
        config: A sweep, an arena, a search, a run or a baseline.
        also: Further files and folders that travel, such as data.

    Raises:
        ConfigError: If the configuration is wrong, or something cannot be found or is too large.
    """
    kind, runs, uri, named = _read(config)
    here = Path.cwd()
    root = here if config.resolve().is_relative_to(here) else config.resolve().parent
    files: dict[str, Path] = {}
    for package in PACKAGES:
        files |= dict(_code_of(package))
    for module in sorted({name for run in runs for name in _modules_of(run)}):
        for path in _home_of(module, root):
            files |= dict(_below(path, path.parent))
    flags = [run.flags.file for run in runs if run.flags is not None]
    for path in [config.resolve(), *named, *(root / f for f in flags), *also]:
        files |= dict(_below(_inside(path, root), root))
    job = Job(
        kind, root, config.resolve().relative_to(root), files, uri,
        kind in ("run", "baseline") and _on_gpu(config),
    )  # fmt: skip
    _require_small(job)
    return job


def stage(job: Job, folder: Path) -> None:
    """Copy everything that travels into an empty folder."""
    for name, path in job.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _read(config: Path) -> tuple[Kind, list[RunConfig], str | None, list[Path]]:
    """Kind, every run in it, tracking URI, and further files that it names."""
    found = kinds_of(read_yaml(config))
    kind = found[0] if len(found) == 1 else "run"  # whose errors say what is missing
    if kind == "arena":
        arena = load_arena(config)
        runs = [s.run_config(arm) for s in arena.sweeps.values() for arm in s.arms]
        files = [(config.parent / t.sweep).resolve() for t in arena.config.tasks.values()]
        return "arena", runs, arena.config.mlflow.tracking_uri, files
    if kind == "ab":
        sweep = load_sweep(config)
        runs = [sweep.run_config(arm) for arm in sweep.arms]
        return "ab", runs, sweep.mlflow.tracking_uri, []
    if kind == "tune":
        search = load_tune(config)
        return "tune", [search.candidate({})], search.mlflow.tracking_uri, []
    if kind == "baseline":
        baseline = load_baseline_config(config)
        grown = baseline.lifecycle.run if baseline.lifecycle else None
        runs = [validate(RunConfig, grown, source=str(config))] if grown else []
        return "baseline", runs, None, []
    return "run", [load_run(config)], None, []


def _on_gpu(config: Path) -> bool:
    return str(read_yaml(config).get("device", "cpu")).startswith("cuda")


def _modules_of(run: RunConfig) -> Iterator[str]:
    yield from run.plugins
    if run.host.name == "factory":
        yield str(run.host.options.get("path", "")).partition(":")[0]


def _home_of(module: str, root: Path) -> list[Path]:
    """File or folders of the top-level module; none if it is part of an installed distribution."""
    top = module.partition(".")[0]
    if top in PACKAGES:
        return []
    spec = PathFinder.find_spec(top, [str(root), *sys.path])
    if spec is None:
        raise ConfigError(f"plug-in '{module}'", (
            f"it must be importable here, but there is no module '{top}' in {root} nor on "
            "PYTHONPATH; run from its folder, or: PYTHONPATH=FOLDER esper submit ...",
        ))  # fmt: skip
    places = [Path(p) for p in spec.submodule_search_locations or () if p]
    places = places or [Path(spec.origin or "")]
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    return [p for p in places if not any(p.is_relative_to(folder) for folder in installed)]


def _code_of(package: str) -> Iterator[tuple[str, Path]]:
    spec = find_spec(package)
    assert spec is not None
    for location in spec.submodule_search_locations or ():
        folder = Path(location)
        yield from _below(folder, folder.parent)


def _inside(path: Path, root: Path) -> Path:
    path = path.resolve()
    if not path.exists():
        raise ConfigError(str(path), ("it must exist to be uploaded; correct the path.",))
    if not path.is_relative_to(root):
        raise ConfigError(str(path), (
            f"what is uploaded must lie in {root}, which becomes the job's working directory; "
            "run from a folder that holds it, or put data where the cluster sees them.",
        ))  # fmt: skip
    return path


def _below(path: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """A file, or all files of a folder but those that are left out; named relative to `root`."""
    if path.is_file():
        yield path.relative_to(root).as_posix(), path
        return
    for entry in sorted(path.iterdir()):
        if not any(fnmatch(entry.name, pattern) for pattern in LEFT_OUT):
            yield from _below(entry, root)


def _require_small(job: Job) -> None:
    if job.num_bytes <= MAX_UPLOAD_MIB * MIB:
        return
    raise ConfigError("the upload", (
        f"it must be at most {MAX_UPLOAD_MIB} MiB, but is {job.num_bytes / MIB:,.0f} MiB; put "
        "data on a folder that the cluster sees and name its path there. The largest files:",
        *_largest(job.files.items()),
    ))  # fmt: skip


def _largest(files: Iterable[tuple[str, Path]]) -> list[str]:
    sizes = sorted(((path.stat().st_size, name) for name, path in files), reverse=True)
    return [f"  {size / MIB:8.1f} MiB  {name}" for size, name in sizes[:5]]
