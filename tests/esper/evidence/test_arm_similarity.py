"""Two arms' trained networks side by side, from their records."""

import numpy as np
import pytest

from esper.evidence.arm_similarity import compare_arms

VALUES = {"new": [0.8] * 4, "old": [0.8] * 4, "again": [0.8] * 4}


@pytest.fixture
def sweep(plant):
    """The new arm is off by 1e-3 in one output and parts at the second interval of pair 2."""
    sweep = plant(VALUES)
    records = []
    for r in sweep.records:
        outputs = np.random.default_rng(r.pair).normal(size=(5, 3)).astype(np.float32)
        losses = [1.0, 0.5, 0.25]
        if (r.arm, r.pair) == ("new", 2):
            outputs[0, 0] += 1e-3
            losses[1] = 0.5 + 2**-53
        update = {"outputs": outputs.tolist(), "curves": {"step": [1, 2, 3], "train_loss": losses}}
        records.append(r.model_copy(update=update))
    return type(sweep)(records, sweep.registration)


def test_outputs_and_losses_beside_the_controls_own_noise(sweep):
    found = compare_arms(sweep.records, "new", "old", "again")
    assert (found.pairs, found.left_out, found.outputs.elements) == (4, 0, 60)
    assert found.outputs.max_abs == pytest.approx(1e-3, rel=1e-3)
    assert found.parted == [None, None, 2, None]
    assert found.noise_outputs.identical
    assert found.noise_parted == [None] * 4
    assert found.within_noise is False
    assert compare_arms(sweep.records, "again", "old").outputs.identical
    assert compare_arms(sweep.records, "again", "old", "new").within_noise is True


def test_a_pair_that_collapsed_is_left_out_and_counted(sweep):
    broken = sweep.change("old-002", status="collapsed", collapse_reason="planted", outputs=None)
    found = compare_arms(broken.records, "new", "old", "again")
    assert (found.pairs, found.left_out, found.outputs.identical) == (3, 1, True)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (("new", "nobody"), "arms must be among again, new, old, but got 'nobody'"),
        (("new", "old", "old"), "arms must differ"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(sweep, arms, message):
    with pytest.raises(ValueError, match=message):
        compare_arms(sweep.records, *arms)


def test_records_that_kept_no_outputs_are_refused(plant):
    with pytest.raises(ValueError, match="outputs must be kept, but 8 records have none"):
        compare_arms(plant(VALUES).records, "new", "old")
