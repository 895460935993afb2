"""Configuration of one run: a task, a host, where it may grow, and who decides."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from esper.config.base import Config, ConfigError, explain, validate
from esper.config.kinds import read_kind
from esper.registry import Registry, UnknownNameError

M = TypeVar("M", bound=BaseModel)

Execution = Literal["kernels", "vectorised", "loop"]


class Plugin(Config):
    """A registered name with its own options, which that plug-in checks."""

    name: str = Field(description="The name that it was registered under.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Its options; see below for those that come with Esper."
    )


def build_options(registry: Registry[type[M]], plugin: Plugin, path: str) -> M:
    """The options of a plug-in, checked.

    Raises:
        ConfigError: With the path of the wrong name or option.
    """
    try:
        kind = registry[plugin.name]
    except UnknownNameError as error:
        raise ConfigError(path, (f"{path}.name: {error}",)) from None
    try:
        return kind.model_validate(plugin.options)
    except ValidationError as error:
        raise ConfigError(path, explain(error, at=f"{path}.options")) from None


class SiteConfig(Config):
    """One `attach` call: the places it matches and the seeds that each of them gets."""

    sites: str = Field(description="Module path, glob, or a span `a->b`.")
    seeds_per_layer: PositiveInt = Field(description="Seeds of each place, dormant at first.")
    geometry: Literal["chunk", "span"] = Field(
        "chunk",
        description="chunk: a seed reads and writes one chunk of the output's channels; span: a "
        "seed is a unit from the input of `a` to the output of `b`.",
    )
    hidden: PositiveInt | None = Field(
        None, description="Hidden units a chunk seed has; None: the chunk's width, at least 2."
    )
    channels: PositiveInt | None = Field(
        None, description="Channels of the site's output, where its type does not tell."
    )
    channel_axis: int | None = Field(None, description="Axis of the channels, where not told.")
    biased: bool | None = Field(
        None, description="Whether units of a span have a bias; None: as the span's first module."
    )


class TrainConfig(Config):
    """The optimizer and its schedule; equal for all arms unless an arm says otherwise."""

    steps: PositiveInt = Field(
        description="Optimizer steps of the run; a multiple of interval_steps."
    )
    batch_size: PositiveInt | None = Field(None, description="None: the whole training set.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="Of host and seeds.")
    learning_rate: PositiveFloat = Field(1e-3, description="After the warm-up.")
    warmup_steps: NonNegativeInt = Field(
        0, description="Steps over which the learning rate rises linearly from 0."
    )
    decay: Literal["none", "cosine"] = Field(
        "none", description="How the learning rate falls after the warm-up: not at all, or by "
        "half a cosine to 0 at the last step.",
    )  # fmt: skip
    weight_decay: float = Field(0.0, ge=0, description="As the optimizer of torch understands it.")
    interval_steps: PositiveInt = Field(100, description="Optimizer steps between two reports.")

    @model_validator(mode="after")
    def _whole_intervals(self) -> "TrainConfig":
        if self.steps % self.interval_steps:
            raise ValueError(
                f"steps must be a multiple of interval_steps ({self.interval_steps}), "
                f"but got {self.steps}; change one of them."
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be less than the {self.steps} steps, "
                f"but got {self.warmup_steps}; shorten the warm-up."
            )
        return self

    def rate(self, step: int) -> float:
        """Learning rate of a step.

        Args:
            step: How many steps were taken before it.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.decay == "none":
            return self.learning_rate
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class GrowthConfig(Config):
    """Times of the seed lifecycle, the gates' thresholds, and the limits the shield enforces."""

    objective: Literal["desired_update", "reconstruction"] = Field(
        "desired_update",
        description="What a seed learns alone in TRAINING: the change of its output that would "
        "lower the loss, or its own input.",
    )
    initialisation: Literal["random", "matched", "gradmax", "tiny", "net2net"] = Field(
        "random",
        description="Incoming weights of a new seed: as of `nn.Linear`, or matched to what the "
        "network cannot express (needs measured_samples; blueprints that mix hidden units are "
        "drawn all the same). The others are published ways to compare with, for span sites.",
    )
    measured_samples: NonNegativeInt = Field(
        0,
        description="Training samples on which the bottleneck is measured once an interval; 0: "
        "never.",
    )
    scored_blueprint: str | tuple[str, ...] | dict[str, tuple[str, ...]] = Field(
        "mlp_relu",
        description="Whose hidden units the bottleneck is measured with, whatever is germinated; "
        "of several, that of the one that promises most for each parameter at a site. A mapping "
        "gives them by glob of the site's name, the first that fits.",
    )
    training_intervals: NonNegativeInt = Field(
        1, description="Least intervals in TRAINING (G2); 0: a seed is grafted at once, and learns "
        "on the task from its first step.",
    )  # fmt: skip
    min_explained_frac: float = Field(
        0.0, le=1, description="G2: least share of the isolated target that the seed explains."
    )
    patience_intervals: PositiveInt = Field(
        8, description="Intervals a gate may keep a seed waiting before it is culled."
    )
    ramp_steps: PositiveInt = Field(100, description="Optimizer steps for alpha 0 -> 1.")
    stabilization_intervals: NonNegativeInt = Field(
        1, description="Intervals of rest between graft and evaluation (G4)."
    )
    fine_tuning_intervals: PositiveInt = Field(
        10, description="Intervals in FINE_TUNING before a seed is fossilized."
    )
    embargo_intervals: NonNegativeInt = Field(5, description="Rest of a culled slot (G1).")
    min_gain: float | None = Field(
        0.0, description="G5: least held-out loss that a seed must save; None: a seed need not "
        "prove itself, and no pass and no interval are spent on it.",
    )  # fmt: skip
    gain_tolerance_se: float = Field(
        0.0, description="G5: standard errors of the gain by which a seed may miss min_gain; "
        "negative: by which it must pass it.",
    )  # fmt: skip
    max_instability_frac: PositiveFloat = Field(
        0.5, description="G4: greatest relative rise of the training loss since grafting began."
    )
    max_drift_frac: PositiveFloat = Field(
        0.5, description="Relative host weight change per interval above which grafting waits."
    )
    max_grad_norm_ratio: PositiveFloat = Field(
        10.0,
        description="Gradient norm over its running median, or its inverse, that is unhealthy.",
    )
    max_active_seeds: PositiveInt | None = Field(None, description="G0: seeds awake at once.")
    max_parameters: PositiveInt | None = Field(
        None, description="G0: host and awake seeds together; None: no limit."
    )
    max_train_flops: PositiveFloat | None = Field(
        None, description="G0: floating point operations of the whole run (of each shard), growing "
        "included; a seed is affordable if the steps that are left still fit with it, their "
        "operations taken to be in proportion to the parameters. None: no limit.",
    )  # fmt: skip
    young_rate: PositiveFloat = Field(
        1.0, description="Factor on the learning rate of a seed at its first step; it comes to 1 "
        "over young_steps steps of its own. Adam and AdamW only.",
    )  # fmt: skip
    young_steps: PositiveInt = Field(
        100, description="Steps of its own after which a seed learns at the common rate."
    )
    max_failures: PositiveInt = Field(
        8, description="Culls in a row after which the shield refuses to germinate."
    )
    max_loss_ratio: float = Field(
        4.0, gt=1, description="Training loss over the median of the last good intervals above "
        "which the run goes back to before its seeds on trial were grafted.",
    )  # fmt: skip
    max_rollback_drift_frac: PositiveFloat | None = Field(
        None, description="The same for the relative host weight change; None: no limit."
    )
    max_rollbacks: NonNegativeInt = Field(
        3, description="Times the run goes back; after the last one it germinates no more."
    )
    trial_intervals: NonNegativeInt = Field(
        3, description="Intervals in FINE_TUNING in which a seed is still on trial."
    )

    def scored_at(self, site: str) -> tuple[str, ...]:
        """Blueprints that a site is scored for; none if no glob fits its name."""
        named = self.scored_blueprint
        if isinstance(named, dict):
            return next((names for glob, names in named.items() if fnmatchcase(site, glob)), ())
        return (named,) if isinstance(named, str) else named

    @model_validator(mode="after")
    def _measured(self) -> "GrowthConfig":
        if self.initialisation not in ("random", "net2net") and not self.measured_samples:
            raise ValueError(
                f"measured_samples must be at least 1 for initialisation '{self.initialisation}', "
                "but got 0; a few hundred will do."
            )
        return self

    @model_validator(mode="after")
    def _patient_enough(self) -> "GrowthConfig":
        for name in ("training_intervals", "stabilization_intervals"):
            if self.patience_intervals < getattr(self, name):
                raise ValueError(
                    f"patience_intervals must be at least {name} ({getattr(self, name)}), "
                    f"but got {self.patience_intervals}; no seed would ever get further."
                )
        return self


class FlagsConfig(Config):
    """Which flags a run reads, and as whom it asks."""

    file: Path = Field(description="File of flags, from the folder in which the run is started.")
    model: str = Field(min_length=1, description="Name of the model, which shares and lists mean.")
    environment: str | None = Field(
        None, description="None: the one that ESPER_ENVIRONMENT names, if any."
    )


class RunConfig(Config):
    """Everything that one run depends on, except its random seed."""

    task: Plugin = Field(description="What is learned: a registered task and its options.")
    host: Plugin = Field(
        description="The network that it starts from: a registered host and its options."
    )
    train: TrainConfig = Field(description="Optimizer, schedule and length.")
    lattice: tuple[SiteConfig, ...] = Field(
        (), description="Places that may grow; empty: the host alone is trained."
    )
    growth: GrowthConfig = Field(
        GrowthConfig(), description="Times of a seed's life, gates and limits."
    )
    controller: Plugin = Field(
        Plugin(name="static"),
        description="Who decides what is grown: a registered controller and its options.",
    )
    follow: str | None = Field(
        None,
        description="An arm of the sweep; this arm runs after it, with its growth events.",
    )
    start: Literal["host", "grown"] = Field(
        "host", description="grown: start from the topology that the followed arm ended with."
    )
    seed_salt: NonNegativeInt = Field(
        0, description="Added to the pair's seed of this arm alone; for A/A runs only."
    )
    device: str = Field("cpu", description="A device of torch: cpu, cuda or cuda:1.")
    execution: Execution = Field(
        "kernels",
        description="How seeds are computed: all at once by kernels where there are any, all at "
        "once in plain PyTorch, or one after another as the legacy layer does.",
    )
    flags: FlagsConfig | None = Field(
        None,
        description="Flags that decide before every interval how seeds are computed and whether "
        "new ones are woken; None: none are read.",
    )
    plugins: tuple[str, ...] = Field((), description="Modules to import: they register plug-ins.")
    metrics: tuple[str, ...] = Field(
        (), description="Registered with `esper.metric`: computed once, after the last step."
    )
    kept_outputs: NonNegativeInt = Field(
        0,
        exclude_if=lambda rows: rows == 0,
        description="Held-out rows whose outputs stay in the trial's record, for "
        "`esper ab similarity`; in a run without shards.",
    )

    @model_validator(mode="after")
    def _ramp_ends(self) -> "RunConfig":
        patience_steps = self.growth.patience_intervals * self.train.interval_steps
        grows = self.lattice and self.controller.name != "static"
        if grows and self.growth.ramp_steps > patience_steps:
            raise ValueError(
                f"growth.ramp_steps must be at most patience_intervals * interval_steps "
                f"({patience_steps}), but got {self.growth.ramp_steps}; every seed would be "
                "culled before its graft is complete."
            )
        return self

    @model_validator(mode="after")
    def _young_by_adam(self) -> "RunConfig":
        if self.growth.young_rate != 1 and self.train.optimizer == "sgd":
            raise ValueError(
                f"growth.young_rate must be 1 with optimizer 'sgd', but got "
                f"{self.growth.young_rate}; use 'adam' or 'adamw'."
            )
        return self

    @model_validator(mode="after")
    def _grown_follows(self) -> "RunConfig":
        if self.start == "grown" and self.follow is None:
            raise ValueError(
                "start must be 'host' for a run that follows no arm, but got 'grown'; "
                "set `follow` to the arm whose topology it takes."
            )
        return self


def load_run(path: Path) -> RunConfig:
    """Read one run.

    Raises:
        ConfigError: With every problem of the file.
    """
    return validate(RunConfig, read_kind(path, "run"), source=str(path))
