"""MLflow sink: a sweep is one parent run, each of its trials one nested run, the verdict on top.

Only the driver process of a sweep writes. Every call may be repeated: a trial that is stored whole
is left alone and a half-written one is replaced, so that a resumed sweep doubles nothing.

Not covered: live curves. A trial appears when its record is complete.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import time_ns
from typing import Literal, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from esper.config.base import ConfigError
from esper.evidence.arm_summary import ArmSummary
from esper.evidence.records import TrialRecord
from esper.evidence.verdict import Verdict
from esper.tracking.entities import (
    NOTE_TAG,
    Table,
    clip_tags,
    flatten,
    growth_table,
    key_numbers,
    to_ms,
    trial_metrics,
    trial_tags,
)
from esper.tracking.note import arms_table, comparisons_table, verdict_note
from esper.tracking.reach import database_path, require_reachable, unreachable
from esper.tracking.views import view_links, view_tags

T = TypeVar("T")

SWEEP_TAG, TRIAL_TAG, PARENT_TAG = "esper.sweep_id", "esper.trial_id", "mlflow.parentRunId"
TABLES_TAG = "mlflow.loggedArtifacts"
# opens the pages about training instead of those about language models
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# limits of MLflow's REST interface
MAX_METRICS_PER_BATCH, MAX_PARAMS_PER_BATCH = 1000, 100


class TrackingError(RuntimeError):
    """Trials that could not be stored in MLflow; their records on disk are not affected."""

    def __init__(self, tracking_uri: str, problems: tuple[tuple[str, str], ...]) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(tracking_uri, problems)
        self.tracking_uri, self.problems = tracking_uri, problems

    def __str__(self) -> str:
        lines = "".join(f"\n  {trial_id}: {problem}" for trial_id, problem in self.problems)
        return (
            f"every trial must reach MLflow at {self.tracking_uri}, but {len(self.problems)} did "
            f"not; their records on disk are complete, so run the sweep again to log them:{lines}"
        )


class MlflowSink:
    """Writes one sweep to MLflow; build it with `open`.

    `log_trial` stores a trial now, `submit_trial` in the background, where a failure waits for
    `flush` instead of ending the sweep.
    """

    def __init__(
        self,
        client: MlflowClient,
        tracking_uri: str,
        experiment_id: str,
        parent_run_id: str,
        sweep_name: str,
        tags: Mapping[str, str],
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment_id = experiment_id
        self.parent_run_id = parent_run_id
        self._client = client
        self._sweep_name = sweep_name
        self._tags = dict(tags)
        self._pending: list[tuple[str, Future[str]]] = []
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="mlflow-sink")

    @classmethod
    def open(
        cls,
        tracking_uri: str,
        experiment: str,
        sweep_name: str,
        sweep_id: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
    ) -> "MlflowSink":
        """Find or create the experiment and the sweep's parent run, which is then RUNNING.

        Call it before any trial starts: it also creates the schema of a new database, which
        parallel writers would race for.

        Args:
            tracking_uri: e.g. `sqlite:///mlflow.db` or `http://host:5000`.
            experiment: Name of the MLflow experiment.
            sweep_name: Name of the parent run.
            sweep_id: Identity of the sweep; a resumed sweep has the same one.
            params: Configuration of the sweep, nested as it may be.
            tags: Tags of the parent run and of every trial, e.g. `config_hash`.

        Raises:
            ConnectionError: If the tracking URI cannot be reached.
            ConfigError: If the experiment was deleted, or `params` differ from the stored ones.
        """
        require_reachable(tracking_uri)
        client = _client(tracking_uri)
        experiment_id = _experiment(client, tracking_uri, experiment)
        run_id = _parent(client, experiment_id, sweep_name, sweep_id)
        _write_params(client, run_id, params, f"sweep '{sweep_name}'")
        note = f"Sweep **{sweep_name}** is running; the verdict follows when every trial is in."
        _write_tags(
            client,
            run_id,
            {
                **tags,
                "sweep": sweep_name,
                "verdict": "PENDING",
                "mlflow.source.name": "esper",
                NOTE_TAG: note,
            },
        )
        return cls(client, tracking_uri, experiment_id, run_id, sweep_name, tags)

    def log_trial(self, record: TrialRecord, params: Mapping[str, object]) -> str:
        """Store one trial as a nested run.

        A run of this very record is left alone; what a killed driver left half-written, and the
        run of an older record of the same trial, are deleted and written anew. A collapsed trial
        is a FAILED run.

        NaN values stay NaN. Infinities become NaN too, because a database turns them into
        1.8e308, which ruins every chart; tag `nonfinite` counts both for each metric.
        A value's time is interpolated between start and end of the trial; its step is exact.

        Returns:
            Id of the run.

        Raises:
            ConnectionError: If the tracking URI cannot be reached any more.
        """
        require_reachable(self.tracking_uri)
        keep: str | None = None
        for run in self._runs_of(record.trial_id):
            if keep is None and _is_whole(run, record):
                keep = run.info.run_id
            else:
                self._client.delete_run(run.info.run_id)
        return keep or self._write_trial(record, params)

    def submit_trial(self, record: TrialRecord, params: Mapping[str, object]) -> None:
        """`log_trial` in the background, one trial at a time; `flush` tells what went wrong."""
        self._pending.append(
            (record.trial_id, self._executor.submit(self.log_trial, record, params))
        )

    def wait(self) -> None:
        """Wait until the background is idle; `flush` tells what went wrong."""
        wait([future for _, future in self._pending])

    def flush(self) -> None:
        """Wait for every submitted trial.

        Raises:
            TrackingError: Naming each trial that could not be stored, and why.
        """
        pending, self._pending = self._pending, []
        failures = [(trial_id, future.exception()) for trial_id, future in pending]
        problems = tuple((i, f"{type(e).__name__}: {e}") for i, e in failures if e is not None)
        if problems:
            raise TrackingError(self.tracking_uri, problems)

    def log_verdicts(
        self,
        verdicts: Sequence[Verdict],
        summaries: Mapping[str, ArmSummary],
        pictures: Mapping[str, Path],
        *,
        recompute: str = "",
    ) -> None:
        """Put the answer on the parent run: note, tables, pictures, `verdict.json`, key metrics.

        Args:
            verdicts: The primary comparison first.
            summaries: By arm.
            pictures: Caption and PNG file of each; stored under `pictures/` by its file name.
            recompute: Command that computes the verdicts again from the records.

        Raises:
            ValueError: If there is no verdict.
            ConnectionError: If the tracking URI cannot be reached any more.
        """
        if not verdicts:
            raise ValueError("verdicts must hold the primary comparison, but got none; judge it.")
        require_reachable(self.tracking_uri)
        run_id, client = self.parent_run_id, self._client
        for path in pictures.values():
            client.log_artifact(run_id, str(path), "pictures")
        documents = [json.loads(v.model_dump_json()) for v in verdicts]
        client.log_text(run_id, json.dumps(documents, indent=1), "verdict.json")
        _write_tables(
            client,
            run_id,
            {
                "tables/arms.json": arms_table(summaries),
                "tables/comparisons.json": comparisons_table(verdicts),
            },
        )
        self._write_key_metrics(verdicts, summaries)
        for tag, view in view_tags(self._sweep_name, run_id, verdicts[0].metric).items():
            client.set_experiment_tag(self.experiment_id, tag, view)
        links = view_links(self._sweep_name, self.experiment_id)
        note = verdict_note(verdicts, summaries, run_id, pictures, links, recompute)
        _write_tags(client, run_id, {"verdict": verdicts[0].verdict, NOTE_TAG: note})

    def log_note(self, text: str) -> None:
        """Put a text on the parent run, in place of a verdict: of a search, which has none.

        Args:
            text: Markdown.

        Raises:
            ConnectionError: If the tracking URI cannot be reached any more.
        """
        require_reachable(self.tracking_uri)
        _write_tags(self._client, self.parent_run_id, {"verdict": "none", NOTE_TAG: text})

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Wait for the background and end the parent run.

        Raises:
            TrackingError: If a submitted trial could not be stored; the parent run is then FAILED.
        """
        try:
            self.flush()
        except TrackingError:
            status = "FAILED"
            raise
        finally:
            self._executor.shutdown()
            require_reachable(self.tracking_uri)
            self._client.set_terminated(self.parent_run_id, status)

    def _runs_of(self, trial_id: str) -> list[Run]:
        where = (
            f"tags.`{PARENT_TAG}` = '{self.parent_run_id}' "
            f"and tags.`{TRIAL_TAG}` = {_quoted(trial_id)}"
        )
        return list(self._client.search_runs([self.experiment_id], where))

    def _write_trial(self, record: TrialRecord, params: Mapping[str, object]) -> str:
        tags = {**self._tags, "sweep": self._sweep_name, PARENT_TAG: self.parent_run_id}
        return _write_record(self._client, self.experiment_id, record, params, tags)

    def _write_key_metrics(
        self, verdicts: Sequence[Verdict], summaries: Mapping[str, ArmSummary]
    ) -> None:
        """Only what changed is written, so that a repeated call adds no second point."""
        known = self._client.get_run(self.parent_run_id).data.metrics
        now_ms = time_ns() // 1_000_000
        metrics = [
            Metric(name, value, now_ms, 0)
            for name, value in key_numbers(verdicts, summaries).items()
            if known.get(name) != value
        ]
        for batch in _chunks(metrics, MAX_METRICS_PER_BATCH):
            self._client.log_batch(self.parent_run_id, metrics=batch)


def log_single(
    tracking_uri: str, experiment: str, record: TrialRecord, params: Mapping[str, object]
) -> str:
    """Store one trial that belongs to no sweep, as a run of its own.

    Args:
        tracking_uri: e.g. `sqlite:///mlflow.db` or `http://host:5000`.
        experiment: Name of the MLflow experiment.
        record: The trial.
        params: Its configuration, nested as it may be.

    Returns:
        Id of the run.

    Raises:
        ConnectionError: If the tracking URI cannot be reached.
        ConfigError: If the experiment was deleted.
    """
    require_reachable(tracking_uri)
    client = _client(tracking_uri)
    experiment_id = _experiment(client, tracking_uri, experiment)
    return _write_record(client, experiment_id, record, params, {})


def _write_record(
    client: MlflowClient,
    experiment_id: str,
    record: TrialRecord,
    params: Mapping[str, object],
    tags: Mapping[str, str],
) -> str:
    run = client.create_run(
        experiment_id,
        start_time=to_ms(record.started_at),
        run_name=record.trial_id,
        tags=clip_tags({**tags, **trial_tags(record), TRIAL_TAG: record.trial_id}),
    )
    run_id: str = run.info.run_id
    _write_params(client, run_id, params, f"trial '{record.trial_id}'")
    for batch in _chunks(trial_metrics(record), MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)
    _write_tables(client, run_id, {"growth_log.json": growth_table(record.transitions)})
    status = "FINISHED" if record.status == "finished" else "FAILED"
    client.set_terminated(run_id, status, to_ms(record.ended_at))
    return run_id


def _write_tables(client: MlflowClient, run_id: str, tables: Mapping[str, Table]) -> None:
    """Store what `mlflow.load_table` reads.

    `MlflowClient.log_table` is not used: it appends to a table that is already there, so that
    a repeated call doubles the rows.
    """
    for path, table in tables.items():
        rows = [[_plain(v) for v in row] for row in zip(*table.values(), strict=True)]
        text = json.dumps({"columns": list(table), "data": rows}, allow_nan=False)
        client.log_text(run_id, text, path)
    listed = [{"path": path, "type": "table"} for path in tables]
    _write_tags(client, run_id, {TABLES_TAG: json.dumps(listed)})


def _client(tracking_uri: str) -> MlflowClient:
    try:
        client = MlflowClient(tracking_uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        remedy = "correct it, for example to sqlite:///mlflow.db, or see to the server"
        raise unreachable(tracking_uri, error, remedy) from error
    return client


def _experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(
            client.create_experiment(name, _artifact_location(tracking_uri, name), EXPERIMENT_TAGS)
        )
    if found.lifecycle_stage != "active":
        raise ConfigError(tracking_uri, (
            f"mlflow.experiment must be an active experiment, but got '{name}', which is deleted; "
            "restore it with `mlflow experiments restore` or choose another name.",
        ))  # fmt: skip
    return str(found.experiment_id)


def _artifact_location(tracking_uri: str, experiment: str) -> str | None:
    """Beside a SQLite file, wherever the process started; a server chooses for itself."""
    database = database_path(tracking_uri)
    if database is None:
        return None
    folder = re.sub(r"[^\w.-]", "_", experiment)
    return (database.parent / "mlartifacts" / folder).as_uri()


def _parent(client: MlflowClient, experiment_id: str, sweep_name: str, sweep_id: str) -> str:
    where = f"tags.`{SWEEP_TAG}` = {_quoted(sweep_id)}"
    found = client.search_runs([experiment_id], where, order_by=["attributes.start_time ASC"])
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    run = client.create_run(experiment_id, run_name=sweep_name, tags={SWEEP_TAG: sweep_id})
    return str(run.info.run_id)


def _is_whole(run: Run, record: TrialRecord) -> bool:
    """True if the run was written to its end, from this record and not an older one."""
    times = (run.info.start_time, run.info.end_time)
    ended = run.info.status in ("FINISHED", "FAILED")
    return ended and times == (to_ms(record.started_at), to_ms(record.ended_at))


def _plain(value: object) -> object:
    """JSON has no NaN: an empty cell, which pandas reads as NaN again."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_params(client: MlflowClient, run_id: str, params: Mapping[str, object], of: str) -> None:
    """Parameters never change in MLflow; writing the same values again does nothing."""
    entities = [Param(key, value) for key, value in flatten(params).items()]
    for batch in _chunks(entities, MAX_PARAMS_PER_BATCH):
        try:
            client.log_batch(run_id, params=batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ConfigError(of, (
                f"its params must equal those stored before, but got: {error.message}; "
                "start a new sweep for a new configuration.",
            )) from error  # fmt: skip


def _write_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    client.log_batch(run_id, tags=[RunTag(k, v) for k, v in clip_tags(tags).items()])


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _quoted(value: str) -> str:
    """A string literal of MLflow's filter language, which cannot escape quotes."""
    if "'" in value and '"' in value:
        raise ValueError(f"an id must not hold both kinds of quotes, but got {value}; rename it.")
    return f'"{value}"' if "'" in value else f"'{value}'"
