"""The axis algebra on integers: its laws, and random programs against what they really compute."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import structure
from torch import Tensor

import wspace
from wspace.space import Axis as SpaceAxis
from wspace.space import Concat, Param, WeightSpace
from wspace.trace.derive import Naming
from wspace.trace.solve import Axis, Solver

# -------------------------------------------------------------------------------- helpers


def derived_axes(s: Solver, axes: list[Axis]) -> list[SpaceAxis]:
    """Axes as a space would have them: named groups, cases expanded. The solver is left alone."""
    values = [SimpleNamespace(axes=[axis], shape=(s.size(axis),)) for axis in axes]
    naming = Naming(copy.deepcopy(s), values)
    return [naming.axis(naming.trees[id(v)][0]) for v in values]


def picture(s: Solver, axes: list[Axis]) -> object:
    """What is known of axes, up to names: sizes, freedom, parts, and which groups they share."""
    named = derived_axes(s, axes)
    names = {}
    for axis in named:
        for g in axis.groups():
            if not g.fixed:
                names.setdefault(g.name, f"g{len(names)}[{g.size}]")

    def rename(tree: object) -> object:
        if isinstance(tree, str):
            return names[tree]
        return type(tree)(map(rename, tree)) if isinstance(tree, tuple | list) else tree

    return [rename(_join_fixed(structure(axis))) for axis in named]


def _join_fixed(factors: tuple) -> tuple:
    """Neighbouring parts that cannot move as one; one position is such a part."""
    out: list[object] = []
    for f in factors:
        if not isinstance(f, list):
            out.append(f)
            continue
        parts: list[tuple] = []
        for part in map(_join_fixed, f):
            now = part or (1,)
            if parts and all(isinstance(x[0], int) and len(x) == 1 for x in (now, parts[-1])):
                parts[-1] = (parts[-1][0] + now[0],)
            else:
                parts.append(now)
        out.append(parts[0] if len(parts) == 1 else parts)
    return tuple(out)


def factorizations(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of `n` elements."""
    found = [(n,)]
    for a in range(2, n):
        if n % a == 0:
            found.append((a, n // a))
            found += [(a, b, n // a // b) for b in range(2, n // a) if (n // a) % b == 0]
    return st.sampled_from(found)


sizes = st.sampled_from([2, 3, 4, 6, 8, 9, 12, 16, 18, 24])


@st.composite
def split_axes(draw: st.DrawFn, count: int) -> tuple[Solver, list[Axis], int]:
    """Axes of one size, each cut into factors or parts in some way."""
    s, n = Solver(), draw(sizes)
    axes = [s.atom(n) for _ in range(count)]
    for axis in axes:
        how = draw(st.sampled_from(["whole", "product", "parts", "fixed"]))
        if how == "product":
            s.reshape([axis], draw(factorizations(n)))
        elif how == "parts":
            cut = draw(st.integers(1, n - 1))
            s.narrow([axis], 0, 0, cut)
        elif how == "fixed" and draw(st.booleans()):
            s.freeze(axis)
    return s, axes, n


# ------------------------------------------------------------------------------- unification


def replay(pairs: list[tuple[int, int]], seed: tuple[int, list[tuple]]) -> object:
    """Picture after unifying pairs of axes that were cut as `seed` says."""
    n, cuts = seed
    s = Solver()
    axes = [s.atom(n) for _ in cuts]
    for axis, (how, value) in zip(axes, cuts, strict=True):
        if how == "product":
            s.reshape([axis], value)
        elif how == "parts":
            s.narrow([axis], 0, 0, value)
        elif how == "fixed":
            s.freeze(axis)
    for i, j in pairs:
        s.unify(axes[i], axes[j])
    return picture(s, axes)


@st.composite
def seeds(draw: st.DrawFn, count: int = 3) -> tuple[int, list[tuple]]:
    n = draw(sizes)
    cuts: list[tuple] = []
    for _ in range(count):
        how = draw(st.sampled_from(["whole", "product", "parts", "fixed"]))
        if how == "product":
            cuts.append((how, draw(factorizations(n))))
        elif how == "parts":
            cuts.append((how, draw(st.integers(1, n - 1))))
        else:
            cuts.append((how, None))
    return n, cuts


@given(seeds())
def test_unify_is_idempotent(seed: tuple[int, list[tuple]]) -> None:
    assert replay([(0, 1)], seed) == replay([(0, 1), (0, 1), (1, 0), (0, 0)], seed)


@given(seeds())
def test_unify_is_commutative(seed: tuple[int, list[tuple]]) -> None:
    assert replay([(0, 1)], seed) == replay([(1, 0)], seed)


@given(seeds())
def test_unify_is_transitive_in_any_order(seed: tuple[int, list[tuple]]) -> None:
    pictures = [
        replay(list(order), seed) for order in itertools.permutations([(0, 1), (1, 2), (0, 2)], 2)
    ]
    assert all(p == pictures[0] for p in pictures)


@given(split_axes(2))
def test_unified_axes_are_equal(case: tuple[Solver, list[Axis], int]) -> None:
    s, (a, b), _ = case
    s.unify(a, b)
    assert picture(s, [a]) == picture(s, [b])
    assert picture(s, [a, b]) == picture(s, [a, a])


@given(split_axes(3))
def test_sizes_are_conserved(case: tuple[Solver, list[Axis], int]) -> None:
    s, axes, n = case
    s.unify(axes[0], axes[1])
    s.unify(axes[1], axes[2])
    s.freeze(axes[2])
    for axis in axes:
        assert s.size(axis) == s.size(s.resolve(axis)) == n
        for a in s.resolve(axis):
            parts = s.parts(a)
            assert parts is None or sum(map(s.size, parts)) == s.size((a,))


def frozen(s: Solver, axis: Axis) -> list[bool]:
    """For every position of an axis, whether nothing can move it."""

    def positions(axis: SpaceAxis) -> list[bool]:
        out = [True]
        for f in axis.factors:
            if isinstance(f, Concat):
                here = [x for part in f.parts for x in positions(part)]
            else:
                here = [f.fixed] * f.size
            out = [x and y for x in out for y in here]
        return out

    return positions(derived_axes(s, [axis])[0])


@given(split_axes(3), st.data())
def test_nothing_thaws(case: tuple[Solver, list[Axis], int], data: st.DataObject) -> None:
    s, axes, n = case
    for _ in range(4):
        before = [frozen(s, axis) for axis in axes]
        i, j = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
        match data.draw(st.sampled_from(["unify", "freeze", "reshape", "narrow"])):
            case "unify":
                s.unify(axes[i], axes[j])
            case "freeze":
                s.freeze(axes[i])
            case "reshape":
                s.reshape([axes[i]], data.draw(factorizations(n)))
            case _:
                start = data.draw(st.integers(0, n - 1))
                s.narrow([axes[i]], 0, start, data.draw(st.integers(start + 1, n)))
        for old, axis in zip(before, axes, strict=True):
            new = frozen(s, axis)
            assert all(now for was, now in zip(old, new, strict=True) if was)


def test_freezing_one_fixes_what_was_unified_with_it_before_and_after() -> None:
    s = Solver()
    a, b, c = (s.atom(6) for _ in range(3))
    s.unify(a, b)
    s.freeze(a)
    s.unify(c, b)
    assert not s.free(b)
    assert not s.free(c)


# ------------------------------------------------------------------------------ views and cuts


@given(st.lists(st.sampled_from([2, 3, 4, 5, 6]), min_size=1, max_size=3), st.data())
def test_reshape_and_back(shape: list[int], data: st.DataObject) -> None:
    s = Solver()
    axes = s.fresh(shape)
    there = s.reshape(axes, data.draw(factorizations(prod(shape))))
    back = s.reshape(there, shape)
    assert [s.size(a) for a in back] == shape
    assert picture(s, [*axes, *back]) == picture(s, [*axes, *axes])


def test_a_view_that_cannot_be_described_freezes_all_of_it() -> None:
    """When it gives up, what it had already placed stays free in the input."""
    s = Solver()
    a, b = s.fresh([6, 2])
    s.reshape([a, b], [2, 2, 3])
    assert not s.free(a)
    assert not s.free(b)


def test_merging_and_splitting_keeps_axes_free() -> None:
    s = Solver()
    a, b = s.fresh([3, 5])
    (joint,) = s.reshape([a, b], [15])
    again = s.reshape([joint], [3, 5])
    assert [s.resolve(x) for x in again] == [s.resolve(a), s.resolve(b)]
    assert s.free(a)
    assert s.free(b)


def test_an_incompatible_view_freezes() -> None:
    s = Solver()
    a, b = s.fresh([4, 6])
    views = s.reshape([a, b], [3, 8])
    assert not any(map(s.free, (a, b, *views)))


@given(st.integers(2, 12), st.data())
def test_narrow_and_concat_round_trip(n: int, data: st.DataObject) -> None:
    """Pieces laid side by side again are the axis: unifying with it loses nothing."""
    s = Solver()
    axis = s.atom(n)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(1, n - 1), max_size=3))})
    pieces = [s.narrow([axis], 0, a, b)[0] for a, b in itertools.pairwise(cuts)]
    assert [s.size(p) for p in pieces] == [b - a for a, b in itertools.pairwise(cuts)]
    before = picture(s, [axis])
    joined = s.concat(pieces)
    s.unify(axis, joined)
    assert picture(s, [axis]) == before
    assert all(s.free(p) for p in pieces if s.size(p) > 1)


def test_what_is_learnt_late_applies_to_what_was_seen_early() -> None:
    """A product found by one view refines an axis that two others already shared."""
    s = Solver()
    a, b, c = (s.atom(6) for _ in range(3))
    s.unify(a, b)
    s.unify(b, c)
    h, d = s.reshape([c], [2, 3])
    assert s.resolve(a) == s.resolve(h) + s.resolve(d)
    s.freeze(h)
    assert [s.fixed(x) for x in s.resolve(b)] == [True, False]
    first, second = s.atom(2), s.atom(4)
    s.unify(s.concat([first, second]), whole := s.atom(6))
    s.freeze(second)
    assert frozen(s, whole) == [False] * 2 + [True] * 4


def test_an_axis_of_size_one_is_empty() -> None:
    s = Solver()
    assert s.atom(1) == ()
    assert s.size(()) == 1
    assert not s.free(())


def test_dependence_shrinks() -> None:
    """`d` may depend on `h` until a tensor has one without the other, or `h` is mixed."""
    s = Solver()
    h, d = s.fresh([3, 5])
    assert s.over(d[0]) == set(h)
    s.settle([[h, d]])
    assert s.over(d[0]) == set(h)
    s.settle([[d]])
    assert s.over(d[0]) == set()
    h, d = s.fresh([3, 5])
    s.mix([h, d], [0])
    assert s.over(d[0]) == set()
    assert s.over(h[0]) == set(d)


def test_unified_atoms_keep_what_they_have_in_common() -> None:
    s = Solver()
    h, d = s.fresh([3, 5])
    g, e = s.fresh([2, 5])
    s.unify(d, e)
    s.settle([[h, d], [g, e]])
    assert s.over(d[0]) == set()


# ------------------------------------------------- random programs against what they compute


@dataclass(repr=False)
class Machine:
    """Runs one program twice: on axes, and (again and again) on integers.

    A program rearranges tensors and ends in numbers: contractions of two tensors, and marginals
    along an axis that must stay in place. A group element is right if those numbers stay.
    """

    s: Solver = field(default_factory=Solver)
    leaves: list[tuple[int, ...]] = field(default_factory=list)
    axes: list[list[Axis]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    steps: list[Callable[[list[Tensor]], Tensor]] = field(default_factory=list)
    results: list[Callable[[list[Tensor]], Tensor]] = field(default_factory=list)
    listing: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return "\n".join(["m = Machine()", *(f"m.{line}" for line in self.listing)])

    def leaf(self, shape: tuple[int, ...]) -> None:
        self.listing.append(f"leaf({shape})")
        assert not self.steps
        self.leaves.append(shape)
        self.axes.append(self.s.fresh(shape))
        self.shapes.append(shape)

    def push(self, axes: list[Axis], step: Callable[[list[Tensor]], Tensor], *used: int) -> None:
        sizes = tuple(map(self.s.size, axes))
        self.axes.append(list(axes))
        self.shapes.append(sizes)
        self.steps.append(step)
        self.s.settle([*(self.axes[i] for i in used), axes])

    def reshape(self, i: int, shape: tuple[int, ...]) -> None:
        self.listing.append(f"reshape({i}, {shape})")
        axes = self.s.reshape(self.axes[i], shape)
        self.push(axes, lambda v: v[i].reshape(shape), i)

    def permute(self, i: int, order: tuple[int, ...]) -> None:
        self.listing.append(f"permute({i}, {order})")
        self.push([self.axes[i][d] for d in order], lambda v: v[i].permute(order), i)

    def narrow(self, i: int, dim: int, start: int, stop: int) -> None:
        self.listing.append(f"narrow({i}, {dim}, {start}, {stop})")
        axes = self.s.narrow(self.axes[i], dim, start, stop)
        self.push(axes, lambda v: v[i].narrow(dim, start, stop - start), i)

    def concat(self, i: int, j: int, dim: int) -> None:
        self.listing.append(f"concat({i}, {j}, {dim})")
        out = list(self.axes[i])
        for d, axis in enumerate(self.axes[j]):
            if d != dim:
                self.s.unify(out[d], axis)
        out[dim] = self.s.concat([self.axes[i][dim], self.axes[j][dim]])
        self.push(out, lambda v: torch.cat([v[i], v[j]], dim), i, j)

    def sum(self, i: int, dim: int) -> None:
        self.listing.append(f"sum({i}, {dim})")
        self.s.mix(self.axes[i], [dim])
        axes = [a for d, a in enumerate(self.axes[i]) if d != dim]
        self.push(axes, lambda v: v[i].square().sum(dim), i)

    def multiply(self, i: int, j: int) -> None:
        """An elementwise product: both move together."""
        self.listing.append(f"multiply({i}, {j})")
        for a, b in zip(self.axes[i], self.axes[j], strict=True):
            self.s.unify(a, b)
        self.push(list(self.axes[i]), lambda v: v[i] * v[j], i, j)

    def contract(self, i: int, j: int) -> None:
        self.multiply(i, j)
        self.listing[-1] = f"contract({i}, {j})"
        k = len(self.axes) - 1
        self.results.append(lambda v: v[k].sum())

    def keep(self, i: int, dim: int) -> None:
        """A marginal: what is left when the axis is an output."""
        self.listing.append(f"keep({i}, {dim})")
        self.s.freeze(self.axes[i][dim])
        others = [d for d in range(len(self.shapes[i])) if d != dim]
        self.s.mix(self.axes[i], others)
        self.s.settle([self.axes[i]])
        self.results.append(lambda v: (v[i] ** 2).sum(others) if others else v[i])

    def space(self) -> WeightSpace:
        """The weight space of the leaves."""
        values = [SimpleNamespace(axes=a, shape=n) for a, n in zip(self.axes, self.leaves)]  # noqa: B905
        naming = Naming(self.s, values)
        return WeightSpace(
            tuple(
                Param(f"x{i}", tuple(naming.axis(t) for t in naming.trees[id(value)]))
                for i, value in enumerate(values)
            )
        )

    def run(self, leaves: list[Tensor]) -> list[Tensor]:
        values = list(leaves)
        for step in self.steps:
            values.append(step(values))
        return [result(values) for result in self.results]


SHAPES = [(6,), (4,), (2, 3), (3, 2), (4, 3), (6, 2), (2, 2, 3), (2, 3, 4), (3, 4), (5, 2), (12,)]
STEPS = "reshape permute narrow concat sum multiply contract keep".split()


@st.composite
def programs(draw: st.DrawFn, length: int = 7) -> Machine:
    m = Machine()
    for _ in range(draw(st.integers(1, 3))):
        m.leaf(draw(st.sampled_from(SHAPES)))
    for _ in range(draw(st.integers(1, length))):
        i = draw(st.integers(0, len(m.axes) - 1))
        if m.shapes[i]:
            dim = draw(st.integers(0, len(m.shapes[i]) - 1))
            _step(draw, m, draw(st.sampled_from(STEPS)), i, dim)
    last = len(m.axes) - 1
    m.contract(last, last)
    return m


def _step(draw: st.DrawFn, m: Machine, what: str, i: int, dim: int) -> None:
    """One step of a random program, on tensor `i`; none where it does not apply."""
    shape = m.shapes[i]

    def beside(other: tuple[int, ...]) -> bool:
        without = shape[:dim] + shape[dim + 1 :]
        return len(other) == len(shape) and other[:dim] + other[dim + 1 :] == without

    def partner(fits: Callable[[tuple[int, ...]], bool]) -> int:
        return draw(st.sampled_from([j for j, other in enumerate(m.shapes) if fits(other)]))

    if what == "reshape" and prod(shape) > 1:
        m.reshape(i, draw(factorizations(prod(shape))))
    elif what == "permute":
        m.permute(i, tuple(draw(st.permutations(range(len(shape))))))
    elif what == "narrow" and shape[dim] > 1:
        start = draw(st.integers(0, shape[dim] - 1))
        m.narrow(i, dim, start, draw(st.integers(start + 1, shape[dim])))
    elif what == "concat" and shape[dim] < 8:
        m.concat(i, partner(beside), dim)
    elif what in ("multiply", "contract"):
        getattr(m, what)(i, partner(shape.__eq__))
    elif what in ("sum", "keep"):
        getattr(m, what)(i, dim)


def assert_sound(m: Machine, elements: int = 6) -> None:
    space = m.space()
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randint(-5, 6, n, generator=generator) for n in m.leaves]
    before = m.run(leaves)
    state = {f"x{i}": x for i, x in enumerate(leaves)}
    chosen: list[list[str] | None] = [None] * elements + [[g] for g in space.groups]
    for groups in chosen:
        t = wspace.sample(space, generator=generator, groups=groups)
        moved = wspace.act(t, state, space)
        after = m.run([moved[f"x{i}"] for i in range(len(leaves))])
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b), f"{groups or 'all groups'} of\n{space}"


@given(programs())
@settings(max_examples=400)
def test_every_derived_element_is_allowed(m: Machine) -> None:
    assert_sound(m)


def test_fixed_indices_that_are_exchanged() -> None:
    """Fixed axes that are identified stay two atoms, so d may depend on one of them."""
    m = Machine()
    m.leaf((2, 2, 3))
    m.permute(0, (1, 0, 2))
    m.keep(0, 0)
    m.contract(1, 0)
    assert_sound(m)


def test_a_tensor_and_its_transpose() -> None:
    m = Machine()
    m.leaf((2, 2, 3))
    m.permute(0, (1, 0, 2))
    m.contract(0, 1)
    assert_sound(m)


@pytest.mark.slow
@given(programs(length=12))
@settings(max_examples=3000, phases=[Phase.explicit, Phase.generate])
def test_every_derived_element_is_allowed_in_long_programs(m: Machine) -> None:
    assert_sound(m)


def allowed(m: Machine, draws: int = 3) -> int:
    """Number of permutations of the entries of the one leaf that keep all results."""
    (shape,) = m.leaves
    n = prod(shape)
    generator = torch.Generator().manual_seed(0)
    cases = [torch.randint(-99, 100, (n,), generator=generator) for _ in range(draws)]
    before = [m.run([x.reshape(shape)]) for x in cases]
    return sum(
        all(
            all(map(torch.equal, b, m.run([x[list(order)].reshape(shape)])))
            for x, b in zip(cases, before, strict=True)
        )
        for order in itertools.permutations(range(n))
    )


def derived(m: Machine) -> int:
    """Number of distinct permutations of the entries of the one leaf in the derived group."""
    (shape,) = m.leaves
    space, n = m.space(), prod(shape)
    labels = {"x0": torch.arange(n).reshape(shape)}
    generator = torch.Generator().manual_seed(0)
    return len(
        {
            tuple(
                wspace.act(wspace.sample(space, generator=generator), labels, space)["x0"]
                .flatten()
                .tolist()
            )
            for _ in range(600)
        }
    )


def test_the_whole_group_is_found_where_it_is_known() -> None:
    """Counted by brute force over all orders of the six entries."""
    free = Machine()
    free.leaf((6,))
    free.contract(0, 0)
    assert allowed(free) == derived_at_least(free, 720, most=300)

    split = Machine()
    split.leaf((6,))
    split.narrow(0, 0, 0, 2)
    split.contract(1, 1)
    split.narrow(0, 0, 2, 6)
    split.contract(2, 2)
    assert allowed(split) == derived(split) == 2 * 24

    rows = Machine()
    rows.leaf((2, 3))
    rows.sum(0, 1)  # the sum of each row, squared and added up: a wreath product
    rows.contract(1, 1)
    assert allowed(rows) == derived(rows) == 2 * 6**2

    kept = Machine()
    kept.leaf((2, 3))
    kept.keep(0, 0)
    assert allowed(kept) == derived(kept) == 6**2


def derived_at_least(m: Machine, total: int, *, most: int) -> int:
    """`total` if many distinct elements are found (there are too many to see each)."""
    return total if derived(m) > most else 0


def test_the_oracle_sees_a_wrong_group() -> None:
    m = Machine()
    m.leaf((6,))
    m.steps.append(lambda v: v[0].narrow(0, 0, 2))  # a slice that the solver is not told of
    m.axes.append([m.s.atom(2)])
    m.shapes.append((2,))
    m.results.append(lambda v: v[1].sum())
    with pytest.raises(AssertionError, match="all groups"):
        assert_sound(m)
