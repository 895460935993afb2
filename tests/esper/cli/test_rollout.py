"""`esper rollout` and `esper gate` from the command line: exit codes, messages, no side effects."""

import json
import math
from datetime import UTC, datetime, timedelta

import pytest
from tests.esper.cli.conftest import esper
from tests.esper.release.conftest import copy_migration

from esper.release.flags import load_flags
from esper.release.judge import IntervalMeasurements, PhaseMeasurements, Series
from esper.release.phases import Quantity, load_migration
from esper.release.rollout import flags_hash, read, state_of


class Here:
    """A copy of the project's migration, and files of evidence for it."""

    def __init__(self, folder):
        self.config, self.flags = copy_migration(folder), folder / "flags.yaml"
        self.rollout, self.file = folder / "first", folder / "evidence.json"

    @property
    def share_bp(self):
        return load_flags(self.flags).flags["kasmina.parallel"].rollout_bp

    def create(self):
        return esper("rollout", "plan", 1, "--create", self.rollout, "--config", self.config)

    def targets(self, **changed):
        values = {"<": 50.0, ">=": 2_000.0}
        phase = load_migration(self.config).phases.phase(1)
        quantities = {
            a.metric: Quantity(value=values.get(a.comparison, a.value), unit=a.unit)
            for a in (*phase.gates, *phase.targets)
        }
        return self.write(
            PhaseMeasurements(
                commit=None, ended_at=datetime.now(UTC), quantities=quantities | changed
            )
        )

    def interval(self, slower=1.0, **changed):
        stored, now = read(self.rollout), datetime.now(UTC)
        pairs = {
            g.metric: Series(unit=g.unit, treatment=(10.0,) * 64, control=(10.0,) * 64)
            for g in stored.plan.policy.guards
        }
        late = pairs["latency_p50_ms"].model_copy(update={"treatment": (10.0 * slower,) * 64})
        fields = {
            "rollout": "first",
            "step": max(1, state_of(stored.plan, stored.entries).step),
            "flags_hash": flags_hash(stored),
            "started_at": now - timedelta(minutes=5),
            "ended_at": now,
            "pairs": pairs | {"latency_p50_ms": late},
            "gauges": {a.metric: Quantity(value=0, unit=a.unit) for a in stored.plan.alerts},
        }
        return self.write(IntervalMeasurements(**fields | changed))

    def write(self, record):
        self.file.write_text(record.model_dump_json())
        return self.file

    def step(self, file):
        return esper("rollout", "step", self.rollout, file, "--actor", "ada")

    def gate(self, *arguments):
        return esper("gate", *arguments, "--config", self.config)


@pytest.fixture
def here(tmp_path):
    return Here(tmp_path)


@pytest.fixture
def running(here):
    assert here.create().exit_code == 0
    assert here.step(here.targets()).exit_code == 0
    return here


def test_a_plan_says_steps_conditions_and_evidence(here):
    done = esper("rollout", "plan", 1, "--config", here.config)
    assert done.exit_code == 0
    assert "kasmina.parallel: 0 % -> 5 %, 10 %, 25 %, 50 %, 100 %" in done.stdout
    assert "forward_p50_ms < 100 ms" in done.stdout
    assert "accuracy_points: lower by 0.5 points is rolled back within one interval" in done.stdout
    assert "MORE THAN" not in done.stdout
    assert not here.rollout.exists()


def test_every_decision_has_its_exit_code(running):
    assert running.share_bp == 500
    hold = running.step(running.interval(slower=1.03))
    assert (hold.exit_code, running.share_bp) == (10, 500)
    assert "HOLD" in hold.stdout
    blind = running.step(running.interval(gauges={}))
    assert (blind.exit_code, running.share_bp) == (30, 500)
    good = running.step(running.interval())
    assert (good.exit_code, running.share_bp) == (0, 1_000)
    bad = running.step(running.interval(slower=1.05))
    assert (bad.exit_code, running.share_bp) == (20, 0)
    assert "kasmina.parallel is at 0 %, the rollout is over" in bad.stdout
    over = running.step(running.interval())
    assert (over.exit_code, "it is over" in over.stderr) == (2, True)
    told = esper("flags", "audit", "--file", running.flags)
    assert told.exit_code == 0
    assert "ada rollback: kasmina.parallel" in told.stdout


def test_status_tells_all_and_whether_the_flag_is_where_it_should_be(running):
    running.step(running.interval())
    done = esper("rollout", "status", running.rollout)
    assert done.exit_code == 0
    assert "step 2 of 5, 1 of 10 planned intervals judged" in done.stdout
    assert "kasmina.parallel is at 10 %;" in done.stdout
    esper("flags", "set", "kasmina.parallel", "--percent", "1", "--reason", "x",
          "--file", running.flags)  # fmt: skip
    done = esper("rollout", "status", running.rollout)
    assert "is at 1 %, NOT where the rollout left it" in done.stdout


def test_replay_gives_the_same_or_says_where_not(running):
    running.step(running.interval(slower=1.03))
    done = esper("rollout", "replay", running.rollout)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "2 verdicts, all identical")
    path = running.rollout / "002.json"
    path.write_text(path.read_text().replace('"HOLD"', '"ADVANCE"'))
    done = esper("rollout", "replay", running.rollout)
    assert done.exit_code == 1
    assert "HOLD, stored as ADVANCE: DIFFERS" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", 6), "phase must be 0 to 5"),
        (("step", "nowhere", "no.json"), "must be the folder of a rollout"),
        (("status", "nowhere"), "must be readable"),
        (("replay", "nowhere"), "must be readable"),
    ],
)
def test_bad_input_has_code_2(here, arguments, message):
    config = ("--config", here.config) if arguments[0] == "plan" else ()
    done = esper("rollout", *arguments, *config)
    assert (done.exit_code, message in done.stderr) == (2, True)


def test_a_phase_without_targets_stops_everything(here):
    text = here.config.with_name("phases.yaml").read_text()
    start = text.index("    targets:")
    here.config.with_name("phases.yaml").write_text(
        text[:start] + "    targets: []\n" + text[text.index("    gates:", start) :]
    )
    done = here.create()
    assert done.exit_code == 2
    assert "phases.0.targets must have at least 1 item" in done.stderr
    assert not here.rollout.exists()


def test_the_gate_of_a_phase_decides_on_what_was_measured(here):
    assert here.gate("--phase", 1, "--measured", here.targets()).exit_code == 0
    slow = here.targets(forward_p50_ms=Quantity(value=100, unit="ms"))
    done = here.gate("--phase", 1, "--measured", slow)
    assert (done.exit_code, "forward_p50_ms < 100 ms: no, 100 ms" in done.stdout) == (10, True)
    blind = here.targets(forward_p50_ms=Quantity(value=math.nan, unit="ms"))
    assert here.gate("--phase", 1, "--measured", blind).exit_code == 30
    # another phase asks for other things
    assert here.gate("--phase", 3, "--measured", here.targets()).exit_code == 30


def test_the_gate_of_a_rollout_decides_on_its_last_evidence(running):
    running.step(running.interval())
    before = {p.name: p.read_bytes() for p in running.rollout.iterdir()}
    assert running.gate("--rollout", running.rollout).exit_code == 0
    both = running.gate("--rollout", running.rollout, "--phase", 3, "--measured", running.targets())
    assert both.exit_code == 30
    running.step(running.interval(slower=1.05))
    del before["plan.json"]
    assert {n: (running.rollout / n).read_bytes() for n in before} == before
    assert running.gate("--rollout", running.rollout).exit_code == 20


def test_a_gate_without_evidence_is_refused_or_inconclusive(here):
    assert here.gate().exit_code == 2
    assert here.gate("--phase", 1).exit_code == 2
    assert here.gate("--phase", 1, "--measured", "no.json").exit_code == 2
    here.file.write_text(json.dumps({"quantities": {}}))
    assert here.gate("--phase", 1, "--measured", here.file).exit_code == 2
    here.create()
    assert here.gate("--rollout", here.rollout).exit_code == 30
