"""The graph of an architecture: parameters, units and structural operations as nodes, no values.

Node sets of the wiring are nodes (what computes them, which activations follow), and so is every
parameter, between the units it reads and the units it writes, and every structural connection
(residual additions, attention products). Distances along and against the edges are computed once
for each space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2, prod
from typing import Self
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from wspace.graph import structure_of
from wspace.hyper.graph.form import TensorForm, forms_of
from wspace.nn.embed import block_words, node_words
from wspace.space import WeightSpace
from wspace.wiring import Block, Wiring

FAR = 24
"""Largest distance that is told from larger ones; `FAR` + 1 stands for no path at all."""
MOST = 15
"""Largest degree that is told from larger ones."""
MEASURES = 9
BUCKETS = 1 << 20


@dataclass(frozen=True, eq=False)
class ArchitectureGraph:
    """Nodes and distances of an architecture.

    Attributes:
        forms: Forms of the tensors that are predicted.
        holders: Node of each of them, int64 ``(tensors,)``.
        words: Hashes of the words of every node, int64, one node after another.
        counts: How many words every node has, int64 ``(N,)``.
        measures: Sizes, depth and place among equal nodes, ``(N, MEASURES)``.
        degrees: Edges into and out of every node, int64 ``(N, 2)``, at most `MOST`.
        distances: Edges on the shortest path from row to column, int64 ``(N, N)``, at most `FAR`;
            `FAR` + 1 if there is none.
    """

    forms: tuple[TensorForm, ...]
    holders: Tensor
    words: Tensor
    counts: Tensor
    measures: Tensor
    degrees: Tensor
    distances: Tensor

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self.counts)

    def permuted(self, order: Tensor) -> Self:
        """The same graph with its nodes in another order.

        Args:
            order: Old number of every node, int64 ``(N,)``.

        Returns:
            A graph that says the same.
        """
        words = self.words.split(self.counts.tolist())
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return replace(
            self,
            holders=back[self.holders],
            words=torch.cat([words[i] for i in order.tolist()]),
            counts=self.counts[order],
            measures=self.measures[order],
            degrees=self.degrees[order],
            distances=self.distances[order][:, order],
        )


@dataclass(frozen=True)
class _Node:
    words: tuple[str, ...]
    sizes: tuple[int, int, int]  # out, in, taps
    depth: int
    at: int = 0


@lru_cache(maxsize=4096)
def architecture_of(space: WeightSpace) -> ArchitectureGraph:
    """The graph of a space's architecture, made once.

    Args:
        space: Weight space that came from `trace`.

    Returns:
        Its graph.

    Raises:
        SpaceMismatch: If the space has no wiring.
    """  # noqa: DOC502 (structure_of raises)
    wiring, forms = structure_of(space).wiring, forms_of(space)
    nodes, edges, holders = _nodes(space, wiring, forms)
    distances = _distances(len(nodes), edges)
    degrees = np.zeros((len(nodes), 2), np.int64)
    for a, b in edges:
        degrees[b, 0] += 1
        degrees[a, 1] += 1
    words = [[crc32(w.encode()) % BUCKETS for w in n.words] for n in nodes]
    keys = [
        (n.words, n.sizes, n.at, tuple(np.sort(distances[i])), tuple(np.sort(distances[:, i])))
        for i, n in enumerate(nodes)
    ]
    return ArchitectureGraph(
        forms=tuple(forms),
        holders=torch.tensor(holders, dtype=torch.int64),
        words=torch.tensor([w for some in words for w in some]),
        counts=torch.tensor([len(some) for some in words]),
        measures=torch.tensor(_measures(nodes, _twins(keys)), dtype=torch.float32),
        degrees=torch.from_numpy(degrees.clip(max=MOST)),
        distances=torch.from_numpy(distances),
    )


def _nodes(
    space: WeightSpace, wiring: Wiring, forms: Sequence[TensorForm]
) -> tuple[list[_Node], list[tuple[int, int]], list[int]]:
    """Nodes, edges between them, and which node holds each predicted tensor."""
    kinds = wiring.nodes
    nodes = [_Node(_words(node_words(n)), (n.size, 1, 1), n.depth) for n in kinds]
    edges: set[tuple[int, int]] = set()
    uses: dict[str, list[Block]] = {}
    for b in wiring.blocks:
        if not b.structural:
            uses.setdefault(b.param, []).append(b)
            continue
        edges |= _joined(len(nodes), [b])
        taps = prod(s for s, r in zip(b.sizes, b.roles, strict=True) if r == "feature")
        nodes.append(_Node(_words(block_words(b)), (1, 1, taps), kinds[b.target.nodes].depth))
    holders: list[int] = []
    for form in forms:
        some = uses.get(form.name, [])
        edges |= _joined(len(nodes), some)
        holders.append(len(nodes))
        texts = [w for b in some for w in block_words(b)]
        role, at = space[form.name].role.value, space[form.name].at
        own = [
            f"role:{role}",
            f"kind:{form.kind}",
            f"out:{form.out.fixed}",
            f"in:{form.into.fixed}",
        ]
        depth = max((kinds[b.target.nodes].depth for b in some), default=0)
        sizes = (form.out.size, form.into.size, prod(form.taps))
        index = 0 if at is None else at[1] + 1
        nodes.append(_Node(_words(dict.fromkeys([*own, *texts])), sizes, depth, index))
    return nodes, sorted(edges), holders


def _joined(node: int, blocks: Sequence[Block]) -> set[tuple[int, int]]:
    out = {(node, b.target.nodes) for b in blocks}
    return out | {(b.source.nodes, node) for b in blocks if b.source is not None}


def _words(words: Iterator[str] | Sequence[str] | dict[str, None]) -> tuple[str, ...]:
    """Words without numbers that hardly two architectures share, such as 1 / sqrt(width)."""
    kept = [w for w in words if not _number(w.rpartition(":")[2])]
    return tuple(sorted(kept))


def _number(text: str) -> bool:
    return text[:1].isdigit() and (len(text) > 1)


def _distances(count: int, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import shortest_path

    rows, columns = [a for a, _ in edges], [b for _, b in edges]
    graph = csr_array((np.ones(len(edges)), (rows, columns)), shape=(count, count))
    found = shortest_path(graph, directed=True, unweighted=True)
    reached = np.isfinite(found)
    return np.where(reached, np.where(reached, found, 0).clip(max=FAR), FAR + 1).astype(np.int64)


def _twins(keys: Sequence[object]) -> list[int]:
    """How many equal ones come before each: parallel branches that nothing else tells apart."""
    seen: dict[object, int] = {}
    out: list[int] = []
    for key in keys:
        out.append(seen.get(key, 0))
        seen[key] = out[-1] + 1
    return out


def _measures(nodes: Sequence[_Node], twins: Sequence[int]) -> list[list[float]]:
    deepest = max(n.depth for n in nodes) or 1
    return [
        [
            *(log2(s) / 4 for s in n.sizes),
            log2(n.sizes[1] * n.sizes[2]) / 8,
            log2(prod(n.sizes)) / 8,
            log2(1 + n.depth) / 4,
            n.depth / deepest,
            float(np.sin(n.at)) + n.at / 4,
            float(np.sin(twin)) + twin / 4,
        ]
        for n, twin in zip(nodes, twins, strict=True)
    ]
