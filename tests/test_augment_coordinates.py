"""Augmentations that map the input of a network: f(A x + t), for the networks that allow it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases_mlp as plain
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import wspace
from wspace.augment import Flip, InputMap, Rotate, Translate, Zoom, with_input
from wspace.errors import SpaceMismatch, WSpaceError
from wspace.testing import assert_close
from wspace.wiring import Wiring

B = 3


class Field(nn.Module):
    """A network of `d` coordinates whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], d: int = 2, **options: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, 5, **options), nn.Linear(5, 3), nn.Linear(5 + d, 7)
        self.e, self.scale = nn.Linear(7, 3), nn.Parameter(torch.randn(d))
        self.other, self.wide = nn.Parameter(torch.randn(5, d)), nn.Parameter(torch.randn(4, 5))
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)))


def skip(m: Any, x: Tensor, first: bool = False) -> Tensor:
    h = torch.relu(m.a(x))
    return m.e(torch.relu(m.c(torch.cat([x, h] if first else [h, x], -1))))


def plain_product(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(x @ m.a.weight.T + m.a.bias))


def twice(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)) * torch.sin(m.a(x.clone())))


def batched_product(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(torch.matmul(x[None].squeeze(0), m.a.weight.mT) + m.a.bias))


FIELDS: dict[str, tuple[nn.Module, int]] = {
    "siren": (plain.Siren(), 2),
    "one": (Field(chain, 1), 1),
    "three": (Field(chain, 3), 3),
    "four": (Field(chain, 4), 4),
    "skip": (Field(skip, 3), 3),
    "skip first": (Field(lambda m, x: skip(m, x, first=True)), 2),
    "product": (Field(plain_product, 3), 3),
    "twice": (Field(twice), 2),
    "matmul": (Field(batched_product), 2),
    "square": (Field(lambda m, x: m.b(torch.tanh(x @ m.a.weight + m.a.bias)), 5), 5),
}
MAPS: list[InputMap] = [
    Translate(0.4),
    Rotate(70),
    Rotate(70, center=0.3),
    Zoom(0.3),
    Zoom(0.3, each=True, center=-0.2),
    Flip(),
    Flip([0], 1.0, center=0.5),
]


def graph_of(module: nn.Module, *inputs: Tensor, rows: int = B) -> wspace.ParameterGraph:
    space = wspace.trace(module, inputs)
    state = {
        n: torch.randn(rows, *x.shape, dtype=torch.float64) for n, x in module.state_dict().items()
    }
    return wspace.encode(space, state)


def answers(module: nn.Module, graph: wspace.ParameterGraph, x: Tensor) -> list[Any]:
    """What every network of a batch answers to its own inputs, ``(rows, points, d)``."""
    states = [{n: v[i] for n, v in wspace.decode(graph).items()} for i in range(graph.batch[0])]
    return [
        functional_call(module, s, (y,), tie_weights=False) for s, y in zip(states, x, strict=True)
    ]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("change", MAPS, ids=str)
def test_the_input_is_mapped(change: InputMap, name: str) -> None:
    module, d = FIELDS[name]
    module = module.double()
    if d == 1 and isinstance(change, Rotate):
        with pytest.raises(WSpaceError, match="Rotate: 1 coordinate cannot turn"):
            change.maps(B, d, torch.Generator())
        return
    x = torch.randn(B, 6, d, dtype=torch.float64)
    graph = graph_of(module, x[0])
    before = {n: v.clone() for n, v in graph.values.items()}
    made = change(graph, torch.Generator().manual_seed(5))
    a, t = change.maps(B, d, torch.Generator().manual_seed(5))
    mapped = x @ a.mT + (0 if t is None else t[:, None])
    assert_close(answers(module, graph, mapped), answers(module, made, x))
    assert all(torch.equal(before[n], v) for n, v in graph.values.items())
    with pytest.raises(AssertionError, match="not close"):
        assert_close(answers(module, graph, x), answers(module, made, x))


def test_maps_are_what_they_are_called() -> None:
    g, eye = torch.Generator().manual_seed(0), torch.eye(4, dtype=torch.float64)
    a, t = Rotate(40).maps(500, 4, g)
    assert t is None
    assert_close(a @ a.mT, eye.expand(500, -1, -1))
    assert_close(torch.linalg.det(a), torch.ones(500, dtype=torch.float64))
    cosine = (torch.einsum("bii->b", a) - 2) / 2  # two coordinates turn, two stay
    degrees = torch.rad2deg(cosine.clamp(-1, 1).acos())
    assert float(degrees.max()) < 40 and abs(float(degrees.mean()) - 20) < 2
    a, _ = Rotate(90).maps(500, 2, g)
    angle = torch.rad2deg(torch.atan2(a[:, 1, 0], a[:, 0, 0]))
    assert float(angle.abs().max()) < 90 and abs(float(angle.mean())) < 6 < float(angle.std())
    a, t = Zoom(0.3, center=(0.5, 0.0, -1.0)).maps(500, 3, g)
    factor = a[:, 0, 0]
    assert_close(a, factor[:, None, None] * eye[:3, :3])
    assert 0.7 < float(factor.min()) < 0.75 and 1.25 < float(factor.max()) < 1.3
    point = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    assert t is not None
    assert_close(a @ point + t, point.expand(500, -1))
    a, _ = Zoom(0.3, each=True).maps(9, 3, g)
    assert len(torch.einsum("bii->bi", a).unique()) == 27
    _, t = Translate(0.2).maps(500, 3, g)
    assert t is not None and 0.19 < float(t.abs().max()) < 0.2 and len(t.unique()) == 1500
    a, _ = Flip([2], 0.25).maps(1000, 3, g)
    signs = torch.einsum("bii->bi", a)
    assert torch.equal(signs[:, :2], torch.ones(1000, 2, dtype=torch.float64))
    assert abs(float((signs[:, 2] < 0).double().mean()) - 0.25) < 0.05


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "scaled": (lambda m, x: chain(m, 2 * x), "addmm, after other operators"),
    "moved": (lambda m, x: chain(m, x + 1), "addmm, after other operators"),
    "squared": (lambda m, x: chain(m, x * x), "addmm, after other operators"),
    "mirrored": (lambda m, x: chain(m, x.flip(-1)), "addmm, after other operators"),
    "turned": (lambda m, x: chain(m, x.mT.contiguous().mT), "addmm, after other operators"),
    "regrouped": (lambda m, x: m.b(x.reshape(2, 4) @ m.wide), "mm, after other operators"),
    "scaled product": (
        lambda m, x: m.b(torch.addmm(m.a.bias, x, m.a.weight.T, alpha=2)), "addmm"),
    "scaled bias": (lambda m, x: m.b(torch.addmm(m.a.bias, x, m.a.weight.T, beta=2)), "addmm"),
    "rounded": (lambda m, x: chain(m, x.long().double()), "addmm, after other operators"),
    "part": (lambda m, x: x[:, :1] @ m.a.weight[:, :1].T + m.a.bias, "mm, after other operators"),
    "encoded": (
        lambda m, x: m.e(torch.relu(m.c(torch.cat([x, x.sin(), x.cos(), x[:, :1]], -1)))),
        "addmm, after other operators",
    ),
    "beside its sine": (
        lambda m, x: m.e(torch.relu(m.c(torch.cat([torch.relu(m.a(x)), x.sin()], -1)))),
        "cat, after other operators",
    ),
    "skip and relu": (
        lambda m, x: m.e(m.c(torch.cat([m.a(x), x], -1).relu())), "relu"),
    "skip and norm": (
        lambda m, x: m.e(m.c(torch.layer_norm(torch.cat([m.a(x), x], -1), (7,)))),
        "native_layer_norm",
    ),
    "scaled by a parameter": (lambda m, x: chain(m, m.scale * x), "mul"),
    "times its norm": (
        lambda m, x: m.b(m.a(x) * x.norm(dim=-1, keepdim=True)), "mul, after other operators"),
    "window": (lambda m, x: chain(m, x) * x.sum(-1, keepdim=True), "mul, after other operators"),
    "condition": (
        lambda m, x: m.b(torch.where(x[:, :1] > 0, torch.tanh(m.a(x)), 1.0)),
        "where, after other operators",
    ),
    "written to": (lambda m, x: chain(m, x.add_(1)), "an operator that writes to it"),
    "written to through a view": (
        lambda m, x: (y := x.view(-1, 2), x.mul_(2), chain(m, y))[2],
        "an operator that writes to it",
    ),
    "at two places of a matrix": (
        lambda m, x: m.c(torch.cat([m.a(x), x], -1)) + m.c(torch.cat([x, m.a(x)], -1)),
        "products with c.weight in which the same entries read something else",
    ),
    "two ways": (lambda m, x: chain(m, x) + m.e(m.c(torch.cat([m.a(x), x * x], -1))), "cat, after"),
    "matrix used twice": (
        lambda m, x: m.b(m.a(m.a(x)[:, :2])), "addmm, which also reads a.weight"),
    "matrix used before": (
        lambda m, x: m.b(m.a(x) @ m.a.weight @ m.a.weight.T), "mm, which also reads a.weight"),
    "computed matrix": (lambda m, x: m.b(torch.tanh(x @ m.a.weight.T.exp())), "mm"),
    "einsum": (lambda m, x: m.b(torch.einsum("bi,oi->bo", x, m.a.weight)), "bmm, after"),
    "on the right": (lambda m, x: m.b((m.a.weight @ x.mT).mT), "mm, after other operators"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_readings_are_refused(name: str) -> None:
    forward, reason = REFUSED[name]
    graph = graph_of(Field(forward).double(), torch.randn(4, 2, dtype=torch.float64))
    with pytest.raises(SpaceMismatch, match=rf"(?s)no change of weights maps input 0.*{reason}"):
        Rotate()(graph, torch.Generator())


def test_control_flow_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return chain(m, x) if float(m.a(x).sum()) > 0 else m.b(m.a(x))

    graph = graph_of(Field(forward).double(), torch.randn(4, 2, dtype=torch.float64))
    with pytest.raises(SpaceMismatch, match="control flow that depends on data"):
        Zoom()(graph, torch.Generator())


BARE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "none": lambda m, x: m.b(torch.tanh(x @ m.a.weight.T)),
    "after the activation": lambda m, x: m.b(torch.tanh(x @ m.a.weight.T) + m.a.bias),
    "scaled first": lambda m, x: m.b(torch.tanh(3 * (x @ m.a.weight.T) + m.a.bias)),
    "twice its size": lambda m, x: m.b(torch.add(x @ m.a.weight.T, m.a.bias, alpha=2)),
    "in one of two": lambda m, x: m.b(m.a(x) * (x @ m.a.weight.T)),
    "of two matrices": lambda m, x: m.b(
        torch.tanh(m.a(x)) * torch.nn.functional.linear(x, m.other, m.a.bias)
    ),
    "beside the sum": lambda m, x: m.b(torch.tanh((h := x @ m.a.weight.T) + m.a.bias) + h),
    "beside a view": lambda m, x: m.b(
        torch.tanh((h := x @ m.a.weight.T)[None].squeeze(0) + m.a.bias) + h
    ),
    "shared": lambda m, x: m.b(torch.tanh(m.a(x)) + m.a.bias),
    "in two matrices": lambda m, x: m.b(
        torch.tanh(m.a(x)) * torch.nn.functional.linear(x, m.c.weight[:5, :2] * 0 + 1, m.a.bias)
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_shifts_need_a_bias(name: str) -> None:
    module, x = Field(BARE[name]).double(), torch.randn(B, 4, 2, dtype=torch.float64)
    graph = graph_of(module, x[0])
    if name != "in two matrices":
        a, _ = Rotate().maps(B, 2, torch.Generator().manual_seed(1))
        made = Rotate()(graph, torch.Generator().manual_seed(1))
        assert_close(answers(module, graph, x @ a.mT), answers(module, made, x))
        match = r"(?s)input 0 cannot be shifted.*none after 'a\.weight'.*around 0"
    else:
        match = "no change of weights maps input 0"
    for change in (Translate(), Zoom(center=0.5)):
        with pytest.raises(SpaceMismatch, match=match):
            change(graph, torch.Generator())


def test_square_matrices_are_read_the_right_way() -> None:
    """Exchanging no dimensions is not exchanging them; it is refused, since nobody writes it."""
    for forward in (
        lambda m, x: m.b(torch.tanh(x @ m.a.weight.permute(0, 1))),
        lambda m, x: m.b(torch.tanh(x @ m.a.weight.transpose(1, 1))),
    ):
        x = torch.randn(4, 5, dtype=torch.float64)
        graph = graph_of(Field(forward, 5).double(), x)
        with pytest.raises(SpaceMismatch, match="no change of weights maps input 0"):
            Rotate()(graph, torch.Generator())


def test_a_matrix_of_two_inputs_is_refused() -> None:
    class Pair(Field):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)) - torch.tanh(self.a(y)))

    x = torch.randn(4, 2, dtype=torch.float64)
    graph = graph_of(Pair(chain).double(), x, x.flip(0))
    for change in (Rotate(), Rotate(input=1)):
        with pytest.raises(SpaceMismatch, match="products with a.weight in which the same entries"):
            change(graph, torch.Generator())


class Conditioned(nn.Module):
    """Coordinates, and a code that is read in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 5), nn.Linear(5, 3), nn.Linear(5 + 2 + 3, 3)

    def forward(self, x: Tensor, code: Tensor, direction: Tensor) -> Tensor:
        h = torch.relu(self.a(x) * code.exp())
        return self.c(torch.cat([h, x, direction], -1))


def test_one_of_several_inputs() -> None:
    module = Conditioned().double()
    x, code, direction = (torch.randn(B, 4, n, dtype=torch.float64) for n in (2, 5, 3))
    graph = graph_of(module, x[0], code[0], direction[0])

    def said(g: wspace.ParameterGraph, x: Tensor, direction: Tensor) -> list[Tensor]:
        states = [{n: v[i] for n, v in wspace.decode(g).items()} for i in range(B)]
        rows = zip(states, x, code, direction, strict=True)
        return [functional_call(module, s, (a, c, d)) for s, a, c, d in rows]

    for change, given in ((Translate(), x), (Rotate(), x), (Rotate(input=2), direction)):
        a, t = change.maps(B, given.shape[-1], torch.Generator().manual_seed(1))
        made = change(graph, torch.Generator().manual_seed(1))
        mapped = given @ a.mT + (0 if t is None else t[:, None])
        moved = (mapped, direction) if given is x else (x, mapped)
        assert_close(said(graph, *moved), said(made, x, direction))
    with pytest.raises(SpaceMismatch, match=r"(?s)maps input 1.*read by mul, after"):
        Translate(input=1)(graph, torch.Generator())
    with pytest.raises(SpaceMismatch, match=r"(?s)no input 3.*one of the 3 tensors"):
        Translate(input=3)(graph, torch.Generator())


def test_fixed_features_turn_with_their_matrix() -> None:
    """Fourier features of a random matrix: a buffer, which is part of the state."""

    class Features(Field):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.f(torch.cat([(x @ m.m).sin(), (x @ m.m).cos()], -1)))
            self.f = nn.Linear(8, 3)
            self.register_buffer("m", torch.randn(2, 4))

    module, x = Features().double(), torch.randn(B, 4, 2, dtype=torch.float64)
    graph = graph_of(module, x[0])
    a, _ = Rotate().maps(B, 2, torch.Generator().manual_seed(1))
    made = Rotate()(graph, torch.Generator().manual_seed(1))
    assert_close(answers(module, graph, x @ a.mT), answers(module, made, x))


def test_a_given_map() -> None:
    module, x = FIELDS["skip"][0].double(), torch.randn(B, 4, 3, dtype=torch.float64)
    graph = graph_of(module, x[0])
    a, t = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    made = with_input(graph, a, t)
    assert_close(answers(module, graph, x @ a.mT + t), answers(module, made, x))
    for wrong in ((a[:2], t), (a, t[:2]), (a.expand(2, 3, 3), t.expand(2, 3))):
        with pytest.raises(SpaceMismatch, match="the map does not fit the input"):
            with_input(graph, *wrong)
    with pytest.raises(WSpaceError, match=r"(?s)the center does not fit.*3 numbers"):
        Zoom(center=(0.1, 0.2))(graph, torch.Generator())
    with pytest.raises(WSpaceError, match=r"(?s)Flip: axes \[3\] of 3 coordinates"):
        Flip([3])(graph, torch.Generator())


def test_readings_travel_with_the_space() -> None:
    space = wspace.trace(FIELDS["skip"][0].double(), torch.zeros(1, 3, dtype=torch.float64))
    text = space.to_json()
    again = wspace.WeightSpace.from_json(text)
    assert again.wiring is not None and space.wiring is not None
    assert again.wiring.inputs == space.wiring.inputs and len(again.wiring.inputs) == 1
    data = space.wiring.to_data()
    del data["inputs"]  # a file of an earlier version
    old = Wiring.from_data(data)
    assert old.inputs == () and old == space.wiring and hash(old) == hash(space.wiring)
    state = {p.name: torch.randn(p.shape, dtype=torch.float64) for p in space.params}
    graph = wspace.encode(replace(space, wiring=old), state)
    with pytest.raises(SpaceMismatch, match=r"(?s)no input 0.*of an earlier version"):
        Translate()(graph, torch.Generator())
