"""Configurations: YAML in, frozen models out, and errors that say what to write instead."""
