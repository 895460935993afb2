"""Folding: finished seeds become part of a plain PyTorch model, and the lattice disappears.

* A span seed that computes what the host computes between the ends of the span (nothing, for a
  span of one module) is merged into their weights: a rank-one update of one weight, or one more
  hidden unit of `first -> activation -> last`. What the host computes there is read from its own
  code (`tracing`), and checked with numbers.
* Other span seeds become a block of two ordinary `Linear` layers beside the span, where the span is
  one module or the whole of its parent.
* Chunk seeds become a block of two ordinary `Linear` layers, zero outside the chunks, that
  follows their site.

A site and its block become one module in the site's place. Where the site takes any number of
arguments, or the host reads more of it than its output, it stays what it is, and the block is a
part of it that runs as a forward hook (which `torch.fx.symbolic_trace` does not see on modules
that it takes as one call; `torch.export` does).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import GRAFTED_STAGES, STAGE
from esper.surgery import folded, linear_maps
from esper.surgery.lattice import Attached, Lattice
from esper.surgery.sites import common_parent, output_channels
from esper.surgery.tracing import (
    HostTrace,
    UnprovenError,
    gives_tuple,
    reads_parts,
    trace_host,
)
from esper_kernels import PHI, Phi

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# changes in the order in which they are possible: rank-one updates are planned for the shapes that
# widening changes, and a block wraps the module that it follows
_UPDATE, _WIDEN, _BLOCK = range(3)
_NONE: frozenset[nn.Module] = frozenset()


class FoldError(ValueError):
    """A seed has no plain equivalent where it sits; the model is unchanged."""


@dataclass(frozen=True)
class _Plan:
    """One change of the model, and which other seeds would not survive it.

    Attributes:
        attached: Whose seeds it folds.
        order: Plans are carried out in this order.
        change: Carries it out.
        block_at: The module that gets a block; None if the seeds are merged.
        before: Modules with no block of a chunk site that was attached before this site.
        after: The same for chunk sites that were attached after it.
        resized: Modules with no block of a span, since their width changes.
    """

    attached: Attached
    order: tuple[int, float]
    change: Callable[[], None]
    block_at: nn.Module | None = None
    before: frozenset[nn.Module] = _NONE
    after: frozenset[nn.Module] = _NONE
    resized: frozenset[nn.Module] = _NONE


def fold_model(lattice: Lattice) -> nn.Module:
    """Fold every grafted seed (alpha > 0) into plain modules and detach the lattice.

    The folded model is exported as any other, with a batch of any size::

        batch = {0: torch.export.Dim.DYNAMIC}
        program = torch.export.export(folded.eval(), (x,), dynamic_shapes=(batch,))
        torch.onnx.export(folded.eval(), (x,), dynamo=True, dynamic_shapes=(batch,)).save("m.onnx")

    Args:
        lattice: The handle; afterwards it is empty.

    Returns:
        The same model object. In evaluation mode it computes what it computed with the lattice, up
        to rounding. In training mode a dropout of the host between the ends of a span drops merged
        units as well, and one behind a span leaves blocks alone.

    Raises:
        FoldError: If seeds have no plain equivalent where they sit; nothing is changed then.
    """
    sites = [a for a in lattice.attached.values() if _grafted(a.layer)]
    plans = [plan for i, a in enumerate(sites) for plan in _plans(lattice, sites[:i], a)]
    _require_separate(sites, plans)
    model = lattice.detach()
    for plan in sorted(plans, key=lambda plan: plan.order):
        plan.change()
    return model


def _grafted(layer: KasminaLayer) -> list[int]:
    """Seeds that add something to the host's output."""
    stages, alphas = layer.state[:, STAGE].tolist(), layer.alpha.tolist()
    kinds = layer.phi.tolist()
    return [
        i
        for i, stage in enumerate(stages)
        if stage in GRAFTED_STAGES and alphas[i] > 0 and kinds[i] != Phi.ZERO
    ]


def _require_separate(sites: list[Attached], plans: list[_Plan]) -> None:
    """Refuse blocks that would not see, or not fit, what the fold of another site makes."""
    for block in (p for p in plans if p.block_at is not None):
        for other in (p for p in plans if p.attached is not block.attached):
            if block.attached.layer.geometry == "span":
                closed = other.resized
            elif sites.index(block.attached) < sites.index(other.attached):
                closed = other.before
            else:
                closed = other.after
            if block.block_at in closed:
                raise FoldError(
                    f"grafted seeds of '{block.attached.site.name}' and "
                    f"'{other.attached.site.name}' must not share a module to be folded, unless "
                    f"the chunk site was attached {'last' if other.block_at is None else 'first'} "
                    "and sits at the span's end; keep the lattice for this model."
                )


def _plans(lattice: Lattice, earlier: list[Attached], attached: Attached) -> list[_Plan]:
    """The changes that one site needs; made before anything is touched."""
    layer, site, index = attached.layer, attached.site, len(earlier)
    seeds = _grafted(layer)
    if layer.geometry == "chunk":
        return [_plan_block(lattice, index, attached, seeds)]
    if site.first != site.last:
        return _plan_span(lattice, index, attached, seeds)
    merged = [s for s in seeds if int(layer.phi[s]) == Phi.IDENTITY]
    try:
        _require_mergeable(lattice, attached, site.last)
    except UnprovenError:
        merged = []
    if any(a.layer.geometry == "chunk" and a.site.last == site.last for a in earlier):
        # chunk seeds that came first do not read what these add
        merged = []
    plans = []
    if merged:
        end = lattice.model.get_submodule(site.last)
        plans.append(_Plan(attached, (_UPDATE, index), partial(_update, end, layer, merged)))
    if rest := [s for s in seeds if s not in merged]:
        plans.append(_plan_block(lattice, index, attached, rest))
    return plans


def _plan_block(lattice: Lattice, index: int, attached: Attached, seeds: list[int]) -> _Plan:
    """A block that follows the site, or lies beside it if it is a span of one module."""
    layer, path = attached.layer, attached.site.last
    site = lattice.model.get_submodule(path)
    _require_wrappable(lattice.model, path)
    span, axis = layer.geometry == "span", layer.channel_axis
    blocks = _blocks(lattice, attached, site, seeds)
    if folded.has_fixed_signature(site) and not reads_parts(lattice.model, path):
        new = _traced(path, folded.folded_site, site, blocks, axis, 0 if span else None)
        # what was attached later is further out: it is put in place first, and the others inside
        order, change = -index, partial(_replace, lattice.model, site, new)
    elif isinstance(site, _CONTAINERS):
        raise FoldError(
            f"'{path}' must take a fixed number of arguments, and have no parts that the host's "
            f"code reads, to be folded, since it is a {type(site).__name__}; attach to the module "
            "inside it that gives its output."
        )
    else:
        new = _traced(path, folded.folded_hook, blocks, axis, span)
        order, change = index, partial(_follow, site, new)
    return _Plan(attached, (_BLOCK, order), change, block_at=site)


def _plan_span(lattice: Lattice, index: int, attached: Attached, seeds: list[int]) -> list[_Plan]:
    """Wider layers for the seeds that compute the host's own function, a block for the others."""
    layer, site, model = attached.layer, attached.site, lattice.model
    first, last = model.get_submodule(site.first), model.get_submodule(site.last)
    parent = model.get_submodule(common_parent(site.first, site.last))
    groups = folded.by_phi(layer, seeds)
    reasons: dict[int, str] = {}
    try:
        traces = trace_host(parent, first, last)
    except UnprovenError as error:
        raise _no_place(attached, reasons, error) from error
    for phi in groups:
        try:
            _require_own_function(lattice, attached, traces, phi)
        except UnprovenError as error:
            reasons[phi] = str(error)
    merged = [s for phi, group in groups.items() if phi not in reasons for s in group]
    plans = []
    if merged:
        between = {part for t in traces for m in t.between() for part in m.modules()}
        inside = frozenset({first, *_holders(parent, first, last)} | between)
        change = partial(_widen, first, last, layer, merged)
        ends = inside | {last}
        plans.append(
            _Plan(attached, (_WIDEN, index), change, before=ends, after=inside, resized=ends)
        )
    if reasons:
        rest = [s for s in seeds if s not in merged]
        try:
            plans.append(_plan_beside(lattice, attached, traces, rest))
        except UnprovenError as error:
            raise _no_place(attached, reasons, error) from error
    return plans


def _plan_beside(
    lattice: Lattice, attached: Attached, traces: list[HostTrace], seeds: list[int]
) -> _Plan:
    """A block beside the module that runs both ends, if it does nothing else.

    Raises:
        UnprovenError: If it does, or cannot be replaced.
    """
    model, site, axis = lattice.model, attached.site, attached.layer.channel_axis
    path = common_parent(site.first, site.last)
    parent = model.get_submodule(path)
    sources = {trace.input_index() for trace in traces}
    if len(sources) > 1:
        raise UnprovenError("which of its arguments it reads depends on the optional ones")
    if not path:
        raise UnprovenError("the model itself cannot be replaced")
    if not folded.has_fixed_signature(parent):
        raise UnprovenError("its forward takes a variable number of arguments")
    _require_wrappable(model, path)
    blocks = _blocks(lattice, attached, parent, seeds)
    new = _traced(path, folded.folded_site, parent, blocks, axis, sources.pop())
    first, last = model.get_submodule(site.first), model.get_submodule(site.last)
    behind = frozenset(_holders(parent, last, first)).union(*(t.after() for t in traces))
    return _Plan(
        attached, (_BLOCK, math.inf), partial(_replace, model, parent, new),
        block_at=parent, before=behind, after=behind | {last},
    )  # fmt: skip


def _no_place(attached: Attached, reasons: dict[int, str], error: UnprovenError) -> FoldError:
    site = attached.site
    parent = common_parent(site.first, site.last) or "the model"
    kinds = reasons or folded.by_phi(attached.layer, _grafted(attached.layer))
    names = ", ".join(sorted(n for n in BLUEPRINTS if BLUEPRINTS[n].phi in kinds))
    why = "; ".join(dict.fromkeys(reasons.values())) or str(error)
    return FoldError(
        f"the seeds of '{site.name}' must compute the host's own function between the span's ends "
        f"to become units of wider layers, but they are {names}, and: {why}. Nor can they become "
        f"a block beside '{parent}', which runs both ends, since: {error}. Use a blueprint of the "
        "host's own activation, or keep the lattice for this model."
    )


def _require_own_function(
    lattice: Lattice, attached: Attached, traces: list[HostTrace], phi: int
) -> None:
    """Check that units of this kind may be merged into both ends of a span.

    Raises:
        UnprovenError: If not, or if that cannot be shown.
    """
    layer, site, model = attached.layer, attached.site, lattice.model
    for path in (site.first, site.last):
        _require_mergeable(lattice, attached, path)
    for trace in traces:
        for module in trace.between():
            for part in module.modules():
                _require_no_hooks(lattice, part)
        first = model.get_submodule(site.first)
        width = output_channels(first)
        assert width is not None
        trace.require_elementwise(
            partial(_units, phi, layer.channel_axis),
            linear_maps.hidden_of(first, width[0] + layer.num_seeds),
        )


def _units(phi: int, axis: int, z: Tensor) -> Tensor:
    rows = z.movedim(axis, -1)
    return PHI[phi](rows.flatten(0, -2)).view(rows.shape).movedim(-1, axis)


def _require_mergeable(lattice: Lattice, attached: Attached, path: str) -> None:
    """Check that the weights at an end of a span may be changed for this span alone.

    Raises:
        UnprovenError: If it is no linear map of the channels, or shares itself or its weights
            with another place of the model.
    """
    model = lattice.model
    module = model.get_submodule(path)
    known = output_channels(module)
    if not linear_maps.is_linear_map(module) or known is None:
        raise UnprovenError(
            f"'{path}' is a {type(module).__name__} that no unit can be merged into"
        )
    if known[1] != attached.layer.channel_axis:
        raise UnprovenError(f"'{path}' has its channels on axis {known[1]}")
    places = [m for parent in model.modules() for m in parent._modules.values() if m is module]
    owned = {id(p) for p in module._parameters.values() if p is not None}
    uses = [p for m in model.modules() for p in m._parameters.values() if id(p) in owned]
    if len(places) > 1 or len(uses) > len(owned):
        raise UnprovenError(f"'{path}' shares its weights with another place of the model")
    _require_no_hooks(lattice, module)


def _require_no_hooks(lattice: Lattice, module: nn.Module) -> None:
    ours = {hook.id for a in lattice.attached.values() for hook in a.hooks}
    if not ours.issuperset([*module._forward_hooks, *module._forward_pre_hooks]):
        raise UnprovenError(f"a {type(module).__name__} of the span has hooks of its own")


def _holders(parent: nn.Module, one: nn.Module, other: nn.Module) -> list[nn.Module]:
    """Modules of a parent that hold one of two modules."""
    held = [(m, {*m.modules()}) for m in parent.modules() if m is not one]
    return [m for m, inner in held if one in inner and other not in inner]


def _blocks(
    lattice: Lattice, attached: Attached, site: nn.Module, seeds: list[int]
) -> nn.ModuleList:
    """The seeds as modules, in the dtype and mode of the site."""
    layer = attached.layer
    make = folded.chunk_blocks if layer.geometry == "chunk" else folded.span_blocks
    host = [*site.parameters(), *lattice.host_parameters()]
    ours = {id(p) for p in lattice.parameters()}
    dtypes = [p.dtype for p in host if id(p) not in ours and p.is_floating_point()]
    return make(layer, seeds).to(dtypes[0] if dtypes else None).train(site.training)


def _traced(path: str, build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    try:
        return build(*args)
    # a user's own function may break a trace in any way
    except Exception as error:
        raise FoldError(
            f"'{path}' and its seeds must be traceable by torch.fx to be folded, but: {error}; "
            "keep the lattice for this model."
        ) from error


def _require_wrappable(model: nn.Module, path: str) -> None:
    """Check that a module may be followed by a block.

    Raises:
        FoldError: If torch's own composite modules read its attributes, or it gives a tuple.
    """
    parts = path.split(".")
    site = model.get_submodule(path)
    involved = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    if isinstance(site, nn.MultiheadAttention | nn.RNNBase):
        involved.append(site)
    for module in involved:
        kind = type(module)
        if kind.__module__.startswith("torch.nn.modules.") and not (
            isinstance(module, _CONTAINERS) or kind is nn.Module
        ):
            raise FoldError(
                f"the seeds of '{path}' must not sit on or in a {type(module).__name__} to be "
                "folded, since it needs its own parts as they are; keep the lattice for this model."
            )
    if gives_tuple(site):
        raise FoldError(
            f"'{path}' must give one tensor to be folded, but its forward returns a tuple; "
            "attach to the module inside it that computes the tensor."
        )


def _update(linear: nn.Module, layer: KasminaLayer, seeds: list[int]) -> None:
    out = folded.outgoing(layer, seeds)
    linear_maps.add_update(linear, out.t() @ layer.w_in[seeds], layer.bias[seeds] @ out)


def _widen(first: nn.Module, last: nn.Module, layer: KasminaLayer, seeds: list[int]) -> None:
    linear_maps.add_outputs(first, layer.w_in[seeds], layer.bias[seeds])
    linear_maps.add_inputs(last, folded.outgoing(layer, seeds))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the model has it."""
    places = [(m, n) for m in model.modules() for n, child in m._modules.items() if child is old]
    for parent, name in places:
        parent.register_module(name, new)


def _follow(site: nn.Module, hook: nn.Module) -> None:
    """Let a module's output pass through a hook that is one of its own parts."""
    taken = sum(name.startswith("folded") for name, _ in site.named_children())
    site.add_module(f"folded_{taken}" if taken else "folded", hook)
    # the handle is kept, since a pickle keeps its hooks apart from later ones only with it
    hook.__dict__["handle"] = site.register_forward_hook(hook)
