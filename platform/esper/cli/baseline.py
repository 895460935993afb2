"""`esper baseline`: measure, compare and show what the implementations cost.

`python -m esper.cli.baseline CONFIG --out FOLDER` is `esper baseline run` for a machine without the
command line's libraries, Ray and MLflow.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from esper.cli.codes import UNHEALTHY
from esper.config.base import ConfigError, validate
from esper.config.baseline import BaselineConfig, load_baseline_config
from esper.config.run import RunConfig
from esper.evidence.baseline import Baseline, BaselineError, read, run
from esper.evidence.baseline_report import (
    Section,
    comparison,
    markdown,
    report,
    summary_section,
    write,
)
from esper.evidence.baseline_stats import (
    Comparison,
    Outcome,
    compare,
    drift,
    health,
    quantities,
)
from esper.evidence.health import MAX_DRIFT_FRAC
from esper.evidence.measure import Measured, absent, present
from esper.evidence.records import write_json

PASSED, SUSPECTED, WORSE, INCONCLUSIVE = 0, 10, 20, 30
MEASURED = "measured.json"
# of one workload here, of many sites in `esper regress`, which speaks for both at a gate
OF_REGRESS = frozenset({"dormant_changed_bits", "output_max_abs_difference"})


def run_baseline(config: Path, out: Path, targets: Path | None, commit: str | None) -> int:
    """Measure, store, and print the report.

    Besides `baseline.json`, the folder gets `report.md` and, if the baseline is healthy,
    `measured.json`, which `esper gate --measured` and `esper rollout step` read.

    Returns:
        0, or 5 if the baseline is unhealthy.
    """
    loaded = load_baseline_config(config)
    # a wrong file of targets must not be found out after the measurement
    phases = None if targets is None else _phases(targets)
    baseline = run(loaded, out, grow=grow, commit=commit, say=lambda s: print(s, flush=True))
    sections = [*report(baseline), summary_section(baseline)]
    if phases is not None:
        sections.append(targets_section(baseline, phases))
    write(out / "report.md", sections, f"Baseline {loaded.name}")
    unhealthy = health(baseline)
    if unhealthy:
        (out / MEASURED).unlink(missing_ok=True)
    else:
        write_json(out / MEASURED, measurements(baseline))
    print(markdown(sections, f"Baseline {loaded.name}"))
    return UNHEALTHY if unhealthy else 0


def show_baseline(file: Path, report_file: Path | None, targets: Path | None) -> None:
    """Print a stored baseline; everything is computed again from its processes."""
    baseline = read(file)
    sections = [*report(baseline), summary_section(baseline)]
    if targets is not None:
        sections.append(targets_section(baseline, _phases(targets)))
    title = f"Baseline {baseline.plan.config.name}"
    if report_file is not None:
        write(report_file, sections, title)
    print(markdown(sections, title))


def compare_baselines(old: Path, new: Path, again: Path | None, report_file: Path | None) -> int:
    """Say whether a second baseline is worse than a first one.

    A metric that is WORSE once is suspected: measure the new code again and name that baseline as
    `again`. It is a regression if it is WORSE there, too.

    Returns:
        0 if no metric is worse by its margin, 10 if one is suspected, 20 if one is WORSE twice,
        30 if something is inconclusive, 5 if nothing can be concluded.
    """
    first, second = read(old), read(new)
    judged = compare(first, second)
    reasons = _unhealthy(first, second)
    sections = comparison(first, second, judged, reasons)
    flagged, open_ = _named(judged, Outcome.WORSE), _named(judged, Outcome.INCONCLUSIVE)
    code = SUSPECTED if flagged else INCONCLUSIVE if open_ else PASSED
    text = [f"Suspected: {', '.join(sorted(flagged)) or 'nothing'}."]
    if flagged and again is None:
        text.append("Measure the new code again and give --again: one strike is no regression.")
    if again is not None:
        third = read(again)
        confirmed = flagged & _named(compare(first, third), Outcome.WORSE)
        reasons += _unhealthy(first, third)
        text.append(f"WORSE twice: {', '.join(sorted(confirmed)) or 'nothing'}.")
        if flagged:
            code = WORSE if confirmed else INCONCLUSIVE if open_ else PASSED
    if reasons:
        code = UNHEALTHY
        text.append("UNHEALTHY: nothing can be concluded. " + " ".join(reasons))
    sections.append(Section("Conclusion", tuple(text)))
    title = f"Baseline {first.plan.config.name}, before and after"
    if report_file is not None:
        write(report_file, sections, title)
    print(markdown(sections, title))
    return code


def _unhealthy(old: Baseline, new: Baseline) -> list[str]:
    reasons = [*health(old), *health(new)]
    change = drift(old, new)
    if abs(change) >= MAX_DRIFT_FRAC:
        reasons.append(
            f"the reference workload changed by {change:+.1%}, less than {MAX_DRIFT_FRAC:.0%} is "
            "needed; measure both again, one right after the other."
        )
    return reasons


def _named(judged: Sequence[Comparison], outcome: Outcome) -> set[str]:
    return {
        f"{c.implementation} {e.metric}" for c in judged for e in c.effects if e.outcome is outcome
    }


def measurements(baseline: Baseline) -> Any:
    """The quantities in the form that gates and rollouts read; absent ones are left out."""
    from esper.release.judge import PhaseMeasurements
    from esper.release.phases import Quantity

    found = {
        name: Quantity(value=m.value, unit=m.unit)
        for name, m in quantities(baseline).items()
        if m.value is not None and name not in OF_REGRESS
    }
    return PhaseMeasurements(
        commit=baseline.plan.commit, ended_at=baseline.ended_at, quantities=found
    )


def _phases(path: Path) -> Any:
    from esper.release.phases import load_phases

    return load_phases(path)


def targets_section(baseline: Baseline, phases: Any) -> Section:
    """Which targets and gates of all phases are met; one that is not measured is not met."""
    from esper.release.phases import check

    known = {k: m for k, m in quantities(baseline).items() if k not in OF_REGRESS}
    quantities_now = measurements(baseline).quantities
    rows: list[tuple[str, ...]] = []
    foreign = 0
    for phase in phases.phases:
        for checked in check((*phase.targets, *phase.gates), quantities_now):
            name = checked.assertion.metric
            if name not in known:
                foreign += 1
                continue
            word = {True: "met", False: "missed", None: "not measured"}[checked.holds]
            why = known[name].why
            told = why if checked.holds is None and why else checked.why.rpartition(", ")[2]
            rows.append((f"{phase.number} {phase.name}", str(checked.assertion), word, told))
    text = [f"{foreign} other targets and gates are none of a baseline's quantities."]
    if health(baseline):
        text.append("The baseline is UNHEALTHY: nothing here counts.")
    return Section("Targets", tuple(text), ("phase", "target", "", "measured"), tuple(rows))


def grow(config: BaselineConfig) -> dict[str, Measured]:
    """Run the growing runs and say how many adaptations succeeded, and how long they took.

    An adaptation is one germinated seed. It succeeded if it was fossilised, and failed if it was
    culled, cancelled or rolled back; seeds still on their way when a run ends are counted apart.
    """
    units = {
        "adaptation_success_percent": "percent", "lifecycle_duration_steps": "steps",
        "lifecycle_duration_s": "s", "adaptations_finished": "count",
        "adaptations_unfinished": "count",
    }  # fmt: skip
    if config.lifecycle is None:
        return {k: absent(u, "the configuration asks for no growing run") for k, u in units.items()}
    import torch

    torch.set_num_threads(config.threads)
    run_config = validate(RunConfig, config.lifecycle.run, source=config.name, at="lifecycle.run")
    lives = [life for seed in range(config.lifecycle.seeds) for life in _lives(run_config, seed)]
    finished = [x for x in lives if x[0] is not None]
    good = [x for x in finished if x[0]]
    found = {
        "adaptations_finished": present(len(finished), "count"),
        "adaptations_unfinished": present(len(lives) - len(finished), "count"),
    }
    values = {
        "adaptation_success_percent": 100 * len(good) / len(finished) if finished else None,
        "lifecycle_duration_steps": median(x[1] for x in good) if good else None,
        "lifecycle_duration_s": median(x[2] for x in good) if good else None,
    }
    for name, value in values.items():
        found[name] = (
            absent(units[name], "no seed came to its end in the growing runs")
            if value is None
            else present(value, units[name])
        )
    return found


def _lives(config: RunConfig, seed: int) -> list[tuple[bool | None, float, float]]:
    """Of each germinated seed of one run: success (None: still on its way), steps, seconds."""
    from esper.environment import fingerprint
    from esper.evidence.records import Fingerprint
    from esper.trial import Trial, TrialSpec

    facts = Fingerprint(**fingerprint(config.device))
    trial = Trial(config, TrialSpec("grow", 0, seed, 0, "none", facts))
    while not trial.done:
        trial.run_for(60.0)
    record = trial.record()
    s_per_step = record.metrics["train_seconds"] / max(1.0, record.metrics["steps"])
    ends = {"FOSSILIZED": True, "CULLED": False, "CANCELLED": False, "ROLLED_BACK": False}
    begun: dict[tuple[str, int], int] = {}
    lives: list[tuple[bool | None, float, float]] = []
    for t in record.transitions:
        place = (t.site, t.seed)
        if t.action == "Germinate":
            begun[place] = t.step
        if t.after in ends and place in begun:
            steps = t.step - begun.pop(place)
            lives.append((ends[t.after], steps, steps * s_per_step))
    return lives + [(None, 0.0, 0.0)] * len(begun)


def main(arguments: Sequence[str]) -> int:
    """`run` without typer."""
    parser = argparse.ArgumentParser(prog="python -m esper.cli.baseline")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args(arguments)
    try:
        return run_baseline(args.config, args.out, args.targets, args.commit)
    except (BaselineError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
