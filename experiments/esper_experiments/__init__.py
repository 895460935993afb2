"""Experiments: paired sweeps on Ray Tune, and the entry point of the command line."""
