"""Where a trial's shards run, and when one is given up."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from esper.config.base import Config


class ShardsConfig(Config):
    """Shards of one trial, each an actor with a device of its own or a share of one."""

    count: PositiveInt = 1
    parallel: Literal["data"] = Field(
        "data", description="data: every shard has the whole model and its part of each batch."
    )
    cpus_per_shard: PositiveFloat = Field(
        1.0, description="CPUs of a shard; it computes with as many threads, at least one."
    )
    gpus_per_shard: float | None = Field(
        None, ge=0, description="GPUs of a shard; several shards may share one by fractions. "
        "None: one if the run's device is a GPU.",
    )  # fmt: skip
    timeout_s: PositiveFloat = Field(
        600.0, description="A shard that does not answer a call for so long is given up."
    )
