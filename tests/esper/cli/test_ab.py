"""`esper ab` and its commands: what is run without a name, exit codes and messages."""

import pytest
from typer.testing import CliRunner

from esper.cli.main import app


def esper(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    "arguments", [("nowhere.yaml",), ("--json", "x.json", "nowhere.yaml"), ("run", "nowhere.yaml")]
)
def test_a_sweep_is_run_with_and_without_the_name_of_the_command(arguments):
    done = esper("ab", *arguments)
    assert done.exit_code == 2
    assert "nowhere.yaml is not valid" in done.stderr


def test_help_shows_both_forms():
    done = esper("ab", "--help")
    assert done.exit_code == 0
    for word in ("CONFIG | COMMAND", "run", "verify"):
        assert word in done.stdout
