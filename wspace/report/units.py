"""Units of two models: correlations before and after matching, and how good the pairs are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wspace.align.activations.units import GroupUnits, UnitReport
from wspace.errors import MeasureError, message
from wspace.report.drawing import pooled, short
from wspace.report.page import figure_bytes, write_whole
from wspace.report.paint import COLOURS, DIM, FAINT, INK, NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 2.15  # inches of a panel's side
ACROSS = (0.55, 2.95, 5.75, 8.55)  # inches from the left: two matrices, two curves
ROW = 3.05  # inches from one group to the next
MOST = 160  # cells of a matrix along one side


def plot_units(
    report: UnitReport,
    path: str | Path | None = None,
    *,
    groups: Sequence[str] | None = None,
    title: str = "",
) -> "Figure":
    """Four panels for each group: do the units of two models do the same?

    Correlations of all pairs of units as the models are; the same with the units of both in the
    order of how well they are matched; correlations of pairs, one to one and one to many, beside
    what shuffled samples give; and how much of a unit few units of the other model predict.

    Args:
        report: From `wspace.align.compare_units`.
        path: Where to write it, in the format of its suffix; None to write nothing.
        groups: Which to show; the first four if None.
        title: Over the picture.

    Returns:
        The figure.

    Raises:
        MeasureError: If the report lacks a group, or has none.
    """
    shown = list(report.groups)[:4] if groups is None else list(groups)
    wrong = [name for name in shown if name not in report.groups]
    if wrong or not shown:
        raise MeasureError(
            message(
                "plot_units: groups that were not compared",
                expected=f"some of {list(report.groups)}",
                got=wrong or "none",
            )
        )
    figure = _figure([report.groups[name] for name in shown], title)
    if path is not None:
        write_whole(path, figure_bytes(figure, Path(path).suffix.removeprefix(".") or "png"))
    return figure


def _figure(groups: Sequence[GroupUnits], title: str) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    top = 0.4 if title else 0.1
    wide, tall = ACROSS[-1] + PANEL + 0.2, ROW * len(groups) + top
    figure = Figure(figsize=(wide, tall), facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.text(
            0.12 / wide, 1 - 0.12 / tall, title, size=11, weight="bold", color=INK, va="top"
        )
    for row, group in enumerate(groups):
        low = tall - top - ROW * (row + 1) + 0.45
        axes = [figure.add_axes((x / wide, low / tall, PANEL / wide, PANEL / tall)) for x in ACROSS]
        _matrices(axes[:2], group)
        _pairs(axes[2], group)
        _prediction(axes[3], group)
        head = f"{group.name} · {len(group.pairs):,} units · {group.samples:,} samples"
        where = ", ".join(dict.fromkeys(group.results))
        figure.text(ACROSS[0] / wide, (low + PANEL + 0.3) / tall, head, size=9, weight="bold",
                    color=INK)  # fmt: skip
        figure.text(ACROSS[2] / wide, (low + PANEL + 0.3) / tall, short(where, 90), size=7.5,
                    color=DIM)  # fmt: skip
    return figure


def _matrices(axes: Sequence[Any], group: GroupUnits) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    order = group.matched.argsort(descending=True)
    found = group.correlation[order][:, group.pairs[order]]
    colours = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])
    for ax, matrix, name in zip(
        axes, (group.correlation, found), ("as they are", "matched, best first"), strict=True
    ):
        cells = min(len(matrix), MOST)
        image = pooled(matrix.numpy(), cells, cells)
        ax.imshow(image, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, size=8, color=INK, pad=3)
        ax.set_xlabel("units of b", size=7.5, color=DIM, labelpad=3)
        ax.set_ylabel("units of a", size=7.5, color=DIM, labelpad=3)
        for spine in ax.spines.values():
            spine.set_color(FAINT)


def _pairs(ax: Any, group: GroupUnits) -> None:
    curves = (
        ("one to many", group.best, COLOURS[1]),
        ("one to one", group.matched, COLOURS[0]),
        ("one to one, shuffled samples", group.chance, FAINT),
    )
    for name, values, colour in curves:
        y = values.sort(descending=True)[0].numpy()
        ax.plot(np.linspace(0, 1, len(y)), y, color=colour, lw=1.6, label=name)
    lows = [float(v.min()) for _, v, _ in curves]
    ax.set(xlim=(0, 1), ylim=(min(0.0, *lows) - 0.02, 1.02), xticks=[0, 0.5, 1])
    _plain(ax, "correlation with the partner", "share of units")
    ax.legend(frameon=False, fontsize=6.5, labelcolor=INK, loc="lower left", handlelength=1.2,
              bbox_to_anchor=(0, 0.12))  # fmt: skip


def _prediction(ax: Any, group: GroupUnits) -> None:
    alive = group.alive if bool(group.alive.any()) else ~group.alive
    errors = group.errors[:, alive].numpy()
    terms = np.arange(len(errors))
    for low, high, alpha in ((0.1, 0.9, 0.15), (0.25, 0.75, 0.3)):
        ax.fill_between(terms, np.quantile(errors, low, 1), np.quantile(errors, high, 1),
                        color=COLOURS[2], alpha=alpha, lw=0)  # fmt: skip
    ax.plot(terms, np.median(errors, 1), color=COLOURS[2], lw=1.6)
    ax.annotate("median", (terms[-1], float(np.median(errors[-1]))), xytext=(0, 4), size=6.5,
                textcoords="offset points", ha="right", color=INK)  # fmt: skip
    ax.set(xlim=(0, len(errors) - 1), ylim=(-0.02, 1.02))
    ax.xaxis.get_major_locator().set_params(integer=True)
    _plain(ax, "variance left unexplained", "units of b that predict one of a")


def _plain(ax: Any, title: str, below: str) -> None:
    ax.set_title(title, size=8, color=INK, pad=3)
    ax.set_xlabel(below, size=7.5, color=DIM, labelpad=2)
    ax.tick_params(labelsize=7, colors=DIM, length=2.5, color=FAINT)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
