"""The laws L1, L2 and L12 of `docs/`, and what follows from them, on every case."""

import copy
import functools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import CASES, Double, build
from oracles import gap, outputs, shuffled, state_of
from torch import Tensor, nn

import wspace
from wspace.space import WeightSpace
from wspace.testing import TOLERANCE, assert_group_action, assert_same

SEEDS = 2
CONTROL = 1e-6


class Traced(NamedTuple):
    """A case as the tests need it, and the difference that tracing made to it."""

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    space: WeightSpace
    before: dict[str, object]
    after: dict[str, object]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks run fastest on one thread, above all where other processes run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def traced() -> Callable[[str], Traced]:
    """Builds and traces a case, once per session."""

    @functools.cache
    def get(name: str) -> Traced:
        module, args, kwargs = build(name)
        for i, m in enumerate(module.modules()):  # modes that `eval()` or `train()` would not give
            m.training = i % 3 == 0
        before = observed(module, args, kwargs)
        space = wspace.trace(module, args, kwargs)
        after = observed(module, args, kwargs)
        return Traced(module.eval(), args, kwargs, space, before, after)

    return get


each_case = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if c.slow else n for n, c in CASES.items()],
)


# ------------------------------------------------------------------------------------ L1


@each_case
def test_verify_proves_the_space(name: str, traced: Callable[[str], Traced]) -> None:
    case = traced(name)
    report = wspace.verify(case.space, case.module, case.args, case.kwargs)
    assert report.ok
    assert report.max_error <= TOLERANCE[torch.float64]
    assert report.moved == tuple(case.space.groups)
    assert max(report.controls.values()) > CONTROL


@each_case
def test_moving_the_weights_leaves_the_function(
    name: str, traced: Callable[[str], Traced], generator: torch.Generator
) -> None:
    """L1 again, by another way: `functional_call` on randomised weights, and `Double`."""
    module, args, kwargs, space, *_ = traced(name)
    for _ in range(3):  # some draws are dead: a last ReLU that never fires
        state = generic(state_of(module), generator)
        before = outputs(module, state, args, kwargs, mode=Double())
        if any(t.is_floating_point() and bool(t.any()) for t in before):
            break
    for _ in range(SEEDS):
        t = wspace.sample(space, generator=generator, kinds=("permutation", "scale", "sign"))
        after = outputs(module, wspace.act(t, state, space), args, kwargs, mode=Double())
        assert gap(before, after) <= TOLERANCE[torch.float64]
    assert max(broken(module, args, kwargs, state, generator)) > CONTROL


def broken(
    module: nn.Module,
    args: object,
    kwargs: object,
    state: dict[str, Tensor],
    generator: torch.Generator,
) -> Iterator[float]:
    """Changes of the output when one tensor alone is shuffled, until one is large."""
    before = outputs(module, state, args, kwargs, mode=Double())
    for t in reversed(state.values()):  # the last layers count most
        for dim, size in enumerate(t.shape):
            if size > 1 and t.is_floating_point():
                moved = shuffled(t, dim, generator)
                swapped = {n: moved if x is t else x for n, x in state.items()}
                change = gap(before, outputs(module, swapped, args, kwargs, mode=Double()))
                yield change
                if change > CONTROL:
                    return
    raise AssertionError(f"{type(module).__name__}: no control changes the output")


def generic(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights of unit gain; vectors stay near what they were, but none is constant."""
    out: dict[int, Tensor] = {}
    for t in state.values():
        if not t.is_floating_point():
            out.setdefault(id(t), t)
            continue
        noise = torch.rand(t.shape, generator=generator, dtype=t.dtype)
        if t.dim() > 1 and t.numel() > max(t.shape):
            fan = t.numel() / t.shape[0]
            normal = torch.randn(t.shape, generator=generator, dtype=t.dtype)
            out.setdefault(id(t), normal / fan**0.5)
        else:
            out.setdefault(id(t), t * (0.75 + 0.5 * noise) + (0.0 if t.any() else noise / 9))
    return {name: out[id(t)] for name, t in state.items()}


@each_case
def test_coverage(name: str, traced: Callable[[str], Traced]) -> None:
    space = traced(name).space
    assert space.coverage >= CASES[name].coverage, CASES[name].why
    assert CASES[name].coverage > 0.98 or CASES[name].why


# ------------------------------------------------------------------------------------ L2


@each_case
def test_act_is_a_group_action(
    name: str, traced: Callable[[str], Traced], generator: torch.Generator
) -> None:
    case = traced(name)
    assert_group_action(case.space, generic(state_of(case.module), generator))


@each_case
def test_batch_axes_lead(
    name: str, traced: Callable[[str], Traced], generator: torch.Generator
) -> None:
    """To act on stacked states is to stack what acting on each gives."""
    case = traced(name)
    one = state_of(case.module)
    states = [one, generic(one, generator), generic(one, generator)]
    t = wspace.sample(case.space, generator=generator, kinds=("permutation", "scale", "sign"))
    names = [p.name for p in case.space.params]
    stacked = {n: torch.stack([s[n] for s in states])[:, None] for n in names}
    singly = [wspace.act(t, s, case.space) for s in states]
    assert_same(
        {n: torch.stack([s[n] for s in singly])[:, None] for n in names},
        wspace.act(t, stacked, case.space),
        space=case.space,
    )


# ----------------------------------------------------------------------------------- L12


def observed(module: nn.Module, args: object, kwargs: object) -> dict[str, object]:
    """All that tracing might change: in the module, in its inputs, and around it."""
    seen: dict[str, object] = {}
    for path, m in module.named_modules(remove_duplicate=False):
        for key, value in vars(m).items():
            seen[f"{path}.{key}"] = _content(value)
    for kind, named in (
        ("parameter", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
        ("input", _inputs((args, kwargs), "")),
    ):
        for path, t in named:
            flags = t.dtype, t.device, t.requires_grad, t.grad is None, t.data_ptr()
            seen[f"{kind} {path}"] = id(t), flags, sorted(vars(t))
            seen[f"{kind} {path} value"] = t.detach().clone()
    seen["rng torch"] = torch.get_rng_state()
    seen["rng numpy"] = str(np.random.get_state())
    seen["rng python"] = random.getstate()
    seen["modes"] = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch._C._get_mkldnn_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_num_threads(),
    )
    return seen


def _content(value: object, depth: int = 2) -> object:
    """Identity of an attribute and of what containers hold."""
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    if isinstance(value, dict) and depth:
        return {str(k): _content(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set) and depth:
        return [_content(v, depth - 1) for v in value]
    if isinstance(value, Tensor):
        return id(value), sorted(vars(value))
    return id(value)


def _inputs(tree: object, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for k, v in tree.items():
            yield from _inputs(v, f"{path}.{k}")
    elif isinstance(tree, tuple | list):
        for i, v in enumerate(tree):
            yield from _inputs(v, f"{path}[{i}]")


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What differs between two observations."""
    wrong = [f"{k} appeared or vanished" for k in sorted(before.keys() ^ after.keys())]
    for k in before.keys() & after.keys():
        a, b = before[k], after[k]
        same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
        if isinstance(a, Tensor) and a.is_floating_point() and not same:
            same = bool(((a == b) | (a.isnan() & b.isnan())).all())
        if not same:
            wrong.append(f"{k}: {a} became {b}")
    return sorted(wrong)


@each_case
def test_trace_changes_nothing(name: str, traced: Callable[[str], Traced]) -> None:
    case = traced(name)
    assert changes(case.before, case.after) == []


def test_observed_sees_changes() -> None:
    module, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), torch.randn(4, 2)

    def after(change: Callable[[], object]) -> list[str]:
        before = observed(module, (x,), {})
        change()
        return changes(before, observed(module, (x,), {}))

    assert after(lambda: None) == []
    assert after(module[0].eval)
    assert after(lambda: module(x))  # running statistics
    assert after(lambda: module[0].register_forward_hook(lambda *_: None))
    assert after(lambda: setattr(module[0], "cache", 1))
    assert after(lambda: module[0].weight.requires_grad_(False))
    assert after(lambda: setattr(module[0], "weight", nn.Parameter(module[0].weight.detach())))
    assert after(lambda: x.fill_(2))
    assert after(lambda: setattr(module[0].bias, "data", module[0].bias.data.clone()))
    assert after(lambda: torch.rand(1))
    assert after(lambda: setattr(x, "mark", 1))


# ------------------------------------------------------------------- the space as a value


@each_case
def test_trace_is_deterministic(name: str, traced: Callable[[str], Traced]) -> None:
    case = traced(name)
    again = wspace.trace(case.module, case.args, case.kwargs)
    assert again == case.space
    assert hash(again) == hash(case.space)
    assert str(again) == str(case.space)


@each_case
def test_trace_needs_no_weights(name: str, traced: Callable[[str], Traced]) -> None:
    """The same groups and gauges; a module whose constants are on meta, too, may show fewer."""
    case = traced(name)
    if case.space.capture == "abstract":
        space = wspace.trace(blank(case.module), case.args, case.kwargs)
        if (space.params, space.gauges) != (case.space.params, case.space.gauges):
            assert name == "recurrent_gemma"
            assert 0.9 < space.coverage <= case.space.coverage
            assert wspace.verify(space, case.module, case.args, case.kwargs).ok


def blank(module: nn.Module) -> nn.Module:
    """A copy without weights: `to("meta")` that keeps ties and references."""
    memo: dict[int, object] = {}
    for t in module.parameters():
        memo[id(t)] = nn.Parameter(t.detach().to("meta"), requires_grad=t.requires_grad)
    for t in module.buffers():
        if t.is_floating_point():
            memo[id(t)] = t.to("meta")
    return copy.deepcopy(module, memo)


@each_case
def test_json_round_trip(name: str, traced: Callable[[str], Traced]) -> None:
    space = traced(name).space
    again = WeightSpace.from_json(space.to_json())
    assert again == space
    assert hash(again) == hash(space)
    assert again.to_json() == space.to_json()
    assert str(again) == str(space)


@each_case
def test_space_describes_the_state(name: str, traced: Callable[[str], Traced]) -> None:
    """Every float tensor of the `state_dict` is there once, with its shape, dtype and ties."""
    case = traced(name)
    state = state_of(case.module)
    saved = case.module.state_dict()
    floats = {n for n, t in saved.items() if t.is_floating_point() or t.is_complex()}
    assert set(case.space.by_name) == floats
    for p in case.space.params:
        assert p.shape == tuple(state[p.name].shape)
        assert p.dtype == str(state[p.name].dtype).removeprefix("torch.")
        assert p.buffer == (p.name in dict(case.module.named_buffers(remove_duplicate=False)))
        assert set(p.ties) >= {n for n, t in state.items() if t is state[p.name]} - {p.name}
    assert 0.0 <= case.space.coverage <= 1.0
