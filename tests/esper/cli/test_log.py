"""`esper log` shows a run's decisions and where those of two runs part."""

import json

import pytest
from tests.esper.cli.conftest import esper

from esper.config.run import RunConfig
from esper.evidence.records import Fingerprint, TransitionRecord, write_json
from esper.trial import Trial, TrialSpec

MARK = Fingerprint(code_hash="c", commit=None, versions={}, device="cpu")
RUN = {
    "task": {"name": "spirals", "options": {"train_samples": 200}},
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 120, "batch_size": 50, "interval_steps": 10, "learning_rate": 0.01},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4}],
    "growth": {"ramp_steps": 10, "min_gain": -1e9, "min_explained_frac": -1e9},
    "controller": {"name": "schedule", "options": {"at_intervals": [2, 5], "count": 2}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A record and a checkpoint of one run."""
    folder = tmp_path_factory.mktemp("run")
    trial = Trial(RunConfig.model_validate(RUN), TrialSpec("run", 0, 0, 0, "none", MARK))
    while not trial.done:
        trial.run_for(1.0)
    record = trial.record()
    write_json(folder / "record.json", record)
    trial.save(folder / "checkpoint")
    return record, folder


def changed(finished, tmp_path, change):
    """The record with other decisions."""
    record, _ = finished
    lines = change(list(record.transitions))
    write_json(tmp_path / "other.json", record.model_copy(update={"transitions": lines}))
    return tmp_path / "other.json"


def test_every_decision_is_shown_with_its_reason(finished):
    record, folder = finished
    for run in ("record.json", "checkpoint"):
        done = esper("log", "show", folder / run)
        assert done.exit_code == 0
        lines = done.stdout.splitlines()
        assert len(lines) == len(record.transitions) > 8
        assert lines[0] == (
            "interval 2, step 20: Germinate fc1:0 DORMANT -> GERMINATED (mlp_gelu)  on schedule"
        )


def test_a_run_equals_itself_also_as_a_checkpoint(finished):
    record, folder = finished
    done = esper("log", "diff", folder / "record.json", folder / "checkpoint")
    assert (done.exit_code, done.stdout) == (0, f"equal: {len(record.transitions)} decisions\n")


def test_the_record_that_run_writes_is_read_too(finished, tmp_path):
    folder = finished[1]
    content = json.loads((folder / "record.json").read_text()) | {"mlflow_run_id": "abc"}
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert esper("log", "diff", tmp_path / "r.json", folder / "record.json").exit_code == 0


def test_reasons_and_times_may_differ(finished, tmp_path):
    def retell(lines: list[TransitionRecord]):
        return [t.model_copy(update={"reason": "because"}) for t in lines]

    other = changed(finished, tmp_path, retell)
    assert esper("log", "diff", other, finished[1] / "checkpoint").exit_code == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("interval", 99), ("step", 99), ("site", "x"), ("seed", 3), ("action", "Cull"),
     ("before", "CULLED"), ("after", "CULLED"), ("blueprint", "glu")],
)  # fmt: skip
def test_any_other_difference_counts(finished, tmp_path, field, value):
    other = changed(
        finished, tmp_path, lambda t: [*t[:7], t[7].model_copy(update={field: value}), *t[8:]]
    )
    done = esper("log", "diff", finished[1] / "record.json", other)
    assert done.exit_code == 1
    first, mine, theirs, *_ = done.stdout.splitlines()
    assert first == "the runs part at decision 8:"
    assert mine.startswith(f"  {finished[1] / 'record.json'}: interval ")
    assert str(value) in theirs
    assert mine.split(": ", 1)[1] != theirs.split(": ", 1)[1]


def test_a_missing_decision_is_shown_beside_a_gap(finished, tmp_path):
    other = changed(finished, tmp_path, lambda t: t[:12] + t[13:])
    done = esper("log", "diff", finished[1] / "record.json", other)
    assert done.exit_code == 1
    table = done.stdout.split("\n\n")[1].splitlines()
    gone = finished[0].transitions[12]
    (row,) = [line for line in table if "|" in line]
    assert row.split() == [str(gone.interval), f"fc1:{gone.seed}", gone.action, gone.after, "|"]
    # what is equal is cut short
    assert sum("equal" in line for line in table) == 2
    assert len(table) < len(finished[0].transitions)


def test_a_shorter_log_parts_where_it_ends(finished, tmp_path):
    other = changed(finished, tmp_path, lambda t: t[:4])
    done = esper("log", "diff", other, finished[1] / "record.json")
    assert done.exit_code == 1
    assert "the runs part at decision 5:" in done.stdout
    assert f"{other}: (end)" in done.stdout


def test_two_empty_logs_are_equal(finished, tmp_path):
    other = changed(finished, tmp_path, lambda t: [])
    assert esper("log", "diff", other, other).exit_code == 0


def test_what_is_no_run_is_refused(tmp_path, finished):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"trial_id": 3}')
    (tmp_path / "c").mkdir()
    for name, code, message in (
        ("a.json", 2, "the file must be a trial's record"),
        ("b.json", 2, "arm must be given, but is missing"),
        ("c", 2, "must be a checkpoint folder"),
        ("d", 3, "No such file"),
    ):
        done = esper("log", "diff", finished[1] / "record.json", tmp_path / name)
        assert done.exit_code == code, name
        assert message in done.stderr
