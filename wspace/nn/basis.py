"""The equivariant linear maps between parameters, enumerated: no tensors, only combinatorics.

A parameter is cut into *cells*, one for each choice of a part from every concatenation of its axes.
The index of a cell is a tuple of *slots*, one per factor. An equivariant map from cell to cell is
constant on the orbits of pairs of indices, and an orbit says which slots of one group hold the
same unit: it is a set partition of the free slots of both cells (Maron et al. 2019, Invariant and
Equivariant Graph Networks, section 3; Zhou et al. 2024, Universal Neural Functionals). Three things
are added here:

- fixed slots are told apart by value, so that the map has one coefficient for each of their values;
- two slots of a group that depends on others (wreath product, ``Group.over``) hold the same unit
  only if the slots they depend on do;
- a partition with more blocks of one group than the group has units has no orbit.

In place of orbit indicators we use the maps "equal where joined", which pool, take diagonals and
broadcast. Both families are related by a unitriangular matrix (Möbius inversion over coarser
partitions), so these are a basis as well. A map of this kind splits in three: a *view* of the input
(diagonal, then mean over some blocks), a matching of the blocks kept with those of the output, and
a view of the output read backwards (broadcast, then write on a diagonal). `signatures` collects
views whose kept blocks can be matched; `linear` runs each signature as one matrix product.

The slices of a family (``Param.at``: one tensor per expert) are stacked, with the group of the
family as the leading slot. Groups of one unit, free or fixed, are left out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product
from math import prod

from wspace.errors import SpaceMismatch, message
from wspace.space import Axis, Concat, Group, Param, WeightSpace

Factors = tuple[Group | Concat, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """One index of a cell.

    Attributes:
        group: Name of its group.
        size: Number of units, at least 2.
        fixed: True if the group's units cannot be permuted.
        over: Positions, in the cell, of the slots on which the permutation depends.
    """

    group: str
    size: int
    fixed: bool
    over: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """One parameter, or the slices of one family with the family's group as leading factor.

    Attributes:
        names: The parameter, or the slices in order.
        shape: Shape of one of them.
        factors: Factors of all axes, in order, behind the leading one of a family.
        cells: Slots of each cell, in the order of the parts, the first concatenation slowest.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    factors: Factors
    cells: tuple[tuple[Slot, ...], ...]


@dataclass(frozen=True, slots=True)
class View:
    """A way to read a cell: take diagonals, average over some blocks, keep the others.

    Attributes:
        cell: Number of the cell in its space.
        blocks: Block of every slot; -1 for fixed slots on which nothing depends.
        kept: Blocks kept, in the order of the signature.
    """

    cell: int
    blocks: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """True if no two slots are joined."""
        used = [b for b in self.blocks if b >= 0]
        return len(set(used)) == len(used)


@dataclass(frozen=True, slots=True)
class Signature:
    """Views whose kept blocks can be matched: every input view goes to every output view.

    Attributes:
        groups: Group of each kept block.
        over: For each kept block, the positions of the kept blocks on which it depends.
        sizes: Units of each kept block.
        keyed: True for a kept block of a fixed group: maps have their own coefficients for each of
            its units.
        ins: Views of inputs.
        outs: Views of outputs.
    """

    groups: tuple[str, ...]
    over: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    keyed: tuple[bool, ...]
    ins: tuple[View, ...]
    outs: tuple[View, ...]


# ------------------------------------------------------------------------------ cells


@lru_cache(maxsize=128)
def stacks(space: WeightSpace) -> tuple[Stack, ...]:
    """The parameters of a space, slices of a family stacked, each cut into cells.

    Args:
        space: The weight space.

    Returns:
        One stack per parameter or family, in the order of the (first) parameters.

    Raises:
        SpaceMismatch: If a family lacks slices or its slices have different axes.
    """
    found: list[Stack] = []
    families: dict[str, list[Param]] = {}
    for p in space.params:
        if p.at:
            families.setdefault(p.family, []).append(p)
    for p in space.params:
        if not p.at:
            found.append(_stack((p,), p, None))
        elif p is families[p.family][0]:
            members = sorted(families[p.family], key=lambda q: q.at[1] if q.at else 0)
            group = space.all_groups[p.at[0]]
            indices = [q.at and q.at[1] for q in members]
            if indices != [*range(group.size)] or any(q.axes != p.axes for q in members):
                raise SpaceMismatch(
                    message(
                        f"nn: the family of {p.name!r} is not complete",
                        expected=f"{group.size} slices of equal axes, one per unit of {group.name}",
                        got=[f"{q} at {q.at}" for q in members],
                    )
                )
            found.append(_stack(tuple(members), p, group))
    return tuple(found)


def cells(space: WeightSpace) -> tuple[tuple[Slot, ...], ...]:
    """Slots of every cell of a space: the cells of its stacks, one after another."""
    return tuple(cell for stack in stacks(space) for cell in stack.cells)


def _stack(members: tuple[Param, ...], p: Param, lead: Group | None) -> Stack:
    top = () if lead is None else (lead,)
    env: dict[str, Place] = {} if lead is None else {lead.name: ()}
    factors = tuple(f for axis in p.axes for f in axis.factors)
    if p.local:
        axes = [_lay(axis, env, (d,)) for d, axis in enumerate(p.axes)]
    else:
        axes = [_lay(Axis(factors), env, (0,))]
    found: list[tuple[Slot, ...]] = []
    for choice in product(*axes):
        entries = [((), g, {}) for g in top] + [e for part in choice for e in part]
        found.append(_slots(entries))
    return Stack(tuple(q.name for q in members), p.shape, (*top, *factors), tuple(found))


Place = tuple[int, ...]
Entry = tuple[Place, Group, Mapping[str, Place]]


def _lay(axis: Axis, env: Mapping[str, Place], place: Place) -> list[list[Entry]]:
    """Each choice of parts of an axis: its groups, with the places of the groups around them."""
    options: list[list[list[Entry]]] = []
    for j, f in enumerate(axis.factors):
        around = {**env}
        for i, other in enumerate(axis.factors):
            if i != j and isinstance(other, Group):
                around[other.name] = (*place, i)
        if isinstance(f, Group):
            options.append([[((*place, j), f, around)]])
        else:
            parts = [_lay(q, around, (*place, j, k)) for k, q in enumerate(f.parts)]
            options.append([choice for part in parts for choice in part])
    return [[e for part in choice for e in part] for choice in product(*options)]


def _slots(entries: Sequence[Entry]) -> tuple[Slot, ...]:
    entries = [e for e in entries if e[1].size > 1]
    position = {place: i for i, (place, _, _) in enumerate(entries)}
    out: list[Slot] = []
    for _, g, env in entries:
        over = () if g.fixed else tuple(position[env[o]] for o in g.over if env[o] in position)
        out.append(Slot(g.name, g.size, g.fixed, over))
    return tuple(out)


# ------------------------------------------------------------------------- dimensions


def dim_hom(space: WeightSpace) -> int:
    """Dimension of the equivariant linear maps from a space to itself, at one channel.

    ``sum over pairs of cells of prod(fixed sizes) * prod over groups of B_n(slots of the group)``
    with ``B_n(k)`` the number of partitions of ``k`` things into at most ``n`` blocks; groups that
    depend on others are counted within the blocks of these.

    Args:
        space: The weight space.

    Returns:
        Number of linearly independent maps.
    """
    kinds = Counter(cells(space))
    return sum(
        na * nb * _orbits((*a, *_shifted(b, len(a))))
        for a, na in kinds.items()
        for b, nb in kinds.items()
    )


def dim_bias(space: WeightSpace) -> int:
    """Dimension of the invariant vectors of a space: equivariant biases, or invariant functionals.

    Args:
        space: The weight space.

    Returns:
        Number of linearly independent ones, at one channel.
    """
    return sum(_orbits(cell) for cell in cells(space))


def _shifted(slots: tuple[Slot, ...], by: int) -> tuple[Slot, ...]:
    return tuple(Slot(s.group, s.size, s.fixed, tuple(o + by for o in s.over)) for s in slots)


@lru_cache(maxsize=4096)
def _orbits(slots: tuple[Slot, ...]) -> int:
    """Orbits of the group on the indices of these slots."""
    ruling = {o for s in slots for o in s.over}
    dense = prod(s.size for i, s in enumerate(slots) if s.fixed and i not in ruling)
    order = _by_depth(slots)
    return dense * sum(
        prod(_ways(slots, blocks)) for blocks in _partitions(slots, order, ruling, free=False)
    )


def _ways(slots: tuple[Slot, ...], blocks: tuple[int, ...]) -> Iterator[int]:
    """Ways to give the fixed blocks of each group different values."""
    count: Counter[str] = Counter()
    for b in dict.fromkeys(blocks):
        if b >= 0 and (s := slots[blocks.index(b)]).fixed:
            yield s.size - count[s.group]
            count[s.group] += 1


def _by_depth(slots: tuple[Slot, ...]) -> list[int]:
    """Positions of the slots, each behind those on which it depends."""
    order: list[int] = []
    while len(order) < len(slots):
        order += [
            i for i, s in enumerate(slots) if i not in order and all(o in order for o in s.over)
        ]
    return order


def _partitions(
    slots: tuple[Slot, ...], order: Sequence[int], ruling: set[int], *, free: bool
) -> Iterator[tuple[int, ...]]:
    """Partitions that have an orbit: the block of every slot, -1 for fixed ones that rule nothing.

    With `free`, also those with more blocks than a group has units (so that the one that joins
    nothing is always there), and fixed slots are joined only where free ones that depend on them
    are.

    Yields:
        Numbers of the blocks, by position of the slot.
    """
    blocks = [-1] * len(slots)

    def place(k: int, made: list[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[int, ...]]:
        if k == len(order):
            if not free or _minimal(slots, blocks):
                yield tuple(blocks)
            return
        i = order[k]
        s = slots[i]
        if s.fixed and i not in ruling:
            yield from place(k + 1, made)
            return
        kind = (s.group, tuple(blocks[o] for o in s.over))
        same = [b for b, other in enumerate(made) if other == kind]
        for b in same:
            blocks[i] = b
            yield from place(k + 1, made)
        if free or len(same) < s.size:
            blocks[i] = len(made)
            yield from place(k + 1, [*made, kind])
        blocks[i] = -1

    yield from place(0, [])


def _minimal(slots: tuple[Slot, ...], blocks: Sequence[int]) -> bool:
    """True if fixed slots are joined only as far as free slots that depend on them force it."""
    root = list(range(len(slots)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for i, j in combinations(range(len(slots)), 2):
        if blocks[i] == blocks[j] >= 0 and not slots[i].fixed:
            for a, b in zip(slots[i].over, slots[j].over, strict=True):
                root[find(a)] = find(b)
    fixed = [i for i, s in enumerate(slots) if s.fixed and blocks[i] >= 0]
    return all(find(i) == find(j) for i, j in combinations(fixed, 2) if blocks[i] == blocks[j])


# -------------------------------------------------------------------------- signatures

Key = tuple[tuple[str, tuple[int, ...]], ...]


@lru_cache(maxsize=64)
def signatures(space: WeightSpace) -> tuple[Signature, ...]:
    """The maps of `dim_hom` as products of an input view and an output view.

    The number of pairs, with all values of fixed slots, is `dim_hom`, and more only where a group
    of 2 or 3 units (or one that depends on a fixed group) meets more slots than it has units: there
    a few of the maps depend on others, and the span is the same.

    Args:
        space: The weight space.

    Returns:
        One signature for each kind of kept blocks; that of the invariants has none.
    """
    every = cells(space)
    ins: dict[Key, list[View]] = {}
    outs: dict[Key, list[View]] = {}
    for n, slots in enumerate(every):
        for blocks, kept in _readings(slots):
            orders = [(_key(slots, blocks, order), order) for order in _orders(slots, blocks, kept)]
            for key, order in orders:
                ins.setdefault(key, []).append(View(n, blocks, order))
            key, order = min(orders, key=lambda pair: pair[0])
            outs.setdefault(key, []).append(View(n, blocks, order))
    return tuple(_signature(every, ins[key], views) for key, views in outs.items())


def _readings(slots: tuple[Slot, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Partitions of a cell's slots, each with every set of blocks that can be kept.

    Yields:
        The block of every slot, and the blocks kept.
    """
    ruling = {o for s in slots for o in s.over}
    for blocks in _partitions(slots, _by_depth(slots), ruling, free=True):
        first = {b: slots[blocks.index(b)] for b in blocks if b >= 0}
        free = [b for b in sorted(first, key=blocks.index) if not first[b].fixed]
        for n in range(len(free) + 1):
            for chosen in combinations(free, n):
                needed = {blocks[o] for b in chosen for o in first[b].over}
                if all(first[b].fixed or b in chosen for b in needed):
                    kept = {*chosen, *needed}
                    yield blocks, tuple(sorted(kept, key=blocks.index))


def _orders(
    slots: tuple[Slot, ...], blocks: tuple[int, ...], kept: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """Orders of the kept blocks that differ within a group; groups by name."""
    by_group: dict[str, list[int]] = {}
    for b in kept:
        by_group.setdefault(slots[blocks.index(b)].group, []).append(b)
    for choice in product(*(permutations(by_group[name]) for name in sorted(by_group))):
        yield tuple(b for part in choice for b in part)


def _key(slots: tuple[Slot, ...], blocks: tuple[int, ...], order: tuple[int, ...]) -> Key:
    """What two views must share for their kept blocks to be matched in this order."""
    first = [slots[blocks.index(b)] for b in order]
    return tuple((s.group, tuple(order.index(blocks[o]) for o in s.over)) for s in first)


def _signature(every: tuple[tuple[Slot, ...], ...], ins: list[View], outs: list[View]) -> Signature:
    """A signature, its blocks in the order in which the largest tensor has them."""

    def natural(view: View) -> int:
        return prod(s.size for s in every[view.cell])

    best = max(outs, key=lambda v: (v.plain, natural(v)))
    turn = sorted(range(len(best.kept)), key=lambda i: best.blocks.index(best.kept[i]))

    def turned(view: View) -> View:
        return View(view.cell, view.blocks, tuple(view.kept[i] for i in turn))

    slots, view = every[best.cell], turned(best)
    first = [slots[view.blocks.index(b)] for b in view.kept]
    return Signature(
        groups=tuple(s.group for s in first),
        over=tuple(tuple(view.kept.index(view.blocks[o]) for o in s.over) for s in first),
        sizes=tuple(s.size for s in first),
        keyed=tuple(s.fixed for s in first),
        ins=tuple(map(turned, ins)),
        outs=tuple(map(turned, outs)),
    )


# ------------------------------------------------------------------- permutable inputs


@lru_cache(maxsize=64)
def permutable(space: WeightSpace) -> WeightSpace:
    """The space in which inputs and outputs may be permuted too (NFN's "NP" convention).

    A fixed axis becomes free if the wiring attaches it, as a whole, to a node set; axes of one node
    set move together, and so do all uses of a tied table. Kernel taps, spatial positions behind a
    flatten and groups on which others depend stay fixed. A space without a wiring (written by hand)
    frees each fixed group that is an axis by itself, by name.

    Args:
        space: The weight space.

    Returns:
        The same parameters with fewer fixed groups; no wiring, since it describes no network.
    """
    ruling = {o for g in space.all_groups.values() for o in g.over}
    joined = _attached(space)
    params: list[Param] = []
    for p in space.params:
        axes: list[Axis] = []
        for d, axis in enumerate(p.axes):
            g = axis.factors[0] if len(axis.factors) == 1 else None
            name = joined.get((p.name, d))
            if space.wiring is None and isinstance(g, Group):
                name = g.name
            if name is None or not isinstance(g, Group) or not g.fixed or g.name in ruling:
                axes.append(axis)
            else:
                axes.append(Axis((Group(f"{name}?", g.size, ("permutation",)),)))
        changed = tuple(axes)
        more = (p.role, p.dtype, p.ties, p.buffer, p.at, p.family)
        params.append(Param(p.name, changed, *more))
    return WeightSpace(tuple(params), capture=space.capture, extra=space.extra)


def _attached(space: WeightSpace) -> dict[tuple[str, int], str]:
    """Whole fixed axes that are attached to a node set → a name for all axes that move together."""
    if space.wiring is None:
        return {}
    root: dict[object, object] = {}

    def find(x: object) -> object:
        while root.setdefault(x, x) != x:
            x = root[x]
        return x

    found: set[tuple[str, int]] = set()
    for b in space.wiring.blocks:
        ends = {"target": b.target, "source": b.source}
        for loop, d in enumerate(b.of):
            end = ends.get(b.roles[loop])
            whole = b.param and d >= 0 and b.sizes[loop] == space[b.param].shape[d]
            if not whole or b.of.count(d) != 1:
                continue
            key = (space[b.param].name, d)
            if end is not None and loop in end.loops and space.wiring.nodes[end.nodes].fixed:
                root[find(key)] = find(end.nodes)
                found.add(key)
    return {key: f"io{find(key)}" for key in found}
