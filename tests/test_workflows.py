"""The workflows are well formed, call what exists, and give no stranger a token or a shell."""

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ALIVE = ROOT / ".ci" / "alive"


def read(path):
    # YAML 1.1 reads the key `on` as true
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content | {"on": content[True]}


def steps():
    for path in WORKFLOWS:
        for name, job in read(path)["jobs"].items():
            for step in job["steps"]:
                yield f"{path.name}: {name}", step


def test_they_are_what_github_reads():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
               "vendor.github-workflows", *map(str, WORKFLOWS)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_command_is_there():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    commands = [step["run"] for _, step in steps() if "run" in step]
    called = {name for line in commands for name in re.findall(r"\bmake ([a-z-]+)", line)}
    assert called >= {"safety", "regress", "bench-pinned", "ab-branch", "gate", "test-all"}
    assert called <= targets
    for script in {s for line in commands for s in re.findall(r"\.ci/\w+", line)}:
        assert (ROOT / script).stat().st_mode & 0o100


def test_no_value_from_outside_is_read_as_shell():
    for place, step in steps():
        assert "${{" not in step.get("run", ""), place


def test_tokens_can_read_only_but_for_the_comment():
    writing = []
    for path in WORKFLOWS:
        content = read(path)
        assert "pull_request_target" not in content["on"]
        assert set(content["permissions"].values()) == {"read"}
        for name, job in content["jobs"].items():
            if "write" in job.get("permissions", {}).values():
                writing.append(f"{path.name}: {name}")
                # what can write runs nothing of the pull request
                assert not [s for s in job["steps"] if "checkout" in s.get("uses", "")]
                assert "head.repo.full_name == github.repository" in job["if"]
    assert writing == ["pull_request.yml: comment"]


def test_no_schedule_is_on_the_full_hour():
    for path in WORKFLOWS:
        for entry in read(path)["on"].get("schedule", ()):
            assert int(entry["cron"].split()[0]) not in (0, 30), path.name


def test_the_suite_runs_every_six_hours():
    (entry,) = read(ROOT / ".github/workflows/morphogenetic_migration.yml")["on"]["schedule"]
    assert entry["cron"].split()[1:] == ["*/6", "*", "*", "*"]


@pytest.mark.parametrize(("ago_h", "code"), [(1, 0), (12, 0), (14, 1), (1000, 1), (None, 1)])
def test_a_suite_that_has_not_succeeded_for_long_is_noticed(ago_h, code):
    moment = "" if ago_h is None else (datetime.now(UTC) - timedelta(hours=ago_h)).isoformat()
    done = subprocess.run([ALIVE, "13"], input=f"{moment}\n", capture_output=True, text=True)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(("hours", "text"), [("", "now"), ("13", "no time"), ("1h", "now")])
def test_what_is_no_time_is_refused(hours, text):
    assert subprocess.run([ALIVE, hours], input=text, text=True).returncode == 2
