"""`esper rollout`: plan, step, watch and replay the ramp of one flag."""

import getpass
import os
from datetime import UTC, datetime
from pathlib import Path

from esper.release.flags import environment_of, load_flags
from esper.release.judge import pairs_for
from esper.release.phases import load_migration
from esper.release.rollout import (
    Entry,
    RolloutPlan,
    create,
    flags_hash,
    new_plan,
    read,
    rejudge,
    state_of,
    step,
)


def plan_rollout(config: Path, phase: int, folder: Path | None, actor: str | None) -> None:
    """Print what a phase's rollout would do and needs; write it down if a folder is given."""
    migration = load_migration(config)
    plan = new_plan(
        migration,
        phase,
        folder or Path("rollout"),
        environment=environment_of(migration.flags, os.environ),
        actor=actor or getpass.getuser(),
        now=datetime.now(UTC),
    )
    print(f"{plan.flag}: {_share(plan.before_bp)} -> {', '.join(map(_share, plan.steps_bp))}")
    print("before it begins, measured and true:")
    for condition in plan.conditions:
        print(f"  {condition}")
    _print_needs(plan)
    for alert in plan.alerts:
        print(f"alert {alert.name} ({alert.owner}): {alert.on_firing} if {alert}")
    if folder is not None:
        create(folder, plan)
        print(f"written to {folder}; flags_hash {flags_hash(read(folder))}")


def _print_needs(plan: RolloutPlan) -> None:
    policy = plan.policy
    print(f"each interval, {policy.min_pairs} pairs of fresh processes at least:")
    for guard in policy.guards:
        needed = pairs_for(guard, policy)
        unit = "" if guard.compare == "ratio" else f" {guard.unit}"
        said = "more than 400" if needed is None else str(needed)
        short = " MORE THAN min_pairs" if needed is None or needed > policy.min_pairs else ""
        print(
            f"  {guard.metric}: {guard.worse} by {guard.fault:g}{unit} is rolled back within one "
            f"interval in 99 % of cases from {said} pairs on, at a spread of "
            f"{guard.pair_sd:g}{unit}; margin {guard.margin:g}{unit}{short}"
        )


def _share(bp: int | None) -> str:
    return "no rollout" if bp is None else f"{bp / 100:g} %"


def step_rollout(folder: Path, evidence: list[Path], actor: str | None) -> int:
    """Judge one interval and move the flag.

    Returns:
        The exit code of the decision.
    """
    entry = step(folder, evidence, actor=actor or getpass.getuser(), now=datetime.now(UTC))
    _print_entry(entry)
    stored = read(folder)
    state = state_of(stored.plan, stored.entries)
    over = ", the rollout is over" if state.is_over else ""
    print(f"{stored.plan.flag} is at {_share(state.share_bp)}{over}; "
          f"flags_hash {flags_hash(stored)}")  # fmt: skip
    return entry.verdict.decision.exit_code


def _print_entry(entry: Entry) -> None:
    print(f"{entry.number:>3} {entry.kind}: {entry.verdict.decision}")
    for reason in entry.verdict.reasons:
        print(f"      {reason}")


def show_rollout(folder: Path) -> None:
    """Print every verdict, where the rollout stands, and where the flag is."""
    stored = read(folder)
    plan, state = stored.plan, state_of(stored.plan, stored.entries)
    print(f"rollout {plan.name} of {plan.flag}, phase {plan.phase}, by {plan.created_by}")
    for entry in stored.entries:
        _print_entry(entry)
    flag = load_flags(stored.flags_path).flag(plan.flag)
    word = "over" if state.is_over else f"step {state.step} of {len(plan.steps_bp)}"
    print(f"{word}, {state.intervals} of {plan.policy.planned_intervals} planned intervals judged")
    differs = "" if flag.rollout_bp == state.share_bp else ", NOT where the rollout left it"
    print(f"{plan.flag} is at {_share(flag.rollout_bp)}{differs}; flags_hash {flags_hash(stored)}")


def replay_rollout(folder: Path) -> bool:
    """Judge all stored evidence again.

    Returns:
        Whether every verdict is the stored one, to the last digit.
    """
    stored = read(folder)
    same = True
    for entry in stored.entries:
        again = rejudge(stored.plan, entry)
        equal = again.model_dump_json() == entry.verdict.model_dump_json()
        same &= equal
        stored_as = "" if equal else f", stored as {entry.verdict.decision}: DIFFERS"
        print(f"{entry.number:>3} {entry.kind}: {again.decision}{stored_as}")
    print(f"{len(stored.entries)} verdicts, {'all identical' if same else 'NOT identical'}")
    return same
