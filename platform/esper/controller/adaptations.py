"""What became of every adaptation: the field reports that policies learn from.

An adaptation begins when a controller germinates a seed and ends when the seed passes its trial,
is culled, cancelled or rolled back. `Adaptations` watches a controller's reports and actions and
says, once for each, what was known when it began and what it was worth.
"""

import math
import uuid
from collections.abc import Set
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from esper.config.base import Config, ConfigError
from esper.config.run import Plugin, build_options
from esper.controller.base import (
    CONTROLLERS,
    Controller,
    ControllerOptions,
    GrowthEvent,
    may_grow,
    memory_of,
    remind,
    switch,
)
from esper.seeds.actions import Action, Germinate
from esper.seeds.report import Floats, Report, SiteReport
from esper.seeds.state import AWAKE_STAGES, Stage

Outcome = Literal["kept", "culled", "cancelled", "rolled_back"]
_OUTCOMES: dict[Stage, Outcome] = {
    Stage.FINE_TUNING: "kept", Stage.FOSSILIZED: "kept", Stage.CULLED: "culled",
    Stage.CANCELLED: "cancelled", Stage.ROLLED_BACK: "rolled_back",
}  # fmt: skip
_SCORES = ("grad_energy", "bottleneck")
_SEED_FEATURES = (*_SCORES, "variance", "dead_frac")
Features = dict[str, float]


class Candidate(Config):
    """A seed that might have been germinated, and what was known of it."""

    site: str = Field(min_length=1, max_length=200, description="Where it is.")
    seed: int = Field(ge=0, le=2**31 - 1, description="Which seed of the site.")
    blueprint: str = Field(min_length=1, max_length=200, description="What it would compute.")
    graft: str = Field(min_length=1, max_length=200, description="How it would be blended in.")
    features: Features = Field(max_length=64, description="What was measured; see `features_of`.")

    @field_validator("features")
    @classmethod
    def _named(cls, features: Features) -> Features:
        if any(not 1 <= len(name) <= 64 for name in features):
            raise ValueError("names of features must have 1 to 64 characters.")
        return features


class Draw(Config):
    """How a candidate was drawn from several."""

    candidates: tuple[Candidate, ...] = Field(
        min_length=1, max_length=64, description="The candidates that it was drawn from."
    )
    chosen: int = Field(ge=0, description="Index of the candidate that was germinated.")
    propensity: float = Field(gt=0, le=1, description="Probability with which it was drawn.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.chosen >= len(self.candidates):
            raise ValueError(
                f"chosen must be in 0..{len(self.candidates) - 1}, but got {self.chosen}."
            )
        return self


def draws_of(controller: Controller) -> dict[tuple[str, int], Draw]:
    """How a controller drew the germinations of its last decision; nothing if it draws none.

    One that draws its germinations by chance has them as `draws`, by site and seed.
    """
    draws: dict[tuple[str, int], Draw] = getattr(controller, "draws", {})
    return draws


class FieldReport(Config):
    """One adaptation and its outcome."""

    request_id: str = Field(
        pattern=r"^[A-Za-z0-9_.:-]{1,128}$", description="Of the adaptation; stored once."
    )
    model: str = Field(min_length=1, max_length=200, description="Name of the model or run.")
    policy: str = Field(min_length=1, max_length=200, description="Who chose it.")
    interval: int = Field(ge=1, le=2**31 - 1, description="When it began.")
    ended: int = Field(ge=1, le=2**31 - 1, description="Interval in which its outcome was known.")
    chosen: Candidate = Field(description="What was germinated.")
    draw: Draw | None = Field(None, description="Null if nothing was drawn by chance.")
    outcome: Outcome = Field(description="'kept' from the day it passed its evaluation.")
    before: float | None = Field(None, description="Held-out loss without the seed; null: unknown.")
    after: float | None = Field(None, description="Held-out loss with the seed; null: unknown.")
    gain_se: float | None = Field(None, ge=0, description="Standard error of before - after.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.ended < self.interval:
            raise ValueError(
                f"ended must be at least interval ({self.interval}), but got {self.ended}."
            )
        if (self.before is None) != (self.after is None):
            raise ValueError("before and after must be given together, or neither.")
        if self.draw is not None and self.draw.candidates[self.draw.chosen] != self.chosen:
            raise ValueError("chosen must be the candidate that was drawn, but is another.")
        return self

    @property
    def gain(self) -> float | None:
        """Held-out loss that the seed saves; None if it was not measured."""
        return None if self.before is None or self.after is None else self.before - self.after


def features_of(report: Report, site: SiteReport, seed: int, blueprint: str) -> Features:
    """What is known of a place before a seed grows there; what was not measured is left out.

    `crowd` is which of its site's awake seeds it would be, from 1.

    Args:
        report: The report of the interval.
        site: Its site.
        seed: A dormant seed of it.
        blueprint: What it would compute.
    """
    host = max(1, report.host_parameters)
    cost = site.seed_parameters[blueprint] / host
    known: dict[str, float | None] = {
        **{name: float(getattr(site, name)[seed]) for name in _SEED_FEATURES},
        "bottleneck_per_cost": float(site.bottleneck[seed]) / cost if cost else None,
        **{f"{name}_rel": _relative(getattr(site, name), seed) for name in _SCORES},
        "unexplained": float(site.unexplained),
        "is_span": float(site.geometry == "span"),
        "crowd": 1.0 + len(site.seeds_in(*AWAKE_STAGES)),
        "cost_frac": cost,
        "grown_frac": report.parameters / host - 1,
        "interval": float(report.interval),
        "loss": report.loss,
        "held_out_loss": report.held_out_loss,
        "grad_norm": report.grad_norm,
        "host_drift_frac": report.host_drift_frac,
    }
    return {k: v for k, v in known.items() if v is not None and math.isfinite(v)}


def _relative(values: Floats, seed: int) -> float | None:
    """A value over the mean of those that were measured at the site."""
    known = values[np.isfinite(values)]
    mean = float(known.mean(dtype=np.float64)) if len(known) else 0.0
    return float(values[seed]) / mean if mean > 0 else None


class Adaptations:
    """Watches one run, whatever its controller.

    Only what the reports show counts: a germination that was vetoed never began, and an
    evaluation that was vetoed is not over.

    Args:
        model: Name of the model or run.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._run = uuid.uuid4().hex[:16]
        self._interval = 0
        # adaptations under way, each with its report as far as it is known
        self._begun: list[dict[str, Any]] = []
        self._lost: list[FieldReport] = []

    def observe(
        self, report: Report, actions: list[Action], policy: str,
        draws: dict[tuple[str, int], Draw],
    ) -> list[FieldReport]:  # fmt: skip
        """Those whose outcome this interval shows.

        Args:
            report: What the controller decided on.
            actions: What it decided.
            policy: Who decided.
            draws: How germinations among the actions were drawn; those that were not are not here.
        """
        self._interval = report.interval
        found, self._lost = self._lost, []
        begun, self._begun = self._begun, []
        for adaptation in begun:
            found += self._seen(report, adaptation)
        for action in actions:
            if isinstance(action, Germinate):
                self._begin(report, action, policy, draws.get((action.site, action.seed)))
        return found

    def _begin(self, report: Report, action: Germinate, policy: str, draw: Draw | None) -> None:
        site = report.site(action.site)
        index = [s.name for s in report.sites].index(action.site)
        chosen = Candidate(
            site=action.site, seed=action.seed, blueprint=action.blueprint, graft=action.graft,
            features=features_of(report, site, action.seed, action.blueprint),
        )  # fmt: skip
        if draw is not None:
            chosen = draw.candidates[draw.chosen]
        self._begun.append({
            "request_id": f"{self._run}.{report.interval}.{index}.{action.seed}",
            "model": self._model, "policy": policy, "interval": report.interval,
            "chosen": chosen.model_dump(mode="json"),
            "draw": None if draw is None else draw.model_dump(mode="json"),
        })  # fmt: skip

    def _seen(self, report: Report, adaptation: dict[str, Any]) -> list[FieldReport]:
        """The end of an adaptation, if this is it."""
        seed = adaptation["chosen"]["seed"]
        site = next((s for s in report.sites if s.name == adaptation["chosen"]["site"]), None)
        stage = Stage.DORMANT if site is None else Stage(int(site.stage[seed]))
        if outcome := _OUTCOMES.get(stage):
            return [FieldReport(**adaptation, ended=report.interval, outcome=outcome)]
        if site is None or stage is Stage.DORMANT:
            # it was vetoed
            return []
        gain, se, after = float(site.gain[seed]), float(site.gain_se[seed]), report.held_out_loss
        if stage is Stage.EVALUATING and after is not None and math.isfinite(gain):
            adaptation |= {"before": after + gain, "after": after}
            adaptation |= {"gain_se": se} if math.isfinite(se) else {}
        self._begun.append(adaptation)
        return []

    def state_dict(self) -> dict[str, Any]:
        """Adaptations under way, as JSON."""
        return {"run": self._run, "begun": [dict(a) for a in self._begun]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned.

        Where the run goes back, what began since then is rolled back, and is reported next time.
        """
        then = {a["request_id"] for a in state["begun"]}
        if state["run"] == self._run:
            self._lost += [
                FieldReport(**a, ended=self._interval, outcome="rolled_back")
                for a in self._begun
                if a["request_id"] not in then
            ]
        self._run, self._begun = state["run"], [dict(a) for a in state["begun"]]


class ReportedController:
    """Another controller, whose adaptations are stored.

    Args:
        options: Which, and where.
        controller: The other one.

    Raises:
        ConfigError: If the database cannot be used.
    """

    def __init__(self, options: "ReportedOptions", controller: Controller) -> None:
        from esper.controller.field_reports import FieldReports

        self._controller, self._policy = controller, options.policy or options.of.name
        self._adaptations = Adaptations(options.model)
        self._store = FieldReports(options.to)

    def decide(self, report: Report) -> list[Action]:
        """What the other one decides."""
        actions = self._controller.decide(report)
        ended = self._adaptations.observe(
            report, actions, self._policy, draws_of(self._controller)
        )  # fmt: skip
        self._store.append(ended)
        return actions

    def may_grow(self, interval: int) -> bool:
        """Whether the other one may germinate then."""
        return may_grow(self._controller, interval)

    def switch(self, on: Set[str]) -> Set[str]:
        """Tell the other one which flags are on."""
        return switch(self._controller, on)

    def state_dict(self) -> dict[str, Any]:
        """What both remember."""
        return {
            "controller": memory_of(self._controller),
            "adaptations": self._adaptations.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        remind(self._controller, state["controller"])
        self._adaptations.load_state_dict(state["adaptations"])


@CONTROLLERS.register("reported")
class ReportedOptions(ControllerOptions):
    """A controller, and where its field reports go."""

    of: Plugin = Field(description="The controller.")
    to: str = Field(description="SQLAlchemy URL, such as sqlite:///field_reports.db.")
    model: str = Field(min_length=1, max_length=200, description="Name of the model or run.")
    policy: str | None = Field(
        None, description="Name that its field reports bear; None: the controller's."
    )

    @field_validator("of")
    @classmethod
    def _known(cls, plugin: Plugin) -> Plugin:
        try:
            build_options(CONTROLLERS, plugin, "of")
        except ConfigError as error:
            raise ValueError("; ".join(error.problems)) from None
        return plugin

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """The controller with its recorder.

        Raises:
            ConfigError: If the database cannot be used.
        """
        options = build_options(CONTROLLERS, self.of, "controller.options.of")
        return ReportedController(self, options.build(seed, events))
