"""Parameters cut into pieces: dense tensors each of whose axes is one group.

Concatenations are sliced, products are split, and the slices of a family (one tensor per expert)
are stacked. A piece is read from a state when it is needed, so that a memory-mapped state is never
in memory as a whole. Which gauges act on an axis of a piece is written beside it.

Layout of a piece: ``(rows, *slots, rest)``. Rows are the batch axes, flattened; a slot is an axis
of a free group, or of a fixed one on which a free one depends; all other axes are in the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from wspace.action import State
from wspace.nn.basis import stacks
from wspace.space import Axis, Concat, Group, Param, WeightSpace

LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Slot:
    """One axis of a piece.

    Attributes:
        group: Name of its group.
        size: Number of units.
        over: Positions of the slots on whose index its permutation depends, in the order of
            ``Group.over``.
        exponents: Index of a gauge → its exponent here, for signs and phases.
        shifts: Index of a phase gauge → the amount that one turn adds to the piece.
        scales: Index of a gauge → its exponent here, for scales.
    """

    group: str
    size: int
    over: tuple[int, ...] = ()
    exponents: tuple[tuple[int, int], ...] = ()
    shifts: tuple[tuple[int, float], ...] = ()
    scales: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """One step from a parameter to a piece: reshape, then take a part of one axis."""

    sizes: tuple[int, ...]
    axis: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a parameter (or of a family) whose axes are single groups.

    Attributes:
        names: The parameter, or the slices of the family in order.
        family: True if the slices are stacked.
        cuts: How it is cut out.
        sizes: Sizes of all axes, in the order of the parameter.
        order: Order of these axes that brings the slots to the front.
        slots: The slots.
    """

    names: tuple[str, ...]
    family: bool
    cuts: tuple[Cut, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    slots: tuple[Slot, ...]

    def read(self, state: State, lead: int) -> Tensor:
        """The piece of a state; a view where the layout allows.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            lead: Number of batch axes.

        Returns:
            ``(rows, *slots, rest)``, float32 or float64; complex numbers are pairs in the rest.
        """
        parts = [state[name].detach() for name in self.names]
        x = torch.stack(parts, lead) if self.family else parts[0]
        n = prod(x.shape[:lead])
        for cut in self.cuts:
            x = x.reshape(n, *cut.sizes).narrow(1 + cut.axis, cut.start, cut.length)
        x = x.reshape(n, *self.sizes).permute(0, *(1 + i for i in self.order))
        if x.is_complex():
            x = torch.view_as_real(x)
        if x.dtype in LOW:
            x = x.float()
        loose = x.shape[: 1 + len(self.slots)]
        return x.reshape(*loose, prod(x.shape[1 + len(self.slots) :]))


# --------------------------------------------------------------------- cutting
# A parameter is a list of leaves (one group each) and nodes (concatenations), in axis order.


@dataclass(frozen=True, slots=True)
class _Leaf:
    group: Group
    dim: int  # -1 for the group of a family
    occurrence: int

    @property
    def size(self) -> int:
        return self.group.size


@dataclass(frozen=True, slots=True)
class _Node:
    parts: tuple[tuple["_Leaf | _Node", ...], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(prod(f.size for f in part) for part in self.parts)

    @property
    def size(self) -> int:
        return sum(self.lengths)


_Items = tuple[_Leaf | _Node, ...]


@lru_cache(maxsize=64)
def pieces(space: WeightSpace, *, buffers: bool = False) -> tuple[Piece, ...]:
    """Every piece of a space, in the order of its parameters; tied tensors once.

    Args:
        space: The weight space.
        buffers: Whether float buffers are included.

    Returns:
        The pieces.
    """
    marks = _marks(space)
    found: list[Piece] = []
    for stack in stacks(space):  # which checks that families are complete
        p = space[stack.names[0]]
        if p.buffer and not buffers:
            continue
        items: _Items = tuple(item for d, axis in enumerate(p.axes) for item in _items(axis, d))
        if p.at:
            items = (_Leaf(space.all_groups[p.at[0]], -1, 0), *items)
        for cuts, leaves in _cut(items):
            found.append(_piece(stack.names, p, cuts, leaves, marks))
    return tuple(found)


def _items(axis: Axis, dim: int, seen: dict[str, int] | None = None) -> Iterator[_Leaf | _Node]:
    """Leaves and nodes of an axis; occurrences of a group are numbered as in `Gauge`."""
    seen = {} if seen is None else seen
    for f in axis.factors:
        if isinstance(f, Concat):
            yield _Node(tuple(tuple(_items(part, dim, seen)) for part in f.parts))
        else:
            n = seen[f.name] = seen.get(f.name, -1) + 1
            yield _Leaf(f, dim, n)


def _cut(items: _Items) -> Iterator[tuple[tuple[Cut, ...], tuple[_Leaf, ...]]]:
    """Each choice of a part from every concatenation, and how to cut it out."""
    for j, item in enumerate(items):
        if isinstance(item, _Node):
            sizes, start = tuple(i.size for i in items), 0
            for part, length in zip(item.parts, item.lengths, strict=True):
                cut = Cut(sizes, j, start, length)
                start += length
                for cuts, leaves in _cut((*items[:j], *part, *items[j + 1 :])):
                    yield (cut, *cuts), leaves
            return
    yield (), tuple(item for item in items if isinstance(item, _Leaf))


_Exponents = tuple[tuple[int, int], ...]
_Mark = tuple[_Exponents, tuple[tuple[int, float], ...], _Exponents]


def _marks(space: WeightSpace) -> dict[tuple[str, int, str, int], _Mark]:
    """Exponents, shifts and scales by parameter, dimension, group and occurrence."""
    found: dict[tuple[str, int, str, int], _Mark] = {}
    for i, gauge in enumerate(space.gauges):
        for name, dim, occurrence, exponent in gauge.slots:
            key = (name, dim, gauge.group, occurrence)
            exponents, shifts, scales = found.get(key, ((), (), ()))
            if gauge.kind == "scale":
                found[key] = exponents, shifts, (*scales, (i, exponent))
            else:
                found[key] = (*exponents, (i, exponent)), shifts, scales
        for name, dim, occurrence, amount in gauge.shifts:
            key = (name, dim, gauge.group, occurrence)
            exponents, shifts, scales = found.get(key, ((), (), ()))
            found[key] = exponents, (*shifts, (i, amount)), scales
    return found


def _piece(
    names: tuple[str, ...],
    p: Param,
    cuts: tuple[Cut, ...],
    leaves: tuple[_Leaf, ...],
    marks: Mapping[tuple[str, int, str, int], _Mark],
) -> Piece:
    ruling = {o for leaf in leaves for o in leaf.group.over}
    loose = [i for i, leaf in enumerate(leaves) if leaf.group.kinds or leaf.group.name in ruling]
    order = (*loose, *(i for i in range(len(leaves)) if i not in loose))
    front = [leaves[i] for i in loose]
    slots: list[Slot] = []
    for leaf in front:
        over = tuple(_nearest(front, leaf, o) for o in leaf.group.over)
        mark = marks.get((p.name, leaf.dim, leaf.group.name, leaf.occurrence), ((), (), ()))
        slots.append(Slot(leaf.group.name, leaf.size, over, *mark))
    sizes = tuple(leaf.size for leaf in leaves)
    return Piece(names, p.at is not None, cuts, sizes, order, tuple(slots))


def _nearest(leaves: Sequence[_Leaf], of: _Leaf, group: str) -> int:
    """Position of the leaf of a group that is around another: in the same dimension, if any is."""
    places = [i for i, leaf in enumerate(leaves) if leaf.group.name == group]
    here = [i for i in places if leaves[i].dim == of.dim]
    return (here or places)[-1]


# ------------------------------------------------------------------- numbers per unit
# The units of a group have numbers of shape ``(rows, *over, size)``. In a piece they lie along a
# slot and the slots that it depends on.


def places(piece: Piece, k: int) -> tuple[int, ...]:
    """Slots along which the numbers of slot `k` lie, in the order of their own axes."""
    return (*piece.slots[k].over, k)


def laid(values: Tensor, piece: Piece, k: int) -> Tensor:
    """Numbers per unit along the slots of a piece.

    Args:
        values: ``(rows, *over, size)``.
        piece: The piece.
        k: Which slot.

    Returns:
        ``(rows, *slots)``, of size 1 where nothing varies.
    """
    where = places(piece, k)
    order = sorted(range(len(where)), key=where.__getitem__)
    sizes = [s.size if i in where else 1 for i, s in enumerate(piece.slots)]
    return values.permute(0, *(1 + i for i in order)).reshape(len(values), *sizes)


def by_unit(x: Tensor, piece: Piece, k: int) -> Tensor:
    """What a tensor of the piece's layout holds for each unit of a slot.

    Args:
        x: ``(rows, *slots, rest)``.
        piece: The piece.
        k: Which slot.

    Returns:
        ``(rows, *over, size, others)``.
    """
    where = places(piece, k)
    others = [i for i in range(len(piece.slots)) if i not in where]
    order = [*where, *others, len(piece.slots)]
    y = x.permute(0, *(1 + i for i in order))
    return y.reshape(*y.shape[: 1 + len(where)], prod(y.shape[1 + len(where) :]))
