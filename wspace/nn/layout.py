"""The blocks of a parameter graph in the one form that message passing needs, cut into chunks.

A block between node sets becomes ``(both, target, source, taps)``, a block of node features becomes
``(target, taps)``: views of the parameter wherever strides allow. No values and no channels here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import isqrt, prod

import torch
from torch import Tensor

from wspace.graph import ParameterGraph
from wspace.graph.structure import Structure
from wspace.wiring import Block


@dataclass(frozen=True, eq=False)
class EdgeForm:
    """A block between node sets as ``(both, target, source, taps)``.

    Attributes:
        index: Place among the blocks of the structure.
        block: The block.
        sizes: Numbers of pairs P, targets T, sources S and taps F.
        source: Source units within their node set, ``(P * S,)``.
        target: Target units within their node set, ``(P * T,)``.
        order: Loops in the order both, target, source, taps; repeated taps left out.
    """

    index: int
    block: Block
    sizes: tuple[int, int, int, int]
    source: Tensor
    target: Tensor
    order: tuple[int, ...]

    @cached_property
    def entries(self) -> int:
        """Edges of the block: P * T * S."""
        return prod(self.sizes[:3])

    def raw(self, graph: ParameterGraph, batch: int) -> Tensor | None:
        """Entries of the block, ``(batch, P, T, S, F)``; None if it is structural."""
        if self.block.structural:
            return None
        return _ordered(graph.block(self.index), self.block, self.order).reshape(batch, *self.sizes)

    def entries_back(self, values: Tensor, batch: Sequence[int]) -> Tensor:
        """The inverse of `raw`: ``(*batch, *loops)``, repeated entries expanded."""
        b = self.block
        lead = len(batch)
        values = values.reshape([*batch, *(b.sizes[i] for i in self.order)])
        kept = [lead + self.order.index(i) for i in sorted(self.order)]
        values = values.permute([*range(lead), *kept])
        for i in range(len(b.sizes)):
            if i not in self.order:
                values = values.unsqueeze(lead + i)
        return values.expand([*batch, *b.sizes])


@dataclass(frozen=True, eq=False)
class FeatureForm:
    """A block of node features as ``(target, taps)``; attributes as in `EdgeForm`."""

    index: int
    block: Block
    sizes: tuple[int, int]
    target: Tensor
    order: tuple[int, ...]

    def raw(self, graph: ParameterGraph, batch: int) -> Tensor:
        """Entries of the block, ``(batch, T, F)``."""
        return _ordered(graph.block(self.index), self.block, self.order).reshape(batch, *self.sizes)

    entries_back = EdgeForm.entries_back


def _ordered(x: Tensor, block: Block, order: Sequence[int]) -> Tensor:
    lead = x.dim() - len(block.sizes)
    for i in reversed(range(len(block.sizes))):
        if i not in order:
            x = x.select(lead + i, 0)
    kept = sorted(order)
    return x.permute([*range(lead), *(lead + kept.index(i) for i in order)])


@dataclass(frozen=True, eq=False)
class Forms:
    """All blocks of a structure in the form that message passing needs, made once.

    Attributes:
        structure: The structure.
        edges: Blocks between node sets.
        features: Blocks of node features.
    """

    structure: Structure
    edges: tuple[EdgeForm, ...]
    features: tuple[FeatureForm, ...]

    @cached_property
    def receivers(self) -> tuple[Tensor, Tensor]:
        """Units that receive the messages of all blocks in a row: as targets, as sources.

        Numbers among all units of the structure.
        """
        at, none = self.structure.offsets, torch.zeros(0, dtype=torch.int64)
        targets = [f.target + at[f.block.target.nodes] for f in self.edges]
        sources = [f.source + at[f.block.source.nodes] for f in self.edges if f.block.source]
        return torch.cat([none, *targets]), torch.cat([none, *sources])

    @cached_property
    def degrees(self) -> tuple[Tensor, Tensor]:
        """Messages that every unit receives as a target and as a source, ``(N,)``, at least 1."""
        out = []
        for units, end in zip(self.receivers, (2, 1), strict=True):
            count = torch.zeros(self.structure.total)
            each = [torch.full((len(f.target if end == 2 else f.source),), float(f.sizes[end]))
                    for f in self.edges]  # fmt: skip
            count.index_add_(0, units, torch.cat(each) if each else torch.zeros(0))
            out.append(count.clamp(min=1))
        return out[0], out[1]


@lru_cache(maxsize=64)
def forms_of(structure: Structure) -> Forms:
    """The blocks of a structure in the form that message passing needs, made once."""
    edges, features = [], []
    for i, block in enumerate(structure.blocks):
        parts = [[k for k, r in enumerate(block.roles) if r == role] for role in _ROLES]
        parts[3] = [k for k in parts[3] if block.of[k] >= 0]
        both, target, source, taps = parts
        order = tuple(both + target + source + taps)
        if block.structural:
            order = tuple(both + target + source)
        size = [prod(block.sizes[k] for k in part) for part in parts]
        ends = _units(structure, i, both, target, first=False)
        if block.source is None:
            features.append(FeatureForm(i, block, (size[0] * size[1], size[3]), ends, order))
            continue
        begin = _units(structure, i, both, source, first=True)
        edges.append(EdgeForm(i, block, (size[0], size[1], size[2], size[3]), begin, ends, order))
    return Forms(structure, tuple(edges), tuple(features))


_ROLES = ("both", "target", "source", "feature")


def _units(
    s: Structure, index: int, both: Sequence[int], own: Sequence[int], *, first: bool
) -> Tensor:
    """Units at one end, within their node set, ``(P * own,)``."""
    block = s.blocks[index]
    units = s.source(index) if first else s.target(index)
    assert units is not None
    loops = [*both, *own]
    for k in reversed(range(len(block.sizes))):
        if k not in loops:
            units = units.select(k, 0)
    kept = sorted(loops)
    units = units.expand([block.sizes[k] for k in kept]).permute([kept.index(k) for k in loops])
    return units.reshape(-1)


# --------------------------------------------------------------------- chunks


Range = tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """Part of a block that is computed at once: ranges ``(start, stop)`` of everything it has.

    Attributes:
        form: Place of the block among the edges of `Forms`.
        batch: Networks.
        pairs: Pairs.
        targets: Targets.
        sources: Sources.
    """

    form: int
    batch: Range
    pairs: Range
    targets: Range
    sources: Range


@dataclass(frozen=True)
class Cuts:
    """How one block is cut: a grid of ranges."""

    batch: tuple[Range, ...]
    pairs: tuple[Range, ...]
    targets: tuple[Range, ...]
    sources: tuple[Range, ...]

    def chunks(self, form: int) -> Iterator[Chunk]:
        """All parts, sources innermost."""
        for cell in product(self.batch, self.pairs, self.targets, self.sources):
            yield Chunk(form, *cell)


@lru_cache(maxsize=256)
def cuts_of(forms: Forms, batch: int, size: int) -> tuple[Cuts, ...]:
    """Cuts every block into parts of about `size` edges.

    By networks if a block is smaller, by pairs if a pair is, and else into squares of targets and
    sources, which need the fewest node terms.

    Args:
        forms: The blocks.
        batch: Number of networks.
        size: Number of edges wanted.

    Returns:
        The cuts of every block.
    """
    out: list[Cuts] = []
    for form in forms.edges:
        pairs, targets, sources, _ = form.sizes
        area = max(1, targets * sources)
        networks, some = size // max(1, form.entries), size // area
        side = max(1, isqrt(size))
        t = targets if some else max(min(targets, side), size // max(1, sources))
        s = sources if some else size // max(1, t)
        out.append(
            Cuts(_cuts(batch, networks), _cuts(pairs, some), _cuts(targets, t), _cuts(sources, s))
        )
    return tuple(out)


def _cuts(total: int, step: int) -> tuple[Range, ...]:
    """Ranges of nearly equal length, none longer than `step`."""
    n = max(1, -(-total // max(1, step)))
    edges = [total * i // n for i in range(n + 1)]
    return tuple(zip(edges[:-1], edges[1:], strict=True))
