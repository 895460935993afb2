"""What a trial and a verdict are in MLflow's words: parameters, metrics, tags, tables."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mlflow.entities import Metric

from esper.evidence.arm_summary import ArmSummary
from esper.evidence.records import TransitionRecord, TrialRecord
from esper.evidence.verdict import Verdict

Table = dict[str, list[Any]]

NOTE_TAG = "mlflow.note.content"
# limits of MLflow's REST interface: longer values are refused
MAX_PARAM_CHARS, MAX_TAG_CHARS, MAX_KEY_CHARS = 6000, 8000, 250


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots, items of lists of mappings by their index, values as text.

    Example:
        >>> flatten({"train": {"steps": 3}, "lattice": [{"sites": "a"}], "plugins": []})
        {'train.steps': '3', 'lattice.0.sites': 'a', 'plugins': '[]'}
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            text = str(value)
            clipped = text if len(text) <= MAX_PARAM_CHARS else text[: MAX_PARAM_CHARS - 3] + "..."
            flat[_key(path)] = clipped
    return flat


def trial_tags(record: TrialRecord) -> dict[str, str]:
    """Who, what and how a trial ended; `nonfinite` counts NaN and infinities by metric."""
    tags = {
        "arm": record.arm,
        "pair": str(record.pair),
        "seed": str(record.seed),
        "status": record.status,
        "code_hash": record.fingerprint.code_hash,
        "registration_hash": record.registration_hash,
        "device": record.fingerprint.device,
        "mlflow.source.name": "esper",
    }
    if record.fingerprint.commit is not None:
        tags |= {
            "commit": record.fingerprint.commit,
            "mlflow.source.git.commit": record.fingerprint.commit,
        }
    if record.collapse_reason is not None:
        tags |= {
            "collapse_reason": record.collapse_reason,
            NOTE_TAG: f"**Collapsed**: {record.collapse_reason}",
        }
    if record.flags is not None:
        # in their order; which interval had which is in the record
        tags["flags_hash"] = ",".join(dict.fromkeys(ruled.hash for ruled in record.flags))
        tags["execution"] = ",".join(dict.fromkeys(ruled.execution for ruled in record.flags))
    broken = _nonfinite(record)
    return tags | ({"nonfinite": broken} if broken else {})


def _nonfinite(record: TrialRecord) -> str:
    """e.g. `train_loss 3, final/test_accuracy 1`: values that are NaN or infinite."""
    values = {**record.curves, **{f"final/{k}": [v] for k, v in record.metrics.items()}}
    counts = {k: sum(not math.isfinite(x) for x in xs) for k, xs in values.items()}
    return ", ".join(f"{k} {n}" for k, n in counts.items() if n)


def trial_metrics(record: TrialRecord) -> list[Metric]:
    """Every curve, and the final values at step 0, which MLflow draws as bars, not as one dot."""
    steps = [int(step) for step in record.curves["step"]]
    start_ms, end_ms = to_ms(record.started_at), to_ms(record.ended_at)
    times = [start_ms + (end_ms - start_ms) * (i + 1) // len(steps) for i in range(len(steps))]
    curves = {name: values for name, values in record.curves.items() if name != "step"}
    metrics = [
        Metric(_key(name), _storable(value), time, step)
        for name, values in curves.items()
        for value, time, step in zip(values, times, steps, strict=True)
    ]
    return metrics + [
        Metric(_key(f"final/{name}"), _storable(value), end_ms, 0)
        for name, value in record.metrics.items()
    ]


def _storable(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan


def growth_table(transitions: Sequence[TransitionRecord]) -> Table:
    """Columns of the growth log."""
    return {name: [getattr(t, name) for t in transitions] for name in TransitionRecord.model_fields}


def key_numbers(
    verdicts: Sequence[Verdict], summaries: Mapping[str, ArmSummary]
) -> dict[str, float]:
    """The primary comparison by plain names, every comparison and arm under its own."""
    numbers = {
        "mean_difference": verdicts[0].mean_difference,
        "p_value": verdicts[0].p_value,
        "pairs": float(verdicts[0].pairs),
    }
    for verdict in verdicts:
        versus = f"{verdict.treatment}_vs_{verdict.control}"
        numbers[f"mean_difference/{versus}"] = verdict.mean_difference
        numbers[f"p_value/{versus}"] = verdict.p_value
    for arm, summary in summaries.items():
        numbers[f"mean/{arm}"] = summary.mean
        numbers[f"worst/{arm}"] = summary.worst
        numbers[f"parameters/{arm}"] = summary.parameters_mean
    return {_key(k): v for k, v in numbers.items() if v is not None and math.isfinite(v)}


def clip_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Values cut to what MLflow stores."""
    return {
        k: v if len(v) <= MAX_TAG_CHARS else v[: MAX_TAG_CHARS - 3] + "..." for k, v in tags.items()
    }


def _key(name: str) -> str:
    """A name that MLflow accepts: other characters become an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_KEY_CHARS]


def to_ms(time: datetime) -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return int(time.timestamp() * 1000)
