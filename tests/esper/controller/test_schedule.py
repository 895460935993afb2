"""Scheduled growth: exact times, sites in turn, the lowest dormant seed of each."""

import pytest
from pydantic import ValidationError

from esper.controller import ScheduleOptions
from esper.seeds.state import Stage


def test_it_germinates_at_its_times_alone_and_in_turn(make_report, make_site):
    controller = ScheduleOptions(at_intervals=(2, 3), count=3, blueprint="low_rank").build(0)
    sites = [make_site("a", stage=[Stage.FOSSILIZED, 0, 0, 0]), make_site("b", stage=[0, 0])]
    grown = [
        [(a.site, a.seed) for a in controller.decide(make_report(*sites, interval=i))]
        for i in range(1, 5)
    ]
    assert grown == [[], [("a", 1), ("b", 0), ("a", 2)], [("b", 0), ("a", 1), ("b", 1)], []]


def test_it_takes_what_is_left(make_report, make_site):
    controller = ScheduleOptions(at_intervals=(1,), count=9).build(0)
    sites = [make_site("a", stage=[Stage.DORMANT]), make_site("b", stage=[Stage.CULLED])]
    assert [(a.site, a.seed) for a in controller.decide(make_report(*sites))] == [("a", 0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Field required"),
        ({"at_intervals": (0,)}, "greater than 0"),
        ({"at_intervals": (1,), "graft": "linea"}, "Did you mean 'linear'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleOptions(**options)
