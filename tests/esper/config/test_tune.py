"""A search is checked as a whole before anything starts."""

import pytest
import yaml

from esper.config.base import ConfigError
from esper.config.tune import load_tune

TINY = {
    "name": "tiny",
    "run": {
        "task": {"name": "spirals"},
        "host": {"name": "mlp", "options": {"hidden": [8]}},
        "train": {"steps": 400, "batch_size": 64, "interval_steps": 50},
        "lattice": [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4}],
        "controller": {"name": "tamiyo", "options": {"seeds_per_wave": 1}},
    },
    "space": {
        "train.learning_rate": {"loguniform": [0.001, 0.1]},
        "controller.options.seeds_per_wave": {"choice": [1, 2]},
    },
    "budget_runs": 4,
    "confirm": {"pairs": 2, "metric": "test_accuracy", "margin": 0.01},
}


@pytest.fixture
def load(tmp_path):
    def written(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(TINY | changes))
        return load_tune(path)

    return written


def test_values_go_where_their_keys_say_and_leave_the_rest(load):
    tune = load()
    run = tune.candidate({"train.learning_rate": 0.05, "controller.options.seeds_per_wave": 2})
    assert run.train.learning_rate == 0.05
    assert run.train.batch_size == 64
    assert run.controller.name == "tamiyo"
    assert run.controller.options == {"seeds_per_wave": 2}
    assert tune.candidate({}).controller.options == {"seeds_per_wave": 1}
    assert tune.budget_steps == 1600


def test_what_was_found_is_tested_against_the_run_as_it_is(load):
    sweep = load().confirmation({"train.learning_rate": 0.05})
    assert sweep.run_config("default") == load().candidate({})
    assert sweep.run_config("tuned").train.learning_rate == 0.05
    assert (sweep.question.treatment, sweep.question.control) == ("tuned", "default")


WRONG = {
    "two kinds": ({"space": {"train.learning_rate": {"uniform": [0, 1], "choice": [1, 2]}}},
                  "must have one of choice, uniform, loguniform, integer, but got"),
    "no kind": ({"space": {"train.learning_rate": {}}}, "but got none"),
    "falling": ({"space": {"train.learning_rate": {"uniform": [0.1, 0.01]}}}, "must rise"),
    "an end": ({"space": {"train.learning_rate": {"uniform": [-1.0, 1.0]}}},
               "run.train.learning_rate must be greater than 0"),
    "no such key": ({"space": {"train.learning_rat": {"uniform": [0.1, 1.0]}}},
                    "did you mean 'learning_rate'"),
    "steps": ({"space": {"train.steps": {"choice": [400, 800]}}}, "leave train.steps alone"),
    "interval": ({"space": {"train.interval_steps": {"choice": [50, 100]}}},
                 "leave train.interval_steps alone"),
    "test metric": ({"metric": "test_accuracy"}, "metric must"),
    "seen seed": ({"seed": 1}, "seed must not be one of the seeds 0 to 1"),
    "grace": ({"asha": {"grace_steps": 70}}, "asha.grace_steps must be a multiple of the 50"),
    "report": ({"report_steps": 40}, "report_steps must be a multiple of train.interval_steps"),
    "both": ({"asha": {"grace_steps": 50}, "pbt": {"every_steps": 100}}, "not be given both"),
    "population": ({"pbt": {"every_steps": 100}, "budget_runs": 2}, "at least 4 runs"),
    "unchangeable": ({"pbt": {"every_steps": 100},
                      "space": {"train.batch_size": {"choice": [32, 64]}}},
                     "can change in the middle of a run"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_starts(load, changes, words):
    with pytest.raises(ConfigError) as error:
        load(**changes)
    assert words in str(error.value)
