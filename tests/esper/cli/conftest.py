"""How the tests type a command: in this process, or in one of its own."""

import subprocess
import sys

from typer.testing import CliRunner

from esper.cli.main import app

CLI = [sys.executable, "-c", "from esper_experiments.entry import main; main()"]


def esper(*arguments, env=None):
    """The result of a command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env=env)


def esper_process(*arguments, cwd):
    """The result of a command in a process of its own, as a user gets it."""
    return subprocess.run(
        [*CLI, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
