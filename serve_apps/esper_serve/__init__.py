"""The HTTP deployment of Tamiyo, the controller, on Ray Serve; not written yet.

The package exists so that its place in the import order is held. Until it is written, controllers
decide inside the trial: see `esper.controller`.
"""
