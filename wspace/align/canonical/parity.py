"""Signs: which units to flip so that what is stored does not depend on how they were flipped.

An entry's sign is a product of the signs of units at its ends: for each slot, of those gauges that
flip it. Taken modulo 2 this is a system of linear equations, an entry each, and a canonical state
makes positive as many independent entries as there are signs to choose. Such entries are found
greedily, in an order that does not depend on the signs: an entry can fix a unit if the signs at all
its other ends are fixed; of those, the largest does.

What is fixed at a unit is a linear space of combinations of gauges (one BatchNorm gain may be
flipped by the convolution before it and by the one behind it), kept in echelon form.
"""

from math import prod

import torch
from torch import Tensor

from wspace.align.canonical.laying import Course, odd
from wspace.nn.pieces import Piece, by_unit, laid, pieces

NEAR = 1e-9


class Parity:
    """The equations at every unit of one group.

    Attributes:
        gauges: Sign gauges of the group: the unknowns.
        shape: ``(rows, *over, size)``.
    """

    def __init__(self, gauges: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.gauges, self.shape = gauges, shape
        n, k = torch.Size(shape).numel(), len(gauges)
        self.left = torch.zeros(n, k, k, dtype=torch.bool)  # row j has its first 1 in column j
        self.right = torch.zeros(n, k, dtype=torch.bool)
        self.held = torch.zeros(n, k, dtype=torch.bool)

    def reduced(self, gauges: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What is left of a combination of gauges when all that is fixed is taken out.

        Args:
            gauges: The combination.

        Returns:
            ``(units, gauges)``, all False where the combination is fixed; and ``(units,)``, True
            where the part taken out is negative.
        """
        n, k = self.right.shape
        rest = torch.zeros(n, k, dtype=torch.bool)
        rest[:, [self.gauges.index(i) for i in gauges]] = True
        negative = torch.zeros(n, dtype=torch.bool)
        for j in range(k):
            use = rest[:, j] & self.held[:, j]
            if use.any():
                rest = rest ^ (use[:, None] & self.left[:, j])
                negative = negative ^ (use & self.right[:, j])
        return rest, negative

    def fix(self, gauges: tuple[int, ...], where: Tensor, negative: Tensor) -> None:
        """Fixes the product of some gauges' signs.

        Args:
            gauges: The combination; not yet fixed at these units.
            where: Units, ``(units,)``.
            negative: Whether the product is −1 there, ``(units,)``.
        """
        rest, taken = self.reduced(gauges)
        units = where.nonzero()[:, 0]
        pivot = rest[units].double().argmax(1)
        self.left[units, pivot] = rest[units]
        self.right[units, pivot] = (negative ^ taken)[units]
        self.held[units, pivot] = True

    def signs(self) -> dict[int, Tensor]:
        """One sign per unit for each gauge, ``(rows, *over, size)``; +1 where nothing fixes it."""
        n, k = self.right.shape
        x = torch.zeros(n, k, dtype=torch.bool)
        for j in reversed(range(k)):
            others = (self.left[:, j] & x).sum(1) % 2 == 1
            x[:, j] = self.held[:, j] & (self.right[:, j] ^ others)
        return {i: 1.0 - 2.0 * x[:, j].reshape(self.shape).double()
                for j, i in enumerate(self.gauges)}  # fmt: skip


def signs(course: Course) -> dict[int, Tensor]:
    """Signs that bring a state to its canonical signs, its units staying where they are.

    Args:
        course: The state.

    Returns:
        Sign gauge → ±1, ``(rows, *over, size)``.
    """
    return _Signs(course).solve()


def _rank(pair: tuple[Piece, list[int]]) -> tuple[int, int]:
    """Entries with one sign first, and of these shifts before matrices."""
    piece, slots = pair
    return len(slots), prod(piece.sizes)


class _Signs:
    def __init__(self, course: Course) -> None:
        self.course = course
        gauges = [i for i, g in enumerate(course.space.gauges) if g.kind == "sign"]
        self.known = frozenset(gauges)
        self.parities: dict[str, Parity] = {}
        for name in dict.fromkeys(course.space.gauges[i].group for i in gauges):
            own = tuple(i for i in gauges if course.space.gauges[i].group == name)
            self.parities[name] = Parity(own, course.units(name))
        found = [(p, self._flipped(p)) for p in pieces(course.space, buffers=True)]
        self.pieces = sorted(((p, ks) for p, ks in found if ks), key=_rank)

    def _flipped(self, piece: Piece) -> list[int]:
        """The slots in which signs show; a group may show in several."""
        return [k for k in range(len(piece.slots)) if odd(piece, k, self.known)]

    def solve(self) -> dict[int, Tensor]:
        while any([self._use(*pair) for pair in self.pieces]) or any(
            self._choose(*pair) for pair in self.pieces
        ):
            continue
        return {i: s for parity in self.parities.values() for i, s in parity.signs().items()}

    def _state(self, piece: Piece, k: int) -> tuple[Tensor, Tensor]:
        """Where the sign of a slot is not fixed, and the sign where it is: ``(rows, *slots)``."""
        parity = self.parities[piece.slots[k].group]
        rest, negative = parity.reduced(odd(piece, k, self.known))
        loose = rest.any(1).reshape(parity.shape)
        sign = 1.0 - 2.0 * negative.reshape(parity.shape).double()
        return laid(loose, piece, k), laid(sign, piece, k)

    def _use(self, piece: Piece, slots: list[int]) -> bool:
        """Fixes what the entries of a piece can fix; True if they did."""
        states = {k: self._state(piece, k) for k in slots}
        if not any(loose.any() for loose, _ in states.values()):
            return False
        x, done = self.course.read(piece), False
        for k in slots:
            loose = self._state(piece, k)[0]
            if not loose.any():
                continue
            y = x
            for j in slots:
                free, sign = self._state(piece, j)
                y = y * (sign if j == k else torch.where(free, 0.0, sign))[..., None]
            y = y * self._alone(piece, k, slots)
            entries = by_unit(y, piece, k).flatten(0, -2)
            size = entries.abs()
            top = size.amax(1)
            first = (size >= (1 - NEAR) * top[:, None]).double().argmax(1)
            negative = entries.gather(1, first[:, None])[:, 0] < 0
            parity = self.parities[piece.slots[k].group]
            gauges = odd(piece, k, self.known)
            rest, taken = parity.reduced(gauges)
            where = rest.any(1) & (top > 0)
            if where.any():
                parity.fix(gauges, where, negative ^ taken)
                done = True
        return done

    def _alone(self, piece: Piece, k: int, slots: list[int]) -> Tensor | float:
        """0 where another slot of the same group has the same unit."""
        out: Tensor | float = 1.0
        for j in slots:
            if j != k and piece.slots[j].group == piece.slots[k].group and not piece.slots[j].over:
                n = piece.slots[k].size
                shape = [1, *(n if i in (j, k) else 1 for i in range(len(piece.slots))), 1]
                out = out * (1 - torch.eye(n, dtype=torch.float64).reshape(shape))
        return out

    def _choose(self, piece: Piece, slots: list[int]) -> bool:
        """Fixes one sign of each row where no entry can, at the first entry with several loose."""
        if len(slots) < 2:
            return False
        loose = {k: self._state(piece, k)[0] for k in slots}
        if sum(bool(x.any()) for x in loose.values()) < 2:
            return False
        x = self.course.read(piece).abs().amax(-1)
        count = sum(x_.long() for x_ in loose.values())
        entries = by_unit(((x > 0) & (count > 1) & loose[slots[0]]).double()[..., None],
                          piece, slots[0])  # fmt: skip
        want = entries.amax(-1).flatten(1)
        if not want.any():
            return False
        parity = self.parities[piece.slots[slots[0]].group]
        first = torch.zeros_like(want, dtype=torch.bool)
        first.scatter_(1, want.argmax(1, keepdim=True), want.amax(1, keepdim=True) > 0)
        parity.fix(odd(piece, slots[0], self.known), first.flatten(),
                   torch.zeros(first.numel(), dtype=torch.bool))  # fmt: skip
        return True
