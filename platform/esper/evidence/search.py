"""What a search over sizes would have found and cost, computed from runs of every size.

Successive halving (Jamieson and Talwalkar, AISTATS 2016), whose asynchronous form is ASHA: all
candidates train a little, the best share goes on, and the last one trains to the end.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import count

from esper.config.base import ConfigError
from esper.config.sweep import Search
from esper.evidence.records import TrialRecord


def search_records(
    records: Sequence[TrialRecord], searches: Mapping[str, Search]
) -> list[TrialRecord]:
    """One record a search and pair, for the pairs whose candidates have all run.

    Args:
        records: Of the candidates, and any others.
        searches: By name; the names become arms.

    Raises:
        ConfigError: If a candidate has no curve of the search's metric.
    """
    by_pair: dict[int, dict[str, TrialRecord]] = {}
    for record in records:
        by_pair.setdefault(record.pair, {})[record.arm] = record
    return [
        halve(name, search, [runs[arm] for arm in search.over])
        for name, search in searches.items()
        for _, runs in sorted(by_pair.items())
        if set(search.over) <= runs.keys()
    ]


def halve(name: str, search: Search, runs: Sequence[TrialRecord]) -> TrialRecord:
    """The winner's record, with the operations and seconds of the whole search.

    Args:
        name: Arm of the record.
        search: How to search.
        runs: The candidates of one pair, all trained to the end.

    Raises:
        ConfigError: If a candidate has no curve of the search's metric.
    """
    for run in runs:
        if search.metric not in run.curves:
            raise ConfigError(f"search '{name}'", (
                f"it must compare a curve of its candidates, but '{run.trial_id}' has no "
                f"'{search.metric}', only {', '.join(run.curves)}; change its metric.",
            ))  # fmt: skip
    # counted, as the logarithm of 125 to the base of 5 is a little more than 3 in floating point
    rungs = next(n for n in count() if search.eta**n >= len(runs))
    left, spent = list(runs), {run.trial_id: 0.0 for run in runs}
    for rung in range(rungs + 1):
        share = search.eta ** (rung - rungs)
        for run in left:
            spent[run.trial_id] = share
        if rung < rungs:
            left.sort(key=lambda run: _badness(run, search, share))
            left = left[: max(1, math.ceil(len(left) / search.eta))]
    winner = min(left, key=lambda run: _badness(run, search, 1.0))
    cost = {
        key: sum(spent[run.trial_id] * run.metrics[key] for run in runs)
        for key in ("train_flops", "train_seconds")
    }
    return winner.model_copy(
        update={
            "trial_id": f"{name}-{winner.pair:03d}",
            "arm": name,
            "metrics": winner.metrics | cost,
        }
    )


def _badness(run: TrialRecord, search: Search, share: float) -> float:
    """The metric after a share of the steps, lower is better; infinite for a collapsed run."""
    curve = run.curves[search.metric]
    value = curve[max(0, round(share * len(curve)) - 1)] if curve else math.nan
    if run.status == "collapsed" or not math.isfinite(value):
        return math.inf
    return -value if search.higher_is_better else value
