"""Folding: finished seeds become plain `torch.nn` modules, and the lattice disappears.

* A chunk site becomes `site` followed by a residual block of two ordinary `Linear` layers
  whose weights are zero outside the chunks.
* A span seed with phi = identity over a single `Linear` is a rank-one update of its weight.
* A span over `first -> activation -> last` whose seeds compute that same activation **is** the
  same pair with a wider hidden layer.

Blocks that torch.nn has no module for are traced into a `torch.fx.GraphModule`, so that the
folded model needs no Esper to run, pickle or export.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import GRAFTED_STAGES, STAGE
from esper.surgery.lattice import Attached, Lattice
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
    """`y = x + sum of blocks(x)` on any channel axis; traced, then forgotten."""

    def __init__(self, site: nn.Module, blocks: nn.ModuleList, axis: int) -> None:
        super().__init__()
        self.site, self.blocks, self.axis = site, blocks, axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        rows = y if self.axis == -1 else y.movedim(self.axis, -1)
        out = rows
        for block in self.blocks:
            out = out + block(rows)
        result: Tensor = out if self.axis == -1 else out.movedim(-1, self.axis)
        return result


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
    """A user's own function of the hidden units, recorded operation by operation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def fold_model(lattice: Lattice) -> nn.Module:
    """Fold every grafted seed (alpha > 0) into plain modules and detach the lattice.

    Args:
        lattice: The handle; afterwards it is empty.

    Returns:
        The same model object, or its replacement if the model itself was the site. It computes
        what the model computed, up to rounding.

    Raises:
        FoldError: If a span's seeds have no plain equivalent; nothing is changed then.
    """
    sites = [a for a in lattice.attached.values() if _grafted(a.layer)]
    _require_separate(sites)
    # spans first: they need the bare Linear modules that a chunk site's fold wraps
    sites.sort(key=lambda a: a.layer.geometry == "chunk")
    plans = [_plan(lattice.model, attached) for attached in sites]
    model = lattice.detach()
    for plan in plans:
        plan()
    return model


def _grafted(layer: KasminaLayer) -> list[int]:
    stages = layer.state[:, STAGE].tolist()
    alphas = layer.alpha.tolist()
    return [i for i, s in enumerate(stages) if s in GRAFTED_STAGES and alphas[i] > 0]


def _require_separate(sites: list[Attached]) -> None:
    """A module may be in a span and a chunk site only if the chunks read the span's result."""
    for i, chunk in enumerate(sites):
        for j, span in enumerate(sites):
            path = chunk.site.last
            if chunk.layer.geometry == span.layer.geometry or chunk.layer.geometry != "chunk":
                continue
            after = path == span.site.last and i > j
            inside = path == span.site.first and span.site.first != span.site.last
            if inside or (path == span.site.last and not after):
                raise FoldError(
                    f"grafted seeds of '{chunk.site.name}' and '{span.site.name}' must not share "
                    "a module to be folded, unless the chunk site was attached last and sits at "
                    "the span's end; keep the lattice for this model."
                )


def _plan(model: nn.Module, attached: Attached) -> Callable[[], None]:
    """The change one site needs; made before anything is touched."""
    seeds = _grafted(attached.layer)
    if attached.layer.geometry == "chunk":
        return lambda: _fold_chunk(model, attached, seeds)
    return _plan_span(model, attached, seeds)


@torch.no_grad()
def _fold_chunk(model: nn.Module, attached: Attached, seeds: list[int]) -> None:
    layer = attached.layer
    by_phi: dict[int, list[int]] = {}
    for seed in seeds:
        by_phi.setdefault(int(layer.phi[seed]), []).append(seed)
    blocks = nn.ModuleList(
        _chunk_block(layer, phi, group) for phi, group in by_phi.items() if phi != Phi.ZERO
    )
    site = model.get_submodule(attached.site.last)
    residual = _Residual(site, blocks, layer.channel_axis)
    plain = fx.GraphModule(residual, _trace(residual), class_name="FoldedSite")
    _replace(model, attached.site.last, plain.train(site.training))


class _LeafTracer(fx.Tracer):
    """Records our own small blocks, and keeps every other module as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = (_Residual, _Affine, _Gated, _Custom, nn.ModuleList, nn.Sequential)
        return module_qualified_name == "site" or not isinstance(m, ours)


def _trace(residual: _Residual) -> fx.Graph:
    return _LeafTracer().trace(residual)


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
    act = _MODULES[phi]() if phi in _MODULES else _Custom(PHI[phi])
    return nn.Sequential(_linear(w1.flatten(0, 1), b1.flatten()), act, _linear(w2.flatten(1), None))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype
    )
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def _plan_span(model: nn.Module, attached: Attached, seeds: list[int]) -> Callable[[], None]:
    layer, site = attached.layer, attached.site
    first, last = model.get_submodule(site.first), model.get_submodule(site.last)
    if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear)):
        raise FoldError(
            f"a span must begin and end at Linear modules to be folded, but '{site.name}' has "
            f"{type(first).__name__} and {type(last).__name__}; keep the lattice for this site."
        )
    kinds = {int(p) for p in layer.phi[seeds]} - {int(Phi.ZERO)}
    if first is last and kinds <= {int(Phi.IDENTITY)}:
        return lambda: _add_rank_ones(last, layer, seeds)
    activation = _activation_between(model, site.first, site.last)
    if activation is None or kinds != {activation}:
        names = sorted(n for n in BLUEPRINTS if BLUEPRINTS[n].phi in kinds)
        raise FoldError(
            f"the seeds of '{site.name}' must compute the host's own activation to be folded "
            f"into a wider layer, but they are {', '.join(names)}; the span must read "
            "first -> activation -> last in one Sequential, with that activation's blueprint."
        )
    return lambda: _widen(model, attached, seeds)


def _activation_between(model: nn.Module, first: str, last: str) -> int | None:
    """Code of the one activation between two children of a Sequential; None otherwise."""
    parent = model.get_submodule(first.rpartition(".")[0])
    if not isinstance(parent, nn.Sequential):
        return None
    names = [n for n, _ in parent.named_children()]
    i, j = (names.index(path.rpartition(".")[2]) for path in (first, last))
    between = [parent[k] for k in range(i + 1, j)]
    if len(between) != 1:
        return None
    kinds = {nn.ReLU: Phi.RELU, nn.SiLU: Phi.SILU, nn.Identity: Phi.IDENTITY}
    if isinstance(between[0], nn.GELU):
        return int(Phi.GELU) if between[0].approximate == "none" else None
    found = kinds.get(type(between[0]))
    return None if found is None else int(found)


@torch.no_grad()
def _add_rank_ones(linear: nn.Linear, layer: KasminaLayer, seeds: list[int]) -> None:
    alpha = layer.alpha[seeds].to(layer.w_out.dtype)
    used = layer.phi[seeds] != Phi.ZERO
    out = layer.w_out[seeds] * (alpha * used)[:, None]
    linear.weight += (out.t() @ layer.w_in[seeds]).to(linear.weight.dtype)
    shift = (layer.bias[seeds] @ out).to(linear.weight.dtype)
    if linear.bias is None:
        linear.bias = nn.Parameter(shift)
    else:
        linear.bias.add_(shift)


@torch.no_grad()
def _widen(model: nn.Module, attached: Attached, seeds: list[int]) -> None:
    layer, site = attached.layer, attached.site
    first, last = model.get_submodule(site.first), model.get_submodule(site.last)
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    alpha = layer.alpha[seeds].to(layer.w_out.dtype)
    bias = first.bias if first.bias is not None else first.weight.new_zeros(first.out_features)
    # a neighbouring span may have widened these modules already: its units are not connected
    new_in = _pad(layer.w_in[seeds].to(first.weight.dtype), first.in_features)
    new_out = _pad((layer.w_out[seeds] * alpha[:, None]).to(last.weight.dtype), last.out_features)
    w_in = torch.cat([first.weight, new_in])
    b_in = torch.cat([bias, layer.bias[seeds].to(bias.dtype)])
    first.weight, first.bias = nn.Parameter(w_in), nn.Parameter(b_in)
    last.weight = nn.Parameter(torch.cat([last.weight, new_out.t()], dim=1))
    first.out_features, last.in_features = w_in.shape[0], last.weight.shape[1]


def _pad(rows: Tensor, width: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, new)
