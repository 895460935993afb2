"""Tamiyo grows on a plateau, where the gradient asks for it most, one wave at a time."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from esper.config.run import GrowthConfig
from esper.controller import TamiyoOptions
from esper.seeds.actions import Advance, Cull, Germinate, Promote, Rollback
from esper.seeds.gates import MissingMeasurementError
from esper.seeds.state import Stage


def tamiyo(**options):
    return TamiyoOptions(**{"patience_intervals": 2, **options}).build(0)


def germinated(actions):
    return [(a.site, a.seed) for a in actions if isinstance(a, Germinate)]


def waves(controller, losses, make_report, *sites):
    """Number of seeds germinated after each loss."""
    return [
        len(germinated(controller.decide(make_report(*sites, interval=i, loss=loss))))
        for i, loss in enumerate(losses, start=1)
    ]


def test_it_grows_after_patience_intervals_without_improvement(make_report):
    losses = [1.0, 0.9, 0.89, 0.89, 0.5, 0.495, 0.494]
    #                     ^ less than 2 % is no improvement; 0.5 is one
    assert waves(tamiyo(), losses, make_report) == [0, 0, 0, 2, 0, 0, 2]


def test_patience_starts_anew_after_a_wave(make_report):
    assert waves(tamiyo(), [1.0] * 7, make_report) == [0, 0, 2, 0, 2, 0, 2]


def test_it_says_when_no_wave_can_begin(make_report, make_site):
    controller = tamiyo()
    asked = []
    life = [0, 0, 0, Stage.GRAFTING, Stage.EVALUATING, Stage.FINE_TUNING]
    for interval, stage in enumerate(life, start=1):
        asked.append(controller.may_grow(interval))
        site = make_site(stage=[stage, stage, 0, 0], alpha=0.5)
        grows = germinated(controller.decide(make_report(site, interval=interval)))
        assert asked[-1] or not grows
    # two intervals without improvement are a plateau: the wave begins after the third
    assert asked == [False, False, True, False, False, True]


def test_what_was_not_reckoned_with_is_not_asked_of_a_report_without_it(make_report, make_site):
    """A wave was sent back with the run: nothing was measured for another at once."""
    growth = GrowthConfig(measured_samples=64)
    controller = tamiyo(patience_intervals=1, score="bottleneck")
    made = []
    for interval, bottleneck in enumerate((1.0, 1.0, np.nan, 1.0), start=1):
        site = make_site(bottleneck=bottleneck)
        report = make_report(site, interval=interval, growth=growth)
        made.append(len(germinated(controller.decide(report))))
    assert made == [0, 2, 0, 2]


def test_a_falling_negative_loss_is_an_improvement_and_a_flat_one_is_not(make_report):
    assert waves(tamiyo(), [-1.0, -1.5, -2.0, -2.5], make_report) == [0, 0, 0, 0]
    assert waves(tamiyo(), [-1.0, -1.0, -1.01], make_report) == [0, 0, 2]


def test_a_wave_takes_the_best_scores_of_all_sites(make_report, make_site):
    a = make_site("a", grad_energy=[0.1, 0.9, 0.2, 0.3])
    b = make_site("b", grad_energy=[0.8, 0.0, 0.05, 0.4], stage=[0, 0, 0, Stage.FOSSILIZED])
    controller = tamiyo(seeds_per_wave=3)
    for interval in (1, 2, 3):
        actions = controller.decide(make_report(a, b, interval=interval))
    assert germinated(actions) == [("a", 1), ("b", 0), ("a", 3)]
    assert actions[0].reason == "plateau; grad_energy 0.9"


@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_wave_is_what_sorting_every_dormant_seed_would_give(make_report, make_site, count):
    random = np.random.default_rng(count)
    # few values, so that there are ties within and between the sites
    scores = {name: random.integers(0, 5, 30) / 4 for name in "ab"}
    stages = {name: random.choice([Stage.DORMANT, Stage.FOSSILIZED], 30) for name in "ab"}
    sites = [make_site(n, grad_energy=scores[n], stage=stages[n]) for n in "ab"]
    controller = tamiyo(seeds_per_wave=count)
    for interval in (1, 2, 3):
        actions = controller.decide(make_report(*sites, interval=interval))
    ranked = sorted(
        (-scores[name][seed], name, seed)
        for name in "ab"
        for seed in range(30)
        if stages[name][seed] == Stage.DORMANT
    )
    assert germinated(actions) == [(name, seed) for _, name, seed in ranked[:count]]


def test_the_bottleneck_counts_for_each_parameter(make_report, make_site):
    cheap = make_site("a", bottleneck=[0.5, 0.1, 0.1, 0.1])
    dear = make_site("b", bottleneck=[0.9, 0.1, 0.1, 0.1])
    dear = replace(dear, seed_parameters=dict.fromkeys(dear.seed_parameters, 200))
    controller = tamiyo(seeds_per_wave=2, score="bottleneck")
    for interval in (1, 2, 3):
        actions = controller.decide(make_report(cheap, dear, interval=interval))
    assert germinated(actions) == [("a", 0), ("b", 0)]


def test_a_relative_bottleneck_counts_by_the_scale_of_the_output(make_report, make_site):
    small = make_site("a", bottleneck=[0.9, 0.1, 0.1, 0.1], variance=0.1)
    large = make_site("b", bottleneck=[0.5, 0.1, 0.1, 0.1], variance=10.0)
    first = []
    for score in ("bottleneck", "relative_bottleneck"):
        controller = tamiyo(patience_intervals=1, seeds_per_wave=1, score=score)
        for interval in (1, 2):
            actions = controller.decide(make_report(small, large, interval=interval))
        first += germinated(actions)
    assert first == [("a", 0), ("b", 0)]
    controller = tamiyo(patience_intervals=1, score="relative_bottleneck")
    unmeasured = make_site("a", bottleneck=0.5, variance=np.nan)
    controller.decide(make_report(unmeasured, interval=1))
    with pytest.raises(MissingMeasurementError, match="variance must be measured"):
        controller.decide(make_report(unmeasured, interval=2))


def test_crowding_spreads_seeds_over_sites(make_report, make_site):
    rich = make_site("a", grad_energy=[0.9, 0.8, 0.7, 0.6])
    poor = make_site("b", grad_energy=[0.4, 0.2, 0.1, 0.1])
    begun = replace(rich, stage=np.array([Stage.FOSSILIZED, 0, 0, 0]))
    chosen = {}
    for crowding in (0.0, 1.0):
        for site in (rich, begun):
            controller = tamiyo(patience_intervals=1, seeds_per_wave=3, crowding=crowding)
            for interval in (1, 2):
                actions = controller.decide(make_report(site, poor, interval=interval))
            chosen[crowding, site is begun] = [f"{n}{seed}" for n, seed in germinated(actions)]
    assert chosen[0.0, False] == ["a0", "a1", "a2"]
    # 0.9, 0.8 / 2 and 0.4 / 1; of equals the first site
    assert chosen[1.0, False] == ["a0", "a1", "b0"]
    assert chosen[0.0, True] == ["a1", "a2", "a3"]
    # 0.8 / 2, 0.7 / 3 and 0.4 / 1: what was grown before counts, too
    assert chosen[1.0, True] == ["a1", "b0", "a2"]


def test_a_bottleneck_that_was_not_measured_is_an_error(make_report, make_site):
    controller = tamiyo(patience_intervals=1, score="bottleneck")
    site = make_site("a", bottleneck=np.nan)
    controller.decide(make_report(site))
    with pytest.raises(MissingMeasurementError, match=r"set growth\.measured_samples"):
        controller.decide(make_report(site, interval=2))


def test_a_span_gives_its_lowest_free_slots(make_report, make_site):
    stage = [Stage.FOSSILIZED, Stage.DORMANT, Stage.CULLED, Stage.DORMANT, Stage.DORMANT]
    span = make_site("s", stage=stage, geometry="span", epochs=1)
    controller = tamiyo()
    for interval in (1, 2, 3):
        actions = controller.decide(make_report(span, interval=interval))
    assert germinated(actions) == [("s", 1), ("s", 3)]


@pytest.mark.parametrize(
    "stage",
    [Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING],
)
def test_it_waits_while_a_wave_is_in_the_pipeline(make_report, make_site, stage):
    busy = make_site(stage=[stage, Stage.DORMANT])
    assert waves(tamiyo(), [1.0] * 5, make_report, busy) == [0] * 5


@pytest.mark.parametrize("stage", [Stage.FINE_TUNING, Stage.FOSSILIZED, Stage.CULLED])
def test_it_does_not_wait_for_finished_seeds(make_report, make_site, stage):
    done = make_site(stage=[stage, Stage.DORMANT])
    assert waves(tamiyo(), [1.0] * 3, make_report, done) == [0, 0, 1]


@pytest.mark.parametrize(
    ("gains", "errors", "grows"),
    [([0.3, 0.1], 0.1, True), ([0.3, -0.1], 0.1, False), ([0.0, 0.0], 0.0, False)],
)
def test_growth_goes_on_after_a_wave_that_paid_and_stops_after_one_that_did_not(
    make_report, make_site, gains, errors, grows
):
    """The sum must be 2 standard errors above 0: 0.28 here."""
    controller = tamiyo(patience_intervals=1, min_wave_gain_se=2.0)
    evaluated = make_site(stage=[Stage.EVALUATING] * 2 + [0] * 2, gain=[*gains, 0, 0],
                          gain_se=errors)  # fmt: skip
    done = make_site(stage=[Stage.FINE_TUNING] * 2 + [0] * 2)
    assert waves(controller, [1.0, 1.0], make_report, make_site()) == [0, 2]
    assert waves(controller, [1.0], make_report, evaluated) == [0]
    again = tamiyo(patience_intervals=1, min_wave_gain_se=2.0)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for c in (controller, again):
        assert waves(c, [1.0] * 3, make_report, done) == [2 * grows] * 3


def test_several_waves_may_not_pay_before_growth_stops(make_report, make_site):
    controller = tamiyo(patience_intervals=1, min_wave_gain_se=0.0, max_unpaid_waves=2)
    poor = make_site(stage=[Stage.EVALUATING, 0, 0, 0], gain=-0.1)
    rich = make_site(stage=[Stage.EVALUATING, 0, 0, 0], gain=0.1)
    controller.decide(make_report())
    seen = [waves(controller, [1.0, 1.0], make_report, s) for s in (poor, rich, poor, poor)]
    assert seen == [[0, 0]] * 4
    grown = []
    for site in (poor, rich, poor, poor):
        fresh = tamiyo(patience_intervals=1, min_wave_gain_se=0.0, max_unpaid_waves=2)
        fresh.load_state_dict(controller.state_dict() | {"unpaid": 1, "gain": None})
        waves(fresh, [1.0], make_report, site)
        grown.append(waves(fresh, [1.0], make_report)[0])
    assert grown == [0, 2, 0, 0]


def test_a_stopping_rule_without_standard_errors_is_an_error(make_report, make_site):
    controller = tamiyo(min_wave_gain_se=1.0)
    with pytest.raises(MissingMeasurementError, match="gain_se must be measured for seed 0"):
        controller.decide(make_report(make_site(stage=[Stage.EVALUATING], gain_se=np.nan)))


def test_seeds_without_isolated_training_are_grafted_in_the_interval_of_their_germination(
    make_report,
):
    controller, at_once = tamiyo(), GrowthConfig(training_intervals=0)
    for interval in (1, 2, 3):
        actions = controller.decide(make_report(interval=interval, growth=at_once))
    assert [type(a) for a in actions] == [Germinate, Promote, Advance] * 2
    assert [a.seed for a in actions] == [0] * 3 + [1] * 3


def test_no_wave_after_the_last_interval(make_report):
    assert waves(tamiyo(last_interval=3), [1.0] * 6, make_report) == [0, 0, 2, 0, 0, 0]


def test_no_wave_when_nothing_is_affordable_and_one_as_soon_as_it_is(make_report):
    controller, poor = tamiyo(), GrowthConfig(max_parameters=1000)
    for interval in (1, 2, 3):
        assert controller.decide(make_report(interval=interval, growth=poor)) == []
    assert len(controller.decide(make_report(interval=4))) == 2


def test_a_missing_loss_is_an_error(make_report):
    with pytest.raises(MissingMeasurementError, match=r"loss must be measured .*report\(loss\)"):
        tamiyo().decide(make_report(loss=None))


def test_a_missing_gradient_is_an_error_once_it_is_needed(make_report, make_site):
    controller, blind = tamiyo(), make_site(grad_energy=float("nan"))
    controller.decide(make_report(blind))
    controller.decide(make_report(blind, interval=2))
    with pytest.raises(MissingMeasurementError, match=r"grad_energy must be measured for seed 0"):
        controller.decide(make_report(blind, interval=3))


def test_a_blueprint_that_fits_no_site_is_an_error_not_silence(make_report, make_site):
    controller, span = tamiyo(blueprint="glu"), make_site("s", geometry="span")
    for interval in (1, 2):
        controller.decide(make_report(span, interval=interval))
    with pytest.raises(ValueError, match=r"must fit a site of the lattice, but 'glu' fits none"):
        controller.decide(make_report(span, interval=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blueprint": "mlp_relo"}, "blueprint must be one of .* Did you mean 'mlp_relu'"),
        ({"graft": "cosin"}, "graft strategy must be one of .* Did you mean 'cosine'"),
        ({"patience_intervals": 0}, "greater than 0"),
        ({"min_improvement_frac": 1.0}, "less than 1"),
        ({"patience": 3}, "did you mean 'patience_intervals'"),
    ],
)
def test_wrong_options_are_refused_before_the_run(options, message):
    with pytest.raises(ValidationError, match=message):
        TamiyoOptions(**options)


class TestShepherd:
    """The gates decide about every awake seed; all growing controllers share this."""

    def decide(self, make_report, make_site, stage, loss=1.0, **columns):
        site = make_site(stage=[stage], **columns)
        return tamiyo().decide(make_report(site, loss=loss))

    @pytest.mark.parametrize(
        ("stage", "columns", "action"),
        [
            (Stage.GERMINATED, {}, Promote),
            (Stage.TRAINING, {"epochs": 1}, Advance),
            (Stage.GRAFTING, {"alpha": 1.0}, Advance),
            (Stage.STABILIZATION, {"epochs": 1}, Advance),
            (Stage.EVALUATING, {"gain": 0.0}, Advance),
            (Stage.FINE_TUNING, {"epochs": 10}, Advance),
            (Stage.CULLED, {"epochs": 5}, Advance),
            (Stage.CANCELLED, {"epochs": 5}, Advance),
            (Stage.ROLLED_BACK, {"epochs": 5}, Advance),
            (Stage.EVALUATING, {"gain": -1e-6}, Cull),
            (Stage.TRAINING, {"epochs": 8, "explained_frac": -0.1}, Cull),
            (Stage.GRAFTING, {"epochs": 8, "alpha": 0.99}, Cull),
            (Stage.STABILIZATION, {"epochs": 8, "graft_loss": 0.1}, Rollback),
        ],
    )
    def test_it_moves_a_seed(self, make_report, make_site, stage, columns, action):
        (decided,) = self.decide(make_report, make_site, stage, **columns)
        assert type(decided) is action
        assert decided.reason

    @pytest.mark.parametrize(
        ("stage", "columns"),
        [
            (Stage.TRAINING, {"epochs": 7, "explained_frac": -0.1}),
            (Stage.GRAFTING, {"epochs": 7, "alpha": 0.99}),
            (Stage.STABILIZATION, {"epochs": 7, "graft_loss": 0.1}),
            (Stage.FINE_TUNING, {"epochs": 9}),
            (Stage.CULLED, {"epochs": 4}),
            (Stage.FOSSILIZED, {"epochs": 99}),
            (Stage.DORMANT, {}),
        ],
    )
    def test_it_lets_a_seed_wait(self, make_report, make_site, stage, columns):
        assert self.decide(make_report, make_site, stage, **columns) == []

    def test_a_rest_of_no_intervals_is_passed_at_once(self, make_report, make_site):
        growth = GrowthConfig(stabilization_intervals=0)
        site = make_site(stage=[Stage.GRAFTING], alpha=1.0, epochs=1)
        actions = tamiyo().decide(make_report(site, growth=growth))
        assert [a.reason[:2] for a in actions] == ["G3", "G4"]
        unsettled = make_site(stage=[Stage.GRAFTING], alpha=1.0, epochs=1, graft_loss=0.1)
        actions = tamiyo().decide(make_report(unsettled, growth=growth))
        assert [a.reason[:2] for a in actions] == ["G3"]

    def test_a_seed_that_need_not_prove_itself_is_not_evaluated(self, make_report, make_site):
        growth = GrowthConfig(stabilization_intervals=0, min_gain=None)
        site = make_site(stage=[Stage.GRAFTING], alpha=1.0, epochs=1, gain=np.nan)
        actions = tamiyo().decide(make_report(site, growth=growth))
        assert [a.reason[:2] for a in actions] == ["G3", "G4", "G5"]

    def test_the_reason_names_the_gate_and_the_time(self, make_report, make_site):
        (cull,) = self.decide(make_report, make_site, Stage.GRAFTING, epochs=8, alpha=0.25)
        assert cull.reason == "gave up after 8 intervals; G3: alpha is 0.250"
