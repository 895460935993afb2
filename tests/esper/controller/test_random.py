"""Random growth: given times, uniform places."""

from collections import Counter

import pytest
from pydantic import ValidationError

from esper.controller import GrowthEvent, RandomOptions
from esper.seeds.actions import Germinate
from esper.seeds.state import Stage


def test_places_are_uniform_over_the_dormant_seeds_of_all_sites(make_report, make_site):
    a = make_site("a", stage=[Stage.DORMANT, Stage.FOSSILIZED, Stage.DORMANT])
    b = make_site("b", stage=[Stage.DORMANT] * 3)
    report, draws = make_report(a, b), 2000
    counts = Counter(
        (action.site, action.seed)
        for seed in range(draws)
        for action in RandomOptions(at_intervals=(1,)).build(seed).decide(report)
    )
    assert set(counts) == {("a", 0), ("a", 2), ("b", 0), ("b", 1), ("b", 2)}
    # 5 standard deviations of a binomial draw
    assert all(abs(n - draws / 5) < 5 * (draws * 0.16) ** 0.5 for n in counts.values())


def test_no_place_is_drawn_twice(make_report, make_site):
    controller = RandomOptions(at_intervals=(1,), count=9).build(0)
    places = [a.seed for a in controller.decide(make_report(make_site()))]
    assert sorted(places) == [0, 1, 2, 3]


def test_a_span_gives_its_lowest_free_slots(make_report, make_site):
    stage = [Stage.FOSSILIZED, *[Stage.DORMANT] * 20]
    report = make_report(make_site("s", stage=stage, geometry="span"))
    actions = RandomOptions(at_intervals=(1,), count=3).build(5).decide(report)
    assert [a.seed for a in actions] == [1, 2, 3]


def test_it_germinates_at_its_times_alone(make_report):
    controller = RandomOptions(at_intervals=(2, 4), count=2, blueprint="glu").build(0)
    reports = [make_report(interval=i) for i in range(1, 6)]
    assert [len(controller.decide(r)) for r in reports] == [0, 2, 0, 2, 0]


def test_it_repeats_the_times_and_blueprints_of_the_followed_arm(make_report):
    events = (GrowthEvent(2, "x", 9, "glu"), GrowthEvent(2, "y", 9, "low_rank"),
              GrowthEvent(5, "x", 1, "mlp_relu"))  # fmt: skip
    controller = RandomOptions(graft="cosine").build(0, events)
    grown = {i: controller.decide(make_report(interval=i)) for i in range(1, 7)}
    assert {i: [a.blueprint for a in actions] for i, actions in grown.items() if actions} == {
        2: ["glu", "low_rank"],
        5: ["mlp_relu"],
    }
    assert all(isinstance(a, Germinate) and a.graft == "cosine" for a in grown[2])


def test_an_unknown_blueprint_is_refused():
    with pytest.raises(ValidationError, match="Did you mean 'mlp_relu'"):
        RandomOptions(blueprint="mlp_relo")
