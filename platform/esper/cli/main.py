"""The typer application: all commands, each from a module of `esper.cli.commands`.

Exit codes: 0 done (whatever the verdict), 1 a check of `doctor` or `regress` failed, two logs
differ or a stored sweep is not what it was, 2 a wrong command line or configuration, 3 something
this command needs is missing or cannot be reached, 4 trials are missing and the same command
continues, 5 the verdict is UNHEALTHY, 130 interrupted, 141 what it printed was not read to its
end. `esper rollout step` and `esper gate` tell their decision instead: 0 ADVANCE, 10 HOLD, 20
ROLLBACK, 30 INCONCLUSIVE. So does `esper baseline compare`: 0 nothing is worse, 10 suspected, 20
worse twice, 30 inconclusive. `esper submit` gives the exit code of its job.
"""

import typer

from esper.cli.commands import experiments, machines, migration, runs, service

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

# in the order in which `--help` lists them
for command in (
    experiments.arena, runs.run, migration.regress, runs.ui, experiments.tune, experiments.status,
    machines.doctor, migration.monitoring, migration.gate,
):  # fmt: skip
    app.command()(command)
for name, group in {
    "ab": experiments.ab, "log": runs.log, "submit": machines.submission, "serve": service.serve,
    "policy": service.policy, "flags": migration.flags, "rollout": migration.rollout,
    "baseline": migration.baseline, "config": migration.config,
}.items():  # fmt: skip
    app.add_typer(group, name=name)
