"""An arena in MLflow: one run above the runs of its sweeps, with the report and its pictures."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import time_ns

from mlflow import MlflowClient
from mlflow.entities import Metric

from esper.evidence.arena import ArenaSummary
from esper.tracking.arena_report import headline, markdown_verdicts
from esper.tracking.entities import NOTE_TAG, clip_tags
from esper.tracking.mlflow_sink import PARENT_TAG, MlflowSink


def log_arena(
    sink: MlflowSink,
    summary: ArenaSummary,
    sweep_run_ids: Iterable[str],
    report: Path,
    pictures: Iterable[Path],
    recompute: str,
) -> None:
    """Put the answer on the arena's own run, and the sweeps' runs below it.

    Repeating the call replaces what it wrote.

    Args:
        sink: Opened for the arena; it is finished here.
        summary: What the arena found.
        sweep_run_ids: Parent runs of the sweeps, of the same experiment.
        report: HTML file.
        pictures: PNG files.
        recompute: Command that makes all of it again from the records.
    """
    client, run_id = MlflowClient(sink.tracking_uri), sink.parent_run_id
    client.log_artifact(run_id, str(report))
    for path in pictures:
        client.log_artifact(run_id, str(path), "pictures")
    client.log_text(run_id, json.dumps(json.loads(summary.model_dump_json())), "summary.json")
    known = client.get_run(run_id).data.metrics
    now_ms = time_ns() // 1_000_000
    changed = [
        Metric(k, v, now_ms, 0) for k, v in key_figures(summary).items() if known.get(k) != v
    ]
    client.log_batch(run_id, metrics=changed)
    note = (
        f"## {headline(summary)}\n\n{markdown_verdicts(summary)}\n\n"
        f"The report is the artifact `{report.name}`; to make it again: `{recompute}`."
    )
    tags = clip_tags({"verdict": headline(summary), NOTE_TAG: note})
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    for sweep_run_id in sweep_run_ids:
        client.set_tag(sweep_run_id, PARENT_TAG, run_id)
    sink.finish("FINISHED")


def key_figures(summary: ArenaSummary) -> Mapping[str, float]:
    """Interquartile means by method, and how often each verdict was reached."""
    verdicts = [v.verdict for v in summary.verdicts()]
    counts = {f"verdicts/{name}": float(verdicts.count(name)) for name in dict.fromkeys(verdicts)}
    return counts | {f"iqm/{name}": a.iqm for name, a in summary.aggregates.items()}
