"""What became of adaptations is told once, as it was seen, and stored for good."""

import dataclasses
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pydantic import ValidationError

from esper.config.base import ConfigError, validate
from esper.config.run import RunConfig
from esper.controller import ReportedOptions, Shield
from esper.controller.adaptations import (
    Adaptations,
    Candidate,
    Draw,
    FieldReport,
    features_of,
)
from esper.controller.contract import ControllerContract, random_reports
from esper.controller.field_reports import FieldReports
from esper.environment import fingerprint
from esper.evidence.records import Fingerprint
from esper.seeds.actions import Germinate
from esper.seeds.state import Stage
from esper.trial import Trial, TrialSpec

EAGER = {"name": "tamiyo", "options": {"patience_intervals": 1, "seeds_per_wave": 4}}


def report_with(stage, interval=1, **columns):
    """A report whose seed 0 of the site `chunks` is in a stage."""
    report = next(random_reports(0, 1))
    site = report.sites[0]
    stages = np.zeros_like(site.stage)
    stages[0] = stage
    given = {name: np.full_like(site.gain, value) for name, value in columns.items()}
    site = dataclasses.replace(site, stage=stages, **given)
    return dataclasses.replace(report, interval=interval, sites=(site, report.sites[1]))


GERMINATE = [Germinate("chunks", 0, "mlp_relu", "cosine")]


def watch(stages, adaptations=None):
    """Germinates at interval 1, then shows the stages."""
    watched = adaptations or Adaptations("m")
    found = watched.observe(report_with(Stage.DORMANT), GERMINATE, "p", {})
    for interval, stage in enumerate(stages, start=2):
        report = report_with(stage, interval, gain=0.25, gain_se=0.5)
        found += watched.observe(report, [], "p", {})
    return found


@pytest.mark.parametrize(
    ("stages", "outcome", "ended"),
    [
        ([Stage.TRAINING, Stage.EVALUATING, Stage.FINE_TUNING, Stage.FOSSILIZED], "kept", 4),
        ([Stage.FOSSILIZED], "kept", 2),
        ([Stage.GRAFTING, Stage.CULLED, Stage.CULLED, Stage.DORMANT], "culled", 3),
        ([Stage.CANCELLED, Stage.DORMANT], "cancelled", 2),
        ([Stage.STABILIZATION, Stage.ROLLED_BACK], "rolled_back", 3),
    ],
)
def test_an_adaptation_ends_once_with_its_outcome(stages, outcome, ended):
    (told,) = watch(stages)
    assert (told.outcome, told.interval, told.ended) == (outcome, 1, ended)
    assert (told.model, told.policy) == ("m", "p")
    assert (told.chosen.blueprint, told.chosen.graft) == ("mlp_relu", "cosine")


def test_a_gain_is_told_if_it_was_measured_and_only_then():
    (told,) = watch([Stage.GRAFTING, Stage.EVALUATING, Stage.CULLED])
    held_out = report_with(Stage.EVALUATING).held_out_loss
    assert told.after == held_out
    assert told.gain == pytest.approx(0.25)
    assert told.gain_se == 0.5
    (told,) = watch([Stage.GRAFTING, Stage.CULLED])
    assert (told.before, told.after, told.gain, told.gain_se) == (None, None, None, None)


def test_what_was_vetoed_never_began():
    assert watch([Stage.DORMANT, Stage.CULLED]) == []


def test_features_are_what_was_known_when_it_began_and_nothing_that_was_not():
    report = report_with(Stage.DORMANT, bottleneck=float("nan"))
    watched = Adaptations("m")
    watched.observe(report, GERMINATE, "p", {})
    (told,) = watched.observe(report_with(Stage.CULLED, 2), [], "p", {})
    features = told.chosen.features
    assert "bottleneck" not in features
    assert features["grad_energy"] == pytest.approx(float(report.sites[0].grad_energy[0]))
    cost = report.sites[0].seed_parameters["mlp_relu"]
    assert features["cost_frac"] == pytest.approx(cost / report.host_parameters)
    assert features["crowd"] == 1
    assert "bottleneck_per_cost" not in features
    measured = report_with(Stage.DORMANT, bottleneck=0.5)
    known = features_of(measured, measured.sites[0], 0, "mlp_relu")
    assert known["bottleneck_per_cost"] == pytest.approx(0.5 / known["cost_frac"])


def test_a_draw_goes_with_its_report():
    candidates = [Candidate(site="chunks", seed=i, blueprint="mlp_relu", graft="cosine",
                            features={"x": float(i)}) for i in range(3)]  # fmt: skip
    draw = Draw(candidates=tuple(candidates), chosen=0, propensity=0.5)
    watched = Adaptations("m")
    watched.observe(report_with(Stage.DORMANT), GERMINATE, "p", {("chunks", 0): draw})
    (told,) = watched.observe(report_with(Stage.CULLED, 2), [], "p", {})
    assert told.draw == draw
    assert told.chosen == candidates[0]
    with pytest.raises(ValidationError, match=r"chosen must be in 0\.\.2"):
        Draw(candidates=tuple(candidates), chosen=3, propensity=0.5)


def test_where_a_run_goes_back_what_began_since_was_rolled_back():
    watched = Adaptations("m")
    before = watched.state_dict()
    watched.observe(report_with(Stage.DORMANT), GERMINATE, "p", {})
    watched.observe(report_with(Stage.TRAINING, 2), [], "p", {})
    watched.load_state_dict(before)
    (told,) = watched.observe(report_with(Stage.DORMANT, 1), [], "p", {})
    assert (told.outcome, told.interval, told.ended) == ("rolled_back", 1, 2)


def test_a_resumed_run_goes_on_with_what_is_under_way():
    first, second = Adaptations("m"), Adaptations("m")
    first.observe(report_with(Stage.DORMANT), GERMINATE, "p", {})
    second.load_state_dict(first.state_dict())
    end = report_with(Stage.CULLED, 2)
    told = second.observe(end, [], "p", {})
    assert told == first.observe(end, [], "p", {})
    assert len(told) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ended": 0}, "ended"),
        ({"interval": 5}, "ended must be at least interval"),
        ({"before": 1.0}, "must be given together"),
        ({"request_id": "a b"}, "request_id"),
        ({"before": float("nan"), "after": 1.0}, "before"),
    ],
)
def test_reports_that_make_no_sense_are_refused(change, says):
    with pytest.raises(ValidationError, match=says):
        FieldReport(**sample(0).model_dump() | change)


def sample(i, **more):
    chosen = {"site": "s", "seed": i, "blueprint": "mlp_relu", "graft": "linear", "features": {}}
    return FieldReport(request_id=f"r.{i}", model="m", policy="p", interval=1, ended=2,
                       chosen=chosen, outcome="kept", **more)  # fmt: skip


def test_the_table_keeps_each_report_once_and_for_good(tmp_path):
    table = FieldReports(f"sqlite:///{tmp_path}/reports.db")
    assert len(table.append([sample(0), sample(1, before=2.0, after=1.5)])) == 2
    assert table.append([sample(1), sample(2)]) == [sample(2)]
    assert table.append([]) == []
    again = FieldReports(f"sqlite:///{tmp_path}/reports.db")
    assert [r.request_id for r in again.read()] == ["r.0", "r.1", "r.2"]
    assert again.read()[1].gain == 0.5
    assert again.read(after=2) == [sample(2)]
    with sqlite3.connect(tmp_path / "reports.db") as database:
        for deed in ("DELETE FROM field_reports", "UPDATE field_reports SET model = 'x'"):
            with pytest.raises(sqlite3.IntegrityError, match="never changed"):
                database.execute(deed)


def test_writers_at_once_lose_nothing(tmp_path):
    url = f"sqlite:///{tmp_path}/reports.db"

    def write(i):
        # every writer makes the table if need be; every report is sent by two
        table = FieldReports(url)
        return sum(len(table.append([sample(10 * (i // 2) + j)])) for j in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(8))) == 40
    assert len(FieldReports(url).read()) == 40


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////nowhere/at/all.db", "postgresql+nodriver://u:pw@h/db"]
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(url):
    with pytest.raises(ConfigError) as error:
        FieldReports(url)
    assert "database that can be written" in str(error.value)
    assert "pw" not in str(error.value)


class TestReported(ControllerContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.url = f"sqlite:///{tmp_path}/reports.db"

    def make(self, seed):
        return ReportedOptions(of=EAGER, to=self.url, model="m").build(seed)


class TestReportedBehindTheShield(TestReported):
    def make(self, seed):
        return Shield(super().make(seed))


CONFIG = {
    "task": {"name": "spirals"},
    "host": {"name": "mlp", "options": {"hidden": [16]}},
    "train": {"steps": 600, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.01,
              "interval_steps": 20},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 4}],
    "growth": {"ramp_steps": 20, "min_gain": 0.0},
}  # fmt: skip


def test_a_trial_reports_its_adaptations_and_decides_as_without(tmp_path):
    url = f"sqlite:///{tmp_path}/reports.db"
    reported = {"name": "reported", "options": {"of": EAGER, "to": url, "model": "spirals"}}
    logs = []
    for controller in (EAGER, reported):
        config = validate(RunConfig, {**CONFIG, "controller": controller}, source="test")
        mark = Fingerprint(**fingerprint("cpu"))
        trial = Trial(config, TrialSpec("arm", 0, 0, 0, "none", mark))
        while not trial.done:
            trial.run_for(60)
        logs.append(trial.shard.log())
    assert logs[0] == logs[1]
    told = FieldReports(url).read()
    ends = [
        (t.action.site, t.action.seed)
        for t in logs[0]
        if t.before.stage is Stage.EVALUATING
        # what the last decision ended is not seen any more
        and t.interval < 30
    ]
    assert sorted(ends) == sorted((r.chosen.site, r.chosen.seed) for r in told)
    assert len(told) >= 2
    assert all(r.gain is not None for r in told)
