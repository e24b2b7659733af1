"""A weight space as a matrix: which group indexes which parameter."""

from pathlib import Path
from typing import TYPE_CHECKING

from wspace.report.drawing import short
from wspace.report.page import figure_bytes, write_whole
from wspace.report.paint import COLOURS, DIM, FAINT, INK
from wspace.space import WeightSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 64  # characters of a name
MOST = 80  # rows and columns; more cannot be read


def plot_space(space: WeightSpace, path: str | Path | None = None, *, title: str = "") -> "Figure":
    """The parameters × groups of a space: a square where a group indexes a parameter.

    A parameter that a group indexes twice has a larger square. Of a very large space the first rows
    and columns are shown.

    Args:
        space: The space.
        path: Where to write it, in the format of its suffix; None to write nothing.
        title: Over the picture.

    Returns:
        The figure.
    """
    figure = _figure(space, title)
    if path is not None:
        write_whole(path, figure_bytes(figure, Path(path).suffix.removeprefix(".") or "png"))
    return figure


def _figure(space: WeightSpace, title: str) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    params, groups = space.params[:MOST], list(space.groups.values())[:MOST]
    names = [short(p.name, LONGEST) for p in params]
    left = 0.35 + 0.064 * max(map(len, names), default=0)
    cell, top = 0.21, 0.75 if title else 0.45
    wide = max(left + cell * len(groups) + 0.4, 4.0)
    tall = top + cell * len(params) + 0.25
    figure = Figure(figsize=(wide, tall), facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, wide), ylim=(tall, 0))
    ax.axis("off")
    ax.text(0.12, 0.2, title, size=11, weight="bold", color=INK, va="center")
    for column, g in enumerate(groups):
        x = left + cell * (column + 0.5)
        colour = COLOURS[column % len(COLOURS)]
        ax.plot([x, x], [top, tall - 0.2], color=FAINT, lw=0.4, zorder=1)
        ax.text(x, top - 0.06, g.name, size=7, color=colour, ha="center", va="bottom",
                rotation=90 if len(g.name) > 2 else 0, weight="bold")  # fmt: skip
        for row, p in enumerate(params):
            times = sum(h.name == g.name for axis in p.axes for h in axis.groups())
            if times:
                y = top + cell * (row + 0.5)
                ax.scatter([x], [y], s=34 + 30 * (times - 1), marker="s", color=colour, zorder=3)
    for row, p in enumerate(params):
        y = top + cell * (row + 0.5)
        ax.plot([left, wide - 0.3], [y, y], color=FAINT, lw=0.4, zorder=1)
        ax.text(left - 0.12, y, names[row], size=7, color=DIM if p.buffer else INK,
                ha="right", va="center")  # fmt: skip
    return figure
