"""From index arrays to blocks: which entries of a parameter sit between which units.

A use of a parameter is given by index arrays over one grid: the coordinates of the parameter's
entries, and the units at the two ends. Here the grid is cut until every piece is a nest of loops
over a window of the parameter between two node sets, which is what a `Block` can say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wspace.trace.wire.views import Ids, compress
from wspace.wiring import Block, Ends

PIECES = 256
"""Most blocks that one use of a parameter may be cut into."""


class Lost(Exception):
    """The use cannot be written as a few nests of loops."""


@dataclass(slots=True)
class Sets:
    """Node sets under construction: consecutive ranges of unit numbers; 0 is the global one."""

    starts: list[int] = field(default_factory=lambda: [0])
    sizes: list[int] = field(default_factory=lambda: [1])
    kinds: list[str] = field(default_factory=lambda: ["global"])
    ops: list[str] = field(default_factory=lambda: [""])
    fixed: list[bool] = field(default_factory=lambda: [True])

    def new(self, size: int, kind: str, op: str, *, fixed: bool) -> Ids:
        """Unit numbers of a new set."""
        start = self.starts[-1] + self.sizes[-1]
        for column, x in zip(
            (self.starts, self.sizes, self.kinds, self.ops, self.fixed),
            (start, size, kind, op, fixed),
            strict=True,
        ):
            column.append(x)  # type: ignore[arg-type]
        return np.arange(start, start + size)

    def of(self, ids: Ids) -> int | None:
        """The set that all these units belong to; None if they are of several."""
        low, high = np.searchsorted(self.starts, (ids.min(), ids.max()), "right") - 1
        return int(low) if low == high else None

    def each(self, ids: Ids) -> Ids:
        """The set of every unit."""
        return np.searchsorted(self.starts, ids, "right") - 1


@dataclass(slots=True)
class Grid:
    """Index arrays over one grid: coordinates (first: where the parameter is at all) and ends."""

    coords: tuple[Ids, ...]
    ends: tuple[Ids, ...]

    @property
    def arrays(self) -> tuple[Ids, ...]:
        """Every index array."""
        return (*self.coords, *self.ends)

    def map(self, function: Callable[[Ids], Ids]) -> "Grid":
        """The grid with a function applied to every array."""
        return Grid(tuple(map(function, self.coords)), tuple(map(function, self.ends)))


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of a block, without its names."""

    window: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, ...]
    of: tuple[int, ...]
    roles: tuple[str, ...]
    ends: tuple[Ends, ...]


def fit(sets: Sets, coords: Sequence[Ids], ends: Sequence[Ids]) -> list[Shape]:
    """The blocks that the index arrays of one use amount to; raises `Lost` if too many."""
    work = [Grid(tuple(coords), tuple(np.maximum(e, 0) for e in ends))]
    out: list[Shape] = []
    while work:
        grid = work.pop()
        pieces = _cut(sets, grid)
        if pieces is None:
            out.append(_loops(sets, grid))
        else:
            work += reversed(pieces)
        if len(out) + len(work) > PIECES:
            raise Lost
    return out


# ------------------------------------------------------------------------- cutting


def _cut(sets: Sets, grid: Grid) -> list[Grid] | None:
    """Smaller grids, if this one is not yet a nest of loops; None if it is."""
    here = grid.coords[0]
    if (here < 0).all():
        return []
    if (here < 0).any():
        return _by_row(grid, here >= 0)
    for ids in grid.ends:
        if sets.of(ids) is None:
            return _by_row(grid, sets.each(ids))
    walked: set[int] = set()
    for c in grid.coords[1:]:
        if c.size == 1:
            continue
        dims = _varying(c)
        if shared := walked & set(dims):
            return [_unmerge(grid, min(shared))]
        walked |= set(dims)
        steps = _steps(c, dims)
        if steps is None:
            merged = next((d for d in dims if _period(c, d, least=2)), None)
            return _by_step(grid, c, dims) if merged is None else [_unmerge(grid, merged)]
        if not _nested(c, dims, steps):
            d = max(dims, key=lambda d: abs(steps[d]))
            return [_keep(grid, d, i, i + 1, 1) for i in range(_small(c.shape[d]))]
    return None


def _unmerge(grid: Grid, d: int) -> Grid:
    """Splits a dimension in which a view merged two of a parameter's."""
    inner = next((r for c in grid.coords[1:] if (r := _period(c, d, least=2))), 0)
    if not inner:
        raise Lost

    def split(a: Ids) -> Ids:
        if a.shape[d] == 1:
            return np.expand_dims(a, d)
        shape = (*a.shape[:d], a.shape[d] // inner, inner, *a.shape[d + 1 :])
        return compress(a.reshape(shape), (d, d + 1))

    return grid.map(split)


def _small(n: int) -> int:
    if n > PIECES:
        raise Lost
    return n


def _varying(a: Ids) -> list[int]:
    return [d for d, n in enumerate(a.shape) if n > 1]


def _steps(c: Ids, dims: list[int]) -> dict[int, int] | None:
    """Step of a coordinate along each dimension; None if it is not affine."""
    origin = (0,) * c.ndim
    first = c[origin]
    steps: dict[int, int] = {}
    expected = first
    for d in dims:
        steps[d] = int(c[(*origin[:d], 1, *origin[d + 1 :])] - first)
        shape = [1] * c.ndim
        shape[d] = -1
        expected = expected + steps[d] * np.arange(c.shape[d]).reshape(shape)
    return steps if (c == expected).all() else None


def _nested(c: Ids, dims: list[int], steps: dict[int, int]) -> bool:
    """True if the coordinate runs row-major through a range, without gaps or overlap."""
    order = sorted(dims, key=lambda d: abs(steps[d]))
    expected = abs(steps[order[0]])
    for d in order:
        if not expected or abs(steps[d]) != expected:
            return False
        expected *= c.shape[d]
    return True


def _by_step(grid: Grid, c: Ids, dims: list[int]) -> list[Grid]:
    """Cuts along a dimension in which a coordinate does not advance evenly."""
    for d in dims:
        moves = np.diff(np.moveaxis(c, d, 0).reshape(c.shape[d], -1), axis=0)
        if not (moves == moves[0]).all():
            change = np.flatnonzero((moves[1:] != moves[:-1]).any(1))
            out, start = [], 0
            for stop in (*(change + 2).tolist(), c.shape[d]):
                if stop > start:
                    out.append(_keep(grid, d, start, stop, 1))
                    _small(len(out))
                start = max(start, stop)
            return out
    raise Lost


def _by_row(grid: Grid, labels: NDArray[Any]) -> list[Grid]:
    """Cuts along a dimension so that rows of equal labels stay together."""
    for d in _varying(labels):
        rows = np.moveaxis(labels, d, 0).reshape(labels.shape[d], -1)
        if (rows == rows[0]).all():
            continue
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        out: list[Grid] = []
        for k in np.argsort(first):
            for start, stop, step in runs(np.flatnonzero(inverse.reshape(-1) == k)):
                out.append(_keep(grid, d, start, stop, step))
                _small(len(out))
        return out
    raise Lost


def runs(positions: Ids) -> list[tuple[int, int, int]]:
    """Increasing positions as a list of ``(start, stop, step)``."""
    out: list[tuple[int, int, int]] = []
    i, n = 0, len(positions)
    moves = np.diff(positions)
    while i < n:
        if i == n - 1:
            j, step = n, 1
        else:
            step = int(moves[i])
            other = np.flatnonzero(moves[i:] != step)
            j = i + 1 + (int(other[0]) if len(other) else n - 1 - i)
        out.append((int(positions[i]), int(positions[j - 1]) + 1, step))
        i = j
    return out


def _keep(grid: Grid, d: int, start: int, stop: int, step: int) -> Grid:
    key = (slice(None),) * d + (slice(start, stop, step),)
    return grid.map(lambda a: a[key] if a.shape[d] > 1 else a)


# --------------------------------------------------------------------------- loops


def _loops(sets: Sets, grid: Grid) -> Shape:
    """The nest of loops of a grid that needs no cutting."""
    order: list[int] = []
    of: list[int] = []
    window: list[tuple[int, int, int]] = []
    for k, c in enumerate(grid.coords[1:]):
        dims = _varying(c)
        steps = _steps(c, dims) or {}
        for d in dims:
            if steps[d] < 0:
                grid = grid.map(lambda a, d=d: np.flip(a, d) if a.shape[d] > 1 else a)
        dims.sort(key=lambda d: -abs(steps[d]))
        start = int(grid.coords[1 + k].flat[0])
        step = abs(steps[dims[-1]]) if dims else 1
        window.append((start, start + (c.size - 1) * step + 1, step))
        order += dims
        of += [k] * len(dims)
    shape = np.broadcast_shapes(*(a.shape for a in grid.arrays))
    more = [d for d, n in enumerate(shape) if d not in order and n > 1]
    of += [-1] * len(more)
    order += more
    rest = [d for d in range(len(shape)) if d not in order]
    ends = [e.transpose(*order, *rest).reshape(tuple(e.shape[d] for d in order)) for e in grid.ends]
    sizes, of, ends = _refine([shape[d] for d in order], of, ends)
    roles = tuple(_role([e.shape[i] > 1 for e in ends]) for i in range(len(sizes)))
    return Shape(
        tuple(window), tuple(sizes), tuple(of), roles, tuple(_attach(sets, e) for e in ends)
    )


def _role(varies: list[bool]) -> str:
    *source, target = varies
    if any(source):
        return "both" if target else "source"
    return "target" if target else "feature"


def _refine(
    sizes: list[int], of: list[int], ends: list[Ids]
) -> tuple[list[int], list[int], list[Ids]]:
    """Splits loops along which units repeat: positions of a flatten, heads that share."""
    i = 0
    while i < len(sizes):
        inner = next((r for e in ends if (r := _period(e, i))), 0)
        if not inner:
            i += 1
            continue
        outer = sizes[i] // inner
        sizes = [*sizes[:i], outer, inner, *sizes[i + 1 :]]
        of = [*of[:i], of[i], *of[i:]]
        ends = [
            compress(e.reshape(*e.shape[:i], outer, inner, *e.shape[i + 1 :]), (i, i + 1))
            if e.shape[i] > 1
            else np.expand_dims(e, i)
            for e in ends
        ]
    return sizes, of, ends


def _period(e: Ids, i: int, least: int = 4) -> int:
    """Length of the inner loop if units repeat along loop `i`; 0 if they do not."""
    n = e.shape[i]
    if n < least:
        return 0
    rows = np.moveaxis(e, i, 0).reshape(n, -1)
    equal = (rows == rows[0]).all(1)
    if equal[1]:
        r = int(np.argmin(equal)) or n
        if r < n and n % r == 0 and (rows.reshape(n // r, r, -1) == rows[::r, None]).all():
            return r
        return 0
    again = np.flatnonzero(equal[1:])
    if len(again) == 0:
        return 0
    r = int(again[0]) + 1
    if n % r == 0 and (rows.reshape(n // r, r, -1) == rows[None, :r]).all():
        return r
    return 0


def _attach(sets: Sets, ids: Ids) -> Ends:
    number = sets.of(ids)
    if number is None:
        raise AssertionError("units of several sets at one end of a block")
    loops = tuple(_varying(ids))
    return Ends(number, loops, boxes(ids.reshape(-1) - sets.starts[number]))


def boxes(units: Ids) -> tuple[tuple[int, ...], ...]:
    """Unit numbers as nested arithmetic sequences, a single one where possible."""
    nest = _nest(units)
    if nest is not None:
        return (nest,)
    out: list[tuple[int, ...]] = []
    start = 0
    moves = np.diff(units)
    while start < len(units):
        if start == len(units) - 1:
            out.append((int(units[start]),))
            break
        step = int(moves[start])
        other = np.flatnonzero(moves[start:] != step)
        count = 1 + (int(other[0]) if len(other) else len(units) - 1 - start)
        out.append((int(units[start]), count, step))
        start += count
    return tuple(out)


def _nest(units: Ids) -> tuple[int, ...] | None:
    n = len(units)
    if n == 1:
        return (int(units[0]),)
    moves = np.diff(units)
    step = int(moves[0])
    other = np.flatnonzero(moves != step)
    if not len(other):
        return (int(units[0]), n, step)
    inner = int(other[0]) + 1
    if n % inner or inner == 1:
        return None
    rows = units.reshape(-1, inner)
    if not (rows - rows[:, :1] == rows[0] - rows[0, 0]).all():
        return None
    outer = _nest(rows[:, 0])
    return None if outer is None else (*outer, inner, step)


# ------------------------------------------------------------------------ ledger


class Ledger:
    """Which entries of each parameter a block holds already."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.held: list[list[tuple[range, ...]]] = [[] for _ in shapes]

    def again(self, param: int, window: Sequence[tuple[int, int, int]]) -> bool:
        """Notes that a block covers a window; True if another covers some of it already."""
        new = tuple(range(*w) for w in window)
        for old in self.held[param]:
            if all(map(_meet, old, new)):
                return True
        self.held[param].append(new)
        return False

    def rest(self, param: int) -> list[tuple[tuple[int, int, int], ...]]:
        """Windows that together cover what no block holds."""
        shape, held = self.shapes[param], self.held[param]
        if sum(prod(map(len, box)) for box in held) == prod(shape):
            return []
        if not held:
            return [tuple((0, n, 1) for n in shape)]
        cells: list[list[tuple[tuple[int, int, int], Ids]]] = []
        for k, n in enumerate(shape):
            inside = np.zeros((len(held), n), bool)
            for i, box in enumerate(held):
                inside[i, box[k].start : box[k].stop : box[k].step] = True
            columns, inverse = np.unique(inside, axis=1, return_inverse=True)
            cells.append(
                [
                    (run, columns[:, c])
                    for c in range(columns.shape[1])
                    for run in runs(np.flatnonzero(inverse.reshape(-1) == c))
                ]
            )
        found: list[tuple[list[tuple[int, int, int]], Ids]] = [([], np.ones(len(held), bool))]
        for column in cells:
            found = [([*w, run], live & mask) for w, live in found for run, mask in column]
        return [tuple(w) for w, live in found if not live.any()]


def _meet(a: range, b: range) -> bool:
    if a.start >= b.stop or b.start >= a.stop:
        return False
    if a.step == b.step == 1 or a == b:
        return True
    return not set(a).isdisjoint(b)


def block_of(shape: Shape, param: str, op: str, tag: str, *, again: bool = False) -> Block:
    """The block of a shape: its last end is the target, the one before it, if any, the source."""
    *before, target = shape.ends
    source = before[0] if before else None
    return Block(
        *(param, op, source, target, shape.window),
        *(shape.sizes, shape.of, shape.roles, tag, again),
    )
