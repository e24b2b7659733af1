"""The traced wiring of tiny networks, against lists of edges written by hand."""

# pyright: reportPrivateUsage=false

from collections import Counter
from collections.abc import Callable, Iterable

import cases
import pytest
import torch
from test_nowcast_predictors_symmetry import QUICK
from torch import Tensor, nn

import wspace
from wspace.nowcast import wiring
from wspace.nowcast.published import published_topology
from wspace.nowcast.topology import (
    BIAS,
    CONV,
    FC,
    LOOP,
    NORM,
    OTHER,
    POSITION,
    RESIDUAL,
    TOKEN,
    Edges,
    Topology,
)  # fmt: skip
from wspace.nowcast.wiring import traced

Row = tuple[str, str, int, str, tuple[int, ...]]
"""Source and target, by names; kind; parameter, and the entries that are the edge's features."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 3, bias=False)
        self.c = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(h + self.b(torch.relu(h)))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(4, 3), nn.Parameter(torch.zeros(2, 3))
        self.o = nn.Linear(3, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(self.e(ids) + self.p)


class Gate(nn.Module):
    """A product of two branches: what is behind it is linked as something else than a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(2, 3, bias=False) for _ in range(2))
        self.c = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.b(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def matrix(name: str, kind: int, source: str, target: str, shape: tuple[int, int]) -> list[Row]:
    """A weight ``(outputs, inputs)``."""
    outputs, inputs = shape
    return [
        (f"{source}{i}", f"{target}{j}", kind, name, (j * inputs + i,))
        for j in range(outputs)
        for i in range(inputs)
    ]


def vector(name: str, kind: int, target: str, count: int) -> list[Row]:
    return [(name, f"{target}{j}", kind, name, (j,)) for j in range(count)]


def links(kind: int, source: str, target: str, count: int) -> list[Row]:
    return [(f"{source}{j}", f"{target}{j}", kind, "", ()) for j in range(count)]


MLP: list[Row] = [
    ("x0", "h0", FC, "0.weight", (0,)), ("x1", "h0", FC, "0.weight", (1,)),
    ("x0", "h1", FC, "0.weight", (2,)), ("x1", "h1", FC, "0.weight", (3,)),
    ("x0", "h2", FC, "0.weight", (4,)), ("x1", "h2", FC, "0.weight", (5,)),
    *vector("0.bias", BIAS, "h", 3), *vector("1.weight", NORM, "h", 3),
    *vector("1.bias", BIAS, "h", 3), *vector("3.bias", BIAS, "y", 2),
    ("h0", "y0", FC, "3.weight", (0,)), ("h1", "y0", FC, "3.weight", (1,)),
    ("h2", "y0", FC, "3.weight", (2,)), ("h0", "y1", FC, "3.weight", (3,)),
    ("h1", "y1", FC, "3.weight", (4,)), ("h2", "y1", FC, "3.weight", (5,)),
]  # fmt: skip
RESIDUAL_BLOCK: list[Row] = [
    *matrix("a.weight", FC, "x", "h", (3, 2)), *vector("a.bias", BIAS, "h", 3),
    *matrix("b.weight", FC, "h", "s", (3, 3)), *links(RESIDUAL, "h", "s", 3),
    *matrix("c.weight", FC, "s", "y", (1, 3)),
]  # fmt: skip
POSITIONS: list[Row] = [
    # an embedding is stored token by feature, and leads from tokens to features
    *((f"t{i}", f"h{j}", TOKEN, "e.weight", (3 * i + j,)) for i in range(4) for j in range(3)),
    # the values at both places are parallel edges from one node
    *(("p", f"h{j}", POSITION, "p", (3 * i + j,)) for i in range(2) for j in range(3)),
    *matrix("o.weight", FC, "h", "y", (2, 3)),
]
CONVOLUTION: list[Row] = [
    ("x0", "h0", CONV, "0.weight", (0, 1, 2, 3)), ("x1", "h0", CONV, "0.weight", (4, 5, 6, 7)),
    ("x0", "h1", CONV, "0.weight", (8, 9, 10, 11)),
    ("x1", "h1", CONV, "0.weight", (12, 13, 14, 15)),
    ("x0", "h2", CONV, "0.weight", (16, 17, 18, 19)),
    ("x1", "h2", CONV, "0.weight", (20, 21, 22, 23)),
    *vector("0.bias", BIAS, "h", 3), *vector("3.bias", BIAS, "y", 2),
    # four places of a channel are parallel edges
    *((f"h{i}", f"y{j}", FC, "3.weight", (12 * j + 4 * i + n,))
      for j in range(2) for i in range(3) for n in range(4)),
]  # fmt: skip
GATE: list[Row] = [
    *matrix("a.weight", FC, "x", "a", (3, 2)), *matrix("b.weight", FC, "x", "b", (3, 2)),
    *links(OTHER, "a", "g", 3), *links(OTHER, "b", "g", 3),
    *matrix("c.weight", FC, "g", "y", (1, 3)),
]  # fmt: skip

IMAGE, ROW, IDS = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[Row]]] = {
    "mlp": (mlp, ROW, MLP),
    "residual": (Residual, ROW, RESIDUAL_BLOCK),
    "positions": (Positions, IDS, POSITIONS),
    "conv": (conv, IMAGE, CONVOLUTION),
    "gate": (Gate, ROW, GATE),
}


def edges(topology: Topology) -> list[tuple[int, int, int, str, tuple[int, ...]]]:
    """All edges but self-loops: source, target, kind, parameter, entries."""
    out: list[tuple[int, int, int, str, tuple[int, ...]]] = []
    for b in topology.blocks:
        p, t, s, q, _ = b.sizes
        target, source = b.target.view(p, t).tolist(), b.source.view(p, s).tolist()
        for i, j, k, n in torch.cartesian_prod(*map(torch.arange, (p, t, s, q))).tolist():
            if b.kind == LOOP:
                assert source[i][k] == target[i][j] and b.value == 2
                continue
            found: tuple[int, ...] = ()
            if b.param:
                found = tuple(b.entries[i, j, k, n].tolist())
            else:
                assert b.value == 1
            out.append((source[i][k], target[i][j], b.kind, b.param, found))
    return out


def assert_wired(
    found: Iterable[tuple[int, int, int, str, tuple[int, ...]]], want: list[Row]
) -> None:
    """The same edges as often, for some numbering of the nodes: entries say which is which."""
    found = list(found)
    ends = {(param, at): (a, b) for a, b, _, param, at in found if param}
    number: dict[str, int] = {}
    for a, b, _, param, at in want:
        if param:
            assert (param, at) in ends, f"no edge has entries {at} of {param}"
            for name, node in zip((a, b), ends[param, at], strict=True):
                assert number.setdefault(name, node) == node, f"{name} is two nodes"
    assert len(set(number.values())) == len(number), "two units are one node"
    assert Counter((number[a], number[b], *rest) for a, b, *rest in want) == Counter(found)


@pytest.mark.parametrize("name", NETS)
def test_traced_wiring_by_hand(name: str) -> None:
    make, inputs, want = NETS[name]
    assert_wired(edges(traced(wspace.trace(make(), (inputs,)))), want)


def test_traced_wiring_of_a_chain_is_the_published_one() -> None:
    """Without biases and norms the two make the same graph, up to the numbers of nodes."""
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.Flatten(),
        nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False),
    )  # fmt: skip
    want: list[Row] = [
        (f"n{a}", f"n{b}", kind, param, at)
        for a, b, kind, param, at in edges(published_topology(module))
    ]
    assert len(want) == 8 + 12 + 15 + 10
    assert_wired(edges(traced(wspace.trace(module, (torch.zeros(1, 2, 3, 3),)))), want)


# ------------------------------------------------------------------ larger networks


@pytest.mark.parametrize(
    "name", [*QUICK, "shared_block", "state_space", "unused_parameters", "fno"]
)
def test_every_entry_is_an_edge_once(name: str) -> None:
    """Each entry is in some edge, and in several only where the parameter is read in several."""
    module, args, kwargs = cases.build(name)
    space = wspace.trace(module, args, kwargs)
    topology = traced(space)
    seen = {p.name: torch.zeros(p.numel) for p in space.params if not p.buffer}
    for b in topology.blocks:
        assert len(b.target) == b.sizes[0] * b.sizes[1]
        assert len(b.source) == b.sizes[0] * b.sizes[2]
        assert int(max(b.target.max(), b.source.max())) < topology.nodes
        if b.param:
            numbers = torch.arange(space[b.param].numel)
            assert torch.equal(b.view(numbers), b.entries)
            seen[b.param] += torch.bincount(b.entries.flatten(), minlength=len(numbers))
            assert b.sizes[4] <= 9
    assert all(bool((n >= 1).all()) for n in seen.values())
    assert all(float(n.min()) == float(n.max()) for n in seen.values())


def test_large_kernels_are_parallel_edges() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 5), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    space = wspace.trace(module, (torch.zeros(1, 2, 8, 8),))
    sizes = [(b.kind, b.sizes) for b in traced(space).blocks if b.param.endswith("weight")]
    assert sizes == [
        (3, (1, 3, 2, 2, 9)), (3, (1, 3, 2, 1, 7)), (3, (1, 2, 3, 1, 9)), (1, (1, 3, 2, 4, 1)),
    ]  # fmt: skip


# ------------------------------------------------------------ do these tests see mistakes?


def turned(b: Edges) -> Edges:
    """An edge block with sources and targets exchanged."""
    p, t, s, q, f = b.sizes
    assert b.strides is not None
    a = b.strides
    strides = (a[0], a[2], a[1], a[3], a[4])
    return Edges(b.kind, (p, s, t, q, f), b.source, b.target, b.param, strides, b.offset)


def reversing(method: str) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        old = getattr(wiring._Traced, method)

        def new(self: wiring._Traced, *args: object) -> None:
            before = len(self.builder.blocks)
            old(self, *args)
            self.builder.blocks[before:] = [turned(b) for b in self.builder.blocks[before:]]

        patch.setattr(wiring._Traced, method, new)

    return apply


def no_residuals(patch: pytest.MonkeyPatch) -> None:
    old = wiring._Traced._through

    def new(self: wiring._Traced, form: wiring.EdgeForm) -> wiring.Links:
        return {(n, OTHER): x for (n, _), x in old(self, form).items()}

    patch.setattr(wiring._Traced, "_through", new)


def turned_links(patch: pytest.MonkeyPatch) -> None:
    old = wiring._Traced._links

    def new(self: wiring._Traced) -> None:
        before = len(self.builder.blocks)
        old(self)
        self.builder.blocks[before:] = [
            Edges(b.kind, b.sizes, b.source, b.target, value=b.value)
            for b in self.builder.blocks[before:]
        ]

    patch.setattr(wiring._Traced, "_links", new)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "edges reversed": (reversing("_edges"), set(NETS)),
    "features reversed": (reversing("_features"), {"mlp", "residual", "positions", "conv"}),
    "residuals are others": (no_residuals, {"residual"}),
    "positions are biases": (
        lambda patch: patch.setattr(wiring, "_feature_kind", lambda _: BIAS),
        {"mlp", "positions"},
    ),
    "no links": (
        lambda patch: patch.setattr(wiring._Traced, "_links", lambda _: None),
        {"residual", "gate"},
    ),
    "links reversed": (turned_links, {"residual", "gate"}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_wiring_is_told_apart(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes that equivariance does not show are seen by the lists."""
    apply, seen = MUTANTS[mutant]
    apply(monkeypatch)
    for name, (make, inputs, want) in NETS.items():
        space = wspace.trace(make(), (inputs,))
        found = edges(wiring._Traced(space).build())
        if name in seen:
            with pytest.raises(AssertionError):
                assert_wired(found, want)
        else:
            assert_wired(found, want)
