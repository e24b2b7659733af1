"""Groups on which others depend: heads and their dimensions, groups of channels and their channels.

Whatever is assigned within a unit of A depends only on which unit of B it is given. So the value of
each pair of units is a smaller problem of the same kind, solved for many pairs at once, and the
units themselves are then a linear assignment over these values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wspace.align.matching.assign import Ask, inner_product
from wspace.align.matching.blocks import Block, Moves, laid
from wspace.align.matching.signs import Key, Similarity
from wspace.align.matching.symmetry import Symmetry
from wspace.nn.pieces import Slot

if TYPE_CHECKING:
    from wspace.align.matching.ascent import Ascent

SIGNS = 3
"""So many signs of one group are chosen together with its permutation; others are turned after."""
CHUNK = 1 << 22
"""Numbers that the costs of one chunk of pairs may have."""


class Inner(NamedTuple):
    """The contents of units.

    Attributes:
        slots: Slots within a unit.
        a: ``(rows, n, *slots, rest)``.
        b: Of the same shape.
        key: Gauges whose signs multiply whole units of B.
    """

    slots: tuple[Slot, ...]
    a: Tensor
    b: Tensor
    key: Key = ()

    def turned(self, sign: Mapping[int, Tensor]) -> "Inner":
        """Under signs of the units, ``(rows, n)`` or one for all; A has them, which is the same."""
        a = self.a
        for i in self.key:
            x = sign[i].reshape(*sign[i].shape, *[1] * (a.dim() - 2)) if sign[i].dim() else sign[i]
            a = a * x.to(a)
        return self._replace(a=a)


@dataclass(frozen=True)
class Part:
    """Dependants that must be matched together, once the units around them are paired.

    Attributes:
        symmetry: Of these dependants.
        plain: True if this is one group that every block has once and nothing else: linear.
        exact: True if the best is found.
    """

    symmetry: Symmetry
    plain: bool
    exact: bool

    def reaches(self, slots: Sequence[Slot]) -> bool:
        """True if a block with these slots belongs to it."""
        return any(s.group in self.symmetry.sizes for s in slots)


def inner_slots(block: Block, g: str, family: Sequence[str]) -> tuple[list[int], tuple[Slot, ...]]:
    """Slots within the units of a group: dependants, and what else these depend on.

    Args:
        block: A block that has the group once.
        g: The group.
        family: The group and its dependants.

    Returns:
        Positions of the slots in the block, and the slots.
    """
    own = block.places(g)[0]
    outer = {own, *block.slots[own].over}
    inside = [k for k, s in enumerate(block.slots) if s.group in family and k != own]
    ruling = {o for k in inside for o in block.slots[k].over} - outer
    keep = sorted({*inside, *ruling} - outer)
    slots: list[Slot] = []
    for k in keep:
        s = block.slots[k]
        over = tuple(keep.index(o) for o in s.over if o in keep) if k in inside else ()
        slots.append(Slot(s.group, s.size, over, s.exponents, s.shifts))
    return keep, tuple(slots)


def parts_of(
    g: str, symmetry: Symmetry, blocks: Sequence[Block], extent: Mapping[str, int]
) -> list[Part]:
    """Dependants of a group, apart where no block and no dependence joins them.

    Args:
        g: The group.
        symmetry: Of the problem around it.
        blocks: Blocks of the group, each of which has it once.
        extent: Group → units.

    Returns:
        The parts.
    """
    deps = symmetry.dependants[g]
    inner = symmetry.within((*symmetry.over[g], g), deps)
    inside = [inner_slots(b, g, (g, *deps))[1] for b in blocks]
    links = [{s.group for s in slots if s.group in deps} for slots in inside]
    links += [{d, *(o for o in inner.over[d] if o in deps)} for d in deps]
    sets: list[set[str]] = []
    for link in links:
        if link:
            meet = [s for s in sets if s & link]
            sets = [s for s in sets if not s & link] + [link.union(*meet)]
    found: list[Part] = []
    for names in sorted(sets, key=lambda names: deps.index(min(names, key=deps.index))):
        own = inner.within((), [d for d in deps if d in names])
        here = [slots for slots in inside if any(s.group in names for s in slots)]
        plain = len(names) == 1 and all(len(slots) == 1 for slots in here)
        found.append(Part(own, plain, plain or _exact(own, here, extent)))
    return found


def _exact(symmetry: Symmetry, inside: list[tuple[Slot, ...]], extent: Mapping[str, int]) -> bool:
    problem = _ascent(symmetry, [Inner(s, torch.empty(0), torch.empty(0)) for s in inside], extent)
    return len(problem.units) == 1 and problem.exact(problem.units[0])


def _ascent(symmetry: Symmetry, inner: Sequence[Inner], extent: Mapping[str, int]) -> "Ascent":
    """The problem within units; A and B are ``(rows, *slots, rest)``."""
    from wspace.align.matching.ascent import Ascent

    blocks = [Block(x.slots, lambda x=x: (x.a, x.b), _error(x.a, x.b)) for x in inner]
    return Ascent(blocks, symmetry, extent, len(inner[0].a), inner[0].a.device)


def _error(a: Tensor, b: Tensor) -> Tensor:
    if not a.numel():
        return torch.zeros(len(a), dtype=torch.float64, device=a.device)
    sizes = a.flatten(1).norm(dim=1).double() * b.flatten(1).norm(dim=1).double()
    return torch.finfo(a.dtype).eps * sizes


# ------------------------------------------------------------------------ all pairs


def values(part: Part, inner: Sequence[Inner], extent: Mapping[str, int], table: Tensor) -> Ask:
    """Adds to each pair of units the best value of a part within them.

    Args:
        part: The part.
        inner: Contents of the units.
        extent: Group → units.
        table: ``(rows, n, n)``, float64; changed in place.

    Yields:
        Costs of linear assignments.
    """
    here = [x for x in inner if part.reaches(x.slots)]
    rows, n, _ = table.shape
    name = next(iter(part.symmetry.sizes))
    load = part.symmetry.sizes[name] ** 2 if part.plain else _load(here)
    for i, j in _chunks(n, max(1, CHUNK // max(1, rows * load))) if here else ():
        if part.plain:
            sim = _tables(part, here, i, j)
            best = sim.best()
            q = (yield best) if name in part.symmetry.permuted else _still(best)
            found = best.gather(-1, q[..., None]).sum((1, 2))
        else:
            problem = _ascent(part.symmetry, [_pairs(x, i, j) for x in here], extent)
            start = problem.total()
            yield from problem.settle()
            found = start + problem.gain
        table[:, i, j] += found.reshape(rows, i.stop - i.start, j.stop - j.start)


def _load(inner: Sequence[Inner]) -> int:
    return sum(x.b[0, 0].numel() for x in inner)


def _chunks(n: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of pairs, at most so many pairs each."""
    wide = min(n, most)
    high = max(1, most // wide)
    for i in range(0, n, high):
        for j in range(0, n, wide):
            yield slice(i, min(n, i + high)), slice(j, min(n, j + wide))


def _still(cost: Tensor) -> Tensor:
    return torch.arange(cost.shape[-1], device=cost.device).expand(cost.shape[:-1])


def _key(part: Part, slot: Slot) -> tuple[int, ...]:
    return tuple(sorted(i for i, e in slot.exponents if e % 2 and i in part.symmetry.gauges))


def _tables(part: Part, inner: Sequence[Inner], i: slice, j: slice) -> Similarity:
    """Costs within all pairs of some units: ``(rows * pairs, m, m)``."""
    out = Similarity()
    for x in inner:
        a, b = x.a[:, i], x.b[:, j]
        rows, hi, m = a.shape[:3]
        hj = b.shape[1]
        cost = a.reshape(rows, hi * m, -1) @ b.reshape(rows, hj * m, -1).mT
        cost = cost.reshape(rows, hi, m, hj, m).transpose(2, 3).reshape(-1, m, m)
        out.add(_key(part, x.slots[0]), cost)
    return out


def _pairs(x: Inner, i: slice, j: slice) -> Inner:
    a, b = x.a[:, i, None], x.b[:, None, j]
    shape = (len(a), a.shape[1], b.shape[2], *a.shape[3:])
    return Inner(x.slots, a.expand(shape).flatten(0, 2), b.expand(shape).flatten(0, 2))


# ---------------------------------------------------------------------- chosen pairs


def matched(part: Part, inner: Sequence[Inner], extent: Mapping[str, int], p: Tensor) -> Ask:
    """The best of a part within chosen pairs of units.

    Args:
        part: The part.
        inner: Contents of the units.
        extent: Group → units.
        p: Unit of B for each of A, ``(rows, n)``.

    Yields:
        Costs of linear assignments.

    Returns:
        Moves, one row for each row and unit.
    """
    rows = torch.arange(len(p), device=p.device)[:, None]
    here = [
        Inner(x.slots, x.a.flatten(0, 1), x.b[rows, p].flatten(0, 1))
        for x in inner
        if part.reaches(x.slots)
    ]
    if not here:
        return Moves(part.symmetry.over, part.symmetry.phases)
    problem = _ascent(part.symmetry, here, extent)
    yield from problem.settle()
    return problem.moves


# ------------------------------------------------------------------------- a step


def joined(of: "Ascent", g: str, here: Sequence[Block]) -> Ask:
    """Best permutation of a group, each pair of its units with the best of all within them.

    Signs of its units are chosen with it: pairs are valued under each combination.

    Args:
        of: The ascent; its moves are changed where that gains.
        g: The group, which every block has once.
        here: Blocks that count.

    Yields:
        Costs of linear assignments.

    Returns:
        The gain, ``(rows * contexts,)``, float64.
    """
    s = of.symmetry
    parts = of.parts(g)
    signs = [i for i, name in s.gauges.items() if name == g and i not in s.phases][:SIGNS]
    inner = [_inner(of, block, g, signs) for block in here]
    options = [*product((1.0, -1.0), repeat=len(signs))]
    tables: list[Tensor] = []
    for option in options:
        sign = {i: torch.tensor(x, dtype=torch.float64) for i, x in zip(signs, option, strict=True)}
        content = [item.turned(sign) for item in inner]
        tables.append((yield from _valued(of, parts, content)))
    table, which = torch.stack(tables).max(0)
    q = yield table
    old = _now(of, g, here)
    gain = table.gather(-1, q[..., None]).sum((1, 2)) - old
    good = gain > of.contexts(g, of.least(here))
    if not bool(good.any()):
        return torch.zeros_like(gain)
    which = which.gather(-1, q[..., None])[..., 0]
    every = torch.tensor(options, dtype=torch.float64, device=q.device)
    sign = {i: every[:, k][which] for k, i in enumerate(signs)}
    content = [item.turned(sign) for item in inner]
    for part in parts:
        found = yield from matched(part, content, of.extent, q)
        for name, x in found.permutations.items():
            old_p = of.moves.permutations[name]
            of.moves.permutations[name] = torch.where(*_placed(of, g, name, x, good), old_p)
        for i, x in found.factors.items():
            old_f = of.moves.factors[i]
            of.moves.factors[i] = torch.where(*_placed(of, g, s.gauges[i], x, good), old_f)
    of.moves.permutations[g] = torch.where(*_placed(of, g, g, q, good), of.moves.permutations[g])
    for i, x in sign.items():
        of.moves.factors[i] = torch.where(*_placed(of, g, g, x, good), of.moves.factors[i])
    return torch.where(good, _now(of, g, here) - old, 0.0)


def _valued(of: "Ascent", parts: Sequence[Part], inner: Sequence[Inner]) -> Ask:
    """Value of every pair of units.

    Yields:
        Costs of linear assignments.

    Returns:
        ``(rows, n, n)``, float64.
    """
    rows, n = inner[0].a.shape[:2]
    table = torch.zeros(rows, n, n, dtype=torch.float64, device=of.device)
    for item in inner:
        if not item.slots:
            table += item.a @ item.b.mT
    for part in parts:
        yield from values(part, inner, of.extent, table)
    return table


def _inner(of: "Ascent", block: Block, g: str, signs: Sequence[int]) -> Inner:
    """A block as its units' contents: A and B ``(rows * contexts, n, *slots, rest)``.

    B's units are under the signs that they have, but for those that are to be chosen.

    Returns:
        The contents.
    """
    own = block.places(g)[0]
    family = (g, *of.symmetry.dependants[g])
    keep, slots = inner_slots(block, g, family)
    a, b = of.read(block, g, skip=family, keep=keep)
    key = of.key(block.slots[own])
    held = {i: of.moves.factors[i].reshape(a.shape[:2]) for i in key if i not in signs}
    item = Inner(slots, a, b, tuple(held)).turned(held)
    return item._replace(key=tuple(i for i in key if i in signs))


def _now(of: "Ascent", g: str, here: Sequence[Block]) -> Tensor:
    """Inner product as things stand, for each row and context of a group."""
    total = torch.zeros((), dtype=torch.float64, device=of.device)
    for block in here:
        a, b = of.read(block, g, skip=())
        total = total + inner_product(a, b)
    return total


def _placed(of: "Ascent", g: str, name: str, x: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """What was found in every context of a group, in the layout of a group that depends on it.

    Args:
        of: The ascent.
        g: The group.
        name: Itself, or one of its dependants.
        x: ``(rows * contexts [* n], *what is left of over, size)``.
        good: Which contexts gained, ``(rows * contexts,)``.

    Returns:
        Where it counts, broadcast to ``(rows, *over, size)``, and the values.
    """
    s = of.symmetry
    over = s.over[name]
    outer = (*s.over[g], g) if name != g else s.over[g]
    names = (*outer, *(o for o in over if o not in outer))
    x = x.reshape(of.rows, *(of.extent[o] for o in names), s.sizes[name])
    x = x.permute(0, *(1 + names.index(o) for o in over), -1)
    around = tuple(over.index(o) for o in s.over[g])
    mask = good.reshape(of.rows, *(of.extent[o] for o in s.over[g]), 1)
    return laid(mask, len(over), around, x.dim()), x
