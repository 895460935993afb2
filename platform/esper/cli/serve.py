"""`esper serve`: Tamiyo over HTTP, from this machine."""

import os
import sys
from pathlib import Path
from typing import cast

from rich.console import Console


def serve(config: Path, *, check_only: bool) -> None:
    """Check a configuration, say where the service will be, and become it."""
    console = Console()
    console.print(f"checking {config} ...", soft_wrap=True)
    from esper_serve.launch import become_service, check

    found = check(config)
    who = ", ".join(f"{token.name} ({token.role})" for token in found.tokens)
    console.print(
        f"Tamiyo at {found.url}, described at {found.url}/docs\n"
        f"policies {', '.join(found.settings.policies)}; active: {found.policy}\n"
        f"tokens of {who}\n"
        f"data in {found.settings.database_url.rpartition('@')[2]}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if check_only:
        return
    console.print("starting, about 10 s; Ctrl-C ends it ...")
    sys.stdout.flush()
    become_service(config, os.environ)


def make_token(name: str, role: str, home: Path) -> None:
    """Make a token, and print it alone on standard output."""
    from esper.config.base import ConfigError
    from esper_serve.tokens import Role, add_token

    if role not in ("client", "admin"):
        raise ConfigError("--role", (f"the role must be client or admin, but got '{role}'.",))
    file = home.expanduser() / "tokens.yaml"
    secret = add_token(file, name, cast(Role, role))
    print(
        f"{file} has its hash; the token itself is shown this once. Replicas that run already "
        "know it after a restart.",
        file=sys.stderr,
    )
    print(secret)
