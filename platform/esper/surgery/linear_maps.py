"""Modules that a span seed can be merged into: linear in the channels, the same at every position.

These are `Linear`, convolutions whose middle tap reads the position that they write, and the
transposed linear layer of GPT-2 in `transformers`. A unit is a row of the weight of the module
that it begins at, and a column of the weight of the one that it ends at.

Shapes: n = units, I = input channels, O = output channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# what holds the number of output and of input channels
_SIZES = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Conv3d: ("out_channels", "in_channels"),
}
_TRANSPOSED = "transformers.pytorch_utils.Conv1D"


def is_linear_map(module: nn.Module) -> bool:
    """Whether it is exactly one of these modules, with a weight of its own that is a parameter."""
    # no subclasses: what they compute is not known; a weight that is no parameter is computed
    if "weight" not in module._parameters or "forward" in module.__dict__:
        return False
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return type(module) in _SIZES and module.groups == 1 and _reads_own_position(module)
    return type(module) in _SIZES or _is_transposed(module)


def hidden_of(module: nn.Module, width: int) -> Tensor:
    """Outputs of many sizes that such a module might give if it were `width` wide; fp64."""
    dims = _parameters(module)[0].ndim - 2
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 3, 15, dtype=torch.float64)
    z = torch.randn(16, *[5] * max(1, dims), width, generator=generator, dtype=torch.float64)
    z[1:] *= sizes.view(-1, *[1] * (z.ndim - 1))
    z[0] = 0
    return z.movedim(-1, 1) if dims else z


@torch.no_grad()
def add_update(module: nn.Module, update_OI: Tensor, shift_O: Tensor) -> None:
    """Add a matrix to what the module computes, and a bias; where it has none, only if not 0."""
    weight, bias = _parameters(module)
    weight.add_(_taps(module, update_OI.to(weight.dtype)))
    if bias is not None:
        bias.add_(shift_O.to(bias.dtype))
    elif shift_O.any():
        module.bias = nn.Parameter(shift_O.to(weight.dtype), weight.requires_grad)


@torch.no_grad()
def add_outputs(module: nn.Module, w_nI: Tensor, b_n: Tensor) -> None:
    """Give the module n more outputs; where it has no biases, a bias only if one is not 0."""
    weight, bias = _parameters(module)
    width, fan_in = _size(module)
    # a neighbouring span may have widened it already: its units are not connected
    rows = _taps(module, F.pad(w_nI, (0, fan_in - w_nI.shape[1])).to(weight.dtype))
    wider = torch.cat([weight, rows], dim=_out_axis(module))
    module.weight = nn.Parameter(wider, weight.requires_grad)
    if bias is not None or b_n.any():
        old = weight.new_zeros(width) if bias is None else bias
        module.bias = nn.Parameter(torch.cat([old, b_n.to(old.dtype)]), weight.requires_grad)
    _resize(module, width + len(w_nI), fan_in)


@torch.no_grad()
def add_inputs(module: nn.Module, w_nO: Tensor) -> None:
    """Give the module n more inputs."""
    weight, _ = _parameters(module)
    width, fan_in = _size(module)
    columns = _taps(module, F.pad(w_nO, (0, width - w_nO.shape[1])).t().to(weight.dtype))
    wider = torch.cat([weight, columns], dim=1 - _out_axis(module))
    module.weight = nn.Parameter(wider, weight.requires_grad)
    _resize(module, width, fan_in + len(w_nO))


def _reads_own_position(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    odd = all(k % 2 == 1 for k in conv.kernel_size) and set(conv.stride) == {1}
    return odd and (conv.padding == "same" or [2 * p for p in conv.padding] == reach)


def _is_transposed(module: nn.Module) -> bool:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" == _TRANSPOSED


def _out_axis(module: nn.Module) -> int:
    return 1 if _is_transposed(module) else 0


def _size(module: nn.Module) -> tuple[int, int]:
    axis = _out_axis(module)
    weight, _ = _parameters(module)
    return weight.shape[axis], weight.shape[1 - axis]


def _resize(module: nn.Module, outputs: int, inputs: int) -> None:
    names = _SIZES.get(type(module), ("nf", "nx"))
    for name, size in zip(names, (outputs, inputs), strict=True):
        setattr(module, name, size)


def _parameters(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    return weight, bias


def _taps(module: nn.Module, matrix: Tensor) -> Tensor:
    """A `[out, in]` matrix as the module's weight would hold it."""
    if _is_transposed(module):
        return matrix.t()
    if isinstance(module, nn.Linear):
        return matrix
    kernel = _parameters(module)[0].shape[2:]
    taps = matrix.new_zeros(*matrix.shape, *kernel)
    # the sizes are odd, so the middle of all taps is the middle along each axis
    taps.flatten(2)[:, :, kernel.numel() // 2] = matrix
    return taps
