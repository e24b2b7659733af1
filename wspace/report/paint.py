"""Painting a drawing with matplotlib: units as dots if they are few, sets as boxes if not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wspace.report.drawing import Drawing, Link, Matrix, NodeSet, pooled, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, DIM, FAINT = "#1d2330", "#6b7280", "#c3c9d4"
POSITIVE, NEGATIVE = "#2166ac", "#c0392b"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e0b000", "#72b7b2",
           "#9d755d", "#e45756", "#7a86d1", "#a0cbe8")  # fmt: skip
MOST_DOTS = 40  # units of one set drawn one by one
MOST_SETS = 16  # sets in a picture of dots


def paint(drawing: Drawing) -> "Figure":
    """A figure of a drawing, in the style that suits its size."""
    sizes = sorted(s.size for s in drawing.sets)
    few = len(sizes) <= MOST_SETS and (not sizes or sizes[len(sizes) // 2] <= MOST_DOTS)
    return _dots(drawing) if few else _boxes(drawing)


# --- units as dots -------------------------------------------------------------------------------

STEP = 0.26  # inches between units, at most
TALL = 5.2  # inches of the tallest column, if its units are not to touch
COLUMN = 1.9  # inches between columns
GAP = 0.55  # inches between sets of one column
BAR = 3.6  # inches: height of a set that is too large for dots


@dataclass
class _Place:
    """Where a set is: the middle of its column, and the heights of its units or anchors."""

    x: float
    y: Matrix
    dots: bool

    @property
    def low(self) -> float:
        return float(self.y.min()) - 0.14

    @property
    def high(self) -> float:
        return float(self.y.max()) + 0.14


def _dots(drawing: Drawing) -> "Figure":
    layers = drawing.layers()
    dots = [sum(s.size for s in _sets(drawing, layer) if s.size <= MOST_DOTS) for layer in layers]
    step = min(STEP, max(TALL / max(dots, default=1), 0.13)) if any(dots) else STEP
    heights = [
        sum(_height(s, step) for s in _sets(drawing, layer)) + GAP * (len(layer) - 1)
        for layer in layers
    ]
    tall, wide = max(heights, default=1.0), COLUMN * max(len(layers) - 1, 1)
    places: dict[int, _Place] = {}
    for column, (layer, height) in enumerate(zip(layers, heights, strict=True)):
        top = height / 2
        for i in layer:
            own = _height(drawing.sets[i], step)
            places[i] = _placed(drawing.sets[i], COLUMN * column, top, own)
            top -= own + GAP
    arcs = [k for k in drawing.links if k.weight is None]
    top = tall / 2 + 0.18 + 0.13 * len(arcs)
    low, high = -tall / 2 - 0.95, top + 0.35
    ax, figure = _canvas((-0.75, wide + 0.75), (low, high), drawing.title)
    for link in drawing.links:
        if link.weight is not None:
            _bundle(ax, link.weight, places[link.source], places[link.target])
    for number, link in enumerate(arcs):
        _arc(ax, places[link.source], places[link.target], tall / 2 + 0.13 * (number + 2))
    for i, place in places.items():
        _units(ax, drawing.sets[i], place, (_colour(drawing, drawing.sets[i]), step))
    _link_labels(ax, drawing, places, top)
    _legend(ax, (-0.7, low + 0.12), arcs=bool(arcs))
    return figure


def _sets(drawing: Drawing, layer: list[int]) -> list[NodeSet]:
    return [drawing.sets[i] for i in layer]


def _height(nodes: NodeSet, step: float) -> float:
    return step * max(nodes.size - 1, 0) if nodes.size <= MOST_DOTS else BAR


def _placed(nodes: NodeSet, x: float, top: float, height: float) -> _Place:
    count = nodes.size if nodes.size <= MOST_DOTS else 28
    return _Place(x, np.linspace(top, top - height, max(count, 1)), nodes.size <= MOST_DOTS)


def _canvas(
    across: tuple[float, float], up: tuple[float, float], title: str
) -> tuple[Any, "Figure"]:
    """Axes in inches, with nothing on them but a title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = (across[0], max(across[1], across[0] + 4.6))  # room for the legend
    up = (up[0], up[1] + (0.35 if title else 0.0))
    figure = Figure(figsize=(across[1] - across[0], up[1] - up[0]), facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=across, ylim=up)
    ax.axis("off")
    ax.text(across[0] + 0.1, up[1] - 0.1, title, ha="left", va="top", size=11, weight="bold",
            color=INK)  # fmt: skip
    return ax, figure


def _bundle(ax: Any, weight: Matrix, a: _Place, b: _Place) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    weight = pooled(weight, len(a.y), len(b.y))
    rows, columns = weight.shape
    left, right = _ends(a.y, rows), _ends(b.y, columns)
    flat = _contrast(weight.ravel())
    ends = np.empty((rows * columns, 2, 2))
    ends[:, 0, 0], ends[:, 1, 0] = a.x, b.x
    ends[:, 0, 1], ends[:, 1, 1] = np.repeat(left, columns), np.tile(right, rows)
    order = np.argsort(np.abs(flat))  # the strong ones on top
    dense = min(1.0, (160 / max(flat.size, 1)) ** 0.35)
    colours = np.empty((flat.size, 4))
    colours[:, :3] = np.where(flat[:, None] < 0, to_rgb(NEGATIVE), to_rgb(POSITIVE))
    colours[:, 3] = (0.04 + 0.86 * np.abs(flat) ** 1.3) * dense
    widths = 0.3 + 1.5 * np.abs(flat) * dense
    lines = LineCollection(list(ends[order]), colors=colours[order], linewidths=widths[order],
                           zorder=1, rasterized=flat.size > 400)  # fmt: skip
    ax.add_collection(lines)


def _contrast(values: Matrix) -> Matrix:
    """Values between -1 and 1, the weakest quarter near 0, so that a picture is not one grey."""
    size = np.abs(values)
    low, high = float(np.quantile(size, 0.25)), float(size.max())
    if len(values) < 16 or high <= low:
        return values / (high or 1.0)
    return np.sign(values) * np.clip((size - 0.8 * low) / (high - 0.8 * low), 0, 1)


def _ends(y: Matrix, count: int) -> Matrix:
    """Heights of `count` ends spread over those of a set; they differ after a flatten."""
    return (
        y if len(y) == count else np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(y)), y)
    )


def _arc(ax: Any, a: _Place, b: _Place, peak: float) -> None:
    """A curved grey line over everything that stands between two sets."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    third = (b.x - a.x) / 3
    up = (peak - 0.125 * (a.high + b.high)) / 0.75  # heights of the controls, for that peak
    points = [(a.x, a.high), (a.x + third, up), (b.x - third, up), (b.x, b.high)]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    ax.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=9, lw=1.3, color=DIM,
                                 alpha=0.75, zorder=2))  # fmt: skip


def _units(ax: Any, nodes: NodeSet, place: _Place, look: tuple[str, float]) -> None:
    from matplotlib.patheffects import withStroke

    colour, step = look
    halo = [withStroke(linewidth=2.5, foreground="white")]
    if place.dots:
        fill = "white" if nodes.values is None else _fills(nodes.values)
        area = 95 * (step / STEP) ** 2
        ax.scatter([place.x] * len(place.y), place.y, s=area, c=fill, edgecolors=colour,
                   linewidths=1.6, zorder=3)  # fmt: skip
    else:
        _box(ax, (place.x - 0.11, place.low), (0.22, place.high - place.low), colour)
        ax.text(place.x, (place.low + place.high) / 2, f"{nodes.size:,}", rotation=90, size=8,
                ha="center", va="center", color=INK, zorder=4)  # fmt: skip
    ax.text(place.x, place.low - 0.08, nodes.label, ha="center", va="top", size=9.5, color=colour,
            weight="bold", zorder=4, path_effects=halo)  # fmt: skip
    notes = [f"{nodes.size:,} unit{'' if nodes.size == 1 else 's'}", *map(_note, nodes.notes)]
    ax.text(place.x, place.low - 0.27, "\n".join(_few(notes)), ha="center", va="top", size=6.5,
            color=DIM, linespacing=1.25, zorder=4, path_effects=halo)  # fmt: skip


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= 3 else [*names[:2], f"+ {len(names) - 2} more"]


def _note(name: str) -> str:
    return short(name, 22)


def _fills(values: Matrix) -> list[tuple[float, float, float]]:
    """Colours from white to that of the sign, by strength."""
    from matplotlib.colors import to_rgb

    scale = float(np.abs(values).max()) or 1.0
    mixed: list[tuple[float, float, float]] = []
    for value in values:
        ends = np.array(to_rgb(NEGATIVE if value < 0 else POSITIVE))
        red, green, blue = 1 - (1 - ends) * 0.85 * abs(float(value)) / scale
        mixed.append((float(red), float(green), float(blue)))
    return mixed


def _link_labels(ax: Any, drawing: Drawing, places: dict[int, _Place], y: float) -> None:
    """Names of the parameters over the gap that they bridge, one under another."""
    above: dict[float, list[str]] = {}
    for link in drawing.links:
        if link.label and link.weight is not None:
            middle = (places[link.source].x + places[link.target].x) / 2
            above.setdefault(middle, []).append(short(link.label, 24))
    for x, names in above.items():
        ax.text(x, y, "\n".join(_few(names)), ha="center", va="bottom", size=7.5, color=INK,
                family="monospace", linespacing=1.2, zorder=4)  # fmt: skip


def _legend(ax: Any, corner: tuple[float, float], *, arcs: bool) -> None:
    x, y = corner
    entries = [(POSITIVE, "positive"), (NEGATIVE, "negative")]
    for colour, text in entries:
        ax.plot([x, x + 0.28], [y, y], color=colour, lw=2, solid_capstyle="round")
        ax.text(x + 0.35, y, text, va="center", size=7, color=DIM)
        x += 1.05
    ax.text(x, y, "strong = large weight" + ("   grey = no parameter" if arcs else ""),
            va="center", size=7, color=DIM)  # fmt: skip


# --- sets as boxes -------------------------------------------------------------------------------

ROW = 1.02  # inches between depths
CLOSE = 0.66  # inches between depths with no parameter between them
WIDTH = 1.75  # inches of a box
HEIGHT = 0.36
SPACE = 0.75  # inches between boxes of one depth
THUMB = 0.46  # inches of a thumbnail


def _boxes(drawing: Drawing) -> "Figure":
    layers = drawing.layers()
    most = max((len(layer) for layer in layers), default=1)
    half = max(most * (WIDTH + SPACE) / 2, 2.3)
    row_of = {i: row for row, layer in enumerate(layers) for i in layer}
    heights = _rows(drawing, row_of, len(layers))
    centre = {
        i: ((k - (len(layer) - 1) / 2) * (WIDTH + SPACE), heights[row])
        for row, layer in enumerate(layers)
        for k, i in enumerate(layer)
    }
    long = [k for k in drawing.links if row_of[k.target] - row_of[k.source] != 1]
    lanes = _lanes([(row_of[k.source], row_of[k.target]) for k in long])
    right = half + 0.14 * (max(lanes, default=0) + 1) + (1.5 if any(k.label for k in long) else 0.2)
    low = min(heights) - 0.75
    ax, figure = _canvas((-half - 0.2, right), (low, 0.45), drawing.title)
    for link in drawing.links:
        if row_of[link.target] - row_of[link.source] == 1:
            _connect(ax, link, centre, drawing.links)
    for link, lane in zip(long, lanes, strict=True):
        rows = range(row_of[link.source], row_of[link.target] + 1)
        reach = max((len(layers[r]) for r in rows), default=1) * (WIDTH + SPACE) / 2
        _around(ax, link, centre, max(reach, WIDTH / 2 + 0.9) + 0.14 * lane)
    for i, (x, y) in centre.items():
        _labelled_box(ax, drawing.sets[i], (x, y), _colour(drawing, drawing.sets[i]))
    arcs = any(k.weight is None for k in drawing.links)
    _legend(ax, (-half - 0.05, low + 0.2), arcs=arcs)
    return figure


def _rows(drawing: Drawing, row_of: dict[int, int], count: int) -> list[float]:
    """Height of each row; rows with nothing to show between them stand closer."""
    wide = {row_of[k.target] for k in drawing.links if k.label}
    heights = [0.0]
    for row in range(1, count):
        heights.append(heights[-1] - (ROW if row in wide else CLOSE))
    return heights


def _labelled_box(ax: Any, nodes: NodeSet, middle: tuple[float, float], colour: str) -> None:
    x, y = middle
    _box(ax, (x - WIDTH / 2, y - HEIGHT / 2), (WIDTH, HEIGHT), colour)
    name = f"{short(nodes.label, 20)} · {nodes.size:,}"
    ax.text(x, y + (0.055 if nodes.notes else 0), name, size=8.5, ha="center", va="center",
            color=INK, weight="bold", zorder=6)  # fmt: skip
    if nodes.notes:
        first, *rest = nodes.notes
        more = f" +{len(rest)}" if rest else ""
        note = short(first, 34 - len(more)) + more
        ax.text(x, y - 0.095, note, size=5.5, ha="center", va="center", color=DIM, zorder=6)


def _lanes(spans: list[tuple[int, int]]) -> list[int]:
    """A lane for each span of rows, so that spans that overlap are beside each other."""
    taken: list[tuple[int, int, int]] = []
    lanes: dict[int, int] = {}
    for at in sorted(range(len(spans)), key=lambda i: abs(spans[i][1] - spans[i][0])):
        start, end = min(spans[at]), max(spans[at])
        used = {lane for a, b, lane in taken if a < end and start < b}
        lanes[at] = next(n for n in range(len(spans) + 1) if n not in used)
        taken.append((start, end, lanes[at]))
    return [lanes[i] for i in range(len(spans))]


Centres = dict[int, tuple[float, float]]


def _connect(ax: Any, link: Link, centre: Centres, links: Sequence[Link]) -> None:
    """A line to the next row with right angles, and the parameter on it."""
    (x0, y0), (x1, y1) = centre[link.source], centre[link.target]
    out = sum(k.source == link.source for k in links)
    into = sum(k.target == link.target for k in links)
    start, end = y0 - HEIGHT / 2, y1 + HEIGHT / 2
    turn = start - 0.07 if out >= into else end + 0.13
    _path(ax, [(x0, start), (x0, turn), (x1, turn), (x1, end)], named=bool(link.label))
    if link.label:
        _thumbnail(ax, link, (x1 if out >= into else x0, (start + end) / 2))


def _around(ax: Any, link: Link, centre: Centres, x: float) -> None:
    """A line past the rows between, to the right of them."""
    (x0, y0), (x1, y1) = centre[link.source], centre[link.target]
    half, out, back = WIDTH / 2, y0 - 0.06, y1 + 0.06
    start, end = [(x0 + half, out)], [(x1 + half, back)]
    if any(y == y0 and other > x0 for other, y in centre.values()):  # something stands beside it
        out = y0 - HEIGHT / 2 - 0.035
        start = [(x0 + 0.8 * half, y0 - HEIGHT / 2), (x0 + 0.8 * half, out)]
    if any(y == y1 and other > x1 for other, y in centre.values()):
        back = y1 + HEIGHT / 2 + 0.1
        end = [(x1 + 0.8 * half, back), (x1 + 0.8 * half, y1 + HEIGHT / 2)]
    _path(ax, [*start, (x, out), (x, back), *end], named=bool(link.label))
    if link.label:
        _thumbnail(ax, link, (x, (y0 + y1) / 2))


def _path(ax: Any, corners: list[tuple[float, float]], *, named: bool) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    ax.add_patch(
        FancyArrowPatch(
            path=Curve(corners), arrowstyle="-|>", mutation_scale=8, lw=1.4 if named else 1.0,
            color=DIM if named else FAINT, zorder=2, joinstyle="round",
        )
    )  # fmt: skip


def _thumbnail(ax: Any, link: Link, middle: tuple[float, float]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    x, y = middle
    if link.weight is None:
        ax.text(x, y, short(link.label, 24), size=6.5, color=INK, ha="center", va="center",
                zorder=5, bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
        return
    image = pooled(link.weight.T, 48, 48)
    rows, columns = image.shape
    tall, wide = THUMB * min(1, (rows / columns) ** 0.5), THUMB * min(1, (columns / rows) ** 0.5)
    tall, wide = max(tall, 0.1), max(wide, 0.1)
    limit = float(np.quantile(np.abs(image), 0.98)) or 1.0
    colours = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])
    left, bottom = x - wide / 2, y - tall / 2
    extent = (left, left + wide, bottom, bottom + tall)
    ax.imshow(image, cmap=colours, vmin=-limit, vmax=limit, extent=extent, aspect="auto",
              interpolation="nearest", zorder=4)  # fmt: skip
    ax.add_patch(Rectangle((left, bottom), wide, tall, fill=False, ec=DIM, lw=0.6, zorder=5))
    ax.text(x + wide / 2 + 0.07, y, _lines(link.label), size=6, color=INK, ha="left", va="center",
            linespacing=1.15, zorder=5, bbox={"fc": "white", "ec": "none", "pad": 0.6})  # fmt: skip


def _lines(name: str) -> str:
    """A name on two lines of at most 19 characters."""
    name = short(name, 36)
    if len(name) <= 19:
        return name
    parts = name.split(".")
    best = min(range(1, len(parts)), key=lambda k: abs(len(".".join(parts[:k])) - 18), default=0)
    return ".".join(parts[:best]) + ".\n" + ".".join(parts[best:]) if best else name


def _box(ax: Any, corner: tuple[float, float], size: tuple[float, float], colour: str) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    red, green, blue = (1 - (1 - c) * 0.22 for c in to_rgb(colour))
    style = "round,pad=0,rounding_size=0.08"
    box = FancyBboxPatch(corner, *size, boxstyle=style, fc=(red, green, blue), ec=colour, lw=1.3)
    box.set_zorder(3)
    ax.add_patch(box)


def _colour(drawing: Drawing, nodes: NodeSet) -> str:
    if not nodes.family:
        return DIM
    return COLOURS[drawing.families[nodes.family] % len(COLOURS)]


def heatmaps(
    matrices: Sequence[tuple[str, Matrix]], *, columns: int = 1, width: float = 6.0
) -> "Figure":
    """Matrices in a grid, each under its title and on its own scale.

    Args:
        matrices: Titles and values, of one shape.
        columns: How many stand beside each other.
        width: Of the figure, in inches.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    rows = -(-len(matrices) // columns)
    titles = max(name.count("\n") + 1 for name, _ in matrices) * 0.17 + 0.1
    shape = matrices[0][1].shape
    tall = rows * (0.94 * width / columns * shape[0] / shape[1] + titles) + 0.1
    figure = Figure(figsize=(width, tall), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    colours = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])
    for at, (name, matrix) in enumerate(matrices, 1):
        ax = figure.add_subplot(rows, columns, at)
        limit = float(np.quantile(np.abs(matrix), 0.98)) or 1.0
        ax.imshow(matrix, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(name, size=8, color=INK, pad=3)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_color(FAINT)
    return figure
