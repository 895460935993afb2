"""`esper ab`: progress while the sweep runs, then the table, the verdicts and where to look."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from esper.cli.codes import UNHEALTHY
from esper.cli.output import say, write_result
from esper.cli.status import board, duration
from esper.config.sweep import SweepConfig, load_sweep
from esper_experiments.watcher import Watcher

if TYPE_CHECKING:
    from esper.evidence.progress import Progress
    from esper.evidence.records import TrialRecord
    from esper.evidence.verdict import Verdict
    from esper_experiments.sweep import SweepResult

COLOURS = {"WIN": "green", "LOSE": "red", "EQUIVALENT": "cyan", "INCONCLUSIVE": "yellow"}


def run_ab(config: Path, json_file: Path | None) -> int:
    """Run the sweep and print what it found.

    Returns:
        The exit code.
    """
    console = Console()
    sweep = load_sweep(config)
    console.print(f"{len(sweep.arms)} arms x {sweep.pairs} pairs; checking, then starting Ray ...")
    from esper_experiments.sweep import run_sweep

    watcher = SweepProgress(console, sweep)
    with watcher:
        result = run_sweep(sweep, watcher, command=f"esper ab {config}")
    show(console, sweep, result)
    if json_file is not None:
        write_result(json_file, to_json(result))
        console.print(f"JSON: {json_file}")
    return UNHEALTHY if result.verdicts[0].verdict == "UNHEALTHY" else 0


class SweepProgress(Watcher):
    """A live table on a terminal; one line a trial elsewhere."""

    def __init__(self, console: Console, sweep: SweepConfig) -> None:
        self._console, self._metric = console, sweep.question.metric
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._begun = False

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def changed(self, progress: "Progress") -> None:
        """Show where the sweep stands."""
        if not self._begun:
            self._begun = True
            if before := _ended(progress):
                total = len(progress.trials)
                self._console.print(f"{before} of {total} trials had finished before")
        if self._console.is_terminal:
            self._live.update(board(progress), refresh=True)

    def finished(self, record: "TrialRecord", progress: "Progress") -> None:
        """A trial ended."""
        if self._console.is_terminal:
            return
        left = progress.seconds_left
        say(
            f"[{_ended(progress)}/{len(progress.trials)}] {record.trial_id}: "
            f"{self._metric} {record.metrics[self._metric]:.4g}, "
            f"{record.metrics['parameters']:.0f} parameters, "
            f"{record.metrics['train_seconds']:.1f} s{_left(left)}"
        )


def _ended(progress: "Progress") -> int:
    counts = progress.counts()
    return counts["finished"] + counts["collapsed"]


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"; about {duration(seconds)} left"


def show(console: Console, sweep: SweepConfig, result: "SweepResult") -> None:
    """The arms, the verdicts with their reasons, and where everything lies."""
    console.print(_arms_table(sweep, result))
    for name, arm in result.arms.items():
        if arm.collapsed:
            console.print(f"{arm.collapsed} of {arm.runs} runs of {name} collapsed")
    for verdict in result.verdicts:
        colour = COLOURS.get(verdict.verdict, "magenta")
        console.print(
            f"[bold {colour}]{verdict.verdict}[/]  {verdict.treatment} against {verdict.control}"
            f"{'' if verdict is result.verdicts[0] else f'  (secondary, {verdict.metric})'}"
        )
        for reason in verdict.reasons:
            console.print(f"    {reason}", highlight=False, soft_wrap=True)
    t = result.timing
    if t.trials:
        console.print(
            f"{t.trials} trials in {t.wall_seconds:.0f} s, of which {t.start_seconds:.1f} s "
            f"start-up; overhead {t.overhead_seconds_per_trial:.2f} s a trial"
        )
    q = result.registration
    console.print(
        f"question registered {q.registered_at:%Y-%m-%d %H:%M:%S} UTC, sha256 "
        f"{q.registration_hash[:16]}; evidence and pictures: {result.folder}",
        soft_wrap=True,
    )
    console.print(
        f"MLflow run {result.mlflow_run_id} in {sweep.mlflow.tracking_uri}; "
        f"see it with: esper ui --tracking-uri {sweep.mlflow.tracking_uri}",
        soft_wrap=True,
    )


def _arms_table(sweep: SweepConfig, result: "SweepResult") -> Table:
    from esper.training.metrics import METRICS

    metric = sweep.question.metric
    unit = METRICS[metric].unit if metric in METRICS else ""
    pairs = result.verdicts[0].pairs
    title = f"{sweep.name}: {metric}{f' in {unit}' if unit else ''} over {pairs} pairs"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for head in ("mean", "sd", "worst", "params", "steps", "MFLOP", "train s"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, arm in result.arms.items():
        table.add_row(
            name, _figure(arm.mean), _figure(arm.sd), _figure(arm.worst),
            _figure(arm.parameters_mean, ".0f"), _figure(arm.steps, ".0f"),
            _figure(arm.train_flops_mean and arm.train_flops_mean / 1e6, ",.0f"),
            _figure(arm.train_seconds_mean, ".1f"),
        )  # fmt: skip
    return table


def _figure(value: float | None, spec: str = ".4f") -> str:
    return "-" if value is None else format(value, spec)


def to_json(result: "SweepResult") -> dict[str, Any]:
    """The result as plain data; the keys of the primary verdict come first."""
    primary: Verdict = result.verdicts[0]
    arms = {
        name: {
            "mean": a.mean, "sd": a.sd, "worst": a.worst, "parameters": a.parameters_mean,
            "steps": a.steps, "train_seconds": a.train_seconds_mean,
            "train_flops": a.train_flops_mean, "collapsed": a.collapsed,
        }
        for name, a in result.arms.items()
    }  # fmt: skip
    return {
        "verdict": primary.verdict,
        "treatment": primary.treatment,
        "control": primary.control,
        "metric": primary.metric,
        "pairs": primary.pairs,
        "mean_difference": primary.mean_difference,
        "p_value": primary.p_value,
        "reasons": primary.reasons,
        "arms": arms,
        "secondary": [
            {
                "verdict": v.verdict, "treatment": v.treatment, "control": v.control,
                "metric": v.metric,
                "mean_difference": v.mean_difference, "p_value": v.p_value, "p_holm": v.p_holm,
                "reasons": v.reasons,
            }
            for v in result.verdicts[1:]
        ],
        "mlflow_run_id": result.mlflow_run_id,
        "registration_hash": result.registration.registration_hash,
        "commit": primary.commit,
        "evidence": str(result.folder),
        "timing": vars(result.timing),
    }  # fmt: skip
