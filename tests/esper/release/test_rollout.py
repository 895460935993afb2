"""A rollout moves its flag as the judge says, survives a crash, and can be judged again."""

import json
import math
import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from tests.esper.release.conftest import copy_migration

from esper.release import rollout as rollouts
from esper.release.audit import audit_path, read_audit, require_current
from esper.release.change import change_flag
from esper.release.errors import ReleaseError
from esper.release.flags import load_flags
from esper.release.judge import Decision, IntervalMeasurements, PhaseMeasurements, Series
from esper.release.phases import Quantity, load_migration
from esper.release.rollout import (
    create,
    flags_hash,
    new_plan,
    read,
    read_measured,
    rejudge,
    state_of,
    step,
)

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
FLAG = "kasmina.parallel"


def fail():
    raise OSError("disk is full")


class World:
    """A migration of its own, with one rollout of phase 1."""

    def __init__(self, folder):
        self.config = copy_migration(folder)
        self.flags, self.folder = folder / "flags.yaml", folder / "runs" / "first"
        self.file, self.rng = folder / "evidence.json", np.random.default_rng(5)
        self.plan = new_plan(
            load_migration(self.config), 1, self.folder, environment=None, actor="ada", now=NOW
        )
        create(self.folder, self.plan)

    @property
    def share_bp(self):
        return load_flags(self.flags).flags[FLAG].rollout_bp

    @property
    def state(self):
        stored = read(self.folder)
        return state_of(stored.plan, stored.entries)

    def targets(self, **changed):
        values = {"<": 50.0, ">=": 2_000.0}
        quantities = {
            a.metric: Quantity(value=values.get(a.comparison, a.value), unit=a.unit)
            for a in self.plan.conditions
        }
        return PhaseMeasurements(commit=None, ended_at=NOW, quantities=quantities | changed)

    def interval(self, *, slower=1.0, **changed):
        pairs = {}
        for guard in self.plan.policy.guards:
            noise = self.rng.normal(0, guard.pair_sd, self.plan.policy.min_pairs)
            old = np.full(noise.shape, 10.0)
            new = old * np.exp(noise) if guard.compare == "ratio" else old + noise
            if guard.metric == "latency_p50_ms":
                new = new * slower
            if guard.metric == "error_percent":
                new = old = np.zeros(noise.shape)
            pairs[guard.metric] = Series(unit=guard.unit, treatment=new.tolist(),
                                         control=old.tolist())  # fmt: skip
        fields = {
            "rollout": "first",
            "step": max(1, self.state.step),
            "flags_hash": flags_hash(read(self.folder)),
            "started_at": NOW - timedelta(seconds=900),
            "ended_at": NOW,
            "pairs": pairs,
            "gauges": {a.metric: Quantity(value=0, unit=a.unit) for a in self.plan.alerts},
        }
        return IntervalMeasurements(**fields | changed)

    def step(self, record):
        self.file.write_text(record.model_dump_json())
        return step(self.folder, [self.file], actor="ada", now=NOW).verdict.decision

    def disk(self):
        files = [self.flags, audit_path(self.flags), *self.folder.iterdir()]
        return {p.name: p.read_bytes() for p in files if p.exists()}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def running(world):
    assert world.step(world.targets()) == Decision.ADVANCE
    return world


def test_a_healthy_rollout_reaches_everybody(world):
    assert world.share_bp == 0
    assert world.step(world.targets()) == Decision.ADVANCE
    seen = [world.share_bp]
    while not world.state.is_over:
        assert world.step(world.interval()) == Decision.ADVANCE
        seen.append(world.share_bp)
    assert seen == [500, 1_000, 2_500, 5_000, 10_000, 10_000]
    log = read_audit(audit_path(world.flags))
    assert [r.action for r in log.records] == ["advance"] * 5
    require_current(log, world.flags.read_bytes(), world.flags)
    with pytest.raises(ReleaseError, match="must be a running rollout, but it is over"):
        world.step(world.interval())


def test_harm_sets_the_flag_back_at_once_with_a_record(running):
    running.step(running.interval())
    assert running.share_bp == 1_000
    assert running.step(running.interval(slower=1.05)) == Decision.ROLLBACK
    assert running.share_bp == 0
    assert running.state.is_over
    last = read_audit(audit_path(running.flags)).records[-1]
    assert (last.action, last.flag) == ("rollback", FLAG)
    assert "latency_p50_ms is worse by more than its margin" in last.reason
    with pytest.raises(ReleaseError, match="it is over"):
        running.step(running.interval())


def test_a_rollout_does_not_begin_before_its_targets_are_met(world):
    slow = world.targets(forward_p50_ms=Quantity(value=120, unit="ms"))
    assert world.step(slow) == Decision.HOLD
    unknown = world.targets(forward_p50_ms=Quantity(value=math.nan, unit="ms"))
    assert world.step(unknown) == Decision.INCONCLUSIVE
    assert (world.share_bp, world.state.step) == (0, 0)
    assert not audit_path(world.flags).exists()
    assert world.step(world.targets()) == Decision.ADVANCE


def test_nothing_moves_without_evidence(running):
    for changed in (
        {"pairs": {}},
        {"flags_hash": "0" * 64},
        {"rollout": "other"},
        {"step": 2},
        {"ended_at": NOW - timedelta(hours=2), "started_at": NOW - timedelta(hours=3)},
        {"gauges": {}},
    ):
        assert running.step(running.interval(**changed)) == Decision.INCONCLUSIVE
        assert running.share_bp == 500
    assert running.state.intervals == 6


def test_every_verdict_is_judged_again_identically(running):
    running.step(running.interval())
    running.step(running.interval(gauges={}))
    running.step(running.interval(slower=1.05))
    stored = read(running.folder)
    assert len(stored.entries) == 4
    for entry in stored.entries:
        assert rejudge(stored.plan, entry).model_dump_json() == entry.verdict.model_dump_json()


def test_other_evidence_gives_another_verdict(running):
    running.step(running.interval())
    stored = read(running.folder)
    entry = stored.entries[-1]
    pairs = entry.evidence.measurements.pairs
    series = pairs["latency_p50_ms"]
    worse = series.model_copy(update={"treatment": tuple(1.06 * v for v in series.treatment)})
    measured = entry.evidence.measurements.model_copy(
        update={"pairs": pairs | {"latency_p50_ms": worse}}
    )
    changed = entry.model_copy(
        update={"evidence": entry.evidence.model_copy(update={"measurements": measured})}
    )
    assert rejudge(stored.plan, changed).decision == Decision.ROLLBACK


@pytest.mark.parametrize("name", ["plan.json", "001.json", "002.json"])
def test_a_changed_file_is_found(running, name):
    for _ in range(2):
        running.step(running.interval())
    path = running.folder / name
    path.write_text(path.read_text().replace('"ada"', '"eve"').replace("ADVANCE", "HOLD"))
    before = running.disk()
    with pytest.raises(ReleaseError, match="must follow the file before it"):
        running.step(running.interval())
    assert running.disk() == before


def test_a_missing_file_is_found(running):
    for _ in range(2):
        running.step(running.interval())
    (running.folder / "002.json").unlink()
    with pytest.raises(ReleaseError, match="must follow the file before it"):
        read(running.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be IntervalMeasurements as JSON"),
        ("{}", "rollout: Field required"),
        (None, "must be readable"),
        ('{"extra": 1}', "as JSON"),
    ],
)
def test_what_is_no_evidence_changes_nothing(running, content, message):
    before = running.disk()
    running.file.unlink()
    if content is not None:
        running.file.write_text(content)
    with pytest.raises(ReleaseError, match=message):
        step(running.folder, [running.file], actor="ada", now=NOW)
    assert running.disk() == before


def test_what_several_tools_measured_is_joined(world, tmp_path):
    whole = world.targets().model_copy(update={"commit": "c" * 40})
    names = list(whole.quantities)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]

    def write(i, **changed):
        own = {n: whole.quantities[n] for n in names[i::2]}
        part = whole.model_copy(update={"quantities": own} | changed)
        paths[i].write_text(part.model_dump_json())

    before = whole.ended_at - timedelta(hours=1)
    write(0, ended_at=before)
    write(1)
    joined = read_measured(paths)
    assert joined.quantities == whole.quantities
    assert joined.ended_at == before
    write(1, quantities=whole.quantities)
    with pytest.raises(ReleaseError, match=f"measured once, but .*b.json holds .*{names[0]}"):
        read_measured(paths)
    write(1, commit="d" * 40)
    with pytest.raises(ReleaseError, match="must be of one known commit"):
        step(world.folder, paths, actor="ada", now=NOW)
    write(1)
    assert step(world.folder, paths, actor="ada", now=NOW).verdict.decision == Decision.ADVANCE


def test_evidence_without_a_time_zone_is_refused(running):
    record = json.loads(running.interval().model_dump_json()) | {"ended_at": "2026-11-23T12:00:00"}
    running.file.write_text(json.dumps(record))
    with pytest.raises(ReleaseError, match="timezone"):
        step(running.folder, [running.file], actor="ada", now=NOW)


def test_a_flag_that_somebody_moved_stops_the_rollout(running):
    change_flag(running.flags, FLAG, {"rollout_bp": 7_000}, actor="eve", reason="impatience")
    before = running.disk()
    with pytest.raises(ReleaseError, match="must be at 500 basis points"):
        running.step(running.interval())
    assert running.disk() == before
    change_flag(running.flags, FLAG, {"rollout_bp": 500}, actor="eve", reason="sorry")
    change_flag(running.flags, FLAG, {"killed": True}, actor="eve", reason="fire")
    with pytest.raises(ReleaseError, match="neither killed nor on"):
        running.step(running.interval())


def test_an_advance_that_a_crash_cut_short_is_finished(running, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(rollouts, "change_flag", lambda *a, **k: fail())
        with pytest.raises(OSError, match="disk is full"):
            running.step(running.interval())
    assert (running.share_bp, running.state.share_bp) == (500, 1_000)
    # measured under 5 %, so that it says nothing of 10 %
    assert running.step(running.interval()) == Decision.INCONCLUSIVE
    assert running.share_bp == 1_000
    assert running.step(running.interval()) == Decision.ADVANCE


def test_a_rollback_comes_before_its_entry(running, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(rollouts, "write_json", lambda *a: fail())
        with pytest.raises(OSError, match="disk is full"):
            running.step(running.interval(slower=1.05))
    assert running.share_bp == 0


def planned(world, phase, name, environment=None):
    folder = world.folder.with_name(name)
    plan = new_plan(load_migration(world.config), phase, folder, environment=environment,
                    actor="ada", now=NOW)  # fmt: skip
    create(folder, plan)
    return folder, plan


def test_a_flag_that_is_on_already_cannot_be_rolled_out(world):
    with pytest.raises(ReleaseError, match="must be a new folder"):
        create(world.folder, world.plan)
    change_flag(world.flags, FLAG, {"rollout_bp": 500}, actor="ada", reason="x")
    with pytest.raises(ReleaseError, match="must be below its canary of 500"):
        planned(world, 1, "second")


def test_what_a_flag_needs_must_be_on_for_everybody(world):
    with pytest.raises(ReleaseError, match=r"kasmina\.parallel must be on for every model"):
        planned(world, 2, "second")
    change_flag(world.flags, FLAG, {"rollout_bp": 10_000}, actor="ada", reason="x")
    assert planned(world, 2, "second")[1].flag == "kasmina.lifecycle"


def test_a_rollout_may_be_moved_with_its_flags(running, tmp_path):
    shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    running.flags.unlink()
    stored = read(tmp_path.with_name("elsewhere") / "runs" / "first")
    assert len(flags_hash(stored)) == 64


def test_a_flag_without_a_share_gets_none_back(world):
    change_flag(world.flags, FLAG, {"rollout_bp": None}, actor="ada", reason="x")
    world.folder, world.plan = planned(world, 1, "second", "ci")
    assert world.step(world.targets()) == Decision.ADVANCE
    assert world.share_bp == 500
    assert world.step(world.interval(slower=1.05, rollout="second")) == Decision.ROLLBACK
    assert world.share_bp is None
