"""What is typed to move from one implementation to the next, and to show that one may.

`regress`, `baseline`, `flags`, `rollout`, `gate`, `config`, and `monitoring` of all that.
"""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.errors import explained
from esper.cli.output import begin


@explained
def regress(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer generated cases and pairs, for every push.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the numerics are computed.")] = "cpu",
    only: Annotated[
        list[str] | None, typer.Option(help="Run this check alone; may be repeated.")
    ] = None,
    report: Annotated[
        Path, typer.Option(help="JSON that gates read; the text is put beside it.", dir_okay=False)
    ] = Path("runs/regress.json"),
) -> None:
    """Hold the legacy way to compute against those that replace it; exit code 1 if any fails."""
    begin("loading; a line for each check that has ended")
    from esper.cli.regress import regress

    raise typer.Exit(0 if regress(quick, device, only or [], report) else 1)


baseline = typer.Typer(
    no_args_is_help=True, help="What the implementations cost: latency, memory, energy, seeds."
)
TargetsFile = Annotated[
    Path | None,
    typer.Option("--targets", help="Phases whose targets are held against it.", dir_okay=False),
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="Also write the report: FILE.html or FILE.md.", dir_okay=False),
]
StoredBaseline = Annotated[Path, typer.Argument(help="baseline.json, or its folder.")]


@baseline.command("run")
@explained
def run_baseline(
    config: Annotated[Path, typer.Argument(help="Such as configs/baselines/phase0_cpu.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.", file_okay=False)],
    targets: TargetsFile = None,
    commit: Annotated[
        str | None, typer.Option(help="Of the code, where there is no checkout to ask.")
    ] = None,
) -> None:
    """Measure blocks of fresh processes in random order, store them, and print the report.

    The same command continues an interrupted baseline. Exit code 5 if it is UNHEALTHY.
    """
    begin("measuring in fresh processes; a line for each block that has ended")
    from esper.cli.baseline import run_baseline

    raise typer.Exit(run_baseline(config, out, targets, commit))


@baseline.command("compare")
@explained
def compare_baselines(
    before: Annotated[Path, typer.Argument(metavar="A", help="baseline.json, or its folder.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another, of the newer code.")],
    again: Annotated[
        Path | None, typer.Option(help="The newer code measured once more: the second strike.")
    ] = None,
    report: ReportFile = None,
) -> None:
    """Say whether B is worse than A, metric by metric.

    Exit code 0 if nothing is worse by its margin, 10 if a metric is suspected, 20 if it is worse
    in --again, too, 30 if something is inconclusive, 5 if nothing can be concluded.
    """
    begin("judging both baselines from their processes")
    from esper.cli.baseline import compare_baselines

    raise typer.Exit(compare_baselines(before, after, again, report))


@baseline.command("show")
@explained
def show_baseline(
    file: StoredBaseline, targets: TargetsFile = None, report: ReportFile = None
) -> None:
    """Print a stored baseline; verdicts are computed again from its processes."""
    begin("judging the baseline from its processes")
    from esper.cli.baseline import show_baseline

    show_baseline(file, report, targets)


flags = typer.Typer(no_args_is_help=True, help="Feature flags: who gets a new implementation.")
FlagsFile = Annotated[
    Path, typer.Option("--file", help="The file of flags.", dir_okay=False, show_default=True)
]
Actor = Annotated[str | None, typer.Option(help="Who changes it; the user who is logged in.")]
FLAGS = Path("configs/flags.yaml")


@flags.command("list")
@explained
def list_flags(file: FlagsFile = FLAGS) -> None:
    """Print one line a flag, and the hash that goes with metrics."""
    from esper.cli.flags import show_flags

    show_flags(file)


@flags.command("explain")
@explained
def explain_flag(
    name: Annotated[str, typer.Argument(help="The flag.")],
    model: Annotated[str | None, typer.Option(help="Name of the model that asks.")] = None,
    attributes: Annotated[
        list[str] | None, typer.Option("--attribute", help="NAME=VALUE, for rules.")
    ] = None,
    file: FlagsFile = FLAGS,
) -> None:
    """Say whether a flag is on for a model, and why."""
    from esper.cli.flags import explain_flag

    explain_flag(file, name, model, attributes or ())


@flags.command("validate")
@explained
def validate_flags(file: FlagsFile = FLAGS) -> None:
    """Check the file, the process's variables and the record of changes.

    Exit code 1 if a flag has expired, 2 if anything is wrong.
    """
    from esper.cli.flags import validate_flags

    raise typer.Exit(0 if validate_flags(file) else 1)


@flags.command("set")
@explained
def set_flag(
    name: Annotated[str, typer.Argument(help="The flag.")],
    reason: Annotated[str, typer.Option(help="Why; it goes into the record.")],
    percent: Annotated[
        str | None, typer.Option(help="Share of models, 0 to 100; none: no rollout.")
    ] = None,
    default: Annotated[
        bool | None, typer.Option("--on/--off", help="Global on or off, without a rollout.")
    ] = None,
    kill: Annotated[
        bool | None, typer.Option("--kill/--revive", help="Set or release the kill switch.")
    ] = None,
    allow: Annotated[list[str] | None, typer.Option(help="On for this model.")] = None,
    block: Annotated[list[str] | None, typer.Option(help="Off for this model.")] = None,
    unlist: Annotated[list[str] | None, typer.Option(help="Take off both lists.")] = None,
    actor: Actor = None,
    file: FlagsFile = FLAGS,
) -> None:
    """Change a flag: checked first, atomic, comments kept, recorded."""
    from esper.cli.flags import set_flag

    fields = {"default": default, "killed": kill}
    set_flag(
        file, name, {k: v for k, v in fields.items() if v is not None}, percent=percent,
        allow=allow or (), block=block or (), unlist=unlist or (), reason=reason, actor=actor,
    )  # fmt: skip


@flags.command("audit")
@explained
def audit_flags(
    accept: Annotated[
        str | None, typer.Option(metavar="REASON", help="Record that the file was edited by hand.")
    ] = None,
    actor: Actor = None,
    file: FlagsFile = FLAGS,
) -> None:
    """Print every change of the flags; exit code 1 if the record was tampered with."""
    from esper.cli.flags import show_audit

    raise typer.Exit(0 if show_audit(file, accept, actor) else 1)


rollout = typer.Typer(
    no_args_is_help=True, help="Ramp a phase's flag up, judged interval by interval."
)
MigrationFile = Annotated[
    Path, typer.Option("--config", help="The migration's settings.", dir_okay=False)
]
MIGRATION = Path("configs/morphogenetic_migration.yaml")
RolloutFolder = Annotated[Path, typer.Argument(help="Folder of the rollout.", file_okay=False)]


@rollout.command("plan")
@explained
def plan_rollout(
    phase: Annotated[int, typer.Argument(help="Number of the phase.")],
    create: Annotated[
        Path | None, typer.Option(help="New folder to write the plan into.", file_okay=False)
    ] = None,
    actor: Actor = None,
    config: MigrationFile = MIGRATION,
) -> None:
    """Say what a rollout would do and how much evidence an interval needs; --create begins one."""
    from esper.cli.rollout import plan_rollout

    plan_rollout(config, phase, create, actor)


@rollout.command("step")
@explained
def step_rollout(
    folder: RolloutFolder,
    evidence: Annotated[
        list[Path],
        typer.Argument(
            help="Measurements as JSON; before it begins, in several files if need be.",
            dir_okay=False,
        ),
    ],
    actor: Actor = None,
) -> None:
    """Judge one interval, store it, and move the flag; a rollback moves it at once."""
    from esper.cli.rollout import step_rollout

    raise typer.Exit(step_rollout(folder, evidence, actor))


@rollout.command("status")
@explained
def show_rollout(folder: RolloutFolder) -> None:
    """Print every verdict so far, and where the flag is."""
    from esper.cli.rollout import show_rollout

    show_rollout(folder)


@rollout.command("replay")
@explained
def replay_rollout(folder: RolloutFolder) -> None:
    """Judge all stored evidence again; exit code 1 if any verdict differs."""
    from esper.cli.rollout import replay_rollout

    raise typer.Exit(0 if replay_rollout(folder) else 1)


@explained
def gate(
    phase: Annotated[int | None, typer.Option(help="Phase whose targets and gates count.")] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            help="What was measured, as JSON; more files of one commit are joined.", dir_okay=False
        ),
    ] = None,
    rollout: Annotated[
        Path | None, typer.Option(help="Rollout whose last evidence counts.", file_okay=False)
    ] = None,
    config: MigrationFile = MIGRATION,
) -> None:
    """Decide from stored evidence alone, and change nothing."""
    from esper.cli.gate import gate

    raise typer.Exit(gate(config, phase, measured or [], rollout))


config = typer.Typer(no_args_is_help=True, help="Settings of the migration.")


@config.command("explain")
@explained
def explain_key(
    key: Annotated[
        str, typer.Argument(help="Such as policy.min_pairs, phases.1.targets, or flags.")
    ],
    config: MigrationFile = MIGRATION,
) -> None:
    """Print a setting's value and where it comes from: a line of a file, or a default."""
    from esper.cli.config import explain_key

    explain_key(config, key)


@explained
def monitoring(
    flags: Annotated[
        Path, typer.Option(help="The file of flags.", dir_okay=False, show_default=True)
    ] = Path("configs/flags.yaml"),
    baseline: Annotated[
        Path | None, typer.Option(help="A stored baseline.json.", dir_okay=False)
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine alone.")] = 9102,
) -> None:
    """Serve the state of the migration to Prometheus until Ctrl-C.

    The files are read at each scrape. Runs, sweeps and Tamiyo's service serve their own metrics.
    """
    begin("reading the files of the migration")
    from esper.cli.monitoring import export

    export(flags, baseline, port)
