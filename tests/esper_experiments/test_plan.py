"""The plan: every trial once, random order that a resumed sweep repeats, followers last."""

import pytest

from esper import metric
from esper.config.base import ConfigError
from esper.config.sweep import SweepConfig
from esper_experiments.plan import device_of, plan_trials, register, sweep_folder
from esper_experiments.sweep import check


@metric("planned", unit="", higher_is_better=False)
def planned(trained):
    raise AssertionError("it is not called before the run")


RUN = {
    "task": {"name": "spirals"},
    "host": {"name": "mlp", "options": {"hidden": [4]}},
    "train": {"steps": 20, "interval_steps": 10, "batch_size": 8},
}
QUESTION = {"treatment": "b", "control": "a", "metric": "test_accuracy", "margin": 0.01}


def sweep(tmp_path, **changes):
    arms = {"a": {}, "b": {}, "c": {"follow": "a", "start": "grown"}}
    base = {"name": "t", "run": RUN, "arms": arms, "pairs": 40, "question": QUESTION}
    return SweepConfig.model_validate({**base, "output_dir": tmp_path, **changes})


def test_every_trial_once_with_one_seed_a_pair_and_followers_last(tmp_path):
    config = sweep(tmp_path)
    plan = plan_trials(config, register(config, tmp_path / "x"))
    assert len({p.spec.trial_id for p in plan}) == 120
    for pair in range(40):
        trials = [p for p in plan if p.spec.pair == pair]
        assert {p.spec.seed for p in trials} == {pair}
        assert [p.spec.order for p in trials] == [0, 1, 2]
        assert trials[2].spec.arm == "c"
        assert trials[2].waits_for == f"a-{pair:03d}"
    first = [next(p.spec.arm for p in plan if p.spec.pair == pair) for pair in range(40)]
    assert 8 <= first.count("a") <= 32


def test_the_order_is_a_function_of_the_registration(tmp_path):
    config = sweep(tmp_path)
    one, again = (plan_trials(config, register(config, tmp_path / "x")) for _ in range(2))
    assert [p.spec for p in one] == [p.spec for p in again]
    other = sweep(tmp_path, question={**QUESTION, "margin": 0.02})
    assert [p.spec.arm for p in plan_trials(other, register(other, tmp_path / "y"))] != [
        p.spec.arm for p in one
    ]


def test_the_question_is_registered_once_and_a_foreign_one_is_refused(tmp_path):
    config = sweep(tmp_path)
    folder = sweep_folder(config, device_of(config))
    first = register(config, folder)
    assert register(config, folder) == first
    other = sweep(tmp_path, pairs=41)
    assert sweep_folder(other, "cpu") != folder
    with pytest.raises(ValueError, match=r"must be the registration of this sweep, but its hash"):
        register(other, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {}, "b": {"task": {"name": "spiral"}}}}, r"Did you mean 'spirals'\?"),
        ({"arms": {"a": {}, "b": {"host": {"options": {"hiden": [3]}}}}}, r"did you mean 'hidden'"),
        ({"arms": {"a": {}, "b": {"lattice": [{"sites": "fc9", "seeds_per_layer": 2}]}}},
         r"'fc9' matches none; its modules are: fc1, act1, out"),
        ({"arms": {"a": {}, "b": {"lattice": [{"sites": "fc1", "seeds_per_layer": 3}]}}},
         r"must divide the site's 4 channels, but got 3; use one of \[1, 2, 4\]"),
        ({"question": {**QUESTION, "metric": "test_acuracy"}}, r"but got 'test_acuracy'"),
        ({"arms": {"a": {}, "b": {"train": {"batch_size": 9999}}}}, r"at most the 2000 training"),
        ({"arms": {"a": {}, "b": {"plugins": ["no_such_module"]}}}, r"importable modules"),
        ({"arms": {"a": {}, "b": {"metrics": ["planed"]}}}, r"Did you mean 'planned'"),
        # a metric that one arm alone computes
        ({"arms": {"a": {}, "b": {"metrics": ["planned"]}},
          "question": {**QUESTION, "metric": "planned"}}, r"every arm computes \(.*got 'planned'"),
        ({"run": {**RUN, "metrics": ["planned"]},
          "question": {**QUESTION, "metric": "planned", "higher_is_better": True}},
         r"higher_is_better of 'planned' must be false"),
        ({"question": {**QUESTION, "guardrails": [{"metric": "no_such", "margin": 0}]}},
         r"but got 'no_such'"),
        ({"question": {**QUESTION, "looks": [5, 40]}}, r"after 5 of 40 pairs .* is 0.031"),
    ],
)  # fmt: skip
def test_a_wrong_arm_is_refused_before_anything_starts(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(sweep(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
