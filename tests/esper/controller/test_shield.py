"""The shield lets through what is legal, affordable and earned, and says why not."""

import json

import pytest

from esper.config.run import GrowthConfig
from esper.controller import Shield
from esper.controller.base import Stateless
from esper.seeds.actions import Advance, Cull, Germinate, Promote, Rollback
from esper.seeds.gates import MissingMeasurementError
from esper.seeds.state import Stage


class Scripted:
    """Returns what it is told to."""

    def __init__(self, *actions):
        self.actions = list(actions)

    def decide(self, report):
        return list(self.actions)


def outcome(report, *actions):
    shield = Shield(Scripted(*actions))
    return shield.decide(report), [v.reason for v in shield.vetoes]


def germinate(*seeds, site="a", blueprint="mlp_gelu"):
    return [Germinate(site, s, blueprint) for s in seeds]


def test_what_breaks_no_limit_passes_in_its_order(make_report, make_site):
    stage = [Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING, Stage.FINE_TUNING]
    wanted = [*germinate(0), Promote("a", 1), Advance("a", 2), Cull("a", 3)]
    report = make_report(make_site(stage=stage, epochs=1))
    assert outcome(report, *wanted) == (wanted, [])


def test_the_parameter_budget_counts_the_whole_wave(make_report):
    report = make_report(growth=GrowthConfig(max_parameters=1250), parameters=1000)
    allowed, reasons = outcome(report, *germinate(0, 1, 2, 3))
    assert allowed == germinate(0, 1)
    assert reasons == ["G0 is shut: 1300 parameters would pass 1250"] * 2


def test_the_limit_of_active_seeds_counts_the_whole_wave(make_report, make_site):
    stage = [Stage.FOSSILIZED, Stage.DORMANT, Stage.DORMANT, Stage.CULLED]
    report = make_report(make_site(stage=stage), growth=GrowthConfig(max_active_seeds=2))
    allowed, reasons = outcome(report, *germinate(1, 2))
    assert allowed == germinate(1)
    assert reasons == ["G0 is shut: 2 seeds are awake, the limit is reached"]


def test_the_budget_is_shared_by_all_sites(make_report, make_site):
    report = make_report(make_site("a"), make_site("b"), growth=GrowthConfig(max_active_seeds=1))
    allowed, reasons = outcome(report, *germinate(0), *germinate(0, site="b"))
    assert [a.site for a in allowed] == ["a"]
    assert len(reasons) == 1


@pytest.mark.parametrize(("drift", "passes"), [(None, True), (0.5, True), (0.51, False)])
def test_a_drifting_host_gets_no_new_seed(make_report, drift, passes):
    growth = GrowthConfig(max_drift_frac=0.5)
    allowed, reasons = outcome(make_report(drift=drift, growth=growth), *germinate(0))
    assert bool(allowed) is passes
    assert reasons == ([] if passes else ["the host drifts by 0.510 an interval, limit 0.5"])


def test_failures_in_a_row_stop_germination_until_one_succeeds(make_report, make_site):
    growth = GrowthConfig(max_failures=2)
    stage = [Stage.DORMANT, Stage.EVALUATING, Stage.EVALUATING, Stage.EVALUATING]
    site = make_site(stage=stage, gain=1.0)
    script = Scripted(Cull("a", 1), Rollback("a", 2), *germinate(0))
    shield = Shield(script)
    assert len(shield.decide(make_report(site, growth=growth))) == 2
    assert shield.vetoes[0].reason == "2 seeds failed in a row, the limit is 2"

    script.actions = germinate(0)
    assert shield.decide(make_report(interval=2, growth=growth)) == []
    script.actions = [Advance("a", 3), *germinate(0)]
    assert len(shield.decide(make_report(site, interval=3, growth=growth))) == 2
    assert [v.interval for v in shield.vetoes] == [1, 2]


@pytest.mark.parametrize(
    ("stage", "columns", "reason"),
    [
        (Stage.TRAINING, {"epochs": 0}, "G2 is shut: trained 0 of 1 intervals"),
        (Stage.GRAFTING, {"alpha": 0.5}, "G3 is shut: alpha is 0.500"),
        (Stage.STABILIZATION, {"graft_loss": 0.1, "epochs": 1}, "G4 is shut: loss 1, limit 0.15"),
        (Stage.EVALUATING, {"gain": -0.5}, "G5 is shut: held-out gain -0.5, needs 0"),
        (Stage.FINE_TUNING, {"epochs": 9}, "time is shut: fine-tuned 9 of 10 intervals"),
        (Stage.CULLED, {"epochs": 4}, "G1 is shut: embargo 4 of 5 intervals"),
    ],
)
def test_no_seed_passes_a_shut_gate(make_report, make_site, stage, columns, reason):
    report = make_report(make_site(stage=[stage], **columns))
    assert outcome(report, Advance("a", 0)) == ([], [reason])


def test_a_gate_without_its_measurement_is_an_error_and_no_veto(make_report, make_site):
    report = make_report(make_site(stage=[Stage.EVALUATING], gain=float("nan")))
    with pytest.raises(MissingMeasurementError, match=r"gain must be measured for seed 0 of 'a'"):
        outcome(report, Advance("a", 0))


def test_an_illegal_move_is_vetoed_with_the_legal_ones(make_report):
    allowed, (reason,) = outcome(make_report(), Cull("a", 2))
    assert allowed == []
    assert reason.startswith("Cull on seed 2 of site 'a'")
    assert reason.endswith("legal now: Germinate.")


def test_a_seed_passes_in_one_interval_only_stages_that_take_no_time(make_report, make_site):
    at_once = GrowthConfig(training_intervals=0, stabilization_intervals=0)
    life = [*germinate(0), Promote("a", 0), Advance("a", 0)]
    # a seed whose graft is complete rests for no time, and is evaluated for one interval
    grafted = make_site(stage=[Stage.DORMANT, Stage.GRAFTING], alpha=1.0, epochs=1)
    rest = [Advance("a", 1), Advance("a", 1)]
    report = make_report(grafted, growth=at_once)
    allowed, reasons = outcome(report, *life, Cull("a", 0), *rest, Advance("a", 1))
    assert allowed == [*life, *rest]
    assert reasons == ["the seed was moved in this interval already"] * 2


def test_a_seed_that_takes_time_does_not_skip_it(make_report):
    allowed, reasons = outcome(make_report(), *germinate(0), Promote("a", 0), Advance("a", 0))
    assert allowed == [*germinate(0), Promote("a", 0)]
    assert reasons == ["G2 is shut: trained 0 of 1 intervals"]


def test_a_vetoed_action_does_not_count_as_a_move(make_report):
    allowed, reasons = outcome(make_report(), Cull("a", 0), *germinate(0))
    assert allowed == germinate(0)
    assert len(reasons) == 1


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (Germinate("s", 0, "glu"), "blueprint 'glu' does not fit a span site"),
        (Germinate("s", 4, "mlp_relu"), "seed must be in 0..3, but got 4"),
        (Germinate("s", -1, "mlp_relu"), "seed must be in 0..3, but got -1"),
        (Germinate("t", 0, "mlp_relu"), "site must be one of s, but got 't'"),
    ],
)
def test_what_does_not_fit_is_vetoed(make_report, make_site, action, reason):
    report = make_report(make_site("s", geometry="span"))
    assert outcome(report, action) == ([], [reason])


@pytest.mark.parametrize(
    ("action", "hint"),
    [
        (Germinate("a", 0, "mlp_relo"), "Did you mean 'mlp_relu'?"),
        (Germinate("a", 0, "mlp_relu", graft="cosin"), "Did you mean 'cosine'?"),
    ],
)
def test_an_unknown_name_is_vetoed_with_the_nearest(make_report, action, hint):
    allowed, (reason,) = outcome(make_report(), action)
    assert allowed == []
    assert hint in reason


def test_a_veto_keeps_the_action_and_its_interval(make_report):
    shield = Shield(Scripted(Cull("a", 1, "because")))
    shield.decide(make_report(interval=7))
    (veto,) = shield.vetoes
    assert (veto.interval, veto.action) == (7, Cull("a", 1, "because"))


def test_after_the_last_incident_nothing_germinates(make_report):
    shield = Shield(Scripted(*germinate(0)))
    report = make_report(growth=GrowthConfig(max_rollbacks=2))
    shield.incidents = 1
    assert shield.decide(report) == germinate(0)
    shield.incidents = 2
    assert shield.decide(report) == []
    assert shield.vetoes[-1].reason == "the run broke 2 times, the limit is 2"


class Counting:
    """Remembers how often it was asked."""

    def __init__(self):
        self.asked = 0

    def decide(self, report):
        self.asked += 1
        return germinate(0, 0)

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def test_a_controller_goes_back_and_the_shield_does_not(make_report):
    controller = Counting()
    shield = Shield(controller)
    shield.decide(make_report())
    memory = shield.memory()
    shield.decide(make_report(interval=2))
    shield.incidents += 1
    shield.count_failures(8)
    shield.go_back(memory)
    assert (controller.asked, shield.incidents, len(shield.vetoes)) == (1, 1, 2)
    # the failed seeds are not forgotten
    assert shield.decide(make_report(interval=3)) == []
    assert "8 seeds failed in a row, the limit is 8" in {v.reason for v in shield.vetoes}


def test_everything_of_a_shield_comes_back_from_a_file(make_report):
    shield = Shield(Counting())
    shield.decide(make_report())
    shield.incidents = 2
    shield.count_failures(7)
    again = Shield(Counting())
    again.load_state_dict(json.loads(json.dumps(shield.state_dict())))
    assert again.vetoes == shield.vetoes != []
    assert again.state_dict() == shield.state_dict()


def test_a_controller_that_would_forget_something_is_refused(make_report):
    with pytest.raises(ValueError, match="Scripted has attributes and lacks them; inherit"):
        Shield(Scripted()).memory()

    class Constant(Stateless, Scripted):
        pass

    class Bare:
        def decide(self, report):
            return []

    for harmless in (Constant(), Bare()):
        shield = Shield(harmless)
        assert shield.memory() == {}
        shield.go_back({})
