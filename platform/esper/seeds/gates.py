"""Gates G0 to G5: whether a seed is ready for its next stage, and if not, why.

Pure functions of a report. The controller asks them, and the shield enforces them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
from numpy.typing import NDArray

from esper.seeds.report import Report, SiteReport
from esper.seeds.state import RESTING_STAGES, Stage


class MissingMeasurementError(ValueError):
    """A gate needs a value that nobody measured."""


@dataclass(frozen=True)
class Gate:
    """The answer of one gate.

    Attributes:
        name: 'G0' to 'G5'; 'time' for the wait in FINE_TUNING, which no gate guards.
        passed: Whether the seed may go on.
        reason: One sentence with the values that decided.
    """

    name: str
    passed: bool
    reason: str


def resources(report: Report, site: SiteReport, blueprint: str) -> Gate:
    """G0: budgets of parameters and operations, and number of seeds awake at once."""
    growth = report.growth
    if growth.max_active_seeds is not None and report.active_seeds >= growth.max_active_seeds:
        return Gate("G0", False, f"{report.active_seeds} seeds are awake, the limit is reached")
    cost = site.seed_parameters[blueprint]
    total = report.parameters + cost
    if growth.max_parameters is not None and total > growth.max_parameters:
        return Gate("G0", False, f"{total} parameters would pass {growth.max_parameters}")
    affordable = report.affordable_parameters
    if affordable is not None and total > affordable:
        reason = f"{total} parameters would pass {affordable}, all that the operations allow"
        return Gate("G0", False, reason)
    return Gate("G0", True, f"{cost} parameters more make {total}")


def slot_free(report: Report, site: SiteReport, seed: int) -> Gate:
    """G1: the slot is dormant, or its embargo is over."""
    state = site.state(seed)
    if state.stage in RESTING_STAGES:
        needed = report.growth.embargo_intervals
        return Gate("G1", state.epochs >= needed, f"embargo {state.epochs} of {needed} intervals")
    free = state.stage is Stage.DORMANT
    return Gate("G1", free, f"the slot is {state.stage.name}")


def isolated_objective(report: Report, site: SiteReport, seed: int) -> Gate:
    """G2: trained long enough, and explains enough of its isolated target, if it has one."""
    growth, epochs = report.growth, int(site.epochs[seed])
    if not growth.training_intervals:
        return Gate("G2", True, "it learns on the task from its first step")
    if epochs < growth.training_intervals:
        return Gate("G2", False, f"trained {epochs} of {growth.training_intervals} intervals")
    explained = measured(site.explained_frac[seed], "explained_frac", site, seed)
    passed = explained >= growth.min_explained_frac
    return Gate("G2", passed, f"explains {explained:.3f}, needs {growth.min_explained_frac:.3f}")


def ramp_complete(report: Report, site: SiteReport, seed: int) -> Gate:
    """G3: alpha has arrived at 1."""
    alpha = float(site.alpha[seed])
    return Gate("G3", alpha >= 1.0, f"alpha is {alpha:.3f}")


def host_stable(report: Report, site: SiteReport, seed: int) -> Gate:
    """G4: stood still long enough, and the training loss did not rise since the graft began."""
    growth, epochs = report.growth, int(site.epochs[seed])
    if epochs < growth.stabilization_intervals:
        return Gate("G4", False, f"stood {epochs} of {growth.stabilization_intervals} intervals")
    if report.loss is None:
        raise MissingMeasurementError(
            "loss must be measured for gate G4, but got None; give it to `lattice.report(loss)`."
        )
    before = measured(site.graft_loss[seed], "graft_loss", site, seed)
    limit = before + growth.max_instability_frac * abs(before)
    return Gate("G4", report.loss <= limit, f"loss {report.loss:.4g}, limit {limit:.4g}")


def held_out_gain(report: Report, site: SiteReport, seed: int) -> Gate:
    """G5: the held-out loss is lower with the seed than without it, by the threshold at least.

    `growth.gain_tolerance_se` gives it the benefit of the doubt, or demands proof.
    """
    needed, tolerance = report.growth.min_gain, report.growth.gain_tolerance_se
    if needed is None:
        return Gate("G5", True, "no gain is asked for")
    gain = measured(site.gain[seed], "gain", site, seed)
    if tolerance:
        needed -= tolerance * measured(site.gain_se[seed], "gain_se", site, seed)
    return Gate("G5", gain >= needed, f"held-out gain {gain:.4g}, needs {needed:.4g}")


def fine_tuned(report: Report, site: SiteReport, seed: int) -> Gate:
    """The seed was fine-tuned for the configured time."""
    epochs, needed = int(site.epochs[seed]), report.growth.fine_tuning_intervals
    return Gate("time", epochs >= needed, f"fine-tuned {epochs} of {needed} intervals")


# a stage is its number, so that a number finds it
_BY_STAGE: dict[int, Callable[[Report, SiteReport, int], Gate]] = {
    Stage.TRAINING: isolated_objective,
    Stage.GRAFTING: ramp_complete,
    Stage.STABILIZATION: host_stable,
    Stage.EVALUATING: held_out_gain,
    Stage.FINE_TUNING: fine_tuned,
    **dict.fromkeys(RESTING_STAGES, slot_free),
}


def next_gate(report: Report, site: SiteReport, seed: int) -> Gate:
    """The gate between a seed and its next stage on the main path.

    Raises:
        KeyError: If the stage has no `Advance` (DORMANT, GERMINATED, FOSSILIZED).
        MissingMeasurementError: If the gate's value was not measured.
    """
    return _BY_STAGE[site.stage.item(seed)](report, site, seed)


def measured_all(
    name: str, site: SiteReport, seeds: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float64]:
    """The values that some seeds have in one array of a report.

    Raises:
        MissingMeasurementError: If one of them was not measured.
    """
    values: NDArray[np.float64] = getattr(site, name)[seeds].astype(np.float64)
    for at in np.flatnonzero(np.isnan(values))[:1]:
        measured(values[at], name, site, int(seeds[at]))
    return values


def measured(value: float, name: str, site: SiteReport, seed: int) -> float:
    """A value of a report.

    Raises:
        MissingMeasurementError: If it was not measured.
    """
    if isnan(value):
        stage = site.state(seed).stage.name
        raise MissingMeasurementError(
            f"{name} must be measured for seed {seed} of '{site.name}' ({stage}), but is not; "
            "run training steps with a gradient in this interval, and give `evaluate` to "
            "`lattice.report(...)`."
        )
    return float(value)
