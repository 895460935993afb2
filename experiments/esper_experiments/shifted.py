"""A frozen MLP that meets shifted data: MNIST-1D with its signals reversed in time.

A run names this module under `plugins`; the standing experiment is
`configs/sweeps/ab_adapt_mnist1d.yaml`.
"""

from dataclasses import replace
from pathlib import Path

from pydantic import Field
from torch import nn

from esper.training.hosts import HOSTS, Mlp
from esper.training.tasks import TASKS, Mnist1d, Split, TaskData
from esper_experiments.text.adapters import Adapter, add_adapter
from esper_experiments.text.gpt import load_weights


@TASKS.register("reversed_mnist1d")
class ReversedMnist1d(Mnist1d):
    """MNIST-1D, the last of the 40 values of a signal first."""

    def load(self, seed: int) -> TaskData:
        """The samples and splits of `mnist1d`."""
        data = super().load(seed)
        return replace(
            data, train=_reversed(data.train), held_out=_reversed(data.held_out),
            test=_reversed(data.test),
        )  # fmt: skip


@HOSTS.register("frozen_mlp")
class FrozenMlp(Mlp):
    """An MLP whose weights come from a checkpoint and stay as they are."""

    pretrained: Path = Field(description="Of an 'mlp' alone, as `esper run --save` writes it.")
    adapter: Adapter | None = Field(None, description="LoRA or AdaLoRA beside its maps.")

    def build(self, data: TaskData) -> nn.Module:
        """The MLP, with its adapter if any.

        Raises:
            ValueError: If the checkpoint does not fit, or `peft` is missing for an adapter.
        """
        model = super().build(data)
        load_weights(model, self.pretrained)
        model.requires_grad_(False)
        if self.adapter is not None:
            add_adapter(model, self.adapter)
        return model


def _reversed(split: Split) -> Split:
    x, y = split
    return x.flip(1), y
