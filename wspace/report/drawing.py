"""What a picture of a parameter graph shows, whatever it is drawn with: sets, links, places."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NodeSet:
    """The units of one activation axis.

    Attributes:
        label: Name of its group, or what it is.
        size: Number of units.
        depth: Column in which it stands.
        family: Sets of one family move together, and share a colour; "" for fixed ones.
        notes: Parameters that are features of its units, such as biases.
        values: One number per unit to colour it by, e.g. the bias; None leaves it white.
    """

    label: str
    size: int
    depth: int
    family: str = ""
    notes: tuple[str, ...] = ()
    values: Matrix | None = None


@dataclass(frozen=True, eq=False)
class Link:
    """What connects two sets, by their positions in the drawing.

    Attributes:
        source: Where it comes from.
        target: Where it goes to.
        label: Name of the parameter; empty for a connection without one.
        weight: ``(units of source, units of target)``, signed strength; None if not known.
    """

    source: int
    target: int
    label: str = ""
    weight: Matrix | None = None


@dataclass(frozen=True, eq=False)
class Drawing:
    """A layered graph: sets in columns by depth, and links between them."""

    title: str
    sets: Sequence[NodeSet]
    links: Sequence[Link] = field(default_factory=list[Link])

    def layers(self) -> list[list[int]]:
        """Positions of the sets by depth, ordered so that links cross little."""
        depths = sorted({s.depth for s in self.sets})
        layers = [[i for i, s in enumerate(self.sets) if s.depth == d] for d in depths]
        near: dict[int, list[int]] = {i: [] for i in range(len(self.sets))}
        for link in self.links:
            near[link.source].append(link.target)
            near[link.target].append(link.source)
        rank = {i: float(k) for layer in layers for k, i in enumerate(layer)}
        for layer in [*layers, *reversed(layers)]:
            middle = {i: _mean([rank[j] for j in near[i]], rank[i]) for i in layer}
            layer.sort(key=lambda i: middle[i])
            offset = (len(layer) - 1) / 2
            rank.update({i: k - offset for k, i in enumerate(layer)})
        return layers

    @property
    def families(self) -> dict[str, int]:
        """Families in order of appearance, numbered."""
        names = dict.fromkeys(s.family for s in self.sets if s.family)
        return {name: i for i, name in enumerate(names)}


def pooled(weight: Matrix, rows: int, columns: int) -> Matrix:
    """A matrix shrunk to at most this size by signed means of its blocks: what an eye would see.

    Args:
        weight: Any matrix.
        rows: Most rows of the result.
        columns: Most columns of the result.

    Returns:
        The matrix itself if it is small enough.
    """
    for axis, limit in ((0, rows), (1, columns)):
        size = weight.shape[axis]
        if size > limit:
            edges = np.linspace(0, size, limit + 1).astype(int)[:-1]
            lengths = np.diff([*edges, size])
            total = np.add.reduceat(weight, edges, axis=axis)
            strength = np.add.reduceat(np.abs(weight), edges, axis=axis)
            shape = (-1, 1) if axis == 0 else (1, -1)
            sign = np.where(total < 0, -1.0, 1.0)
            weight = sign * strength / lengths.reshape(shape)
    return weight


def short(name: str, length: int) -> str:
    """The end of a dotted name, whole parts of it if they fit.

    Args:
        name: Any name.
        length: Most characters of the result.

    Returns:
        The name, or an ellipsis and its end.
    """
    if len(name) <= length:
        return name
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) + 1 > length:
        parts = parts[1:]
    text = "…" + ".".join(parts)
    return text if len(text) <= length else text[: length - 1] + "…"


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
