"""A stored sweep is verified as it was written, and nothing can be changed in it unseen."""

import json
import re
import shutil
import subprocess
import sys
from copy import copy

import pytest
from tests.esper.cli.conftest import esper

from esper.config.base import ConfigError
from esper.config.sweep import SweepConfig
from esper.evidence.records import Registration, read_records, write_json
from esper.evidence.search import search_records
from esper.evidence.verdict import judge_all
from esper.evidence.verify import (
    CONFIG,
    SEAL,
    find_sweep,
    seal,
    store_config,
    verdict_name,
    verify,
)
from esper.release.rollout import read_measured

PAIRS = 12
BASE = [0.10 + 0.01 * k for k in range(PAIRS)]
ARMS = {
    "esper": [v + 0.2 + 0.003 * k for k, v in enumerate(BASE)],
    "host": BASE,
    "final": [v + 0.21 for v in BASE],
}
# the follower always comes last, which an arm that follows none must not
CONFIGURATION = {
    "name": "stored",
    "run": {},
    "arms": {"esper": {}, "host": {}, "final": {"follow": "esper"}},
    "searches": {"searched": {"over": ["host", "esper"], "metric": "score_curve"}},
    "pairs": PAIRS,
    "question": {
        "treatment": "esper", "control": "host", "metric": "score", "margin": 0.1,
        "secondary": [
            {"treatment": "esper", "control": "final"},
            {"treatment": "esper", "control": "searched"},
        ],
    },
}  # fmt: skip


class Stored:
    """A finished sweep in a folder, written with the real judge."""

    def __init__(self, folder, plant, arms=ARMS, **changes):
        sweep = SweepConfig.model_validate(CONFIGURATION | changes)
        self.folder, self.sweep = folder, sweep
        planted = plant(arms)
        draft = planted.registration.model_copy(
            update={
                "sweep": sweep.name,
                "config_hash": sweep.config_hash,
                "question": sweep.question,
                "arms": list(sweep.all_arms),
            }
        )
        digest = draft.digest()
        registration = draft.model_copy(update={"registration_hash": digest})
        store_config(sweep, folder)
        write_json(folder / "registration.json", registration)
        for record in planted.records:
            order = 2 if record.arm == "final" else (record.pair + (record.arm == "host")) % 2
            update = {
                "registration_hash": digest,
                "order": order,
                "curves": {
                    "step": [50.0], "score_curve": [record.metrics["score"]],
                    "train_loss": [record.metrics["score"]],
                },
                "outputs": [[record.metrics["score"], 1.0], [0.0, record.metrics["score"]]],
            }  # fmt: skip
            write_json(
                folder / "trials" / f"{record.trial_id}.json", record.model_copy(update=update)
            )
        ran = read_records(folder)
        self.verdicts = judge_all(
            [*ran, *search_records(ran, sweep.searches)],
            registration,
            dependent_arms=sweep.dependent_arms,
            salted_arms=sweep.salted_arms,
        )
        question = sweep.question
        for comparison, verdict in zip(question.comparisons, self.verdicts, strict=True):
            write_json(folder / "verdicts" / verdict_name(comparison, question), verdict)
        seal(folder)

    def edit(self, name, pattern, text):
        path = self.folder / name
        changed, count = re.subn(pattern, text, path.read_text(), count=1)
        assert count == 1
        path.write_text(changed)

    def findings(self, sweep=None):
        return list(verify(self.folder, sweep).findings)

    def unsealed(self):
        """As it was stored before there were configurations and checksums."""
        (self.folder / CONFIG).unlink()
        (self.folder / SEAL).unlink()
        return self


@pytest.fixture(scope="module")
def written(tmp_path_factory, plant):
    return Stored(tmp_path_factory.mktemp("written") / "stored", plant)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, plant):
    """Another sweep with another result."""
    worse = ARMS | {"esper": [v - 0.2 for v in BASE]}
    return Stored(tmp_path_factory.mktemp("written") / "other", plant, arms=worse, first_seed=9)


@pytest.fixture
def stored(tmp_path, written):
    folder = shutil.copytree(written.folder, tmp_path / "stored")
    copied = copy(written)
    copied.folder = folder
    return copied


def test_an_untouched_sweep_is_verified(stored):
    result = verify(stored.folder)
    assert not result.findings
    assert result.sealed
    assert len(result.records) == 4 * PAIRS
    assert result.verdicts == tuple(stored.verdicts)
    # healthy, so that the follower's exemption and the search were taken from config.json
    assert [v.verdict for v in result.verdicts] == ["WIN", "EQUIVALENT", "WIN"]


def test_one_flipped_digit_of_a_metric_is_seen_twice(stored):
    stored.edit("trials/host-003.json", r'"score": 0\.13', '"score": 0.14')
    edited, *differing = stored.findings()
    assert edited == "trials/host-003.json was edited: its sha256 is not the stored one."
    assert any(
        line.startswith("verdicts/esper-vs-host.json: mean_difference is stored as 0.2165")
        for line in differing
    )


def test_an_edit_that_changes_no_verdict_is_seen(stored):
    stored.edit("trials/host-003.json", r'"parameters": 100\.0', '"parameters": 101.0')
    assert stored.findings() == [
        "trials/host-003.json was edited: its sha256 is not the stored one."
    ]


@pytest.mark.parametrize(
    ("pattern", "text", "where"),
    [
        (r'"verdict": "WIN"', '"verdict": "LOSE"', "verdict is stored as"),
        (r'"p_value": 0\.000244', '"p_value": 0.000243', "p_value is stored as 0.000243"),
        (r'"collapsed_control": 0,', "", "collapsed_control is stored as nothing"),
        (r'"ties": 0', '"ties": -0.0', "ties is stored as -0.0, but the records give 0"),
        (r'"ties": 0', '"ties":  0', "but the text is not"),
    ],
)
def test_one_flipped_digit_of_a_verdict_is_named(stored, pattern, text, where):
    stored.edit("verdicts/esper-vs-host.json", pattern, text)
    edited, differing = stored.findings()
    assert edited.startswith("verdicts/esper-vs-host.json was edited")
    assert where in differing


def test_a_removed_trial_is_missed(stored):
    (stored.folder / "trials" / "host-003.json").unlink()
    findings = stored.findings()
    assert "trials/host-003.json is missing." in findings
    assert any("verdict is stored as" in line and "UNHEALTHY" in line for line in findings)
    assert not any("final-" in line for line in findings)


def test_a_verdict_from_elsewhere_does_not_pass(stored, elsewhere):
    assert not elsewhere.findings()
    name = "verdicts/esper-vs-host.json"
    shutil.copy(elsewhere.folder / name, stored.folder / name)
    seal(stored.folder)
    findings = stored.findings()
    assert any("verdict is stored as" in line and "LOSE" in line for line in findings)
    assert any("registration_hash is stored as" in line for line in findings)


def test_a_verdict_of_no_registered_comparison_does_not_pass(stored):
    folder = stored.folder / "verdicts"
    shutil.copy(folder / "esper-vs-host.json", folder / "host-vs-esper.json")
    assert stored.findings() == [
        "verdicts/host-vs-esper.json was not there when the sweep was finished.",
        "verdicts/host-vs-esper.json is of no registered comparison.",
    ]


def test_a_trial_of_another_registration_does_not_pass(stored, elsewhere):
    shutil.copy(elsewhere.folder / "trials/host-003.json", stored.folder / "trials/host-003.json")
    seal(stored.folder)
    findings = stored.findings()
    assert any("trials/host-003.json is of another registration" in line for line in findings)


def test_a_trial_under_another_name_does_not_pass(stored):
    trials = stored.folder / "trials"
    shutil.copy(trials / "host-003.json", trials / "host-004.json")
    seal(stored.folder)
    assert "trials/host-004.json is the record of 'host-003'." in stored.findings()


@pytest.mark.parametrize(
    ("pattern", "text"), [(r'"margin": 0\.1', '"margin": 0.3'), (r'"pairs": 12', '"pairs": 11')]
)
def test_an_altered_question_is_seen(stored, pattern, text):
    stored.edit("registration.json", pattern, text)
    seal(stored.folder)
    assert any("registration.json was altered" in line for line in stored.findings())


def test_an_altered_configuration_is_seen(stored):
    stored.edit(CONFIG, '"follow": "esper"', '"follow": null')
    seal(stored.folder)
    findings = stored.findings()
    assert any("but" in line and "was registered" in line for line in findings)
    # without its exemption the follower's order is no random one
    assert any("esper-vs-final.json: verdict is stored as" in line for line in findings)


@pytest.mark.parametrize("name", [CONFIG, SEAL, "registration.json"])
def test_nothing_may_be_missing(stored, name):
    (stored.folder / name).unlink()
    assert any(f"{name} cannot be read" in line for line in stored.findings())


@pytest.mark.parametrize("name", [CONFIG, SEAL, "registration.json", "trials/host-001.json"])
@pytest.mark.parametrize("text", ["", "{}", "\ufffd {"])
def test_a_damaged_file_is_a_finding_and_no_crash(stored, name, text):
    (stored.folder / name).write_text(text)
    assert stored.findings()


def test_an_older_sweep_is_judged_by_the_configuration_that_is_given(stored):
    with pytest.raises(ConfigError, match="leave out --config"):
        verify(stored.folder, stored.sweep)
    stored.unsealed()
    with pytest.raises(ConfigError, match="give --config for one that was stored before"):
        verify(stored.folder)
    result = verify(stored.folder, stored.sweep)
    assert (result.findings, result.sealed) == ((), False)
    wrong = SweepConfig.model_validate(CONFIGURATION | {"first_seed": 1})
    assert any("was registered" in line for line in stored.findings(wrong))


def test_an_unfinished_sweep_is_no_sweep_that_differs(stored):
    (stored.folder / SEAL).unlink()
    shutil.rmtree(stored.folder / "verdicts")
    with pytest.raises(ConfigError, match="it must be finished; the same esper ab CONFIG"):
        verify(stored.folder)


def test_the_seal_is_one_that_other_tools_read(stored):
    lines = (stored.folder / SEAL).read_text().splitlines()
    assert len(lines) == 2 + 3 * PAIRS + 3
    assert all(re.fullmatch(r"[0-9a-f]{64}  \S+\.json", line) for line in lines)


def test_a_sweep_is_found_by_folder_name_or_hash(stored, tmp_path):
    text = (stored.folder / "registration.json").read_text()
    digest = Registration.model_validate_json(text).registration_hash
    for name in (str(stored.folder), "stored", digest, digest[:8]):
        assert find_sweep(name, tmp_path) == stored.folder
    for name in (digest[:7], "0" * 8, "nothing"):
        with pytest.raises(FileNotFoundError, match="but there is none"):
            find_sweep(name, tmp_path)
    # the same question asked of other code
    shutil.copytree(stored.folder, tmp_path / "again")
    with pytest.raises(ConfigError, match=r"again.*stored have it; give a folder"):
        find_sweep(digest, tmp_path)


def test_stored_content_hashes_as_the_configuration_does(stored):
    content = json.loads((stored.folder / CONFIG).read_text())
    assert SweepConfig.model_validate(content).config_hash == stored.sweep.config_hash


def test_verify_tells_what_differs_and_fails(stored, tmp_path):
    file = tmp_path / "out" / "report.json"
    good = esper("ab", "verify", "stored", "--runs", tmp_path, "--json", file)
    assert good.exit_code == 0
    assert "WIN  esper against host" in good.stdout
    assert "verified: every verdict is the same, bit for bit" in good.stdout
    report = json.loads(file.read_text())
    assert (report["verified"], report["sealed"], report["findings"]) == (True, True, [])
    assert report["verdicts"][0]["verdict"] == "WIN"
    stored.edit("trials/host-003.json", r'"score": 0\.13', '"score": 0.14')
    bad = esper("ab", "verify", stored.folder, "--json", file)
    assert bad.exit_code == 1
    assert "differs: trials/host-003.json was edited" in bad.stdout
    assert "NOT VERIFIED" in bad.stdout
    assert json.loads(file.read_text())["verified"] is False


def test_what_is_no_finished_sweep_is_refused(tmp_path):
    missing = esper("ab", "verify", "nothing", "--runs", tmp_path)
    assert (missing.exit_code, "but there is none" in missing.stderr) == (3, True)
    empty = esper("ab", "verify", tmp_path)
    assert (empty.exit_code, "it must hold config.json" in empty.stderr) == (2, True)


def test_verify_starts_neither_ray_nor_mlflow_nor_the_code_of_the_trials(stored):
    script = (
        "import sys; from esper.cli.stored_sweeps import verify_ab; from pathlib import Path\n"
        "code = verify_ab(sys.argv[1], None, Path('runs'), None)\n"
        "assert not {'ray', 'mlflow', 'torch', 'esper.trial'} & sys.modules.keys()\n"
        "raise SystemExit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(stored.folder)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_plan_takes_its_numbers_from_a_pilot_that_is_verified(stored):
    done = esper("ab", "plan", "--from", stored.folder)
    assert done.exit_code == 0, done.stderr
    assert "score: effect 0.2165" in done.stdout
    stored.edit("trials/host-003.json", r'"score": 0\.13', '"score": 0.14')
    refused = esper("ab", "plan", "--from", stored.folder)
    assert (refused.exit_code, "a pilot must be verified" in refused.stderr) == (2, True)


def test_wins_and_losses_of_a_verified_sweep_are_a_gates_quantities(stored, tmp_path):
    file = tmp_path / "measured.json"
    done = esper("ab", "verify", stored.folder, "--measured", file)
    assert done.exit_code == 0, done.stderr
    measured = read_measured([file])
    assert {k: q.value for k, q in measured.quantities.items()} == {
        "esper_wins_over_host": 1, "esper_losses_to_host": 0,
        "esper_wins_over_final": 0, "esper_losses_to_final": 0,
        "esper_wins_over_searched": 1, "esper_losses_to_searched": 0,
    }  # fmt: skip
    assert measured.ended_at == max(r.ended_at for r in read_records(stored.folder))
    file.unlink()
    stored.edit("trials/host-003.json", r'"score": 0\.13', '"score": 0.14')
    refused = esper("ab", "verify", stored.folder, "--measured", file)
    assert (refused.exit_code, file.exists()) == (2, False)
    assert "a measurement must be verified" in refused.stderr


def test_similarity_is_told_from_the_records_beside_the_controls_own_noise(stored, tmp_path):
    file = tmp_path / "alike.json"
    done = esper("ab", "similarity", stored.folder, "--noise", "final", "--json", file)
    assert done.exit_code == 0, done.stderr
    assert "esper against host, 12 pairs" in done.stdout
    assert "within the control's own noise: no" in done.stdout
    alike, searched = json.loads(file.read_text())["comparisons"]
    assert (alike["control"], searched["control"]) == ("host", "searched")
    assert alike["outputs"]["max_abs"] == pytest.approx(0.2 + 0.003 * 11)
    assert alike["noise_outputs"]["max_abs"] == pytest.approx(0.21)
    assert (alike["parted"], alike["noise_parted"]) == ([1] * 12, [1] * 12)
    unknown = esper("ab", "similarity", stored.folder, "--noise", "nobody")
    assert (unknown.exit_code, "arms must be among" in unknown.stderr) == (2, True)
