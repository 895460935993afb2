"""Blueprints: what a seed computes. One decorator adds your own.

Example:
    >>> import torch
    >>> @blueprint("sine")
    ... def sine(z: torch.Tensor) -> torch.Tensor:
    ...     return torch.sin(z)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from esper.registry import Registry
from esper_kernels import Phi, register_phi

Geometry = Literal["chunk", "span"]


@dataclass(frozen=True)
class Blueprint:
    """A named function of the hidden units, and how many of them it uses.

    Attributes:
        name: Name in the registry.
        phi: Code of the function in `esper_kernels.PHI`.
        hidden_frac: Share of a chunk seed's hidden units in use, in [0, 1]; at least one
            unit unless it is 0. Span seeds have one unit each.
        geometries: Where it may be used.
        even_hidden: Whether the number of hidden units must be even.
    """

    name: str
    phi: int
    hidden_frac: float = 1.0
    geometries: frozenset[Geometry] = frozenset({"chunk", "span"})
    even_hidden: bool = False

    @property
    def elementwise(self) -> bool:
        """Whether each hidden unit is a function of one number, so that units can be matched."""
        return self.hidden_frac > 0 and "span" in self.geometries

    def hidden(self, available: int) -> int:
        """Hidden units in use out of the site's `available` ones."""
        return max(1, int(available * self.hidden_frac)) if self.hidden_frac else 0

    def parameters(self, geometry: Geometry, fan_in: int, hidden: int, fan_out: int) -> int:
        """Parameters of one seed.

        Args:
            geometry: The site's geometry.
            fan_in: Channels read: a chunk's width C, or the span's input features.
            hidden: Hidden units of the site's seeds (1 for span sites).
            fan_out: Channels written: C, or the span's output features.
        """
        if self.phi == Phi.ZERO:
            return 0
        if self.phi == Phi.DIAGONAL:
            return 2 * fan_out
        used = hidden if geometry == "span" else self.hidden(hidden)
        outgoing = used // 2 if self.phi == Phi.GLU else used
        return used * (fan_in + 1) + outgoing * fan_out

    def fits(self, geometry: Geometry, hidden: int) -> bool:
        """Whether `require` would accept the site."""
        try:
            self.require(geometry, hidden)
        except ValueError:
            return False
        return True

    def require(self, geometry: Geometry, hidden: int) -> None:
        """Check that the blueprint can be used on a site.

        Raises:
            ValueError: If the geometry or the number of hidden units does not fit.
        """
        if geometry not in self.geometries:
            names = [b.name for b in BLUEPRINTS.values() if geometry in b.geometries]
            raise ValueError(
                f"blueprint on a {geometry} site must be one of {', '.join(names)}, "
                f"but got '{self.name}'."
            )
        if self.even_hidden and hidden % 2:
            raise ValueError(
                f"hidden must be even for blueprint '{self.name}', but got {hidden}; "
                "set `hidden` of the site to an even number."
            )
        if self.phi == Phi.DIAGONAL and hidden < 2:
            raise ValueError(
                f"hidden must be at least 2 for blueprint '{self.name}', but got {hidden}; "
                "set `hidden` of the site."
            )


BLUEPRINTS: Registry[Blueprint] = Registry("blueprint")


def blueprint(
    name: str, *, hidden_frac: float = 1.0, chunk_only: bool = False
) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """Register the decorated function of the hidden units as a blueprint.

    The function maps z, `[T, n, H]`-like with the hidden units last (`[T, n]` on span sites),
    to the same shape. It must be differentiable, and its derivative must not vanish everywhere
    for random z, or the seed would be dead for ever.

    Args:
        name: A new name.
        hidden_frac: Share of the hidden units in use.
        chunk_only: True if the function mixes the hidden units of a seed; it then uses all.

    Raises:
        ValueError: If the name is taken or `hidden_frac` is not in (0, 1], or not 1 for a
            function that mixes the hidden units.
    """
    if not 0 < hidden_frac <= 1:
        raise ValueError(f"hidden_frac must be in (0, 1], but got {hidden_frac}.")
    if chunk_only and hidden_frac != 1:
        raise ValueError(
            f"hidden_frac must be 1 for a function that mixes the hidden units, "
            f"but got {hidden_frac}; set `hidden` of the site instead."
        )

    def add(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        geometries: frozenset[Geometry] = frozenset({"chunk"} if chunk_only else {"chunk", "span"})
        BLUEPRINTS.register(name)(Blueprint(name, register_phi(function), hidden_frac, geometries))
        return function

    return add


def blueprint_id(name: str) -> int:
    """Index of a blueprint in the registry, as stored in the state tensor.

    Raises:
        UnknownNameError: If nobody registered the name.
    """
    return BLUEPRINTS.index(name)


_CHUNK: frozenset[Geometry] = frozenset({"chunk"})
for _built_in in (
    # id 0: what a dormant seed is
    Blueprint("noop", Phi.ZERO, hidden_frac=0.0),
    Blueprint("scale_shift", Phi.DIAGONAL, hidden_frac=0.0, geometries=_CHUNK),
    Blueprint("low_rank", Phi.IDENTITY, hidden_frac=0.5),
    Blueprint("mlp_relu", Phi.RELU),
    Blueprint("mlp_gelu", Phi.GELU),
    Blueprint("mlp_silu", Phi.SILU),
    Blueprint("glu", Phi.GLU, geometries=_CHUNK, even_hidden=True),
):
    BLUEPRINTS.register(_built_in.name)(_built_in)
