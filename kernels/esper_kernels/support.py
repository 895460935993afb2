"""Which sites the kernels serve; every other takes the plain implementation."""

from collections.abc import Set

import torch

from esper_kernels.phi import FIRST_CUSTOM, Phi

# a chunk beyond this is a matrix product of its own, not a part of a tile
MAX_CHUNK = 128
# elements of a tile's weights, one way: both ways have to stay on the chip
MAX_TILE = 16384


def fits_a_tile(C: int, H: int, dtype: torch.dtype) -> bool:
    """Whether chunks of C channels with H hidden units are fine enough to share tiles.

    Args:
        C: Channels of a chunk.
        H: Hidden units of a seed.
        dtype: Of the activations.
    """
    size = max(16, power_of_2(C)) * max(16, power_of_2(H))
    return C <= MAX_CHUNK and size * (2 if dtype == torch.float32 else 1) <= MAX_TILE


def needs_plain(codes: Set[int], C: int = 1, H: int = 1) -> bool:
    """Whether seeds with these functions cannot run in the kernels.

    A function that only exists in Python cannot; nor can, on chunks too wide for a tile, one
    that is no function of one hidden unit.

    Args:
        codes: Codes of the functions (`esper_kernels.Phi`) on the site.
        C: Channels of a chunk; for chunk sites only.
        H: Hidden units of a seed; for chunk sites only.
    """
    fine = fits_a_tile(C, H, torch.float32)
    return any(c >= FIRST_CUSTOM or (c in (Phi.GLU, Phi.DIAGONAL) and not fine) for c in codes)


def power_of_2(n: int) -> int:
    """The next power of two, n itself included."""
    return 1 << (n - 1).bit_length()
