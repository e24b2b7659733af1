"""The picture of a parameter graph: its node sets in columns, its blocks between them."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wspace.errors import SpaceMismatch, message
from wspace.graph import ParameterGraph, units_of
from wspace.graph.parameter import window
from wspace.report.drawing import Drawing, Link, Matrix, NodeSet
from wspace.report.page import Report, figure_bytes, write_whole
from wspace.report.paint import paint
from wspace.space import Role, WeightSpace
from wspace.wiring import Block, Wiring

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_UNITS = 64  # of a side of a matrix that is shown; larger ones are pooled while they are read
MOST_ENTRIES = 1 << 20  # of a block that are read for a picture; of larger ones, every n-th

State = Mapping[str, Tensor]
_ADDED = (Role.SHIFT,)


def plot_graph(
    graph: ParameterGraph | WeightSpace, path: str | Path | None = None, *, title: str = ""
) -> "Figure":
    """The parameter graph, drawn: every unit if there are few, one box for a node set otherwise.

    Colour is the sign of a weight and opacity its size; sets that move together share a colour.

    Args:
        graph: A graph; or a space, whose picture then shows no values.
        path: Where to write it: ``.png``, ``.svg``, ``.pdf``, or ``.html``; None to write nothing.
        title: Over the picture.

    Returns:
        The figure.

    Raises:
        SpaceMismatch: If the space has no wiring.
    """
    space = graph if isinstance(graph, WeightSpace) else graph.space
    html = path is not None and Path(path).suffix == ".html"
    figure = paint(drawing_of(graph, "" if html else title))
    if path is None:
        return figure
    if html:
        page = Report(title or "Parameter graph", space.summary())
        page.figure(figure, "Node sets and the parameters between them.")
        page.code(str(space), summary="The weight space").write(path)
    else:
        write_whole(path, figure_bytes(figure, Path(path).suffix.removeprefix(".") or "png"))
    return figure


def drawing_of(graph: ParameterGraph | WeightSpace, title: str = "") -> Drawing:
    """What the picture of a graph shows.

    Args:
        graph: A graph, of which the first is shown if it is a batch; or a space with a wiring.
        title: Over the picture.

    Returns:
        The drawing. Node sets that nothing is attached to are left out.
    """
    space = graph if isinstance(graph, WeightSpace) else graph.space
    state: State = {}
    if isinstance(graph, ParameterGraph):
        first = (0,) * len(graph.batch)
        state = {name: tensor[first] for name, tensor in graph.values.items()}
    wiring = _wiring(space)
    edges: dict[tuple[int, int, str], list[Block]] = {}
    features: dict[int, list[Block]] = {}
    for block in wiring.blocks:
        if block.source is None:
            features.setdefault(block.target.nodes, []).append(block)
        else:
            key = (block.source.nodes, block.target.nodes, block.param)
            edges.setdefault(key, []).append(block)
    used = sorted({i for a, b, _ in edges for i in (a, b)} | features.keys())
    place = {node: at for at, node in enumerate(used)}
    depths = _depths(wiring, edges)
    sets = [_node_set(space, node, depths[node], features.get(node, []), state) for node in used]
    links = [
        Link(place[a], place[b], param, _weight(wiring, blocks, state))
        for (a, b, param), blocks in edges.items()
        if a != b
    ]
    return Drawing(title, sets, links)


def _wiring(space: WeightSpace) -> Wiring:
    if space.wiring is None:
        raise SpaceMismatch(
            message("plot_graph: the space has no wiring", help="trace the module again")
        )
    return space.wiring


def _depths(wiring: Wiring, edges: Mapping[tuple[int, int, str], Any]) -> list[int]:
    """The column of every node set: one more than that of the farthest set before it."""
    before: dict[int, set[int]] = {}
    for a, b, _ in edges:
        if a != b:
            before.setdefault(b, set()).add(a)
    depths = [0] * len(wiring.nodes)
    order = sorted(range(len(depths)), key=lambda i: wiring.nodes[i].depth)
    for _ in range(2):  # sets of equal depth may be listed in any order
        for node in order:
            above = [depths[a] for a in before.get(node, ()) if _earlier(wiring, a, node)]
            depths[node] = max((d + 1 for d in above), default=0)
    for node in order:  # what comes from nowhere stands next to where it goes
        after = [depths[b] for b, sources in before.items() if node in sources]
        if after and not before.get(node):
            depths[node] = min(after) - 1
    return depths


def _earlier(wiring: Wiring, a: int, b: int) -> bool:
    return (wiring.nodes[a].depth, a) < (wiring.nodes[b].depth, b)


def _node_set(
    space: WeightSpace, node: int, depth: int, features: list[Block], state: State
) -> NodeSet:
    nodes = _wiring(space).nodes[node]
    groups = [space.all_groups[name] for name in nodes.groups if name in space.all_groups]
    label = "*".join(map(str, groups)) or nodes.op or nodes.kind
    if nodes.kind != "hidden":
        label = nodes.kind
    elif not groups and any("softmax" in act for act in nodes.acts):
        label = "attention"
    family = "" if nodes.fixed else "*".join(g.name for g in groups if not g.fixed)
    names = tuple(dict.fromkeys(b.param for b in features if b.param))
    shift = next((b for b in features if b.param in state and space[b.param].role in _ADDED), None)
    values = None
    if shift is not None and nodes.size <= MOST_UNITS:
        values = _gathered(shift, state, (1, nodes.size), (1, nodes.size))[0]
    return NodeSet(label, nodes.size, depth, family, names, values)


def _weight(wiring: Wiring, blocks: list[Block], state: State) -> Matrix | None:
    """Signed strength between the units of two sets; None if there are no values."""
    total: Matrix | None = None
    for block in blocks:
        if block.param in state and block.source is not None:
            sizes = [wiring.nodes[ends.nodes].size for ends in (block.source, block.target)]
            bins = [min(size, MOST_UNITS) for size in sizes]
            part = _gathered(block, state, (sizes[0], sizes[1]), (bins[0], bins[1]))
            total = part if total is None else total + part
    return total


def _gathered(block: Block, state: State, sizes: tuple[int, int], bins: tuple[int, int]) -> Matrix:
    """Root mean square of a block's entries by source and target bin, with the sum's sign."""
    thin = _thinned(block.sizes)
    entries = window(state[block.param], block)[thin].detach().double().nan_to_num(0.0, 0.0, 0.0)
    cell = torch.zeros((), dtype=torch.int64)
    for ends, size, count in zip((block.source, block.target), sizes, bins, strict=True):
        cell = cell * count
        if ends is not None:
            own = tuple(k if i in ends.loops else slice(None) for i, k in enumerate(thin))
            cell = cell + units_of(ends, block.sizes)[own] * count // size
    where = cell.expand(entries.shape).reshape(-1).numpy()
    values = entries.reshape(-1).cpu().numpy()
    many = bins[0] * bins[1]
    number = np.bincount(where, minlength=many)
    total = np.bincount(where, weights=values, minlength=many)
    square = np.bincount(where, weights=values**2, minlength=many)
    strength = np.sqrt(square / np.maximum(number, 1)) * np.where(total < 0, -1.0, 1.0)
    return strength.reshape(bins)


def _thinned(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """Which indices of every loop are read: of a large block not all."""
    steps = [1] * len(sizes)

    def left(loop: int) -> int:
        return -(-sizes[loop] // steps[loop])

    while prod(map(left, range(len(sizes)))) > MOST_ENTRIES:
        steps[max(range(len(sizes)), key=left)] *= 2
    return tuple(slice(None, None, step) for step in steps)
