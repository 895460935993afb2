"""Finding the places of a model that a pattern names, and what is known about their channels."""

import re
from dataclasses import dataclass

from torch import nn

_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_BATCH_NORMS = {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


@dataclass(frozen=True)
class Site:
    """One place for a lattice: a module, or a span from one module to a later one.

    Attributes:
        name: Path of the module, or `first->last`.
        first: Path of the module whose input a span reads; that of `last` for chunk sites.
        last: Path of the module whose output gets the seeds.
    """

    name: str
    first: str
    last: str


def find_sites(model: nn.Module, pattern: str, geometry: str) -> list[Site]:
    """The sites that a pattern matches, in the model's order.

    Args:
        model: The host.
        pattern: A module path or glob (`*` stands for one part of a path, or a part of it), or
            a span `a->b` whose stars stand for the same text on both sides.
        geometry: 'chunk' or 'span'.

    Raises:
        ValueError: If nothing matches, if a chunk pattern names a span, or if no one module
            runs both ends of a span.
    """
    paths = [name for name, _ in model.named_modules() if name and "kasmina" not in name]
    if "->" not in pattern:
        found = [p for p in paths if _regex(pattern).fullmatch(p)]
        _require(found, pattern, paths)
        arrow = geometry == "span"
        return [Site(f"{p}->{p}" if arrow else p, p, p) for p in found]
    if geometry == "chunk":
        raise ValueError(
            f"sites must name one module for chunk seeds, but got '{pattern}'; "
            'use geometry="span" for a span.'
        )
    left, right = (side.strip() for side in pattern.split("->", 1))
    if left.count("*") != right.count("*"):
        raise ValueError(
            f"sites must have as many stars left as right of '->', but got '{pattern}'."
        )
    sites = []
    for path in paths:
        match = _regex(left).fullmatch(path)
        if match:
            last = right
            for text in match.groups():
                last = last.replace("*", text, 1)
            if last in paths:
                sites.append(Site(f"{path}->{last}", path, last))
    _require(sites, pattern, paths)
    for site in sites:
        if _parent(site.first) != _parent(site.last) and not _runs(model, site):
            raise ValueError(
                f"sites must be spans inside one parent module that runs both ends, but got "
                f"'{site.name}'; attach to modules with the same parent."
            )
    return sites


def common_parent(first: str, last: str) -> str:
    """Path of the innermost module that holds two others; empty for the model itself."""
    shared = []
    for a, b in zip(_parent(first).split("."), _parent(last).split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def output_channels(module: nn.Module) -> tuple[int, int] | None:
    """Channels of the module's output and their axis; None if its type does not tell."""
    for kind, dims in _CONVS.items():
        if isinstance(module, kind):
            return module.out_channels, -1 - dims
    for norm, dims in _BATCH_NORMS.items():
        if isinstance(module, norm):
            return module.num_features, -1 - dims
    match module:
        case nn.Linear():
            return module.out_features, -1
        case nn.LayerNorm() | nn.RMSNorm():
            return int(module.normalized_shape[-1]), -1
        case nn.Embedding():
            return module.embedding_dim, -1
        case nn.MultiheadAttention():
            return module.embed_dim, -1
        case nn.GroupNorm():
            return module.num_channels, 1
        case nn.BatchNorm1d():
            return module.num_features, 1
    # the transposed Linear of GPT-2 in transformers
    width = getattr(module, "nf", None)
    return (width, -1) if isinstance(width, int) else None


def input_features(module: nn.Module) -> int | None:
    """Channels of the module's input; None if its type does not tell."""
    for kind in _CONVS:
        if isinstance(module, kind):
            return module.in_channels
    match module:
        case nn.Linear():
            return module.in_features
        case nn.LayerNorm() | nn.RMSNorm():
            return int(module.normalized_shape[-1])
    width = getattr(module, "nx", None)
    return width if isinstance(width, int) else None


def _regex(glob: str) -> re.Pattern[str]:
    return re.compile(re.escape(glob).replace(r"\*", "([^.]*)"))


def _runs(model: nn.Module, span: Site) -> bool:
    """Whether one module that is not the model runs both ends, rather than listing them."""
    path = common_parent(span.first, span.last)
    return bool(path) and type(model.get_submodule(path)).forward is not nn.Module.forward


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _require(found: list[str] | list[Site], pattern: str, paths: list[str]) -> None:
    if not found:
        raise ValueError(
            f"sites must match a module of the model, but '{pattern}' matches none; "
            f"its modules are: {', '.join(paths) or '(none)'}."
        )
