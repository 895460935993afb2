"""`esper arena`: register all questions, run one sweep a task, sum up, draw, report."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from esper.config.arena import Arena
from esper.config.base import ConfigError
from esper.config.sweep import SweepConfig
from esper.environment import fingerprint
from esper.evidence.arena import ArenaRegistration, ArenaSummary, TaskEvidence, summarise_arena
from esper.evidence.records import (
    REGISTRATION,
    EvidenceError,
    Registration,
    read_json,
    read_records,
    write_json,
)
from esper.tracking.arena_pictures import fronts, performance_profiles, score_intervals
from esper.tracking.arena_report import write_report
from esper.tracking.arena_sink import log_arena
from esper.tracking.mlflow_sink import MlflowSink
from esper.tracking.pictures import growth_curves
from esper_experiments.plan import device_of, register, sweep_folder
from esper_experiments.sweep import SweepResult, check, curve_of, run_sweep
from esper_experiments.watcher import Watcher

# makes what is told of one task's sweep; entered before it runs
Watch = Callable[[str, SweepConfig], AbstractContextManager[Watcher]]


@dataclass(frozen=True)
class ArenaResult:
    """A finished arena.

    Attributes:
        folder: Where its registration, summary, pictures and report lie.
        summary: What it found.
        sweeps: The result of each task's sweep.
        report: HTML file.
        mlflow_run_id: The arena's own run.
    """

    folder: Path
    summary: ArenaSummary
    sweeps: Mapping[str, SweepResult]
    report: Path
    mlflow_run_id: str


def run_arena(arena: Arena, watch: Watch, *, command: str = "esper arena CONFIG") -> ArenaResult:
    """Run what is missing of an arena, and sum it up.

    Every arm of every task is built once, and every question registered, before the first trial
    of any task. An interrupted arena goes on with the same call.

    Args:
        arena: From `load_arena`.
        watch: Makes the watcher of a task's sweep.
        command: What to type to make the report again from the stored records.

    Raises:
        ConfigError: If an arm cannot be built; nothing has started then.
        ConnectionError: If MLflow cannot be reached.
        SweepIncompleteError: If trials failed or the run was interrupted.
    """
    for task, sweep in arena.sweeps.items():
        try:
            check(sweep)
        except ConfigError as error:
            raise ConfigError(f"task '{task}'", error.problems) from None
    folder = _folder(arena)
    registration = register_arena(arena, folder)
    sink = _open_sink(arena, registration, folder)
    try:
        results: dict[str, SweepResult] = {}
        for task, sweep in arena.sweeps.items():
            with watch(task, sweep) as watcher:
                results[task] = run_sweep(sweep, watcher, command=command)
        return _conclude(arena, registration, folder, sink, results, command)
    except BaseException:
        sink.finish("FAILED")
        raise


def register_arena(arena: Arena, folder: Path) -> ArenaRegistration:
    """Register every task's question and the arena's own, or read what was written.

    Raises:
        EvidenceError: If the folder holds the registration of another arena.
    """
    sweeps = {
        task: register(sweep, sweep_folder(sweep, device_of(sweep))).registration_hash
        for task, sweep in arena.sweeps.items()
    }
    draft = ArenaRegistration(
        arena=arena.config.name,
        treatment=arena.config.treatment,
        controls=list(arena.controls),
        scale=arena.config.scale,
        sweeps=sweeps,
        absent={task: dict(absent) for task, absent in arena.absent.items()},
        registered_at=datetime.now(UTC),
        registration_hash="",
    )
    path = folder / REGISTRATION
    if path.exists():
        stored = read_json(path, ArenaRegistration, remedy="move the folder away")
        if stored.registration_hash != draft.digest():
            raise EvidenceError(
                f"{path} must be the registration of this arena, but its hash is "
                f"{stored.registration_hash[:12]} and not {draft.digest()[:12]}; move the folder "
                "away."
            )
        return stored
    registration = draft.model_copy(update={"registration_hash": draft.digest()})
    write_json(path, registration)
    return registration


def _folder(arena: Arena) -> Path:
    code = fingerprint(device_of(next(iter(arena.sweeps.values()))))["code_hash"]
    name = f"{arena.config.name}-arena-{arena.config_hash[:8]}-{code[:8]}"
    return arena.config.output_dir / name


def _open_sink(arena: Arena, registration: ArenaRegistration, folder: Path) -> MlflowSink:
    config = arena.config
    return MlflowSink.open(
        config.mlflow.tracking_uri,
        config.mlflow.experiment,
        f"{config.name}-arena",
        folder.name,
        config.model_dump(mode="json", include={"name", "treatment", "pairs", "scale"}),
        {"registration_hash": registration.registration_hash, "evidence": str(folder)},
    )


def _conclude(
    arena: Arena,
    registration: ArenaRegistration,
    folder: Path,
    sink: MlflowSink,
    results: Mapping[str, SweepResult],
    command: str,
) -> ArenaResult:
    tasks = {
        name: evidence_of(arena.sweeps[name], r.registration, r.folder, arena.absent[name])
        for name, r in results.items()
    }
    summary = summarise_arena(registration, tasks)
    write_json(folder / "summary.json", summary)
    target = folder / "pictures"
    pictures = draw_over_tasks(summary, target)
    of_tasks = {
        name: draw_task(arena.sweeps[name], tasks[name], summary, name, target) for name in tasks
    }
    report = write_report(summary, pictures, of_tasks, command, folder / "report.html")
    run_ids = [r.mlflow_run_id for r in results.values()]
    log_arena(sink, summary, run_ids, report, sorted(target.glob("*.png")), command)
    return ArenaResult(folder, summary, results, report, sink.parent_run_id)


def evidence_of(
    sweep: SweepConfig, registration: Registration, folder: Path, absent: Mapping[str, str]
) -> TaskEvidence:
    """What a task's sweep left on disk."""
    return TaskEvidence(
        registration, read_records(folder), sweep.dependent_arms, sweep.salted_arms, absent
    )


def draw_task(
    sweep: SweepConfig, evidence: TaskEvidence, summary: ArenaSummary, task: str, folder: Path
) -> dict[str, Path]:
    """Fronts and growth curves of one task, in the colours that the methods have everywhere."""
    records = list(evidence.records)
    methods = [summary.treatment, *summary.controls]
    curves = folder / f"growth_curves_{task}.png"
    return {
        f"Fronts of {task}": fronts(summary, task, folder / f"fronts_{task}.png"),
        f"Growth curves of {task}": growth_curves(
            records, curve_of(sweep, records), curves, methods
        ),
    }


def draw_over_tasks(summary: ArenaSummary, folder: Path) -> dict[str, Path]:
    """Pictures over all tasks; none where a task has no scale, which the report then says."""
    if not summary.aggregates:
        return {}
    return {
        "Scores": score_intervals(summary, folder / "scores.png"),
        "Performance profiles": performance_profiles(summary, folder / "profiles.png"),
    }
