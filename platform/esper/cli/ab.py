"""`esper ab`: progress while the sweep runs, then the table, the verdicts and where to look.

`verify` judges a stored sweep again and `plan` says how many pairs a question needs; neither
starts anything.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from esper.cli.codes import UNHEALTHY
from esper.cli.output import say, write_result
from esper.cli.status import board, duration
from esper.config.base import ConfigError
from esper.config.sweep import SweepConfig, load_sweep
from esper_experiments.watcher import Watcher

if TYPE_CHECKING:
    from esper.evidence.progress import Progress
    from esper.evidence.records import Registration, TrialRecord
    from esper.evidence.verdict import Verdict
    from esper.evidence.verify import Verification
    from esper_experiments.sweep import SweepResult

PLAN_LEGEND = """\
WIN: chance at that effect. equivalent: chance of EQUIVALENT if there is no difference. Both from
  {repetitions:,} simulated sweeps with normal differences, the sign-flip test and the whole rule.
finds: smallest effect that WIN finds at this power. It and the needed pairs above come from
  Student's t in closed form, with guardrails that are independent of one another.
early, after: how often an e-process that may be looked at after every pair finds the effect, and
  the mean number of pairs until it stops; simulated, and without the guardrails."""
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


def verify_ab(
    name: str,
    config: Path | None,
    runs: Path,
    json_file: Path | None,
    measured: Path | None = None,
) -> int:
    """Print whether a stored sweep's verdicts follow from its records, and what differs.

    Returns:
        The exit code.

    Raises:
        ConfigError: If `measured` is asked for and the sweep is not verified or not healthy.
    """
    from esper.evidence.verify import find_sweep, verify

    folder = find_sweep(name, runs)
    result = verify(folder, load_sweep(config) if config else None)
    question = result.registration.registration_hash if result.registration else None
    print(f"{folder}: {len(result.records)} records, registration {question}")
    for verdict in result.verdicts:
        print(f"  {verdict.verdict}  {verdict.treatment} against {verdict.control}")
    for finding in result.findings:
        print(f"  differs: {finding}")
    if not result.sealed:
        print("  no checksums are stored: an edit that changes no verdict would go unseen")
    print("NOT VERIFIED" if result.findings else "verified: every verdict is the same, bit for bit")
    if json_file is not None:
        content = {
            "folder": str(folder), "registration_hash": question,
            "verified": not result.findings, "sealed": result.sealed,
            "records": len(result.records), "findings": list(result.findings),
            "verdicts": [v.model_dump(mode="json") for v in result.verdicts],
        }  # fmt: skip
        write_result(json_file, content)
    if measured is not None:
        _write_wins(measured, name, *_sound(name, result, "a measurement"))
    return 1 if result.findings else 0


def _write_wins(
    path: Path,
    name: str,
    records: "Sequence[TrialRecord]",
    registration: "Registration",
    verdicts: "Sequence[Verdict]",
) -> None:
    """How often an arm won over another and lost to it, as gates read it."""
    from esper.evidence.records import write_json
    from esper.release.judge import PhaseMeasurements
    from esper.release.phases import Quantity

    counts: dict[str, float] = {}
    for v in verdicts:
        if v.verdict == "UNHEALTHY":
            raise ConfigError(name, (
                f"'{v.treatment}' against '{v.control}' must be healthy to be counted.", *v.reasons,
            ))  # fmt: skip
        for word, does in (("wins_over", "WIN"), ("losses_to", "LOSE")):
            key = f"{v.treatment}_{word}_{v.control}".replace("-", "_")
            counts[key] = counts.get(key, 0) + (v.verdict == does)
    last = max(r.ended_at for r in records)
    quantities = {k: Quantity(value=n, unit="count") for k, n in counts.items()}
    commit = registration.fingerprint.commit
    write_json(path, PhaseMeasurements(commit=commit, ended_at=last, quantities=quantities))
    print(f"measured: {path}: " + ", ".join(f"{k} = {n:g}" for k, n in sorted(counts.items())))


def similarity_ab(name: str, noise: str | None, runs: Path, json_file: Path | None) -> None:
    """Print how alike the networks of the compared arms are.

    Raises:
        ConfigError: If the sweep is not verified, or its records do not tell.
    """
    from esper.evidence.arm_similarity import compare_arms
    from esper.evidence.similarity import told
    from esper.evidence.verify import find_sweep, verify

    records, registration, _ = _sound(name, verify(find_sweep(name, runs)), "a comparison")
    found = []
    for comparison in registration.question.comparisons:
        sides = comparison.treatment, comparison.control
        if noise in sides:
            continue
        try:
            alike = compare_arms(records, *sides, noise)
        except ValueError as error:
            raise ConfigError(name, (str(error),)) from None
        found.append(alike)
        print(f"{alike.treatment} against {alike.control}, {alike.pairs} pairs"
              f"{f', {alike.left_out} left out' if alike.left_out else ''}")  # fmt: skip
        print(f"  outputs: {told(alike.outputs)}")
        print(f"  training losses first differ at interval: {_places(alike.parted)}")
        if alike.noise_outputs is not None and alike.noise_parted is not None:
            print(f"{alike.noise} against {alike.control}: the control's own noise")
            print(f"  outputs: {told(alike.noise_outputs)}")
            print(f"  training losses first differ at interval: {_places(alike.noise_parted)}")
            print(f"within the control's own noise: {'yes' if alike.within_noise else 'no'}")
        else:
            print("the control's own noise is not known; run it twice and name the arm: --noise")
    if json_file is not None:
        content = [
            {**alike._asdict(), "outputs": vars(alike.outputs),
             "noise_outputs": alike.noise_outputs and vars(alike.noise_outputs)}
            for alike in found
        ]  # fmt: skip
        write_result(json_file, {
            "registration_hash": registration.registration_hash,
            "commit": registration.fingerprint.commit, "comparisons": content,
        })  # fmt: skip


def _places(intervals: "Sequence[int | None]") -> str:
    known = sorted(i for i in intervals if i is not None)
    if not known:
        return f"nowhere in {len(intervals)} pairs"
    return f"{known[0]} to {known[-1]} in {len(known)} of {len(intervals)} pairs"


def plan_ab(
    effect: float | None,
    sd: float | None,
    margin: float | None,
    power: float,
    from_folder: str | None,
    runs: Path,
    json_file: Path | None,
) -> None:
    """Print how many pairs a question needs, and what numbers of pairs can see.

    Raises:
        ConfigError: If too little is given, a number is out of range, or the pilot is unsound.
    """
    from esper.evidence.planning import (
        MAX_COLLAPSED_FRAC,
        REPETITIONS,
        Assumed,
        collapsed_runs,
        outlook,
        pairs_to_equivalence,
        pairs_to_win,
        pilot,
    )

    if not 0 < power < 1:
        raise ConfigError("--power", (f"it must be between 0 and 1, but got {power}.",))
    goal, guardrails = None, list[Assumed]()
    collapsed, compared = 0, 0
    if from_folder is not None:
        from esper.evidence.verify import find_sweep, verify

        ran = verify(find_sweep(from_folder, runs))
        records, registration, _ = _sound(from_folder, ran, "a pilot")
        goal, guardrails = pilot(records, registration)
        collapsed, compared = collapsed_runs(records, registration)
    elif effect is None or sd is None:
        raise ConfigError("the plan", ("give --effect and --sd, or --from a pilot's folder.",))
    mean, spread, room = (
        given if given is not None else known
        for given, known in zip(
            (effect, sd, margin),
            (goal.mean, goal.sd, goal.margin) if goal else (None, None, None),
            strict=True,
        )
    )
    assert mean is not None
    assert spread is not None
    for option, value in (("--effect", mean), ("--sd", spread), ("--margin", room)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(option, (f"it must be a number above 0, but got {value:g}.",))
    goal = Assumed(mean, spread, room, goal.name if goal else "metric")
    win, same = pairs_to_win(goal, guardrails, power), None
    print(f"{goal.name}: effect {mean:g} in pairs with an SD of {spread:g} ({goal.dz():.2f} SD)")
    for g in guardrails:
        print(f"guardrail {g.name}: mean {g.mean:+.4g}, SD {g.sd:.4g}, margin {g.margin:.4g}")
    test = "wilcoxon" if collapsed > MAX_COLLAPSED_FRAC * compared else "sign_flip"
    if compared:
        print(
            f"{collapsed} of the pilot's {compared} runs collapsed; above {MAX_COLLAPSED_FRAC:.0%} "
            f"ranks decide: register `question.test: {test}`"
        )
    print(f"WIN needs {_pairs(win)} at power {power:g}")
    if room is not None:
        same = pairs_to_equivalence(Assumed(0.0, spread, room), power)
        print(f"EQUIVALENT within {room:g} needs {_pairs(same)} if there is no difference")
    rows = outlook(goal, guardrails, power=power)
    head = ["pairs", "WIN", "equivalent", "finds", "early", "after"]
    print("  ".join(f"{name:>10}" for name in head))
    for row in rows:
        cells = [
            str(row.pairs), f"{row.win:.1%}",
            "-" if row.equivalent is None else f"{row.equivalent:.1%}",
            "-" if row.smallest_effect is None else f"{row.smallest_effect:.4g}",
            f"{row.early_win:.1%}", f"{row.early_pairs:.1f}",
        ]  # fmt: skip
        print("  ".join(f"{cell:>10}" for cell in cells))
    print(PLAN_LEGEND.format(repetitions=REPETITIONS))
    if json_file is not None:
        content = {
            "goal": vars(goal), "guardrails": [vars(g) for g in guardrails], "power": power,
            "pairs_to_win": win, "pairs_to_equivalence": same, "pilot_runs": compared,
            "pilot_collapsed": collapsed, "test": test if compared else None,
            "outlook": [vars(r) for r in rows],
        }  # fmt: skip
        write_result(json_file, content)


def _pairs(number: int | None) -> str:
    return "more than 1,000 pairs" if number is None else f"{number} pairs"


def _sound(
    name: str, result: "Verification", what: str
) -> "tuple[Sequence[TrialRecord], Registration, Sequence[Verdict]]":
    """A stored sweep whose verdicts are verified and whose primary one is healthy."""
    if result.findings or result.registration is None:
        raise ConfigError(name, (
            f"{what} must be verified; see what differs with: esper ab verify {name}",
        ))  # fmt: skip
    if result.verdicts[0].verdict == "UNHEALTHY":
        raise ConfigError(name, (f"{what} must be healthy.", *result.verdicts[0].reasons))
    return result.records, result.registration, result.verdicts


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
