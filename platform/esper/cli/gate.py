"""`esper gate`: may this go on? Reads stored evidence alone and changes nothing."""

from datetime import UTC, datetime
from pathlib import Path

from esper.release.errors import ReleaseError
from esper.release.judge import Decision, GateEvidence, Verdict, judge_gate
from esper.release.phases import load_migration
from esper.release.rollout import read, read_measured, rejudge

WORST_FIRST = (Decision.ROLLBACK, Decision.INCONCLUSIVE, Decision.HOLD, Decision.ADVANCE)


def gate(config: Path, phase: int | None, measured: list[Path], rollout: Path | None) -> int:
    """Print the decision on a phase's targets and gates, on a rollout's last evidence, or both.

    Returns:
        The exit code of the worse of the two.

    Raises:
        ReleaseError: If neither is asked for, or a file is damaged.
    """
    now = datetime.now(UTC)
    verdicts = {}
    if phase is not None and measured:
        verdicts[f"phase {phase}"] = _of_phase(config, phase, measured, now)
    elif phase is not None or measured:
        raise ReleaseError("a phase must be given with what was measured; give both or none.")
    if rollout is not None:
        verdicts[f"rollout {rollout.resolve().name}"] = _of_rollout(rollout, now)
    if not verdicts:
        raise ReleaseError("a gate must have evidence; give --phase and --measured, or --rollout.")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict.decision}")
        for reason in verdict.reasons:
            print(f"      {reason}")
    return min((v.decision for v in verdicts.values()), key=WORST_FIRST.index).exit_code


def _of_phase(config: Path, number: int, measured: list[Path], now: datetime) -> Verdict:
    plan = load_migration(config)
    phase = plan.phases.phase(number)
    evidence = GateEvidence(measured=read_measured(measured), judged_at=now)
    return judge_gate(evidence, (*phase.gates, *phase.targets), plan.migration.policy)


def _of_rollout(folder: Path, now: datetime) -> Verdict:
    """The last verdict, judged again as of now: what was fresh then may be stale today."""
    stored = read(folder)
    if not stored.entries:
        reason = f"{folder} has no evidence yet"
        return Verdict(decision=Decision.INCONCLUSIVE, reasons=(reason,), guards=())
    last = stored.entries[-1]
    fresh = {
        name: part.model_copy(update={"judged_at": now})
        for name, part in (("gate", last.gate), ("evidence", last.evidence))
        if part is not None
    }
    return rejudge(stored.plan, last.model_copy(update=fresh))
