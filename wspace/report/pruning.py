"""How good a network is against how large it is: curves of pruning."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wspace.errors import PruneError, message
from wspace.prune.curve import Point
from wspace.report.page import figure_bytes, write_whole
from wspace.report.paint import COLOURS, DIM, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = (3.2, 2.7)  # inches of one panel
AGAINST: dict[str, Callable[[Point], float | None]] = {
    "parameters": lambda p: p.parameters,
    "MACs": lambda p: p.macs,
    "latency": lambda p: None if p.latency is None else p.latency[0],
}
"""What a panel may have along its horizontal axis."""


def plot_pruning(
    curves: Sequence[Point] | Mapping[str, Sequence[Point]],
    path: str | Path | None = None,
    *,
    against: Sequence[str] | None = None,
    metric: str = "accuracy",
    title: str = "",
) -> "Figure":
    """Curves of a metric against what is left, one panel each for parameters, MACs and latency.

    Sizes are shares of the largest network of all curves. Points without a metric, or without what
    a panel is about, are left out there.

    Args:
        curves: Points of one pruning, or of several by name.
        path: Where to write it, in the format of its suffix; None to write nothing.
        against: Which of `AGAINST`; all that was measured if None.
        metric: Name of the metric.
        title: Over the picture.

    Returns:
        The figure.

    Raises:
        PruneError: If no point has a metric and a size, or there is no such panel.
    """
    named = dict(curves) if isinstance(curves, Mapping) else {"": curves}
    known = [a for a in AGAINST if any(_points(c, a) for c in named.values())]
    shown = list(known if against is None else against)
    wrong = [repr(a) for a in shown if a not in known]
    if wrong or not shown:
        raise PruneError(
            message(
                "plot_pruning: there is nothing to draw",
                expected=f"points with a metric, against {', '.join(AGAINST)}",
                got=", ".join(wrong) or "no point with a metric",
                help="IterativePruning(monitor=…) measures one, and repeats>0 the latency",
            )
        )
    figure = _figure(named, shown, metric, title)
    if path is not None:
        write_whole(path, figure_bytes(figure, Path(path).suffix.removeprefix(".") or "png"))
    return figure


def _points(curve: Sequence[Point], against: str) -> list[tuple[float, float]]:
    found = ((AGAINST[against](p), p.metric) for p in curve)
    return [(float(x), y) for x, y in found if x is not None and y is not None]


def _figure(
    named: Mapping[str, Sequence[Point]], shown: Sequence[str], metric: str, title: str
) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(PANEL[0] * len(shown), PANEL[1]), facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, size=11, weight="bold", color=INK, x=0.01, ha="left")
    axes: Any = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, what in zip(axes, shown, strict=True):
        _panel(ax, named, what)
    axes[0].set_ylabel(metric, size=8.5, color=INK)
    if len(named) > 1:
        axes[-1].legend(frameon=False, fontsize=7.5, labelcolor=INK)
    return figure


def _panel(ax: Any, named: Mapping[str, Sequence[Point]], what: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(colors=DIM, labelsize=7.5, length=3, color=FAINT)
    points = {name: sorted(_points(curve, what)) for name, curve in named.items()}
    whole = max((x for some in points.values() for x, _ in some), default=1.0) or 1.0
    for i, (name, some) in enumerate(points.items()):
        x, y = [100 * x / whole for x, _ in some], [y for _, y in some]
        ax.plot(x, y, color=COLOURS[i % len(COLOURS)], lw=1.6, marker="o", ms=3.2, label=name)
    ax.set_xlabel(f"{what} left, %", size=8.5, color=INK)
