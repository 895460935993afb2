"""`esper status` tells where a sweep stands, and whether it still goes on."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
from tests.esper.cli.conftest import esper

from esper.evidence.progress import FILE, TrialProgress, begin
from esper.evidence.records import write_json

TRIALS = {
    "host-000": TrialProgress(
        arm="host", pair=0, steps=400, interval_steps=50, state="finished", step=400
    ),
    "esper-000": TrialProgress(
        arm="esper", pair=0, steps=400, interval_steps=50, state="running", step=100,
        active_seeds=3, parameters=1234, train_loss=0.25, place="10.0.0.1 pid 7 A100",
    ),
    "host-001": TrialProgress(
        arm="host", pair=1, steps=400, interval_steps=50, state="waiting", failures=1,
        note="RayActorError: the node died",
    ),
    "esper-001": TrialProgress(arm="esper", pair=1, steps=400, interval_steps=50),
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Writes the progress of a sweep that this process drives."""

    def write(folder="spirals-1", **changes):
        progress = begin("spirals", TRIALS).model_copy(
            update={"slots": 2, "gpus": 2.0, "gpus_per_trial": 0.5} | changes
        )
        (tmp_path / folder).mkdir()
        write_json(tmp_path / folder / FILE, progress)
        return progress

    return write


def status(tmp_path, *arguments):
    return esper("status", *arguments, "--runs", tmp_path, env={"COLUMNS": "120"})


def test_a_running_sweep_shows_arms_trials_and_devices(written, tmp_path):
    written()
    done = status(tmp_path)
    assert done.exit_code == 0, done.output
    for words in (
        "1/4 trials", "1 of 2 slots busy", "0.5 of 2 GPUs in use", "2/8", "1,234", "0.25",
        "10.0.0.1 pid 7 A100", "host-001: 1 failures, the last one: RayActorError: the node died",
    ):  # fmt: skip
        assert words in done.stdout


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outcome": "interrupted"}, "goes on where it stopped"),
        ({"pid": dead_pid()}, "goes on where it stopped"),
        ({"host": "elsewhere", "late": 300}, "nothing was heard for 5 min"),
    ],
)
def test_a_sweep_that_does_not_go_on_is_told_by_the_exit_code(written, tmp_path, changes, words):
    if late := changes.pop("late", 0):
        at = begin("spirals", TRIALS).updated_at
        changes["updated_at"] = at - timedelta(seconds=late)
    written(**changes)
    done = status(tmp_path)
    assert done.exit_code == 4
    assert words in done.stderr


def test_nobody_watches_a_dead_driver(written, tmp_path):
    written(pid=dead_pid())
    assert status(tmp_path, "--watch").exit_code == 4


def test_an_ended_sweep_is_no_failure_though_its_driver_is_gone(written, tmp_path):
    written(outcome="ended", pid=dead_pid())
    done = status(tmp_path)
    assert done.exit_code == 0
    assert "ended" in done.stdout


def test_the_latest_sweep_or_the_one_named(written, tmp_path):
    written("first-1", name="first")
    written("second-2", name="second")
    os.utime(tmp_path / "first-1" / FILE, (1, 1))
    assert "second" in status(tmp_path).stdout
    assert "first" in status(tmp_path, "first").stdout
    assert "first" in status(tmp_path, str(tmp_path / "first-1")).stdout


@pytest.mark.parametrize("content", [None, "{", '{"name": "x"}'])
def test_what_is_no_sweep_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / FILE).write_text(content)
    done = status(tmp_path)
    assert done.exit_code == 2
    words = "must have begun there" if content is None else "must be the progress of a sweep"
    assert words in " ".join(done.stderr.split())
