"""Seeds: their state, their lifecycle, and the layer that runs all seeds of a site at once."""
