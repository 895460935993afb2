"""The table of DESIGN.md, section 3: what it allows happens, and nothing else."""

import copy
import pickle
from itertools import product

import pytest

from esper.registry import UnknownNameError
from esper.seeds.actions import Action, Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.grafting import GRAFTS
from esper.seeds.lifecycle import IllegalTransitionError, Transition, advance
from esper.seeds.state import (
    AWAKE_STAGES,
    GRAFTED_STAGES,
    RESTING_STAGES,
    TRAINABLE_STAGES,
    SeedState,
    SeedTable,
    Stage,
)

LEGAL = {
    Stage.DORMANT: {"Germinate": Stage.GERMINATED},
    Stage.GERMINATED: {"Promote": Stage.TRAINING, "Cancel": Stage.CANCELLED},
    Stage.TRAINING: {
        "Advance": Stage.GRAFTING,
        "Cull": Stage.CULLED,
        "Cancel": Stage.CANCELLED,
        "Rollback": Stage.ROLLED_BACK,
    },
    Stage.GRAFTING: {
        "Advance": Stage.STABILIZATION,
        "Cull": Stage.CULLED,
        "Rollback": Stage.ROLLED_BACK,
    },
    Stage.STABILIZATION: {"Advance": Stage.EVALUATING, "Rollback": Stage.ROLLED_BACK},
    Stage.EVALUATING: {
        "Advance": Stage.FINE_TUNING,
        "Cull": Stage.CULLED,
        "Rollback": Stage.ROLLED_BACK,
    },
    Stage.FINE_TUNING: {
        "Advance": Stage.FOSSILIZED,
        "Cull": Stage.CULLED,
        "Rollback": Stage.ROLLED_BACK,
    },
    Stage.FOSSILIZED: {},
    Stage.CULLED: {"Advance": Stage.DORMANT},
    Stage.CANCELLED: {"Advance": Stage.DORMANT},
    Stage.ROLLED_BACK: {"Advance": Stage.DORMANT},
}
ACTIONS = {kind.__name__: kind("fc1", 3) for kind in (Promote, Advance, Cull, Cancel, Rollback)} | {
    "Germinate": Germinate("fc1", 3, "mlp_silu", "cosine")
}


def test_the_eleven_stages_have_the_numbers_of_the_design():
    assert {s.name: int(s) for s in Stage} == {
        "DORMANT": 0, "GERMINATED": 1, "TRAINING": 2, "GRAFTING": 3, "STABILIZATION": 4,
        "EVALUATING": 5, "FINE_TUNING": 6, "FOSSILIZED": 7, "CULLED": 8, "CANCELLED": 9,
        "ROLLED_BACK": 10,
    }  # fmt: skip
    assert set(LEGAL) == set(Stage)


def test_the_groups_of_stages():
    assert {int(s) for s in TRAINABLE_STAGES} == {2, 3, 6}
    assert {int(s) for s in GRAFTED_STAGES} == {3, 4, 5, 6, 7}
    assert {int(s) for s in AWAKE_STAGES} == {1, 2, 3, 4, 5, 6, 7}
    assert {int(s) for s in RESTING_STAGES} == {8, 9, 10}


@pytest.mark.parametrize(("stage", "name"), list(product(Stage, ACTIONS)))
def test_every_pair_of_stage_and_action(stage, name):
    action = ACTIONS[name]
    before = SeedState(stage, 4, 7, 2)
    kept, wanted = copy.deepcopy((before, action)), LEGAL[stage].get(name)
    if wanted is None:
        with pytest.raises(IllegalTransitionError) as caught:
            advance(before, action)
        legal = ", ".join(LEGAL[stage]) or "nothing, the stage is terminal"
        assert str(caught.value).startswith(f"{name} on seed 3 of site 'fc1' must fit its stage")
        assert f"the seed is {stage.name}" in str(caught.value)
        said = str(caught.value).partition("legal now: ")[2].rstrip(".")
        assert sorted(said.split(", ")) == sorted(legal.split(", "))
    else:
        after = advance(before, action)
        assert after.stage is wanted
        assert after.epochs == 0
    assert (before, action) == kept


def test_what_the_state_keeps():
    state = advance(SeedState(), ACTIONS["Germinate"])
    ids = (tuple(BLUEPRINTS).index("mlp_silu"), tuple(GRAFTS).index("cosine"))
    assert (state.blueprint_id, state.graft_id) == ids
    trained = advance(state, ACTIONS["Promote"])
    assert (trained.blueprint_id, trained.graft_id) == ids
    culled = advance(trained, ACTIONS["Cull"])
    assert (culled.blueprint_id, culled.graft_id) == ids
    assert advance(culled, ACTIONS["Advance"]) == SeedState()


def test_an_action_of_no_kind_is_illegal():
    with pytest.raises(IllegalTransitionError, match=r"legal now: Germinate\."):
        advance(SeedState(), Action("fc1", 0))


def test_the_error_survives_pickling():
    error = IllegalTransitionError(Stage.FOSSILIZED, ACTIONS["Cull"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.stage, again.action) == (Stage.FOSSILIZED, ACTIONS["Cull"])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Germinate("a", 0, "mlp_relo"), r"blueprint must be one of noop, .*mean 'mlp_relu'\?"),
        (Germinate("a", 0, "glu", "cosin"), r"graft strategy must be .*mean 'cosine'\?"),
        (Germinate("a", 0, "xyz"), r"got 'xyz'; register it first"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(action, message):
    with pytest.raises(UnknownNameError, match=message):
        advance(SeedState(), action)


def test_a_transition_names_the_blueprint_that_the_seed_had_or_got():
    germinate = ACTIONS["Germinate"]
    got = Transition(1, 10, germinate, SeedState(), advance(SeedState(), germinate))
    resting = SeedState(Stage.CULLED, got.after.blueprint_id)
    had = Transition(1, 10, ACTIONS["Advance"], resting, advance(resting, ACTIONS["Advance"]))
    assert got.blueprint == had.blueprint == "mlp_silu"


def test_a_table_of_states_is_a_sequence_of_them_and_keeps_them_as_numbers():
    states = [SeedState(stage, i, 2 * i, i % 3) for i, stage in enumerate(Stage)]
    table = SeedTable.of(states)
    assert table.rows.shape == (11, 4)
    assert table.rows.dtype == "int32"
    assert list(table) == states
    assert (table[3], table[-1], table[1:3]) == (states[3], states[-1], states[1:3])
    table[4] = SeedState()
    assert table.stages()[Stage.DORMANT] == 2
    assert Stage.STABILIZATION not in table.stages()
    assert table.seeds_in({Stage.DORMANT, Stage.CULLED}) == [0, 4, 8]
    assert table != SeedTable.of(states)
    table[4] = states[4]
    assert table == SeedTable.of(states)


def test_a_number_that_is_no_stage_is_an_error():
    table = SeedTable.of([SeedState()])
    table.rows[0, 0] = 11
    with pytest.raises(ValueError, match="11 is not a valid Stage"):
        table.stages()
