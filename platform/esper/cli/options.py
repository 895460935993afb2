"""Options that several groups of commands have, with their defaults."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.", dir_okay=False)
]
TrackingUri = Annotated[str, typer.Option("--tracking-uri", help="MLflow tracking URI.")]


class ConfigFirst(TyperGroup):
    """A group whose command `run` needs no name: `esper ab CONFIG` is `esper ab run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the command where the user did not."""
        named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if named else ["run", *args])
