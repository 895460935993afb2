"""What is typed for Tamiyo's service and its policies: `serve` and `policy`."""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.errors import explained
from esper.cli.options import ConfigFirst, TrackingUri
from esper.cli.output import begin
from esper.config.defaults import TRACKING_URI

serve = typer.Typer(
    cls=ConfigFirst, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND [ARGS]...",
    help="Tamiyo over HTTP: [bold]esper serve CONFIG[/] runs the service on this machine.",
)  # fmt: skip


@serve.command("run")
@explained
def run_serve(
    config: Annotated[
        Path, typer.Argument(help="Ray Serve's configuration: configs/serve/tamiyo.yaml.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Check everything, start nothing.")
    ] = False,
) -> None:
    """Run the service until Ctrl-C; its name may be left out.

    Before anything starts, the settings, policies, tokens, database and port are looked at. On a
    running Ray cluster use [bold]serve deploy CONFIG[/].
    """
    from esper.cli.serve import serve

    serve(config, check_only=check)


@serve.command("token")
@explained
def token_serve(
    name: Annotated[str, typer.Argument(help="Who will have it.")],
    role: Annotated[
        str, typer.Option(metavar="[client|admin]", help="Ask for decisions, or activate policies.")
    ] = "client",
    home: Annotated[
        Path, typer.Option(help="Folder `home` of the service's settings.", file_okay=False)
    ] = Path("~/.esper/serve"),
) -> None:
    """Make a token, and print it once; only its hash is kept."""
    from esper.cli.serve import make_token

    make_token(name, role, home)


policy = typer.Typer(
    no_args_is_help=True, help="Policies that learn from field reports where and what to grow."
)
Reports = Annotated[
    list[str],
    typer.Option("--reports", help="SQLAlchemy URL of field reports; may be given repeatedly."),
]
Explore = Annotated[
    float, typer.Option("--explore", min=0, max=1, help="The controller's explore_frac.")
]


@policy.command("train")
@explained
def train(
    reports: Reports,
    out: Annotated[Path, typer.Option("--out", help="File of the policy.", dir_okay=False)],
    explore: Explore = 0.1,
    register: Annotated[
        bool, typer.Option("--register", help="Add it to MLflow's registry as the challenger.")
    ] = False,
    tracking_uri: TrackingUri = TRACKING_URI,
) -> None:
    """Learn from field reports, and say what the policy would have gained in their runs."""
    begin("reading field reports")
    from esper.cli.policy import train_policy

    train_policy(reports, out, explore, register, tracking_uri)


@policy.command("evaluate")
@explained
def evaluate(
    model: Annotated[str, typer.Argument(help="File of a policy, or a models:/ URI.")],
    reports: Reports,
    explore: Explore = 0.1,
) -> None:
    """Say how well a policy predicts other field reports, and what such policies gain there."""
    begin("reading field reports")
    from esper.cli.policy import evaluate_policy

    evaluate_policy(reports, model, explore)


@policy.command("promote")
@explained
def promote(
    version: Annotated[int, typer.Argument(min=1, help="Version in MLflow's registry.")],
    tracking_uri: TrackingUri = TRACKING_URI,
) -> None:
    """Make a registered policy the champion."""
    from esper.cli.policy import promote_policy

    promote_policy(version, tracking_uri)
