"""`esper ab verify`, `similarity` and `plan`: what stored sweeps tell; nothing is started."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esper.cli.output import write_result
from esper.config.base import ConfigError
from esper.config.sweep import load_sweep

if TYPE_CHECKING:
    from esper.evidence.records import Registration, TrialRecord
    from esper.evidence.verdict import Verdict
    from esper.evidence.verify import Verification

PLAN_LEGEND = """\
WIN: chance at that effect. equivalent: chance of EQUIVALENT if there is no difference. Both from
  {repetitions:,} simulated sweeps with normal differences, the sign-flip test and the whole rule.
finds: smallest effect that WIN finds at this power. It and the needed pairs above come from
  Student's t in closed form, with guardrails that are independent of one another.
early, after: how often an e-process that may be looked at after every pair finds the effect, and
  the mean number of pairs until it stops; simulated, and without the guardrails."""


def verify_ab(
    name: str,
    config: Path | None,
    runs: Path,
    json_file: Path | None,
    measured: Path | None = None,
) -> int:
    """Print whether a stored sweep's verdicts follow from its records, and what differs.

    Returns:
        The exit code.

    Raises:
        ConfigError: If `measured` is asked for and the sweep is not verified or not healthy.
    """
    from esper.evidence.verify import find_sweep, verify

    folder = find_sweep(name, runs)
    result = verify(folder, load_sweep(config) if config else None)
    question = result.registration.registration_hash if result.registration else None
    print(f"{folder}: {len(result.records)} records, registration {question}")
    for verdict in result.verdicts:
        print(f"  {verdict.verdict}  {verdict.treatment} against {verdict.control}")
    for finding in result.findings:
        print(f"  differs: {finding}")
    if not result.sealed:
        print("  no checksums are stored: an edit that changes no verdict would go unseen")
    print("NOT VERIFIED" if result.findings else "verified: every verdict is the same, bit for bit")
    if json_file is not None:
        content = {
            "folder": str(folder), "registration_hash": question,
            "verified": not result.findings, "sealed": result.sealed,
            "records": len(result.records), "findings": list(result.findings),
            "verdicts": [v.model_dump(mode="json") for v in result.verdicts],
        }  # fmt: skip
        write_result(json_file, content)
    if measured is not None:
        _write_wins(measured, name, *_sound(name, result, "a measurement"))
    return 1 if result.findings else 0


def _write_wins(
    path: Path,
    name: str,
    records: "Sequence[TrialRecord]",
    registration: "Registration",
    verdicts: "Sequence[Verdict]",
) -> None:
    """How often an arm won over another and lost to it, as gates read it."""
    from esper.evidence.records import write_json
    from esper.release.judge import PhaseMeasurements
    from esper.release.phases import Quantity

    counts: dict[str, float] = {}
    for v in verdicts:
        if v.verdict == "UNHEALTHY":
            raise ConfigError(name, (
                f"'{v.treatment}' against '{v.control}' must be healthy to be counted.", *v.reasons,
            ))  # fmt: skip
        for word, does in (("wins_over", "WIN"), ("losses_to", "LOSE")):
            key = f"{v.treatment}_{word}_{v.control}".replace("-", "_")
            counts[key] = counts.get(key, 0) + (v.verdict == does)
    last = max(r.ended_at for r in records)
    quantities = {k: Quantity(value=n, unit="count") for k, n in counts.items()}
    commit = registration.fingerprint.commit
    write_json(path, PhaseMeasurements(commit=commit, ended_at=last, quantities=quantities))
    print(f"measured: {path}: " + ", ".join(f"{k} = {n:g}" for k, n in sorted(counts.items())))


def similarity_ab(name: str, noise: str | None, runs: Path, json_file: Path | None) -> None:
    """Print how alike the networks of the compared arms are.

    Raises:
        ConfigError: If the sweep is not verified, or its records do not tell.
    """
    from esper.evidence.arm_similarity import compare_arms
    from esper.evidence.similarity import told
    from esper.evidence.verify import find_sweep, verify

    records, registration, _ = _sound(name, verify(find_sweep(name, runs)), "a comparison")
    found = []
    for comparison in registration.question.comparisons:
        sides = comparison.treatment, comparison.control
        if noise in sides:
            continue
        try:
            alike = compare_arms(records, *sides, noise)
        except ValueError as error:
            raise ConfigError(name, (str(error),)) from None
        found.append(alike)
        print(f"{alike.treatment} against {alike.control}, {alike.pairs} pairs"
              f"{f', {alike.left_out} left out' if alike.left_out else ''}")  # fmt: skip
        print(f"  outputs: {told(alike.outputs)}")
        print(f"  training losses first differ at interval: {_places(alike.parted)}")
        if alike.noise_outputs is not None and alike.noise_parted is not None:
            print(f"{alike.noise} against {alike.control}: the control's own noise")
            print(f"  outputs: {told(alike.noise_outputs)}")
            print(f"  training losses first differ at interval: {_places(alike.noise_parted)}")
            print(f"within the control's own noise: {'yes' if alike.within_noise else 'no'}")
        else:
            print("the control's own noise is not known; run it twice and name the arm: --noise")
    if json_file is not None:
        content = [
            {**alike._asdict(), "outputs": vars(alike.outputs),
             "noise_outputs": alike.noise_outputs and vars(alike.noise_outputs)}
            for alike in found
        ]  # fmt: skip
        write_result(json_file, {
            "registration_hash": registration.registration_hash,
            "commit": registration.fingerprint.commit, "comparisons": content,
        })  # fmt: skip


def _places(intervals: "Sequence[int | None]") -> str:
    known = sorted(i for i in intervals if i is not None)
    if not known:
        return f"nowhere in {len(intervals)} pairs"
    return f"{known[0]} to {known[-1]} in {len(known)} of {len(intervals)} pairs"


def plan_ab(
    effect: float | None,
    sd: float | None,
    margin: float | None,
    power: float,
    from_folder: str | None,
    runs: Path,
    json_file: Path | None,
) -> None:
    """Print how many pairs a question needs, and what numbers of pairs can see.

    Raises:
        ConfigError: If too little is given, a number is out of range, or the pilot is unsound.
    """
    from esper.evidence.planning import (
        MAX_COLLAPSED_FRAC,
        REPETITIONS,
        Assumed,
        collapsed_runs,
        outlook,
        pairs_to_equivalence,
        pairs_to_win,
        pilot,
    )

    if not 0 < power < 1:
        raise ConfigError("--power", (f"it must be between 0 and 1, but got {power}.",))
    goal, guardrails = None, list[Assumed]()
    collapsed, compared = 0, 0
    if from_folder is not None:
        from esper.evidence.verify import find_sweep, verify

        ran = verify(find_sweep(from_folder, runs))
        records, registration, _ = _sound(from_folder, ran, "a pilot")
        goal, guardrails = pilot(records, registration)
        collapsed, compared = collapsed_runs(records, registration)
    elif effect is None or sd is None:
        raise ConfigError("the plan", ("give --effect and --sd, or --from a pilot's folder.",))
    mean, spread, room = (
        given if given is not None else known
        for given, known in zip(
            (effect, sd, margin),
            (goal.mean, goal.sd, goal.margin) if goal else (None, None, None),
            strict=True,
        )
    )
    assert mean is not None
    assert spread is not None
    for option, value in (("--effect", mean), ("--sd", spread), ("--margin", room)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(option, (f"it must be a number above 0, but got {value:g}.",))
    goal = Assumed(mean, spread, room, goal.name if goal else "metric")
    win, same = pairs_to_win(goal, guardrails, power), None
    print(f"{goal.name}: effect {mean:g} in pairs with an SD of {spread:g} ({goal.dz():.2f} SD)")
    for g in guardrails:
        print(f"guardrail {g.name}: mean {g.mean:+.4g}, SD {g.sd:.4g}, margin {g.margin:.4g}")
    test = "wilcoxon" if collapsed > MAX_COLLAPSED_FRAC * compared else "sign_flip"
    if compared:
        print(
            f"{collapsed} of the pilot's {compared} runs collapsed; above {MAX_COLLAPSED_FRAC:.0%} "
            f"ranks decide: register `question.test: {test}`"
        )
    print(f"WIN needs {_pairs(win)} at power {power:g}")
    if room is not None:
        same = pairs_to_equivalence(Assumed(0.0, spread, room), power)
        print(f"EQUIVALENT within {room:g} needs {_pairs(same)} if there is no difference")
    rows = outlook(goal, guardrails, power=power)
    head = ["pairs", "WIN", "equivalent", "finds", "early", "after"]
    print("  ".join(f"{name:>10}" for name in head))
    for row in rows:
        cells = [
            str(row.pairs), f"{row.win:.1%}",
            "-" if row.equivalent is None else f"{row.equivalent:.1%}",
            "-" if row.smallest_effect is None else f"{row.smallest_effect:.4g}",
            f"{row.early_win:.1%}", f"{row.early_pairs:.1f}",
        ]  # fmt: skip
        print("  ".join(f"{cell:>10}" for cell in cells))
    print(PLAN_LEGEND.format(repetitions=REPETITIONS))
    if json_file is not None:
        content = {
            "goal": vars(goal), "guardrails": [vars(g) for g in guardrails], "power": power,
            "pairs_to_win": win, "pairs_to_equivalence": same, "pilot_runs": compared,
            "pilot_collapsed": collapsed, "test": test if compared else None,
            "outlook": [vars(r) for r in rows],
        }  # fmt: skip
        write_result(json_file, content)


def _pairs(number: int | None) -> str:
    return "more than 1,000 pairs" if number is None else f"{number} pairs"


def _sound(
    name: str, result: "Verification", what: str
) -> "tuple[Sequence[TrialRecord], Registration, Sequence[Verdict]]":
    """A stored sweep whose verdicts are verified and whose primary one is healthy."""
    if result.findings or result.registration is None:
        raise ConfigError(name, (
            f"{what} must be verified; see what differs with: esper ab verify {name}",
        ))  # fmt: skip
    if result.verdicts[0].verdict == "UNHEALTHY":
        raise ConfigError(name, (f"{what} must be healthy.", *result.verdicts[0].reasons))
    return result.records, result.registration, result.verdicts
