"""The enumeration of equivariant maps against tables, and against orbits counted by brute force."""

from collections.abc import Iterator
from math import prod

import pytest
import torch
from cases import build
from cases_mlp import mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.func import functional_call, vmap

import wspace
from wspace.action import Transform, shape_of
from wspace.errors import SpaceMismatch
from wspace.nn.basis import Signature, View, cells, dim_bias, dim_hom, permutable, signatures
from wspace.nn.cells import averaged, width
from wspace.nn.linear import EquivariantLinear, InvariantPool
from wspace.space import Axis, Concat, Group, Param, WeightSpace

P = ("permutation",)


def space_of(shapes: dict[str, tuple[Group | Axis, ...]], *extra: Group) -> WeightSpace:
    """A space from the axes of each parameter."""
    params = (
        Param(name, tuple(a if isinstance(a, Axis) else Axis((a,)) for a in axes))
        for name, axes in shapes.items()
    )
    return WeightSpace(tuple(params), extra=extra)


def perceptron(*widths: int, free: bool = False) -> WeightSpace:
    """A multilayer perceptron; with `free`, inputs and outputs are permuted too."""
    last = len(widths) - 1
    g = [Group(f"g{i}", n, P if free or 0 < i < last else ()) for i, n in enumerate(widths)]
    shapes: dict[str, tuple[Group | Axis, ...]] = {}
    for i in range(last):
        shapes |= {f"{i}.weight": (g[i + 1], g[i]), f"{i}.bias": (g[i + 1],)}
    return space_of(shapes)


def small_cnn() -> WeightSpace:
    taps, g = Group("3", 3), [Group(f"g{i}", n, P) for i, n in enumerate((16, 16, 16))]
    io = [Group("in", 1), Group("out", 10)]
    shapes: dict[str, tuple[Group | Axis, ...]] = {}
    for i, (b, a) in enumerate(((g[0], io[0]), (g[1], g[0]), (g[2], g[1]))):
        shapes |= {f"{i}.weight": (b, a, taps, taps), f"{i}.bias": (b,)}
    return space_of(shapes | {"3.weight": (io[1], g[2]), "3.bias": (io[1],)})


def recurrent(x: Group, h: Group, y: Group) -> WeightSpace:
    shapes: dict[str, tuple[Group | Axis, ...]] = {"ih": (h, x), "hh": (h, h), "bh": (h,)}
    return space_of(shapes | {"ho": (y, h), "bo": (y,)})


def residual() -> WeightSpace:
    """Embedding, one block of two layers and a head around one stream."""
    s, h, x, y = Group("s", 4, P), Group("h", 5, P), Group("2", 2), Group("3", 3)
    shapes: dict[str, tuple[Group | Axis, ...]] = {"we": (s, x), "w1": (h, s), "b1": (h,)}
    return space_of(shapes | {"w2": (s, h), "b2": (s,), "wo": (y, s), "bo": (y,)})


def power(n: int, slots: int) -> WeightSpace:
    return space_of({"a": (Group("g", n, P),) * slots})


A, D, E = Group("a", 3, P), Group("d", 2, P, ("a",)), Group("e", 2, P, ("a",))
KEY = Group("k", 3)
UNDER = Group("u", 2, P, ("k",))
F = Group("f", 2)

# Reference values of the published systems' algebra: entries, maps, biases.
GOLDEN: dict[str, tuple[WeightSpace, int, int, int]] = {
    "mnist siren": (perceptron(2, 32, 32, 1), 1185, 75, 7),
    "mnist siren np": (perceptron(2, 32, 32, 1, free=True), 1185, 57, 6),
    "cifar siren": (perceptron(2, 32, 32, 3), 1251, 163, 11),
    "cifar siren np": (perceptron(2, 32, 32, 3, free=True), 1251, 62, 6),
    "3-4-2": (perceptron(3, 4, 2), 26, 100, 8),
    "3-4-2 np": (perceptron(3, 4, 2, free=True), 26, 32, 4),
    "2-3-4-3-2": (perceptron(2, 3, 4, 3, 2), 48, 164, 11),
    "2-3-4-3-2 np": (perceptron(2, 3, 4, 3, 2, free=True), 48, 100, 8),
    "2-3-3-2": (perceptron(2, 3, 3, 2), 29, 114, 9),
    "2-3-3-2 np": (perceptron(2, 3, 3, 2, free=True), 29, 62, 6),
    "2-3-3-1": (perceptron(2, 3, 3, 1), 25, 75, 7),
    "small cnn zoo": (small_cnn(), 4970, 3784, 50),
    "rnn": (recurrent(Group("2", 2), Group("h", 8, P), Group("3", 3)), 115, 204, 11),
    "rnn np": (recurrent(Group("x", 4, P), Group("h", 8, P), Group("y", 4, P)), 140, 81, 6),
    "residual": (residual(), 72, 221, 12),
    "square": (power(4, 2), 16, 15, 2),
    "square of 3": (power(3, 2), 9, 14, 2),
    "square of 2": (power(2, 2), 4, 8, 2),
    "cube": (power(6, 3), 216, 203, 5),
    "one unit": (power(1, 2), 1, 1, 1),
    "one layer": (perceptron(3, 2), 8, 64, 8),
}
S = Group("s", 4, P)

# Wreath products, concatenations and families, with no published value.
ODD = {
    "heads": space_of({"q": (A * D, S), "o": (S, A * D), "b": (D * A,)}),
    "heads twice": space_of({"a": (A * D, A * D)}),
    "two dependents": space_of({"a": (A * D,), "b": (A * E,), "c": (A, D)}),
    "joint": space_of({"a": (A * (D + F), A), "b": (F + A,)}),
    "inside": space_of({"a": (A * Axis((Concat((Axis((D,)), Axis((E,)))),)), F), "b": (A,)}),
    "over fixed": space_of({"a": (KEY * UNDER,), "b": (KEY,), "c": (UNDER, KEY * F)}),
    "over fixed twice": space_of({"a": (KEY * UNDER, KEY * UNDER)}),
    "cube of 2": power(2, 3),
    "concatenation": space_of({"a": (A + A + F, A), "b": (A + F,)}),
    "family": WeightSpace(
        tuple(Param(f"e{i}", (Axis((D,)), F * A), at=("a", i), family="e0") for i in range(3))
        + (Param("gate", (Axis((A,)),)),)
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------ oracles


def generators(space: WeightSpace) -> Iterator[Transform]:
    """A transposition and a cycle of each group, within each unit of what it depends on."""
    for g in space.groups.values():
        if g.fixed or g.size == 1:
            continue
        *over, n = shape_of(g, space)
        for i in range(prod(over)):
            for p in ([1, 0, *range(2, n)], [*range(1, n), 0]):
                table = torch.arange(n).repeat(prod(over), 1)
                table[i] = torch.tensor(p)
                yield Transform(space, {g.name: table.reshape(*over, n)}, {})


def sources(space: WeightSpace, t: Transform) -> Tensor:
    """Where each entry of a flattened state is read from."""
    at, state = 0, {}
    for p in space.params:
        state[p.name] = torch.arange(at, at + p.numel).reshape(p.shape)
        at += p.numel
    moved = wspace.act(t, state, space)
    return torch.cat([moved[p.name].flatten() for p in space.params])


def orbits(moves: list[Tensor], count: int) -> int:
    """Number of orbits of points under the group that these moves generate."""
    to = torch.cat([torch.arange(count), *moves])
    start = torch.arange(count).repeat(1 + len(moves))
    graph = coo_array((torch.ones(len(to)).numpy(), (start.numpy(), to.numpy())), (count, count))
    return connected_components(graph, directed=False)[0]


def counted(space: WeightSpace) -> tuple[int, int]:
    """Dimensions of the maps and of the biases, as orbits on pairs of entries and on entries."""
    n = sum(p.numel for p in space.params)
    moves = [sources(space, t) for t in generators(space)]
    pairs = [(p[:, None] * n + p).flatten() for p in moves]
    return orbits(pairs, n * n), orbits(moves, n)


def null_space(space: WeightSpace) -> int:
    """Dimension of the matrices that commute with every generator, by linear algebra."""
    n = sum(p.numel for p in space.params)
    eye, rows = torch.eye(n, dtype=torch.float64), []
    for t in generators(space):
        rho = eye[sources(space, t)]
        rows.append(torch.kron(rho, eye) - torch.kron(eye, rho.T.contiguous()))
    return n * n - int(torch.linalg.matrix_rank(torch.cat(rows)))


def maps(layer: EquivariantLinear) -> tuple[Tensor, Tensor]:
    """The matrix of a layer of one channel for each single weight, and the bias for each."""
    space = layer.space
    n = sum(p.numel for p in space.params)
    eye, at, x = torch.eye(n, dtype=torch.float64), 0, {}
    for p in space.params:
        x[p.name] = eye[:, at : at + p.numel].reshape(n, *p.shape, 1)
        at += p.numel
    params = {k: p.detach() for k, p in layer.named_parameters()}
    flat = torch.cat([p.flatten() for p in params.values()])

    def run(vector: Tensor, features: dict[str, Tensor]) -> Tensor:
        parts = vector.split([p.numel() for p in params.values()])
        own = {k: v.reshape(p.shape) for (k, p), v in zip(params.items(), parts, strict=True)}
        y = functional_call(layer, own, (features,))
        return torch.cat([y[p.name].reshape(len(y[p.name]), -1) for p in space.params], 1)

    units = torch.eye(len(flat), dtype=torch.float64)
    zero = {name: torch.zeros_like(t[:1]) for name, t in x.items()}
    bias = vmap(lambda v: run(v, zero))(units)[:, 0]
    return vmap(lambda v: run(v, x), chunk_size=256)(units).flatten(1) - bias.repeat(1, n), bias


def ranks(space: WeightSpace) -> tuple[int, int]:
    matrices, bias = maps(EquivariantLinear(space, 1, 1).double())
    return int(torch.linalg.matrix_rank(matrices)), int(torch.linalg.matrix_rank(bias))


def products(space: WeightSpace) -> int:
    """Number of weights of a layer of one channel, counted from the signatures."""
    every = cells(space)

    def total(s: Signature, views: tuple[View, ...]) -> int:
        return sum(width(every[v.cell], v) for v in views)

    return sum(
        prod(n for n, keyed in zip(s.sizes, s.keyed, strict=True) if keyed)
        * (total(s, s.ins) * total(s, s.outs))
        for s in signatures(space)
    )


# -------------------------------------------------------------------------------- tests

each_golden = pytest.mark.parametrize("name", GOLDEN)
SMALL = [name for name, (_, entries, *_) in GOLDEN.items() if entries < 80]


@each_golden
def test_golden_dimensions(name: str) -> None:
    space, entries, maps, biases = GOLDEN[name]
    assert sum(p.numel for p in space.params) == entries
    assert (dim_hom(space), dim_bias(space)) == (maps, biases)


@pytest.mark.parametrize("name", SMALL)
def test_golden_ranks(name: str) -> None:
    """What the layer can express has the dimension of the table."""
    space, _, maps, biases = GOLDEN[name]
    assert ranks(space) == (maps, biases)


@pytest.mark.parametrize("name", [*SMALL, *ODD])
def test_dimensions_by_brute_force(name: str) -> None:
    space = ODD[name] if name in ODD else GOLDEN[name][0]
    assert counted(space) == (dim_hom(space), dim_bias(space))


@pytest.mark.parametrize("name", ODD)
def test_ranks_of_odd_spaces(name: str) -> None:
    assert ranks(ODD[name]) == (dim_hom(ODD[name]), dim_bias(ODD[name]))


@pytest.mark.parametrize("name", ["square of 3", "square of 2", "one layer", "over fixed"])
def test_orbits_are_the_null_space(name: str) -> None:
    """The oracle itself, against ``rho_out(g) M = M rho_in(g)`` solved for ``M``."""
    space = ODD[name] if name in ODD else GOLDEN[name][0]
    if name == "one layer":
        space = perceptron(3, 2, free=True)
    assert null_space(space) == counted(space)[0]


@each_golden
def test_no_weight_is_superfluous(name: str) -> None:
    """As many weights as dimensions, but for groups smaller than the slots that meet."""
    space, _, maps, _ = GOLDEN[name]
    if name in {"square of 3", "square of 2"}:
        assert products(space) > maps
    else:
        assert products(space) == maps


@pytest.mark.parametrize("sizes", [(5, 7, 3), (5, 7, 11, 3)])
def test_closed_forms(sizes: tuple[int, ...]) -> None:
    """Notes 1: ``4 L² + 10 L - 4`` maps and ``2 L`` biases when inputs and outputs are permuted."""
    layers = len(sizes) - 1
    space = perceptron(*sizes, free=True)
    assert dim_hom(space) == 4 * layers**2 + 10 * layers - 4
    assert dim_bias(space) == 2 * layers


def axes(groups: list[Group], fixed: Group, heads: Group, dims: Group) -> st.SearchStrategy[Axis]:
    atoms = st.sampled_from([Axis((g,)) for g in (*groups, fixed)])
    plain = st.one_of(atoms, st.builds(lambda a, b: a * b, atoms, atoms))
    wreath = st.sampled_from([heads * dims, dims * heads, heads * (dims + fixed)])
    return st.one_of(plain, wreath, st.builds(lambda a, b: a + b, atoms, st.one_of(atoms, wreath)))


@st.composite
def spaces(draw: st.DrawFn) -> WeightSpace:
    size = st.integers(1, 3)
    groups = [Group(name, draw(size), P) for name in "ab"]
    heads = Group("h", draw(size), draw(st.sampled_from([P, ()])))
    dims = Group("d", draw(size), P, ("h",))
    each = axes(groups, Group("f", draw(size)), heads, dims)
    shapes = st.lists(st.lists(each, min_size=1, max_size=2), min_size=1, max_size=3)
    params, left = [], 40
    for i, dimensions in enumerate(draw(shapes)):
        p = Param(f"p{i}", tuple(dimensions))
        if p.numel <= left:
            params.append(p)
            left -= p.numel
    return WeightSpace(tuple(params or [Param("p", (Axis((groups[0],)),))]))


@given(spaces())
def test_random_dimensions(space: WeightSpace) -> None:
    assert counted(space) == (dim_hom(space), dim_bias(space))


@settings(max_examples=12)
@given(spaces().filter(lambda s: products(s) < 800))
def test_random_ranks(space: WeightSpace) -> None:
    assert ranks(space) == (dim_hom(space), dim_bias(space))


@pytest.mark.slow
@settings(max_examples=300)
@given(spaces().filter(lambda s: products(s) < 2000))
def test_many_random_ranks(space: WeightSpace) -> None:
    assert ranks(space) == (dim_hom(space), dim_bias(space)) == counted(space)


@pytest.mark.parametrize("name", ["3-4-2", "2-3-3-2", "square", "cube", "rnn", "residual"])
def test_pool_is_complete(name: str, generator: torch.Generator) -> None:
    """The pooled features of random states span the invariants, and there are no more."""
    space, _, _, biases = GOLDEN[name]
    pool = InvariantPool(space, 1)
    count = 3 * biases
    x = {
        p.name: torch.randn(count, *p.shape, 1, generator=generator, dtype=torch.float64)
        for p in space.params
    }
    pooled = pool.double()(x)
    assert pool.width == biases
    assert int(torch.linalg.matrix_rank(pooled)) == biases


def test_means_are_means() -> None:
    """Every view of constant features is constant, so that no width enters."""
    pool = InvariantPool(small_cnn(), 1).double()
    x = {p.name: torch.full((*p.shape, 1), 2.0).double() for p in pool.space.params}
    assert torch.allclose(pool(x), torch.tensor(2.0).double())


# ---------------------------------------------------------------------------- permutable


@pytest.mark.parametrize(("widths", "maps"), [((5, 7, 3), 32), ((5, 7, 5), 32), ((5, 7, 9, 3), 62)])
def test_permutable_finds_inputs_and_outputs(widths: tuple[int, ...], maps: int) -> None:
    """Equal numbers of inputs and outputs are not taken for one another."""
    space = wspace.trace(mlp(*widths), torch.randn(2, 5))
    assert dim_hom(permutable(space)) == maps


def test_permutable_leaves_taps_and_positions() -> None:
    module, args, kwargs = build("lenet")
    space = wspace.trace(module, args, kwargs)
    free = permutable(space)
    assert [str(p) for p in free.params if p.name in {"3.weight", "7.weight"}] == [
        "3.weight(h2, h1, 5!, 5!)",
        "7.weight(h3, h2*16!)",
    ]
    assert not free["11.bias"].axes[0].fixed
    assert free["11.bias"].axes == free["11.weight"].axes[:1]


def test_permutable_ties_the_two_uses_of_a_table() -> None:
    module, args, kwargs = build("language_model_tied")
    free = permutable(wspace.trace(module, args, kwargs))
    assert not free["embed.weight"].fixed
    assert free["embed.weight"].axes[0] != free["position.weight"].axes[0]


def test_incomplete_family() -> None:
    params = tuple(Param(f"e{i}", (Axis((F,)),), at=("a", i), family="e0") for i in range(2))
    with pytest.raises(SpaceMismatch, match="family of 'e0'"):
        dim_hom(WeightSpace(params, extra=(A,)))


def test_views_average_what_they_say() -> None:
    space = power(4, 2)
    every = cells(space)
    (invariant,) = (s for s in signatures(space) if not s.groups)
    assert sorted(averaged(every[v.cell], v) for v in invariant.ins) == [4, 16]
