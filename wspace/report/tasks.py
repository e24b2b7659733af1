"""Accuracy of each task after each task: what was learned, and what was forgotten."""

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wspace.errors import MeasureError, message
from wspace.report.page import figure_bytes, write_whole
from wspace.report.paint import DIM, INK, POSITIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.42  # inches of one cell


def plot_tasks(
    matrices: Mapping[str, Tensor],
    path: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    chance: float = 0.0,
) -> "Figure":
    """Matrices of accuracies beside each other, in per cent; all on one scale.

    Args:
        matrices: By title, ``(tasks, tasks)``: accuracy on task j (column) after task i (row) was
            learned, from 0 to 1, NaN where it was not measured.
        path: Where to write it, in the format of its suffix; None to write nothing.
        names: Names of the tasks; their numbers if None.
        chance: Accuracy that is shown white.

    Returns:
        The figure.

    Raises:
        MeasureError: If there is no matrix, they are not square and of one size, or names are of
            another number.
    """
    shapes = {tuple(m.shape) for m in matrices.values()}
    if len(shapes) != 1 or any(len(s) != 2 or s[0] != s[1] or not s[0] for s in shapes):
        raise MeasureError(
            message("plot_tasks: matrices of accuracies", expected="square, of one size",
                    got=[str(s) for s in sorted(shapes)] or "none")
        )  # fmt: skip
    count = next(iter(shapes))[0]
    if chance >= 1 or (names is not None and len(names) != count):
        raise MeasureError(
            message("plot_tasks: names and chance", expected=f"{count} names, chance below 1",
                    got=f"{None if names is None else len(names)} names, chance {chance}")
        )  # fmt: skip
    known = list(names) if names else [str(k + 1) for k in range(count)]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (len(matrices) * (CELL * count + 0.5) + 0.3, CELL * count + 1.1)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        _panel(ax, title, matrix.detach().cpu(), known, chance)
    axes[0].set_ylabel("after task", size=8, color=INK)
    if path is not None:
        write_whole(path, figure_bytes(figure, Path(path).suffix.removeprefix(".") or "png"))
    return figure


def _panel(ax: Any, title: str, matrix: Tensor, names: Sequence[str], chance: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("right", ["#ffffff", POSITIVE])
    ax.imshow(matrix.double().nan_to_num(chance).numpy(), cmap=colours, vmin=chance, vmax=1.0)
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            if not isnan(value):
                light = (value - chance) / (1 - chance) > 0.6
                ax.text(j, i, f"{100 * value:.0f}", size=7.5, ha="center", va="center",
                        color="white" if light else INK)  # fmt: skip
    ax.set_title(title, size=8.5, color=INK, pad=5)
    ax.set_xlabel("task", size=8, color=INK)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(colors=DIM, labelsize=7.5, length=0)
    ax.spines[:].set_visible(False)
