"""What is typed for machines: `doctor` here, `submit` on a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.errors import explained
from esper.cli.options import ConfigFirst, JsonOption, TrackingUri
from esper.cli.output import begin
from esper.config.defaults import DASHBOARD, RESULTS, TRACKING_URI


@explained
def doctor(
    tracking_uri: TrackingUri = TRACKING_URI,
    json_file: JsonOption = None,
) -> None:
    """Check this installation, and say what to do about each problem."""
    begin("checking this machine; starting Ray takes most of the ten seconds")
    from esper.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(tracking_uri, json_file))


submission = typer.Typer(
    cls=ConfigFirst, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND [ARGS]...",
    help="Jobs on a Ray cluster: [bold]esper submit CONFIG[/] runs a configuration there.",
)  # fmt: skip
Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard."),
]


@submission.command("run")
@explained
def submit_config(
    config: Annotated[
        Path, typer.Argument(help="A sweep, an arena, a search, a run or a baseline.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- OPTIONS", help="After --: options of the esper command, such as --seed 3."
        ),
    ] = None,
    address: Address = DASHBOARD,
    results: Annotated[
        str, typer.Option(help="Folder on the cluster that all its nodes see.")
    ] = RESULTS,
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="MLflow's, as seen from the cluster; none: the configuration's."),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option("--with", help="A file or folder to upload, too; may be repeated."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log until the job ends.")
    ] = True,
) -> None:
    """Upload a configuration with this code, run it on the cluster, and follow its log.

    Its name may be left out. The exit code is the job's. Ctrl-C detaches, and the job goes on. The
    same command continues what a job left unfinished.
    """
    from esper.cli.submit import submit

    code = submit(config, address, results, tracking_uri, also or (), wait, arguments or ())
    raise typer.Exit(code)


JobName = Annotated[str, typer.Argument(metavar="JOB", help="As `esper submit` named it.")]


@submission.command("status")
@explained
def submitted_status(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="None: list them.")] = None,
    address: Address = DASHBOARD,
) -> None:
    """Print the cluster's jobs, or one; the exit code is that of a job which has ended."""
    from esper.cli.submit import show_status

    raise typer.Exit(show_status(address, job))


@submission.command("logs")
@explained
def submitted_logs(job: JobName, address: Address = DASHBOARD) -> None:
    """Follow a job's log from its beginning until it ends; the exit code is the job's."""
    from esper.cli.submit import show_logs

    raise typer.Exit(show_logs(address, job))


@submission.command("stop")
@explained
def stop_submitted(job: JobName, address: Address = DASHBOARD) -> None:
    """End a job; what it had finished stays, and the same submission continues."""
    from esper.cli.submit import stop

    raise typer.Exit(stop(address, job))
