"""What permutations of a network's units do to the predictions of the graph predictor."""

from collections.abc import Callable

import cases
import pytest
import torch
from test_nowcast_predictors import State, randomised, walk
from test_nowcast_predictors_graph import IDS, assert_close, gpt2

import wspace
from wspace.nowcast import NiNoGraph

QUICK = (
    "mlp mlp_batchnorm mlp_residual lenet resnet18 depth_multiplier grouped_se lstm attention_gqa "
    "attention_relative moe_top2 language_model_tied vit gpt2 llama"
).split()


def assert_equivariant(name: str, seed: int) -> None:
    module, args, kwargs = cases.build(name)
    space = wspace.trace(module, args, kwargs)
    predictor = randomised(NiNoGraph(8).double(), seed)
    assert isinstance(predictor, NiNoGraph)
    names = [p.name for p in space.params if not p.buffer]
    ties = {n: p.name for p in space.params for n in p.ties}
    states = walk(module, seed=seed)
    states = [{n: s[ties.get(n, n)] for n in s} for s in states]
    move = wspace.sample(space, generator=torch.Generator().manual_seed(seed))
    moved = [{**s, **wspace.act(move, s, space)} for s in states]
    a = wspace.act(move, predictor.predict(module, states, horizon=7, space=space), space)
    b = predictor.predict(module, moved, horizon=7, space=space)
    assert_close({n: b[n] for n in names}, {n: a[n] for n in names}, moved[-1])


@pytest.mark.parametrize("name", QUICK)
def test_equivariant(name: str) -> None:
    assert_equivariant(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in cases.CASES if n not in QUICK])
def test_equivariant_everywhere(name: str) -> None:
    assert_equivariant(name, 0)


def swapped(states: list[State], change: Callable[[State], None]) -> list[State]:
    out = [{n: x.clone() for n, x in s.items()} for s in states]
    for s in out:
        change(s)
    return out


ACROSS = [3, 1, 2, 0, 4, 5]
"""Swaps a dimension of the first head with one of the second, three wide."""


def across_heads(s: State) -> None:
    """Queries, keys and values of one dimension change heads, and what reads them with them."""
    for n, x in s.items():
        if n.endswith("c_attn.weight"):
            s[n] = x.view(6, 3, 6)[..., ACROSS].reshape(6, 18)
        elif n.endswith("c_attn.bias"):
            s[n] = x.view(3, 6)[:, ACROSS].reshape(18)
        elif n.endswith("attn.c_proj.weight"):
            s[n] = x[ACROSS]


WITHIN = [1, 0, 2, 3, 4, 5]


def queries_alone(s: State) -> None:
    """Dimensions of the queries change places in a head, and those of the keys do not."""
    for n, x in s.items():
        if n.endswith("c_attn.weight"):
            s[n] = torch.cat([x[:, WITHIN], x[:, 6:]], 1)
        elif n.endswith("c_attn.bias"):
            s[n] = torch.cat([x[WITHIN], x[6:]])


@pytest.mark.parametrize(
    ("topology", "change"), [("traced", across_heads), ("published", queries_alone)]
)
def test_what_is_no_symmetry_is_told_apart(topology: str, change: Callable[[State], None]) -> None:
    """Negative controls; each wiring sees one of two (for the other, two rounds are too few)."""
    module = gpt2()
    predictor = randomised(NiNoGraph(8).double())
    assert isinstance(predictor, NiNoGraph)
    space = wspace.trace(module, (), IDS)
    states = [{n: s[n] for n, _ in module.named_parameters()} for s in walk(module)]
    out = predictor.predict(module, states, horizon=7, topology=topology, space=space)
    change(out)
    moved = swapped(states, change)
    other = predictor.predict(module, moved, horizon=7, topology=topology, space=space)
    with pytest.raises(AssertionError, match="of the update"):
        assert_close(other, out, moved[-1], tolerance=1e-3)
