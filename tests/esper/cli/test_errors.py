"""What a user did wrong, and a reader that went away, end in a message or nothing: no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tests.esper.cli.conftest import CLI, esper

from esper.cli.errors import explained
from esper.config.base import ConfigError
from esper.evidence.records import EvidenceError

ROOT = Path(__file__).parents[3]


def code_of(error):
    def fails():
        raise error

    with pytest.raises(typer.Exit) as ended:
        explained(fails)()
    return ended.value.exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a.yaml", ("it must be right.",)), 2),
        (EvidenceError("damaged"), 2),
        (FileNotFoundError(2, "No such file", "a"), 3),
        (IsADirectoryError(21, "Is a directory", "a"), 3),
        (OSError(28, "No space left on device"), 3),
        (BrokenPipeError(32, "Broken pipe"), 3),  # of a server: what we print is read
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_that_a_user_can_act_on_is_a_line_and_a_code(error, code, capsys):
    assert code_of(error) == code
    (line, *_) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") or code == 130


def test_our_own_mistakes_keep_their_traceback():
    def fails():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        explained(fails)()


def unread(*command, **env):
    """Exit code and errors of a command whose output nobody reads."""
    env = {**os.environ, "PYTHONUNBUFFERED": ""} | env
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    return process.returncode, errors


@pytest.mark.parametrize(
    "arguments",
    [("flags", "list"), ("flags", "explain", "kasmina.parallel"), ("config", "explain", "flags")],
)
def test_a_command_that_was_done_before_its_reader_went_away_is_done(arguments):
    assert unread(*CLI, *arguments) == (0, "")


def test_a_command_that_was_not_done_when_its_reader_went_away_says_so_by_its_code():
    script = "from esper.cli.errors import explained; explained(lambda: print('x' * 10**6))()"
    code, errors = unread(sys.executable, "-c", script)
    # `Exit` is typer's to handle
    assert (code, errors.splitlines()[-1].endswith("Exit: 141")) == (1, True), errors
    assert unread(*CLI, "flags", "list", PYTHONUNBUFFERED="1") == (141, "")


def test_a_result_that_finds_no_room_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*CLI, "flags", "list"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (3, "error: [Errno 28] No space left on device\n")


def test_help_that_is_not_read_ends_without_a_traceback():
    assert unread(*CLI, "--help")[1] == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "{sweep}"), 2, "its command is: esper ab {sweep}"),
        (("ab", "{run}"), 2, "its command is: esper run {run}"),
        (("tune", "{run}"), 2, "its command is: esper run {run}"),
        (("run", "{run}", "--replay", "{folder}"), 3, "Is a directory: '{folder}'"),
        (("log", "show", "{folder}/nothing"), 3, "No such file or directory"),
    ],
)
def test_the_wrong_file_is_told(arguments, code, message, tmp_path):
    names = {
        "sweep": ROOT / "configs/sweeps/ab_spirals.yaml",
        "run": ROOT / "configs/runs/spirals.yaml",
        "folder": tmp_path,
    }
    done = esper(*(a.format(**names) for a in arguments))
    assert done.exit_code == code, done.output
    assert message.format(**names) in done.stderr
