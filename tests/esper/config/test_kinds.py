"""A configuration that is given to another kind's command says which command takes it."""

from pathlib import Path

import pytest

from esper.config.arena import load_arena
from esper.config.base import ConfigError
from esper.config.baseline import load_baseline_config
from esper.config.kinds import kinds_of
from esper.config.run import load_run
from esper.config.sweep import load_sweep
from esper.config.tune import load_tune

CONFIGS = Path(__file__).parents[3] / "configs"
FOLDERS = {
    "run": "runs",
    "ab": "sweeps",
    "arena": "arenas",
    "tune": "tune",
    "baseline": "baselines",
}
LOADERS = {
    "run": load_run,
    "ab": load_sweep,
    "arena": load_arena,
    "tune": load_tune,
    "baseline": load_baseline_config,
}


@pytest.mark.parametrize("asked", FOLDERS)
@pytest.mark.parametrize("given", FOLDERS)
def test_a_file_of_another_kind_is_refused_with_its_command(asked, given):
    path = next(iter(sorted((CONFIGS / FOLDERS[given]).glob("*.yaml"))))
    if asked == given:
        LOADERS[asked](path)
        return
    with pytest.raises(ConfigError) as caught:
        LOADERS[asked](path)
    (problem,) = caught.value.problems
    assert problem.startswith("the file must be a")
    command = "baseline run --out FOLDER" if given == "baseline" else given
    assert problem.endswith(f"its command is: esper {command} {path}")


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({"task", "host", "train"}, ["run"]),
        ({"task", "space"}, ["run", "tune"]),  # a run with a key too many
        ({"tasks", "train"}, []),  # a wrong key alone tells nothing
        ({"name", "run", "pairs", "question"}, ["ab"]),
        (set(), []),
    ],
)
def test_only_keys_of_one_kind_tell_it(keys, kinds):
    assert kinds_of(keys) == kinds


def test_a_run_with_a_key_of_another_kind_is_still_a_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: {name: spirals}\nspace: {}\n")
    with pytest.raises(ConfigError, match="space must be a known key"):
        load_run(path)
