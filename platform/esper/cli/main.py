"""The typer application. Commands import what they need when they run: `--help` is instant.

Exit codes: 0 done (whatever the verdict), 1 a check of `doctor` failed or two logs differ, 2 a
wrong command line or configuration, 3 something this command needs is missing or cannot be
reached, 4 trials are missing and the same command continues, 5 the verdict is UNHEALTHY, 130
interrupted.
"""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.errors import explained

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Grow PyTorch networks while they train, and prove that the growth paid off.",
    epilog="Exit codes: 0 done, 1 doctor found a failure or logs differ, 2 wrong command or "
    "configuration, 3 something needed is missing, 4 trials missing (same command continues), "
    "5 verdict UNHEALTHY, 130 interrupted.",
)

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.", dir_okay=False)
]


@app.command()
@explained
def ab(
    config: Annotated[Path, typer.Argument(help="A sweep: configs/sweeps/ab_spirals.yaml.")],
    json_file: JsonOption = None,
) -> None:
    """Run paired arms on Ray Tune, log them to MLflow, and print a verdict.

    The same command continues an interrupted sweep: finished trials are not run again.
    """
    from esper.cli.ab import run_ab

    raise typer.Exit(run_ab(config, json_file))


@app.command()
@explained
def arena(
    config: Annotated[Path, typer.Argument(help="An arena: configs/arenas/growth.yaml.")],
    pairs: Annotated[
        int | None, typer.Option(min=2, max=64, help="Pairs of every task, in place of CONFIG's.")
    ] = None,
    json_file: JsonOption = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Put the report here.", dir_okay=False)
    ] = None,
) -> None:
    """Run methods against each other over tasks, and write one report with every verdict.

    The same command continues an interrupted arena: finished trials are not run again.
    """
    from esper.cli.arena import run_arena_command

    raise typer.Exit(run_arena_command(config, pairs, json_file, html_file))


@app.command()
@explained
def run(
    config: Annotated[
        Path | None, typer.Argument(help="A run, such as configs/runs/spirals.yaml.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed of everything; 0.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder in which the run's state is kept.")
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="Intervals from one checkpoint to the next.")
    ] = 10,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run whose checkpoint is in this folder.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Record of a run whose decisions are taken again.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the trained model and its lattice.")
    ] = None,
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI.")] = "sqlite:///mlflow.db",
    json_file: JsonOption = None,
) -> None:
    """Train one growing network in this process, from its configuration or a checkpoint."""
    if (config is None) == (resume is None):
        raise typer.BadParameter("give either CONFIG or --resume FOLDER.")
    if resume is not None and (seed is not None or replay is not None):
        raise typer.BadParameter("--resume takes seed and decisions from the checkpoint alone.")
    from esper.cli.run import new_trial, resumed_trial, run_once

    if resume is not None:
        trial = resumed_trial(resume)
    else:
        assert config is not None
        trial = new_trial(config, seed or 0, replay)
    run_once(trial, checkpoint or resume, every, save, tracking_uri, json_file)


log = typer.Typer(no_args_is_help=True, help="Decisions of runs: records or checkpoint folders.")
app.add_typer(log, name="log")


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


@app.command()
@explained
def ui(
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI.")] = "sqlite:///mlflow.db",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow's pages on the results."""
    from esper.cli.ui import serve_ui

    serve_ui(tracking_uri, port)


@app.command()
@explained
def doctor(
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI.")] = "sqlite:///mlflow.db",
    json_file: JsonOption = None,
) -> None:
    """Check this installation, and say what to do about each problem."""
    from esper.cli.doctor import doctor_command

    doctor_command(tracking_uri, json_file)
