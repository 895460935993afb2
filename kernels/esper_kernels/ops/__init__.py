"""Triton kernels of the seed lattice, one file a geometry, each with its launcher."""
