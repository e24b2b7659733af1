"""Laws of hypernetworks on every case: the base, coverage, states, networks at once, no change."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import CASES, FEW, build
from oracles import flat, gap
from torch import Tensor, nn

import wspace
from wspace.hyper import FullHead, HyperNetwork, TaskEmbedding, call
from wspace.hyper.target import parameters_of
from wspace.testing import TOLERANCE, assert_same


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tolerance(name: str) -> float:
    """Of rounding; some cases compute partly in float32, whatever their type."""
    return 1e-6 if CASES[name].float32 else TOLERANCE[torch.float64]


class Made(NamedTuple):
    """A case, and a hypernetwork that makes all of it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hyper: HyperNetwork
    conds: Tensor


def made(name: str, scale: float = 1.0) -> Made:
    module, args, kwargs = build(name)
    module.eval()
    g = torch.Generator().manual_seed(1)
    condition = TaskEmbedding(3, 2, generator=g)
    hyper = HyperNetwork(
        module, condition, FullHead([8]), "frozen", init="residual", scale=scale, generator=g
    )
    return Made(module, args, kwargs, hyper.eval(), torch.tensor([2, 0]))


each_case = pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in FEW and not CASES[n].slow else pytest.mark.slow)
        for n in CASES
    ],
)


@each_case
def test_zero_scale_is_the_base_exactly(name: str) -> None:
    case = made(name, scale=0.0)
    torch.manual_seed(0)
    expected = flat(case.module(*case.args, **case.kwargs))
    torch.manual_seed(0)
    found = flat(case.hyper.run(1, *case.args, **case.kwargs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_case
def test_state_is_whole_and_the_target_unchanged(name: str) -> None:
    module, args, kwargs = build(name)
    module.eval()
    before = copy.deepcopy(module.state_dict())
    frozen = [p.requires_grad for p in module.parameters()]
    g = torch.Generator().manual_seed(1)
    hyper = HyperNetwork(module, TaskEmbedding(3, 2), FullHead([8]), generator=g)
    state = hyper(torch.tensor([2, 0]))
    assert list(state) == list(before)
    for n, x in state.items():
        assert x.shape == (2, *before[n].shape)
        assert x.dtype == before[n].dtype
    made_of = {n for w in hyper.weights for n in w.names}
    for f in parameters_of(module):
        if f.names[0] in made_of:
            assert (
                not torch.equal(state[f.names[0]][0], state[f.names[0]][1]) or not f.value.numel()
            )
        assert all(state[n] is state[f.names[0]] or n not in made_of for n in f.names)
    parts = hyper.coverage
    counted = sum(sum(p.values()) for p in (parts.generated, parts.shared, parts.untouched))
    every = [f.value.numel() for f in parameters_of(module)]
    assert counted == sum(every) + sum(x.numel() for x in module.buffers())
    assert_same(dict(module.state_dict()), before)
    assert [p.requires_grad for p in module.parameters()] == frozen
    del args, kwargs


@each_case
def test_networks_at_once_are_those_one_by_one(name: str) -> None:
    case = made(name)
    with torch.no_grad():
        together = case.hyper.run(case.conds, *case.args, inputs="shared", **case.kwargs)
        for i, cond in enumerate(case.conds):
            torch.manual_seed(0)
            alone = flat(case.hyper.run(cond, *case.args, **case.kwargs))
            for a, b in zip(flat(together), alone, strict=True):
                assert gap([a[i]], [b]) <= tolerance(name)


@each_case
def test_run_is_the_module_with_the_state(name: str) -> None:
    case = made(name)
    state = case.hyper.cache(0)
    with torch.no_grad():
        found = flat(case.hyper.run(0, *case.args, **case.kwargs))
        again = copy.deepcopy(case.module)
        case.hyper.write_to(again, 0)
        assert gap(found, flat(again(*case.args, **case.kwargs))) <= tolerance(name)
        direct = call(case.module, state, case.args, case.kwargs)
        other = case.module(*case.args, **case.kwargs)
    assert gap(found, flat(direct)) <= tolerance(name)
    assert gap(found, flat(other)) > 1e-6


@each_case
def test_states_are_states_of_the_space(name: str) -> None:
    case = made(name)
    space = wspace.trace(case.module, case.args, case.kwargs)
    state = case.hyper(case.conds)
    space.validate({p.name: state[p.name] for p in space.params})
    t = wspace.sample(space, generator=torch.Generator().manual_seed(0))
    moved = {n: x.detach() for n, x in wspace.act(t, state, space).items()}
    with torch.no_grad():
        expected = case.hyper.run(case.conds, *case.args, inputs="shared", **case.kwargs)
        torch.manual_seed(0)
        found = call(case.module, moved, case.args, case.kwargs, inputs="shared")
    assert gap(flat(found), flat(expected)) <= max(1e-9, tolerance(name))
