"""Tamiyo, the heuristic: grow on a plateau, where the gradient asks for it most.

It waits for a plateau of the training loss, then wakes the dormant seeds with the highest
gradient energy, a few at a time, and lets each wave recover before the next. The gates decide
about every seed's further life.
"""

from typing import Any, Literal

from pydantic import Field, PositiveInt

from esper.controller.base import (
    CONTROLLERS,
    Controller,
    GrowingOptions,
    GrowthEvent,
    shepherd,
)
from esper.seeds.actions import Action, Germinate
from esper.seeds.gates import MissingMeasurementError, resources
from esper.seeds.report import Report, SiteReport
from esper.seeds.state import PIPELINE_STAGES, Stage


class HeuristicController:
    """Plateau, score, wave; see the module."""

    def __init__(self, options: "TamiyoOptions") -> None:
        self._options = options
        self._best: float | None = None
        self._stale = 0

    def decide(self, report: Report) -> list[Action]:
        """Shepherds the awake seeds, and germinates a wave on a plateau.

        Raises:
            MissingMeasurementError: If the report holds no training loss or no gradient.
        """
        actions: list[Action] = shepherd(report)
        if self._plateau(report) and not self._busy(report) and self._in_time(report):
            wave = self._wave(report)
            self._stale = 0 if wave else self._stale
            actions += wave
        return actions

    def state_dict(self) -> dict[str, Any]:
        """The best loss, and for how many intervals it has not been beaten."""
        return {"best": self._best, "stale": self._stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        self._best, self._stale = state["best"], state["stale"]

    def _plateau(self, report: Report) -> bool:
        if report.loss is None:
            raise MissingMeasurementError(
                "loss must be measured for the plateau rule, but got None; "
                "give it to `lattice.report(loss)`."
            )
        frac = self._options.min_improvement_frac
        if self._best is None or report.loss < self._best - frac * abs(self._best):
            self._best, self._stale = report.loss, 0
        else:
            self._stale += 1
        return self._stale >= self._options.patience_intervals

    def _busy(self, report: Report) -> bool:
        """A wave recovers before the next: only fine-tuning and finished seeds may be awake."""
        return any(site.seeds_in(*PIPELINE_STAGES) for site in report.sites)

    def _in_time(self, report: Report) -> bool:
        last = self._options.last_interval
        return last is None or report.interval <= last

    def _wave(self, report: Report) -> list[Action]:
        o = self._options
        fitting = [s for s in report.sites if o.blueprint in s.seed_parameters]
        if report.sites and not fitting:
            raise ValueError(
                f"blueprint must fit a site of the lattice, but '{o.blueprint}' fits none of "
                f"{', '.join(s.name for s in report.sites)}; choose another."
            )
        affordable = [s for s in fitting if resources(report, s, o.blueprint).passed]
        # all seeds of a span score the same, so the lowest come first and stay compact
        ranked = sorted(
            (-self._score(site, seed), site.name, seed)
            for site in affordable
            for seed in site.seeds_in(Stage.DORMANT)
        )
        return [
            Germinate(name, seed, o.blueprint, o.graft, f"plateau; {o.score} {-score:.3g}")
            for score, name, seed in ranked[: o.seeds_per_wave]
        ]

    def _score(self, site: SiteReport, seed: int) -> float:
        """What a seed's place promises; the bottleneck for each parameter of the seed."""
        name = self._options.score
        score = float(getattr(site, name)[seed])
        if score != score:
            raise MissingMeasurementError(
                f"{name} must be measured for seed {seed} of '{site.name}', but is not; "
                + _HOW_TO_MEASURE[name]
            )
        cost = site.seed_parameters[self._options.blueprint]
        return score / cost if name == "bottleneck" else score


_HOW_TO_MEASURE = {
    "grad_energy": "run training steps with a gradient through the site before the report.",
    "bottleneck": "set growth.measured_samples, or give `measure` to `lattice.report(...)`.",
}


@CONTROLLERS.register("tamiyo")
class TamiyoOptions(GrowingOptions):
    """When a plateau is a plateau, and what a wave is."""

    patience_intervals: PositiveInt = Field(2, description="Intervals without improvement.")
    min_improvement_frac: float = Field(
        0.02, ge=0, lt=1, description="Relative fall of the loss that counts as improvement."
    )
    score: Literal["grad_energy", "bottleneck"] = Field(
        "grad_energy", description="What a place is chosen by."
    )
    seeds_per_wave: PositiveInt = 2
    last_interval: PositiveInt | None = Field(
        None, description="No germination after this interval; None: until the end."
    )

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A heuristic controller."""
        return HeuristicController(self)
