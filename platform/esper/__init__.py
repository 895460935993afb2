"""Esper grows PyTorch networks while they train, and proves that the growth paid off.

Example:
    >>> import torch, esper
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> lattice = esper.attach(model, sites="0", seeds_per_layer=8)
    >>> lattice.count_parameters()
    162
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.config.run import GrowthConfig as GrowthConfig
    from esper.controller import Tamiyo as Tamiyo
    from esper.seeds.actions import Advance as Advance
    from esper.seeds.actions import Cancel as Cancel
    from esper.seeds.actions import Cull as Cull
    from esper.seeds.actions import Germinate as Germinate
    from esper.seeds.actions import Promote as Promote
    from esper.seeds.actions import Rollback as Rollback
    from esper.seeds.blueprints import blueprint as blueprint
    from esper.seeds.kasmina import KasminaLayer as KasminaLayer
    from esper.seeds.optimizer import SeedOptimizer as SeedOptimizer
    from esper.seeds.report import Report as Report
    from esper.seeds.state import Stage as Stage
    from esper.surgery.attach import attach as attach
    from esper.surgery.files import load as load
    from esper.surgery.files import save as save
    from esper.surgery.lattice import Lattice as Lattice
    from esper.surgery.lattice import lattice_of as lattice_of
    from esper.training.metrics import metric as metric

__version__ = "0.1.0"

# torch takes a second to import: nothing is loaded before it is asked for
_HOMES = {
    "GrowthConfig": "esper.config.run",
    "Tamiyo": "esper.controller",
    **dict.fromkeys(
        ("Advance", "Cancel", "Cull", "Germinate", "Promote", "Rollback"), "esper.seeds.actions"
    ),
    "blueprint": "esper.seeds.blueprints",
    "KasminaLayer": "esper.seeds.kasmina",
    "Report": "esper.seeds.report",
    "SeedOptimizer": "esper.seeds.optimizer",
    "Stage": "esper.seeds.state",
    "attach": "esper.surgery.attach",
    **dict.fromkeys(("load", "save"), "esper.surgery.files"),
    **dict.fromkeys(("Lattice", "lattice_of"), "esper.surgery.lattice"),
    "metric": "esper.training.metrics",
}
__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'esper' has no attribute '{name}'.")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
