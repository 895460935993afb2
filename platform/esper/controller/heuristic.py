"""Tamiyo, the heuristic: grow on a plateau, where the gradient asks for it most.

It waits for a plateau of the training loss, or for a unit that promises enough, then wakes the
dormant seeds with the highest score, a few at a time, and lets each wave recover before the
next. The gates decide about every seed's further life.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from esper.controller.base import (
    CONTROLLERS,
    Controller,
    GrowingOptions,
    GrowthEvent,
    germinate,
    shepherd,
)
from esper.seeds.actions import Action, Germinate
from esper.seeds.gates import MissingMeasurementError, measured, measured_all, resources
from esper.seeds.lifecycle import MOVES
from esper.seeds.report import Report, SiteReport
from esper.seeds.state import AWAKE_STAGES, PIPELINE_STAGES, Stage


class HeuristicController:
    """Plateau, score, wave; see the module."""

    def __init__(self, options: "TamiyoOptions") -> None:
        self._options = options
        self._best: float | None = None
        self._stale = 0
        # held-out gain of the wave under way with its variance, and waves that did not pay
        self._gain: tuple[float, float] | None = None
        self._unpaid = 0
        # whether the actions of the last decision left seeds of a wave on their way
        self._under_way = False

    def decide(self, report: Report) -> list[Action]:
        """Shepherds the awake seeds, and germinates a wave on a plateau.

        Raises:
            MissingMeasurementError: If the report holds no training loss or no gradient.
        """
        actions: list[Action] = shepherd(report)
        # asked as before the interval: what was not reckoned with then was not measured
        ready = not report.growth.measured_samples or self.may_grow(report.interval)
        plateau = self._plateau(report)
        self._judge_wave(report)
        may = ready and self._open(report.interval) and not self._busy(report)
        if may and (plateau if self._options.trigger == "plateau" else self._gains(report)):
            wave = self._wave(report)
            self._stale = 0 if wave else self._stale
            actions += wave
        self._under_way = _leaves_under_way(report, actions)
        return actions

    def may_grow(self, interval: int) -> bool:
        """Until the last interval, or until waves do not pay any more.

        Not while a wave is under way, nor where even an interval without improvement would be no
        plateau yet.
        """
        o = self._options
        soon = o.trigger != "plateau" or self._stale + 1 >= o.patience_intervals
        return soon and not self._under_way and self._open(interval)

    def _open(self, interval: int) -> bool:
        in_time = self._options.last_interval is None or interval <= self._options.last_interval
        return in_time and self._unpaid < self._options.max_unpaid_waves

    def state_dict(self) -> dict[str, Any]:
        """The best loss, since when it has not been beaten, and what the waves were worth."""
        gain = None if self._gain is None else list(self._gain)
        return {
            "best": self._best, "stale": self._stale, "gain": gain, "unpaid": self._unpaid,
            "under_way": self._under_way,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        self._best, self._stale, self._unpaid = state["best"], state["stale"], state["unpaid"]
        self._gain = None if state["gain"] is None else tuple(state["gain"])
        self._under_way = state["under_way"]

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

    def _gains(self, report: Report) -> bool:
        """Whether one more unit somewhere would explain enough of what the loss wants there."""
        shares = [
            measured_all("bottleneck", site, seeds).max() / site.unexplained
            for site in report.sites
            if resources(report, site, self._blueprint(site)).passed and site.unexplained
            if (seeds := site.seeds_in(Stage.DORMANT)[: 1 if site.geometry == "span" else None])
        ]
        return max(shares, default=0.0) >= self._options.min_predicted_frac

    def _judge_wave(self, report: Report) -> None:
        """The stopping rule: whether the wave that is through was worth what it cost.

        The gains of a wave's seeds, each measured when it is evaluated, are added up, and so are
        their variances. A wave whose sum is not clearly above 0 did not pay.
        """
        needed = self._options.min_wave_gain_se
        if needed is None:
            return
        for site in report.sites:
            for seed in site.seeds_in(Stage.EVALUATING):
                gain, se = (
                    measured(getattr(site, name)[seed], name, site, seed)
                    for name in ("gain", "gain_se")
                )
                total, variance = self._gain or (0.0, 0.0)
                self._gain = total + gain, variance + se * se
        if self._gain is not None and not self._busy(report):
            total, variance = self._gain
            self._unpaid = 0 if total > needed * variance**0.5 else self._unpaid + 1
            self._gain = None

    def _busy(self, report: Report) -> bool:
        """A wave recovers before the next: only fine-tuning and finished seeds may be awake."""
        return any(site.seeds_in(*PIPELINE_STAGES) for site in report.sites)

    def _wave(self, report: Report) -> list[Action]:
        o = self._options
        fitting = [s for s in report.sites if self._blueprint(s) in s.seed_parameters]
        if report.sites and not fitting:
            raise ValueError(
                f"blueprint must fit a site of the lattice, but '{o.blueprint}' fits none of "
                f"{', '.join(s.name for s in report.sites)}; choose another."
            )
        affordable = [s for s in fitting if resources(report, s, self._blueprint(s)).passed]
        # all seeds of a span score the same, so the lowest come first and stay compact
        ranked = sorted(
            (-score, site.name, seed, self._blueprint(site))
            for site in affordable
            for score, seed in self._promising(site, o.seeds_per_wave)
        )
        return [
            action
            for score, name, seed, blueprint in ranked[: o.seeds_per_wave]
            for action in germinate(
                report,
                Germinate(name, seed, blueprint, o.graft, f"{o.trigger}; {o.score} {-score:.3g}"),
            )
        ]

    def _blueprint(self, site: SiteReport) -> str:
        """What a seed of the site would be."""
        promising = site.scored_blueprint if self._options.blueprint_by_score else None
        return self._options.blueprint if promising is None else promising

    def _promising(self, site: SiteReport, count: int) -> list[tuple[float, int]]:
        """The dormant seeds of a site whose places promise most, each after what it promises.

        The score, or the bottleneck for each parameter of the seed, less where more seeds of the
        site are awake; of equals the lowest.
        """
        relative = self._options.score == "relative_bottleneck"
        name = "bottleneck" if relative else self._options.score
        seeds = np.array(site.seeds_in(Stage.DORMANT), dtype=np.int64)
        scores = getattr(site, name)[seeds].astype(np.float64)
        if len(missing := seeds[np.isnan(scores)]):
            raise MissingMeasurementError(
                f"{name} must be measured for seed {missing[0]} of '{site.name}', but is not; "
                + _HOW_TO_MEASURE[name]
            )
        if relative:
            scores *= measured_all("variance", site, seeds)
        if name == "bottleneck":
            scores /= site.seed_parameters[self._blueprint(site)]
        if len(seeds) > count:
            # a million scores need not be sorted for a wave
            enough = scores >= np.partition(scores, -count)[-count]
            seeds, scores = seeds[enough], scores[enough]
        best = np.argsort(-scores, kind="stable")[:count]
        crowd = len(site.seeds_in(*AWAKE_STAGES)) + np.arange(1, len(best) + 1)
        promises = scores[best] / crowd**self._options.crowding
        return list(zip(promises.tolist(), seeds[best].tolist(), strict=True))


def _leaves_under_way(report: Report, actions: Sequence[Action]) -> bool:
    """Whether seeds of a wave are on their way after the actions, so that none can begin next."""
    stages = {
        (site.name, seed): Stage(int(site.stage[seed]))
        for site in report.sites
        for seed in site.seeds_in(*PIPELINE_STAGES)
    }
    for action in actions:
        place = action.site, action.seed
        before = stages.get(place, Stage(int(report.site(action.site).stage[action.seed])))
        stages[place] = MOVES[before, type(action)]
    return any(stage in PIPELINE_STAGES for stage in stages.values())


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
    score: Literal["grad_energy", "bottleneck", "relative_bottleneck"] = Field(
        "grad_energy", description="What a place is chosen by. The last is the bottleneck times "
        "the variance of the site's output, for sites whose outputs differ in scale: what a "
        "change in proportion to the output is worth.",
    )  # fmt: skip
    crowding: float = Field(
        0.0, ge=0, description="How far seeds spread over sites: the score of the k-th seed awake "
        "at a site counts for its k-th part to this power. 0: the score alone, which gathers "
        "units of rank one at few maps; for adapting a frozen model 2 was better.",
    )  # fmt: skip
    blueprint_by_score: bool = Field(
        False, description="Whether each site grows what promises most there for each parameter, "
        "of growth.scored_blueprint, in place of `blueprint`; needs a score by the bottleneck.",
    )  # fmt: skip
    trigger: Literal["plateau", "predicted_gain"] = Field(
        "plateau",
        description="When a wave begins: on a plateau of the training loss, or whenever one more "
        "unit would explain enough of what the loss wants (needs growth.measured_samples).",
    )
    min_predicted_frac: float = Field(
        0.05, gt=0, lt=1, description="Share of the wanted change, beyond what the host can make, "
        "that the best new unit must explain for the second trigger. Of n rows, the best of 64 "
        "units explains about 8 / n by chance.",
    )  # fmt: skip
    seeds_per_wave: PositiveInt = Field(2, description="Seeds that are woken together.")
    min_wave_gain_se: float | None = Field(
        None,
        description="Stopping rule: standard errors by which the held-out gain of a wave must "
        "exceed 0, or it did not pay; None: no rule.",
    )
    max_unpaid_waves: PositiveInt = Field(
        1, description="Waves in a row that may not pay; after them growth stops for good."
    )
    last_interval: PositiveInt | None = Field(
        None, description="No germination after this interval; None: until the end."
    )

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.blueprint_by_score and self.score == "grad_energy":
            raise ValueError(
                "score must be 'bottleneck' or 'relative_bottleneck' for blueprint_by_score, but "
                "got 'grad_energy', which tells nothing of what is to be grown."
            )
        return self

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A heuristic controller."""
        return HeuristicController(self)
