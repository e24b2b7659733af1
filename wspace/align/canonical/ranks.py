"""Ranks of units that do not depend on the order in which the units are stored.

Every unit gets a key from the entries of the tensors it meets, and units are ranked by their keys,
group by group: first by the sum of the moduli of a unit's entries, tensor after tensor until no two
units tie; ties are then refined by sums in which entries are weighted by the ranks of the units at
their other ends (colour refinement; Weisfeiler, Leman 1968). Keys must be equal for equal units
wherever they are stored, and floating-point sums depend on the order of their terms, so entries are
first rounded to whole numbers so small that every sum is exact.

Units of a group that depends on others are ranked within each of their contexts.
"""

from collections.abc import Iterator, Sequence
from math import ceil, log2, prod

import torch
from torch import Tensor

from wspace.align.canonical.laying import Course
from wspace.nn.pieces import Piece, by_unit, laid, pieces, places

MIXES = 61
ROUNDS = 8


class Ranks:
    """The ranks of the units of every free group, from equal ranks to distinct ones.

    Attributes:
        ranks: Group → ``(rows, *over, size)``, int64: equal for units that tie.
    """

    def __init__(
        self, course: Course, groups: Sequence[str], *, signed: bool, close: float
    ) -> None:
        """Starts with all units of a group tied.

        Args:
            course: The state.
            groups: The groups to rank; units of all others keep their places.
            signed: Whether the signs of entries may be looked at.
            close: Difference of keys, relative to the largest, up to which units tie.
        """
        self.course, self.signed, self.close = course, signed, close
        self.ranks = {g: torch.zeros(course.units(g), dtype=torch.int64) for g in groups}
        self._meets: dict[str, list[tuple[Piece, int]]] = {g: [] for g in groups}
        for piece in pieces(course.space, buffers=True):
            for k, slot in enumerate(piece.slots):
                if slot.group in self._meets:
                    self._meets[slot.group].append((piece, k))

    def tied(self, group: str) -> bool:
        """True if two units of a group tie, in some row and context."""
        ranks = self.ranks[group]
        return bool((ranks.amax(-1) < ranks.shape[-1] - 1).any())

    def open(self) -> list[str]:
        """The groups in which units tie."""
        return [g for g in self.ranks if self.tied(g)]

    def refine(self, group: str, keys: Tensor) -> bool:
        """Splits units that tie by their keys.

        Args:
            group: The group.
            keys: ``(rows, *over, size)``.

        Returns:
            True if some units that tied do not any more.
        """
        before = self.ranks[group]
        order = keys.argsort(dim=-1, stable=True)
        order = order.gather(-1, before.gather(-1, order).argsort(dim=-1, stable=True))
        old, new = before.gather(-1, order), keys.gather(-1, order)
        limit = self.close * keys.abs().amax(-1, keepdim=True)
        steps = (old.diff(dim=-1) != 0) | (new.diff(dim=-1) > limit)
        ranks = torch.zeros_like(before)
        ranks[..., 1:] = steps.cumsum(-1)
        after = torch.empty_like(before).scatter_(-1, order, ranks)
        self.ranks[group] = after
        return bool((after.amax(-1) > before.amax(-1)).any())

    # ------------------------------------------------------------------- rounds

    def settle(self) -> None:
        """Refines until all units are told apart, or no sum tells more of them apart."""
        for group in self.open():
            for piece, k in self._meets[group]:
                if not self.tied(group):
                    break
                self.refine(group, self._sums(piece, k, None))
        for salt in range(ROUNDS):
            gained = False
            for group in self.open():
                for piece, k in self._meets[group]:
                    if self.tied(group):
                        gained |= self.refine(group, self._sums(piece, k, salt))
            if not gained and salt:
                return

    def separate(self, limit: int) -> None:
        """Tells apart what is left: units that may change places without changing any tensor.

        One unit after another is set before those that it ties with, and the others are refined.
        This is canonical if the tied units are images of each other under the whole group, as
        equal units, dead units and whole equal branches are.

        Args:
            limit: How often; units that still tie then keep their order.
        """
        for _ in range(limit):
            groups = self.open()
            if not groups:
                return
            self._twins()
            groups = self.open()
            if not groups:
                return
            self.refine(groups[0], self._first(groups[0]))
            self.settle()

    def _first(self, group: str) -> Tensor:
        """0 for the first of the units that tie at the lowest rank, 1 for all others."""
        ranks = self.ranks[group]
        same = ranks[..., :, None] == ranks[..., None, :]
        twin = same.sum(-1) > 1
        lowest = torch.where(twin, ranks, ranks.shape[-1]).amin(-1, keepdim=True)
        first = (twin & (ranks == lowest)).double().argmax(-1, keepdim=True)
        return torch.ones(ranks.shape, dtype=torch.float64).scatter_(-1, first, 0.0)

    def _twins(self) -> None:
        """Tells apart, by place, tied units whose entries are equal place by place."""
        for group in self.open():
            pieces_of = self._meets[group]
            if any([s.group for s in piece.slots].count(group) > 1 for piece, _ in pieces_of):
                continue
            trial = Ranks.__new__(Ranks)
            trial.__dict__.update(self.__dict__, ranks=dict(self.ranks), close=0.0)
            for piece, k in pieces_of:
                for salt in range(2):
                    trial.refine(group, self._sums(piece, k, salt, by_place=True))
            if torch.equal(trial.ranks[group], self.ranks[group]):
                place = torch.arange(self.ranks[group].shape[-1]).expand(self.ranks[group].shape)
                close, self.close = self.close, 0.0
                self.refine(group, place.double())
                self.close = close

    # --------------------------------------------------------------------- keys

    def _sums(self, piece: Piece, k: int, salt: int | None, *, by_place: bool = False) -> Tensor:
        """Exact sums over a piece for every unit of a slot, ``(rows, *over, size)``.

        Args:
            piece: The piece.
            k: The slot.
            salt: Number of the weights that mix the entries; None to add them up as they are.
            by_place: Whether weights depend on places instead of ranks.

        Returns:
            The sums, whole numbers in float64.
        """
        x = self.course.read(piece)
        signed = self.signed and salt is not None
        x = x if signed else x.abs()
        others = x[0].numel() // max(1, prod(x.shape[1 + j] for j in places(piece, k)))
        bits = 52 - ceil(log2(max(1, others))) - (0 if salt is None else 6)
        top = x.abs().flatten(1).amax(1).clamp(min=1e-300)
        x = (x / top.reshape(-1, *[1] * (x.dim() - 1)) * 2.0**bits).round()
        if salt is not None:
            x = x * self._mixes(piece, k, salt, x.shape[-1], by_place=by_place)
        return by_unit(x, piece, k).sum(-1)

    def _mixes(self, piece: Piece, k: int, salt: int, rest: int, *, by_place: bool) -> Tensor:
        """Whole weights from 1 to `MIXES` for every entry: ``(rows, *slots, rest)``."""
        total = _hashed(torch.arange(rest), 31 + salt).reshape(*[1] * (1 + len(piece.slots)), -1)
        for j, slot in enumerate(piece.slots):
            if j == k:
                continue
            ranks = self.ranks.get(slot.group)
            if ranks is None or by_place:
                ranks = torch.arange(slot.size).expand(self.course.units(slot.group))
            total = total + _hashed(laid(ranks, piece, j), 7 * j + salt)[..., None]
            if slot.group == piece.slots[k].group and not slot.over:
                total = total + 17 * _diagonal(piece, j, k)[..., None]
        return (total % MIXES + 1).double()


def _hashed(ranks: Tensor, salt: int) -> Tensor:
    """Numbers that look random, below 2¹⁶."""
    return ((ranks + 1) * 2654435761 + 97 * salt * (ranks % 89 + 1)) // 128 % 65536


def _diagonal(piece: Piece, j: int, k: int) -> Tensor:
    """1 where two slots of one group have the same unit: ``(1, *slots)``."""
    shape = [1, *(s.size if i in (j, k) else 1 for i, s in enumerate(piece.slots))]
    return torch.eye(piece.slots[k].size, dtype=torch.int64).reshape(shape)


def sorting(course: Course, ranks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The permutations that sort all units by rank; units of equal rank keep their order.

    Args:
        course: The state.
        ranks: Group → ``(rows, *over, size)``.

    Returns:
        Group → indices, ``(rows, *over, size)``, read at output indices as in `Transform`.
    """
    groups, out = course.space.all_groups, dict[str, Tensor]()
    waiting = list(ranks)
    while waiting:
        name = next(n for n in waiting if not set(groups[n].over) & set(waiting))
        waiting.remove(name)
        shape, over = ranks[name].shape, groups[name].over
        grids = torch.meshgrid(*(torch.arange(n) for n in shape[:-1]), indexing="ij")
        index = dict(zip(over, grids[1:], strict=True))
        source = [grids[0]]
        for o in over:
            at = (grids[0], *(index[i] for i in groups[o].over), index[o])
            source.append(out[o][at] if o in out else index[o])
        out[name] = ranks[name].argsort(dim=-1, stable=True)[tuple(source)]
    return out


def moved_ranks(
    course: Course, ranks: dict[str, Tensor], permutations: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Ranks after the units were sorted by them.

    Args:
        course: The state.
        ranks: Group → ``(rows, *over, size)``, before.
        permutations: As `sorting` made them.

    Yields:
        Each group and its ranks in the new order.
    """
    groups = course.space.all_groups
    for name, values in ranks.items():
        grids = torch.meshgrid(*(torch.arange(n) for n in values.shape), indexing="ij")
        index = dict(zip((*groups[name].over, name), grids[1:], strict=True))
        source = [grids[0]]
        for o in (*groups[name].over, name):
            at = (grids[0], *(index[i] for i in groups[o].over), index[o])
            source.append(permutations[o][at] if o in permutations else index[o])
        yield name, values[tuple(source)]
