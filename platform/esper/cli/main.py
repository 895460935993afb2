"""The typer application. Commands import what they need when they run: `--help` is instant.

Exit codes: 0 done (whatever the verdict), 1 a check of `doctor` or `regress` failed, two logs
differ or a stored sweep is not what it was, 2 a wrong command line or configuration, 3 something
this command needs is missing or cannot be reached, 4 trials are missing and the same command
continues, 5 the verdict is UNHEALTHY, 130 interrupted,
141 what it printed was not read to its end. `esper rollout step` and `esper gate` tell
their decision instead: 0 ADVANCE, 10 HOLD, 20 ROLLBACK, 30 INCONCLUSIVE. So does `esper baseline
compare`: 0 nothing is worse, 10 suspected, 20 worse twice, 30 inconclusive. `esper submit`
gives the exit code of its job.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from esper.cli.errors import explained

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Grow PyTorch networks while they train, and prove that the growth paid off.",
    epilog="Exit codes: 0 done, 1 doctor, regress, log diff or ab verify found something, 2 wrong "
    "command or configuration, 3 something needed is missing, 4 trials missing (same command "
    "continues), 5 verdict UNHEALTHY, 130 interrupted. Rollout step and gate: 0 ADVANCE, 10 HOLD, "
    "20 ROLLBACK, 30 INCONCLUSIVE.",
)

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.", dir_okay=False)
]


def _begin(text: str) -> None:
    """Say what happens while libraries load, which takes seconds; results alone go to stdout."""
    print(f"{text} ...", file=sys.stderr, flush=True)


class _ConfigFirst(TyperGroup):
    """A group whose command `run` needs no name: `esper ab CONFIG` is `esper ab run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the command where the user did not."""
        named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if named else ["run", *args])


ab = typer.Typer(
    cls=_ConfigFirst, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND [ARGS]...",
    help="Paired arms and a verdict: [bold]esper ab CONFIG[/] runs a sweep.",
)  # fmt: skip
app.add_typer(ab, name="ab")


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
    from esper.cli.ab import verify_ab

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
    from esper.cli.ab import similarity_ab

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
    from esper.cli.ab import plan_ab

    plan_ab(effect, sd, margin, power, pilot, runs, json_file)


@app.command()
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


@app.command()
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
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI.")] = "sqlite:///mlflow.db",
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
    _begin("building the task and the model")
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


@app.command()
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
    _begin("loading; a line for each check that has ended")
    from esper.cli.regress import regress

    raise typer.Exit(0 if regress(quick, device, only or [], report) else 1)


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


@app.command()
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


@app.command()
@explained
def doctor(
    tracking_uri: Annotated[str, typer.Option(help="MLflow tracking URI.")] = "sqlite:///mlflow.db",
    json_file: JsonOption = None,
) -> None:
    """Check this installation, and say what to do about each problem."""
    _begin("checking this machine; starting Ray takes most of the ten seconds")
    from esper.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(tracking_uri, json_file))


submission = typer.Typer(
    cls=_ConfigFirst, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND [ARGS]...",
    help="Jobs on a Ray cluster: [bold]esper submit CONFIG[/] runs a configuration there.",
)  # fmt: skip
app.add_typer(submission, name="submit")

Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard."),
]
LOOPBACK = "http://127.0.0.1:8265"


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
    address: Address = LOOPBACK,
    results: Annotated[
        str, typer.Option(help="Folder on the cluster that all its nodes see.")
    ] = "~/esper-results",
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
    address: Address = LOOPBACK,
) -> None:
    """Print the cluster's jobs, or one; the exit code is that of a job which has ended."""
    from esper.cli.submit import show_status

    raise typer.Exit(show_status(address, job))


@submission.command("logs")
@explained
def submitted_logs(job: JobName, address: Address = LOOPBACK) -> None:
    """Follow a job's log from its beginning until it ends; the exit code is the job's."""
    from esper.cli.submit import show_logs

    raise typer.Exit(show_logs(address, job))


@submission.command("stop")
@explained
def stop_submitted(job: JobName, address: Address = LOOPBACK) -> None:
    """End a job; what it had finished stays, and the same submission continues."""
    from esper.cli.submit import stop

    raise typer.Exit(stop(address, job))


serve = typer.Typer(
    cls=_ConfigFirst, no_args_is_help=True, subcommand_metavar="CONFIG | COMMAND [ARGS]...",
    help="Tamiyo over HTTP: [bold]esper serve CONFIG[/] runs the service on this machine.",
)  # fmt: skip
app.add_typer(serve, name="serve")


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
app.add_typer(policy, name="policy")

Reports = Annotated[
    list[str],
    typer.Option("--reports", help="SQLAlchemy URL of field reports; may be given repeatedly."),
]
Explore = Annotated[
    float, typer.Option("--explore", min=0, max=1, help="The controller's explore_frac.")
]
TrackingUri = Annotated[str, typer.Option("--tracking-uri", help="MLflow tracking URI.")]


@policy.command("train")
@explained
def train(
    reports: Reports,
    out: Annotated[Path, typer.Option("--out", help="File of the policy.", dir_okay=False)],
    explore: Explore = 0.1,
    register: Annotated[
        bool, typer.Option("--register", help="Add it to MLflow's registry as the challenger.")
    ] = False,
    tracking_uri: TrackingUri = "sqlite:///mlflow.db",
) -> None:
    """Learn from field reports, and say what the policy would have gained in their runs."""
    _begin("reading field reports")
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
    _begin("reading field reports")
    from esper.cli.policy import evaluate_policy

    evaluate_policy(reports, model, explore)


@policy.command("promote")
@explained
def promote(
    version: Annotated[int, typer.Argument(min=1, help="Version in MLflow's registry.")],
    tracking_uri: TrackingUri = "sqlite:///mlflow.db",
) -> None:
    """Make a registered policy the champion."""
    from esper.cli.policy import promote_policy

    promote_policy(version, tracking_uri)


@app.command()
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
    _begin("reading the files of the migration")
    from esper.cli.monitoring import export

    export(flags, baseline, port)


flags = typer.Typer(no_args_is_help=True, help="Feature flags: who gets a new implementation.")
app.add_typer(flags, name="flags")

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
app.add_typer(rollout, name="rollout")

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


@app.command("gate")
@explained
def gate_command(
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


baseline = typer.Typer(
    no_args_is_help=True, help="What the implementations cost: latency, memory, energy, seeds."
)
app.add_typer(baseline, name="baseline")

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
    _begin("measuring in fresh processes; a line for each block that has ended")
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
    _begin("judging both baselines from their processes")
    from esper.cli.baseline import compare_baselines

    raise typer.Exit(compare_baselines(before, after, again, report))


@baseline.command("show")
@explained
def show_baseline(
    file: StoredBaseline, targets: TargetsFile = None, report: ReportFile = None
) -> None:
    """Print a stored baseline; verdicts are computed again from its processes."""
    _begin("judging the baseline from its processes")
    from esper.cli.baseline import show_baseline

    show_baseline(file, report, targets)


config = typer.Typer(no_args_is_help=True, help="Settings of the migration.")
app.add_typer(config, name="config")


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
