"""What all graphs of one space share: unit indices of every block, degrees, positions. No values.

Made once for each space and kept, so that encoding another state of it costs nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from wspace.errors import SpaceMismatch, message
from wspace.space import WeightSpace
from wspace.wiring import Block, Ends, NodeSet, Wiring


def wiring_of(space: WeightSpace) -> Wiring:
    """The wiring of a space.

    Args:
        space: Weight space that came from `trace`.

    Returns:
        Its wiring.

    Raises:
        SpaceMismatch: If the space has none, as one written by hand.
    """
    if space.wiring is None:
        raise SpaceMismatch(
            message(
                "graph: the weight space has no wiring",
                expected="a space derived by `wspace.trace`",
                help="trace the module; a space written by hand names groups but not connections",
            )
        )
    return space.wiring


def units_of(ends: Ends, sizes: Sequence[int]) -> Tensor:
    """The unit of every entry at one end of a block.

    Args:
        ends: One end of a block.
        sizes: The block's loops.

    Returns:
        Index within the node set, int64, of the shape of the loops that the end depends on, with
        size 1 in the place of the others.
    """
    rows: list[Tensor] = []
    for start, *pairs in ends.boxes:
        row = torch.tensor([start])
        for n, step in zip(pairs[::2], pairs[1::2], strict=True):
            row = (row[:, None] + torch.arange(n) * step).reshape(-1)
        rows.append(row)
    flat = rows[0] if len(rows) == 1 else torch.cat(rows)
    return flat.reshape([n if i in ends.loops else 1 for i, n in enumerate(sizes)])


@dataclass(frozen=True, eq=False)
class Structure:
    """Index tensors of a wiring, made on first use.

    Attributes:
        wiring: The wiring.
    """

    wiring: Wiring

    @property
    def nodes(self) -> tuple[NodeSet, ...]:
        """The node sets."""
        return self.wiring.nodes

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in order of execution."""
        return self.wiring.blocks

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Number of the first unit of every node set when all are counted in a row."""
        out, total = [], 0
        for n in self.nodes:
            out.append(total)
            total += n.size
        return tuple(out)

    @cached_property
    def total(self) -> int:
        """Number of units of all sets."""
        return sum(n.size for n in self.nodes)

    @cached_property
    def _ends(self) -> dict[tuple[int, bool], Tensor]:
        return {}

    def source(self, block: int) -> Tensor | None:
        """Units at the input end of a block (see `units_of`); None for node features."""
        ends = self.blocks[block].source
        return None if ends is None else self._units(block, ends, first=True)

    def target(self, block: int) -> Tensor:
        """Units at the output end of a block (see `units_of`)."""
        return self._units(block, self.blocks[block].target, first=False)

    def _units(self, block: int, ends: Ends, *, first: bool) -> Tensor:
        known = self._ends.get((block, first))
        if known is None:
            known = units_of(ends, self.blocks[block].sizes)
            self._ends[block, first] = known
        return known

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Blocks between node sets, structural ones included."""
        return tuple(i for i, b in enumerate(self.blocks) if b.source is not None)

    @cached_property
    def features(self) -> tuple[tuple[int, ...], ...]:
        """For every node set, the blocks that are features of its units."""
        out: list[list[int]] = [[] for _ in self.nodes]
        for i, b in enumerate(self.blocks):
            if b.source is None:
                out[b.target.nodes].append(i)
        return tuple(map(tuple, out))

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """For every parameter, the blocks that hold its entries: each entry in exactly one."""
        out: dict[str, list[int]] = {}
        for i, b in enumerate(self.blocks):
            if b.param and not b.again:
                out.setdefault(b.param, []).append(i)
        return {name: tuple(blocks) for name, blocks in out.items()}


@lru_cache(maxsize=64)
def _structure(wiring: Wiring) -> Structure:
    return Structure(wiring)


def structure_of(space: WeightSpace) -> Structure:
    """The structure that all graphs of a space share, made once.

    Args:
        space: Weight space that came from `trace`.

    Returns:
        Its structure.

    Raises:
        SpaceMismatch: If the space has no wiring.
    """
    return _structure(wiring_of(space))
