"""Phases are complete and executable, or refused."""

import math
from pathlib import Path

import pytest
import yaml
from tests.esper.release.conftest import copy_migration

from esper.config.base import ConfigError
from esper.release.errors import ReleaseError
from esper.release.phases import (
    PHASES,
    Assertion,
    Guard,
    Quantity,
    check,
    load_migration,
    load_phases,
)

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def folder(tmp_path):
    """The project's migration, to change."""
    return copy_migration(tmp_path).parent


def edit(path, change):
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document))


def test_the_projects_migration_is_whole():
    plan = load_migration(CONFIGS / "morphogenetic_migration.yaml")
    assert tuple(p.name for p in plan.phases.phases) == PHASES
    for phase in plan.phases.phases:
        assert phase.targets
        assert phase.rollout.steps_bp[0] == 500
        assert phase.owners
    asserted = {str(t) for p in plan.phases.phases for t in p.targets}
    assert {
        "forward_p50_ms < 100 ms", "seeds_per_layer >= 1000 count",
        "gpu_sm_active_percent > 80 percent", "launches_per_site == 1 count",
    } <= asserted  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(targets=[]), "targets must have at least 1 item"),
        (lambda p: p.pop("targets"), "targets must be given, but is missing"),
        (lambda p: p.update(owners=[]), "owners must have at least 1 item"),
        (lambda p: p.update(gates=[]), "gates must have at least 1 item"),
        (lambda p: p.update(alerts=[]), "alerts must have at least 1 item"),
        (lambda p: p["targets"][0].pop("unit"), "unit must be given"),
        (lambda p: p["targets"][0].update(comparison="=>"), "comparison must be '<', '<='"),
        (lambda p: p["targets"][0].update(value=math.nan), "value must be a finite number"),
        (lambda p: p["targets"][0].update(value="100"), "a number without quotes"),
        (lambda p: p["rollout"].update(steps_bp=[600, 10_000]), "canary of 1 to 500"),
        (lambda p: p["rollout"].update(steps_bp=[0, 10_000]), "canary of 1 to 500"),
        (lambda p: p["rollout"].update(steps_bp=[500, 10_100]), "must rise to 10000"),
        (lambda p: p["rollout"].update(steps_bp=[500, 400, 10_000]), "must rise to 10000"),
        (lambda p: p["rollout"].update(flag="kasmina.paralel"), "did you mean 'kasmina.parallel'"),
        (lambda p: p.update(number=7), "phases must be"),
        (lambda p: p.update(tragets=[]), "did you mean 'targets'"),
    ],
)
def test_an_incomplete_phase_is_refused(folder, change, message):
    edit(folder / "phases.yaml", lambda d: change(d["phases"][1]))
    with pytest.raises(ConfigError, match=message):
        load_migration(folder / "morphogenetic_migration.yaml")


def test_no_phase_may_be_left_out(folder):
    edit(folder / "phases.yaml", lambda d: d["phases"].pop(3))
    with pytest.raises(ConfigError, match="phases must be"):
        load_phases(folder / "phases.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(guards=[]), "guards must have at least 1 item"),
        (lambda p: p["guards"].append(p["guards"][0]), "'latency_p50_ms' has more"),
        (lambda p: p["guards"][0].update(fault=0.02), "fault must be beyond the margin"),
        (lambda p: p["guards"][0].update(margin=0), "margin must be greater than 0"),
        (lambda p: p.update(min_pairs=3), "min_pairs must be greater than or equal to 8"),
        (lambda p: p.update(alpha_rollback=0.5), "alpha_rollback must be less than or equal"),
        (lambda p: p.pop("max_age_s"), "max_age_s must be given"),
    ],
)
def test_a_careless_policy_is_refused(folder, change, message):
    edit(folder / "morphogenetic_migration.yaml", lambda d: change(d["policy"]))
    with pytest.raises(ConfigError, match=message):
        load_migration(folder / "morphogenetic_migration.yaml")


def test_phases_are_numbered_from_zero():
    phases = load_phases(CONFIGS / "phases.yaml")
    assert phases.phase(5).name == "advanced_features"
    for number in (-1, 6):
        with pytest.raises(ReleaseError, match="phase must be 0 to 5"):
            phases.phase(number)


@pytest.mark.parametrize(
    ("comparison", "value", "holds"),
    [("<", 99, True), ("<", 100, False), ("<=", 100, True), (">", 100, False), (">", 101, True),
     (">=", 100, True), (">=", 99, False), ("==", 100, True), ("==", 101, False)],
)  # fmt: skip
def test_assertions_are_executed(comparison, value, holds):
    wanted = Assertion(metric="t", comparison=comparison, value=100, unit="ms")
    (result,) = check([wanted], {"t": Quantity(value=value, unit="ms")})
    assert (result.holds, result.measured) == (holds, value)


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        ({}, "not measured"),
        ({"t": Quantity(value=1, unit="s")}, "measured in s"),
        ({"t": Quantity(value=math.nan, unit="ms")}, "measured as nan"),
        ({"t": Quantity(value=-math.inf, unit="ms")}, "measured as -inf"),
    ],
)
def test_what_was_not_measured_is_neither_true_nor_false(measured, why):
    wanted = Assertion(metric="t", comparison="<", value=100, unit="ms")
    (result,) = check([wanted], measured)
    assert (result.holds, result.measured) == (None, None)
    assert result.why == f"t < 100 ms: {why}"


def test_amounts_are_scaled_as_pairs_are_compared():
    common = {"metric": "m", "unit": "u", "margin": 0.03, "fault": 0.05, "pair_sd": 0.01}
    slower = Guard(compare="ratio", worse="higher", **common)
    fewer = Guard(compare="ratio", worse="lower", **common)
    points = Guard(compare="difference", worse="lower", **common)
    assert slower.scaled(0.05) == pytest.approx(math.log(1.05))
    assert fewer.scaled(0.05) == pytest.approx(-math.log(0.95))
    assert points.scaled(0.05) == 0.05
    with pytest.raises(ValueError, match="fault must be below 1"):
        Guard(compare="ratio", worse="lower", **common | {"fault": 1.5})
