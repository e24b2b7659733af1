"""How a graph predictor sees a model: dense blocks of edges between numbered nodes. No values.

A block is ``(P, T, S, Q, F)``: pairs of a target and a source group, targets, sources, parallel
edges, and features of one edge (kernel taps, at most `TAPS`). A value of it is an entry of a
parameter, found through strides, or a constant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from math import prod
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

TAPS = 9
"""Most features of one edge: a 3 × 3 kernel."""

# Kinds of edges, as the published networks number them.
FC, BIAS, CONV, NORM, TOKEN, POSITION = 1, 2, 3, 4, 5, 6
QUERY, KEY, VALUE, RESIDUAL, OTHER, LOOP = 7, 8, 9, 10, 11, 13

Sizes = tuple[int, int, int, int, int]


P = ParamSpec("P")
R = TypeVar("R")


def lasting(make: Callable[P, R]) -> Callable[P, R]:
    """Makes what is kept outside of inference mode, whose tensors cannot be trained with.

    Args:
        make: Makes it.

    Returns:
        The same, outside.
    """

    @wraps(make)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    return outside


@dataclass(frozen=True, eq=False)
class Edges:
    """A dense block of edges.

    Attributes:
        kind: Kind of the edges.
        sizes: P, T, S, Q and F.
        target: Node of every target, ``(P * T,)``.
        source: Node of every source, ``(P * S,)``.
        param: Parameter that the values are entries of; empty for a constant.
        strides: Strides in the contiguous parameter; None if there are none.
        offset: First entry.
        index: Entry of every value, ``sizes``, where strides cannot say it.
        value: The constant, in the first feature.
    """

    kind: int
    sizes: Sizes
    target: Tensor
    source: Tensor
    param: str = ""
    strides: tuple[int, ...] | None = None
    offset: int = 0
    index: Tensor | None = None
    value: float = 1.0

    def view(self, flat: Tensor) -> Tensor:
        """Values of the block in a contiguous parameter ``(*batch, numel)``: ``(*batch, *sizes)``.

        Args:
            flat: The parameter, or several.

        Returns:
            A view, unless the block has an `index`.
        """
        if self.index is not None:
            return flat[..., self.index.to(flat.device)]
        assert self.strides is not None
        lead, at = flat.dim() - 1, flat.storage_offset() + self.offset
        return flat.as_strided(
            [*flat.shape[:-1], *self.sizes], [*flat.stride()[:lead], *self.strides], at
        )

    @property
    def entries(self) -> Tensor:
        """Entry of every value in the flat parameter, ``sizes``; made anew."""
        return self.entries_of((slice(None),) * 4)

    def entries_of(self, part: tuple[slice, ...]) -> Tensor:
        """Entry of every value of a part.

        Args:
            part: Ranges of P, T, S and Q.

        Returns:
            As many entries as the part has values, in its sizes.
        """
        if self.index is not None:
            return self.index[part]
        assert self.strides is not None
        out = torch.tensor(self.offset)
        for i, (n, step) in enumerate(zip(self.sizes, self.strides, strict=True)):
            own = torch.arange(n)[part[i]] if i < len(part) else torch.arange(n)
            out = out + (own * step).view([-1 if j == i else 1 for j in range(5)])
        return out

    @property
    def edges(self) -> int:
        """Number of edges."""
        return prod(self.sizes[:4])


@dataclass(frozen=True, eq=False)
class Topology:
    """Blocks of edges between nodes, and what is known of the nodes.

    Attributes:
        nodes: Number of nodes.
        blocks: The blocks, a self-loop on every node among them.
        tokens: Number of the token that a node is, plus 1; 0 elsewhere, ``(nodes,)``. None if no
            node is a token.
    """

    nodes: int
    blocks: tuple[Edges, ...]
    tokens: Tensor | None = None
    codes: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    @lasting
    def degrees(self) -> Tensor:
        """Number of edges into every node, ``(nodes,)`` float64."""
        out = torch.zeros(self.nodes, dtype=torch.float64)
        for b in self.blocks:
            each = torch.full((len(b.target),), float(b.sizes[2] * b.sizes[3]))
            out.index_add_(0, b.target, each.double())
        return out.clamp(min=1)

    @cached_property
    @lasting
    def alike(self) -> Tensor:
        """Nodes that only their self-loop leads to, ``(nodes,)`` bool: all in one state."""
        out = torch.ones(self.nodes, dtype=torch.bool)
        for b in self.blocks:
            if b.kind != LOOP:
                out[b.target] = False
        return out

    @cached_property
    @lasting
    def merged(self) -> "Topology":
        """The topology with all nodes in one state as the last node, edges from them parallel.

        Only for nodes without codes of their own; the rest keep their order.
        """
        alike = self.alike
        count = int((~alike).sum())
        number = torch.where(alike, count, (~alike).cumsum(0) - 1)
        blocks = []
        for b in self.blocks:
            if b.kind == LOOP:
                every = torch.arange(count + 1)
                sizes = (count + 1, 1, 1, 1, 1)
                blocks.append(Edges(LOOP, sizes, every, every, value=b.value))
            else:
                blocks.append(self._merge(b, number))
        return Topology(count + 1, tuple(blocks))

    def _merge(self, b: Edges, number: Tensor) -> Edges:
        p, t, s, q, f = b.sizes
        target, source = number[b.target], number[b.source]
        if s == 1 or q > 1 or not b.param or not bool(self.alike[b.source].all()):
            return replace(b, target=target, source=source)
        strides = None if b.strides is None else tuple(b.strides[i] for i in (0, 1, 3, 2, 4))
        index = None if b.index is None else b.index.transpose(2, 3).contiguous()
        return replace(
            b, sizes=(p, t, 1, s, f), target=target, source=source.view(p, s)[:, 0].contiguous(),
            strides=strides, index=index,
        )  # fmt: skip

    @lasting
    def laplacian(self, count: int) -> Tensor:
        """Eigenvectors of the graph's normalised Laplacian: published codes of nodes.

        Of the undirected graph without values, the constant one left out, each with its largest
        entry positive. Cubic in the nodes below a hundred, an iteration above.

        Args:
            count: How many; zeros where there are fewer.

        Returns:
            ``(nodes, count)`` float64.
        """
        if count not in self.codes:
            self.codes[count] = _laplacian(self, count)
        return self.codes[count]


def _laplacian(topology: Topology, count: int) -> Tensor:
    import numpy as np
    from scipy.sparse import coo_matrix, diags, eye
    from scipy.sparse.linalg import eigsh

    rows = [_pairs(b) for b in topology.blocks]
    target, source = (torch.cat([r[i] for r in rows]).numpy() for i in (0, 1))
    n = topology.nodes
    a = coo_matrix((np.ones(len(target)), (target, source)), (n, n)).tocsr()
    a = ((a + a.T) > 0).astype(np.float64)
    scale = diags(1 / np.sqrt(np.asarray(a.sum(1)).ravel().clip(1)))
    laplacian = eye(n) - scale @ a @ scale
    wanted = min(count + 1, n)
    if n < 100 or wanted >= n - 1:
        _, vectors = np.linalg.eigh(laplacian.toarray())
    else:
        start = np.random.default_rng(0).normal(size=n)
        values, vectors = eigsh(-laplacian, k=wanted, which="LA", v0=start)
        vectors = vectors[:, np.argsort(-values)]
    out = torch.zeros(n, count, dtype=torch.float64)
    for i in range(1, wanted):
        v = torch.from_numpy(vectors[:, i].copy())
        out[:, i - 1] = v * torch.sign(v[v.abs().argmax()])
    return out


def _pairs(b: Edges) -> tuple[Tensor, Tensor]:
    p, t, s, _, _ = b.sizes
    target = b.target.view(p, t, 1).expand(p, t, s).reshape(-1)
    source = b.source.view(p, 1, s).expand(p, t, s).reshape(-1)
    return target, source


class Builder:
    """Collects nodes and blocks of a topology."""

    def __init__(self) -> None:
        self.nodes = 0
        self.blocks: list[Edges] = []
        self.tokens: dict[int, Tensor] = {}

    def add(self, count: int) -> Tensor:
        """So many new nodes."""
        self.nodes += count
        return torch.arange(self.nodes - count, self.nodes)

    def dense(self, kind: int, target: Tensor, source: Tensor, entry: "Entry") -> None:
        """Edges from all sources to all targets, with entries of a parameter."""
        t, s = len(target), len(source)
        sizes = (1, t, s, 1, entry.taps)
        strides = (0, entry.target, entry.source, 0, 1)
        self.blocks.append(Edges(kind, sizes, target, source, entry.param, strides, entry.offset))

    def link(self, kind: int, target: Tensor, source: Tensor, value: float = 1.0) -> None:
        """One edge for each target and the source beside it, with a constant."""
        sizes = (len(target), 1, 1, 1, 1)
        self.blocks.append(Edges(kind, sizes, target, source, value=value))

    def build(self) -> Topology:
        """The topology, with self-loops."""
        every = torch.arange(self.nodes)
        self.link(LOOP, every, every, 2.0)
        tokens = None
        if self.tokens:
            tokens = torch.zeros(self.nodes, dtype=torch.int64)
            for nodes in self.tokens.values():
                tokens[nodes] = torch.arange(1, len(nodes) + 1)
        return Topology(self.nodes, tuple(self.blocks), tokens)


@dataclass(frozen=True)
class Entry:
    """Where a matrix of edges is in a contiguous parameter: first entry, and strides of its axes.

    Attributes:
        param: Name of the parameter.
        target: Stride from target to target.
        source: Stride from source to source.
        offset: First entry.
        taps: Entries that follow one another, for one edge.
    """

    param: str
    target: int
    source: int = 0
    offset: int = 0
    taps: int = 1


Shapes = Mapping[str, Sequence[int]]
Views = Callable[[Tensor], Tensor]


def flat(x: Tensor) -> Tensor:
    """A parameter in one row; a view if it is contiguous."""
    return x.contiguous().view(-1)


def located(
    shape: Sequence[int], view: Views
) -> tuple[Sizes, tuple[int, ...] | None, int, Tensor | None]:
    """Where a five-dimensional view of a contiguous parameter finds its entries.

    Args:
        shape: Shape of the parameter.
        view: Makes it.

    Returns:
        Its sizes, and strides and the first entry; or None, 0 and the entry of every value.
    """
    probe = torch.empty(tuple(shape), device="meta")
    seen = view(probe)
    sizes = (seen.shape[0], seen.shape[1], seen.shape[2], seen.shape[3], seen.shape[4])
    repeats = any(n > 1 and step == 0 for n, step in zip(sizes, seen.stride(), strict=True))
    if seen._base is probe and not repeats:
        return sizes, seen.stride(), int(seen.storage_offset()), None
    index = view(torch.arange(prod(shape)).view(tuple(shape)))
    return sizes, None, 0, index.contiguous()


def spans(kinds: Tensor) -> Iterator[tuple[int, int, int]]:
    """Runs of one kind in ``(n,)``: kind, start and stop."""
    if len(kinds) == 0:
        return
    edges = (kinds[1:] != kinds[:-1]).nonzero().view(-1) + 1
    bounds = [0, *edges.tolist(), len(kinds)]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        yield int(kinds[start]), start, stop
