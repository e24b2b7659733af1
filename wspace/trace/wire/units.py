"""What an activation's entries are values of, and how operators connect units.

Every activation carries *tracks*: index arrays (see `views`) that name the unit of which each
entry is a value; several if it has several unit axes, such as tokens and channels of a mixer. A
weight carries *leaves*: for each parameter that it is computed from, which entry stands where.
`Builder` turns what operators do with the two into node sets and blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import prod

import numpy as np

from wspace.trace.program import Value
from wspace.trace.solve import Solver
from wspace.trace.wire.places import Ledger, Lost, Sets, Shape, block_of, fit
from wspace.trace.wire.views import Ids, align, same
from wspace.wiring import Block

UNITS = 1 << 20
"""Most units that a product of activations may have before it is given up."""


@dataclass(slots=True)
class Units:
    """An activation.

    Attributes:
        tracks: One index array per unit axis.
        trail: Elementwise operators since the units were computed.
        fresh: True while nothing but one chain of views has read a contraction's result.
        kept: After a reduction over units: for every entry, one of the units it was computed from.
        reduced: The units that were reduced, each with the one that stands for its sum.
    """

    tracks: tuple[Ids, ...]
    trail: str = ""
    fresh: bool = False
    kept: tuple[Ids, ...] = ()
    reduced: tuple[tuple[Ids, Ids], ...] = ()


@dataclass(slots=True)
class Leaf:
    """A parameter as it enters a weight.

    Attributes:
        param: Index of the parameter.
        coords: Where the parameter is at all (-1 elsewhere), then its coordinates.
        trail: Operators applied to it.
        inner: Units of the contraction inside a weight that is a product of parameters, laid along
            extra trailing dimensions.
        whole: After a reduction, the coordinates before it; the leaf stands for entries that it
            does not list.
    """

    param: int
    coords: tuple[Ids, ...]
    trail: str = ""
    inner: Ids | None = None
    whole: tuple[Ids, ...] = ()

    def inside(self, rank: int) -> Ids:
        """The inner units, over a grid of `rank` dimensions and the extra ones."""
        assert self.inner is not None
        return self.inner.reshape((1,) * rank + self.inner.shape)


@dataclass(slots=True)
class Weight:
    """A tensor computed from parameters only."""

    leaves: tuple[Leaf, ...]


State = Units | Weight | None
"""None: an input or a constant."""


def extend(trail: str, op: str) -> str:
    """The trail with one more operator; long ones end in a digest."""
    trail = f"{trail};{op}" if trail else op
    if len(trail) <= 120:
        return trail
    return "…" + blake2b(trail.encode(), digest_size=6).hexdigest() + ";" + op


def varying(a: Ids, rank: int) -> set[int]:
    """Dimensions, among the first `rank`, along which an index array varies."""
    return {d for d in range(rank) if a.shape[d] > 1}


def map_state(state: State, function: Callable[[Ids], Ids]) -> State:
    """The state of a view."""
    if isinstance(state, Units):
        return replace(
            state,
            tracks=tuple(map(function, state.tracks)),
            kept=tuple(map(function, state.kept)),
        )
    if isinstance(state, Weight):
        return Weight(
            tuple(replace(leaf, coords=tuple(map(function, leaf.coords))) for leaf in state.leaves)
        )
    return None


@dataclass
class Builder:
    """Node sets and blocks under construction."""

    solver: Solver
    params: Sequence[Value]
    names: Sequence[str]
    sets: Sets = field(default_factory=Sets)
    blocks: list[Block] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unit_axes: dict[int, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger([v.shape for v in self.params])
        self._fits: dict[tuple[int, ...], tuple[list[Shape], object]] = {}
        self.inputs: dict[tuple[object, ...], Ids] = {}
        self._coords: dict[tuple[int, ...], tuple[Ids, ...]] = {}

    # ------------------------------------------------------------------- leaves

    def leaf(self, index: int) -> Weight:
        """A parameter as it is."""
        shape = self.params[index].shape
        coords = self._coords.get(shape)
        if coords is None:
            rank = len(shape)
            coords = (np.zeros((1,) * rank, np.int64),) + tuple(
                np.arange(n).reshape([-1 if i == k else 1 for i in range(rank)])
                for k, n in enumerate(shape)
            )
            self._coords[shape] = coords
        return Weight((Leaf(index, coords),))

    def free(self, value: Value, dims: Sequence[int]) -> bool:
        """True if units along some of these dimensions of a value may be permuted."""
        axes = value.axes
        return axes is not None and any(self.solver.free(axes[d]) for d in dims)

    def any_free(self, pools: Sequence[Sequence[Ids]]) -> bool:
        """True if some of these units may be permuted."""
        return any(
            not self.sets.fixed[n]
            for pool in pools
            for t in pool
            for n in np.unique(self.sets.each(np.maximum(t, 0)))
        )

    # ------------------------------------------------------------------- blocks

    def place(self, leaf: Leaf, ends: tuple[Ids, ...], op: str, tag: str) -> None:
        """Blocks of one use of a parameter; the arrays of the ends are aligned with the leaf's."""
        tag = "|".join(x for x in (tag, leaf.trail) if x)
        if leaf.whole:
            self._place_reduced(leaf, ends[-1], op, tag)
            return
        try:
            shapes = self._fit(leaf.coords, ends)
        except Lost:
            self.unknown.append(f"{op} of {self.names[leaf.param]}")
            return
        for shape in shapes:
            again = self.ledger.again(leaf.param, shape.window)
            self.blocks.append(block_of(shape, self.names[leaf.param], op, tag, again=again))

    def _place_reduced(self, leaf: Leaf, target: Ids, op: str, tag: str) -> None:
        """A parameter that was reduced: a feature of units of its own, which reach the target."""
        shape = np.broadcast_shapes(*(c.shape for c in leaf.whole))
        value = self.params[leaf.param]
        dims = {
            d
            for k, c in enumerate(leaf.whole[1:])
            for d in varying(c, c.ndim)
            if self.free(value, [k])
        }
        units = self.new_units(shape, dims, "input", "reduced", not dims)
        self.place(replace(leaf, whole=(), coords=leaf.whole), (units,), op, tag)
        ends = np.unique(np.maximum(target, 0))
        self.link(units.reshape(-1, 1), ends.reshape(1, -1), op, tag)

    def _fit(self, coords: tuple[Ids, ...], ends: tuple[Ids, ...]) -> list[Shape]:
        key = tuple(map(id, (*coords, None, *ends)))
        known = self._fits.get(key)
        if known is None:
            known = self._fits[key] = (fit(self.sets, coords, ends), (coords, ends))
        return known[0]

    def link(self, source: Ids, target: Ids, op: str, tag: str) -> None:
        """Structural blocks between units; the arrays share a grid."""
        if source is target:
            return
        try:
            shapes = self._fit((np.zeros((1,) * source.ndim, np.int64),), (source, target))
        except Lost:
            merged = self.gather(source)
            for shape in fit(
                self.sets, (np.zeros((1,) * source.ndim, np.int64),), (merged, target)
            ):
                self.blocks.append(block_of(shape, "", op, tag))
            return
        self.blocks += [block_of(shape, "", op, tag) for shape in shapes]

    def gather(self, ids: Ids) -> Ids:
        """One new set with the units of several, in order of appearance, joined by identities."""
        flat = np.maximum(ids.reshape(-1), 0)
        units, inverse = np.unique(flat, return_inverse=True)
        new = self.sets.new(len(units), "hidden", "gather", fixed=False)
        for number in np.unique(self.sets.each(units)):
            mine = self.sets.each(units) == number
            for shape in fit(self.sets, (np.zeros(1, np.int64),), (units[mine], new[mine])):
                self.blocks.append(block_of(shape, "", "gather", ""))
        return new[inverse].reshape(ids.shape)

    def new_units(
        self, shape: Sequence[int], dims: set[int], kind: str, op: str, fixed: bool
    ) -> Ids:
        """Index array of a new set with one unit for each index of `dims`."""
        sizes = [n if d in dims else 1 for d, n in enumerate(shape)]
        if prod(sizes) > UNITS:
            raise Lost
        return self.sets.new(prod(sizes), kind, op, fixed=fixed).reshape(sizes)

    def named_by(
        self, arrays: Sequence[Ids], shape: Sequence[int], dims: set[int], op: str, *, fixed: bool
    ) -> Ids:
        """New units over `dims`, one for each index that the arrays tell apart."""
        # batch and heads merged into one dimension repeat the same heads for every batch entry
        codes = {d: _codes(arrays, d) for d in sorted(dims)}
        sizes = [
            1 if d not in dims else n if codes[d] is None else int(codes[d].max()) + 1  # type: ignore[union-attr]
            for d, n in enumerate(shape)
        ]
        if prod(sizes) > UNITS:
            raise Lost
        units = self.sets.new(prod(sizes), "hidden", op, fixed=fixed).reshape(sizes)
        for d, code in codes.items():
            if code is not None:
                units = units.take(code, d)
        return units

    # ------------------------------------------------------------------ features

    def feature(self, weight: Weight, tracks: Sequence[Ids], rank: int, op: str, slot: str) -> None:
        """Attaches a weight, aligned with the tracks, to their units."""
        for leaf in weight.leaves:
            varies = set().union(*(varying(c, rank) for c in leaf.coords))
            order = sorted(tracks, key=lambda t: -len(varying(t, rank) & varies))
            extra = leaf.coords[0].ndim - rank
            ends = tuple(t.reshape(*t.shape, *[1] * extra) if extra else t for t in order[:1])
            if not ends:
                ends = (np.zeros((1,) * (rank + extra), np.int64),)
            others = [t for t in order[1:] if varying(t, rank) & (varies - varying(order[0], rank))]
            if leaf.inner is not None:
                touches = bool(varies & varying(ends[0], rank))
                ends = (leaf.inside(rank), ends[0]) if touches else (leaf.inside(rank),)
            elif others:
                ends = (others[0], ends[0])
            elif rows := self._rows(leaf, ends[0]):
                ends = (rows[0], ends[0])
            self.place(leaf, ends, op, slot)

    def _rows(self, leaf: Leaf, target: Ids) -> list[Ids]:
        """Units for those dimensions of a parameter that may be permuted but meet no unit."""
        dims: set[int] = set()
        value = self.params[leaf.param]
        for k, c in enumerate(leaf.coords[1:]):
            here = varying(c, c.ndim)
            if here and not here & varying(target, target.ndim) and self.free(value, [k]):
                dims |= here
        if not dims:
            return []
        shape = np.broadcast_shapes(*(c.shape for c in leaf.coords))
        return [self.new_units(shape, dims, "input", "rows", False)]

    def materialise(self, weight: Weight, value: Value, dims: set[int], op: str) -> Units:
        """A weight as an activation: new units along `dims` with the weight as their feature."""
        shape, rank = value.shape, len(value.shape)
        varies = {d for leaf in weight.leaves for c in leaf.coords for d in varying(c, rank)}
        dims = dims & varies or ({max(varies)} if varies else set())
        units = self.new_units(shape, dims, "input", op, not self.free(value, sorted(dims)))
        self.feature(weight, (units,), rank, op, "learned")
        return Units((units,))

    # -------------------------------------------------------------------- joining

    def realise(self, units: Units, rank: int) -> Units:
        """Gives the result of a reduction over units a set of its own."""
        if units.tracks or not units.reduced:
            return units
        tracks: list[Ids] = []
        for kept, (old, stands) in zip(units.kept, units.reduced, strict=True):
            names, inverse = np.unique(stands, return_inverse=True)
            new = self.sets.new(len(names), "hidden", "reduce", fixed=len(names) == 1)
            self.link(old, new[inverse], "reduce", units.trail)
            tracks.append(new[np.searchsorted(names, kept)])
        return Units(tuple(tracks))

    def reduce(self, units: Units, value: Value, rank: int, dims: set[int], op: str) -> Units:
        """After a reduction over dimensions (kept with size 1) of a value of `rank` dimensions."""
        lost = [t for t in units.tracks if varying(t, rank) & dims]
        left = [t for t in units.tracks if not varying(t, rank) & dims]
        trail = extend(units.trail, op)
        if not units.tracks and units.reduced:
            kept = tuple(_first(k, dims) for k in units.kept)
            pairs = [
                (old, _follow(stands, before, after))
                for (old, stands), before, after in zip(
                    units.reduced, units.kept, kept, strict=True
                )
            ]
            return Units((), trail, False, kept, tuple(pairs))
        if not lost:
            return Units(units.tracks, trail)
        if not left:
            kept = tuple(_first(t, dims) for t in lost)
            pairs = [
                (t.reshape(-1), np.broadcast_to(k, t.shape).reshape(-1))
                for t, k in zip(lost, kept, strict=True)
            ]
            return Units((), trail, False, kept, tuple(pairs))
        shape = np.broadcast_shapes(*(t.shape for t in left))
        over = set().union(*(varying(t, rank) for t in left))
        target = self.named_by(left, shape, over, op, fixed=not self.free(value, sorted(over)))
        for t in (*lost, *left):
            self.link(t, target, op, trail)
        return Units((target,))

    def join(
        self,
        items: Sequence[tuple[Units, bool]],
        value: Value,
        op: str,
        *,
        linear: bool,
        ordered: bool,
    ) -> Units:
        """The operands' units if they are the same, else new ones joined by structural blocks.

        Args:
            items: Operands aligned with the result, and whether nothing else reads each.
            value: The result.
            op: Operator, with its constants.
            linear: True for a sum, which may be added into a fresh operand.
            ordered: True if operands are not interchangeable.

        Returns:
            The operands' units if they are the same, else those of a new set, joined by structural
            blocks.
        """
        rank = len(value.shape)
        items = self._absorb(items)
        first = items[0][0]
        pools = [u.tracks for u, _ in items]
        if all(_equal(p, first.tracks) for p in pools[1:]):
            trails = [u.trail for u, _ in items]
            if all(t == "" for t in trails) and len(items) == 1:
                return Units(first.tracks, extend("", op))
            inside = ",".join(trails if ordered else sorted(trails))
            return Units(first.tracks, extend("", f"{op}({inside})"))
        items = [(self.realise(u, rank), single) for u, single in items]
        shared, extra, rest = _sort_tracks([u.tracks for u, _ in items], rank)
        if linear and (i := self._fresh_one(items, rest)) is not None:
            target, done = rest[i][0], i
        else:
            dims = set().union(*(varying(t, rank) for tracks in rest for t in tracks))
            fixed = not self.free(value, sorted(dims))
            shape = [max(t.shape[d] for ts in rest for t in ts) for d in range(rank)]
            everything = [t for tracks in rest for t in tracks]
            target = self.named_by(everything, shape, dims, op, fixed=fixed)
            done = -1
        for i, tracks in enumerate(rest):
            for t in tracks if i != done else ():
                slot = str(i) if ordered else ""
                self.link(t, target, op, "|".join(x for x in (slot, items[i][0].trail) if x))
        return Units((target, *shared, *extra), "", linear)

    def _absorb(self, items: Sequence[tuple[Units, bool]]) -> list[tuple[Units, bool]]:
        """Drops reductions over the very units that another operand has, as norms do."""
        whole = [u for u, _ in items if u.tracks]
        out: list[tuple[Units, bool]] = []
        for u, single in items:
            if not u.tracks and u.reduced and whole:
                mine = whole[0].tracks
                if all(any(_covers(old, t) for t in mine) for old, _ in u.reduced):
                    out.append((Units(whole[0].tracks, u.trail), single))
                    continue
            out.append((u, single))
        return out

    def _fresh_one(
        self, items: list[tuple[Units, bool]], rest: list[tuple[Ids, ...]]
    ) -> int | None:
        best: tuple[int, int] | None = None
        for i, (u, single) in enumerate(items):
            if not (u.fresh and single and not u.trail and len(rest[i]) == 1):
                continue
            number = self.sets.of(rest[i][0])
            if number is None or rest[i][0].size != self.sets.sizes[number]:
                continue
            if all(
                n >= m
                for ts in rest
                for t in ts
                for n, m in zip(rest[i][0].shape, t.shape, strict=True)
            ):
                best = max(best or (-1, -1), (number, i))
        return None if best is None else best[1]


def _equal(a: tuple[Ids, ...], b: tuple[Ids, ...]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def _codes(arrays: Sequence[Ids], d: int) -> Ids | None:
    """Number of the row along a dimension, equal rows alike; None if all are taken to differ."""
    moving = [a for a in arrays if a.shape[d] > 1]
    if not moving:
        return None
    rows = [np.moveaxis(a, d, 0).reshape(a.shape[d], -1) for a in moving]
    if not any(all((r[i] == r[0]).all() for r in rows) for i in _recurrences(rows[0])):
        return None
    _, first, inverse = np.unique(
        np.concatenate(rows, 1), axis=0, return_index=True, return_inverse=True
    )
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse.reshape(-1)]


def _recurrences(rows: Ids) -> list[int]:
    return (1 + np.flatnonzero(rows[1:, 0] == rows[0, 0])).tolist()


def _first(a: Ids, dims: set[int]) -> Ids:
    for d in dims:
        a = a.take([0], d) if a.shape[d] > 1 else a
    return a


def _follow(stands: Ids, before: Ids, after: Ids) -> Ids:
    """Representatives after another reduction, given each old one's new one."""
    names, where = np.unique(before.reshape(-1), return_index=True)
    return np.broadcast_to(after, before.shape).reshape(-1)[where][np.searchsorted(names, stands)]


def _covers(r: Ids, t: Ids) -> bool:
    """True if both arrays name the same units, whatever their layout."""
    return r.size == t.size and bool((np.sort(r.reshape(-1)) == np.sort(t.reshape(-1))).all())


def _sort_tracks(
    pools: list[tuple[Ids, ...]], rank: int
) -> tuple[list[Ids], list[Ids], list[tuple[Ids, ...]]]:
    """Tracks that all operands share; tracks along axes that the others lack; the rest of each."""
    shared = [t for t in pools[0] if all(any(same(t, s) for s in p) for p in pools[1:])]
    left = [[t for t in p if not any(same(t, s) for s in shared)] for p in pools]
    extra: list[Ids] = []
    for i, mine in enumerate(left):
        others = [s for j, p in enumerate(left) if j != i for s in p]
        taken = set().union(*(varying(s, rank) for s in others)) if others else set()
        for t in list(mine):
            if varying(t, rank) and not varying(t, rank) & taken and len(mine) > 1:
                mine.remove(t)
                extra.append(t)
    return shared, extra, [tuple(p) for p in left]


def to_grid(a: Ids, labels: Sequence[int], grid: int) -> Ids:
    """The array of a tensor whose dimensions are `labels` of a grid, over the whole grid."""
    rank = len(labels)
    order = sorted(range(rank), key=lambda i: labels[i])
    extra = a.shape[rank:]
    a = a.transpose(*order, *range(rank, a.ndim))
    shape = [1] * grid
    for i in order:
        shape[labels[i]] = a.shape[order.index(i)]
    return a.reshape(*shape, *extra)


def from_grid(a: Ids, labels: Sequence[int], grid: int) -> Ids:
    """The array of the tensor whose dimensions are these labels of a grid."""
    rest = [d for d in range(grid) if d not in labels]
    a = a.transpose(*labels, *rest, *range(grid, a.ndim))
    return a.reshape(*a.shape[: len(labels)], *a.shape[grid:])


def aligned(state: State, rank: int, wanted: int) -> State:
    """The state of a tensor of `rank` dimensions, broadcast to one of rank `wanted`."""
    return state if rank == wanted else map_state(state, lambda a: align(a, rank, wanted))
