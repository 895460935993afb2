"""The regression suite: the legacy way to compute against those that replace it."""
