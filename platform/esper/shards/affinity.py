"""A process that drives a GPU computes on the CPUs next to it, in the same NUMA node.

Launches and copies that cross the link between sockets take longer. Where the system does not tell
what is near, as in many virtual machines, and for shards without a GPU, the scheduler chooses.
"""

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from esper.environment import nvml_handle

PCI = Path("/sys/bus/pci/devices")


def stay_near(device: str) -> frozenset[int]:
    """Keep this thread, and those that it starts from now on, on the CPUs near a device.

    Args:
        device: Of torch.

    Returns:
        The CPUs; empty if nothing was changed.
    """
    place = torch.device(device)
    if place.type != "cuda":
        return frozenset()
    return stay_on(near(_address(place)))


def stay_on(cpus: frozenset[int]) -> frozenset[int]:
    """The same for some CPUs, as far as this process may use them."""
    allowed = cpus & os.sched_getaffinity(0)
    if allowed:
        try:
            os.sched_setaffinity(0, allowed)
        except PermissionError:
            # a container may forbid it, and a run is worth more than its place
            return frozenset()
        logging.getLogger(__name__).info("on the CPUs %s, near the GPU", sorted(allowed))
    return frozenset(allowed)


def near(address: str, pci: Path = PCI) -> frozenset[int]:
    """CPUs in the NUMA node of a PCI device; none if the system does not tell.

    Args:
        address: Such as `0000:18:00.0`; empty if it is not known.
        pci: Where the system tells about its PCI devices.
    """
    try:
        node = int((pci / address / "numa_node").read_text())
        told = (pci / address / "local_cpulist").read_text().strip()
    except (OSError, ValueError):
        return frozenset()
    # -1 says that there is no node, and then all CPUs are near
    if node < 0 or not told:
        return frozenset()
    ends = [part.partition("-")[::2] for part in told.split(",")]
    return frozenset(cpu for a, b in ends for cpu in range(int(a), int(b or a) + 1))


def _address(device: torch.device) -> str:
    """As the system names the GPU; empty if NVML does not know it, such as a part of one."""
    nvml: Any = import_module("pynvml")
    try:
        nvml.nvmlInit()
        told = nvml.nvmlDeviceGetPciInfo(nvml_handle(nvml, str(device))).busId
    except nvml.NVMLError:
        return ""
    # its domain has eight digits, that of the system four
    return (told.decode() if isinstance(told, bytes) else str(told))[-12:].lower()
