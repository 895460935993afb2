"""One run's configuration: what cannot work is refused before anything is computed."""

from pathlib import Path

import pytest
import yaml

from esper.config.base import ConfigError
from esper.config.run import GrowthConfig, RunConfig, load_run

ROOT = Path(__file__).parents[3]
RUN = {
    "task": {"name": "spirals"},
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 1000, "interval_steps": 50},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 4}],
}


def write(tmp_path, **changes):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, **changes}))
    return file


def test_a_small_file_is_a_whole_run(tmp_path):
    run = load_run(write(tmp_path))
    assert run.controller.name == "static"
    assert run.growth == GrowthConfig()
    assert run.lattice[0].geometry == "chunk"
    assert load_run(write(tmp_path)) == run


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/runs").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_shipped_runs_are_valid(file):
    assert isinstance(load_run(file), RunConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, r"tasks must be a known key, but got 'tasks'; did you mean 'task'\?"),
        ({"task": {"nam": "x"}}, r"task\.name must be given, but is missing; add it\."),
        ({"lattice": [{"sites": "a", "seeds_per_layer": 4, "hiden": 2}]},
         r"lattice\.0\.hiden must be a known key.*did you mean 'hidden'"),
        ({"lattice": [{"sites": "a", "seeds_per_layer": 0}]},
         r"lattice\.0\.seeds_per_layer must be greater than 0, but got 0"),
        ({"lattice": [{"sites": "a", "seeds_per_layer": 4, "geometry": "chunks"}]},
         r"lattice\.0\.geometry must be 'chunk' or 'span', but got 'chunks'"),
        ({"train": {"steps": 100, "optimizer": "adm"}},
         r"train\.optimizer must be 'adam', 'adamw' or 'sgd', but got 'adm'"),
        ({"train": {"steps": 130, "interval_steps": 50}},
         r"train: steps must be a multiple of interval_steps \(50\), but got 130"),
        ({"train": {"steps": 100, "warmup_steps": 100}},
         r"train: warmup_steps must be less than the 100 steps, but got 100"),
        ({"train": {"steps": 100, "learning_rate": -1}}, r"learning_rate must be greater than 0"),
        ({"train": {"steps": 100, "weight_decay": -1}}, r"weight_decay must be greater than or"),
        ({"growth": {"min_explained_frac": 1.5}}, r"min_explained_frac must be less than or equal"),
        ({"growth": {"patience_intervals": 3, "training_intervals": 4}},
         r"growth: patience_intervals must be at least training_intervals \(4\), but got 3"),
        ({"growth": {"patience_intervals": 1, "stabilization_intervals": 2}},
         r"growth: patience_intervals must be at least stabilization_intervals \(2\), but got 1"),
        ({"growth": {"ramp_steps": 401}, "controller": {"name": "tamiyo"}},
         r"ramp_steps must be at most patience_intervals \* interval_steps \(400\), but got 401"),
        ({"growth": {"young_rate": 3}, "train": {"steps": 100, "optimizer": "sgd"}},
         r"growth\.young_rate must be 1 with optimizer 'sgd', but got 3"),
        ({"start": "grown"}, r"start must be 'host' for a run that follows no arm"),
        ({"start": "gron"}, r"start must be 'host' or 'grown', but got 'gron'"),
        ({"seed_salt": -1}, r"seed_salt must be greater than or equal to 0, but got -1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(write(tmp_path, **changes))
    assert "run.yaml is not valid" in str(caught.value)


@pytest.mark.parametrize("changes", [{"lattice": []}, {"controller": {"name": "static"}}])
def test_the_ramp_does_not_matter_to_a_run_that_does_not_grow(tmp_path, changes):
    grows = {"growth": {"ramp_steps": 401}, "controller": {"name": "tamiyo"}}
    assert load_run(write(tmp_path, **{**grows, **changes})).growth.ramp_steps == 401


def test_a_grown_start_follows_an_arm(tmp_path):
    assert load_run(write(tmp_path, start="grown", follow="esper")).start == "grown"
