"""Averages over the units of a graph: over sets first by size, so that widths do not matter."""

from functools import lru_cache

import torch
from torch import Tensor

from wspace.graph.structure import Structure


@lru_cache(maxsize=256)
def shares(structure: Structure, kind: str | None) -> Tensor:
    """Share of every unit in the average over the node sets of one kind.

    Every node set has the same share, and in it every unit.

    Args:
        structure: The graph's structure.
        kind: Kind of node sets; None for all but the global one.

    Returns:
        ``(N,)``, float64; zeros if there is no such set.
    """
    out = torch.zeros(structure.total, dtype=torch.float64)
    chosen = [
        (n, at)
        for n, at in zip(structure.nodes, structure.offsets, strict=True)
        if n.size and (n.kind == kind or (kind is None and n.kind != "global"))
    ]
    for n, at in chosen:
        out[at : at + n.size] = 1 / (n.size * len(chosen))
    return out


def pooled(structure: Structure, x: Tensor, kind: str | None = None) -> Tensor:
    """Average of node states over the node sets of one kind.

    Args:
        structure: The graph's structure.
        x: Node states, ``(B, N, C)``.
        kind: ``"input"``, ``"hidden"``, ``"output"``, ``"global"``, or None for all but the last.

    Returns:
        ``(B, C)``.
    """
    return shares(structure, kind).to(x) @ x
