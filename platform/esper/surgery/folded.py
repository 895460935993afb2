"""Seeds as plain `torch.nn` modules: what a fold leaves where it cannot merge them into weights.

A site and its seeds are written down as one `torch.fx.GraphModule` that takes what the site took,
so that the folded model needs no Esper to run, pickle or export.
"""

import inspect
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument

from esper.seeds.kasmina import KasminaLayer
from esper_kernels import PHI, Phi

_MODULES: dict[int, Callable[[], nn.Module]] = {
    Phi.IDENTITY: nn.Identity,
    Phi.RELU: nn.ReLU,
    Phi.GELU: nn.GELU,
    Phi.SILU: nn.SiLU,
}


class _Residual(nn.Module):
    """`y + sum of blocks(x)` on any channel axis; traced, then forgotten."""

    def __init__(self, blocks: nn.ModuleList, axis: int) -> None:
        super().__init__()
        self.blocks, self.axis = blocks, axis

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        rows = x if self.axis == -1 else x.movedim(self.axis, -1)
        for block in self.blocks:
            out = block(rows)
            # added in the layout of y, which the host may rely on
            y = y + (out if self.axis == -1 else out.movedim(-1, self.axis))
        return y


class _Affine(nn.Module):
    """`x * scale + shift` on the last axis."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _Gated(nn.Module):
    """`(value * sigmoid(gate)) W2`."""

    def __init__(self, value: nn.Linear, gate: nn.Linear, out: nn.Linear) -> None:
        super().__init__()
        self.value, self.gate, self.out = value, gate, out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.value(x) * torch.sigmoid(self.gate(x)))
        return y


class _Custom(nn.Module):
    """A user's own function of each seed's hidden units, recorded operation by operation."""

    def __init__(self, function: Callable[[Tensor], Tensor], hidden: int) -> None:
        super().__init__()
        self.function, self.hidden = function, hidden

    def forward(self, z: Tensor) -> Tensor:
        # units last and seeds before them, since the function may mix the units of a seed
        return self.function(z.unflatten(-1, (-1, self.hidden))).flatten(-2)


class _LeafTracer(fx.Tracer):
    """Records our own small blocks, and keeps every other module as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, _Affine | _Gated | _Custom | nn.ModuleList | nn.Sequential)


def chunk_blocks(layer: KasminaLayer, seeds: list[int]) -> nn.ModuleList:
    """Chunk seeds as dense layers that are zero outside their chunks, one block a kind."""
    groups = by_phi(layer, seeds).items()
    return nn.ModuleList(_chunk_block(layer, phi, group) for phi, group in groups)


@torch.no_grad()
def span_blocks(layer: KasminaLayer, seeds: list[int]) -> nn.ModuleList:
    """Span seeds as pairs of dense layers, one block a kind."""
    blocks = nn.ModuleList()
    for phi, group in by_phi(layer, seeds).items():
        bias = layer.bias[group]
        first = _linear(layer.w_in[group], bias if bias.any() else None)
        last = _linear(outgoing(layer, group).t(), None)
        blocks.append(nn.Sequential(first, _activation(phi, len(group)), last))
    return blocks


def by_phi(layer: KasminaLayer, seeds: list[int]) -> dict[int, list[int]]:
    """The seeds by the code of their function."""
    groups: dict[int, list[int]] = {}
    for seed in seeds:
        groups.setdefault(int(layer.phi[seed]), []).append(seed)
    return groups


def outgoing(layer: KasminaLayer, seeds: list[int]) -> Tensor:
    """Outgoing weights of seeds times their alpha; seeds first."""
    alpha = layer.alpha[seeds].to(layer.w_out.dtype)
    return layer.w_out[seeds] * alpha.view(-1, *[1] * (layer.w_out.ndim - 1))


@torch.no_grad()
def _chunk_block(layer: KasminaLayer, phi: int, seeds: list[int]) -> nn.Module:
    C, D = layer.fan_in, layer.channels
    out = outgoing(layer, seeds)
    if phi == Phi.DIAGONAL:
        scale, shift = torch.zeros(2, D, dtype=out.dtype, device=out.device)
        for i, s in enumerate(seeds):
            scale[s * C : (s + 1) * C], shift[s * C : (s + 1) * C] = out[i, 0], out[i, 1]
        return _Affine(scale, shift)
    used = int(layer.hidden_used[seeds[0]])
    w1 = out.new_zeros(len(seeds), used, D)
    w2 = out.new_zeros(D, len(seeds), used)
    for i, s in enumerate(seeds):
        w1[i, :, s * C : (s + 1) * C] = layer.w_in[s, :, :used].t()
        w2[s * C : (s + 1) * C, i] = out[i, :used].t()
    b1 = layer.bias[seeds, :used]
    if phi == Phi.GLU:
        half = used // 2
        return _Gated(
            _linear(w1[:, :half].flatten(0, 1), b1[:, :half].flatten()),
            _linear(w1[:, half:].flatten(0, 1), b1[:, half:].flatten()),
            _linear(w2[:, :, :half].flatten(1), None),
        )
    first, last = _linear(w1.flatten(0, 1), b1.flatten()), _linear(w2.flatten(1), None)
    return nn.Sequential(first, _activation(phi, used), last)


def _activation(phi: int, hidden: int) -> nn.Module:
    return _MODULES[phi]() if phi in _MODULES else _Custom(PHI[phi], hidden)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype
    )
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def has_fixed_signature(site: nn.Module) -> bool:
    """Whether a module's arguments can be written down one by one."""
    return not any(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(site.forward).parameters.values()
    )


def folded_site(
    site: nn.Module, blocks: nn.ModuleList, axis: int, source: int | None = None
) -> fx.GraphModule:
    """A module with the fixed signature of `site` that also adds the blocks.

    Args:
        site: What is called, with all its arguments.
        blocks: Functions of the channels, channels last.
        axis: Axis of the channels.
        source: Which argument of the site the blocks read; None: its output.

    Raises:
        Exception: Whatever a user's own function raises when it is traced.
    """
    graph = fx.Graph()
    parameters = inspect.signature(site.forward).parameters.values()
    inputs = [graph.placeholder(p.name, default_value=p.default) for p in parameters]
    named = [(p, node) for p, node in zip(parameters, inputs, strict=True)]
    keywords: dict[str, Argument] = {p.name: node for p, node in named if p.kind is p.KEYWORD_ONLY}
    args = tuple(node for p, node in named if p.kind is not p.KEYWORD_ONLY)
    y = graph.call_module("site", args, keywords)
    _add_residual(graph, blocks, axis, y, y if source is None else inputs[source])
    root = nn.Module()
    root.site, root.blocks = site, blocks
    return _module(root, graph, "FoldedSite", blocks.training)


def folded_hook(blocks: nn.ModuleList, axis: int, reads_input: bool) -> fx.GraphModule:
    """A forward hook that adds the blocks, for a site that must stay the module that it is.

    Args:
        blocks: Functions of the channels, channels last.
        axis: Axis of the channels.
        reads_input: Whether the blocks read the site's first argument rather than its output.

    Raises:
        Exception: Whatever a user's own function raises when it is traced.
    """
    graph = fx.Graph()
    _, args, y = (graph.placeholder(name) for name in ("module", "args", "output"))
    source = graph.call_function(operator.getitem, (args, 0)) if reads_input else y
    _add_residual(graph, blocks, axis, y, source)
    root = nn.Module()
    root.blocks = blocks
    return _module(root, graph, "FoldedSeeds", blocks.training)


def _module(root: nn.Module, graph: fx.Graph, name: str, training: bool) -> fx.GraphModule:
    module = fx.GraphModule(root, graph, class_name=name)
    # it makes new containers; the site itself stays in the mode that it is in
    module.training = training
    module.get_submodule("blocks").train(training)
    return module


def _add_residual(
    graph: fx.Graph, blocks: nn.ModuleList, axis: int, y: fx.Node, source: fx.Node
) -> None:
    traced = _LeafTracer().trace(_Residual(blocks, axis))
    own = [n for n in traced.nodes if n.op == "placeholder"]
    # copied, because a traced graph remembers the class of its tracer, which is Esper's
    graph.output(graph.graph_copy(traced, dict(zip(own, (y, source), strict=True))))
