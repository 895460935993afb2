"""The story of a sweep in words and tables, for the first page of its MLflow run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.evidence.arm_summary import ArmSummary
from esper.evidence.verdict import Verdict

SAID = {
    "WIN": "{0} beats {1}",
    "LOSE": "{0} loses against {1}",
    "EQUIVALENT": "{0} equals {1} within the margin",
    "INCONCLUSIVE": "undecided between {0} and {1}",
    "UNHEALTHY": "no verdict on {0} against {1}",
}


def verdict_note(
    verdicts: Sequence[Verdict],
    summaries: Mapping[str, ArmSummary],
    run_id: str,
    pictures: Mapping[str, Path],
    links: str,
    recompute: str,
) -> str:
    """Markdown: answer, question, figures, arms, pictures, rule, and how to compute it again.

    Args:
        verdicts: The primary comparison first.
        summaries: By arm.
        run_id: Run whose artifacts under `pictures/` the note shows.
        pictures: Caption and file of each picture.
        links: Where to look next, as Markdown.
        recompute: Command that computes the verdicts again; may be empty.
    """
    first = verdicts[0]
    parts = [
        f"## {first.verdict}: {_answer(first)}",
        f"**{first.rule}** {links}",
        _question(first),
        "\n".join(f"- {reason}" for reason in (*_won(first), *first.reasons)),
        "### Comparisons\n\n" + _markdown(comparisons_table(verdicts), _COMPARISON_HEADS),
        "### Arms\n\n" + _markdown(arms_table(summaries), _ARM_HEADS),
        _provenance(first, recompute),
        *(_picture(caption, path, run_id) for caption, path in pictures.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def comparisons_table(verdicts: Sequence[Verdict]) -> dict[str, list[Any]]:
    """Columns of the comparisons, the primary one first."""
    names = (
        "treatment",
        "control",
        "verdict",
        "mean_difference",
        "interval_low",
        "interval_high",
        "p_value",
        "p_value_lose",
        "p_equivalent",
        "p_holm",
        "p_holm_lose",
        "p_holm_equivalent",
        "cohen_dz",
        "win_probability",
        "wins",
        "ties",
        "losses",
        "worst_treatment",
        "worst_control",
        "collapsed_treatment",
        "collapsed_control",
    )
    return {name: [getattr(v, name) for v in verdicts] for name in names}


def arms_table(summaries: Mapping[str, ArmSummary]) -> dict[str, list[Any]]:
    """Columns of the arms, in the order of the summaries."""
    names = (
        "arm",
        "runs",
        "collapsed",
        "mean",
        "sd",
        "worst",
        "parameters_mean",
        "steps",
        "train_seconds_mean",
        "train_flops_mean",
    )
    return {name: [getattr(s, name) for s in summaries.values()] for name in names}


_COMPARISON_HEADS = {
    "treatment": "treatment",
    "control": "control",
    "verdict": "verdict",
    "mean_difference": "mean difference",
    "interval_low": "low",
    "interval_high": "high",
    "p_value": "p",
    "p_holm": "p (Holm)",
    "wins": "won",
    "ties": "tied",
    "losses": "lost",
    "worst_treatment": "worst treatment",
    "worst_control": "worst control",
}
_ARM_HEADS = {
    "arm": "arm",
    "runs": "runs",
    "collapsed": "collapsed",
    "mean": "mean",
    "sd": "SD",
    "worst": "worst",
    "parameters_mean": "parameters",
    "steps": "steps",
    "train_seconds_mean": "training, s",
    "train_flops_mean": "training, FLOPs",
}


def _answer(verdict: Verdict) -> str:
    said = SAID.get(verdict.verdict, "{0} against {1}")
    return f"{said.format(verdict.treatment, verdict.control)} on {_words(verdict.metric)}"


def _question(verdict: Verdict) -> str:
    better = "higher" if verdict.higher_is_better else "lower"
    return (
        f"Question, registered before the first trial: is **{verdict.treatment}** better than "
        f"**{verdict.control}** on final `{verdict.metric}` ({better} is better), with a margin "
        f"of {verdict.margin:g}, in pairs that share every random seed?"
    )


def _won(verdict: Verdict) -> list[str]:
    if verdict.wins is None:
        return []
    return [
        f"{verdict.wins} of {verdict.pairs} pairs won, {verdict.ties} tied, {verdict.losses} lost."
    ]


def _picture(caption: str, path: Path, run_id: str) -> str:
    # a relative address: it works behind any host name and path prefix of the server
    return f"![{caption}](get-artifact?path=pictures%2F{path.name}&run_uuid={run_id})"


def _provenance(verdict: Verdict, recompute: str) -> str:
    lines = [
        "### Provenance",
        "",
        f"- commit `{verdict.commit or 'not in a checkout'}`",
        f"- registration `{verdict.registration_hash}`",
        "- full figures: artifact `verdict.json`; each nested run is one trial with its growth log",
    ]
    if recompute:
        lines.append(f"- compute it again: `{recompute}`")
    return "\n".join(lines)


def _markdown(table: Mapping[str, Sequence[Any]], heads: Mapping[str, str]) -> str:
    rows = zip(*(table[name] for name in heads), strict=True)
    # MLflow's pages leave no room between columns, so that numbers would run together
    cells = [list(heads.values()), *([_figure(v) for v in row] for row in rows)]
    padded = [[f"{cell}&emsp;" for cell in row] for row in cells]
    lines = [padded[0], ["---"] * len(heads), *padded[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: object) -> str:
    """A table's cell: four significant digits, thousands apart, a dash for what is not there."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "collapsed"
        large = abs(value) >= 1e9
        return f"{value:.3g}" if large else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(metric: str) -> str:
    return metric.replace("_", " ")
