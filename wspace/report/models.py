"""Many models as points of a plane."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from wspace.align.distances import Embedding
from wspace.errors import MeasureError, message
from wspace.report.page import figure_bytes, write_whole
from wspace.report.paint import COLOURS, DIM, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 4.0  # inches of the picture's longer side
LEAST = 1.6  # inches of the shorter one
RIGHT = 1.35  # inches for a legend


def plot_models(
    embedding: Embedding,
    path: str | Path | None = None,
    *,
    values: Sequence[float] | Tensor | None = None,
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
) -> "Figure":
    """A map of models: near are those that are alike, by the distances that were embedded.

    Args:
        embedding: Of two dimensions, see `wspace.align.embed`.
        path: Where to write it, in the format of its suffix; None to write nothing.
        values: A number for each model, shown as colour: an accuracy, a step of training.
        labels: A class for each model, shown as colour with a legend; instead of `values`.
        names: A text beside each point.
        title: Over the picture.

    Returns:
        The figure.

    Raises:
        MeasureError: If the points are not of two dimensions, or not as many as what is shown.
    """
    points = embedding.points.numpy()
    if points.ndim != 2 or points.shape[1] != 2:
        raise MeasureError(
            message("plot_models: not points of a plane", expected="embed(distances, dims=2)",
                    got=f"shape {tuple(points.shape)}")
        )  # fmt: skip
    shown = {"values": values, "labels": labels, "names": names}
    wrong = [f"{len(x)} {n}" for n, x in shown.items() if x is not None and len(x) != len(points)]
    if wrong or (values is not None and labels is not None):
        raise MeasureError(
            message(f"plot_models: {len(points)} models", expected="one for each",
                    got=wrong or "values and labels, of which only one can be the colour")
        )  # fmt: skip
    figure, ax = _plane(
        points, embedding.explained, title, legend=bool(values is not None or labels)
    )
    if labels is not None:
        _classes(ax, points, labels)
    elif values is not None:
        _scale(figure, ax, points, np.asarray(values, dtype=float))
    else:
        ax.scatter(*points.T, s=_area(points), c=COLOURS[0], alpha=0.85, lw=0, zorder=3)
    for text, (x, y) in zip(names or (), points, strict=names is not None):
        ax.annotate(text, (x, y), xytext=(4, 3), textcoords="offset points", size=6.5, color=DIM)
    if path is not None:
        write_whole(path, figure_bytes(figure, Path(path).suffix.removeprefix(".") or "png"))
    return figure


def _plane(
    points: "np.ndarray[Any, Any]", explained: float, title: str, *, legend: bool
) -> tuple["Figure", Any]:
    """Axes on which a unit is as long one way as the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low = points.min(0) if len(points) else np.zeros(2)
    size = points.max(0) - low if len(points) else np.ones(2)
    unit = float(size.max()) or 1.0
    margin = 0.07 * unit
    inches = np.maximum(size / unit * SIDE, LEAST)
    reach = (unit + 2 * margin) * inches / SIDE  # in units, with the least size of a side
    middle = low + size / 2
    right, top = (RIGHT if legend else 0.3), (0.45 if title else 0.15)
    wide, tall = 0.3 + inches[0] + right, 0.5 + inches[1] + top
    figure = Figure(figsize=(wide, tall), facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.3 / wide, 0.5 / tall, inches[0] / wide, inches[1] / tall))
    ax.set(xlim=(middle[0] - reach[0] / 2, middle[0] + reach[0] / 2))
    ax.set(ylim=(middle[1] - reach[1] / 2, middle[1] + reach[1] / 2), xticks=[], yticks=[])
    ax.spines[:].set_color(FAINT)
    _ruler(ax, unit, f"{explained:.0%} of the spread is in this plane")
    figure.text(0.12 / wide, 1 - 0.12 / tall, title, size=11, weight="bold", color=INK, va="top")
    return figure, ax


def _ruler(ax: Any, unit: float, note: str) -> None:
    """A line of round length under the picture: the axes have no meaning, distances do."""
    step = 10.0 ** np.floor(np.log10(unit / 4))
    step *= max(k for k in (1, 2, 5) if k * step <= unit / 4)
    left, right = ax.get_xlim()
    share = step / (right - left)
    y = -0.16 / (ax.get_position().height * ax.figure.get_figheight())
    ax.plot([0, share], [y, y], transform=ax.transAxes, color=DIM, lw=1.5, clip_on=False)
    ax.annotate(f"{step:g}", (share, y), xycoords="axes fraction", xytext=(5, 0), va="center",
                textcoords="offset points", size=7.5, color=DIM, annotation_clip=False)  # fmt: skip
    ax.annotate(note, (1, y), xycoords="axes fraction", ha="right", va="center", size=7.5,
                color=DIM, annotation_clip=False)  # fmt: skip


def _area(points: "np.ndarray[Any, Any]") -> float:
    return float(np.clip(2500 / max(len(points), 1), 5, 45))


def _classes(ax: Any, points: "np.ndarray[Any, Any]", labels: Sequence[str]) -> None:
    of_class = np.asarray(labels)
    for i, label in enumerate(dict.fromkeys(labels)):
        ax.scatter(*points[of_class == label].T, s=_area(points), c=COLOURS[i % len(COLOURS)],
                   alpha=0.85, lw=0, zorder=3, label=label)  # fmt: skip
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8,
              labelcolor=INK, handletextpad=0.2)  # fmt: skip


def _scale(figure: Any, ax: Any, points: "np.ndarray[Any, Any]", values: Any) -> None:
    shown = ax.scatter(*points.T, s=_area(points), c=values, cmap="viridis", lw=0, zorder=3)
    box = ax.get_position()
    wide = figure.get_figwidth()
    bar = figure.add_axes((box.x1 + 0.18 / wide, box.y0, 0.12 / wide, box.height))
    figure.colorbar(shown, cax=bar)
    bar.tick_params(labelsize=7.5, colors=DIM, length=3, color=FAINT)
    for spine in bar.spines.values():
        spine.set_visible(False)
