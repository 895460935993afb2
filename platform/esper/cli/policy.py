"""`esper policy`: policies that learn from field reports, and MLflow's registry of them."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from esper.config.base import ConfigError
from esper.controller.adaptations import FieldReport
from esper.controller.learned import FLAG, MODEL_FILE, read_model
from esper.evidence.policy_training import fit, judge, predicted, rewards, waves
from esper.evidence.records import write_text

REGISTERED = "tamiyo-policy"


def train_policy(
    sources: Sequence[str], out: Path, explore_frac: float, register: bool, tracking_uri: str
) -> None:
    """Fit a policy to field reports, judge it by cross-validation, and keep it."""
    console = Console()
    reports = _read(console, sources)
    model = fit(reports)
    console.print(
        f"{len(reports)} field reports in {model.waves} waves of {', '.join(model.models)}"
    )
    shown = _judged(console, reports, explore_frac)
    write_text(out, model.model_dump_json(indent=1) + "\n")
    console.print(f"policy: {out}", soft_wrap=True)
    if register:
        version = _register(out, shown, tracking_uri)
        console.print(
            f"registered as models:/{REGISTERED}/{version} with the alias challenger; a service "
            f"serves it as a policy with that model, by the flag {FLAG}",
            soft_wrap=True,
        )


def evaluate_policy(sources: Sequence[str], model: str, explore_frac: float) -> None:
    """Judge the way of learning on other field reports, and say what a policy predicts there."""
    console = Console()
    reports, policy = _read(console, sources), read_model(model)
    known = waves(reports)
    mean = predicted(policy, known)
    gains = rewards(known)
    error, spread = float(np.mean((gains - mean) ** 2)), float(gains.var())
    share = f"{1 - error / spread:+.3f}" if spread > 0 else "not defined, all gains are equal"
    console.print(
        f"{len(reports)} field reports in {len(known)} waves; of the variance of their gains the "
        f"policy explains {share}"
    )
    _judged(console, reports, explore_frac)


def promote_policy(version: int, tracking_uri: str) -> None:
    """Make a registered policy the champion."""
    import mlflow

    from esper.tracking.reach import require_reachable

    require_reachable(tracking_uri)
    client = mlflow.MlflowClient(tracking_uri)
    try:
        client.get_model_version(REGISTERED, str(version))
    except mlflow.exceptions.MlflowException:
        known = [v.version for v in client.search_model_versions(f"name='{REGISTERED}'")]
        raise ConfigError(tracking_uri, (
            f"version must be one of {', '.join(map(str, sorted(known, key=int))) or 'none'}, but "
            f"got {version}; `esper policy train --register` adds one.",
        )) from None  # fmt: skip
    client.set_registered_model_alias(REGISTERED, "champion", str(version))
    Console().print(f"models:/{REGISTERED}@champion is version {version}")


def _read(console: Console, sources: Sequence[str]) -> list[FieldReport]:
    from esper.controller.field_reports import FieldReports
    from esper.tracking.reach import database_path

    for source in sources:
        path = database_path(source)
        # opening it would make an empty one
        if path is not None and not path.exists():
            raise ConfigError("--reports", (
                f"reports must be in a database, but there is no file {path}; correct the URL.",
            ))  # fmt: skip
    reports = [r for source in sources for r in FieldReports(source).read()]
    # one that was stored in two places counts once
    reports = [*{r.request_id: r for r in reports}.values()]
    told = [r for r in reports if r.gain is not None or r.outcome != "kept"]
    if len(told) < len(reports):
        console.print(
            f"{len(reports) - len(told)} adaptations were kept without an evaluation and tell "
            "nothing; set growth.min_gain to have their gains measured"
        )
    return told


def _judged(
    console: Console, reports: Sequence[FieldReport], explore_frac: float
) -> dict[str, float]:
    table = Table(
        box=SIMPLE_HEAD,
        title="gain of a wave for each choice (95 % over runs), and the choices that this rests on",
    )
    for column in ("policy", "doubly robust", "self-normalised", "choices"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    shown = {}
    for name, value in judge(reports, explore_frac):
        cells = [f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in (value.dr, value.snips)]
        table.add_row(name, *cells, f"{value.effective:.0f}")
        shown[f"dr_{name.replace(' ', '_')}"] = value.dr.value
    console.print(table)
    return shown


def _register(out: Path, metrics: dict[str, float], tracking_uri: str) -> str:
    import mlflow

    from esper.tracking.reach import require_reachable

    require_reachable(tracking_uri)
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_experiment("tamiyo")
    with mlflow.start_run(run_name=out.stem) as run, TemporaryDirectory() as folder:
        (Path(folder) / MODEL_FILE).write_bytes(out.read_bytes())
        mlflow.log_artifacts(folder, "policy")
        mlflow.log_metrics(metrics)
    client = mlflow.MlflowClient()
    if not client.search_registered_models(f"name='{REGISTERED}'"):
        client.create_registered_model(REGISTERED)
    source = f"{run.info.artifact_uri}/policy"
    made = client.create_model_version(REGISTERED, source, run_id=run.info.run_id)
    client.set_registered_model_alias(REGISTERED, "challenger", made.version)
    return str(made.version)
