"""`esper ab` and its commands: what is run without a name, exit codes and messages."""

import json

import pytest
from tests.esper.cli.conftest import esper


@pytest.mark.parametrize(
    "arguments", [("nowhere.yaml",), ("--json", "x.json", "nowhere.yaml"), ("run", "nowhere.yaml")]
)
def test_a_sweep_is_run_with_and_without_the_name_of_the_command(arguments):
    done = esper("ab", *arguments)
    assert done.exit_code == 2
    assert "nowhere.yaml is not valid" in done.stderr


def test_help_shows_both_forms():
    done = esper("ab", "--help")
    assert done.exit_code == 0
    for word in ("CONFIG | COMMAND", "run", "verify", "plan"):
        assert word in done.stdout


def test_plan_says_how_many_pairs_an_effect_needs(tmp_path):
    file = tmp_path / "plan.json"
    done = esper(
        "ab", "plan", "--effect", 0.02, "--sd", 0.02, "--margin", 0.014, "--json", file
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "WIN needs 13 pairs at power 0.9" in done.stdout
    assert "EQUIVALENT within 0.014 needs" in done.stdout
    plan = json.loads(file.read_text())
    assert [row["pairs"] for row in plan["outlook"]] == [8, 12, 16, 20, 30]
    assert plan["outlook"][2]["win"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --effect and --sd, or --from"),
        (("--effect", 1), "give --effect and --sd, or --from"),
        (("--effect", -1, "--sd", 1), "--effect is not valid"),
        (("--effect", 1, "--sd", 0), "--sd is not valid"),
        (("--effect", 1, "--sd", "nan"), "--sd is not valid"),
        (("--effect", 1, "--sd", 1, "--power", 1), "--power is not valid"),
    ],
)
def test_a_plan_without_its_numbers_is_refused(options, message):
    done = esper("ab", "plan", *options)
    assert done.exit_code == 2
    assert message in done.stderr
