"""What a sweep writes to MLflow, read back from a database of its own."""

import json
import math
import re
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from esper.evidence.arm_summary import summarise
from esper.evidence.records import Registration, TrialRecord
from esper.evidence.verdict import Verdict, judge_all
from esper.tracking.entities import flatten
from esper.tracking.mlflow_sink import MlflowSink, TrackingError
from esper.tracking.pictures import arms_overview

PARAMS = {"task": {"name": "spirals"}, "lattice": [{"sites": "fc1->fc2"}], "train": {"steps": 3000}}
FOLLOWERS = frozenset({"static-final", "random", "schedule"})

MakeTrial = Callable[..., TrialRecord]


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One schema for all tests: to create it takes over a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def open_sink(database: str, request: pytest.FixtureRequest) -> Callable[..., MlflowSink]:
    def build(sweep_id: str = "id-1", **params: Any) -> MlflowSink:
        tags = {"config_hash": "c0ffee"}
        return MlflowSink.open(
            database, request.node.name, "two-spirals", sweep_id, {"pairs": 2, **params}, tags
        )

    return build


def client_of(sink: MlflowSink) -> MlflowClient:
    return MlflowClient(sink.tracking_uri)


def runs(sink: MlflowSink, where: str = "") -> list[Run]:
    return list(client_of(sink).search_runs([sink.experiment_id], where))


def children(sink: MlflowSink) -> list[Run]:
    return runs(sink, f"tags.`mlflow.parentRunId` = '{sink.parent_run_id}'")


def artifact(sink: MlflowSink, run_id: str, path: str, folder: Path) -> Path:
    return Path(client_of(sink).download_artifacts(run_id, path, str(folder)))


class TestOpen:
    def test_creates_a_running_parent_in_the_experiment(
        self, open_sink: Callable[..., MlflowSink]
    ) -> None:
        sink = open_sink()
        run = client_of(sink).get_run(sink.parent_run_id)
        assert (run.info.status, run.info.run_name) == ("RUNNING", "two-spirals")
        assert run.data.params == {"pairs": "2"}
        assert run.data.tags["config_hash"] == "c0ffee"
        assert run.data.tags["verdict"] == "PENDING"

    def test_artifacts_lie_beside_the_database_wherever_the_process_runs(
        self, open_sink: Callable[..., MlflowSink], database: str
    ) -> None:
        sink = open_sink()
        folder = Path(database.removeprefix("sqlite:///")).parent
        uri = client_of(sink).get_run(sink.parent_run_id).info.artifact_uri
        assert uri.startswith((folder / "mlartifacts").as_uri())

    def test_a_resumed_sweep_reuses_its_parent_which_runs_again(
        self, open_sink: Callable[..., MlflowSink]
    ) -> None:
        first = open_sink()
        first.finish()
        again = open_sink()
        assert again.parent_run_id == first.parent_run_id
        assert client_of(again).get_run(again.parent_run_id).info.status == "RUNNING"
        assert open_sink("id-2").parent_run_id != first.parent_run_id

    def test_another_configuration_under_the_same_id_is_refused(
        self, open_sink: Callable[..., MlflowSink]
    ) -> None:
        open_sink(steps=1)
        with pytest.raises(ValueError, match=r"must equal those stored before, but got: .*'steps'"):
            open_sink(steps=2)

    def test_a_deleted_experiment_is_refused(self, open_sink: Callable[..., MlflowSink]) -> None:
        sink = open_sink()
        client_of(sink).delete_experiment(sink.experiment_id)
        with pytest.raises(ValueError, match=r"must be an active experiment, .*; restore it"):
            open_sink()


class TestUnreachable:
    def refused(self, uri: str, match: str) -> None:
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=match):
            MlflowSink.open(uri, "e", "s", "i", {}, {})
        assert time.monotonic() - started < 5

    def test_a_server_that_is_not_there(self) -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
            self.refused(
                f"http://127.0.0.1:{port}",
                rf"mlflow.tracking_uri must be reachable, but got http://127.0.0.1:{port}: .*; "
                "start `mlflow server`",
            )

    def test_a_database_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not a folder")
        self.refused(f"sqlite:///{tmp_path}/file/mlflow.db", "must be reachable, but got sqlite")

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "notes.db").write_text("some notes of mine, long enough to be no header" * 9)
        self.refused(f"sqlite:///{tmp_path}/notes.db", "file is not a database; name a database")

    def test_an_unknown_scheme(self) -> None:
        self.refused("nonsense://somewhere", "must be reachable, but got nonsense://somewhere")

    def test_a_password_is_not_shown(self) -> None:
        with pytest.raises(ConnectionError, match=r"user:\*\*\*@127.0.0.1") as caught:
            MlflowSink.open("postgresql://user:secret@127.0.0.1:9/db", "e", "s", "i", {}, {})
        assert "secret" not in str(caught.value)


class TestLogTrial:
    def test_a_trial_is_a_nested_run_with_all_its_values(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink, record = open_sink(), make_trial("esper", 1)
        sink.log_trial(record, PARAMS)
        (run,) = children(sink)
        assert run.info.run_name == "esper-001"
        assert run.info.status == "FINISHED"
        assert run.info.end_time - run.info.start_time == 40_000
        assert run.data.params["lattice.0.sites"] == "fc1->fc2"
        expected = {
            "arm": "esper",
            "pair": "1",
            "seed": "1",
            "status": "finished",
            "commit": "abc1234",
            "config_hash": "c0ffee",
            "code_hash": record.fingerprint.code_hash,
            "registration_hash": record.registration_hash,
        }
        assert expected.items() <= run.data.tags.items()
        assert run.data.metrics["final/test_accuracy"] == record.metrics["test_accuracy"]
        history = client_of(sink).get_metric_history(run.info.run_id, "train_loss")
        assert [m.step for m in history] == [int(s) for s in record.curves["step"]]
        assert [m.value for m in history] == record.curves["train_loss"]

    def test_more_values_than_one_batch_holds(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink = open_sink()
        run_id = sink.log_trial(make_trial("esper", 0, num_intervals=250), PARAMS)
        for metric in ("train_loss", "alpha_mean"):
            assert len(client_of(sink).get_metric_history(run_id, metric)) == 250

    def test_repeated_it_changes_nothing(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink, record = open_sink(), make_trial("esper", 0)
        first = sink.log_trial(record, PARAMS)
        assert sink.log_trial(record, PARAMS) == first
        assert len(children(sink)) == 1
        assert len(client_of(sink).get_metric_history(first, "train_loss")) == 30

    def test_a_half_written_run_is_replaced(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink, record = open_sink(), make_trial("esper", 0)
        tags = {"mlflow.parentRunId": sink.parent_run_id, "esper.trial_id": "esper-000"}
        client = client_of(sink)
        torn = client.create_run(sink.experiment_id, run_name="esper-000", tags=tags).info.run_id
        client.log_metric(torn, "train_loss", 1.0, step=100)
        whole = sink.log_trial(record, PARAMS)
        assert [run.info.run_id for run in children(sink)] == [whole]
        assert whole != torn
        assert len(client.get_metric_history(whole, "train_loss")) == 30

    def test_a_newer_record_of_the_trial_replaces_the_older(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink, record = open_sink(), make_trial("esper", 0)
        sink.log_trial(record, PARAMS)
        span = record.ended_at - record.started_at
        later = {"started_at": record.ended_at, "ended_at": record.ended_at + span}
        newer = sink.log_trial(record.model_copy(update=later), PARAMS)
        assert [run.info.run_id for run in children(sink)] == [newer]

    def test_a_collapsed_trial_failed_and_says_why(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink, record = open_sink(), make_trial("random", 0, collapsed=True)
        curves = record.curves | {"grad_norm": [math.inf, *record.curves["grad_norm"][1:]]}
        record = record.model_copy(update={"curves": curves})
        first = sink.log_trial(record, PARAMS)
        assert sink.log_trial(record, PARAMS) == first
        run = client_of(sink).get_run(first)
        assert run.info.status == "FAILED"
        assert run.data.tags["collapse_reason"] == "train_loss is NaN at step 2800"
        assert "train_loss 3" in run.data.tags["nonfinite"]
        assert "grad_norm 4" in run.data.tags["nonfinite"]
        assert math.isnan(run.data.metrics["final/test_accuracy"])
        history = client_of(sink).get_metric_history(first, "grad_norm")
        assert math.isnan(history[0].value)
        assert len(history) == 30

    def test_never_a_metric_per_seed(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink = open_sink()
        few = sink.log_trial(make_trial("esper", 0, num_seeds=32), PARAMS)
        many = sink.log_trial(make_trial("esper", 1, num_seeds=4096), PARAMS)
        metrics = [client_of(sink).get_run(run_id).data.metrics for run_id in (few, many)]
        assert metrics[0].keys() == metrics[1].keys()

    def test_the_growth_log_is_a_table(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial, tmp_path: Path
    ) -> None:
        sink, record = open_sink(), make_trial("esper", 0)
        run_id = sink.log_trial(record, PARAMS)
        path = artifact(sink, run_id, "growth_log.json", tmp_path)
        table = json.loads(path.read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert rows == [t.model_dump() for t in record.transitions]
        listed = json.loads(client_of(sink).get_run(run_id).data.tags["mlflow.loggedArtifacts"])
        assert listed == [{"path": "growth_log.json", "type": "table"}]

    def test_names_and_values_that_mlflow_would_refuse(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink = open_sink()
        record = make_trial("it's odd", 0)
        params = {"a*b": "x" * 10_000, **{f"p{i}": i for i in range(250)}}
        run_id = sink.log_trial(record, params)
        assert sink.log_trial(record, params) == run_id
        stored = client_of(sink).get_run(run_id).data.params
        assert len(stored) == 251
        assert len(stored["a_b"]) == 6000


class TestBackground:
    def test_submitted_trials_are_all_there_after_flush(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink = open_sink()
        for pair in range(4):
            sink.submit_trial(make_trial("esper", pair), PARAMS)
        sink.flush()
        assert {r.info.run_name for r in children(sink)} == {f"esper-00{i}" for i in range(4)}

    def test_a_failure_waits_for_flush_and_names_the_trial(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink = open_sink()
        broken = make_trial("esper", 0)
        broken.curves["train_loss"].pop()
        sink.submit_trial(broken, PARAMS)
        sink.submit_trial(make_trial("esper", 1), PARAMS)
        with pytest.raises(TrackingError, match=r"1 did not; .*\n  esper-000: ValueError"):
            sink.flush()
        sink.flush()
        assert "esper-001" in {run.info.run_name for run in children(sink)}

    def test_finish_ends_the_parent_failed_if_a_trial_is_not_stored(
        self, open_sink: Callable[..., MlflowSink], make_trial: MakeTrial
    ) -> None:
        sink = open_sink()
        broken = make_trial("esper", 0)
        broken.curves["train_loss"].pop()
        sink.submit_trial(broken, PARAMS)
        with pytest.raises(TrackingError, match="esper-000"):
            sink.finish()
        assert client_of(sink).get_run(sink.parent_run_id).info.status == "FAILED"
        sink = open_sink()
        sink.log_trial(make_trial("esper", 0), PARAMS)
        sink.finish()
        assert client_of(sink).get_run(sink.parent_run_id).info.status == "FINISHED"
        assert len(children(sink)) == 1


class TestLogVerdicts:
    def test_the_parent_tells_the_whole_story(
        self,
        open_sink: Callable[..., MlflowSink],
        sweep_records: list[TrialRecord],
        verdicts: list[Verdict],
        registration: Registration,
        tmp_path: Path,
    ) -> None:
        sink = open_sink()
        summaries = summarise(sweep_records, registration)
        picture = arms_overview(sweep_records, "test_accuracy", tmp_path / "arms.png")
        for _ in range(2):
            sink.log_verdicts(verdicts, summaries, {"Arms": picture}, recompute="esper ab x.yaml")
        run = client_of(sink).get_run(sink.parent_run_id)
        path = artifact(sink, sink.parent_run_id, "verdict.json", tmp_path)
        stored = [type(verdicts[0]).model_validate(v) for v in json.loads(path.read_text())]
        assert stored == verdicts
        assert run.data.tags["verdict"] == verdicts[0].verdict
        assert run.data.metrics["mean_difference"] == verdicts[0].mean_difference
        assert run.data.metrics["mean/esper"] == summaries["esper"].mean
        history = client_of(sink).get_metric_history(sink.parent_run_id, "mean_difference")
        assert len(history) == 1
        note = run.data.tags["mlflow.note.content"]
        for part in (
            verdicts[0].verdict,
            verdicts[0].rule,
            "static-final",
            "esper ab x.yaml",
            registration.registration_hash,
            "pictures%2Farms.png",
        ):
            assert part in note
        views = client_of(sink).get_experiment(sink.experiment_id).tags
        for key in re.findall(r"viewStateShareKey=([^&)]+)", note):
            view = json.loads(views[f"mlflow.sharedViewState.{key}"])
            assert sink.parent_run_id in view["searchFilter"]
        stored_picture = artifact(sink, sink.parent_run_id, "pictures/arms.png", tmp_path / "x")
        assert stored_picture.read_bytes() == picture.read_bytes()

    def test_tables_are_what_mlflow_loads_also_after_a_repeated_call(
        self,
        open_sink: Callable[..., MlflowSink],
        sweep_records: list[TrialRecord],
        verdicts: list[Verdict],
        registration: Registration,
    ) -> None:
        sink = open_sink()
        for _ in range(2):
            sink.log_verdicts(verdicts, summarise(sweep_records, registration), {})
        before = mlflow.get_tracking_uri()
        try:
            mlflow.set_tracking_uri(sink.tracking_uri)
            load = partial(client_of(sink).load_table, sink.experiment_id)
            arms = load("tables/arms.json", [sink.parent_run_id])
            comparisons = load("tables/comparisons.json", [sink.parent_run_id])
        finally:
            mlflow.set_tracking_uri(before)
        assert list(arms["arm"]) == registration.arms
        assert list(comparisons["control"]) == [v.control for v in verdicts]
        # MLflow reads the table through pandas, which rounds in the last digits
        expected = pytest.approx([v.mean_difference for v in verdicts], rel=1e-9)
        assert list(comparisons["mean_difference"]) == expected

    def test_an_unhealthy_sweep_has_a_note_with_the_reasons(
        self,
        open_sink: Callable[..., MlflowSink],
        sweep_records: list[TrialRecord],
        registration: Registration,
    ) -> None:
        sink, incomplete = open_sink(), sweep_records[:-1]
        verdicts = judge_all(incomplete, registration, FOLLOWERS)
        sink.log_verdicts(verdicts, summarise(incomplete, registration), {})
        run = client_of(sink).get_run(sink.parent_run_id)
        assert run.data.tags["verdict"] == "UNHEALTHY"
        assert "left no record: esper-007" in run.data.tags["mlflow.note.content"]
        assert "p_value" not in run.data.metrics

    def test_no_verdict_is_refused(self, open_sink: Callable[..., MlflowSink]) -> None:
        with pytest.raises(ValueError, match="must hold the primary comparison, but got none"):
            open_sink().log_verdicts([], {}, {})


def test_flatten_joins_keys_by_dots() -> None:
    config = {"a": {"b": 1, "c": {}}, "d": [{"e": None}, {"e": "x"}], "f": [1, 2], "g": True}
    assert flatten(config) == {
        "a.b": "1",
        "a.c": "{}",
        "d.0.e": "None",
        "d.1.e": "x",
        "f": "[1, 2]",
        "g": "True",
    }
