"""An arena is read from one file and the sweeps that it names, and every wrong key is named."""

from pathlib import Path

import pytest
import yaml

from esper.config.arena import load_arena
from esper.config.base import ConfigError

ROOT = Path(__file__).parents[3]
SWEEP = {
    "name": "base",
    "run": {
        "task": {"name": "spirals"},
        "host": {"name": "mlp", "options": {"hidden": [4]}},
        "train": {"steps": 20, "interval_steps": 10},
    },
    "arms": {
        "host": {},
        "wide": {"host": {"options": {"hidden": [8]}}},
        "schedule": {"controller": {"name": "schedule", "options": {"at_intervals": [1]}}},
        "esper": {"controller": {"name": "tamiyo"}},
    },
    "first_seed": 7,
    "question": {
        "treatment": "schedule", "control": "host", "metric": "test_loss",
        "higher_is_better": False, "margin": 0.5,
        "guardrails": [{"metric": "train_seconds", "margin": 2.0, "relative": True}],
    },
}  # fmt: skip
ARENA = {
    "name": "a",
    "pairs": 3,
    "methods": {
        "host": {},
        "static": {"of": "wide"},
        "gradmax": {
            "of": "schedule",
            "change": {"growth": {"initialisation": "gradmax", "measured_samples": 9}},
        },
        "esper": {},
    },
    "scale": {"one": ["static"]},
    "tasks": {
        "one": {"sweep": "sweep.yaml"},
        "two": {"sweep": "sweep.yaml", "methods": {"gradmax": {"not_applicable": "no width"}}},
    },
}


def load(folder, **changes):
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    (folder / "arena.yaml").write_text(yaml.safe_dump({**ARENA, **changes}, sort_keys=False))
    return load_arena(folder / "arena.yaml")


def test_a_task_is_the_sweep_it_names_with_the_methods_for_arms(tmp_path):
    arena = load(tmp_path)
    sweep = arena.sweeps["one"]
    assert list(sweep.arms) == ["host", "static", "gradmax", "esper"]
    assert sweep.run_config("static").host.options == {"hidden": [8]}
    gradmax = sweep.run_config("gradmax")
    assert (gradmax.growth.initialisation, gradmax.growth.measured_samples) == ("gradmax", 9)
    assert gradmax.controller.name == "schedule"
    assert (sweep.pairs, sweep.first_seed, sweep.name) == (3, 7, "a-one")
    assert sweep.mlflow.experiment == "arena"


def test_the_question_keeps_metric_margin_and_guardrails_and_asks_about_every_control(tmp_path):
    question = load(tmp_path).sweeps["one"].question
    assert {c.treatment for c in question.comparisons} == {"esper"}
    assert [c.control for c in question.comparisons] == ["host", "static", "gradmax"]
    assert (question.metric, question.higher_is_better, question.margin) == (
        "test_loss",
        False,
        0.5,
    )
    assert question.guardrails[0].metric == "train_seconds"


def test_what_does_not_apply_stands_with_its_reason(tmp_path):
    arena = load(tmp_path)
    assert arena.absent == {"one": {}, "two": {"gradmax": "no width"}}
    assert "gradmax" not in arena.sweeps["two"].arms
    methods = {**ARENA["methods"], "peer": {"of": "esper", "requires": "no_such_package"}}
    absent = load(tmp_path, methods=methods).absent
    assert absent["one"] == {"peer": "the package 'no_such_package' is not installed"}
    methods["peer"]["requires"] = "yaml"
    assert load(tmp_path, methods=methods).absent["one"] == {}


def test_some_tasks_are_another_question_with_the_same_sweeps(tmp_path):
    arena = load(tmp_path)
    first, *others = arena.sweeps
    assert others
    part = arena.only([first])
    assert part.sweeps == {first: arena.sweeps[first]}
    assert list(part.config.tasks) == list(part.absent) == [first]
    assert part.config_hash != arena.config_hash
    with pytest.raises(ConfigError, match=f"must be one of {first}, .* but got 'nothing'"):
        arena.only(["nothing"])


def test_other_pairs_are_another_question(tmp_path):
    arena = load(tmp_path)
    more = arena.with_pairs(5)
    assert {s.pairs for s in more.sweeps.values()} == {5} == {more.config.pairs}
    assert more.config_hash != arena.config_hash == load(tmp_path).config_hash
    with pytest.raises(ConfigError, match="pairs must be greater than or equal to 2"):
        arena.with_pairs(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"treatment": "espr"}, "treatment must name methods of this arena .*'espr'"),
        ({"scale": {"one": ["best"]}}, "scale must name methods of this arena .*'best'"),
        ({"tasks": {"one": {"sweep": "sweep.yaml", "methods": {"tiny": {}}}}}, "but got 'tiny'"),
        ({"tasks": {"one": {"sweep": "none.yaml"}}}, "none.yaml is not valid"),
        ({"methods": {**ARENA["methods"], "tiny": {}}}, "'tiny' must start from an arm of base"),
        (
            {"methods": {**ARENA["methods"], "esper": {"not_applicable": "never"}}},
            "must run 'esper'",
        ),
        (
            {"methods": {**ARENA["methods"], "static": {"not_applicable": "never"}}},
            "must run one of scale.one",
        ),
        (
            {"methods": {**ARENA["methods"], "static": {"of": "wide", "not_applicable": "x"}}},
            "not_applicable must stand alone",
        ),
        (
            {"methods": {**ARENA["methods"], "long": {"of": "host", "change": {
                "train": {"steps": 40}}}}},
            "train.steps must be equal for all methods",
        ),
        (
            {"methods": {**ARENA["methods"], "odd": {"of": "host", "change": {"trian": {}}}}},
            "did you mean 'train'",
        ),
    ],
)  # fmt: skip
def test_a_wrong_arena_is_refused_with_what_to_do(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/arenas/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_arena_builds(path):
    from esper_experiments.sweep import check

    for sweep in load_arena(path).sweeps.values():
        check(sweep)
