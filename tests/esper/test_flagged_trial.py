"""A trial under flags: what rules each interval, and what the record says of it."""

import math
import shutil
from pathlib import Path

import pytest

from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.evidence.records import Fingerprint, TrialRecord
from esper.release.change import change_flag
from esper.tracking.entities import trial_tags
from esper.trial import Trial, TrialSpec

ROOT = Path(__file__).parents[2]
MARK = Fingerprint(code_hash="c", commit=None, versions={"torch": "2"}, device="cpu")
SPEC = TrialSpec("arm", 0, 0, 1, "registered", MARK)
RUN = {
    "task": {
        "name": "spirals",
        "options": {"train_samples": 200, "held_out_samples": 100, "test_samples": 100},
    },
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 120, "batch_size": 50, "interval_steps": 10, "learning_rate": 0.01},
    "lattice": [
        {"sites": "fc1", "seeds_per_layer": 4, "hidden": 4},
        {"sites": "fc1->out", "seeds_per_layer": 4, "geometry": "span"},
    ],
    "growth": {"ramp_steps": 8, "fine_tuning_intervals": 2, "min_gain": -1e9,
               "min_explained_frac": -1e9, "max_instability_frac": 1e9, "max_drift_frac": 1e9},
    "controller": {"name": "schedule", "options": {"at_intervals": [2, 5], "count": 2}},
}  # fmt: skip


@pytest.fixture
def flags(tmp_path):
    """The project's flags, with the run's own switch on."""
    path = Path(shutil.copy(ROOT / "configs/flags.yaml", tmp_path / "flags.yaml"))
    turn(path, "release.snapshots", True)
    return path


def turn(path, name, on):
    change_flag(path, name, {"rollout_bp": 10_000 * on}, actor="a", reason="test")


def trial(**changes):
    return Trial(RunConfig.model_validate({**RUN, **changes}), SPEC)


def under(path, **changes):
    return trial(flags={"file": str(path), "model": "m"}, **changes)


def finished(run):
    run.run_for(math.inf)
    return run.record()


def steps(record):
    return [(t.interval, t.site, t.seed, t.before, t.after) for t in record.transitions]


def test_the_three_ways_to_compute_train_alike_and_decide_alike():
    records = {e: finished(trial(execution=e)) for e in ("kernels", "vectorised", "loop")}
    first = records["kernels"]
    assert len(steps(first)) > 20
    for record in records.values():
        assert record.flags is None
        assert steps(record) == steps(first)
        assert record.curves["train_loss"] == pytest.approx(first.curves["train_loss"], rel=1e-3)


def test_a_run_follows_a_flag_that_is_changed_between_intervals(flags):
    run = under(flags)
    run.run_for(0.0)
    turn(flags, "kasmina.parallel", True)
    run.run_for(0.0)
    turn(flags, "kasmina.triton", True)
    change_flag(flags, "kasmina.triton", {"rules": []}, actor="a", reason="test")
    run.run_for(0.0)
    layers = [a.layer for a in run.trainer.lattice.attached.values()]
    assert [layer.execution for layer in layers] == ["kernels", "kernels"]
    turn(flags, "kasmina.parallel", False)
    record = finished(run)
    ruled = [r.execution for r in record.flags]
    assert ruled == ["loop", "vectorised", "kernels"] + ["loop"] * 9
    assert len({r.hash for r in record.flags}) == 4
    assert TrialRecord.model_validate_json(record.model_dump_json()).flags == record.flags
    assert trial_tags(record)["execution"] == "loop,vectorised,kernels"
    assert trial_tags(record)["flags_hash"] == ",".join(r.hash for r in record.flags[:4])


def test_without_its_switch_a_run_reads_flags_but_follows_its_own_settings(flags):
    turn(flags, "release.snapshots", False)
    record = finished(under(flags, execution="vectorised"))
    assert {(r.execution, r.grows) for r in record.flags} == {("vectorised", True)}
    assert steps(record) == steps(finished(trial(execution="vectorised")))


def test_nothing_is_woken_while_the_lifecycle_is_off(flags):
    turn(flags, "kasmina.parallel", True)
    run = under(flags)
    for _ in range(4):
        run.run_for(0.0)
    assert run.controller.vetoes
    assert not run.trainer.lattice.log
    assert "kasmina.lifecycle is off for 'm'" in run.controller.vetoes[0].reason
    turn(flags, "kasmina.lifecycle", True)
    record = finished(run)
    assert [r.grows for r in record.flags] == [False] * 4 + [True] * 8
    assert min(t.interval for t in record.transitions) == 5


def test_a_seed_that_lives_goes_on_when_the_lifecycle_is_turned_off(flags):
    for name in ("kasmina.parallel", "kasmina.lifecycle"):
        turn(flags, name, True)
    run = under(flags)
    for _ in range(3):
        run.run_for(0.0)
    woken = [t for t in run.trainer.lattice.log if type(t.action).__name__ == "Germinate"]
    turn(flags, "kasmina.lifecycle", False)
    record = finished(run)
    germinated = [t for t in record.transitions if t.action == "Germinate"]
    assert len(germinated) == len(woken) > 0
    assert {t.after for t in record.transitions} >= {"GRAFTING", "FINE_TUNING"}


def test_a_file_that_becomes_unreadable_stops_the_run_until_it_is_repaired(flags):
    run = under(flags)
    run.run_for(0.0)
    good = flags.read_text()
    flags.write_text("version: 1\nflags: {")
    with pytest.raises(ConfigError, match=r"flags\.yaml"):
        run.run_for(0.0)
    assert run.trainer.step == 10
    flags.write_text(good)
    assert steps(finished(run)) == steps(finished(under(flags)))


@pytest.mark.parametrize("name", ["tamiyo.remote", "tamiyo.learned"])
def test_a_flag_that_the_controller_does_not_heed_is_refused(flags, name):
    for needed in ("kasmina.parallel", "kasmina.lifecycle", name):
        turn(flags, needed, True)
    with pytest.raises(ConfigError, match=f"{name} must be off for 'm'"):
        under(flags)


def test_a_resumed_run_goes_on_under_flags(flags, tmp_path):
    for name in ("kasmina.parallel", "kasmina.lifecycle"):
        turn(flags, name, True)
    whole = finished(under(flags))
    run = under(flags)
    for _ in range(5):
        run.run_for(0.0)
    run.save(tmp_path / "saved")
    again = finished(Trial.resume(tmp_path / "saved"))
    assert again.flags == whole.flags
    assert again.curves["train_loss"] == whole.curves["train_loss"]
    assert again.metrics["train_flops"] == whole.metrics["train_flops"]


def test_environment_and_model_are_those_of_the_settings(flags, monkeypatch):
    change_flag(flags, "kasmina.parallel", {"environments": {"ci": True}}, actor="a", reason="test")
    named = {"file": str(flags), "model": "m", "environment": "ci"}
    assert trial(flags=named)._flags.execution == "vectorised"
    assert under(flags)._flags.execution == "loop"
    monkeypatch.setenv("ESPER_FLAG_KASMINA_PARALLEL", "on")
    assert under(flags)._flags.execution == "vectorised"
