"""Configuration of a sweep: paired arms, the question asked of them, and where results go."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from esper.config.base import Config, ConfigError, content_hash, validate
from esper.config.defaults import TRACKING_URI
from esper.config.kinds import read_kind
from esper.config.run import RunConfig
from esper.config.shards import ShardsConfig


def _is_none(value: object) -> bool:
    # what is not set leaves the hashes of questions alone that were asked before it could be
    return value is None


class Guardrail(Config):
    """A metric that the treatment must not worsen; non-inferiority at one-sided 0.05."""

    metric: str = Field(description="A final metric of every trial.")
    margin: float = Field(ge=0, description="Greatest tolerated worsening.")
    relative: bool = Field(
        False, description="True: the margin is a share of the control's mean, not in units."
    )
    higher_is_better: bool = Field(False, description="Whether more of the metric is better.")


class Comparison(Config):
    """Treatment against control."""

    treatment: str = Field(description="The arm that is judged.")
    control: str = Field(description="The arm that it is compared with.")


class Secondary(Comparison):
    """A further comparison, of the question's metric or of one of its own."""

    metric: str | None = Field(
        None, exclude_if=_is_none, description="None: that of the question, and so the next two."
    )
    higher_is_better: bool | None = Field(
        None, exclude_if=_is_none, description="Whether more of its metric is better."
    )
    margin: PositiveFloat | None = Field(
        None, exclude_if=_is_none, description="Equivalence margin, in units of its metric."
    )

    @model_validator(mode="after")
    def _whole(self) -> "Secondary":
        given = [v is not None for v in (self.metric, self.higher_is_better, self.margin)]
        if any(given) and not all(given):
            raise ValueError(
                "metric, higher_is_better and margin must come together, but one is missing; "
                "a margin means something for one metric alone."
            )
        return self


class Question(Comparison):
    """What the sweep is to decide; its hash is registered before the first trial."""

    metric: str = Field(description="A final metric of every trial.")
    higher_is_better: bool = Field(True, description="Whether more of the metric is better.")
    margin: PositiveFloat = Field(description="Equivalence margin, in units of the metric.")
    test: Literal["sign_flip", "wilcoxon", "e_process"] = Field(
        "sign_flip",
        description="e_process: judged after every pair, and the sweep ends when it is decided.",
    )
    guardrails: tuple[Guardrail, ...] = Field(
        (), description="Metrics that the treatment must not worsen, or a WIN is none."
    )
    secondary: tuple[Secondary, ...] = Field(
        (), description="Further comparisons, Holm-corrected as a family."
    )
    looks: tuple[PositiveInt, ...] = Field(
        (),
        exclude_if=lambda looks: not looks,
        description="Numbers of pairs after which the primary comparison is judged, and the sweep "
        "ends if it is decided; the last one is all pairs. Empty: judged once, at the end.",
    )

    @property
    def goal(self) -> Guardrail:
        """The question's own metric with its margin."""
        return Guardrail(
            metric=self.metric, margin=self.margin, higher_is_better=self.higher_is_better
        )

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The primary comparison first, then the secondary ones."""
        return (Comparison(treatment=self.treatment, control=self.control), *self.secondary)

    def goal_of(self, comparison: Comparison) -> Guardrail:
        """The metric that a comparison is about, with its margin."""
        if not isinstance(comparison, Secondary) or comparison.metric is None:
            return self.goal
        return Guardrail(
            metric=comparison.metric,
            margin=comparison.margin,
            higher_is_better=comparison.higher_is_better,
        )

    def asks(self, comparison: Comparison) -> bool:
        """Whether the comparison is among those that were registered."""
        return self._key(comparison) in [self._key(c) for c in self.comparisons]

    def is_primary(self, comparison: Comparison) -> bool:
        """Whether the comparison is the one that the question is about."""
        return self._key(comparison) == self._key(self)

    def _key(self, comparison: Comparison) -> tuple[str, str, str]:
        return comparison.treatment, comparison.control, self.goal_of(comparison).metric

    @model_validator(mode="after")
    def _rising(self) -> "Question":
        if self.looks and self.test == "e_process":
            raise ValueError(
                "looks must be empty with test e_process, which looks after every pair, but got "
                f"{list(self.looks)}; drop them, or use sign_flip."
            )
        if any(b <= a for a, b in pairwise(self.looks)) or len(self.looks) == 1:
            raise ValueError(
                f"looks must be two or more rising numbers of pairs, but got {list(self.looks)}; "
                "for instance [12, 20, 30]."
            )
        return self

    @model_validator(mode="after")
    def _no_repetition(self) -> "Question":
        keys = [self._key(c) for c in self.comparisons]
        if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise ValueError(
                "secondary comparisons must be new ones, but '{}' against '{}' on '{}' is asked "
                "for twice; drop one.".format(*repeated[0])
            )
        return self


class Search(Config):
    """An arm that nobody runs: successive halving over other arms, from their records.

    Its result is the winner's, and it costs what the halving would have cost.
    """

    over: tuple[str, ...] = Field(min_length=2, description="Arms that are the candidates.")
    metric: str = Field("held_out_loss", description="The curve by which candidates are kept.")
    higher_is_better: bool = Field(False, description="Whether more of the metric is better.")
    eta: int = Field(2, ge=2, description="One in so many candidates goes on.")


class Resources(Config):
    """What Ray gives to each trial."""

    cpus_per_trial: PositiveFloat = Field(
        1.0, description="CPUs of a trial; decides how many run at once."
    )
    gpus_per_trial: float = Field(
        0.0, ge=0, description="GPUs of a trial; a fraction lets several trials share one."
    )
    shards: PositiveInt = Field(
        1,
        description="Actors that train one trial together and share its CPUs and GPUs equally.",
    )
    num_cpus: PositiveInt | None = Field(None, description="None: all CPUs of this machine.")
    checkpoint_s: PositiveFloat = Field(
        30.0, description="Seconds of a trial that the loss of its worker or driver may cost."
    )

    @model_validator(mode="after")
    def _one_gpu_a_shard(self) -> "Resources":
        if self.gpus_per_trial > self.shards:
            raise ValueError(
                f"gpus_per_trial must be at most 1 for each of {self.shards} shards, which compute "
                f"on one device each, but got {self.gpus_per_trial:g}; set shards."
            )
        return self

    @property
    def shards_config(self) -> ShardsConfig | None:
        """Of the actors of one trial; None: it is trained where it is driven."""
        if self.shards == 1:
            return None
        return ShardsConfig(
            count=self.shards,
            cpus_per_shard=self.cpus_per_trial / self.shards,
            gpus_per_shard=self.gpus_per_trial / self.shards,
        )


class TrackingConfig(Config):
    """Where MLflow keeps the runs."""

    tracking_uri: str = Field(
        TRACKING_URI, description="MLflow's tracking URI: a database or a server."
    )
    experiment: str = Field("esper", description="Name of the experiment in MLflow.")


class SweepConfig(Config):
    """`esper ab CONFIG`: one base run, arms that differ from it, and the question."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Of the sweep; begins the name of its folder."
    )
    run: dict[str, Any] = Field(description="The keys of a run; every arm starts from them.")
    arms: dict[str, dict[str, Any]] = Field(min_length=2, description="Overrides of each arm.")
    searches: dict[str, Search] = Field({}, description="Further arms: searches over these arms.")
    pairs: int = Field(16, ge=2, le=64, description="Pairs of random seeds, each run once per arm.")
    first_seed: NonNegativeInt = Field(
        0, description="Random seed of the first pair; the others follow."
    )
    question: Question = Field(description="What is to be decided.")
    resources: Resources = Field(
        Resources(), description="What each trial gets of the machine or cluster."
    )
    mlflow: TrackingConfig = Field(TrackingConfig(), description="Where MLflow keeps the runs.")
    output_dir: Path = Field(
        Path("runs"), description="Folder of records, checkpoints and verdicts."
    )

    @model_validator(mode="after")
    def _names_exist(self) -> "SweepConfig":
        for comparison in self.question.comparisons:
            if comparison.treatment == comparison.control:
                raise ValueError(
                    f"treatment must be another arm than control, but got '{comparison.control}' "
                    "for both; an A/A comparison needs two arms that are configured alike."
                )
        for side in {s for c in self.question.comparisons for s in (c.treatment, c.control)}:
            if side not in self.all_arms:
                raise ValueError(
                    f"question must compare arms of this sweep ({', '.join(self.all_arms)}), "
                    f"but got '{side}'; correct the name."
                )
        keeping = [arm for arm in self.arms if self._merged(arm).get("kept_outputs")]
        if self.resources.shards > 1 and keeping:
            raise ValueError(
                "kept_outputs must be 0 with resources.shards above 1, whose network lives in "
                f"other processes, but arm '{keeping[0]}' sets it; use one shard."
            )
        if self.question.looks and self.question.looks[-1] != self.pairs:
            raise ValueError(
                f"question.looks must end with all {self.pairs} pairs, but got "
                f"{list(self.question.looks)}; change pairs or the last look."
            )
        for name, search in self.searches.items():
            if name in self.arms:
                raise ValueError(f"searches must have names of their own, but '{name}' is an arm.")
            if unknown := [arm for arm in search.over if arm not in self.arms]:
                raise ValueError(
                    f"searches.{name}.over must name arms ({', '.join(self.arms)}), "
                    f"but got '{unknown[0]}'."
                )
        return self

    @property
    def all_arms(self) -> tuple[str, ...]:
        """The arms that are run, then those that are computed from them."""
        return (*self.arms, *self.searches)

    def run_config(self, arm: str) -> RunConfig:
        """The configuration of one arm: the base run with the arm's overrides merged in.

        Raises:
            ConfigError: If the merged keys are not a valid run.
        """
        config = validate(RunConfig, self._merged(arm), source=f"arm '{arm}'", at=f"arms.{arm}")
        if config.follow is not None and (
            config.follow == arm
            or config.follow not in self.arms
            or self._merged(config.follow).get("follow") is not None
        ):
            raise ConfigError(
                f"arm '{arm}'",
                (
                    f"arms.{arm}.follow must name another arm that follows none, "
                    f"but got '{config.follow}'.",
                ),
            )
        return config

    def _merged(self, arm: str) -> dict[str, Any]:
        return merge(self.run, self.arms[arm])

    @property
    def dependent_arms(self) -> frozenset[str]:
        """Arms that cannot come in random order: they follow another one, or are computed."""
        return frozenset(a for a in self.arms if self._merged(a).get("follow")) | {*self.searches}

    @property
    def salted_arms(self) -> frozenset[str]:
        """Arms that add a salt to the pair's seed."""
        return frozenset(a for a in self.arms if self._merged(a).get("seed_salt"))

    @property
    def content(self) -> dict[str, Any]:
        """Everything that decides the result; not where it is stored."""
        return self.model_dump(mode="json", exclude={"mlflow", "output_dir", "resources"})

    @property
    def config_hash(self) -> str:
        """sha256 of `content`."""
        return content_hash(self.content)


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else is replaced.

    A plug-in with a new name starts with no options: another's mean nothing to it.
    """
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            renamed = "name" in value and value["name"] != old.get("name")
            merged[key] = value if renamed else merge(old, value)
        else:
            merged[key] = value
    return merged


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep and check every arm of it.

    Raises:
        ConfigError: With every problem of the file or of one arm.
    """
    sweep = validate(SweepConfig, read_kind(path, "ab"), source=str(path))
    for arm in sweep.arms:
        try:
            sweep.run_config(arm)
        except ConfigError as error:
            raise ConfigError(str(path), error.problems) from None
    return sweep
