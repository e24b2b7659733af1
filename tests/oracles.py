"""Slow, obvious definitions that the tests compare the library with."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wspace.space import Axis, Concat, Group, WeightSpace

# ------------------------------------------------------------------------------ structure
# An axis written down by hand, `h*d`, `(q + k + v)`, `15!`: a tuple of factors, each a name, a
# fixed size, or a list of such tuples for a concatenation.

Factors = tuple["str | int | list[Factors]", ...]


def parse(text: str) -> Factors:
    """The axis that a text such as ``h*(a + 3!)`` describes; concatenations within one are flat."""
    tokens = re.findall(r"[\w#]+!?|[()+*]", text)
    factors, rest = _product(tokens)
    if rest:
        raise ValueError(f"cannot read {text!r}: stopped at {rest}")
    return factors


def _product(tokens: list[str]) -> tuple[Factors, list[str]]:
    out: list[str | int | list[Factors]] = []
    while True:
        token, tokens = tokens[0], tokens[1:]
        if token == "(":
            parts: list[Factors] = []
            while token != ")":
                part, tokens = _product(tokens)
                parts += part[0] if len(part) == 1 and isinstance(part[0], list) else [part]
                token, tokens = tokens[0], tokens[1:]
            out.append(parts)
        elif token.endswith("!"):
            out.append(int(token[:-1].split("#")[0]))
        elif token != "1":
            out.append(token)
        if not tokens or tokens[0] != "*":
            return tuple(out), tokens
        tokens = tokens[1:]


def structure(axis: Axis) -> Factors:
    """The same for an axis of a space."""

    def factor(f: Group | Concat) -> "str | int | list[Factors]":
        if isinstance(f, Group):
            return f.size if f.fixed else f.name
        parts: list[Factors] = []
        for part in map(structure, f.parts):
            parts += part[0] if len(part) == 1 and isinstance(part[0], list) else [part]
        return parts

    return tuple(map(factor, axis.factors))


def disagreements(
    space: WeightSpace, params: Mapping[str, str], over: Mapping[str, str] | None = None
) -> list[str]:
    """Where a space differs from one written down by hand, up to the names of the groups.

    `params` gives the axes of each parameter, separated by commas; `over` the groups (separated by
    spaces) on which another may depend. Groups are in bijection.
    """
    wrong = [f"{name}: not in the space" for name in params if name not in space.by_name]
    wrong += [f"{p}: not expected" for p in space.params if p.name not in params]
    names: dict[str, str] = {}
    for name in params:
        if name not in space.by_name:
            continue
        theirs = [structure(axis) for axis in space[name].axes]
        ours = [parse(text) for text in params[name].split(",")]
        if not _match(ours, theirs, names):
            wrong.append(f"{name}: expected ({params[name]}), got {space[name]}")
    if len(set(names.values())) < len(names):
        wrong.append(f"groups that should be apart are one: {names}")
    if not wrong:
        for name, theirs in names.items():
            want = {names[o] for o in (over or {}).get(name, "").split()}
            if set(space.groups[theirs].over) != want:
                got = space.groups[theirs].over
                wrong.append(f"{name} = {theirs}: expected to depend on {want}, got {got}")
    return wrong


def _match(ours: Sequence[object], theirs: Sequence[object], names: dict[str, str]) -> bool:
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, str) and isinstance(b, str):
            if names.setdefault(a, b) != b:
                return False
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
            if not _match(a, b, names):
                return False
        elif a != b:
            return False
    return True


# ------------------------------------------------------------------------------ functions


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name, detached; tied ones are one object."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    once = {id(t): t.detach() for _, t in named}
    return {name: once[id(t)] for name, t in named}


def outputs(
    module: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[object],
    kwargs: object,
    *,
    mode: AbstractContextManager[object] | None = None,
) -> list[Tensor]:
    """Tensors returned by a copy of a module that runs with another state; caches are its own."""
    module = copy.deepcopy(module)
    once = {id(t): t.clone() for t in state.values()}
    state = {name: once[id(t)] for name, t in state.items()}
    copied = _map(lambda t: t.clone(), (tuple(args), kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), mode or nullcontext():
        torch.manual_seed(0)
        result = functional_call(module, state, *copied)
    return flat(result)


def flat(result: object) -> list[Tensor]:
    """Tensors in what a module returned, in order; those in caches are not outputs."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [t for item in result for t in flat(item)]
    return []


def _map(change: Callable[[Tensor], Tensor], tree: object) -> object:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {k: _map(change, v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_map(change, v) for v in tree)
    return tree


def gap(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest relative difference; NaN in one of them only, or other shapes, is infinite."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or bool((a.isnan() != b.isnan()).any()):
            return float("inf")
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            keep = a.isfinite() & b.isfinite()
            if bool((a[~keep].nan_to_num(nan=1.0) != b[~keep].nan_to_num(nan=1.0)).any()):
                return float("inf")
            if bool(keep.any()):
                scale = a[keep].abs().max().clamp_min(1e-300)
                worst = max(worst, float((a - b)[keep].abs().max() / scale))
        elif a.numel():
            worst = max(worst, float((a != b).any()))
    return worst


def shuffled(t: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """The tensor with the indices of one dimension in random order, none of them in place."""
    step = int(torch.randint(1, t.shape[dim], (1,), generator=generator))
    order = torch.randperm(t.shape[dim], generator=generator)
    back = torch.empty_like(order)
    back[order] = order.roll(step)
    return t.index_select(dim, back)
