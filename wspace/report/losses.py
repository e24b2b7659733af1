"""Losses on the way between models, as curves: the barrier before and after matching."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wspace.align.barrier import Barrier, LossPath
from wspace.errors import MeasureError, message
from wspace.report.page import figure_bytes, write_whole
from wspace.report.paint import COLOURS, DIM, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = (3.4, 3.0)  # inches of one metric, less the labels of curves
LETTER = 0.068  # inches of a letter of these
SPREAD = 0.075  # of the height of a panel, between labels of curves


def plot_losses(
    paths: Barrier | LossPath | Mapping[str, LossPath],
    path: str | Path | None = None,
    *,
    metrics: Sequence[str] | None = None,
    ends: tuple[str, str] = ("first model", "second model"),
    title: str = "",
) -> "Figure":
    """Curves of metrics along lines between models, one panel for each metric.

    The straight line between the ends of a curve is dashed. Its label says how far the curve rises
    above that; for metrics after the first, how far it departs either way.

    Args:
        paths: A barrier, whose curves are named straight and aligned; one path; or paths by name.
        path: Where to write it, in the format of its suffix; None to write nothing.
        metrics: Which to show; all of the first path if None.
        ends: What stands at 0 and at 1.
        title: Over the picture.

    Returns:
        The figure.

    Raises:
        MeasureError: If there are no paths, or one lacks a metric.
    """
    named = _named(paths)
    shown = list(metrics or (m for p in list(named.values())[:1] for m in p.metrics))
    wrong = [f"{n!r} without {m!r}" for n, p in named.items() for m in shown if m not in p.metrics]
    if wrong or not shown:
        raise MeasureError(
            message("plot_losses: metrics that were not measured", got=wrong or "none")
        )
    figure = _figure(named, shown, ends, title)
    if path is not None:
        write_whole(path, figure_bytes(figure, Path(path).suffix.removeprefix(".") or "png"))
    return figure


def _named(paths: Barrier | LossPath | Mapping[str, LossPath]) -> dict[str, LossPath]:
    if isinstance(paths, Barrier):
        both = {"straight": paths.straight, "aligned": paths.aligned}
        return {name: p for name, p in both.items() if p is not None}
    if isinstance(paths, LossPath):
        return {"": paths}
    return dict(paths)


def _figure(
    named: Mapping[str, LossPath], shown: Sequence[str], ends: tuple[str, str], title: str
) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    top = 0.42 if title else 0.12
    right = 0.3 + LETTER * (max(map(len, named)) + len(" +0.000"))
    wide, tall = (PANEL[0] + right) * len(shown), PANEL[1] + top
    figure = Figure(figsize=(wide, tall), facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.text(
            0.12 / wide, 1 - 0.12 / tall, title, size=11, weight="bold", color=INK, va="top"
        )
    for i, metric in enumerate(shown):
        corner = ((i * (PANEL[0] + right) + 0.72) / wide, 0.4 / tall)
        size = ((PANEL[0] - 0.72) / wide, (PANEL[1] - 0.7) / tall)
        ax = figure.add_axes((*corner, *size))
        _panel(ax, named, metric, ends)
    return figure


def _panel(ax: Any, named: Mapping[str, LossPath], metric: str, ends: tuple[str, str]) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(colors=DIM, labelsize=7.5, length=3, color=FAINT)
    ax.set_title(metric, size=9, color=INK, loc="left", pad=8)
    labels: list[tuple[float, str, str]] = []
    for i, (name, p) in enumerate(named.items()):
        colour = COLOURS[i % len(COLOURS)]
        t, y = p.points.numpy(), p.metrics[metric].numpy()
        ax.plot(t, y, color=colour, lw=1.8, zorder=3, marker="o" if len(t) < 13 else None, ms=3)
        text = _departure(ax, p, metric, colour)
        if len(y) and isfinite(y[-1]):
            labels.append((float(y[-1]), f"{name}{' ' if name and text else ''}{text}", colour))
    first, last = ax.get_xlim()
    points = np.concatenate([p.points.numpy() for p in named.values()])
    if points.min() < 0 or points.max() > 1:  # the ends are within
        for at in (0, 1):
            ax.axvline(at, color=FAINT, lw=0.8, zorder=1)
    ax.set_xlim(first, last)
    ax.set_xticks([0, 0.5, 1], [ends[0], "½", ends[1]])
    low, high = ax.get_ylim()
    for y, text, colour in _spread(labels, SPREAD * (high - low), (low, high)):
        ax.annotate(text, (1.0, y), xycoords=("axes fraction", "data"), xytext=(6, 0),
                    textcoords="offset points", va="center", size=8, color=colour,
                    annotation_clip=False)  # fmt: skip
    ax.set_ylim(low, high)


def _departure(ax: Any, p: LossPath, metric: str, colour: str) -> str:
    """Draws the line between both ends of a curve; text of how far the curve departs from it."""
    at = p.points.tolist()
    if 0 not in at or 1 not in at:
        return ""
    y = p.metrics[metric]
    ax.plot([0, 1], [float(y[at.index(0)]), float(y[at.index(1)])], color=colour, lw=0.9,
            ls=(0, (4, 3)), alpha=0.7, zorder=2)  # fmt: skip
    above, below = p.heights[metric], p.depths[metric]
    if not isfinite(above):
        return ""
    if max(above, below) <= 1e-3 * float(y.abs().max()):
        return "+0"
    falls = below > above and metric != next(iter(p.metrics))
    return f"\u2212{below:.3g}" if falls else f"+{above:.3g}"


def _spread(
    labels: list[tuple[float, str, str]], apart: float, limits: tuple[float, float]
) -> list[tuple[float, str, str]]:
    """Labels from the lowest up: near their places, none on another, within limits if they fit."""
    ordered = sorted(labels)
    places = [y for y, *_ in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + apart)
    lift = sum(y - label[0] for y, label in zip(places, ordered, strict=True)) / max(len(places), 1)
    for i, y in enumerate(places):
        lowest = limits[0] if i == 0 else places[i - 1] + apart
        places[i] = max(y - lift, lowest)
    for i in reversed(range(len(places))):
        highest = limits[1] if i + 1 == len(places) else places[i + 1] - apart
        places[i] = min(places[i], highest)
    return [(y, *label[1:]) for y, label in zip(places, ordered, strict=True)]
