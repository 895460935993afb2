"""Every registered controller, alone and behind the shield, passes the contract."""

import itertools

import pytest

from esper.controller import CONTROLLERS, GrowthEvent, Shield, Tamiyo
from esper.controller.contract import ControllerContract, random_reports
from esper.seeds.actions import Action, Germinate
from esper.seeds.state import Stage

OPTIONS = {
    "random": {"at_intervals": (1, 2, 5, 9), "count": 3, "blueprint": "mlp_relu"},
    "schedule": {"at_intervals": (1, 2, 5, 9), "count": 3, "graft": "cosine"},
    "tamiyo": {"patience_intervals": 1, "seeds_per_wave": 4},
    "learned": {"patience_intervals": 1, "seeds_per_wave": 4},
    "static": {},
}
EVENTS = (GrowthEvent(3, "chunks", 0, "glu"), GrowthEvent(4, "chunks", 1, "low_rank"))


def build(name, seed):
    return CONTROLLERS[name](**OPTIONS[name]).build(seed, EVENTS)


class TestRandom(ControllerContract):
    def make(self, seed):
        return build("random", seed)


class TestSchedule(ControllerContract):
    def make(self, seed):
        return build("schedule", seed)


class TestStatic(ControllerContract):
    def make(self, seed):
        return build("static", seed)


class TestTamiyo(ControllerContract):
    def make(self, seed):
        return build("tamiyo", seed)


class TestShieldedRandom(ControllerContract):
    def make(self, seed):
        return Shield(build("random", seed))


class TestShieldedSchedule(ControllerContract):
    def make(self, seed):
        return Shield(build("schedule", seed))


class TestShieldedStatic(ControllerContract):
    def make(self, seed):
        return Shield(build("static", seed))


class TestShieldedTamiyo(ControllerContract):
    def make(self, seed):
        return Tamiyo(seed, **OPTIONS["tamiyo"])


def test_no_registered_controller_is_left_out():
    # packages above may have registered their own in this process
    ours = {name for name in CONTROLLERS if CONTROLLERS[name].__module__.startswith("esper.")}
    # these pass the contract beside the service and the table that they need
    assert ours - {"remote", "reported"} == set(OPTIONS)


@pytest.mark.parametrize("name", ["random", "schedule", "tamiyo"])
def test_the_random_reports_make_controllers_germinate(name):
    """Or the contract would prove nothing about germination."""
    controller = build(name, 0)
    kinds = {type(a) for r in random_reports(0) for a in controller.decide(r)}
    assert Germinate in kinds
    assert len(kinds) >= 4


def test_the_random_reports_hold_every_stage():
    stages = {int(s) for r in random_reports(0) for site in r.sites for s in site.stage}
    assert stages == set(Stage)


class Broken:
    """Breaks the contract in one way at a time."""

    made = itertools.count()

    def __init__(self, how):
        self.how, self.number = how, next(self.made)

    def decide(self, report):
        match self.how:
            case "tuple":
                return ()
            case "illegal":
                return [Germinate(s.name, i, "mlp_relu") for s in report.sites for i in range(24)]
            case "random":
                return [Action("chunks", self.number)]
            case "write":
                report.sites[0].alpha[:] = 1
                return []
            case "identity":
                return [Action("chunks", id(report))]
            case "no sites":
                return [Action("chunks", 0)]


@pytest.mark.parametrize(
    ("how", "test"),
    [
        ("tuple", "test_it_returns_a_list_of_actions"),
        ("illegal", "test_every_action_is_legal"),
        ("random", "test_the_same_seed_and_reports_give_the_same_actions"),
        ("write", "test_the_report_is_left_as_it_is"),
        ("identity", "test_a_copied_or_pickled_report_gives_the_same_actions"),
        ("no sites", "test_a_model_without_sites_gets_no_action"),
    ],
)
def test_each_part_of_the_contract_can_be_broken(how, test):
    class Contract(ControllerContract):
        def make(self, seed):
            return Broken(how)

    with pytest.raises((AssertionError, ValueError)):
        getattr(Contract(), test)()
