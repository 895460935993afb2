"""Pictures of a sweep, each drawn from records alone and written as a PNG of 900 pixels' width."""

from esper.tracking.growth_picture import growth_curves
from esper.tracking.lattice_picture import lattice_over_time, stage_matrix
from esper.tracking.result_pictures import arms_overview, forest_plot

__all__ = ["arms_overview", "forest_plot", "growth_curves", "lattice_over_time", "stage_matrix"]
