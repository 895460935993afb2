"""A frozen MLP that meets shifted data: signals reversed in time, images turned by a quarter.

A run names this module under `plugins`; the standing experiments are
`configs/sweeps/ab_adapt_mnist1d.yaml` and `configs/sweeps/ab_adapt_digits.yaml`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import Field
from torch import Tensor, nn

from esper.training.hosts import HOSTS, Mlp
from esper.training.tasks import TASKS, Digits, Mnist1d, TaskData
from esper_experiments.text.adapters import Adapter, add_adapter
from esper_experiments.text.gpt import load_weights


@TASKS.register("reversed_mnist1d")
class ReversedMnist1d(Mnist1d):
    """MNIST-1D, the last of the 40 values of a signal first."""

    def load(self, seed: int) -> TaskData:
        """The samples and splits of `mnist1d`."""
        return _shifted(super().load(seed), lambda x: x.flip(1))


@TASKS.register("rotated_digits")
class RotatedDigits(Digits):
    """The 8 x 8 digits, turned by 90 degrees."""

    def load(self, seed: int) -> TaskData:
        """The images and splits of `digits`."""
        return _shifted(
            super().load(seed), lambda x: x.unflatten(1, (8, 8)).rot90(dims=(1, 2)).flatten(1)
        )


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


def _shifted(data: TaskData, shift: Callable[[Tensor], Tensor]) -> TaskData:
    """All three splits with their inputs `[N, inputs]` shifted."""
    train, held_out, test = ((shift(x), y) for x, y in (data.train, data.held_out, data.test))
    return replace(data, train=train, held_out=held_out, test=test)
