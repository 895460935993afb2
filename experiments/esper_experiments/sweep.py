"""`esper ab`: register the question, run the paired arms, log everything, judge, draw."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from esper.config.base import ConfigError
from esper.config.sweep import Question, SweepConfig
from esper.environment import fingerprint, is_dirty
from esper.evidence.arm_summary import ArmSummary, summarise
from esper.evidence.health import COLLAPSE
from esper.evidence.paired import ALPHA
from esper.evidence.records import (
    Fingerprint,
    Registration,
    TrialRecord,
    read_records,
    write_json,
)
from esper.evidence.search import search_records
from esper.evidence.sequential import plan_looks
from esper.evidence.verdict import (
    Verdict,
    judge_all,
    judge_look,
    looks_of,
)
from esper.evidence.verify import seal, store_config, verdict_name
from esper.tracking.mlflow_sink import MlflowSink
from esper.tracking.pictures import (
    arms_overview,
    forest_plot,
    growth_curves,
    lattice_over_time,
)
from esper.training.metrics import METRICS
from esper.trial import TrialSpec
from esper_experiments.board import Board
from esper_experiments.peers import trial_of
from esper_experiments.plan import Planned, device_of, plan_trials, register, sweep_folder
from esper_experiments.ray_variables import set_variables
from esper_experiments.watcher import Watcher


class SweepIncompleteError(RuntimeError):
    """Trials are missing; the same command goes on where this one stopped."""

    def __init__(self, missing: tuple[str, ...], errors: tuple[str, ...]) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(missing, errors)
        self.missing, self.errors = missing, errors

    def __str__(self) -> str:
        failed = "".join(f"\n  {line}" for line in self.errors)
        return (
            f"{len(self.missing)} trials have no record yet; run the same command to continue."
            f"{failed}"
        )


@dataclass(frozen=True)
class Timing:
    """What the sweep cost.

    Attributes:
        trials: Trials run now; those found finished are not counted.
        wall_seconds: From before Ray started to the last trial's end.
        start_seconds: Of these, until the first trial began.
        overhead_seconds_per_trial: Wall time of all slots, after the start, that no trial used,
            per trial; None if no trial ran now.
    """

    trials: int
    wall_seconds: float
    start_seconds: float
    overhead_seconds_per_trial: float | None


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        folder: Where the evidence lies.
        registration: The question as registered.
        verdicts: The primary comparison first.
        arms: One summary an arm.
        pictures: Caption and file of each picture.
        timing: What it cost.
        mlflow_run_id: The parent run.
    """

    folder: Path
    registration: Registration
    verdicts: list[Verdict]
    arms: dict[str, ArmSummary]
    pictures: dict[str, Path]
    timing: Timing
    mlflow_run_id: str


def check(sweep: SweepConfig) -> None:
    """Build every arm once, without training, so that a wrong name fails before anything starts.

    Raises:
        ConfigError: With the arm and what is wrong.
    """
    mark = Fingerprint(**fingerprint(device_of(sweep)))
    _check_looks(sweep)
    known: set[str] | None = None
    for arm in sweep.arms:
        config = sweep.run_config(arm)
        try:
            trial = trial_of(config)(config, TrialSpec(arm, 0, sweep.first_seed, 0, "", mark))
        except ConfigError as error:
            raise ConfigError(f"arm '{arm}'", error.problems) from None
        known = trial.metric_names() & (known or trial.metric_names())
    assert known is not None
    _check_metrics(sweep.question, known)


def _check_looks(sweep: SweepConfig) -> None:
    """At every planned look the exact test can reach what the look may spend."""
    for look in plan_looks(sweep.question.looks, sweep.pairs):
        if sweep.question.looks and 0.5**look.pairs > ALPHA * look.share:
            raise ConfigError("question", (
                f"looks must be able to decide, but after {look.pairs} of {sweep.pairs} pairs the "
                f"smallest p-value is {0.5**look.pairs:.2g}, and {ALPHA * look.share:.2g} may be "
                "spent; look later.",
            ))  # fmt: skip


def _check_metrics(question: Question, known: set[str]) -> None:
    """Every metric that the question names is one that all arms have, and is read the right way."""
    goals = [question.goal_of(c) for c in question.comparisons] + list(question.guardrails)
    problems = []
    for goal in goals:
        if goal.metric == COLLAPSE:
            continue
        if goal.metric not in known:
            problems.append(
                f"metric must be one that every arm computes ({', '.join(sorted(known))}), "
                f"but got '{goal.metric}'; a registered one is named under `metrics` of the run."
            )
        elif goal.metric in METRICS:
            better = METRICS[goal.metric].higher_is_better
            if goal.higher_is_better != better:
                problems.append(
                    f"higher_is_better of '{goal.metric}' must be {str(better).lower()}, as it was "
                    "registered, but got the opposite; correct the question."
                )
    if problems:
        raise ConfigError("question", tuple(dict.fromkeys(problems)))


def run_sweep(
    sweep: SweepConfig, watcher: Watcher | None = None, *, command: str = "esper ab CONFIG"
) -> SweepResult:
    """Run what is missing of a sweep and judge it.

    Args:
        sweep: The configuration.
        watcher: Told what happens.
        command: What to type to compute the verdict again from the stored records.

    Raises:
        ConfigError: If an arm cannot be built; nothing has started then.
        ConnectionError: If MLflow cannot be reached; nothing has started then.
        SweepIncompleteError: If trials failed or the run was interrupted.
    """
    check(sweep)
    folder = sweep_folder(sweep, device_of(sweep))
    registration = register(sweep, folder)
    store_config(sweep, folder)
    plan = plan_trials(sweep, registration)
    sink = _open_sink(sweep, registration, folder)
    before = read_records(folder)
    board = Board(sweep, folder, plan, before, watcher or Watcher())
    for record in before:
        sink.submit_trial(record, _params(sweep, record.arm))

    try:
        timing = _run_missing(sweep, registration, plan, before, folder, sink, board)
        result = _conclude(sweep, registration, folder, sink, timing, command)
    except BaseException:
        board.end(whole=False)
        sink.finish("FAILED")
        raise
    board.end(whole=True)
    return result


class PairsWanted:
    """How many pairs a sweep has to run, as far as its records tell.

    Those of the first look that is not complete, or that decides; with a test that may be looked
    at after any pair, all of them until one decides.

    Args:
        sweep: The configuration.
        registration: The question.
        records: What there is before.
    """

    def __init__(
        self, sweep: SweepConfig, registration: Registration, records: Iterable[TrialRecord]
    ) -> None:
        self._sweep, self._registration = sweep, registration
        self._records = {r.trial_id: r for r in records}
        self._looks = looks_of(registration)[:-1]

    def add(self, record: TrialRecord) -> None:
        """There is another one."""
        self._records[record.trial_id] = record

    def __call__(self) -> int:
        """As many, now."""
        sweep, registration = self._sweep, self._registration
        ran = list(self._records.values())
        present = {(r.arm, r.pair) for r in ran}
        while self._looks:
            look = self._looks[0]
            if not all((arm, k) in present for arm in sweep.arms for k in range(look.pairs)):
                return registration.pairs if look.anytime else look.pairs
            records = [*ran, *search_records(ran, sweep.searches)]
            verdict, *_ = judge_look(
                records, registration, look, sweep.dependent_arms, sweep.salted_arms
            )
            if verdict.verdict != "INCONCLUSIVE":
                return look.pairs
            # what did not decide then never will
            del self._looks[0]
        return registration.pairs


def _run_missing(
    sweep: SweepConfig,
    registration: Registration,
    plan: list[Planned],
    before: list[TrialRecord],
    folder: Path,
    sink: MlflowSink,
    board: Board,
) -> Timing:
    wanted = PairsWanted(sweep, registration, before)
    done = {r.trial_id for r in before}
    if not _left(plan, done, wanted()):
        return Timing(0, 0.0, 0.0, None)
    set_variables()

    from esper_experiments.on_ray import run_plan
    from esper_experiments.room import find_room, start_ray, stop_ray

    heard = set(done)

    def finished(record: TrialRecord) -> None:
        heard.add(record.trial_id)
        wanted.add(record)
        sink.submit_trial(record, _params(sweep, record.arm))
        board.finished(record)

    started = time.time()
    start_ray(sweep.resources)
    try:
        room = find_room(sweep.resources, device_of(sweep))
        board.placed(room.slots, room.gpus, sweep.resources.gpus_per_trial)
        errors = run_plan(plan, done, folder, sweep.resources, room, board, finished, wanted)
        for record in read_records(folder):
            # it was written in the moment in which another one decided the question
            if record.trial_id not in heard:
                finished(record)
    finally:
        sink.wait()
        stop_ray()
    records = [r for r in read_records(folder) if r.trial_id not in done]
    if missing := _left(plan, done | {r.trial_id for r in records}, wanted()):
        lines = tuple(f"{trial}: {why}" for trial, why in sorted(errors.items()))
        raise SweepIncompleteError(tuple(sorted(missing)), lines)
    return _timing(records, started, room.slots)


def _left(plan: list[Planned], done: set[str], pairs: int) -> set[str]:
    """Trials of the first pairs that are not done."""
    return {p.spec.trial_id for p in plan if p.spec.pair < pairs} - done


def _timing(records: list[TrialRecord], started: float, slots: int) -> Timing:
    first = min(r.started_at.timestamp() for r in records)
    last = max(r.ended_at.timestamp() for r in records)
    busy = sum((r.ended_at - r.started_at).total_seconds() for r in records)
    slots = min(slots, len(records))
    idle = max(0.0, (last - first) * slots - busy)
    return Timing(len(records), last - started, first - started, idle / len(records))


def _open_sink(sweep: SweepConfig, registration: Registration, folder: Path) -> MlflowSink:
    mark = registration.fingerprint
    tags = {
        "config_hash": sweep.config_hash,
        "code_hash": mark.code_hash,
        "commit": mark.commit or "none",
        "dirty": str(is_dirty()),
        "registration_hash": registration.registration_hash,
        "device": mark.device,
        "evidence": str(folder),
    }
    return MlflowSink.open(
        sweep.mlflow.tracking_uri,
        sweep.mlflow.experiment,
        sweep.name,
        folder.name,
        sweep.model_dump(mode="json", exclude={"arms", "mlflow", "output_dir"}),
        tags,
    )


def _params(sweep: SweepConfig, arm: str) -> dict[str, object]:
    return sweep.run_config(arm).model_dump(mode="json")


def _conclude(
    sweep: SweepConfig,
    registration: Registration,
    folder: Path,
    sink: MlflowSink,
    timing: Timing,
    command: str,
) -> SweepResult:
    ran = read_records(folder)
    records = [*ran, *search_records(ran, sweep.searches)]
    verdicts, arms = judge_records(sweep, registration, records)
    for verdict, comparison in zip(verdicts, sweep.question.comparisons, strict=True):
        write_json(folder / "verdicts" / verdict_name(comparison, sweep.question), verdict)
    seal(folder)
    pictures = draw(sweep, ran, verdicts, folder)
    sink.flush()
    sink.log_verdicts(verdicts, arms, pictures, recompute=command)
    sink.finish("FINISHED")
    return SweepResult(folder, registration, verdicts, arms, pictures, timing, sink.parent_run_id)


def judge_records(
    sweep: SweepConfig, registration: Registration, records: list[TrialRecord]
) -> tuple[list[Verdict], dict[str, ArmSummary]]:
    """Verdicts and summaries from stored records: a pure function of them."""
    verdicts = judge_all(
        records,
        registration,
        dependent_arms=sweep.dependent_arms,
        salted_arms=sweep.salted_arms,
    )
    return verdicts, summarise(records, registration)


def curve_of(sweep: SweepConfig, records: list[TrialRecord]) -> str:
    """The curve that shows the question's metric while training."""
    metric = sweep.question.metric.replace("test_", "held_out_")
    return metric if all(metric in r.curves for r in records) else "held_out_loss"


def draw(
    sweep: SweepConfig, records: list[TrialRecord], verdicts: list[Verdict], folder: Path
) -> dict[str, Path]:
    """Growth curves, forest plot, and the treatment's lattice in its first pair."""
    target = folder / "pictures"
    target.mkdir(exist_ok=True)
    curve = curve_of(sweep, records)
    pictures = {
        "Growth curves": growth_curves(records, curve, target / "growth_curves.png"),
        "Final results": arms_overview(
            records, sweep.question.metric, target / "arms_overview.png"
        ),
        "Paired differences": forest_plot(
            [v for v in verdicts if v.metric == sweep.question.metric], target / "forest_plot.png"
        ),
    }
    grown = [r for r in records if r.arm == sweep.question.treatment and r.transitions]
    if grown:
        caption = f"Lattice over time ({grown[0].trial_id})"
        pictures[caption] = lattice_over_time(grown[0], target / "lattice_over_time.png")
    return pictures
