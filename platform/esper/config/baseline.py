"""Configuration of a performance baseline: what runs, how often, and for how long."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from esper.config.base import Config, content_hash, validate
from esper.config.kinds import read_kind

Implementation = Literal["legacy", "kasmina"]


class Workload(Config):
    """Linear layers with seeds on their outputs, the same for every implementation."""

    layers: PositiveInt = Field(1, description="Linear layers, each with its seeds.")
    width: PositiveInt = Field(description="Features of every layer; divisible by the seeds.")
    seeds_per_layer: PositiveInt = Field(description="Seeds of each layer.")
    active_seeds: NonNegativeInt = Field(description="Of each layer; the others are dormant.")
    blueprint: str = Field("mlp_relu", description="What the active seeds compute.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of weights and inputs.")
    positions: PositiveInt = Field(1, description="Rows of one sample, such as tokens.")
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = Field(
        (1, 16, 32, 64), description="Samples of a request."
    )
    step_batch_sizes: tuple[PositiveInt, ...] | None = Field(
        None, description="Of the training steps; None: the same."
    )

    @model_validator(mode="after")
    def _fits(self) -> "Workload":
        if self.width % self.seeds_per_layer:
            raise ValueError(
                f"seeds_per_layer must divide width ({self.width}), but got {self.seeds_per_layer}."
            )
        if self.active_seeds > self.seeds_per_layer:
            raise ValueError(
                f"active_seeds must be at most seeds_per_layer ({self.seeds_per_layer}), "
                f"but got {self.active_seeds}."
            )
        for name in ("batch_sizes", "step_batch_sizes"):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or len(set(sizes)) < len(sizes)):
                raise ValueError(f"{name} must be given and differ, but got {list(sizes)}.")
        return self

    @property
    def loops(self) -> dict[Literal["forward", "step"], tuple[int, ...]]:
        """Batch sizes of each kind of request."""
        return {"forward": self.batch_sizes, "step": self.step_batch_sizes or self.batch_sizes}


class Requests(Config):
    """Timed requests of one process, at each batch size."""

    forward: int = Field(ge=2, description="Forward passes without gradient.")
    step: int = Field(ge=2, description="Training steps.")
    window: PositiveInt = Field(5, description="Requests of one window of the warm-up.")


class WarmUp(Config):
    """Untimed requests before the timed ones: until three windows in a row agree."""

    agree_frac: float = Field(0.02, gt=0, lt=1, description="Spread of three windows' medians.")
    max_windows: int = Field(20, ge=3, description="After so many, timing begins all the same.")


class Lifecycle(Config):
    """Growing runs from which success rate and length of a seed's life are taken."""

    run: dict[str, Any] = Field(description="The keys of a run, as in configs/runs/.")
    seeds: PositiveInt = Field(3, description="Random seeds, one run each.")


class BaselineConfig(Config):
    """`esper baseline run CONFIG`."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Of the baseline, in its report."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where it is measured.")
    gpus: PositiveInt = Field(
        1, description="Blocks measured side by side, each whole on a GPU of its own; 1 on a CPU."
    )
    threads: PositiveInt = Field(1, description="Of torch, in every process.")
    seed: NonNegativeInt = Field(
        0, description="Random seed of weights, inputs and the order of the blocks."
    )
    workload: Workload = Field(description="What is measured.")
    implementations: Annotated[tuple[Implementation, ...], Field(min_length=1)] = Field(
        ("legacy", "kasmina"), description="The first one is what the others are compared with."
    )
    blocks: int = Field(
        20, ge=2, le=64,
        description="K: block pairs in fresh processes. With fewer than 6 there is no interval.",
    )  # fmt: skip
    control_blocks: dict[Implementation, int] = Field(
        description="Blocks in which an implementation runs twice, against itself; at least 2."
    )
    requests: dict[Implementation, Requests] = Field(
        description="How often each implementation is timed."
    )
    warm_up: WarmUp = Field(WarmUp(), description="When timing begins.")
    limit_ms: PositiveFloat = Field(100.0, description="A request beyond it is over the limit.")
    busy_s: PositiveFloat = Field(2.0, description="Training during which the GPU is watched.")
    lifecycle: Lifecycle | None = Field(
        None, description="Growing runs that are measured as well; None: none."
    )

    @model_validator(mode="after")
    def _complete(self) -> "BaselineConfig":
        if self.device == "cpu" and self.gpus > 1:
            raise ValueError(
                f"gpus must be 1 for device 'cpu', but got {self.gpus}: blocks side by side would "
                "disturb one another."
            )
        names = set(self.implementations)
        if len(names) < len(self.implementations):
            raise ValueError(f"implementations must differ, but got {list(self.implementations)}.")
        for field in ("control_blocks", "requests"):
            given = set(getattr(self, field))
            if given != names:
                raise ValueError(
                    f"{field} must name {', '.join(self.implementations)}, "
                    f"but names {', '.join(sorted(given)) or 'none'}."
                )
        wrong = [n for n in self.control_blocks.values() if not 2 <= n <= self.blocks]
        if wrong:
            raise ValueError(
                f"control_blocks must be 2 to blocks ({self.blocks}), but got {wrong[0]}: "
                "without runs against itself nobody knows what noise is."
            )
        return self

    @property
    def hash(self) -> str:
        """sha256 over everything that decides what is measured."""
        return content_hash(self.model_dump(mode="json"))


def load_baseline_config(path: Path) -> BaselineConfig:
    """Read one file.

    Raises:
        ConfigError: With every problem of the file.
    """
    return validate(BaselineConfig, read_kind(path, "baseline"), source=str(path))
