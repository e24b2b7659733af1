"""Pictures and pages: spaces, graphs, losses, prunings and many models as figures; HTML files.

Nothing here prints, and nothing touches matplotlib's global state. A figure is drawn for a path
and its suffix says the format; a page holds everything it shows, so it can be sent as one file.
"""

from wspace.report.graph import plot_graph
from wspace.report.losses import plot_losses
from wspace.report.models import plot_models
from wspace.report.page import Report
from wspace.report.pruning import plot_pruning
from wspace.report.space import plot_space
from wspace.report.tasks import plot_tasks
from wspace.report.units import plot_units

__all__ = [
    "Report",
    "plot_graph",
    "plot_losses",
    "plot_models",
    "plot_pruning",
    "plot_space",
    "plot_tasks",
    "plot_units",
]
