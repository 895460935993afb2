"""What a result depends on besides its configuration: the code, library versions, the device.

A leaf of the import order: any module may ask. Nothing here imports a third party until it must.
"""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

DISTRIBUTION = "esper-morphogenetic"
PACKAGES = ("esper", "esper_kernels", "esper_experiments", "esper_serve")
LIBRARIES = ("torch", "triton", "ray", "mlflow", "scipy", "numpy", DISTRIBUTION)

_HERE = Path(__file__).resolve().parent
_CPUINFO = Path("/proc/cpuinfo")


class Facts(TypedDict):
    """The fields of `esper.evidence.records.Fingerprint`."""

    code_hash: str
    commit: str | None
    versions: dict[str, str]
    device: str


class MachineFacts(TypedDict):
    """What the speed of a program depends on besides the code; None: not to be found out."""

    device: str
    cpu: str
    num_cpus: int
    memory_bytes: int
    max_cpu_mhz: float | None
    driver: str | None
    cuda: str | None
    max_sm_mhz: float | None
    max_gpu_memory_mhz: float | None


def fingerprint(device: str = "cpu") -> Facts:
    """Everything that two trials must have in common before their numbers may be compared.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: If `device` is none of these.
        RuntimeError: If the device is not there, or one of the four packages is not.
    """
    return Facts(
        code_hash=code_hash(), commit=commit(), versions=versions(), device=device_name(device)
    )


@cache
def code_hash() -> str:
    """sha256 (hex) over the sources of the four packages, wherever they are imported from.

    Computed once per process, so that it tells what the process runs and not what was edited since.

    Raises:
        RuntimeError: If one of the packages cannot be found.
    """
    return hash_sources(folder for package in PACKAGES for folder in _folders_of(package))


def hash_sources(folders: Iterable[Path]) -> str:
    """sha256 (hex) over the names and contents of all `*.py` files below package folders.

    Equal for equal sources, wherever the folders lie and in whatever order they are given.
    """
    named = {
        path.relative_to(folder.parent).as_posix(): path
        for folder in folders
        for path in folder.rglob("*.py")
    }
    digest = hashlib.sha256()
    for name in sorted(named):
        content = named[name].read_bytes()
        # the length keeps a file's end apart from the next file's name
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _folders_of(package: str) -> list[Path]:
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError(
            f"package {package} must be importable, but is not found; install {DISTRIBUTION} again."
        )
    return [Path(location) for location in spec.submodule_search_locations]


def commit(folder: Path = _HERE) -> str | None:
    """Commit (40 hex digits) of the git checkout that tracks `folder`.

    None without git, outside a checkout, before the first commit, and for a package that was
    installed into an environment which happens to lie inside somebody's checkout.
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    head = _git(folder, "rev-parse", "HEAD")
    return head.strip() if head else None


def is_dirty(folder: Path = _HERE) -> bool | None:
    """Whether the checkout differs from its commit, new files included; None where `commit` is."""
    if commit(folder) is None:
        return None
    return bool(_git(folder, "status", "--porcelain"))


def dirty_hash(folder: Path = _HERE) -> str | None:
    """sha256 (hex) over everything in which the checkout differs from its commit.

    New files are included. None where it does not differ, and where `commit` is None.
    """
    if not is_dirty(folder):
        return None
    root = Path((_git(folder, "rev-parse", "--show-toplevel") or "").strip())
    digest = hashlib.sha256((_git(root, "diff", "--binary", "HEAD") or "").encode())
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z") or ""
    for name in sorted(filter(None, new.split("\0"))):
        content = (root / name).read_bytes() if (root / name).is_file() else b""
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it is missing or refuses."""
    # inside a git hook these name another checkout or index
    redirects = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            env={k: v for k, v in os.environ.items() if k not in redirects},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def versions() -> dict[str, str]:
    """Version of Python and of each library that decides numbers; `not installed` if missing."""
    return {"python": platform.python_version()} | {
        name: installed_version(name) or "not installed" for name in LIBRARIES
    }


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """Model name of a CPU or CUDA device.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: If `device` is none of these, or torch sees no such CUDA device.
    """
    kind, _, index = device.partition(":")
    if device == "cpu":
        return _cpu_name()
    # here, since this module is loaded where no library may be there
    from esper.config.base import ConfigError

    if kind != "cuda" or not (index.isdecimal() or device == "cuda"):
        raise ConfigError("device", (
            f"device must be cpu, cuda or cuda:N, but got {device!r}; correct it.",
        ))  # fmt: skip
    import torch

    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError("device", (
            f"device must exist, but got {device!r} and torch sees {torch.cuda.device_count()} "
            "CUDA devices; run `esper doctor`, or set `device: cpu`.",
        ))  # fmt: skip
    return torch.cuda.get_device_name(device)


def machine(device: str = "cpu") -> MachineFacts:
    """What two timings must have in common before they may be compared.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: If `device` is none of these.
        RuntimeError: If the device is not there, or its driver and clocks cannot be read.
    """
    import psutil

    name = device_name(device)
    frequency = psutil.cpu_freq()
    facts = MachineFacts(
        device=name,
        cpu=_cpu_name(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=int(psutil.virtual_memory().total),
        max_cpu_mhz=float(frequency.max) if frequency and frequency.max else None,
        driver=None,
        cuda=None,
        max_sm_mhz=None,
        max_gpu_memory_mhz=None,
    )
    if device != "cpu":
        import torch

        facts["cuda"] = torch.version.cuda
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            handle = nvml_handle(nvml, device)
            facts["driver"] = str(nvml.nvmlSystemGetDriverVersion())
            facts["max_sm_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
            facts["max_gpu_memory_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(
                handle, nvml.NVML_CLOCK_MEM
            )
        except Exception as error:  # NVML's errors have no common base named without it
            raise RuntimeError(
                "driver and clocks of the GPU must be readable through NVML, but: "
                f"{type(error).__name__}: {error}; a timing without them compares with nothing."
            ) from error
    return facts


def nvml_handle(nvml: Any, device: str = "cuda") -> Any:
    """NVML's handle of a CUDA device, found by its UUID: the two may count devices differently.

    Args:
        nvml: The initialised module `pynvml`.
        device: `cuda` or `cuda:N`.
    """
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def _cpu_name() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def name_clash() -> str | None:
    """Name, version and place of the game library `esper` if it is installed beside this package.

    It brings an import package `esper` of its own, which hides or overwrites this one.
    """
    try:
        other = metadata.distribution("esper")
    except metadata.PackageNotFoundError:
        return None
    return f"esper {other.version} in {other.locate_file('')}"


def tested_versions() -> dict[str, str]:
    """Version of each direct dependency that the tests of this release ran with.

    Empty if the package is used without being installed, since the list is part of its metadata.
    """
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("extra_metadata/constraints.txt")
    except metadata.PackageNotFoundError:
        return {}
    pins = (line.partition("==") for line in (text or "").splitlines() if "==" in line)
    return {name.strip().lower(): version.strip() for name, _, version in pins}
