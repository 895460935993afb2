"""A sweep: arms that differ from one base run, and the question asked of them."""

import copy
from pathlib import Path

import pytest
import yaml

from esper.config.base import ConfigError, validate
from esper.config.run import RunConfig
from esper.config.sweep import SweepConfig, load_sweep

ROOT = Path(__file__).parents[3]
SWEEP = {
    "name": "ab",
    "pairs": 4,
    "run": {
        "task": {"name": "spirals", "options": {"noise": 0.1}},
        "host": {"name": "mlp", "options": {"hidden": [8], "bias": False}},
        "train": {"steps": 100, "learning_rate": 0.01},
        "controller": {"name": "tamiyo", "options": {"seeds_per_wave": 3}},
        "growth": {"ramp_steps": 10},
    },
    "arms": {
        "host": {"controller": {"name": "static"}},
        "esper": {},
        "random": {"follow": "esper", "controller": {"name": "random"}},
    },
    "question": {"treatment": "esper", "control": "host", "metric": "test_loss", "margin": 0.1},
}


def put(data, path, value):
    *parents, last = path.split(".")
    for key in parents:
        data = data[int(key) if isinstance(data, list) else key]
    data[last] = value


def sweep_with(**changes):
    data = copy.deepcopy(SWEEP)
    for path, value in changes.items():
        put(data, path.replace("__", "."), value)
    return data


def load(tmp_path, data):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return load_sweep(file)


def arm(changes):
    return validate(SweepConfig, sweep_with(arms__esper=changes), source="s").run_config("esper")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_shipped_sweeps_are_valid(file):
    sweep = load_sweep(file)
    assert all(isinstance(sweep.run_config(a), RunConfig) for a in sweep.arms)


class TestMerging:
    def test_an_arm_without_overrides_is_the_base_run(self):
        assert arm({}) == validate(RunConfig, SWEEP["run"], source="base")

    def test_mappings_merge_key_by_key(self):
        run = arm({"train": {"steps": 200}, "host": {"options": {"bias": True}}})
        assert (run.train.steps, run.train.learning_rate) == (200, 0.01)
        assert run.host.options == {"hidden": [8], "bias": True}

    def test_lists_and_numbers_are_replaced(self):
        run = arm({"host": {"options": {"hidden": [4, 4]}}, "plugins": ["a"]})
        assert run.host.options["hidden"] == [4, 4]

    def test_a_plug_in_of_the_same_name_keeps_its_options(self):
        run = arm({"controller": {"name": "tamiyo", "options": {"graft": "cosine"}}})
        assert run.controller.options == {"seeds_per_wave": 3, "graft": "cosine"}

    def test_a_plug_in_of_another_name_starts_with_none(self):
        assert arm({"controller": {"name": "random"}}).controller.options == {}

    def test_no_arm_changes_the_base_or_another_arm(self):
        sweep = validate(SweepConfig, SWEEP, source="s")
        before = sweep.model_dump()
        for name in sweep.arms:
            sweep.run_config(name)
        assert sweep.model_dump() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nme": 1}, r"nme must be a known key, but got 'nme'; did you mean 'name'\?"),
        ({"name": "A b"}, r"name must match pattern .*, but got 'A b'"),
        ({"pairs": 1}, r"pairs must be greater than or equal to 2, but got 1"),
        ({"pairs": 65}, r"pairs must be less than or equal to 64, but got 65"),
        ({"pairs": "4"}, r"pairs must be a number without quotes, but got '4'"),
        ({"first_seed": -1}, r"first_seed must be greater than or equal to 0"),
        ({"arms": {"host": {}}}, r"arms must have at least 2 items"),
        ({"arms__host": None}, r"arms\.host must be a valid dictionary, but got None"),
        ({"question__margin": 0}, r"question\.margin must be greater than 0, but got 0"),
        ({"question__tst": "x"}, r"question\.tst must be a known key.*did you mean 'test'"),
        ({"question__treatment": "espr"},
         r"question must compare arms of this sweep \(host, esper, random\), but got 'espr'"),
        ({"question__secondary": [{"treatment": "esper", "control": "hst"}]},
         r"question must compare arms of this sweep .*, but got 'hst'"),
        ({"question__control": "esper"},
         r"treatment must be another arm than control, but got 'esper' for both"),
        ({"question__guardrails": [{"metric": "m", "margin": 1, "relativ": True}]},
         r"question\.guardrails\.0\.relativ must be a known key.*did you mean 'relative'"),
        ({"arms__esper": {"trian": {}}}, r"arms\.esper\.trian must be .*did you mean 'train'\?"),
        ({"arms__esper": {"train": {"stps": 3}}},
         r"arms\.esper\.train\.stps must be a known key, but got 'stps'; did you mean 'steps'"),
        ({"arms__esper": {"lattice": [{"sites": "a", "seeds_per_layer": 2, "hiden": 3}]}},
         r"arms\.esper\.lattice\.0\.hiden must be a known key.*did you mean 'hidden'"),
        ({"arms__host": {"start": "grown"}}, r"arms\.host: start must be 'host' for a run that"),
        ({"arms__host": {"follow": "espr"}}, r"arms\.host\.follow must name another arm.*'espr'"),
        ({"arms__host": {"follow": "host"}}, r"arms\.host\.follow must name another arm.*'host'"),
        ({"arms__host": {"follow": "random"}}, r"must name another arm that follows none"),
        # the base run's `follow` counts for every arm that does not override it
        ({"run__follow": "esper", "arms__esper": {"follow": None}, "arms__host": {},
          "arms__random": {"follow": "host"}}, r"arms\.random\.follow must .* got 'host'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, sweep_with(**changes))
    assert "sweep.yaml is not valid" in str(caught.value)


def test_arms_may_follow_by_the_base_run(tmp_path):
    sweep = load(tmp_path, sweep_with(run__follow="esper", arms__esper={"follow": None}))
    follow = {name: sweep.run_config(name).follow for name in sweep.arms}
    assert follow == {"host": "esper", "esper": None, "random": "esper"}


def config_hash(**changes):
    return validate(SweepConfig, sweep_with(**changes), source="s").config_hash


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "elsewhere"},
        {"mlflow": {"tracking_uri": "sqlite:///other.db", "experiment": "x"}},
        {"resources": {"cpus_per_trial": 4, "num_cpus": 2}},
    ],
)
def test_where_results_are_stored_does_not_change_the_hash(changes):
    assert config_hash(**changes) == config_hash()


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs": 5},
        {"first_seed": 1},
        {"run__task__options__noise": 0.2},
        {"run__train__learning_rate": 0.02},
        {"run__growth__ramp_steps": 11},
        {"arms__esper": {"seed_salt": 1}},
        {"arms__more": {}},
        {"question__metric": "train_loss"},
        {"question__margin": 0.2},
        {"question__higher_is_better": False},
        {"question__test": "wilcoxon"},
        {"searches": {"search": {"over": ["host", "random"]}}},
        {"question__guardrails": [{"metric": "m", "margin": 1.0}]},
        {"question__secondary": [{"treatment": "random", "control": "host"}]},
    ],
    ids=str,
)
def test_everything_that_decides_a_result_changes_the_hash(changes):
    assert config_hash(**changes) != config_hash()


def test_the_hash_does_not_depend_on_the_order_of_keys():
    turned = {k: SWEEP[k] for k in reversed(SWEEP)} | {"run": dict(reversed(SWEEP["run"].items()))}
    assert validate(SweepConfig, turned, source="s").config_hash == config_hash()


def test_the_primary_comparison_comes_first():
    data = sweep_with(question__secondary=[{"treatment": "random", "control": "host"}])
    comparisons = validate(SweepConfig, data, source="s").question.comparisons
    assert [(c.treatment, c.control) for c in comparisons] == [
        ("esper", "host"),
        ("random", "host"),
    ]


def test_outputs_are_not_kept_from_shards(tmp_path):
    data = sweep_with(arms__esper={"kept_outputs": 8}, resources={"shards": 2})
    with pytest.raises(ConfigError, match=r"kept_outputs must be 0 .* arm 'esper' sets it"):
        load(tmp_path, data)
