"""The time a sweep still takes, from what its trials took."""

from datetime import timedelta

import pytest

from esper.evidence.progress import TrialProgress, begin


def sweep(*trials, slots=2, heard_s=0.0):
    """Trials as (state, step, seconds since it started or None, seconds since it ended)."""
    made = {
        f"t{k}": TrialProgress(
            arm="a", pair=k, steps=100, interval_steps=10, state=state, step=step
        )
        for k, (state, step, *_) in enumerate(trials)
    }
    progress = begin("x", made)
    at = progress.updated_at
    for k, (_, _, started, ended) in enumerate(trials):
        made[f"t{k}"] = made[f"t{k}"].model_copy(update={
            "started_at": None if started is None else at - timedelta(seconds=started),
            "ended_at": None if ended is None else at - timedelta(seconds=ended),
        })  # fmt: skip
    return progress.model_copy(update={"slots": slots, "trials": made})


def test_nothing_is_known_before_a_step():
    assert sweep(("waiting", 0, None, None)).seconds_left is None
    assert sweep(("running", 0, 5, None)).seconds_left is None


def test_what_is_left_is_shared_by_the_slots():
    trials = [("finished", 100, 20, 10), *[("waiting", 0, None, None)] * 4]
    assert sweep(*trials).seconds_left == pytest.approx(20)
    assert sweep(*trials, slots=8).seconds_left == pytest.approx(10)


def test_a_trial_half_done_counts_half():
    assert sweep(("running", 50, 5, None)).seconds_left == pytest.approx(5)


def test_what_another_driver_did_tells_nothing_of_this_ones_pace():
    before = ("finished", 100, None, None)
    assert sweep(before, before, ("waiting", 0, None, None)).seconds_left is None


@pytest.mark.parametrize("state", ["finished", "collapsed", "failed", "not needed"])
def test_nothing_is_left_of_trials_that_will_not_run(state):
    assert sweep((state, 0, None, None)).seconds_left == 0
