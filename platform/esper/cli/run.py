"""`esper run`: one trial in this process, with a line an interval."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from esper.config.run import load_run
from esper.environment import fingerprint

if TYPE_CHECKING:
    from esper.trial import Trial


def run_once(
    config_path: Path, seed: int, save: Path | None, tracking_uri: str, json_file: Path | None
) -> None:
    """Train, log to MLflow, print the final metrics, and save the model if asked."""
    console = Console()
    config = load_run(config_path)
    from esper.evidence.records import Fingerprint
    from esper.tracking.mlflow_sink import log_single
    from esper.tracking.reach import require_reachable
    from esper.trial import Trial, TrialSpec

    require_reachable(tracking_uri)
    mark = Fingerprint(**fingerprint(config.device))
    trial = Trial(config, TrialSpec(config_path.stem, 0, seed, 0, "none", mark))
    started = time.monotonic()
    while not trial.done:
        latest = trial.run_for(0.0)
        done = len(trial.curves["step"]) / trial.intervals
        left = (time.monotonic() - started) * (1 / done - 1)
        console.print(_line(latest, trial, left), highlight=False, soft_wrap=True)
    record = trial.record()
    run_id = log_single(tracking_uri, "esper-runs", record, config.model_dump(mode="json"))
    for name, value in record.metrics.items():
        console.print(f"{name:>20}  {value:.6g}")
    if record.status == "collapsed":
        console.print(f"the run collapsed: {record.collapse_reason}")
    if save is not None:
        from esper.surgery.files import save as save_model

        trainer = trial.trainer
        save_model(save, trainer.model, trainer.lattice, optimizer=trainer.optimizer)
        console.print(f"saved: {save}")
    console.print(f"MLflow run {run_id} in {tracking_uri}")
    if json_file is not None:
        content = json.loads(record.model_dump_json()) | {"mlflow_run_id": run_id}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _line(latest: dict[str, float], trial: "Trial", left_s: float) -> str:
    from esper.seeds.state import Stage

    stages = Counter(
        s.stage.name
        for a in trial.trainer.lattice.attached.values()
        for s in a.layer.states()
        if s.stage is not Stage.DORMANT
    )
    seeds = ", ".join(f"{n} {stage}" for stage, n in stages.items()) or "all seeds dormant"
    return (
        f"step {latest['step']:.0f}  train {latest['train_loss']:.4g}  "
        f"held-out {latest['held_out_loss']:.4g}  {latest['parameters']:.0f} parameters  "
        f"{seeds}  about {left_s:.0f} s left"
    )
