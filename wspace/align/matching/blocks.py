"""Pairs of pieces, one of A and one of B, and how B's is moved by what has been found so far."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wspace.nn.pieces import Slot

Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Block:
    """A piece of both states.

    Attributes:
        slots: Axes of the piece.
        load: Reads both, ``(rows, *slots, rest)``, of one dtype and device.
        error: What rounding may leave in its inner product, for each row; float64.
        size: Number of entries in each row.
    """

    slots: tuple[Slot, ...]
    load: Callable[[], Pair]
    error: Tensor
    size: int = 0

    def constant(self, group: str, free: Container[str]) -> bool:
        """True if no other free group is in it, so that its inner products stay."""
        return all(slot.group == group or slot.group not in free for slot in self.slots)

    def part(self, rows: Tensor) -> "Block":
        """The same for some of the rows."""

        def load() -> Pair:
            a, b = self.load()
            return a.index_select(0, rows), b.index_select(0, rows)

        return Block(self.slots, load, self.error[rows], self.size)

    def places(self, group: str) -> list[int]:
        """Positions of the slots of a group."""
        return [k for k, slot in enumerate(self.slots) if slot.group == group]


@dataclass
class Moves:
    """What B is moved by, for each row; groups and gauges that are absent stay.

    Attributes:
        over: Group → groups on which its permutation depends.
        phases: Gauges that are phases.
        permutations: Group → ``(rows, *sizes of over, size)``.
        factors: Gauge → ±1 for signs, whole turns for phases, of the same shape.
    """

    over: Mapping[str, tuple[str, ...]]
    phases: frozenset[int]
    permutations: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    factors: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def copy(self) -> "Moves":
        """The same, which later changes leave."""
        return Moves(self.over, self.phases, {**self.permutations}, {**self.factors})

    def part(self, rows: Tensor) -> "Moves":
        """Those of some of the rows."""
        return Moves(
            self.over,
            self.phases,
            {g: x[rows] for g, x in self.permutations.items()},
            {i: x[rows] for i, x in self.factors.items()},
        )

    def put(self, rows: Tensor, part: "Moves") -> None:
        """Replaces those of some of the rows."""
        for g, x in part.permutations.items():
            self.permutations[g] = self.permutations[g].index_copy(0, rows, x)
        for i, x in part.factors.items():
            self.factors[i] = self.factors[i].index_copy(0, rows, x)

    def put_where(self, good: Tensor, other: "Moves") -> None:
        """Takes over others in the rows that are good, ``(rows,)``."""
        for g, x in other.permutations.items():
            self.permutations[g] = _where(good, x, self.permutations[g])
        for i, x in other.factors.items():
            self.factors[i] = _where(good, x, self.factors[i])

    def sign(self, gauge: int) -> Tensor:
        """What an odd exponent of a gauge multiplies by."""
        x = self.factors[gauge]
        return 1 - 2 * torch.remainder(x, 2) if gauge in self.phases else x

    def apply(self, slots: Sequence[Slot], x: Tensor, skip: frozenset[str]) -> Tensor:
        """A piece of B, moved by all groups but some.

        Args:
            slots: Its axes.
            x: ``(rows, *slots, rest)``.
            skip: Groups that are left as they are; with a group, those that depend on it.

        Returns:
            The piece, of the same shape.
        """
        moving = [k for k, s in enumerate(slots) if s.group not in skip]
        for k in sorted(moving, key=lambda k: len(slots[k].over)):
            q = self.permutations.get(slots[k].group)
            if q is not None:
                x = gather(x, k, slots[k].over, q)
        for k in moving:
            for gauge, exponent in slots[k].exponents:
                if exponent % 2 and gauge in self.factors:
                    x = x * laid(self.sign(gauge), k, slots[k].over, x.dim()).to(x.dtype)
        for k in moving:
            for gauge, amount in slots[k].shifts:
                if gauge in self.factors:
                    turns = laid(self.factors[gauge], k, slots[k].over, x.dim())
                    x = x + (amount * turns).to(x.dtype)
        return x

    def ride(
        self, group: str, by: Tensor, others: Sequence[str], gauges: Mapping[int, str]
    ) -> None:
        """Moves on: B's units of a group, with all that depends on them, are rearranged.

        Args:
            group: The group.
            by: ``(rows, *over, size)``: which of the present units comes to each place.
            others: Groups that depend on it.
            gauges: Gauges of these groups → their group.
        """
        for name in (group, *others):
            if name in self.permutations:
                self.permutations[name] = self._ridden(group, by, name, self.permutations[name])
        for gauge, name in gauges.items():
            if gauge in self.factors and name in (group, *others):
                self.factors[gauge] = self._ridden(group, by, name, self.factors[gauge])

    def _ridden(self, group: str, by: Tensor, name: str, x: Tensor) -> Tensor:
        names = (*self.over[name], name)
        over = tuple(names.index(o) for o in self.over[group])
        return gather(x[..., None], names.index(group), over, by)[..., 0]


def _where(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return y if x is y else torch.where(rows.reshape(-1, *[1] * (x.dim() - 1)), x, y)


def gather(x: Tensor, k: int, over: Sequence[int], q: Tensor) -> Tensor:
    """One axis of ``(rows, *slots, rest)`` rearranged.

    Args:
        x: The tensor.
        k: Position of the slot.
        over: Positions of the slots on which the permutation depends.
        q: ``(rows, *over, size)``.

    Returns:
        A tensor of the shape of `x`.
    """
    if len(q) == 1 and not over:
        return x.index_select(1 + k, q[0])
    return torch.gather(x, 1 + k, laid(q, k, over, x.dim()).expand(x.shape))


def laid(values: Tensor, k: int, over: Sequence[int], dims: int) -> Tensor:
    """Numbers ``(rows, *over, size)`` laid along the slots they belong to, to be broadcast."""
    places = [0, *(1 + o for o in over), 1 + k]
    shape = [1] * dims
    for place, size in zip(places, values.shape, strict=True):
        shape[place] = size
    order = sorted(range(len(places)), key=places.__getitem__)
    return values.permute(order).reshape(shape)
