"""Kernels of the seed lattice: all seeds of one site in one call.

Usable alone, with torch only. The public functions validate their arguments and then call an
implementation; the plain PyTorch one in `esper_kernels.reference` defines what is correct.
"""

from esper_kernels.phi import PHI, Phi, register_phi
from esper_kernels.seeds import chunk_seeds, span_seeds

__all__ = ["PHI", "Phi", "chunk_seeds", "register_phi", "span_seeds"]
