"""What a finished trial tells a later one, which follows it or takes its decisions again."""

from esper.controller.base import GrowthEvent
from esper.evidence.records import TransitionRecord, TrialRecord
from esper.seeds.actions import Action
from esper.seeds.state import AWAKE_STAGES, Stage
from esper.surgery.growth_log import unpack_action
from esper.training.trainer import BACK


def kept_events(record: TrialRecord) -> tuple[GrowthEvent, ...]:
    """What a finished trial germinated and still had at its end, in order."""
    last: dict[tuple[str, int], TransitionRecord] = {}
    germinated: dict[tuple[str, int], TransitionRecord] = {}
    for t in record.transitions:
        key = (t.site, t.seed)
        last[key] = t
        if t.action == "Germinate":
            germinated[key] = t
    awake = {stage.name for stage in AWAKE_STAGES}
    kept = [germinated[key] for key, t in last.items() if t.after in awake]
    kept.sort(key=lambda t: t.interval)
    return tuple(GrowthEvent(t.interval, t.site, t.seed, t.blueprint) for t in kept)


def commanded(record: TrialRecord, graft: str) -> dict[int, list[Action]]:
    """The actions of a finished trial by interval, for a controller that replays them.

    Args:
        record: The trial.
        graft: Graft strategy of its seeds, which a record does not hold.
    """
    actions: dict[int, list[Action]] = {}
    for t in record.transitions:
        # a seed that went back with the run was not commanded to
        if t.action == "Rollback" and t.after != Stage.ROLLED_BACK.name:
            continue
        options = {"blueprint": t.blueprint, "graft": graft} if t.action == "Germinate" else {}
        reason = t.reason.partition(BACK)[0]
        fields = {"site": t.site, "seed": t.seed, "reason": reason, **options}
        action = unpack_action({"action": t.action, "fields": fields})
        actions.setdefault(t.interval, []).append(action)
    return actions
