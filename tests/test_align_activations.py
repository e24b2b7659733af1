"""Matching by activations: it finds what was permuted, and the statistics are what they say."""

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
import torch
from cases import build
from oracles import state_of
from test_laws import generic
from test_trace_observe import error, some
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import wspace
from wspace.align import ActivationMatching, match_activations
from wspace.align.activations.moments import Moments, network
from wspace.errors import MeasureError, SpaceMismatch
from wspace.space import WeightSpace
from wspace.testing import TOLERANCE
from wspace.trace.observe import observe
from wspace.trace.sandbox import double_precision

State = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(args: Any, kwargs: Any, generator: torch.Generator) -> tuple[Any, Any]:
    """Other inputs of the same shapes."""

    def other(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if isinstance(x, Tensor) and x.dtype == torch.int64 and x.dim():
            order = torch.randperm(x.numel(), generator=generator)
            return x.flatten()[order].reshape(x.shape)
        return x

    return tree_map(other, (args, kwargs))


def found(
    space: WeightSpace, module: nn.Module, a: State, b: State, batches: Any, **options: Any
) -> ActivationMatching:
    with double_precision():
        return match_activations(space, a, b, batches, module=module, inputs=lambda x: x, **options)


def indistinct(matching: ActivationMatching) -> set[str]:
    """Groups in which some unit never changes, in no result: any order of these is as good."""
    return {g for g, score in matching.scores.items() if float(score.min()) < 1e-6}


def case(name: str, generator: torch.Generator) -> tuple[WeightSpace, nn.Module, State, Any]:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    batches = [inputs(args, kwargs, generator) for _ in range(2)]
    return space, module, generic(state_of(module), generator), batches


@some(36)
def test_what_was_permuted_is_found(name: str, generator: torch.Generator) -> None:
    """Of every group whose units differ, also those of which only others depend on are seen."""
    space, module, state, batches = case(name, generator)
    t = wspace.sample(space, generator=generator)
    matching = found(space, module, state, wspace.act(t, state, space), batches)
    back = wspace.inverse(t)
    dead = indistinct(matching)
    dead |= {o for g in dead for o in space.groups[g].over}
    dead |= {g for g in space.groups if dead & {*space.groups[g].over}}
    for group, p in matching.permutations.items():
        if group not in dead:
            assert torch.equal(p, back.permutations[group]), group
    seen = {o for g in matching.scores for o in (g, *space.groups[g].over)} & {*space.groups}
    assert set(matching.permutations) == seen
    assert seen | set(matching.unobserved) == set(space.groups)
    assert len(dead) <= 0.35 * len(space.groups)


@pytest.mark.parametrize("name", ["encoder_pre_norm", "attention_gqa", "moe_dense", "grouped_se"])
def test_heads_are_found_by_what_they_hold(name: str, generator: torch.Generator) -> None:
    """Without a result of their own: groups on which others depend, by the values of these."""
    space, module, state, batches = case(name, generator)
    inner = [g.name for g in space.groups.values() if g.over]
    outer = {o for g in inner for o in space.groups[g].over} - {*inner}
    assert inner
    t = wspace.sample(space, generator=generator)
    matching = found(space, module, state, wspace.act(t, state, space), batches, groups=inner)
    assert not outer & {*matching.scores}
    for group in {*inner, *outer} & {*matching.permutations}:
        assert torch.equal(matching.permutations[group], wspace.inverse(t).permutations[group])
    assert outer <= {*matching.permutations}


@pytest.mark.parametrize(
    "name", ["mlp_layernorm_tanh", "siren", "attention_gqa", "swiglu", "resnet18"]
)
def test_signs_are_found(name: str, generator: torch.Generator) -> None:
    """With the signs that were found, the activations that were read are those of `a` again."""
    space, module, state, batches = case(name, generator)
    t = wspace.sample(space, generator=generator, kinds=("permutation", "sign"))
    moved = wspace.act(t, state, space)
    matching = found(space, module, state, moved, batches, kinds=("permutation", "sign"))
    assert matching.factors
    assert {space.gauges[i].kind for i in matching.factors} == {"sign"}
    assert any(bool((f < 0).any()) for f in matching.factors.values())
    plain = found(space, module, state, moved, batches)
    assert not plain.factors
    ours = observe(space, network(state, module), *batches[0])
    again = network(wspace.act(matching, moved, space), module)
    theirs = observe(space, again, *batches[0])
    for group, score in matching.scores.items():
        if float(score.min()) > 1 - 1e-6:
            for x, y in zip(ours.features[group], theirs.features[group], strict=True):
                assert error(x, y) <= TOLERANCE[torch.float64]


def mlp(generator: torch.Generator, *sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n, m), nn.ReLU()]
    module = nn.Sequential(*layers[:-1]).double()
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module


def test_it_is_the_best_of_all_permutations(generator: torch.Generator) -> None:
    """Against all orders of five units, and correlations by NumPy."""
    a, b = mlp(generator, 3, 5, 2), mlp(generator, 3, 5, 2)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    space = wspace.trace(a, x)
    matching = match_activations(space, a, b, x.split(13))
    tables = []
    for last in (1, 2):
        joint = torch.cat([a[:last](x), b[:last](x)], 1).T
        tables.append(torch.corrcoef(joint)[:5, 5:].nan_to_num())
    table = torch.stack(tables).mean(0).detach()
    value = {p: float(table[range(5), p].sum()) for p in permutations(range(5))}
    p = tuple(matching.permutations["h1"].tolist())
    assert p == max(value, key=lambda q: value[q])
    assert float((matching.scores["h1"] - table[range(5), p]).abs().max()) < 1e-10
    assert matching.samples == {"h1": 80}
    assert "h1 0." in repr(matching)


def test_inner_products(generator: torch.Generator) -> None:
    a, b = mlp(generator, 3, 5, 2), mlp(generator, 3, 5, 2)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    space = wspace.trace(a, x)
    matching = match_activations(space, a, b, x.split(13), kind="inner")
    table = sum(a[:k](x).T @ b[:k](x) for k in (1, 2)).detach()
    value = {p: float(table[range(5), p].sum()) for p in permutations(range(5))}
    p = tuple(matching.permutations["h1"].tolist())
    assert p == max(value, key=lambda q: value[q])
    assert torch.allclose(matching.scores["h1"], table[range(5), p])


def test_scale_does_not_matter(generator: torch.Generator) -> None:
    module = mlp(generator, 3, 11, 7, 2)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    space, state = wspace.trace(module, x), module.state_dict()
    t = wspace.sample(space, generator=generator, kinds=("permutation", "scale"))
    matching = match_activations(space, state, wspace.act(t, state, space), [x], module=module)
    for group, p in matching.permutations.items():
        assert torch.equal(p, wspace.inverse(t).permutations[group])


@pytest.mark.parametrize("centred", [True, False])
def test_moments_in_parts_are_those_of_the_whole(centred: bool, generator: torch.Generator) -> None:
    x = 1e3 + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, 6, generator=generator, dtype=torch.float64)
    whole = Moments(x, y, centred=centred, within=True)
    parts = Moments(x[:1], y[:1], centred=centred, within=True)
    for start, stop in ((1, 1), (1, 20), (20, 50)):
        parts.merge(Moments(x[start:stop], y[start:stop], centred=centred, within=True))
    assert parts.count == 50
    for which in ("ab", "aa", "bb"):
        assert error(whole.correlation(which), parts.correlation(which)) < 1e-9
    if centred:
        joint = torch.corrcoef(torch.cat([x, y], 1).T)
        assert error(joint[:4, 4:], parts.correlation()) < 1e-9
        assert error(joint[:4, 4:], Moments(x[:9], y[:9]).correlation()) > 1e-3


def test_a_dead_unit_is_like_none(generator: torch.Generator) -> None:
    x = torch.randn(20, 3, generator=generator)
    x[:, 1] = 0.1
    x[:, 1] += 1e-8 * x[:, 0]  # no more than rounding
    table = Moments(x, x).correlation()
    assert torch.equal(table[1], torch.zeros(3, dtype=torch.float64))
    assert float(table[0, 0]) == pytest.approx(1)


def test_batches_are_read_as_loaders_give_them(generator: torch.Generator) -> None:
    module = mlp(generator, 3, 5, 2)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    space = wspace.trace(module, x)
    kinds: list[Any] = [
        [x], [(x, torch.zeros(40))], [[x, 1]], [{"input": x}], lambda: iter([x]), iter([x]),
    ]  # fmt: skip
    for batches in kinds:
        assert match_activations(space, module, module, batches).samples == {"h1": 80}


def test_few_samples_of_many(generator: torch.Generator) -> None:
    module = mlp(generator, 3, 5, 2)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    space = wspace.trace(module, x)
    assert match_activations(space, module, module, [x], rows=16).samples == {"h1": 32}


def test_states_are_not_changed(generator: torch.Generator) -> None:
    module, state = mlp(generator, 3, 5, 2), mlp(generator, 3, 5, 2).state_dict()
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    space = wspace.trace(module, x)
    before = {k: v.clone() for k, v in {**state, "x": x}.items()}
    own = [p.clone() for p in module.parameters()]
    match_activations(space, module, state, [x], module=module, kinds=("permutation", "sign"))
    assert all(torch.equal(v, {**state, "x": x}[k]) for k, v in before.items())
    assert all(torch.equal(p, q) for p, q in zip(own, module.parameters(), strict=True))


def test_errors(generator: torch.Generator) -> None:
    module = mlp(generator, 3, 5, 2)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    space, state = wspace.trace(module, x), module.state_dict()
    with pytest.raises(MeasureError, match="no batches"):
        match_activations(space, module, module, [])
    with pytest.raises(SpaceMismatch, match="kinds=\\('scale',\\)"):
        match_activations(space, module, module, [x], kinds=("scale",))
    with pytest.raises(SpaceMismatch, match="kind='cosine'"):
        match_activations(space, module, module, [x], kind="cosine")
    with pytest.raises(SpaceMismatch, match="without its module"):
        match_activations(space, state, module, [x])
    with pytest.raises(SpaceMismatch, match=r"no tensor '0\.weight'"):
        match_activations(space, {}, state, [x], module=module)
