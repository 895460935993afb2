"""`esper config explain` says what holds and which line says so."""

import pytest
from tests.esper.cli.conftest import esper
from tests.esper.release.conftest import copy_migration


@pytest.fixture
def config(tmp_path):
    return copy_migration(tmp_path)


def explain(config, key, env=None):
    return esper("config", "explain", key, "--config", config, env=env)


@pytest.mark.parametrize(
    ("key", "value", "file", "line"),
    [
        ("policy.min_pairs", "64", "morphogenetic_migration.yaml", "  min_pairs: 64"),
        ("policy.guards.0.margin", "0.03", "morphogenetic_migration.yaml", "margin: 0.03"),
        ("phases.1.name", "logical_physical_separation", "phases.yaml", "    name: logical"),
        ("phases.3.rollout.flag", "kasmina.triton", "phases.yaml", "flag: kasmina.triton"),
        ("phases.1.rollout.steps_bp.0", "500", "phases.yaml", "flag: kasmina.parallel"),
        ("flags.kasmina.triton.owner", "kernels", "flags.yaml", "    owner: kernels"),
        ("flags", "flags.yaml", "morphogenetic_migration.yaml", "flags: flags.yaml"),
    ],
)
def test_a_value_and_the_line_that_gives_it(config, key, value, file, line):
    done = explain(config, key)
    assert done.exit_code == 0, done.stderr
    told, source = done.stdout.splitlines()
    assert told == f"{key} = {value}"
    place, number = source.rsplit(", line ", 1)
    assert place == f"  from {config.with_name(file)}"
    lines = config.with_name(file).read_text().splitlines()
    # a list over several lines begins where its first item does
    assert line in "".join(lines[int(number) - 1 : int(number) + 1])


def test_a_default_is_called_one(config):
    done = explain(config, "flags.kasmina.triton.killed")
    assert done.stdout == "flags.kasmina.triton.killed = False\n  the default\n"


def test_a_variable_that_outranks_the_file_is_told(config):
    env = {"ESPER_FLAG_KASMINA_TRITON": "off"}
    done = explain(config, "flags.kasmina.triton.rollout_bp", env)
    assert "ESPER_FLAG_KASMINA_TRITON outranks it here: the flag is off" in done.stdout


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("policy.min_pair", "did you mean 'min_pairs'"),
        ("flags.kasmina.trition.owner", "ends before"),
        ("phases.6.name", "ends before '6'"),
        ("policy.min_pairs.x", "ends before 'x'"),
        ("", "ends before ''"),
    ],
)
def test_an_unknown_key_is_refused(config, key, message):
    done = explain(config, key)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
