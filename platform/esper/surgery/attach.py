"""Attaching: the places that a pattern names get their layers, in place, or nothing changes."""

from typing import get_args

import torch
from torch import nn

from esper.config.run import GrowthConfig
from esper.seeds.blueprints import BLUEPRINTS, Geometry
from esper.seeds.kasmina import KasminaLayer
from esper.surgery.lattice import HANDLE, Attached, Lattice, lattice_of
from esper.surgery.sites import Site, find_sites, input_features, output_channels


def attach(
    model: nn.Module,
    sites: str,
    seeds_per_layer: int,
    *,
    geometry: Geometry = "chunk",
    hidden: int | None = None,
    channels: int | None = None,
    channel_axis: int | None = None,
    biased: bool | None = None,
    growth: GrowthConfig | None = None,
    seed: int | None = None,
) -> Lattice:
    """Give every matching site of a model a lattice of dormant seeds, in place.

    The model's output stays the same bit for bit until a seed is grafted, and its own
    `state_dict` keys stay as they are. Several calls on one model share one handle.

    Args:
        model: Any PyTorch model; its code is not touched.
        sites: Module path or glob, or a span `a->b` inside one module that runs both ends.
        seeds_per_layer: Seeds at each site; for chunk sites a divisor of the channels.
        geometry: 'chunk', or 'span' for units across a module or span.
        hidden: Hidden units of a chunk seed; None: the chunk's width, at least 2.
        channels: Channels of the site's output, where its type does not tell.
        channel_axis: Axis of the channels; None: known from the type, else the last.
        biased: Whether units of a span have a bias; None: as the span's first module.
        growth: Times, thresholds and limits; None leaves them as they are.
        seed: Seed of the lattice's random draws; None leaves it as it is (0 at first).

    Returns:
        The handle.

    Raises:
        ValueError: If nothing matches, a site has a lattice already, or sizes do not fit;
            the model is then unchanged.
    """
    if geometry not in get_args(Geometry):
        raise ValueError(f"geometry must be 'chunk' or 'span', but got '{geometry}'.")
    lattice = lattice_of(model) or Lattice(model)
    found = find_sites(model, sites, geometry)
    for name in {n for s in found for n in (growth or lattice.growth).scored_at(s.name)}:
        if not BLUEPRINTS[name].elementwise:
            raise ValueError(
                "scored_blueprint must have hidden units that are functions of one number, but got "
                f"'{name}'; use 'mlp_relu' or 'low_rank'."
            )
    layers = [
        _make_layer(
            model, site, lattice, seeds_per_layer, geometry, hidden, channels, channel_axis, biased
        )
        for site in found
    ]
    # everything fits: only now is the model touched
    for site, layer in zip(found, layers, strict=True):
        lattice.attached[site.name] = _hook(model, site, layer)
    lattice.growth = growth or lattice.growth
    lattice.seed = lattice.seed if seed is None else seed
    lattice.configure_layers()
    model.__dict__[HANDLE] = lattice
    return lattice


def biased_as_host(model: nn.Module, first: str, geometry: str) -> bool:
    """Whether units have a bias if nobody says so: those of a span are made as the host's own."""
    return geometry == "chunk" or getattr(model.get_submodule(first), "bias", True) is not None


def _make_layer(
    model: nn.Module, site: Site, lattice: Lattice, num_seeds: int, geometry: Geometry,
    hidden: int | None, channels: int | None, channel_axis: int | None, biased: bool | None,
) -> KasminaLayer:  # fmt: skip
    if site.name in lattice.attached:
        raise ValueError(
            f"sites must have no lattice yet, but '{site.name}' has one; attach once a site."
        )
    last = model.get_submodule(site.last)
    if _owner(last) is None or type(last).forward is nn.Module.forward:
        raise ValueError(
            f"sites must be modules that compute something, but '{site.last}' is "
            f"{'an empty' if _owner(last) is None else 'a'} {type(last).__name__}; "
            "name the modules inside it or around it."
        )
    known = output_channels(last)
    if channels is None and known is None:
        raise ValueError(
            f"channels must be given for '{site.last}', since a {type(last).__name__} does not "
            "tell its width; pass `channels` (and `channel_axis` if it is not the last)."
        )
    width, axis = known or (0, -1)
    inputs = input_features(model.get_submodule(site.first)) if geometry == "span" else None
    if geometry == "span" and inputs is None:
        kind = type(model.get_submodule(site.first)).__name__
        raise ValueError(
            f"sites must be spans that begin at a Linear, Conv or norm module, "
            f"but '{site.first}' is a {kind}; begin the span one module later or earlier."
        )
    if biased is not None and geometry == "chunk":
        raise ValueError(
            f"biased must be left out for a chunk site, whose units have one, but got {biased}."
        )
    tensor = next(last.parameters(), next(model.parameters(), torch.zeros(())))
    layer = KasminaLayer(
        channels or width, num_seeds, geometry=geometry, hidden=hidden, in_features=inputs,
        channel_axis=axis if channel_axis is None else channel_axis,
        biased=biased_as_host(model, site.first, geometry) if biased is None else biased,
        dtype=tensor.dtype, device=tensor.device,
    )  # fmt: skip
    return layer.train(last.training)


def _owner(module: nn.Module) -> nn.Module | None:
    """Where the layer is registered: a container would run it, or index it, as its own child."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next((m for m in module.modules() if not isinstance(m, containers)), None)


def _hook(model: nn.Module, site: Site, layer: KasminaLayer) -> Attached:
    last, first = model.get_submodule(site.last), model.get_submodule(site.first)
    owner = _owner(last)
    assert owner is not None
    taken = sum(name.startswith("kasmina") for name, _ in owner.named_children())
    owner.add_module(f"kasmina_{taken}" if taken else "kasmina", layer)
    hooks = [last.register_forward_hook(layer.graft_output)]
    if layer.geometry == "span":
        hooks.append(first.register_forward_pre_hook(layer.capture_source))
    return Attached(site, layer, tuple(hooks))
