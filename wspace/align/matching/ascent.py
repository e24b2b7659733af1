"""Coordinate ascent: one group at a time, all others held, until no group gains."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from wspace.align.matching.assign import Ask, inner_product
from wspace.align.matching.blocks import Block, Moves
from wspace.align.matching.rigid import rearranged, turned
from wspace.align.matching.signs import Key, Shift, Similarity
from wspace.align.matching.symmetry import Symmetry
from wspace.align.matching.together import Part, joined, parts_of
from wspace.nn.pieces import Slot

SAFETY = 4.0
"""A gain must exceed so many times what rounding may leave."""
Blocks = Sequence[Block]


class Ascent:
    """The state of an ascent, and its steps; many pairs of states at once, one for each row.

    Args:
        blocks: Pieces of both states.
        symmetry: What may move.
        extent: Group → units, of every group on which another depends.
        rows: Number of rows.
        device: Where the tensors are.
    """

    def __init__(
        self,
        blocks: Blocks,
        symmetry: Symmetry,
        extent: Mapping[str, int],
        rows: int,
        device: torch.device,
    ) -> None:
        self.symmetry, self.extent, self.rows, self.device = symmetry, extent, rows, device
        free = {*symmetry.sizes}
        self.blocks = [b for b in blocks if any(s.group in free for s in b.slots)]
        self.of = {g: [b for b in self.blocks if b.places(g)] for g in symmetry.sizes}
        self.gain = torch.zeros(rows, dtype=torch.float64, device=device)
        self.kept: dict[tuple[object, ...], dict[tuple[Key, torch.dtype], Tensor]] = {}
        self.moves = Moves(symmetry.over, symmetry.phases)
        for g in (g for g in symmetry.sizes if g in symmetry.permuted):  # in a fixed order
            shape = self.shape(g)
            self.moves.permutations[g] = torch.arange(shape[-1], device=device).expand(shape)
        for i, g in symmetry.gauges.items():
            neutral = 0.0 if i in symmetry.phases else 1.0
            self.moves.factors[i] = torch.full(
                self.shape(g), neutral, dtype=torch.float64, device=device
            )

    def shape(self, group: str) -> tuple[int, ...]:
        """Shape of one number for each unit of a group, ``(rows, *over, size)``."""
        over = (self.extent[o] for o in self.symmetry.over[group])
        return (self.rows, *over, self.symmetry.sizes[group])

    def part(self, rows: Tensor) -> "Ascent":
        """The same for some of the rows; what it finds is not found here before `absorb`."""
        blocks = [b.part(rows) for b in self.blocks]
        found = Ascent(blocks, self.symmetry, self.extent, len(rows), self.device)
        found.moves = self.moves.part(rows)
        return found

    def absorb(self, part: "Ascent", rows: Tensor) -> None:
        """Takes over what a part of the rows has found."""
        self.moves.put(rows, part.moves)
        self.gain.index_add_(0, rows, part.gain)

    # ------------------------------------------------------------------ units

    @cached_property
    def units(self) -> list[tuple[str, ...]]:
        """Groups that are moved in one step: one, and those that depend on it."""
        s = self.symmetry
        roots = [g for g in s.sizes if not any(o in s.permuted for o in s.over[g])]
        return [(g, *(s.dependants[g] if g in s.permuted else ())) for g in roots]

    @cached_property
    def neighbours(self) -> list[set[int]]:
        """Unit → units that it meets in a block."""
        found: list[set[int]] = [set() for _ in self.units]
        inside = {g: [i for i, unit in enumerate(self.units) if g in unit] for g in self.of}
        for block in self.blocks:
            here = {i for s in block.slots for i in inside.get(s.group, ())}
            for i in here:
                found[i] |= here - {i}
        return found

    def settle(self) -> Ask:
        """Steps until no unit gains, one after another.

        Yields:
            Costs of linear assignments.
        """
        dirty = [True] * len(self.units)
        while any(dirty):
            i = dirty.index(True)
            gained = yield from self.unit_step(self.units[i])
            dirty[i] = bool(gained.any()) and not self.exact(self.units[i])
            if bool(gained.any()):
                for j in self.neighbours[i]:
                    dirty[j] = True

    def exact(self, unit: Sequence[str]) -> bool:
        """True if a step finds the best of a unit, all else held."""
        single = all(len(b.places(g)) == 1 for g in unit for b in self.of[g])
        return single and (len(unit) == 1 or all(c.exact for c in self.parts(unit[0])))

    def unit_step(self, unit: Sequence[str], blocks: Blocks | None = None) -> Ask:
        """Moves a group and those that depend on it, where the objective gains.

        Args:
            unit: The groups, that on which the others depend first.
            blocks: What counts; everything when None.

        Yields:
            Costs of linear assignments.

        Returns:
            True for each row that gained, ``(rows,)``.
        """
        gained = yield from self._step(unit[0], blocks)
        if not self.exact(unit):
            for g in unit[1:]:
                gained = (yield from self._step(g, blocks)) | gained
        return gained

    def _step(self, g: str, blocks: Blocks | None) -> Ask:
        here = self.of[g] if blocks is None else [b for b in self.of[g] if b in blocks]
        if not here:
            return torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        s = self.symmetry
        if any(len(b.places(g)) > 1 for b in here):
            gain = yield from rearranged(self, g, here)
        elif g in s.permuted and s.dependants[g]:
            gain = yield from joined(self, g, here)
        else:
            return self._accepted((yield from self._alone(g, here)))
        return self._accepted(gain) | self._accepted(turned(self, g, here))

    def _accepted(self, gain: Tensor) -> Tensor:
        gain = gain.reshape(self.rows, -1).sum(1)
        self.gain += gain
        return gain > 0

    def least(self, here: Blocks) -> Tensor:
        """The least gain that is not rounding, for each row."""
        return SAFETY * torch.stack([b.error for b in here]).sum(0)

    def contexts(self, g: str, x: Tensor) -> Tensor:
        """One number for each row, for every context of a group: ``(rows * contexts,)``."""
        return x.repeat_interleave(max(1, self.of_contexts(g)))

    def of_contexts(self, g: str) -> int:
        """Number of permutations that a group has in each row."""
        n = 1
        for o in self.symmetry.over[g]:
            n *= self.extent[o]
        return n

    # ------------------------------------------------------------------ reading

    def read(
        self, block: Block, g: str, *, skip: Sequence[str], keep: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """A block with a group's slots in front and its contexts among the rows.

        Args:
            block: The block.
            g: The group.
            skip: Groups by which B is not moved.
            keep: Positions of slots that stay axes.

        Returns:
            A and B, ``(rows * contexts, *slots of g, *kept, rest)``.
        """
        a, b = block.load()
        b = self.moves.apply(block.slots, b, frozenset(skip))
        own = block.places(g)
        over = block.slots[own[0]].over
        front = [0, *(1 + k for k in (*over, *own, *keep))]
        order = [*front, *(d for d in range(a.dim()) if d not in front)]
        rows = self.rows * self.of_contexts(g)
        shape = (rows, *(a.shape[d] for d in front[1 + len(over) :]), -1)
        if a.numel() == 0:
            shape = (*shape[:-1], 0)
        return a.permute(order).reshape(shape), b.permute(order).reshape(shape)

    def key(self, slot: Slot) -> Key:
        """Gauges whose sign multiplies along a slot."""
        return tuple(sorted(i for i, e in slot.exponents if e % 2 and i in self.symmetry.gauges))

    # ------------------------------------------------------------------ a group alone

    def _alone(self, g: str, here: Blocks) -> Ask:
        """Best permutation, signs and phases of a group that is in every block once."""
        rows, n = self.rows * self.of_contexts(g), self.symmetry.sizes[g]
        gauges = [i for i, name in self.symmetry.gauges.items() if name == g]
        current = {i: self.moves.factors[i].reshape(rows, n) for i in gauges}
        least = self.contexts(g, self.least(here))
        if g in self.symmetry.permuted:
            p = self.moves.permutations[g].reshape(rows, n)
            table = self._similarity(g, here)
            q = yield table.best()
            old, pairs = table.chosen(p), table.chosen(q)
        else:
            p = q = torch.arange(n, device=self.device).expand(rows, n)
            old = pairs = self._similarity(g, here, pairs=True)
        new, factors = pairs.choice()
        gain = (new - old.value(current)).sum(-1)
        good = gain > least
        if g in self.symmetry.permuted:
            self.moves.permutations[g] = torch.where(good[:, None], q, p).reshape(self.shape(g))
        for i in gauges:
            if i in factors:
                both = torch.where(good[:, None], factors[i], current[i])
                self.moves.factors[i] = both.reshape(self.shape(g))
        return torch.where(good, gain, 0.0)

    def _similarity(self, g: str, here: Blocks, *, pairs: bool = False) -> Similarity:
        """Of units of A with those of B: all, ``(rows * contexts, n, n)``, or in one place."""
        if pairs:
            return self._paired(g, here)
        same = [b for b in here if b.constant(g, self.symmetry.sizes)]
        tables = dict(self._kept(g, same)) if same else {}
        shared = {*tables}
        for block in here:
            if block not in same:
                self._add(g, block, tables, shared)
        out = Similarity()
        for (key, _), table in tables.items():
            out.add(key, table)
        self._shift(g, here, out, pairs=False)
        return out

    def _kept(self, g: str, same: Blocks) -> dict[tuple[Key, torch.dtype], Tensor]:
        """Tables of blocks that no other group moves: computed once, if larger than the tables."""
        name = (g, *map(id, same))
        if name in self.kept:
            return self.kept[name]
        tables: dict[tuple[Key, torch.dtype], Tensor] = {}
        for block in same:
            self._add(g, block, tables, set())
        if sum(b.size for b in same) >= self.of_contexts(g) * self.symmetry.sizes[g] ** 2:
            self.kept[name] = tables
        return tables

    def _add(
        self,
        g: str,
        block: Block,
        tables: dict[tuple[Key, torch.dtype], Tensor],
        shared: set[tuple[Key, torch.dtype]],
    ) -> None:
        """Adds a block's inner products to the table of its signs; shared tables stay."""
        a, b = self.read(block, g, skip=(g,))
        key = (self.key(block.slots[block.places(g)[0]]), a.dtype)
        if key in shared:
            tables[key] = torch.baddbmm(tables[key], a, b.mT)
            shared.discard(key)
        elif key in tables:
            tables[key].baddbmm_(a, b.mT)
        else:
            tables[key] = a @ b.mT

    def _paired(self, g: str, here: Blocks) -> Similarity:
        """Of each unit of A with the unit of B in its place: ``(rows * contexts, n)``."""
        out = Similarity()
        for block in here:
            a, b = self.read(block, g, skip=(g,))
            out.add(self.key(block.slots[block.places(g)[0]]), (a.double() * b).sum(-1))
        self._shift(g, here, out, pairs=True)
        return out

    def _shift(self, g: str, here: Blocks, out: Similarity, *, pairs: bool) -> None:
        """Adds what phases of a group shift."""
        for block in here:
            slot = block.slots[block.places(g)[0]]
            for i, amount in slot.shifts:
                if i in self.symmetry.phases:
                    a, b = self.read(block, g, skip=(g,))
                    x, y = a.double().sum(-1), b.double().sum(-1)
                    x, y = (x, y) if pairs else (x[:, :, None], y[:, None])
                    out.shifts.append(Shift(self.key(slot), i, amount, a.shape[-1], x, y))

    # ------------------------------------------------------ a group and its dependants

    def parts(self, g: str) -> list[Part]:
        """What depends on a group, apart where nothing joins it."""
        return parts_of(g, self.symmetry, self.of[g], self.extent)

    # ------------------------------------------------------------ rearrangements, signs

    def total(self, here: Blocks | None = None) -> Tensor:
        """Inner product of blocks as things stand, for each row."""
        total = torch.zeros(self.rows, dtype=torch.float64, device=self.device)
        for block in self.blocks if here is None else here:
            a, b = block.load()
            moved = self.moves.apply(block.slots, b, frozenset())
            total += inner_product(a, moved)
            if any(i in self.symmetry.phases for slot in block.slots for i, _ in slot.shifts):
                total -= 0.5 * (moved.double() ** 2 - b.double() ** 2).flatten(1).sum(1)
        return total
