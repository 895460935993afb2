"""What is typed for experiments: `ab`, `arena`, `tune` and `status`."""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.errors import explained
from esper.cli.options import ConfigFirst, JsonOption

ab = typer.Typer(
    cls=ConfigFirst, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND [ARGS]...",
    help="Paired arms and a verdict: [bold]esper ab CONFIG[/] runs a sweep.",
)  # fmt: skip


@ab.command("run")
@explained
def run_ab(
    config: Annotated[Path, typer.Argument(help="A sweep: configs/sweeps/ab_spirals.yaml.")],
    json_file: JsonOption = None,
) -> None:
    """Run paired arms on Ray Tune, log them to MLflow, and print a verdict.

    Its name may be left out. The same command continues an interrupted sweep: finished trials
    are not run again.
    """
    from esper.cli.ab import run_ab

    raise typer.Exit(run_ab(config, json_file))


RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder of all sweeps.", file_okay=False)]
RUNS = Path("runs")


@ab.command("verify")
@explained
def verify_ab(
    sweep: Annotated[
        str,
        typer.Argument(help="A finished sweep: its folder, the folder's name, or its hash."),
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="Its file, if it was stored without config.json and SHA256SUMS."),
    ] = None,
    runs: RunsFolder = RUNS,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="If verified and healthy, write here how often each arm won over each other one, "
            "for `esper gate --measured`.",
            dir_okay=False,
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Judge a finished sweep again from its stored records, and compare bit for bit.

    Exit code 1 if a verdict, a record or the registration is not what it was.
    """
    from esper.cli.stored_sweeps import verify_ab

    raise typer.Exit(verify_ab(sweep, config, runs, json_file, measured))


@ab.command("similarity")
@explained
def similarity_ab(
    sweep: Annotated[
        str,
        typer.Argument(help="A finished sweep whose run sets `kept_outputs`; as for verify."),
    ],
    noise: Annotated[
        str | None,
        typer.Option(help="The arm that is the control once more: its own noise."),
    ] = None,
    runs: RunsFolder = RUNS,
    json_file: JsonOption = None,
) -> None:
    """Say how alike the trained networks of treatment and control are: outputs and losses."""
    from esper.cli.stored_sweeps import similarity_ab

    similarity_ab(sweep, noise, runs, json_file)


@ab.command("plan")
@explained
def plan_ab(
    effect: Annotated[
        float | None, typer.Option(help="Mean gain to be found, in units of the metric.")
    ] = None,
    sd: Annotated[
        float | None, typer.Option(help="Standard deviation of the paired differences.")
    ] = None,
    margin: Annotated[float | None, typer.Option(help="Equivalence margin.")] = None,
    power: Annotated[float, typer.Option(help="Chance of finding what is there.")] = 0.9,
    pilot: Annotated[
        str | None,
        typer.Option("--from", help="A finished sweep to take these and the guardrails from."),
    ] = None,
    runs: RunsFolder = RUNS,
    json_file: JsonOption = None,
) -> None:
    """Say how many pairs an effect needs, and what numbers of pairs can see."""
    from esper.cli.stored_sweeps import plan_ab

    plan_ab(effect, sd, margin, power, pilot, runs, json_file)


@explained
def arena(
    config: Annotated[Path, typer.Argument(help="An arena: configs/arenas/growth.yaml.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Only this task; may be given more than once.")
    ] = None,
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

    raise typer.Exit(run_arena_command(config, task or [], pairs, json_file, html_file))


@explained
def tune(
    config: Annotated[Path, typer.Argument(help="A search: configs/tune/spirals.yaml.")],
    search_only: Annotated[
        bool, typer.Option("--search-only", help="Do not test what was found.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Search for better growth settings at a fixed budget, then test the best in fresh pairs.

    The same command continues an interrupted search or test.
    """
    from esper.cli.tune import run_tune

    raise typer.Exit(run_tune(config, search_only, json_file))


@explained
def status(
    sweep: Annotated[
        str | None,
        typer.Argument(
            metavar="SWEEP", help="Its folder, or the beginning of its name; none: the latest."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of sweeps.")] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", help="Until it ends.")] = False,
) -> None:
    """Show where a sweep stands; exit code 4 if it was interrupted."""
    from esper.cli.status import show_status

    raise typer.Exit(show_status(sweep, runs, watch))
