"""Tamiyo, learned: where and what to grow by the gain that earlier adaptations had.

When a wave begins is left to the heuristic. Which seeds it wakes is a contextual bandit: a Bayesian
linear model predicts what share of the held-out loss each parameter of a seed with its blueprint
will save, and one that may well be the best is drawn as often as the model thinks it is (Thompson
sampling), mixed with a little chance for all. A seed that is not likely enough to gain anything is
never woken. The probability of every choice goes into its field report, so that other policies can
be judged by it.

Without a model every candidate is as likely as any other: that is how reports for the first model
are gathered.
"""

import json
import math
import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator
from scipy.special import ndtr

from esper.config.base import Config, ConfigError, validate
from esper.controller.adaptations import Candidate, Draw, features_of
from esper.controller.base import (
    CONTROLLERS,
    Controller,
    GrowthEvent,
    germinate,
    registered,
)
from esper.controller.heuristic import HeuristicController, TamiyoOptions
from esper.registry import Registry
from esper.seeds.actions import Action, Germinate
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.gates import resources
from esper.seeds.grafting import GRAFTS
from esper.seeds.report import Report

Doubles = NDArray[np.float64]
FLAG = "tamiyo.learned"
MAX_CANDIDATES = 64
# posterior samples by which the chance to be the best is counted
_SAMPLES = 256
# features that span orders of magnitude
_LOGARITHMIC = {
    "grad_energy", "bottleneck", "variance", "cost_frac", "loss", "held_out_loss", "grad_norm",
    "host_drift_frac", "grad_energy_rel", "bottleneck_rel", "interval", "unexplained", "crowd",
    "bottleneck_per_cost",
}  # fmt: skip
_LEAST = 1e-12


class Encoding(Config):
    """What a model knows of a candidate, as numbers.

    Each feature as it is or its logarithm, less its mean and divided by its scale (one that was
    not measured counts as its mean), then one 0 or 1 for each kind of candidate, blueprint and
    graft strategy. A candidate of a kind that is not here has zeros.
    """

    features: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    kinds: tuple[str, ...] = Field(description="Of candidates; see `kind_of`.")
    blueprints: tuple[str, ...]
    grafts: tuple[str, ...]

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        for key in ("means", "scales"):
            if len(getattr(self, key)) != len(self.features):
                raise ValueError(f"{key} must have {len(self.features)} items, as features has.")
        return self

    @property
    def size(self) -> int:
        """How many numbers a candidate is."""
        return sum(map(len, (self.features, self.kinds, self.blueprints, self.grafts)))

    def encode(self, candidates: Sequence[Candidate]) -> Doubles:
        """The numbers, shape `[candidates, size]`."""
        numbers = [
            [
                (transformed(name, c.features[name]) - mean) / scale if name in c.features else 0.0
                for name, mean, scale in zip(self.features, self.means, self.scales, strict=True)
            ]
            + [float(kind == k) for k in self.kinds]
            + [float(c.blueprint == b) for b in self.blueprints]
            + [float(c.graft == g) for g in self.grafts]
            for c, kind in ((c, kind_of(c)) for c in candidates)
        ]
        return np.array(numbers, np.float64).reshape(len(candidates), self.size)


class PolicyModel(Config):
    """A Bayesian linear model of the gain for each parameter.

    A gain is the share of the held-out loss that a wave of seeds saves, over the share of the
    host's parameters that it costs, in units of the root mean square of all gains of that model.
    """

    format: Literal[2] = 2
    encoding: Encoding
    intercept: float
    weights: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...] = Field(description="Of the weights.")
    noise_sd: float = Field(gt=0, description="What no input explains of a gain.")
    reports: PositiveInt = Field(description="Field reports that it was fitted to.")
    waves: PositiveInt = Field(description="Waves that these reports are of.")
    models: tuple[str, ...] = Field(description="Names of the models that they are about.")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        size = self.encoding.size
        rows = [len(row) for row in self.covariance]
        if len(self.weights) != size or rows != [size] * size:
            raise ValueError(
                f"weights must have {size} items and covariance {size} rows of {size}, as the "
                f"encoding has, but got {len(self.weights)} and {rows}."
            )
        return self

    def predict(self, candidates: Sequence[Candidate]) -> tuple[Doubles, Doubles]:
        """Mean and standard deviation of the mean gain of each, shape `[candidates]`."""
        x = self.encoding.encode(candidates)
        mean = self.intercept + x @ np.array(self.weights)
        variance = np.einsum("ci,ij,cj->c", x, np.array(self.covariance), x)
        return mean, np.sqrt(np.maximum(variance, 0.0))

    def chances(self, candidates: Sequence[Candidate], seed: int) -> Doubles:
        """Probability of each to be the best, counted over samples of the weights.

        Args:
            candidates: At least one.
            seed: Seed of the samples.
        """
        rng = np.random.default_rng(seed)
        weights = rng.multivariate_normal(
            self.weights, np.array(self.covariance), _SAMPLES, method="eigh"
        )
        worth = weights @ self.encoding.encode(candidates).T
        # candidates that the model cannot tell apart are as likely as each other
        ties = rng.random(worth.shape) * 1e-9
        best = np.argmax(worth + ties, axis=1)
        return np.bincount(best, minlength=len(candidates)) / _SAMPLES


def kind_of(candidate: Candidate) -> str:
    """What is grown where, with `*` for numbers: layers of a kind are alike in many models.

    `fc*: glu` is a chunk seed on the output of such a layer, `fc*->fc*: mlp_relu` a unit between
    two, and `on fc*: low_rank` a unit beside one.
    """
    first, _, last = candidate.site.partition("->")
    place = f"on {first}" if first == last else candidate.site
    return f"{re.sub('[0-9]+', '*', place)}: {candidate.blueprint}"


def transformed(name: str, value: float) -> float:
    """A feature as the model takes it."""
    return math.log(max(value, _LEAST)) if name in _LOGARITHMIC else value


def read_model(source: str) -> PolicyModel:
    """A model from a file, or from MLflow's registry by a `models:/` URI.

    Raises:
        ConfigError: If it cannot be read.
    """
    path = Path(source).expanduser()
    if source.startswith("models:/"):
        import mlflow

        try:
            path = Path(mlflow.artifacts.download_artifacts(source)) / MODEL_FILE
        except mlflow.exceptions.MlflowException as error:
            raise ConfigError("model", (
                f"model must be in the registry at {mlflow.get_tracking_uri()}, but '{source}' "
                f"cannot be read: {error}; set MLFLOW_TRACKING_URI, or name a file.",
            )) from None  # fmt: skip
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model", (
            f"model must be a file of `esper policy train`, but '{source}' cannot be read: "
            f"{error}.",
        )) from None  # fmt: skip
    return validate(PolicyModel, content, source=source)


MODEL_FILE = "policy.json"


class LearnedController(HeuristicController):
    """Waves as the heuristic's, of seeds that the model draws.

    Attributes:
        draws: How each germination of the last decision was drawn, by site and seed.
    """

    def __init__(self, options: "LearnedOptions", model: PolicyModel | None, seed: int) -> None:
        super().__init__(options)
        self._learned, self._model, self._seed = options, model, seed
        self._off = False
        self.draws: dict[tuple[str, int], Draw] = {}

    def decide(self, report: Report) -> list[Action]:
        """Shepherds the awake seeds, and germinates a wave on a plateau.

        Raises:
            MissingMeasurementError: If the report holds no training loss or no gradient.
        """
        self.draws = {}
        return super().decide(report)

    def switch(self, on: Set[str]) -> Set[str]:
        """Draw, or choose as the heuristic does, as the flag says."""
        self._off = FLAG not in on
        return {FLAG}

    def _wave(self, report: Report) -> list[Action]:
        if self._off:
            return super()._wave(report)
        actions = list[Action]()
        rng = np.random.default_rng([self._seed, report.interval])
        for _ in range(self._learned.seeds_per_wave):
            draw = self._draw(report, rng)
            if draw is None:
                break
            chosen = draw.candidates[draw.chosen]
            wave = germinate(report, Germinate(
                chosen.site, chosen.seed, chosen.blueprint, chosen.graft,
                f"{self._learned.trigger}; drawn with probability {draw.propensity:.3f}",
            ))  # fmt: skip
            self.draws[chosen.site, chosen.seed] = draw
            for action in wave:
                report = report.after(action)
            actions += wave
        return actions

    def _draw(self, report: Report, rng: np.random.Generator) -> Draw | None:
        """One of the candidates, by chance; None if none may be worth its cost."""
        candidates = self._candidates(report)
        if self._model is not None and candidates:
            mean, sd = self._model.predict(candidates)
            likely = ndtr(mean / np.maximum(sd, _LEAST)) >= self._learned.min_chance_to_gain
            candidates = [c for c, may in zip(candidates, likely, strict=True) if may]
        if not candidates:
            return None
        if len(candidates) > MAX_CANDIDATES:
            kept = rng.permutation(len(candidates))[:MAX_CANDIDATES]
            if self._model is not None:
                kept = np.argsort(-self._model.predict(candidates)[0])[:MAX_CANDIDATES]
            candidates = [candidates[i] for i in sorted(kept.tolist())]
        chances = np.full(len(candidates), 1 / len(candidates))
        if self._model is not None:
            best = self._model.chances(candidates, int(rng.integers(2**31)))
            explore = self._learned.explore_frac
            chances = explore * chances + (1 - explore) * best
        chosen = int(rng.choice(len(candidates), p=chances / chances.sum()))
        return Draw(
            candidates=tuple(candidates), chosen=chosen,
            propensity=min(1.0, float(chances[chosen])),
        )  # fmt: skip

    def _candidates(self, report: Report) -> list[Candidate]:
        """The most promising dormant seeds of every site, with every blueprint that fits."""
        o = self._learned
        found = list[Candidate]()
        for site in report.sites:
            # no place is scored where nothing is affordable any more
            affordable = [
                b for b in o.blueprints
                if b in site.seed_parameters and resources(report, site, b).passed
            ]  # fmt: skip
            count = 1 if site.geometry == "span" else o.places
            found += [
                Candidate.model_construct(
                    site=site.name, seed=seed, blueprint=blueprint, graft=graft,
                    features=features_of(report, site, seed, blueprint),
                )
                for _, seed in (self._promising(site, count) if affordable else ())
                for blueprint in affordable
                for graft in o.grafts
            ]  # fmt: skip
        return found


@CONTROLLERS.register("learned")
class LearnedOptions(TamiyoOptions):
    """A model, and how freely it is followed. `blueprint` and `graft` are the heuristic's."""

    model: str | None = Field(
        None, description="File, or models:/NAME/VERSION of MLflow's registry; None: every "
        "candidate is as likely as any other.",
    )  # fmt: skip
    blueprints: tuple[str, ...] = Field(
        ("low_rank", "mlp_relu", "mlp_gelu", "glu"), min_length=1,
        description="What may be germinated, where it fits.",
    )  # fmt: skip
    grafts: tuple[str, ...] = Field(
        ("linear",), min_length=1, description="Graft strategies to choose among."
    )
    places: PositiveInt = Field(
        2, description="Seeds of a chunk site that are candidates, the most promising first."
    )
    explore_frac: float = Field(
        0.1, ge=0, le=1, description="Share of the choices that are anybody's."
    )
    min_chance_to_gain: float = Field(
        0.05, ge=0, le=1, description="Least probability, by the model, that a seed gains."
    )

    @field_validator("blueprints", "grafts")
    @classmethod
    def _all_registered(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        registry: Registry[Any] = BLUEPRINTS if info.field_name == "blueprints" else GRAFTS
        return tuple(registered(name, registry) for name in names)

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A learned controller.

        Raises:
            ConfigError: If the model cannot be read.
        """
        model = None if self.model is None else read_model(self.model)
        return LearnedController(self, model, seed)
