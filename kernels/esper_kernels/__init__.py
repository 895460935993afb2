"""Kernels of the seed lattice: all seeds of one site in one call.

Usable alone, with torch only. The public functions validate their arguments and then call an
operator of `esper_kernels.library`; the plain PyTorch implementation in
`esper_kernels.reference` defines what is correct.
"""

from esper_kernels import flops as _flops  # noqa: F401 (tells torch's counter what seeds cost)
from esper_kernels.phi import PHI, Phi, register_phi
from esper_kernels.probe import probe_size
from esper_kernels.seeds import chunk_seeds, column_statistics, gradient_energy, span_seeds

__all__ = [
    "PHI",
    "Phi",
    "chunk_seeds",
    "column_statistics",
    "gradient_energy",
    "probe_size",
    "register_phi",
    "span_seeds",
]
