"""Augmentations that map the input of a network: f(A x + t), for the networks that allow it."""

from collections.abc import Callable
from typing import Any

import cases_mlp as plain
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import wspace
from wspace.augment import Flip, InputMap, Rotate, Translate, Zoom
from wspace.testing import assert_close

B = 3


class Field(nn.Module):
    """A network of `d` coordinates whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], d: int = 2, **options: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(d, 5, **options), nn.Linear(5, 3), nn.Linear(5 + d, 7)
        self.e, self.scale = nn.Linear(7, 3), nn.Parameter(torch.randn(d))
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
        pytest.xfail("one coordinate cannot turn")
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
