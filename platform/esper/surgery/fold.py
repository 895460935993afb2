"""Folding: finished seeds become plain `torch.nn` modules, and the lattice disappears.

* A chunk site becomes `site` followed by a residual block of two ordinary `Linear` layers
  whose weights are zero outside the chunks.
* A span seed with phi = identity over a single `Linear` is a rank-one update of its weight.
* A span over `first -> activation -> last` whose seeds compute that same activation **is** the
  same pair with a wider hidden layer.

A chunk site and its block are written down as one `torch.fx.GraphModule` that takes what the
site took, so that the folded model needs no Esper to run, pickle or export.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import GRAFTED_STAGES, STAGE
from esper.surgery.lattice import Attached, Lattice
from esper.surgery.sites import Site
from esper_kernels import PHI, Phi

_MODULES: dict[int, Callable[[], nn.Module]] = {
    Phi.IDENTITY: nn.Identity,
    Phi.RELU: nn.ReLU,
    Phi.GELU: nn.GELU,
    Phi.SILU: nn.SiLU,
}


class FoldError(ValueError):
    """A seed has no plain equivalent where it sits; the model is unchanged."""


class _Residual(nn.Module):
    """`y + sum of blocks(y)` on any channel axis; traced, then forgotten."""

    def __init__(self, blocks: nn.ModuleList, axis: int) -> None:
        super().__init__()
        self.blocks, self.axis = blocks, axis

    def forward(self, y: Tensor) -> Tensor:
        rows = y if self.axis == -1 else y.movedim(self.axis, -1)
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


def fold_model(lattice: Lattice) -> nn.Module:
    """Fold every grafted seed (alpha > 0) into plain modules and detach the lattice.

    Args:
        lattice: The handle; afterwards it is empty.

    Returns:
        The same model object. It computes what it computed with the lattice, up to rounding.

    Raises:
        FoldError: If seeds have no plain equivalent where they sit; nothing is changed then.
    """
    sites = [a for a in lattice.attached.values() if _grafted(a.layer)]
    _require_separate(lattice.model, sites)
    plans = [_plan(lattice, attached) for attached in sites]
    model = lattice.detach()
    for _, change in sorted(plans, key=lambda plan: plan[0]):
        change()
    return model


# Changes in the order in which they are possible: widening changes the shapes that rank-one
# updates were planned for, and a chunk site's fold wraps a module.
_RANK_ONE, _WIDEN, _WRAP = range(3)
Plan = tuple[int, Callable[[], None]]


def _grafted(layer: KasminaLayer) -> list[int]:
    """Seeds that add something to the host's output."""
    stages, alphas = layer.state[:, STAGE].tolist(), layer.alpha.tolist()
    kinds = layer.phi.tolist()
    return [
        i
        for i, stage in enumerate(stages)
        if stage in GRAFTED_STAGES and alphas[i] > 0 and kinds[i] != Phi.ZERO
    ]


def _require_separate(model: nn.Module, sites: list[Attached]) -> None:
    """Chunks inside a span are refused, and at its end unless they read the span's result."""
    for j, span in enumerate(sites):
        for i, chunk in enumerate(sites):
            if (chunk.layer.geometry, span.layer.geometry) != ("chunk", "span"):
                continue
            module = model.get_submodule(chunk.site.last)
            *inside, last = _children_between(model, span.site)
            if any(m is module for m in inside) or (module is last and i < j):
                raise FoldError(
                    f"grafted seeds of '{chunk.site.name}' and '{span.site.name}' must not share "
                    "a module to be folded, unless the chunk site was attached last and sits at "
                    "the span's end; keep the lattice for this model."
                )


def _children_between(model: nn.Module, span: Site) -> list[nn.Module]:
    """A span's modules, both ends included, in the order of their parent."""
    parent, _, first = span.first.rpartition(".")
    # not named_children: it leaves out what comes twice
    children = model.get_submodule(parent)._modules
    names = list(children)
    i, j = names.index(first), names.index(span.last.rpartition(".")[2])
    return [m for n in names[i : j + 1] if (m := children[n]) is not None]


def _plan(lattice: Lattice, attached: Attached) -> Plan:
    """The change that one site needs; made before anything is touched."""
    seeds = _grafted(attached.layer)
    if attached.layer.geometry == "chunk":
        return _plan_chunk(lattice, attached, seeds)
    return _plan_span(lattice.model, attached, seeds)


@torch.no_grad()
def _plan_chunk(lattice: Lattice, attached: Attached, seeds: list[int]) -> Plan:
    layer, path = attached.layer, attached.site.last
    site = lattice.model.get_submodule(path)
    _require_wrappable(lattice.model, path)
    by_phi: dict[int, list[int]] = {}
    for seed in seeds:
        by_phi.setdefault(int(layer.phi[seed]), []).append(seed)
    blocks = nn.ModuleList(_chunk_block(layer, phi, group) for phi, group in by_phi.items())
    host = [*site.parameters(), *lattice.host_parameters()]
    ours = {id(p) for p in lattice.parameters()}
    dtypes = [p.dtype for p in host if id(p) not in ours and p.is_floating_point()]
    blocks.to(dtypes[0] if dtypes else None)
    try:
        folded = _folded_site(site, _Residual(blocks, layer.channel_axis)).train(site.training)
    # a user's own function or signature may break a trace in any way
    except Exception as error:
        raise FoldError(
            f"'{path}' and its seeds must be traceable by torch.fx to be folded, but: {error}; "
            "keep the lattice for this model."
        ) from error
    return _WRAP, lambda: _replace(lattice.model, site, folded)


def _require_wrappable(model: nn.Module, path: str) -> None:
    """torch's own composite modules read their children's attributes, and some give tuples."""
    plain = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    parts = path.split(".")
    site = model.get_submodule(path)
    involved = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    if isinstance(site, nn.MultiheadAttention | nn.RNNBase):
        involved.append(site)
    for module in involved:
        kind = type(module)
        if kind.__module__.startswith("torch.nn.modules.") and not (
            isinstance(module, plain) or kind is nn.Module
        ):
            raise FoldError(
                f"the seeds of '{path}' must not sit on or in a {type(module).__name__} to be "
                "folded, since it needs its own parts as they are; keep the lattice for this model."
            )


def _folded_site(site: nn.Module, residual: _Residual) -> fx.GraphModule:
    """A module with the signature of `site` that also adds the blocks."""
    traced = _LeafTracer().trace(residual)
    graph = fx.Graph()
    parameters = inspect.signature(site.forward).parameters.values()
    if any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
        raise TypeError("its forward takes a variable number of arguments or keyword-only ones")
    inputs = tuple(graph.placeholder(p.name, default_value=p.default) for p in parameters)
    y = graph.call_module("site", inputs)
    own = next(n for n in traced.nodes if n.op == "placeholder")
    # copied, because a traced graph remembers the class of its tracer, which is Esper's
    graph.output(graph.graph_copy(traced, {own: y}))
    root = nn.Module()
    root.site, root.blocks = site, residual.blocks
    return fx.GraphModule(root, graph, class_name="FoldedSite")


class _LeafTracer(fx.Tracer):
    """Records our own small blocks, and keeps every other module as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, _Affine | _Gated | _Custom | nn.ModuleList | nn.Sequential)


def _chunk_block(layer: KasminaLayer, phi: int, seeds: list[int]) -> nn.Module:
    """The seeds of one kind as dense layers that are zero outside their chunks."""
    C, D = layer.fan_in, layer.channels
    alpha = layer.alpha[seeds].to(layer.w_out.dtype)
    out = layer.w_out[seeds] * alpha[:, None, None]
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
    act = _MODULES[phi]() if phi in _MODULES else _Custom(PHI[phi], used)
    return nn.Sequential(_linear(w1.flatten(0, 1), b1.flatten()), act, _linear(w2.flatten(1), None))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype
    )
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def _plan_span(model: nn.Module, attached: Attached, seeds: list[int]) -> Plan:
    layer, site = attached.layer, attached.site
    first, last = _own_linear(model, site.first), _own_linear(model, site.last)
    kinds = {int(p) for p in layer.phi[seeds]}
    if first is last and kinds == {int(Phi.IDENTITY)}:
        return _RANK_ONE, lambda: _add_rank_ones(last, layer, seeds)
    activation = _activation_between(model, site)
    if activation is None or kinds != {activation}:
        names = sorted(n for n in BLUEPRINTS if BLUEPRINTS[n].phi in kinds)
        raise FoldError(
            f"the seeds of '{site.name}' must compute the host's own activation to be folded "
            f"into a wider layer, but they are {', '.join(names)}; the span must read "
            "first -> activation -> last in one Sequential, with that activation's blueprint."
        )
    return _WIDEN, lambda: _widen(first, last, layer, seeds)


def _own_linear(model: nn.Module, path: str) -> nn.Linear:
    """The Linear module at an end of a span, if its weights may be changed for it alone.

    Raises:
        FoldError: If it is another kind of module, computes its weight from something else, or
            shares itself or its weights with another place of the model.
    """
    module = model.get_submodule(path)
    # no subclasses: what they compute is not known; a weight that is no parameter is computed
    if type(module) is not nn.Linear or "weight" not in module._parameters:
        raise FoldError(
            f"a span must begin and end at plain Linear modules to be folded, but '{path}' is a "
            f"{type(module).__name__}; keep the lattice for this site."
        )
    places = [m for parent in model.modules() for m in parent._modules.values() if m is module]
    owned = {id(p) for p in module._parameters.values() if p is not None}
    uses = [p for m in model.modules() for p in m._parameters.values() if id(p) in owned]
    if len(places) > 1 or len(uses) > len(owned):
        raise FoldError(
            f"'{path}' must share no weights with another place of the model to be folded, "
            "but does; keep the lattice for this site."
        )
    return module


def _activation_between(model: nn.Module, span: Site) -> int | None:
    """Code of the one activation between two children of a Sequential; None otherwise."""
    parent = model.get_submodule(span.first.rpartition(".")[0])
    if type(parent).forward is not nn.Sequential.forward:
        return None
    between = _children_between(model, span)[1:-1]
    if len(between) != 1:
        return None
    if isinstance(between[0], nn.GELU):
        return int(Phi.GELU) if between[0].approximate == "none" else None
    kinds = {nn.ReLU: Phi.RELU, nn.SiLU: Phi.SILU, nn.Identity: Phi.IDENTITY}
    found = kinds.get(type(between[0]))
    return None if found is None else int(found)


@torch.no_grad()
def _add_rank_ones(linear: nn.Linear, layer: KasminaLayer, seeds: list[int]) -> None:
    out = _outgoing(layer, seeds)
    linear.weight += (out.t() @ layer.w_in[seeds]).to(linear.weight.dtype)
    shift = (layer.bias[seeds] @ out).to(linear.weight.dtype)
    if linear.bias is None:
        linear.bias = nn.Parameter(shift, linear.weight.requires_grad)
    else:
        linear.bias.add_(shift)


@torch.no_grad()
def _widen(first: nn.Linear, last: nn.Linear, layer: KasminaLayer, seeds: list[int]) -> None:
    bias = first.bias if first.bias is not None else first.weight.new_zeros(first.out_features)
    # a neighbouring span may have widened these modules already: its units are not connected
    new_in = _pad(layer.w_in[seeds].to(first.weight.dtype), first.in_features)
    new_out = _pad(_outgoing(layer, seeds).to(last.weight.dtype), last.out_features)
    w_in = torch.cat([first.weight, new_in])
    b_in = torch.cat([bias, layer.bias[seeds].to(bias.dtype)])
    w_out = torch.cat([last.weight, new_out.t()], dim=1)
    first.weight, first.bias = (nn.Parameter(w, first.weight.requires_grad) for w in (w_in, b_in))
    last.weight = nn.Parameter(w_out, last.weight.requires_grad)
    first.out_features, last.in_features = len(w_in), w_out.shape[1]


def _outgoing(layer: KasminaLayer, seeds: list[int]) -> Tensor:
    """Outgoing weights of span seeds times their alpha, `[n, O]`."""
    return layer.w_out[seeds] * layer.alpha[seeds, None].to(layer.w_out.dtype)


def _pad(rows: Tensor, width: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the model has it."""
    places = [(m, n) for m in model.modules() for n, child in m._modules.items() if child is old]
    for parent, name in places:
        parent.register_module(name, new)
