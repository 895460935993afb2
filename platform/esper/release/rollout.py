"""A rollout on disk: its plan, and one entry for every interval that was judged.

    <folder>/plan.json    what was decided before the first model got the new path
    <folder>/001.json     evidence, verdict, and the hash of the file before it; 002.json, ...

Where a rollout stands is computed from the entries, and every verdict can be computed again from
the evidence beside it. The flag is moved by `esper.release.change`, which records it.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from esper.evidence.records import Record, write_json
from esper.release.audit import digest
from esper.release.change import change_flag
from esper.release.errors import ReleaseError
from esper.release.flags import FULL_BP, load_flags
from esper.release.judge import (
    Decision,
    Evidence,
    GateEvidence,
    IntervalMeasurements,
    PhaseMeasurements,
    Verdict,
    judge,
    judge_gate,
)
from esper.release.phases import Alert, Assertion, Plan, Policy, Quantity
from esper.release.snapshot import Snapshot

R = TypeVar("R", bound=BaseModel)
PLAN = "plan.json"


class RolloutPlan(Record):
    """Everything that rules a rollout, written down before it begins."""

    name: str
    phase: int
    flag: str
    flags_path: str = Field(description="Of the file of flags, relative to the rollout's folder.")
    environment: str | None
    before_bp: int | None
    steps_bp: tuple[int, ...]
    policy: Policy
    alerts: tuple[Alert, ...]
    conditions: tuple[Assertion, ...]
    created_at: AwareDatetime
    created_by: str


class Entry(Record):
    """One judged interval, or an attempt to begin."""

    number: int
    kind: Literal["begin", "interval"]
    gate: GateEvidence | None
    evidence: Evidence | None
    verdict: Verdict
    previous: str


class State(NamedTuple):
    """Where a rollout stands.

    Attributes:
        step: 0 before it begins, else the step of the ramp that is in force.
        intervals: Intervals judged so far.
        is_over: Whether it was rolled back or reached everybody.
        share_bp: What the flag's rollout must be at.
    """

    step: int
    intervals: int
    is_over: bool
    share_bp: int | None


class Stored(NamedTuple):
    """A rollout as it is on disk; `last` is the hash of its newest file."""

    plan: RolloutPlan
    entries: tuple[Entry, ...]
    last: str
    flags_path: Path


def new_plan(
    plan: Plan,
    phase_number: int,
    folder: Path,
    *,
    environment: str | None,
    actor: str,
    now: datetime,
) -> RolloutPlan:
    """The plan of a phase's rollout in a folder, which need not exist.

    Raises:
        ReleaseError: If the phase or the environment is not there.
    """
    phase = plan.phases.phase(phase_number)
    Snapshot(plan.flags, environment)
    return RolloutPlan(
        name=folder.resolve().name,
        phase=phase.number,
        flag=phase.rollout.flag,
        flags_path=os.path.relpath(plan.flags_path.resolve(), folder.resolve()),
        environment=environment,
        before_bp=plan.flags.flag(phase.rollout.flag).rollout_bp,
        steps_bp=phase.rollout.steps_bp,
        policy=plan.migration.policy,
        alerts=phase.alerts,
        conditions=(*phase.gates, *phase.targets),
        created_at=now,
        created_by=actor,
    )


def create(folder: Path, plan: RolloutPlan) -> None:
    """Write a plan into a new folder.

    Raises:
        ReleaseError: If the folder already holds one, the flag is on for somebody, or a flag that
            it needs is not on for everybody.
    """
    if (folder / PLAN).exists():
        raise ReleaseError(f"{folder} must be a new folder, but holds a rollout; name another.")
    file = load_flags(_flags_path(folder, plan))
    flag = file.flag(plan.flag)
    if flag.default or flag.killed or (flag.rollout_bp or 0) >= plan.steps_bp[0]:
        raise ReleaseError(
            f"{plan.flag} must be below its canary of {plan.steps_bp[0]} basis points to be rolled "
            f"out, but has default={flag.default}, killed={flag.killed}, "
            f"rollout_bp={flag.rollout_bp}; set it back first."
        )
    for name in flag.prerequisites:
        needed = file.flag(name)
        if needed.killed or not (needed.default or needed.rollout_bp == FULL_BP):
            raise ReleaseError(
                f"{name} must be on for every model before {plan.flag} is rolled out, but is not: "
                f"its share would be less than it says; finish the rollout of {name} first."
            )
    write_json(folder / PLAN, plan)


def _flags_path(folder: Path, plan: RolloutPlan) -> Path:
    """Where the flags are, also while the rollout's folder does not exist yet."""
    return (folder.resolve() / plan.flags_path).resolve()


def read(folder: Path) -> Stored:
    """Read a rollout and check that its files belong together.

    Raises:
        ReleaseError: If one is missing, damaged, or does not follow the one before it.
    """
    plan_path = folder / PLAN
    plan, last = parsed(RolloutPlan, plan_path), digest(plan_path.read_bytes())
    entries = []
    for number, path in enumerate(sorted(folder.glob("[0-9][0-9][0-9].json")), start=1):
        entry = parsed(Entry, path)
        if (entry.number, entry.previous, path.name) != (number, last, f"{number:03d}.json"):
            raise ReleaseError(
                f"{path} must follow the file before it, but does not: a file was changed, removed "
                "or added; restore it."
            )
        entries.append(entry)
        last = digest(path.read_bytes())
    return Stored(plan, tuple(entries), last, _flags_path(folder, plan))


def parsed(model: type[R], path: Path) -> R:
    """One JSON file.

    Raises:
        ReleaseError: If it is not there, or is no such record.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ReleaseError(f"{path} must be readable, but: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ReleaseError(
            f"{path} must be {model.__name__} as JSON, but {where}: {first['msg']}."
        ) from None


def read_measured(paths: Sequence[Path]) -> PhaseMeasurements:
    """What several tools measured of one commit, such as a baseline and the regression suite.

    Args:
        paths: At least one file; the whole is as old as its oldest part.

    Raises:
        ReleaseError: If a file is damaged, the commits differ, or two files measure the same.
    """
    parts = [parsed(PhaseMeasurements, path) for path in paths]
    commits = {part.commit for part in parts}
    if len(parts) > 1 and (len(commits) > 1 or None in commits):
        told = ", ".join(f"{path}: {p.commit}" for path, p in zip(paths, parts, strict=True))
        raise ReleaseError(
            f"measurements must be of one known commit, but got {told}; measure one commit."
        )
    joined: dict[str, Quantity] = {}
    for path, part in zip(paths, parts, strict=True):
        if twice := sorted(joined.keys() & part.quantities):
            raise ReleaseError(
                f"a quantity must be measured once, but {path} holds {', '.join(twice)} again; "
                "leave one file out."
            )
        joined |= part.quantities
    return PhaseMeasurements(
        commit=parts[0].commit,
        ended_at=min(part.ended_at for part in parts),
        quantities=joined,
        checks=tuple(check for part in parts for check in part.checks),
    )


def state_of(plan: RolloutPlan, entries: Sequence[Entry]) -> State:
    """Where a rollout stands after its entries."""
    step = intervals = 0
    for entry in entries:
        intervals += entry.kind == "interval"
        match entry.verdict.decision:
            case Decision.ROLLBACK:
                return State(step, intervals, True, plan.before_bp)
            case Decision.ADVANCE if step == len(plan.steps_bp):
                return State(step, intervals, True, plan.steps_bp[-1])
            case Decision.ADVANCE:
                step += 1
    return State(step, intervals, False, plan.steps_bp[step - 1] if step else plan.before_bp)


def rejudge(plan: RolloutPlan, entry: Entry) -> Verdict:
    """The verdict that the stored evidence gives."""
    if entry.gate is not None:
        return judge_gate(entry.gate, plan.conditions, plan.policy)
    assert entry.evidence is not None
    return judge(entry.evidence, plan.policy, plan.alerts)


def flags_hash(stored: Stored) -> str:
    """Hash of the flags as they are now, in the rollout's environment."""
    return Snapshot(load_flags(stored.flags_path), stored.plan.environment).hash


def step(folder: Path, evidence: Sequence[Path], *, actor: str, now: datetime) -> Entry:
    """Judge new evidence, store it, and move the flag accordingly.

    A rollback moves the flag before anything is stored; an advance is stored before it moves.

    Args:
        folder: Of the rollout.
        evidence: JSON of `PhaseMeasurements` while it has not begun, in one file or several; else
            one file of `IntervalMeasurements`.
        actor: Who asks.
        now: When it is judged.

    Raises:
        ReleaseError: If the rollout is over, its files or the evidence are damaged, or the flag is
            not where the rollout left it. Nothing is changed then.
    """
    with _locked(folder):
        stored = read(folder)
        state = state_of(stored.plan, stored.entries)
        if state.is_over:
            raise ReleaseError(f"{folder} must be a running rollout, but it is over.")
        _require_flag(stored, state, actor)
        entry = _judged(stored, state, evidence, now)
        path = folder / f"{entry.number:03d}.json"
        after = state_of(stored.plan, (*stored.entries, entry))
        if entry.verdict.decision == Decision.ROLLBACK:
            _move(stored, after, entry, actor)
            write_json(path, entry)
        else:
            write_json(path, entry)
            if after.share_bp != state.share_bp:
                _move(stored, after, entry, actor)
        return entry


def _judged(stored: Stored, state: State, paths: Sequence[Path], now: datetime) -> Entry:
    plan, gate, evidence = stored.plan, None, None
    if state.step == 0:
        gate = GateEvidence(measured=read_measured(paths), judged_at=now)
        verdict = judge_gate(gate, plan.conditions, plan.policy)
    else:
        if len(paths) > 1:
            raise ReleaseError(f"an interval must be one file, but got {len(paths)}.")
        evidence = Evidence(
            measurements=parsed(IntervalMeasurements, paths[0]),
            rollout=plan.name,
            step=state.step,
            interval=state.intervals + 1,
            flags_hash=flags_hash(stored),
            judged_at=now,
        )
        verdict = judge(evidence, plan.policy, plan.alerts)
    return Entry(
        number=len(stored.entries) + 1,
        kind="interval" if evidence else "begin",
        gate=gate,
        evidence=evidence,
        verdict=verdict,
        previous=stored.last,
    )


def _require_flag(stored: Stored, state: State, actor: str) -> None:
    """Check that the flag is where the last entry put it; finish a move that was cut short."""
    plan = stored.plan
    flag = load_flags(stored.flags_path).flag(plan.flag)
    if flag.killed or flag.default:
        raise ReleaseError(
            f"{plan.flag} must be neither killed nor on for all during a rollout, but is; "
            "set it back, or begin a new rollout."
        )
    if flag.rollout_bp == state.share_bp:
        return
    if stored.entries:
        before = state_of(plan, stored.entries[:-1])
        if flag.rollout_bp == before.share_bp:
            _move(stored, state, stored.entries[-1], actor)
            return
    raise ReleaseError(
        f"{plan.flag} must be at {state.share_bp} basis points where the rollout left it, but is "
        f"at {flag.rollout_bp}; set it back, or begin a new rollout."
    )


def _move(stored: Stored, after: State, entry: Entry, actor: str) -> None:
    """Set the flag to where the rollout is after an entry."""
    is_back = entry.verdict.decision == Decision.ROLLBACK
    change_flag(
        stored.flags_path,
        stored.plan.flag,
        {"rollout_bp": after.share_bp},
        actor=actor,
        reason=f"rollout {stored.plan.name}, entry {entry.number}: {entry.verdict.reasons[0]}",
        action="rollback" if is_back else "advance",
        at_once=is_back,
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One step at a time."""
    if not folder.is_dir():
        raise ReleaseError(f"{folder} must be the folder of a rollout, but is none.")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
