"""What a lattice tells its controller once an interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from esper.config.run import GrowthConfig
from esper.seeds.actions import Action
from esper.seeds.blueprints import BLUEPRINTS, Geometry
from esper.seeds.lifecycle import advance
from esper.seeds.state import AWAKE_STAGES, SeedState, Stage

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Frozen = TypeVar("Frozen", "SiteReport", "Report")
# by value; quicker than the enumeration, and decisions look at every awake seed several times
_STAGES = tuple(Stage)


@dataclass(frozen=True, eq=False)
class SiteReport:
    """Telemetry of one site; every array has one value per seed, shape `[S]`.

    A value that was not measured is NaN, and whoever needs it must refuse it.

    Attributes:
        name: Name of the site.
        geometry: 'chunk' or 'span'.
        stage: Stages.
        blueprint_id: Indices into the blueprint registry.
        epochs: Intervals in the stage.
        graft_id: Indices into the registry of graft strategies.
        alpha: Blend weights in [0, 1].
        progress: Progress of the graft in [0, 1].
        grad_energy: Mean squared gradient of the loss at the seed's channels, times the batch's
            rows squared (so that it does not depend on the batch size).
        bottleneck: Expressivity bottleneck: mean over the samples of the squared change of the
            site's output that the loss wants, the host's own weights cannot make, and a new
            seed with matched units could; of dormant seeds, if the interval was measured.
        silent_frac: Share of an awake seed's hidden units that are 0 for every sample, if the
            interval was measured; a seed with 1 is dead, and no gradient will ever wake it.
        variance: Variance of the seed's channels.
        dead_frac: Share of the seed's activations with |x| < 1e-6.
        explained_frac: Share of the isolated target that the seed explains; at most 1.
        graft_loss: Training loss when the seed's grafting began.
        grad_ratio: Root mean square gradient of the seed's parameters at the last step, over that
            of the host's at the site's modules; of seeds that learn on the task, where both have
            one. A new seed far below 1 starves, far above 1 it drowns the host.
        gain: Held-out loss without the seed minus with it, in units of the loss.
        gain_se: Standard error of `gain`; NaN if the evaluation gave one number only.
        seed_parameters: Parameters of one seed by blueprint, for those that fit the site.
        unexplained: Mean over the samples of the squared change of the site's output that the loss
            wants and the host's own weights cannot make: what a bottleneck is a part of. NaN if
            the interval was not measured.
        scored_blueprint: Whose units the bottleneck is of: of `growth.scored_blueprint` the one
            that promises most for each parameter. None if the interval was not measured.
    """

    name: str
    geometry: Geometry
    stage: Ints
    blueprint_id: Ints
    epochs: Ints
    graft_id: Ints
    alpha: Floats
    progress: Floats
    grad_energy: Floats
    bottleneck: Floats
    silent_frac: Floats
    variance: Floats
    dead_frac: Floats
    explained_frac: Floats
    graft_loss: Floats
    grad_ratio: Floats
    gain: Floats
    gain_se: Floats
    seed_parameters: Mapping[str, int]
    unexplained: float
    scored_blueprint: str | None = None

    def state(self, seed: int) -> SeedState:
        """The state of one seed."""
        return SeedState(
            _STAGES[self.stage.item(seed)],
            self.blueprint_id.item(seed),
            self.epochs.item(seed),
            self.graft_id.item(seed),
        )

    def seeds_in(self, *stages: Stage) -> list[int]:
        """Indices of the seeds in any of the stages, ascending."""
        wanted = np.zeros(len(Stage), bool)
        wanted[list(stages)] = True
        found: list[int] = np.flatnonzero(wanted[self.stage]).tolist()
        return found


@dataclass(frozen=True, eq=False)
class Report:
    """Everything a controller decides on.

    Attributes:
        interval: Intervals finished, from 1.
        step: Optimizer steps done.
        loss: Mean training loss of the interval; None if the loop did not give it.
        held_out_loss: Held-out loss with all grafted seeds; None if not evaluated.
        grad_norm: Norm of the host's gradient at the last step; None if no gradient was left.
        host_drift_frac: Relative change of the host's weights over the interval; None at first.
        host_parameters: Parameters of the host.
        parameters: Parameters of the host and of all awake seeds.
        growth: Times, thresholds and limits in force.
        sites: One entry a site.
        affordable_parameters: Host and awake seeds together that a budget of operations has room
            for; None: there is no such budget.
    """

    interval: int
    step: int
    loss: float | None
    held_out_loss: float | None
    grad_norm: float | None
    host_drift_frac: float | None
    host_parameters: int
    parameters: int
    growth: GrowthConfig
    sites: tuple[SiteReport, ...]
    affordable_parameters: int | None = None

    def site(self, name: str) -> SiteReport:
        """The site of that name.

        Raises:
            KeyError: If there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(
            f"site must be one of {', '.join(s.name for s in self.sites)}, but got '{name}'."
        )

    @property
    def active_seeds(self) -> int:
        """Seeds that are awake, over all sites."""
        awake = list(AWAKE_STAGES)
        return sum(int(np.count_nonzero(np.isin(site.stage, awake))) for site in self.sites)

    def after(self, action: Action) -> "Report":
        """This report as if the action had been applied: stages and parameters, no measurement.

        Raises:
            KeyError: If there is no such site.
            IllegalTransitionError: If the seed's stage does not allow the action.
        """
        site, at = self.site(action.site), action.seed
        before = site.state(at)
        state = advance(before, action)
        woken = (state.stage in AWAKE_STAGES) - (before.stage in AWAKE_STAGES)
        kind = (state if woken > 0 else before).blueprint_id
        cost = woken and woken * site.seed_parameters[BLUEPRINTS.name_at(kind)]
        changed = _changed(
            site,
            stage=_with(site.stage, at, state.stage),
            blueprint_id=_with(site.blueprint_id, at, state.blueprint_id),
            epochs=_with(site.epochs, at, state.epochs),
            graft_id=_with(site.graft_id, at, state.graft_id),
        )
        sites = tuple(changed if s is site else s for s in self.sites)
        return _changed(self, sites=sites, parameters=self.parameters + cost)


def _changed(frozen: Frozen, **changes: Any) -> Frozen:
    """`dataclasses.replace` without a call of the constructor: ten times as fast."""
    copy = object.__new__(type(frozen))
    copy.__dict__.update(frozen.__dict__, **changes)
    return copy


def _with(values: Ints, at: int, value: int) -> Ints:
    changed = values.copy()
    changed[at] = value
    return changed
