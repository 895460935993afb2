"""Hand-made reports, and what two runs must have in common.

Every value of a report is measured and unremarkable unless a test says otherwise.
"""

import json

import numpy as np
import pytest

from esper.config.run import GrowthConfig
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.report import Report, SiteReport
from esper.seeds.state import Stage

SITE_DEFAULTS = {
    "blueprint_id": 0, "epochs": 0, "graft_id": 0, "alpha": 0.0, "progress": 0.0,
    "grad_energy": 1.0, "bottleneck": 1.0, "silent_frac": 0.0, "variance": 1.0, "dead_frac": 0.0,
    "explained_frac": 0.5, "graft_loss": 1.0, "grad_ratio": 1.0, "gain": 0.1, "gain_se": 0.01,
}  # fmt: skip
INTS = ("stage", "blueprint_id", "epochs", "graft_id")


def site_of(name="a", stage=(Stage.DORMANT,) * 4, geometry="chunk", unexplained=2.0, **columns):
    """A site; a column is one number for all seeds or one for each."""
    values = {"stage": stage, **SITE_DEFAULTS, **columns}
    arrays = {
        k: np.broadcast_to(np.asarray(v, np.int32 if k in INTS else np.float32), len(stage)).copy()
        for k, v in values.items()
    }
    costs = {n: 100 for n in BLUEPRINTS if geometry in BLUEPRINTS[n].geometries}
    return SiteReport(
        name=name, geometry=geometry, seed_parameters=costs, unexplained=unexplained, **arrays
    )


def report_of(*sites, interval=1, loss=1.0, growth=None, parameters=1000, drift=0.0):
    return Report(
        interval=interval, step=10 * interval, loss=loss, held_out_loss=loss, grad_norm=1.0,
        host_drift_frac=drift, host_parameters=1000, parameters=parameters,
        growth=growth or GrowthConfig(), sites=sites or (site_of(),),
    )  # fmt: skip


@pytest.fixture
def make_site():
    return site_of


@pytest.fixture
def make_report():
    return report_of


def untimed(record):
    """A record without what no two runs have in common."""
    content = json.loads(record.model_dump_json(exclude={"started_at", "ended_at"}))
    for timed in ("train_seconds", "growth_seconds"):
        del content["metrics"][timed]
    del content["curves"]["train_seconds"]
    return content


@pytest.fixture
def without_times():
    return untimed
