"""Activations by group: moving the weights moves them in just the same way."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, build
from oracles import state_of
from test_laws import changes, generic, observed
from torch import Tensor, nn

import wspace
from wspace.action import Transform
from wspace.action.places import axis_source
from wspace.align.activations.moments import network
from wspace.errors import SpaceMismatch, TraceError
from wspace.space import Axis, WeightSpace
from wspace.testing import TOLERANCE
from wspace.trace.observe import Observation, Observer, observe
from wspace.trace.sandbox import double_precision
from wspace.trace.sites import COMPUTED

UNOBSERVED = {  # groups of weights that meet no input, and experts that see other tokens each
    "attention_pool": 1, "deberta": 1, "deepseek_v2": 1, "deepseek_v3": 1, "diffllama": 4,
    "falcon_gqa": 2, "gpt_oss": 2, "granite_moe": 2, "jamba": 1, "mixtral": 2, "mixtral_batched": 2,
    "moe_dispatch": 1, "olmoe": 2, "perceiver": 1, "qwen2_moe": 2, "qwen3_moe": 2, "state_space": 1,
    "swinv2": 3, "switch": 1,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some(fast: int) -> pytest.MarkDecorator:
    """All cases; but an even spread of so many is slow."""
    names = list(CASES)
    quick = set(names[:: -(-len(names) // fast)])
    return pytest.mark.parametrize(
        "name", [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
    )


def source(t: Transform, space: WeightSpace, name: str) -> Tensor:
    """Which unit stands in the place of each after a transform: ``(over * size,)``."""
    group = space.all_groups[name]
    return axis_source(t, Axis((*(space.all_groups[o] for o in group.over), group)), None)


def seen(
    space: WeightSpace, module: nn.Module, args: Any, kwargs: Any, **options: Any
) -> Observation:
    with double_precision():
        return observe(space, module, args, kwargs, **options)


def error(a: Tensor, b: Tensor) -> float:
    scale = a.abs().max() if a.numel() else torch.tensor(1.0)
    return float((a - b).abs().max() / scale.clamp_min(1e-300)) if a.numel() else 0.0


@some(36)
def test_activations_move_with_the_weights(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    state = generic(state_of(module), generator)
    t = wspace.sample(space, generator=generator)
    before = seen(space, network(state, module), args, kwargs, most=None)
    after = seen(space, network(wspace.act(t, state, space), module), args, kwargs, most=None)
    worst, control = 0.0, 0.0
    for group, features in before.features.items():
        place = source(t, space, group)
        for x, y in zip(features, after.features[group], strict=True):
            worst = max(worst, error(x.flatten(1)[:, place], y.flatten(1)))
            control = max(control, error(x, y))
    assert worst <= TOLERANCE[torch.float64]
    assert not before.features or control > 1e-3  # in place of the permutation, none
    assert set(before.features) | set(before.unobserved) == set(space.groups)
    assert len(before.unobserved) == UNOBSERVED.get(name, 0), before.unobserved


@some(24)
def test_observing_changes_nothing(name: str) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    for i, m in enumerate(module.modules()):
        m.training = i % 3 == 0
    before = observed(module, args, kwargs)
    first = observe(space, module, args, kwargs)
    assert changes(before, observed(module, args, kwargs)) == []
    again = observe(space, module, args, kwargs)
    for group, features in first.features.items():
        assert all(torch.equal(x, y) for x, y in zip(features, again.features[group], strict=True))


@pytest.mark.parametrize("name", ["mlp", "vgg", "encoder_pre_norm", "lstm", "language_model_tied"])
def test_a_batch_of_another_size(name: str, generator: torch.Generator) -> None:
    """Samples of a batch of three times the size are those of its thirds."""
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    thirds = [args, *(tuple(x.roll(k, -1) for x in args) for k in (1, 2))]
    whole = observe(space, module, tuple(torch.cat(xs) for xs in zip(*thirds, strict=True)), kwargs)
    parts = [observe(space, module, part, kwargs) for part in thirds]
    for group, features in whole.features.items():
        for i, x in enumerate(features):
            rows = sum(len(p.features[group][i]) for p in parts)
            assert x.shape == (rows, *parts[0].features[group][i].shape[1:])
            total = sum(p.features[group][i].square().sum(0) for p in parts)
            assert error(total, x.square().sum(0)) <= TOLERANCE[torch.float64]


def test_features_are_the_activations(generator: torch.Generator) -> None:
    """Against forward hooks, which know the layers."""
    body = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 7), nn.Tanh()
    module = nn.Sequential(*body, nn.Linear(7, 2))
    x = torch.randn(4, 3, 6, 6, generator=generator)
    space = wspace.trace(module, x)
    found = observe(space, module, x)
    made: list[Tensor] = []
    for i in (0, 1, 3, 4):
        module[i].register_forward_hook(lambda m, a, y: made.append(y.detach()))
    module(x)
    conv, relu, linear, tanh = made
    assert [s.label for s in found.sites["h1"]] == ["0: convolution", "0: relu"]
    assert torch.allclose(found.features["h1"][0], conv.movedim(1, -1).reshape(-1, 5), atol=1e-6)
    assert torch.allclose(found.features["h1"][1], relu.movedim(1, -1).reshape(-1, 5), atol=1e-6)
    assert torch.allclose(found.features["h2"][0], linear, atol=1e-6)
    assert torch.allclose(found.features["h2"][1], tanh, atol=1e-6)


def test_heads_are_contexts() -> None:
    module, args, kwargs = build("encoder_pre_norm")
    space = wspace.trace(module, args, kwargs)
    found = observe(space, module, args, kwargs)
    for group, features in found.features.items():
        sizes = [space.all_groups[o].size for o in space.groups[group].over]
        assert all(list(x.shape[1:]) == [*sizes, space.groups[group].size] for x in features)
    assert any(space.groups[g].over for g in found.features)


def test_which_results_are_read() -> None:
    module, args, kwargs = build("resnet18")
    space = wspace.trace(module, args, kwargs)
    every = observe(space, module, args, kwargs, most=None)
    few = observe(space, module, args, kwargs, most=2)
    group = max(every.sites, key=lambda g: len(every.sites[g]))
    assert len(every.sites[group]) > 2
    assert few.sites[group] == (every.sites[group][0], every.sites[group][-1])
    assert observe(space, module, args, kwargs, most=1).sites[group] == every.sites[group][-1:]
    sites = observe(space, module, args, kwargs, kinds=[COMPUTED], groups=[group]).sites
    assert set(sites) == {group}
    assert {s.kind for s in sites[group]} == {COMPUTED}


class Drifting(nn.Module):
    """Runs another operator every time, for ever or only where the inputs say so."""

    def __init__(self, *, moody: bool) -> None:
        super().__init__()
        self.a, self.b, self.moody, self.turn = nn.Linear(3, 5), nn.Linear(5, 2), moody, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.turn[0] += 1
        odd = self.turn[0] % 2 if self.moody else bool(x.sum() > 0)
        h = self.a(x)
        return self.b(h.relu() if odd else (2 * h).tanh())


def test_a_plan_is_made_anew_where_data_ask_for_it() -> None:
    module, x = Drifting(moody=False), torch.randn(4, 3).abs()
    space = wspace.trace(module, x)
    observer = Observer(space)
    shown: list[list[int]] = []

    def use(plan: object) -> Callable[[int, Tensor], None]:
        shown.append([])
        return lambda i, _: shown[-1].append(i)

    assert [s.label for s in observer.run(module, (x,), {}, use).sites] == ["a: addmm", "a: relu"]
    assert [s.label for s in observer.run(module, (-x,), {}, use).sites] == ["a: addmm", "a: tanh"]
    assert shown == [[0, 1], [0], [0, 1]]  # a start with the old plan, and the run with the new one


def test_errors() -> None:
    mlp, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 3)
    space = wspace.trace(mlp, x)
    with pytest.raises(SpaceMismatch, match="group 'h9'"):
        observe(space, mlp, x, groups=["h9"])
    with pytest.raises(SpaceMismatch, match="kind 'relu'"):
        observe(space, mlp, x, kinds=["relu"])
    with pytest.raises(SpaceMismatch, match="most=0"):
        observe(space, mlp, x, most=0)
    other = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(SpaceMismatch, match=r"0\.weight: \(6, 3\)"):
        observe(space, other, x)
    with pytest.raises(TraceError, match="meta device"):
        observe(space, copy.deepcopy(mlp).to("meta"), x)
    moody = Drifting(moody=True)
    moody.turn = _Counter()
    with pytest.raises(TraceError, match="does not run the same operators twice"):
        observe(wspace.trace(moody, x), moody, x)


class _Counter:
    """Counts on, though the attributes of the module are put back."""

    def __init__(self) -> None:
        self.n = 0

    def __getitem__(self, at: int) -> int:
        return self.n

    def __setitem__(self, at: int, value: int) -> None:
        self.n = value
