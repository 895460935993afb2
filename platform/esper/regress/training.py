"""What must be equivalent: whole trainings, legacy against new, legacy twice as its own control."""

import math

from esper.config.run import Execution
from esper.evidence.paired import ALPHA_EQUIVALENCE, equivalence_p
from esper.evidence.similarity import compare_curves
from esper.regress.exact import GEOMETRIES, grafted, tiny_run, trial
from esper.regress.finding import Finding, capped
from esper.trial import Trial

# of the test accuracy on 200 samples
MARGIN = 0.02
# the training loss beyond which two curves have parted, in nats
PARTED = 1e-4


def equivalence(pairs: int) -> Finding:
    """Two one-sided tests of the test accuracy over pairs of random seeds; geometries take turns.

    Tamiyo decides in both arms, so decisions may part where rounding tips a threshold; how often
    they did is reported, and the accuracy must be equivalent all the same.

    Args:
        pairs: At least 5, or no data could show equivalence.
    """
    problems, notes, differences = list[str](), list[str](), list[float]()
    parted = 0
    for seed in range(pairs):
        new, old, again = _trained("kernels", seed), _trained("loop", seed), _trained("loop", seed)
        if not grafted(new):
            problems.append(f"seed {seed}: no seed was ever grafted, so nothing was compared")
        differences.append(_accuracy(new) - _accuracy(old))
        parted += _log(new) != _log(old)
        if not _same(again, old):
            problems.append(f"seed {seed}: legacy run twice differs from itself")
        losses = [run.curves["train_loss"] for run in (new, old, again)]
        where = compare_curves(*losses, tolerance=PARTED)
        if where.treatment_step is not None:
            notes.append(f"seed {seed}: losses part at interval {where.treatment_step + 1}")
    if not all(map(math.isfinite, differences)):
        problems.append(f"a run collapsed: {differences}")
    else:
        p = equivalence_p(differences, MARGIN)
        notes.append(
            f"mean difference of accuracy {sum(differences) / pairs:+.2g} over {pairs} pairs, p "
            f"{p:.2g} for equivalence within {MARGIN}; decisions parted in {parted}"
        )
        if not p <= ALPHA_EQUIVALENCE:
            problems.append(f"not equivalent within {MARGIN}: p {p:.2g}, {differences}")
    return Finding(capped(problems), pairs, notes=tuple(notes))


def _trained(execution: Execution, seed: int) -> Trial:
    run = trial(tiny_run(GEOMETRIES[seed % 2], execution=execution), seed)
    run.run_for(math.inf)
    return run


def _accuracy(run: Trial) -> float:
    return run.record().metrics["test_accuracy"]


def _log(run: Trial) -> list[tuple[int, str, int, str]]:
    return [
        (t.interval, t.action.site, t.action.seed, t.after.stage.name)
        for t in run.trainer.lattice.log
    ]


def _same(run: Trial, other: Trial) -> bool:
    """Whether two curves agree bit for bit; time does not count, and NaN is like NaN."""
    return _log(run) == _log(other) and all(
        repr(values) == repr(other.curves[name])
        for name, values in run.curves.items()
        if name != "train_seconds"
    )
