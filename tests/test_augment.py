"""Augmentations of networks: what each does to their function, and what all have in common."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from cases import CASES, Double, build
from oracles import gap, outputs, state_of
from torch import Tensor, nn
from torch.func import functional_call

import wspace
from wspace.action import KINDS
from wspace.augment import (
    AlignedMixUp,
    Augment,
    Augmentation,
    Compose,
    Drop,
    Flip,
    MixUp,
    Noise,
    PermutedMixUp,
    Quantile,
    Rotate,
    SelfMixUp,
    Symmetry,
    Translate,
    Zoom,
    effect_of,
)
from wspace.errors import WSpaceError
from wspace.graph import ParameterGraph
from wspace.space import Role
from wspace.testing import TOLERANCE, assert_same

EXACT = TOLERANCE[torch.float64]
CHANGED = 1e-6
B = 5
EVERY: list[tuple[Augmentation, str]] = [
    (Symmetry(KINDS), "exact"),
    (Compose([Symmetry(("sign",)), Symmetry(("permutation",))]), "exact"),
    (Translate(), "known input map"),
    (Rotate(), "known input map"),
    (Zoom(), "known input map"),
    (Flip(probability=0.8), "known input map"),
    (Compose([Symmetry(), Rotate()]), "known input map"),
    (Noise(0.1), "approximate"),
    (Drop(0.2), "approximate"),
    (Quantile(0.4), "approximate"),
    (MixUp(), "approximate"),
    (PermutedMixUp(), "approximate"),
    (AlignedMixUp(), "approximate"),
    (SelfMixUp(), "approximate"),
    (
        Compose([Translate(), Noise(0.1), Symmetry(KINDS), AlignedMixUp()], [0.5, 1, 0.5, 1]),
        "approximate",
    ),
]
each = pytest.mark.parametrize("change", [a for a, _ in EVERY], ids=lambda a: str(a)[:40])


def siren(width: int = 7) -> nn.Module:
    from datasets_zoo.inr import siren as make  # noqa: PLC0415

    return make([2, width, 4, 3], omega=2.0).double()


@functools.cache
def space_of(width: int = 7) -> wspace.WeightSpace:
    return wspace.trace(siren(width), torch.zeros(1, 2, dtype=torch.float64))


def networks(*lead: int, seed: int = 0, width: int = 7) -> ParameterGraph:
    g = torch.Generator().manual_seed(seed)
    space = space_of(width)
    state = {p.name: torch.randn(*lead, *p.shape, generator=g).double() for p in space.params}
    return wspace.encode(space, state)


def answers(graph: ParameterGraph, x: Tensor) -> list[Tensor]:
    """What every network of a batch answers."""
    states = [{n: v[i] for n, v in graph.values.items()} for i in range(graph.batch[0])]
    return [functional_call(siren(), s, (x,)) for s in states]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------- what becomes of the function

each_case = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if c.slow else n for n, c in CASES.items()],
)


def rows_of(module: nn.Module, generator: torch.Generator, count: int) -> dict[str, Tensor]:
    """Networks near a module, without constant tensors; variances stay positive."""
    made: dict[int, Tensor] = {}
    state = state_of(module)
    for x in state.values():
        if id(x) in made:
            continue
        if not x.is_floating_point():
            made[id(x)] = x.expand(count, *x.shape).clone()
            continue
        u, v = torch.rand(2, count, *x.shape, generator=generator, dtype=x.dtype)
        made[id(x)] = x * (1 + u / 2) + v / 50
    return {name: made[id(x)] for name, x in state.items()}


def split(graph: ParameterGraph, state: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The state of one network; tied names share a tensor."""
    known = {n: p.name for n, p in graph.space.by_name.items()}
    mine = {n: x[row] for n, x in graph.values.items()}
    return {n: mine[known[n]] if n in known else x[row] for n, x in state.items()}


@each_case
def test_symmetries_keep_the_function(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    state = rows_of(module, generator, 2)
    values = {p.name: state[p.name] for p in space.params}
    graph = ParameterGraph(space, MappingProxyType(values), MappingProxyType({}))
    made = Symmetry(KINDS)(graph, generator)
    assert space.coverage == 0 or any(made.values[n] is not x for n, x in values.items())
    last = (split(g, state, 1) for g in (graph, made))
    before, after = (outputs(module, s, args, kwargs, mode=Double()) for s in last)
    assert gap(before, after) <= EXACT


@pytest.mark.parametrize("name", ["mlp", "siren", "resnet18", "attention_gqa", "lstm", "wavenet"])
@pytest.mark.parametrize("change", [Noise(0.05), Drop(0.1), Quantile(0.4)], ids=str)
def test_others_change_the_function(
    change: Augmentation, name: str, generator: torch.Generator
) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    state = rows_of(module, generator, 2)
    values = {p.name: state[p.name] for p in space.params}
    graph = ParameterGraph(space, MappingProxyType(values), MappingProxyType({}))
    made = change(graph, generator)
    for i in range(2):
        before, after = (
            outputs(module, split(g, state, i), args, kwargs, mode=Double()) for g in (graph, made)
        )
        assert gap(before, after) > CHANGED


@pytest.mark.parametrize(("change", "effect"), EVERY, ids=lambda a: str(a)[:40])
def test_effects_are_as_labelled(change: Augmentation, effect: str) -> None:
    """Input maps are proved in `test_augment_coordinates`."""
    assert effect_of(change) == change.effect == effect
    graph, x = networks(B), torch.randn(6, 2, dtype=torch.float64)
    made = change.apply(graph, seeded()).graph
    worst = [gap([a], [b]) for a, b in zip(answers(graph, x), answers(made, x), strict=True)]
    assert (max(worst) <= EXACT) == (effect == "exact")
    assert effect == "exact" or max(worst) > CHANGED


def test_plain_functions_have_no_known_effect() -> None:
    def same(graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        del generator
        return graph

    assert effect_of(same) == "approximate" == Compose([Symmetry(), same]).effect
    assert Compose([]).effect == "exact"
    assert Compose([same])(graph := networks(B), seeded()).values == graph.values


# ------------------------------------------------------------------------ what all share


@each
def test_nothing_is_written_to_and_seeds_decide(change: Augmentation) -> None:
    graph = networks(B)
    before = {n: x.clone() for n, x in graph.values.items()}
    made, again, other = (change.apply(graph, seeded(s)) for s in (1, 1, 2))
    assert_same(before, dict(graph.values))
    assert_same(dict(made.graph.values), dict(again.graph.values))
    assert any(not torch.equal(x, other.graph.values[n]) for n, x in made.graph.values.items())
    assert made.graph.space is graph.space and made.graph.batch == graph.batch
    assert all(x.dtype == before[n].dtype for n, x in made.graph.values.items())
    assert (made.mixture is None) == (not change.mixes)
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    change.apply(graph, seeded())
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize(
    "change",
    [a for a, _ in EVERY if not a.mixes and not isinstance(a, SelfMixUp)],  # a mix of equals
    ids=lambda a: str(a)[:40],
)
def test_every_network_is_changed_in_its_own_way(change: Augmentation) -> None:
    one = networks(1)
    graph = wspace.encode(one.space, {n: x.expand(40, *x.shape[1:]) for n, x in one.values.items()})
    made = change(graph, seeded(3))
    assert len(torch.cat([x.flatten(1) for x in made.values.values()], 1).unique(dim=0)) > 2


@each
@pytest.mark.parametrize("lead", [(), (1,), (B, 3)], ids=str)
def test_any_batch_will_do(change: Augmentation, lead: tuple[int, ...]) -> None:
    graph = networks(*lead)
    made = change.apply(graph, seeded())
    assert made.graph.batch == lead
    assert (made.mixture is not None) == (change.mixes and len(lead) == 2)
    if made.mixture is not None:
        assert len(made.mixture) == B


@each
def test_float32_and_gradients(change: Augmentation) -> None:
    graph = networks(B)
    values = {n: x.float().requires_grad_() for n, x in graph.values.items()}
    made = change.apply(replace(graph, values=MappingProxyType(values)), seeded()).graph
    sum(x.square().sum() for x in made.values.values()).backward()  # type: ignore[union-attr]
    assert all(x.dtype == torch.float32 for x in made.values.values())
    assert all(x.grad is not None and bool(x.grad.any()) for x in values.values())


@pytest.mark.parametrize("change", [Symmetry(KINDS), Rotate(), Translate()], ids=str)
def test_times_of_a_trajectory_move_alike(change: Augmentation) -> None:
    whole, seed = networks(B, 3), 4
    last = replace(whole, values=MappingProxyType({n: x[:, 2] for n, x in whole.values.items()}))
    made, one = change(whole, seeded(seed)), change(last, seeded(seed))
    assert_same({n: x[:, 2] for n, x in made.values.items()}, dict(one.values))


# ---------------------------------------------------------------------------- one by one


def test_symmetry_refuses_unknown_kinds() -> None:
    for make in (Symmetry, lambda k: PermutedMixUp(kinds=k), lambda k: AlignedMixUp(kinds=k),
                 lambda k: SelfMixUp(kinds=k)):  # fmt: skip
        with pytest.raises(WSpaceError, match=r"unknown kinds \['turn'\]"):
            make(("sign", "turn"))


def test_noise_is_relative_and_random() -> None:
    graph = networks(400)
    name, std = "layers.1.weight", 0.3
    big = replace(graph, values=MappingProxyType({n: 100 * x for n, x in graph.values.items()}))
    added = Noise(std)(big, seeded()).values[name] - big.values[name]
    spread = big.values[name].flatten(1).std(1, correction=0)
    relative = added.flatten(1) / spread[:, None]
    assert abs(float(relative.std()) - std) < 0.01 and abs(float(relative.mean())) < 0.01
    columns = relative.T
    assert float((columns.corrcoef() - torch.eye(len(columns))).abs().max()) < 0.3
    constant = replace(graph, values=MappingProxyType(
        {n: torch.full_like(x, 0.5) for n, x in graph.values.items()}))  # fmt: skip
    assert_same(dict(Noise()(constant, seeded()).values), dict(constant.values))


def norms() -> tuple[ParameterGraph, wspace.WeightSpace]:
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()
    space = wspace.trace(net.eval(), torch.zeros(4, 3, dtype=torch.float64))
    state = rows_of(net, seeded(), B)
    return wspace.encode(space, state), space


def test_what_values_are_left_alone() -> None:
    graph, space = norms()
    weights = {p.name for p in space.params if p.role is Role.MATRIX}
    buffers = {p.name for p in space.params if p.buffer}
    assert weights and buffers and "1.num_batches_tracked" in graph.rest
    for change, changed in {
        Noise(0.1): {p.name for p in space.params} - buffers,
        Drop(0.5): weights,
        Quantile(1.0): weights,
        MixUp(): {p.name for p in space.params},
    }.items():
        made = change.apply(graph, seeded()).graph
        assert {n for n, x in made.values.items() if not torch.equal(x, graph.values[n])} == changed
        assert made.rest is graph.rest


def test_whole_numbers_stay() -> None:
    graph = networks(B)
    whole = {n: (10 * x).long() for n, x in graph.values.items()}
    given = replace(graph, values=MappingProxyType(whole))
    for change in (Noise(), MixUp(), AlignedMixUp(kinds=())):
        assert_same(dict(change.apply(given, seeded()).graph.values), whole)


def test_drop_takes_a_share() -> None:
    graph = networks(300)
    made = Drop(0.3)(graph, seeded())
    for name, x in made.values.items():
        gone = x == 0
        assert torch.equal(x[~gone], graph.values[name][~gone])
        expected = 0.3 if name.endswith("weight") else 0
        assert abs(float(gone.double().mean()) - expected) < 0.02
    assert_same(dict(Drop(0.0)(graph, seeded()).values), dict(graph.values))
    assert not Drop(1.0)(graph, seeded()).values["layers.0.weight"].any()


def test_quantile_takes_the_smallest() -> None:
    graph = networks(200)
    name = "layers.1.weight"
    made = Quantile(0.5)(graph, seeded()).values[name].flatten(1)
    before = graph.values[name].flatten(1)
    gone = made == 0
    assert torch.equal(made[~gone], before[~gone])
    largest = before.abs().masked_fill(~gone, 0).amax(1)
    least = before.abs().masked_fill(gone, torch.inf).amin(1)
    assert bool((largest < least).all())
    counts = gone.double().mean(1)
    assert float(counts.max()) < 0.5 and abs(float(counts.mean()) - 0.25) < 0.05
    assert len(counts.unique()) > 5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Noise(-0.1), "Noise: std makes no sense"),
        (lambda: Drop(1.1), "Drop: share makes no sense"),
        (lambda: Quantile(-1), "Quantile: most makes no sense"),
        (lambda: Translate(-1), "Translate: most makes no sense"),
        (lambda: Rotate(400), "Rotate: degrees makes no sense"),
        (lambda: Zoom(1.0), "Zoom: share makes no sense"),
        (lambda: Flip(probability=2), "Flip: probability makes no sense"),
        (lambda: MixUp((0.8, 0.2)), "MixUp: the lower bound makes no sense"),
        (lambda: MixUp((0.0, 1.2)), "MixUp: the upper bound makes no sense"),
        (lambda: MixUp(beta=0.0), "MixUp: beta is positive"),
        (lambda: MixUp(targets="best"), "MixUp: unknown targets"),  # type: ignore[arg-type]
        (lambda: SelfMixUp(augment=[MixUp()]), "SelfMixUp: the copy of a network"),
        (lambda: Compose([Noise()], [0.5, 0.5]), "Compose: probabilities do not fit"),
        (lambda: Compose([Noise()], [1.5]), "Compose: probabilities do not fit"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(WSpaceError, match=match):
        make()


# ------------------------------------------------------------------------------- Compose


def test_parts_act_in_order() -> None:
    parts: list[Augment] = [Noise(0.3), Quantile(0.9)]
    graph, g = networks(B), seeded(7)
    expected = parts[1](parts[0](graph, g), g)
    assert_same(dict(Compose(parts)(graph, seeded(7)).values), dict(expected.values))
    swapped = Compose(parts[::-1])(graph, seeded(7)).values
    assert any(not torch.equal(x, swapped[n]) for n, x in expected.values.items())


def test_probabilities_choose_networks() -> None:
    graph = networks(400)
    made = Compose([Noise(0.3)], [0.3])(graph, seeded())
    same = torch.stack([(x == graph.values[n]).flatten(1).all(1) for n, x in made.values.items()])
    assert torch.equal(same.all(0), same.any(0))  # all of a network, or nothing
    assert abs(float(same[0].double().mean()) - 0.7) < 0.07
    assert_same(dict(Compose([Noise()], [0.0])(graph, seeded()).values), dict(graph.values))
    sure = Compose([Noise()], [1.0])(graph, seeded())
    assert_same(dict(sure.values), dict(Noise()(graph, seeded()).values))


def test_mixing_cannot_lose_targets() -> None:
    for change in (MixUp(), AlignedMixUp(), Compose([Noise(), Compose([MixUp()])])):
        assert change.mixes
        with pytest.raises(WSpaceError, match=r"(?s)targets have to be mixed too.*\.apply"):
            change(networks(B), seeded())
    assert not SelfMixUp().mixes and not Compose([SelfMixUp(), Noise()]).mixes
