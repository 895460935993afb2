"""Changes keep comments, are all or nothing, and leave a record that shows tampering."""

import hashlib
import json
import multiprocessing
import os

import pytest

from esper.config.base import ConfigError
from esper.release.audit import AuditError, audit_path, read_audit, require_current
from esper.release.change import accept_changes, basis_points, change_flag
from esper.release.errors import ReleaseError, UnknownFlagError
from esper.release.flags import load_flags

FLAG = "kasmina.parallel"


def change(path, fields=None, name=FLAG, **options):
    fields = {"rollout_bp": 500} if fields is None else fields
    return change_flag(path, name, fields, actor="ada", reason="test", **options)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def changed(flags_path):
    """A file with three changes behind it."""
    for bp in (500, 1_000, 2_500):
        change(flags_path, {"rollout_bp": bp})
    return flags_path


def test_a_change_is_one_line_and_keeps_every_comment(flags_path):
    before = flags_path.read_text().splitlines()
    flags_path.chmod(0o640)
    change(flags_path)
    after = flags_path.read_text().splitlines()
    differing = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert [(before[i], after[i]) for i in differing] == [
        ("    rollout_bp: 0", "    rollout_bp: 500")
    ]
    assert flags_path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in flags_path.parent.iterdir() if p.suffix == ".tmp"] == []


def test_fields_come_and_go(flags_path):
    original, before = flags_path.read_text(), load_flags(flags_path)
    change(flags_path, {"allowed": ["a", "b"], "killed": True, "rollout_bp": None, "default": True})
    flag = load_flags(flags_path).flags[FLAG]
    assert (flag.allowed, flag.killed, flag.rollout_bp, flag.default) == (
        ("a", "b"), True, None, True
    )  # fmt: skip
    assert "allowed: [a, b]" in flags_path.read_text()
    change(flags_path, {"allowed": None, "killed": None, "default": None, "rollout_bp": 0})
    # the same lines, comments and blank ones among them, though a field may come back elsewhere
    assert load_flags(flags_path) == before
    assert sorted(flags_path.read_text().splitlines()) == sorted(original.splitlines())


def test_every_change_is_recorded(changed):
    log = read_audit(audit_path(changed))
    assert [(r.number, r.before["rollout_bp"], r.after["rollout_bp"]) for r in log.records] == [
        (1, 0, 500), (2, 500, 1_000), (3, 1_000, 2_500)
    ]  # fmt: skip
    assert {(r.actor, r.action, r.flag, r.reason) for r in log.records} == {
        ("ada", "set", FLAG, "test")
    }
    require_current(log, changed.read_bytes(), changed)


def test_what_changes_nothing_is_not_recorded(changed):
    assert change(changed, {"rollout_bp": 2_500}) is None
    assert len(read_audit(audit_path(changed)).records) == 3


@pytest.mark.parametrize(
    ("fields", "name", "error", "message"),
    [
        ({"rollout_bp": 10_100}, FLAG, ConfigError, "less than or equal to 10000"),
        ({"rollout_bp": -1}, FLAG, ConfigError, "greater than or equal to 0"),
        ({"prerequisites": ["tamiyo.remote"]}, FLAG, ConfigError, "must not run in a circle"),
        ({"prerequisites": ["tamiyo"]}, FLAG, ConfigError, "must be flags, but got 'tamiyo'"),
        ({"default": True}, FLAG, ConfigError, "default must be false beside rollout_bp"),
        ({"owner": None}, FLAG, ConfigError, "owner must be given"),
        ({"colour": "red"}, FLAG, ConfigError, "colour must be a known key"),
        ({"killed": True}, "kasmina.paralel", UnknownFlagError, "did you mean"),
    ],
)
def test_a_refused_change_leaves_the_disk_alone(flags_path, fields, name, error, message):
    before = contents(flags_path.parent)
    with pytest.raises(error, match=message):
        change(flags_path, fields, name)
    assert contents(flags_path.parent) == before


def test_a_broken_file_is_not_changed(flags_path):
    flags_path.write_text("version: 1\nflags: [\n")
    before = contents(flags_path.parent)
    with pytest.raises(ConfigError, match="must be YAML"):
        change(flags_path)
    with pytest.raises(ReleaseError, match="reason must be given"):
        change_flag(flags_path, FLAG, {}, actor="ada", reason=" ")
    assert contents(flags_path.parent) == before


@pytest.mark.parametrize(
    ("percent", "bp"),
    [("0", 0), ("5", 500), ("12.5", 1_250), ("0.01", 1), ("100", 10_000), ("1e1", 1_000)],
)
def test_percent_are_basis_points(percent, bp):
    assert basis_points(percent) == bp


@pytest.mark.parametrize("percent", ["101", "-1", "0.001", "100.01", "five", "", "nan", "inf"])
def test_no_other_percent_is_taken(percent):
    with pytest.raises(ReleaseError, match="percent must be 0 to 100"):
        basis_points(percent)


def edit(number, **fields):
    def apply(lines):
        lines[number] = json.dumps(json.loads(lines[number]) | fields, sort_keys=True)

    return apply


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (edit(0, reason="other"), "line 1, must be as it was written"),
        (edit(1, actor="eve"), "line 2, must be as it was written"),
        (edit(2, after={"rollout_bp": 0}), "line 3, must be as it was written"),
        (edit(1, hash="0" * 64), "line 2, must be as it was written"),
        (edit(1, extra=1), "line 2, must be as it was written"),
        (lambda lines: lines.pop(0), "line 1, must follow"),
        (lambda lines: lines.pop(1), "line 2, must follow"),
        (lambda lines: lines.insert(1, lines[0]), "line 2, must follow"),
        (lambda lines: lines.reverse(), "line 1, must follow"),
        (lambda lines: lines.insert(1, ""), "line 2, must be as it was written"),
        (lambda lines: lines.__setitem__(1, "{"), "line 2, must be as it was written"),
        (lambda lines: lines.__setitem__(1, lines[1] + " "), "line 2, must be as it was written"),
    ],
)
def test_tampering_is_found_and_nothing_is_built_on_it(changed, tamper, message):
    path = audit_path(changed)
    lines = path.read_text().splitlines()
    tamper(lines)
    path.write_text("\n".join(lines) + "\n")
    before = contents(changed.parent)
    with pytest.raises(AuditError, match=message):
        read_audit(path)
    with pytest.raises(AuditError, match=message):
        change(changed)
    assert contents(changed.parent) == before


def test_a_change_with_a_hash_of_its_own_breaks_the_chain(changed):
    path = audit_path(changed)
    lines = path.read_text().splitlines()
    record = json.loads(lines[1]) | {"actor": "eve"}
    del record["hash"]
    record["hash"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    lines[1] = json.dumps(record, sort_keys=True)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(AuditError, match="line 3, must follow"):
        read_audit(path)


def test_a_record_without_its_end_does_not_fit_the_file(changed):
    path = audit_path(changed)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(AuditError, match="must be as the last record left it"):
        require_current(read_audit(path), changed.read_bytes(), changed)


def test_any_torn_last_line_is_taken_away_by_the_next_change(changed):
    path = audit_path(changed)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for torn in (last[:1], last[:10], last[:-1], last[:-1] * 9):
        path.write_bytes(whole + torn)
        log = read_audit(path)
        assert (len(log.records), log.is_torn) == (3, True)
    change(changed, {"rollout_bp": 5_000})
    log = read_audit(path)
    assert (len(log.records), log.is_torn) == (4, False)
    assert path.read_bytes().startswith(whole)


def test_a_change_by_hand_must_be_accepted_first(changed):
    changed.write_text(changed.read_text().replace("owner: kernels", "owner: someone"))
    with pytest.raises(AuditError, match="esper flags audit --accept"):
        change(changed, {"rollout_bp": 0})
    accepted = accept_changes(changed, actor="ada", reason="a new owner")
    assert (accepted.number, accepted.action, accepted.flag) == (4, "accept", None)
    assert accept_changes(changed, actor="ada", reason="again") is None
    change(changed, {"rollout_bp": 0})


def test_a_recorded_change_that_was_never_made_is_abandoned(changed):
    """The process died between record and file."""
    before = changed.read_bytes()
    change(changed, {"rollout_bp": 10_000})
    changed.write_bytes(before)
    change(changed, {"rollout_bp": 5_000})
    records = read_audit(audit_path(changed)).records
    assert [r.action for r in records[3:]] == ["set", "abandoned", "set"]
    assert load_flags(changed).flags[FLAG].rollout_bp == 5_000
    require_current(read_audit(audit_path(changed)), changed.read_bytes(), changed)


def test_a_rollback_waits_for_nobody(changed):
    changed.write_text(changed.read_text().replace("owner: kernels", "owner: someone"))
    change(changed, {"rollout_bp": 0}, action="rollback", at_once=True)
    assert load_flags(changed).flags[FLAG].rollout_bp == 0
    records = read_audit(audit_path(changed)).records
    assert [r.action for r in records[3:]] == ["accept", "rollback"]
    path = audit_path(changed)
    path.write_text(path.read_text().replace("ada", "eve"))
    with pytest.raises(
        AuditError, match=r"kasmina\.parallel was changed, but could not be recorded"
    ):
        change(changed, {"rollout_bp": 1}, action="rollback", at_once=True)
    assert load_flags(changed).flags[FLAG].rollout_bp == 1


def _add_model(path, number):
    for i in range(5):
        change(path, {"salt": f"{number}-{i}"})


def test_changes_at_the_same_time_take_turns(flags_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_model, args=(flags_path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    log = read_audit(audit_path(flags_path))
    assert len(log.records) == 15
    require_current(log, flags_path.read_bytes(), flags_path)


def test_a_link_is_followed(flags_path, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "flags.yaml"
    os.symlink(flags_path, link)
    change(link)
    assert link.is_symlink()
    assert load_flags(flags_path).flags[FLAG].rollout_bp == 500
    assert audit_path(flags_path).exists()
