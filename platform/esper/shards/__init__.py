"""Shards: what trains a trial's model, in the trial's own process or in Ray actors."""
