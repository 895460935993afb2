"""Configuration of a search over growth policies, and of the test that its result must pass."""

import json
import math
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from esper.config.base import Config, ConfigError, content_hash, validate
from esper.config.kinds import read_kind
from esper.config.run import RunConfig
from esper.config.sweep import Question, Resources, SweepConfig, TrackingConfig, merge

# what may change in the middle of a run, at the end of an interval
CHANGEABLE = ("train.learning_rate", "growth.", "controller.options.")
DEFAULT, TUNED = "default", "tuned"


class Domain(Config):
    """The values that a setting may take: one of these four."""

    choice: tuple[Any, ...] | None = Field(None, min_length=2, description="One of some values.")
    uniform: tuple[float, float] | None = Field(None, description="A number between two.")
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None, description="A positive number between two, evenly by its logarithm."
    )
    integer: tuple[int, int] | None = Field(
        None, description="A whole number between two, both included."
    )

    @model_validator(mode="after")
    def _one(self) -> "Domain":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"a setting must have one of {', '.join(type(self).model_fields)}, "
                f"but got {', '.join(given) or 'none'}."
            )
        if self.choice is None and not self.ends[0] < self.ends[1]:
            raise ValueError(f"a range must rise, but got {list(self.ends)}; exchange the two.")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be valid for all to be: both ends, or all choices."""
        ends = self.choice or self.uniform or self.loguniform or self.integer
        assert ends is not None
        return ends


class Asha(Config):
    """Asynchronous successive halving (Li et al., MLSys 2020): the worse ones stop early."""

    grace_steps: PositiveInt = Field(description="Steps that every candidate gets.")
    reduction_factor: float = Field(3.0, gt=1, description="One in so many goes on.")


class Pbt(Config):
    """Population based training (Jaderberg et al., 2017): the worst go on as the best, changed."""

    every_steps: PositiveInt = Field(description="Steps between two such exchanges.")
    quantile_frac: float = Field(
        0.25, gt=0, le=0.5, description="Share that is exchanged, and for which other share."
    )


class Confirm(Config):
    """The paired test of what was found against `run` as it is, on seeds that no search saw."""

    pairs: int = Field(16, ge=2, le=64, description="Pairs of random seeds of the test.")
    first_seed: NonNegativeInt = Field(
        0, description="Random seed of the first pair; none of the search's."
    )
    metric: str = Field(description="A final metric, such as test_accuracy.")
    higher_is_better: bool = Field(True, description="Whether more of the metric is better.")
    margin: float = Field(gt=0, description="Equivalence margin, in units of the metric.")


class TuneConfig(Config):
    """`esper tune CONFIG`: a base run, what may change in it, and how the best is looked for."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        description="Of the search; begins the name of its folder.",
    )
    run: dict[str, Any] = Field(description="The keys of a run; every candidate starts from them.")
    space: dict[str, Domain] = Field(min_length=1, description="By dotted key of the run.")
    metric: str = Field(
        "held_out_loss", pattern=r"^held_out_", description="What the search sees, every report."
    )
    higher_is_better: bool = Field(False, description="Whether more of the metric is better.")
    search: Literal["random", "optuna"] = Field(
        "random", description="optuna: by its tree-structured Parzen estimator."
    )
    asha: Asha | None = Field(None, description="None: every candidate runs to its end.")
    pbt: Pbt | None = Field(None, description="None: no candidate takes over another's network.")
    budget_runs: PositiveInt = Field(
        description="Training steps that all candidates may take together, in whole runs. Pbt: the "
        "size of the population."
    )
    report_steps: PositiveInt | None = Field(
        None, description="Steps between two reports to the scheduler; None: one interval."
    )
    seed: NonNegativeInt = Field(1000, description="Of the search, and of every candidate's run.")
    confirm: Confirm = Field(description="How the best candidate is tested on fresh seeds.")
    resources: Resources = Field(
        Resources(), description="What each candidate gets of the machine or cluster."
    )
    mlflow: TrackingConfig = Field(
        TrackingConfig(), description="Where MLflow keeps the candidates."
    )
    output_dir: Path = Field(Path("runs"), description="Folder of candidates and of the test.")

    @model_validator(mode="after")
    def _fresh_seeds(self) -> "TuneConfig":
        first, last = self.confirm.first_seed, self.confirm.first_seed + self.confirm.pairs - 1
        if first <= self.seed <= last:
            raise ValueError(
                f"seed must not be one of the seeds {first} to {last} of confirm, but got "
                f"{self.seed}; what was found would be tested on what it was chosen by."
            )
        return self

    @model_validator(mode="after")
    def _population(self) -> "TuneConfig":
        if self.pbt is None:
            return self
        if self.asha is not None:
            raise ValueError("asha and pbt must not be given both; drop one.")
        if self.search != "random" or self.budget_runs < 4:
            raise ValueError(
                "pbt must begin with a random population of at least 4 runs, but got "
                f"search {self.search} and budget_runs {self.budget_runs}; change them."
            )
        for key in self.space:
            if not key.startswith(CHANGEABLE):
                raise ValueError(
                    f"space must, with pbt, hold keys alone that can change in the "
                    f"middle of a run ({', '.join(CHANGEABLE)}...), but got '{key}'; drop it, or "
                    "use asha."
                )
        return self

    def overrides(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by dotted key as the nested keys of a run."""
        nested = {} if not values else reduce(merge, (_nest(k, v) for k, v in values.items()))
        return dict(nested)

    def candidate(self, values: Mapping[str, Any]) -> RunConfig:
        """The run with some values in place of its own.

        Raises:
            ConfigError: If that is no valid run.
        """
        keys = merge(self.run, self.overrides(values))
        said = ", ".join(f"{k}={v}" for k, v in values.items()) or "as it is"
        return validate(RunConfig, keys, source=f"run with {said}", at="run")

    def confirmation(self, values: Mapping[str, Any]) -> SweepConfig:
        """The sweep that tests some values against the run as it is.

        Raises:
            ConfigError: If they make no valid sweep.
        """
        confirm = self.confirm
        keys = {
            "name": f"{self.name}-confirm",
            "run": self.run,
            "arms": {DEFAULT: {}, TUNED: self.overrides(values)},
            "pairs": confirm.pairs,
            "first_seed": confirm.first_seed,
            "question": Question(
                treatment=TUNED, control=DEFAULT, metric=confirm.metric,
                higher_is_better=confirm.higher_is_better, margin=confirm.margin,
            ),
            "resources": self.resources,
            "mlflow": self.mlflow,
            "output_dir": self.output_dir,
        }  # fmt: skip
        return validate(SweepConfig, keys, source="the test of the best candidate", at="confirm")

    @property
    def every_steps(self) -> int:
        """Steps between two reports."""
        return self.report_steps or self.candidate({}).train.interval_steps

    @property
    def budget_steps(self) -> int:
        """Steps that all candidates may take together."""
        return self.budget_runs * self.candidate({}).train.steps

    @property
    def config_hash(self) -> str:
        """sha256 of everything that decides the result."""
        return content_hash(
            self.model_dump(mode="json", exclude={"mlflow", "output_dir", "resources", "confirm"})
        )


def _nest(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nest(rest, value) if rest else value}


def load_tune(path: Path) -> TuneConfig:
    """Read a search, and check both ends of every range in it.

    Raises:
        ConfigError: With every problem of the file.
    """
    tune = validate(TuneConfig, read_kind(path, "tune"), source=str(path))
    problems: list[str] = []
    base = None
    for values in ({}, *({k: end} for k, domain in tune.space.items() for end in domain.ends)):
        try:
            run = tune.candidate(values)
            base = base or run
            if run.train.steps != base.train.steps:
                raise ConfigError(str(path), (
                    "space must leave train.steps alone: candidates share a budget of steps.",
                ))  # fmt: skip
        except ConfigError as error:
            problems += [p for p in error.problems if p not in problems]
    if base is not None:
        problems += _whole(tune, base)
        try:
            tune.confirmation({})  # before the search: it would be a pity after it
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(str(path), tuple(problems))
    return tune


def _whole(tune: TuneConfig, base: RunConfig) -> list[str]:
    """What is no whole number of reports."""
    every, interval = tune.every_steps, base.train.interval_steps
    steps = {"run.train.steps": base.train.steps}
    if tune.asha is not None:
        steps["asha.grace_steps"] = tune.asha.grace_steps
    if tune.pbt is not None:
        steps["pbt.every_steps"] = tune.pbt.every_steps
    problems = [
        f"{key} must be a multiple of the {every} steps of a report, but got {value}."
        for key, value in steps.items()
        if value % every
    ]
    if every % interval:
        problems.append(
            f"report_steps must be a multiple of train.interval_steps ({interval}), "
            f"but got {every}."
        )
    if any(key.endswith("interval_steps") for key in tune.space):
        problems.append("space must leave train.interval_steps alone: reports hang on it.")
    return problems


def shown(values: Mapping[str, Any]) -> str:
    """Values by key on one line."""
    return ", ".join(f"{k}={_short(v)}" for k, v in values.items())


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
