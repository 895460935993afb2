"""One case of the benchmark: its sizes, and what every mode needs to know about it.

T = rows, S = seeds, C = channels of a chunk, H = its hidden units; a span site of S units has C
input and output features, and H is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from esper_kernels import Phi

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {
    "relu": (int(Phi.RELU),), "silu": (int(Phi.SILU),), "gelu": (int(Phi.GELU),),
    "mixed": (int(Phi.RELU), int(Phi.SILU), int(Phi.GELU), int(Phi.IDENTITY)),
}  # fmt: skip

Outputs = tuple[Tensor | None, ...]


class SkipError(Exception):
    """Why a provider is not timed on a case."""


@dataclass(frozen=True)
class Case:
    """One row's sizes.

    Attributes:
        mode: Key of `MODES`.
        T: Rows.
        S: Seeds, or units of a span site.
        C: Channels of a chunk, or features of a span.
        H: Hidden units of a seed.
        phi: Key of `CODES`; of `mixed`, identity seeds use half of their hidden units.
        active: Awake seeds: `none`, `half` (scattered), `all`, or their number (the first ones).
        dtype: Key of `DTYPES`.
        observe: Whether statistics are gathered in the same pass.
        isolated: Seeds that train in isolation, scattered; the others are awake as `active` says.
    """

    mode: str
    T: int
    S: int
    C: int
    H: int
    phi: str = "relu"
    active: str = "all"
    dtype: str = "bf16"
    observe: bool = True
    isolated: int = 0

    @property
    def is_span(self) -> bool:
        """Whether the seeds are units of a span."""
        return self.mode.startswith("span")

    @property
    def D(self) -> int:
        """Channels of the activation."""
        return self.C if self.is_span else self.S * self.C

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the activations."""
        return DTYPES[self.dtype]

    @property
    def stream_bytes(self) -> int:
        """Bytes of one activation."""
        return self.T * self.D * self.torch_dtype.itemsize

    @property
    def num_awake(self) -> int:
        """Seeds with alpha other than 0."""
        shares = {"none": 0, "half": self.S // 2, "all": self.S}
        number = shares[self.active] if self.active in shares else int(self.active)
        return min(number, self.S - self.isolated)

    def seeds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Alpha of every seed, and what it learns: 0 nothing, 1 the task, 2 its own objective."""
        scattered = self.active == "half" or self.isolated
        order = torch.randperm(self.S, device=device) if scattered else torch.arange(self.S)
        order = order.to(device)
        alpha, learning = torch.zeros(self.S, device=device), torch.zeros(self.S, device=device)
        awake = order[: self.num_awake]
        alpha[awake] = torch.rand(len(awake), device=device) / 2 + 0.5
        learning[awake] = 1
        learning[order[self.S - self.isolated :]] = 2
        return alpha, learning.int()


class Mode(Protocol):
    """What is timed.

    Bytes count what must move, each input read once and each output written once; flops what must
    be computed, not what a packed tile computes.
    """

    providers: tuple[str, ...]

    def inputs(self, case: Case, device: torch.device) -> Any:
        """Fresh random inputs; the weights keep the size of the activations."""

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """One call over these inputs, ready to be timed; returns the outputs.

        Raises:
            SkipError: If the provider is not timed on this case.
        """

    def reference(self, case: Case, inputs: Any) -> Outputs:
        """What every provider's outputs are compared with, in fp64; None is not compared."""

    def comparable(self, case: Case, inputs: Any, outputs: Outputs) -> Outputs:
        """The part of a provider's outputs that stands beside the reference."""

    def bytes(self, case: Case) -> int:
        """Bytes that must move."""

    def flops(self, case: Case) -> int:
        """Floating-point operations that matrix units must do."""


_compiled: dict[Any, Any] = {}


def compile_once(function: Any) -> Any:
    """`torch.compile` of a function, shared by all input sets of a case."""
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False, fullgraph=True)
    return _compiled[function]


def forget_compiled() -> None:
    """Start a new case with nothing compiled."""
    _compiled.clear()
    torch._dynamo.reset()


def weight_bytes(case: Case) -> int:
    """Weights of the seeds that compute, and the three values that each seed has."""
    computing = case.num_awake + case.isolated
    each = 2 * case.D + 1 if case.is_span else 2 * case.C * case.H + case.H
    return 4 * computing * each + 12 * case.S


def wide(site: Any) -> Any:
    """The same inputs in fp64, cut off from any graph."""
    return type(site)(*(t.detach().double() if t.is_floating_point() else t for t in site))


def energy(dy: Tensor) -> Tensor:
    """Column sums of the squared gradient."""
    return dy.double().square().sum(0)
