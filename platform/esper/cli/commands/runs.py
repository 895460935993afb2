"""What is typed for single runs: `run`, `log`, and `ui`, which shows the results of all."""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.errors import explained
from esper.cli.options import JsonOption, TrackingUri
from esper.cli.output import begin
from esper.config.defaults import TRACKING_URI


@explained
def run(
    config: Annotated[
        Path | None, typer.Argument(help="A run, such as configs/runs/spirals.yaml.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed of everything; 0.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Where the run's state is kept: a folder, or s3://BUCKET/NAME."),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="Intervals from one checkpoint to the next.")
    ] = 10,
    resume: Annotated[
        str | None, typer.Option(help="Go on with the run whose checkpoint is there.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Record of a run whose decisions are taken again.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the trained model and its lattice.")
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Ray actors that train, each with its part of a batch; none."),
    ] = None,
    parallel: Annotated[
        str,
        typer.Option(
            metavar="[data|seed]",
            help="What actors share: the samples of a batch, or the seeds of each site.",
        ),
    ] = "data",
    on_loss: Annotated[
        str,
        typer.Option(
            metavar="[retry|shrink|fail]",
            help="When an actor is lost: go on with new ones, with fewer if need be, or not "
            "(nor when a checkpoint cannot be written).",
        ),
    ] = "retry",
    retries: Annotated[
        int, typer.Option(min=0, help="Times the run goes on when an actor is lost.")
    ] = 2,
    wait_s: Annotated[
        float, typer.Option(help="Seconds that new actors wait for the room of those lost.")
    ] = 60.0,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Serve metrics for Prometheus here.")
    ] = None,
    tracking_uri: TrackingUri = TRACKING_URI,
    json_file: JsonOption = None,
) -> None:
    """Train one growing network, from its configuration or a checkpoint.

    In this process; with --shards in actors, and then a lost one is replaced and the run goes on
    from its last checkpoint.
    """
    if (config is None) == (resume is None):
        raise typer.BadParameter("give either CONFIG or --resume FOLDER.")
    if resume is not None and (seed is not None or replay is not None):
        raise typer.BadParameter("--resume takes seed and decisions from the checkpoint alone.")
    if shards is None and parallel != "data":
        raise typer.BadParameter("--parallel says what actors share; give --shards N, too.")
    begin("building the task and the model")
    from esper.cli.run import new_trial, resumed_trial, run_once, shards_of
    from esper.config.base import validate
    from esper.config.shards import ShardsConfig

    options = {
        "count": shards,
        "parallel": parallel,
        "on_loss": on_loss,
        "retries": retries,
        "wait_s": wait_s,
    }
    sharding = None if shards is None else validate(ShardsConfig, options, source="esper run")
    with shards_of(sharding) as (made, again):
        if resume is not None:
            trial = resumed_trial(resume, made)
        else:
            assert config is not None
            trial = new_trial(config, seed or 0, replay, made)
        times = 0 if sharding is None else sharding.times
        run_once(
            trial, checkpoint or resume, every, save, tracking_uri, json_file, times, again,
            goes_on=on_loss != "fail", metrics_port=metrics_port,
        )  # fmt: skip


log = typer.Typer(no_args_is_help=True, help="Decisions of runs: records or checkpoint folders.")


@log.command()
@explained
def show(
    run: Annotated[Path, typer.Argument(help="Record of a trial, or folder of a checkpoint.")],
) -> None:
    """Print every decision of a run with its reason."""
    from esper.cli.log import show

    show(run)


@log.command()
@explained
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Record or checkpoint folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
) -> None:
    """Print where the decisions of two runs part; exit code 0 if nowhere, else 1."""
    from esper.cli.log import diff

    raise typer.Exit(0 if diff(first, second) else 1)


@explained
def ui(
    tracking_uri: TrackingUri = TRACKING_URI,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow's pages on the results."""
    from esper.cli.ui import serve_ui

    serve_ui(tracking_uri, port)
