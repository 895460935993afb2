"""`esper run`: one trial, in this process or in actors, with a line an interval."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console

from esper.cli.output import write_result
from esper.config.base import ConfigError
from esper.config.run import load_run
from esper.environment import fingerprint

if TYPE_CHECKING:
    from esper.config.shards import ShardsConfig
    from esper.shards.shard import Shards
    from esper.trial import Trial


def run_once(
    trial: "Trial",
    checkpoint: str | None,
    every: int,
    save: Path | None,
    tracking_uri: str,
    json_file: Path | None,
    retries: int = 0,
    again: "Shards | None" = None,
    goes_on: bool = True,
    metrics_port: int | None = None,
) -> None:
    """Train, log to MLflow, print the final metrics, and save the model if asked."""
    console = Console()
    from esper.supervision import run_through
    from esper.tracking.mlflow_sink import log_single
    from esper.tracking.reach import require_reachable

    require_reachable(tracking_uri)
    metrics = _serve_metrics(trial, metrics_port)
    started, before = time.monotonic(), len(trial.curves.get("step", []))

    def show(trial: "Trial") -> None:
        metrics(trial)
        intervals = len(trial.curves["step"])
        spent = time.monotonic() - started
        left = spent * (trial.intervals - intervals) / max(1, intervals - before)
        console.print(_line(trial, left), highlight=False, soft_wrap=True)

    def lost(error: Exception) -> None:
        console.print(f"{error}\ngoing on from the last checkpoint", soft_wrap=True)

    def unwritten(error: Exception) -> None:
        console.print(f"{error}\nthe run goes on", soft_wrap=True)

    with TemporaryDirectory() as scratch:
        folder = checkpoint or (scratch if retries else None)
        trial, record = run_through(
            trial, folder, every=every, retries=retries, again=again, on_interval=show,
            on_lost=lost, on_unwritten=unwritten if goes_on else None,
        )  # fmt: skip
    run_id = log_single(tracking_uri, "esper-runs", record, trial.config.model_dump(mode="json"))
    for name, value in record.metrics.items():
        console.print(f"{name:>20}  {value:.6g}")
    if record.status == "collapsed":
        console.print(f"the run collapsed: {record.collapse_reason}")
    if save is not None:
        trial.shard.save(save)
        console.print(f"saved: {save}")
    console.print(f"MLflow run {run_id} in {tracking_uri}")
    if json_file is not None:
        content = json.loads(record.model_dump_json()) | {"mlflow_run_id": run_id}
        write_result(json_file, content)


def _serve_metrics(trial: "Trial", port: int | None) -> "Callable[[Trial], None]":
    """Serve the run's metrics on this machine; what sets them after every interval."""
    if port is None:
        return lambda trial: None
    from prometheus_client import start_http_server

    from esper.monitoring.metrics import PrometheusExporter
    from esper.monitoring.runs import RunMetrics

    exporter = PrometheusExporter("esper_run")
    try:
        start_http_server(port, "127.0.0.1", exporter.registry)
    except OSError as error:
        raise ConfigError("--metrics-port", (
            f"the port must be free, but {port} is not ({error.strerror}); choose another.",
        )) from None  # fmt: skip
    return RunMetrics(exporter, trial.spec.arm, trial).interval


@contextmanager
def shards_of(config: "ShardsConfig | None") -> Iterator[tuple["Shards", "Shards"]]:
    """What makes the shards of a run and their replacements, until the end.

    Args:
        config: Of actors of Ray; None: in this process.
    """
    if config is None:
        from esper.shards.shard import KasminaShard

        yield KasminaShard, KasminaShard
        return
    from esper.config.sweep import Resources
    from esper_experiments.ray_variables import set_variables

    # before Ray is imported
    set_variables()
    from esper_experiments.room import start_ray, stop_ray

    start_ray(Resources())
    try:
        from esper.shards.group import groups, replacements

        yield groups(config), replacements(config)
    finally:
        stop_ray()


def new_trial(config_path: Path, seed: int, replay: Path | None, shards: "Shards") -> "Trial":
    """The trial that a configuration describes, at its start.

    Raises:
        ConfigError: If the configuration or the record to be replayed is not valid.
    """
    config = load_run(config_path)
    from esper.cli.log import read_trial
    from esper.evidence.records import Fingerprint
    from esper.trial import Trial, TrialSpec

    spec = TrialSpec(
        config_path.stem, 0, seed, 0, "none", Fingerprint(**fingerprint(config.device))
    )
    replayed = None if replay is None else read_trial(replay)
    return Trial(config, spec, replayed=replayed, shards=shards)


def resumed_trial(folder: str, shards: "Shards") -> "Trial":
    """The trial of a checkpoint, where it stopped.

    Raises:
        CheckpointError: If the folder holds no trial, or does not fit.
        ConfigError: If other code wrote it: the run would not go on as it began.
    """
    from esper.trial import Trial

    trial = Trial.resume(folder, shards)
    here = fingerprint(trial.config.device)["code_hash"]
    theirs = trial.spec.fingerprint.code_hash
    if here != theirs:
        raise ConfigError(folder, (
            f"the checkpoint must be continued by the code that wrote it ({theirs[:12]}), but "
            f"this is {here[:12]}; install that version, or load the model with esper.load.",
        ))  # fmt: skip
    return trial


def _line(trial: "Trial", left_s: float) -> str:
    latest = {name: values[-1] for name, values in trial.curves.items()}
    stages = ", ".join(f"{n} {stage}" for stage, n in trial.health.stages.items())
    return (
        f"step {latest['step']:.0f}  train {latest['train_loss']:.4g}  "
        f"held-out {latest['held_out_loss']:.4g}  {latest['parameters']:.0f} parameters  "
        f"{stages or 'all seeds dormant'}  about {left_s:.0f} s left"
    )
