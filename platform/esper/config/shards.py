"""Where a trial's shards run, and when one is given up."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from esper.config.base import Config


class ShardsConfig(Config):
    """Shards of one trial, each an actor with a device of its own or a share of one."""

    count: PositiveInt = Field(1, description="Actors that train the run together.")
    parallel: Literal["data", "seed"] = Field(
        "data", description="data: every shard has the whole model and its part of each batch. "
        "seed: every shard has the whole batch, and its part of the seeds and of the host's "
        "channels at their sites.",
    )  # fmt: skip
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
    bucket_mib: PositiveFloat = Field(
        25.0, description="MiB of gradients that travel in one message while others are still "
        "computed; a model with fewer sends one message a step.",
    )  # fmt: skip
    on_loss: Literal["retry", "shrink", "fail"] = Field(
        "retry", description="When a shard is lost, or shards do not agree. retry: go on from the "
        "last checkpoint with as many new ones. shrink: with fewer, if there is no room for all; "
        "what they compute is then rounded otherwise. fail: end the run.",
    )  # fmt: skip
    retries: NonNegativeInt = Field(2, description="How often a run goes on so; fail: never.")
    wait_s: PositiveFloat = Field(
        60.0, description="How long new shards wait for the room of all that were lost."
    )

    @property
    def times(self) -> int:
        """How often a run goes on after a failure."""
        return 0 if self.on_loss == "fail" else self.retries
