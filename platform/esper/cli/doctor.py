"""`esper doctor`: can this machine run Esper, and if not, what is to be done?"""

import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.output import write_result
from esper.environment import (
    DISTRIBUTION,
    device_name,
    installed_version,
    name_clash,
    tested_versions,
)
from esper.tracking.reach import database_path, require_reachable

Status = Literal["ok", "warn", "fail"]
STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
GIB = 2**30

_RAY_PROBE = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
assert ray.get(ray.remote(lambda: 1).remote()) == 1
ray.shutdown()
print(ray.__version__)
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        status: `warn` limits what can be done here; `fail` stops Esper from working.
        found: What is there.
        advice: What to do about it; empty if the status is `ok`.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def diagnose(tracking_uri: str) -> list[Check]:
    """Run all checks; takes some ten seconds, most of them for starting Ray.

    Args:
        tracking_uri: MLflow's tracking URI, as in a sweep's `mlflow.tracking_uri`.
    """
    return [
        check_name_clash(),
        *check_versions(),
        *(_guard(check) for check in (check_devices, check_kernels, check_ray_start)),
        check_tracking(tracking_uri),
        check_disk(Path.cwd()),
        check_memory(),
        _guard(check_cpus),
    ]


def _guard(check: Callable[[], Check]) -> Check:
    """A check that breaks off is a finding: a broken library can raise anything."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        found = f"{type(error).__name__}: {_lines(error)[0]}"
        return Check(name, "fail", found, "Repair what this names; make install may do it.")


def check_name_clash() -> Check:
    """Is PyPI's game library `esper` installed beside this package?"""
    other = name_clash()
    if other is None:
        return Check("package name", "ok", "esper is this project's package")
    return Check(
        "package name",
        "fail",
        f"another distribution brings a package esper: {other}",
        "python -m pip uninstall esper, then reinstall esper-morphogenetic.",
    )


def check_versions() -> list[Check]:
    """Python and every direct dependency, against the declared range and the tested version."""
    try:
        declared = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [
            Check(
                DISTRIBUTION,
                "warn",
                "not installed, only importable: the versions it needs are unknown",
                "In the checkout, run make install.",
            )
        ]
    python = check_version("python", platform.python_version(), declared["Requires-Python"], None)
    tested = tested_versions()
    requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    return [python] + [
        check_version(
            need.name, installed_version(need.name), need.specifier, tested.get(need.name.lower())
        )
        for need in requirements
        if need.marker is None or need.marker.evaluate({"extra": ""})
    ]


def check_version(
    name: str, found: str | None, allowed: SpecifierSet | str, tested: str | None
) -> Check:
    """One version.

    Args:
        name: Name of the distribution.
        found: Its installed version; None: not installed.
        allowed: The range that is expected to work.
        tested: The version that the tests ran with; None: unknown.
    """
    allowed = SpecifierSet(str(allowed))
    install = "In the checkout, run make install; elsewhere, pip install"
    if found is None:
        return Check(name, "fail", "not installed", f"{install} '{name}{allowed}'.")
    if not allowed.contains(found, prereleases=True):
        return Check(name, "fail", f"{found}, must be {allowed}", f"{install} '{name}{allowed}'.")
    # the public part: 2.13.0+cpu and 2.13.0 are builds of the same release
    if tested is not None and Version(found).public != Version(tested).public:
        return Check(
            name,
            "warn",
            f"{found}, tested with {tested}",
            f"Expected to work; if it does not: {install.lower()} '{name}=={tested}'.",
        )
    return Check(name, "ok", found)


def check_devices() -> Check:
    """The devices that torch sees."""
    import torch

    devices = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / GIB:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    if devices:
        return Check("devices", "ok", "; ".join(devices))
    if shutil.which("nvidia-smi"):
        return Check(
            "devices",
            "warn",
            f"CPU only (torch {torch.__version__}), though this machine has an NVIDIA driver",
            "Install a CUDA build of torch, and see whether nvidia-smi lists the GPU.",
        )
    return Check("devices", "ok", f"CPU only: {device_name('cpu')}")


def check_kernels() -> Check:
    """Whether seeds run in Triton kernels here, or in the plain PyTorch reference."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return Check(
            "kernels",
            "warn",
            "TRITON_INTERPRET=1: kernels are interpreted, thousands of times slower",
            "Unset TRITON_INTERPRET, except to test kernels on a CPU.",
        )
    if not torch.cuda.is_available():
        return Check("kernels", "ok", "no GPU: kernels run in reference mode")
    missing = missing_build_tools()
    if missing:
        return Check(
            "kernels",
            "fail",
            f"kernels cannot be launched without {' and '.join(missing)}",
            "On Debian and Ubuntu: apt install gcc python3-dev.",
        )
    try:
        import triton

        target = triton.runtime.driver.active.get_current_target()
    # a driver that cannot be loaded raises AssertionError, OSError or what its build raised
    except Exception as error:
        advice = "Install triton in the version that torch requires."
        return Check("kernels", "fail", _lines(error)[0], advice)
    return Check("kernels", "ok", f"{triton.__version__} on {target.backend} {target.arch}")


def missing_build_tools() -> list[str]:
    """What Triton lacks to build the launcher of a kernel, at its first call."""
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h")
    return missing


def check_ray_start(timeout_s: float = 120.0) -> Check:
    """Start a local Ray of one CPU, run a task and shut it down, in a process of its own.

    Args:
        timeout_s: Wall-clock limit, in seconds, for all of it.
    """
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    }
    before_s = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RAY_PROBE],
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Check(
            "ray start",
            "fail",
            f"did not start, run a task and stop within {timeout_s:g} s",
            "See the newest files in Ray's session_latest/logs; free memory and disk space, and "
            "let no firewall stand between processes of this machine.",
        )
    if done.returncode != 0:
        return Check(
            "ray start",
            "fail",
            _lines(done.stderr)[-1],
            "Run python -c 'import ray; ray.init(num_cpus=1)' for the whole error.",
        )
    took_s = time.monotonic() - before_s
    return Check(
        "ray start", "ok", f"{done.stdout.split()[-1]} started and stopped in {took_s:.0f} s"
    )


def check_tracking(tracking_uri: str) -> Check:
    """Whether MLflow can store runs at a tracking URI; creates nothing.

    Args:
        tracking_uri: `sqlite:///file`, `http(s)://server`, or what else MLflow takes.
    """
    path = database_path(tracking_uri)
    try:
        if path is not None and not path.exists():
            return _check_new_database(path)
        require_reachable(tracking_uri)
        if path is not None and "alembic_version" not in (tables := _tables(path)):
            return _check_foreign_database(path, tables)
        _open_store(tracking_uri)
    # MLflow lets errors of any database driver through
    except Exception as error:
        return Check(
            "tracking",
            "fail",
            _lines(error)[0],
            "Correct mlflow.tracking_uri or start its server; after an upgrade of MLflow, "
            "run mlflow db upgrade on the database.",
        )
    return Check("tracking", "ok", f"{tracking_uri.rpartition('@')[2]} can be read")


def _check_new_database(path: Path) -> Check:
    folder = next(parent for parent in path.parents if parent.exists())
    if folder.is_dir() and os.access(folder, os.W_OK):
        return Check("tracking", "ok", f"{path} will be created")
    advice = "Name a database in a folder that can be written."
    return Check("tracking", "fail", f"{path} cannot be created", advice)


def _check_foreign_database(path: Path, tables: set[str]) -> Check:
    if not tables:
        return Check("tracking", "ok", f"{path} is empty: MLflow will create its tables")
    found = f"{path} holds no MLflow runs but other tables: {', '.join(sorted(tables)[:5])}"
    return Check("tracking", "fail", found, "Name another file, or one that is not there yet.")


def _tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return {name for (name,) in rows}


def _open_store(tracking_uri: str) -> None:
    """Read one experiment, so that a foreign or outdated schema shows."""
    from mlflow import MlflowClient

    MlflowClient(tracking_uri).search_experiments(max_results=1)


def check_disk(folder: Path, warn_gib: float = 5.0, fail_gib: float = 0.5) -> Check:
    """Free space, in GiB, where runs are written."""
    free_gib = shutil.disk_usage(folder).free / GIB
    advice = f"Free some space, or run where more than {warn_gib:g} GiB are free."
    return _check_amount("disk", free_gib, f"free in {folder}", warn_gib, fail_gib, advice)


def check_memory(warn_gib: float = 4.0, fail_gib: float = 1.0) -> Check:
    """Free memory in GiB; Ray and its first workers take about 2."""
    free_gib = psutil.virtual_memory().available / GIB
    advice = "End other programs, or lower resources.num_cpus, the number of trials at once."
    return _check_amount("memory", free_gib, "free", warn_gib, fail_gib, advice)


def _check_amount(
    name: str, amount_gib: float, what: str, warn_gib: float, fail_gib: float, advice: str
) -> Check:
    found = f"{amount_gib:.1f} GiB {what}"
    if amount_gib >= warn_gib:
        return Check(name, "ok", found)
    return Check(name, "fail" if amount_gib < fail_gib else "warn", found, advice)


def check_cpus() -> Check:
    """CPUs that this process may use, and threads that torch would start in each process."""
    import torch

    cpus, threads = num_cpus(), torch.get_num_threads()
    found = f"{cpus} CPUs, {threads} torch threads a process"
    if threads > cpus:
        advice = f"Set OMP_NUM_THREADS={cpus}: more threads than CPUs slow each other down."
        return Check("cpus", "warn", found, advice)
    return Check("cpus", "ok", found)


def num_cpus() -> int:
    """CPUs that this process may run on, which can be fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _lines(text: object) -> list[str]:
    """Lines of an error that say something, at least one."""
    return [line.strip() for line in str(text).splitlines() if line.strip()] or ["no message"]


def render(checks: list[Check]) -> Table:
    """The checks as a table, one row each."""
    table = Table("", "check", "found", "what to do", title="esper doctor")
    for check in checks:
        # Text, since brackets in an error message are not markup
        status = Text(check.status, STYLES[check.status])
        table.add_row(status, Text(check.name), Text(check.found), Text(check.advice))
    return table


def run_doctor(tracking_uri: str, json_file: Path | None) -> int:
    """Look whether this machine can run Esper, and say what to do where it cannot.

    Returns:
        The exit code: 1 if something fails.
    """
    console = Console()
    with console.status("looking; starting Ray takes some seconds"):
        checks = diagnose(tracking_uri)
    console.print(render(checks))
    if json_file is not None:
        write_result(json_file, [asdict(check) for check in checks])
    return 1 if any(check.status == "fail" for check in checks) else 0
