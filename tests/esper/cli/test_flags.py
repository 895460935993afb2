"""`esper flags` on a copy of the project's own flags."""

import shutil
from pathlib import Path

import pytest
from tests.esper.cli.conftest import esper

from esper.release.flags import load_flags

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path):
    return Path(shutil.copy(ROOT / "configs/flags.yaml", tmp_path / "flags.yaml"))


def flags(command, *arguments, path, env=None):
    return esper("flags", command, *arguments, "--file", path, env=env)


def contents(path):
    return {p.name: p.read_bytes() for p in path.parent.iterdir()}


def test_list_shows_state_owner_and_hash(path):
    done = flags("list", path=path)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["kasmina.parallel", "0", "%", "of", "models", "kasmina,", "until",
                                "2027-06-30"]  # fmt: skip
    assert lines[-1].startswith("flags_hash ")


def test_set_changes_the_answer_and_audit_tells(path):
    done = flags("set", "kasmina.parallel", "--percent", "5", "--allow", "m1", "--block", "m2",
                 "--reason", "canary", "--actor", "ada", path=path)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert (
        "on for m1: ALLOWED"
        in flags("explain", "kasmina.parallel", "--model", "m1", path=path).stdout
    )
    assert (
        "off for m2: BLOCKED"
        in flags("explain", "kasmina.parallel", "--model", "m2", path=path).stdout
    )
    flags("set", "kasmina.parallel", "--unlist", "m1", "--reason", "over", path=path)
    flag = load_flags(path).flags["kasmina.parallel"]
    assert (flag.rollout_bp, flag.allowed, flag.blocked) == (500, (), ("m2",))
    told = flags("audit", path=path)
    assert told.exit_code == 0
    assert "ada set: kasmina.parallel" in told.stdout
    assert told.stdout.endswith("2 records, whole\n")
    assert flags("validate", path=path).exit_code == 0


def test_kill_and_revive(path):
    for word, answer in (("--kill", "KILLED"), ("--revive", "OUT_OF_ROLLOUT")):
        assert flags("set", "tamiyo.remote", word, "--reason", "x", path=path).exit_code == 0
        # its prerequisite is off, but the kill switch is asked first
        said = flags("explain", "kasmina.parallel", "--model", "m", path=path).stdout
        assert "OUT_OF_ROLLOUT" in said
        said = flags("explain", "tamiyo.remote", "--model", "m", path=path).stdout
        assert ("KILLED" if answer == "KILLED" else "PREREQUISITE") in said


def test_explain_says_what_decided(path):
    said = flags("explain", "kasmina.triton", "--model", "m", "--attribute", "device=cpu",
                 path=path, env={"ESPER_FLAG_KASMINA_PARALLEL": "on"}).stdout  # fmt: skip
    assert "off for m: RULE (rules.0)" in said
    assert "needs kasmina.parallel: on (ENVIRONMENT)" in said
    said = flags("explain", "kasmina.parallel", path=path).stdout
    assert "off for no model: NO_MODEL" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kasmina.parallel", "--percent", "101"), "percent must be 0 to 100"),
        (("kasmina.parallel", "--percent", "0.001"), "percent must be 0 to 100"),
        (("kasmina.paralel", "--percent", "1"), "did you mean 'kasmina.parallel'"),
        (("kasmina.parallel", "--on"), "default must be false beside rollout_bp"),
        (("kasmina.parallel", "--allow", "m", "--block", "m"), "'m' is both"),
        (("kasmina.parallel", "--unlist", "m"), "'m' is not"),
        (("kasmina.parallel",), "a change must be asked for"),
    ],
)
def test_a_refused_change_has_a_message_a_code_and_no_effect(path, arguments, message):
    before = contents(path)
    done = flags("set", *arguments, "--reason", "x", path=path)
    assert done.exit_code == 2
    assert message in done.stderr
    assert contents(path) == before


def test_a_reason_must_be_given(path):
    before = contents(path)
    assert flags("set", "kasmina.parallel", "--kill", path=path).exit_code == 2
    done = flags("set", "kasmina.parallel", "--kill", "--reason", " ", path=path)
    assert (done.exit_code, contents(path)) == (2, before)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prerequisites: [kasmina.lifecycle]", "prerequisites: [tamiyo.remote]", "in a circle"),
        ("prerequisites: [kasmina.lifecycle]", "prerequisites: [kasmina.x]", "must be flags"),
        ("rollout_bp: 0", "rollout_bp: 10100", "less than or equal to 10000"),
        ("rollout_bp: 0", "rollout_pb: 0", "did you mean 'rollout_bp'"),
        ("owner: kasmina", "color: kasmina", "owner must be given"),
    ],
)
def test_validate_refuses_a_wrong_file(path, old, new, message):
    path.write_text(path.read_text().replace(old, new, 1))
    done = flags("validate", path=path)
    assert done.exit_code == 2
    assert message in done.stderr


def test_validate_refuses_wrong_variables_and_a_wrong_attribute(path):
    done = flags("validate", path=path, env={"ESPER_FLAG_KASMINA": "on"})
    assert (done.exit_code, "must name a flag" in done.stderr) == (2, True)
    done = flags("explain", "kasmina.triton", "--attribute", "device", path=path)
    assert (done.exit_code, "must be NAME=VALUE" in done.stderr) == (2, True)


def test_an_expired_flag_is_told_with_code_1(path):
    path.write_text(path.read_text().replace("2027-06-30", "2020-01-01", 1))
    done = flags("validate", path=path)
    assert done.exit_code == 1
    assert "release.snapshots expired on 2020-01-01: release removes it" in done.stdout
    assert "EXPIRED" in flags("list", path=path).stdout


def test_a_file_edited_by_hand_must_be_accepted(path):
    flags("set", "kasmina.parallel", "--percent", "5", "--reason", "x", path=path)
    path.write_text(path.read_text().replace("owner: kernels", "owner: others"))
    assert flags("validate", path=path).exit_code == 2
    assert flags("audit", path=path).exit_code == 1
    assert flags("audit", "--accept", "new owner", path=path).exit_code == 0
    assert flags("audit", path=path).exit_code == 0
    assert flags("validate", path=path).exit_code == 0


def test_a_file_that_is_not_there_leaves_nothing_behind(tmp_path):
    done = flags("set", "a", "--kill", "--reason", "x", path=tmp_path / "no.yaml")
    assert done.exit_code == 2
    assert list(tmp_path.iterdir()) == []
