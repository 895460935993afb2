"""`esper regress`: its exit code, and what it leaves for the gate."""

import json

import pytest
from tests.esper.cli.conftest import esper

from esper.release.judge import PhaseMeasurements
from esper.seeds import legacy
from esper.seeds.state import Stage


@pytest.fixture
def regress(tmp_path):
    def call(*args):
        report = tmp_path / "report.json"
        done = esper("regress", "--quick", "--report", report, *args)
        return done, report

    return call


def test_a_part_that_passes(regress):
    done, report = regress("--only", "legacy_stages", "--only", "dormant")
    assert done.exit_code == 0
    measured = PhaseMeasurements.model_validate_json(report.read_text())
    assert [c.name for c in measured.checks] == ["legacy_stages", "dormant"]
    # a part of the suite must not open a gate
    assert measured.quantities.keys() == {"lifecycle_stages", "dormant_changed_bits"}
    assert "passed     exact  dormant" in report.with_suffix(".txt").read_text()


def test_a_fault_is_told_by_the_exit_code(regress, monkeypatch):
    monkeypatch.delitem(legacy.LEGACY_STAGE, Stage.CULLED)
    done, report = regress("--only", "legacy_stages")
    assert done.exit_code == 1
    (check,) = json.loads(report.read_text())["checks"]
    assert check["problems"] == ["CULLED is missing, not ERROR_RECOVERY"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--only", "everything"), "checks must be among transitions"),
        (("--device", "nowhere"), "'nowhere' cannot be used here"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(regress, args, message):
    done, report = regress(*args)
    assert done.exit_code == 2
    assert message in done.output
    assert not report.exists()
