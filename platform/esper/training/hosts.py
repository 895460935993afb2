"""Hosts: the networks that runs start from. Your own comes in by its import path."""

import inspect
from collections import OrderedDict
from importlib import import_module
from typing import Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from esper.config.base import Config
from esper.registry import Registry
from esper.training.tasks import TaskData


class Host(Config):
    """Options of a host; subclasses add their own and `build`."""

    def build(self, data: TaskData) -> nn.Module:
        """A freshly initialised network for the task, drawn from torch's global generator."""
        raise NotImplementedError(f"{type(self).__name__} must define build(data).")


HOSTS: Registry[type[Host]] = Registry("host")


class UnitSlopeReLU(nn.Module):
    """ReLU whose derivative at 0 is 1, as the teacher-student case asks for."""

    def forward(self, z: Tensor) -> Tensor:
        """`z` where it is at least 0, else 0."""
        return z * (z >= 0)


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh,
    "unit_slope_relu": UnitSlopeReLU,
}  # fmt: skip


@HOSTS.register("mlp")
class Mlp(Host):
    """`fc1 -> act1 -> fc2 -> ... -> out`, a plain `nn.Sequential`."""

    hidden: tuple[PositiveInt, ...] = Field(min_length=1, description="Widths of the layers.")
    activation: Literal["relu", "gelu", "silu", "tanh", "unit_slope_relu"] = Field(
        "relu", description="Between the layers."
    )
    bias: bool = Field(True, description="Whether layers have biases.")

    def build(self, data: TaskData) -> nn.Module:
        """Maps `[N, inputs]` to `[N, outputs]`."""
        layers: list[tuple[str, nn.Module]] = []
        width = data.inputs
        for i, units in enumerate(self.hidden, start=1):
            layers.append((f"fc{i}", nn.Linear(width, units, bias=self.bias)))
            layers.append((f"act{i}", _ACTIVATIONS[self.activation]()))
            width = units
        layers.append(("out", nn.Linear(width, data.outputs, bias=self.bias)))
        return nn.Sequential(OrderedDict(layers))


@HOSTS.register("conv1d")
class Conv1dNet(Host):
    """Three strided convolutions over a signal, then a linear layer."""

    channels: PositiveInt = Field(25, description="Of each convolution.")

    def build(self, data: TaskData) -> nn.Module:
        """Maps `[N, inputs]` to `[N, outputs]`; the input is one channel."""
        c = self.channels
        length = data.inputs
        for kernel, padding in ((5, 1), (3, 1), (3, 1)):
            length = (length + 2 * padding - kernel) // 2 + 1
        if length < 1:
            raise ValueError(
                f"host must fit the task's inputs, but 'conv1d' needs more than {data.inputs} "
                "of them; choose another host."
            )
        return nn.Sequential(OrderedDict([
            ("signal", nn.Unflatten(1, (1, data.inputs))),
            ("conv1", nn.Conv1d(1, c, 5, stride=2, padding=1)), ("act1", nn.ReLU()),
            ("conv2", nn.Conv1d(c, c, 3, stride=2, padding=1)), ("act2", nn.ReLU()),
            ("conv3", nn.Conv1d(c, c, 3, stride=2, padding=1)), ("act3", nn.ReLU()),
            ("flat", nn.Flatten()), ("out", nn.Linear(c * length, data.outputs)),
        ]))  # fmt: skip


@HOSTS.register("factory")
class Factory(Host):
    """A function of yours, `package.module:function`, called with `arguments`."""

    path: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description="`package.module:function`, importable where the run runs.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the function."
    )

    def build(self, data: TaskData) -> nn.Module:
        """Whatever the function returns.

        Raises:
            ValueError: If the function cannot be imported, does not take the arguments, or
                returns no module.
        """
        module, _, name = self.path.partition(":")
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"host.options.path must be importable, but '{self.path}' is not: {error}; "
                "install the package or run from the folder that holds it."
            ) from None
        try:
            inspect.signature(function).bind(**self.arguments)
        except TypeError as error:
            raise ValueError(
                f"host.options.arguments must fit '{self.path}', but: {error}; "
                "give the arguments that it takes."
            ) from None
        model = function(**self.arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"host.options.path must return an nn.Module, but '{self.path}' returned "
                f"{type(model).__name__}."
            )
        return model
