"""Batches of graphs: which of a mixed list are of one space, and those as one graph."""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from wspace.errors import SpaceMismatch
from wspace.graph import ParameterGraph
from wspace.space import WeightSpace


def by_space(graphs: Sequence[ParameterGraph]) -> list[list[int]]:
    """Places of the graphs of every space.

    Args:
        graphs: Graphs of any architectures.

    Returns:
        For every space, in order of first appearance, places in the list.

    Raises:
        SpaceMismatch: If the list is empty.
    """
    places: dict[WeightSpace, list[int]] = {}
    for i, g in enumerate(graphs):
        places.setdefault(g.space, []).append(i)
    if not places:
        raise SpaceMismatch("metanet: an empty list of graphs")
    return list(places.values())


def stacked(graphs: Sequence[ParameterGraph]) -> ParameterGraph:
    """Graphs of one space as one graph with one batch axis; a graph without batch is one row.

    Args:
        graphs: Graphs of one space, at least one.

    Returns:
        The graph, networks in order.
    """
    space = graphs[0].space
    values: dict[str, Tensor] = {}
    for p in space.params:
        parts = [g.values[p.name].reshape(-1, *p.shape) for g in graphs]
        values[p.name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ParameterGraph(space, MappingProxyType(values), MappingProxyType({}))
