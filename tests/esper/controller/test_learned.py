"""The learned controller: safe, repeatable, and better where its model knows better."""

import json
from dataclasses import replace

import numpy as np
import pytest

from esper.config.base import ConfigError
from esper.controller import LearnedOptions, Shield, TamiyoOptions
from esper.controller.adaptations import Candidate, draws_of
from esper.controller.contract import ControllerContract, random_reports
from esper.controller.learned import FLAG, Encoding, PolicyModel, kind_of
from esper.seeds.actions import Germinate

EAGER = {"patience_intervals": 1, "seeds_per_wave": 4}
ENCODING = Encoding(
    features=("cost_frac", "is_span"), means=(0.0, 0.5), scales=(1.0, 0.5),
    kinds=(), blueprints=("mlp_gelu", "mlp_relu"), grafts=("linear",),
)  # fmt: skip


def model_of(weights, sd=0.01, intercept=0.1):
    covariance = tuple(map(tuple, (np.eye(5) * sd**2).tolist()))
    return PolicyModel(encoding=ENCODING, intercept=intercept, weights=weights, waves=100,
                       covariance=covariance, noise_sd=0.1, reports=100, models=("m",))  # fmt: skip


@pytest.fixture
def build(tmp_path):
    def with_model(model=None, seed=0, **options):
        if model is not None:
            (tmp_path / "policy.json").write_text(model.model_dump_json())
            options["model"] = str(tmp_path / "policy.json")
        return LearnedOptions(**EAGER, **options).build(seed)

    return with_model


def germinations(controller, reports=None):
    """Every germination with how it was drawn."""
    return [
        (action, draws_of(controller).get((action.site, action.seed)))
        for report in reports or random_reports(0)
        for action in controller.decide(report)
        if isinstance(action, Germinate)
    ]


class TestExploring(ControllerContract):
    def make(self, seed):
        return LearnedOptions(**EAGER).build(seed)


class TestWithAModel(ControllerContract):
    @pytest.fixture(autouse=True)
    def _build(self, build):
        self.build = build

    def make(self, seed):
        return self.build(model_of((0, 0, 0.02, 0, 0), sd=0.05), seed)


class TestBehindTheShield(TestExploring):
    def make(self, seed):
        return Shield(super().make(seed))


def test_without_a_model_every_candidate_is_as_likely(build):
    drawn = germinations(build())
    assert len(drawn) > 20
    for action, draw in drawn:
        assert draw.propensity == pytest.approx(1 / len(draw.candidates))
        chosen = draw.candidates[draw.chosen]
        assert (chosen.site, chosen.seed) == (action.site, action.seed)
        assert (chosen.blueprint, chosen.graft) == (action.blueprint, action.graft)
    assert len({a.blueprint for a, _ in drawn}) > 2
    assert len({a.site for a, _ in drawn}) == 2


def test_what_the_model_is_sure_of_is_chosen_but_for_the_exploring_share(build):
    sure = build(model_of((0, 0, 0.0, 0.5, 0)), explore_frac=0.1)
    drawn = [(a, d) for a, d in germinations(sure)
             if any(c.blueprint == "mlp_relu" for c in d.candidates)]  # fmt: skip
    share = np.mean([a.blueprint == "mlp_relu" for a, _ in drawn])
    assert share > 0.8
    for action, draw in drawn:
        if action.blueprint != "mlp_relu":
            assert draw.propensity == pytest.approx(0.1 / len(draw.candidates))


def test_uncertainty_is_explored(build):
    unsure = germinations(build(model_of((0, 0, 0, 0, 0), sd=1.0), explore_frac=0))
    assert len({a.blueprint for a, _ in unsure}) > 2
    assert all(0 < d.propensity < 1 for _, d in unsure if len(d.candidates) > 1)


def test_what_gains_nothing_is_never_woken(build):
    # sure of a loss by every blueprint but one
    wary = build(model_of((0, 0, -0.5, 0.0, 0), intercept=-0.2), min_chance_to_gain=0.05)
    assert germinations(wary) == []
    one = build(model_of((0, 0, -0.5, 0.5, 0), intercept=-0.2), min_chance_to_gain=0.05)
    assert {a.blueprint for a, _ in germinations(one)} == {"mlp_relu"}


def test_no_score_is_asked_for_where_nothing_is_affordable(build):
    """The bottleneck is not measured where the limits leave no room for a seed."""
    poor = [
        replace(
            report,
            growth=report.growth.model_copy(update={"max_parameters": report.parameters}),
            sites=tuple(
                replace(s, bottleneck=np.full_like(s.bottleneck, np.nan)) for s in report.sites
            ),
        )
        for report in random_reports(0)
    ]
    assert germinations(build(score="bottleneck"), poor) == []


def test_with_its_flag_off_it_is_the_heuristic(build):
    learned, heuristic = build(blueprint="mlp_relu"), TamiyoOptions(
        **EAGER, blueprint="mlp_relu"
    ).build(0)  # fmt: skip
    assert learned.switch(frozenset()) == {FLAG}
    reports = list(random_reports(0))
    assert [learned.decide(r) for r in reports] == [heuristic.decide(r) for r in reports]
    assert learned.draws == {}


def test_the_chances_are_those_of_the_draws(build):
    candidates = [
        Candidate(site="s", seed=i, blueprint=b, graft="linear", features={"cost_frac": 0.1})
        for i, b in enumerate(("mlp_relu", "mlp_gelu", "glu"))
    ]
    model = model_of((0, 0, 0.0, 0.05, 0), sd=0.05)
    chances = model.chances(candidates, 0)
    assert chances.sum() == pytest.approx(1)
    assert chances[0] == chances.max()
    # alike in all that the model knows: as likely as each other
    alike = [candidates[0].model_copy(update={"seed": i}) for i in range(4)]
    assert model.chances(alike, 0) == pytest.approx(np.full(4, 0.25), abs=0.1)
    mean, sd = model.predict(candidates)
    assert mean[0] - mean[1] == pytest.approx(0.05)
    assert (sd > 0).all()


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        ("blocks.11.fc1->blocks.11.fc2", "blocks.*.fc*->blocks.*.fc*: glu"),
        ("blocks.11.fc1->blocks.11.fc1", "on blocks.*.fc*: glu"), ("fc1", "fc*: glu"),
    ],
)  # fmt: skip
def test_layers_of_a_kind_are_alike_whatever_their_number(site, kind):
    candidate = Candidate(site=site, seed=0, blueprint="glu", graft="linear", features={})
    assert kind_of(candidate) == kind
    encoding = ENCODING.model_copy(update={"kinds": ("other", kind)})
    other = candidate.model_copy(update={"blueprint": "mlp_relu"})
    assert encoding.encode([candidate, other])[:, 2:4].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "cannot be read"), ("{}", "encoding"), (None, "esper policy train")],
)
def test_a_model_that_is_none_is_refused(tmp_path, content, says):
    path = tmp_path / "policy.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        LearnedOptions(model=str(path)).build(0)


def test_a_model_whose_sizes_differ_is_refused(tmp_path):
    content = json.loads(model_of((0, 0, 0, 0, 0)).model_dump_json())
    content["weights"] = [0.0]
    (tmp_path / "policy.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="weights must have 5 items"):
        LearnedOptions(model=str(tmp_path / "policy.json")).build(0)


def test_unknown_blueprints_are_refused():
    with pytest.raises(ValueError, match="nonsense"):
        LearnedOptions(blueprints=("nonsense",))
