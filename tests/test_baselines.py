"""Baselines: what each of them cannot see, and what a metanet's interface promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import build
from torch import Tensor, nn

import wspace
from wspace.errors import SpaceMismatch
from wspace.graph import ParameterGraph, encode
from wspace.nn.statistics import (
    CODE,
    Baseline,
    FlatMLP,
    ParameterDeepSets,
    ProbeOnly,
    StatNN,
    tensor_codes,
)
from wspace.space import WeightSpace
from wspace.testing import assert_close, assert_invariant

OUT = 3
Factory = Callable[[nn.Module, WeightSpace], Baseline]

MIXED: dict[str, Factory] = {
    "StatNN pooled": lambda module, space: StatNN(OUT),
    "ParameterDeepSets": lambda module, space: ParameterDeepSets(OUT, channels=16),
}
INVARIANT: dict[str, Factory] = MIXED | {
    "StatNN": lambda module, space: StatNN(OUT, space=space),
    "ProbeOnly": lambda module, space: ProbeOnly(module, space, OUT, count=5),
    "ProbeOnly of classes": lambda module, space: ProbeOnly(
        module, space, OUT, count=5, classes=True
    ),
}
ALL: dict[str, Factory] = INVARIANT | {
    "FlatMLP": lambda module, space: FlatMLP(space, OUT, hidden=(16,)),
}


def perceptron() -> tuple[nn.Module, WeightSpace]:
    module = nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 2)
    )
    return module, wspace.trace(module, torch.zeros(1, 5))


def normed() -> tuple[nn.Module, WeightSpace]:
    module, args, _ = build("mlp_batchnorm")
    return module, wspace.trace(module, args)


def graph_of(space: WeightSpace, *batch: int, seed: int = 0, scale: float = 1.0) -> ParameterGraph:
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for p in space.params:
        x = torch.randn(*batch, *p.shape, generator=generator, dtype=torch.float64)
        state |= dict.fromkeys((p.name, *p.ties), x.abs() + 0.1 if p.buffer else scale * x)
    return encode(space, state)


def made(name: str, *, fit: bool = True) -> tuple[Baseline, WeightSpace]:
    """A baseline in float64, with statistics of some networks."""
    module, space = perceptron()
    net = ALL[name](module, space).double().eval()
    if fit:
        net.fit_statistics(graph_of(space, 40, seed=9, scale=0.5))
    return net, space


# --------------------------------------------------------------------- symmetry


@pytest.mark.parametrize("name", INVARIANT)
def test_permuted_networks_get_the_same_answer(name: str) -> None:
    net, space = made(name)
    state = graph_of(space, 4).values
    assert_invariant(lambda x: net(encode(space, x)), space, state)


def test_the_flat_perceptron_is_not_invariant() -> None:
    net, space = made("FlatMLP")
    state = graph_of(space, 4).values
    with pytest.raises(AssertionError, match="not invariant"):
        assert_invariant(lambda x: net(encode(space, x)), space, state)


def test_probes_see_the_function_alone() -> None:
    net, space = made("ProbeOnly")
    state = graph_of(space, 4).values
    kinds = ("permutation", "sign")
    assert any(g.kind == "sign" for g in space.gauges)
    assert_invariant(lambda x: net(encode(space, x)), space, state, kinds=kinds)
    other, _ = made("StatNN")
    with pytest.raises(AssertionError, match="not invariant"):
        assert_invariant(lambda x: other(encode(space, x)), space, state, kinds=kinds)


def test_probabilities_are_read_from_logits() -> None:
    net, space = made("ProbeOnly of classes", fit=False)
    assert isinstance(net, ProbeOnly)
    values = dict(graph_of(space, 4, scale=30.0).values)
    logits = net.probes(values).outputs.detach()
    found = {slot: x.detach() for slot, x in net.features(values, space)}
    assert_close(found[1].reshape(logits.shape), logits.softmax(-1))
    assert float(logits.abs().max()) > 50
    assert float(found[0].abs().max()) < 1
    values[space.params[-1].name] = values[space.params[-1].name] + 3.0  # of all classes alike
    assert space.params[-1].name == "4.bias"
    for slot, x in net.features(values, space):
        assert_close(found[slot], x)


# -------------------------------------------------------------------- interface


@pytest.mark.parametrize("name", ALL)
def test_batch_axes_and_lists(name: str) -> None:
    net, space = made(name)
    graph = graph_of(space, 2, 3)
    rows = [encode(space, {k: x[i, j] for k, x in graph.values.items()})
            for i in range(2) for j in range(3)]  # fmt: skip
    out = net(graph)
    assert out.shape == (2, 3, OUT)
    assert net(rows[0]).shape == (OUT,)
    assert_close(out.flatten(0, 1), torch.stack([net(row) for row in rows]))
    assert_close(out.flatten(0, 1), net(rows))
    assert_close(torch.cat([out.flatten(0, 1), out[1, 2][None]]), net([graph, rows[-1]]))


@pytest.mark.parametrize("name", MIXED)
def test_architectures_may_be_mixed(name: str) -> None:
    net, one = made(name)
    _, two = normed()
    a, b, c = graph_of(one, 2), graph_of(two), graph_of(one, 1, seed=1)
    expected = torch.cat([net(a), net(b)[None], net(c)])
    assert_close(expected, net([a, b, c]))
    net.fit_statistics([a, b, c])
    assert net([a, b, c]).shape == (4, OUT)


@pytest.mark.parametrize("name", ["FlatMLP", "StatNN", "ProbeOnly"])
def test_one_architecture_only(name: str) -> None:
    net, _ = made(name)
    with pytest.raises(SpaceMismatch, match="another weight space"):
        net(graph_of(normed()[1]))
    with pytest.raises(SpaceMismatch, match="empty list"):
        net([])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fit", [True, False])
def test_gradients_reach_everything(name: str, *, fit: bool) -> None:
    net, space = made(name, fit=fit)
    graph = graph_of(space, 4)
    values = {k: x.requires_grad_() for k, x in graph.values.items()}
    net(encode(space, values)).square().sum().backward()
    for what, x in (*values.items(), *net.named_parameters()):
        assert x.grad is not None, what
        assert bool((x.grad != 0).any()), what


@pytest.mark.parametrize("name", ALL)
def test_training_and_evaluation_agree(name: str) -> None:
    net, space = made(name)
    graph = graph_of(space, 4)
    before = net(graph)
    assert torch.equal(net.train()(graph), before)  # no dropout by default, fixed statistics
    other = ALL[name](*perceptron()).double()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(graph), before)


def test_dropout_is_for_training() -> None:
    _, space = perceptron()
    net, graph = StatNN(OUT, dropout=0.5).double(), graph_of(space, 4)
    assert not torch.equal(net(graph), net(graph))
    net.eval()
    assert torch.equal(net(graph), net(graph))


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_matters(name: str) -> None:
    net, space = made(name)
    graph = graph_of(space)
    before = net(graph).detach()
    for p in space.params:
        x = graph.values[p.name].clone()
        x.view(-1)[p.numel // 2] += 0.5
        assert float((net(graph.replace({p.name: x})).detach() - before).abs().max()) > 1e-6, p.name


# ------------------------------------------------------------------- statistics


def test_statistics_are_those_of_numpy() -> None:
    net, space = made("StatNN", fit=False)
    x = graph_of(space, 2).values
    for (slot, found), p in zip(net.features(dict(x), space), space.params, strict=True):
        flat = x[p.name].flatten(1) * (p.shape[1] if len(p.shape) > 1 else 1) ** 0.5
        q = torch.quantile(flat, torch.tensor([0, 0.25, 0.5, 0.75, 1]).double(), dim=1).mT
        expected = torch.cat([flat.mean(1)[:, None], flat.var(1, correction=0)[:, None], q], 1)
        assert_close(expected[:, None], found)
        assert space.params[slot] is p


@pytest.mark.parametrize("name", ALL)
def test_fitted_features_are_standard(name: str) -> None:
    net, space = made(name, fit=False)
    graph = graph_of(space, 30, scale=7.0)
    net.fit_statistics(graph)
    found = [[] for _ in net.center]
    for slot, x in net.features(dict(graph.values), space):
        found[slot].append(((x - net.center[slot]) / net.spread[slot]).flatten(0, 1))
    for part in filter(None, found):
        y = torch.cat(part).detach()
        assert_close(torch.zeros(y.shape[1]).double() + 1, y.mean(0) + 1)
        assert_close(torch.ones(y.shape[1]).double(), y.std(0, correction=0))


def test_what_never_varies_is_only_centred() -> None:
    _, space = perceptron()
    net = StatNN(OUT, space=space)
    graph = encode(space, {p.name: torch.full((3, *p.shape), 0.1) for p in space.params})
    net.fit_statistics(graph)
    assert bool((net.spread == 1).all())
    assert bool(net(graph).isfinite().all())


def test_codes_tell_tensors_apart() -> None:
    for _, space in (perceptron(), normed()):
        codes = tensor_codes(space)
        assert codes.shape == (len(space.params), CODE)
    first, second = tensor_codes(perceptron()[1])[[0, 2]]
    assert not torch.equal(first, second)
