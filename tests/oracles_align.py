"""Slow, plain references for matching: all elements of small groups, and objectives by `act`."""

from __future__ import annotations

from itertools import permutations, product
from math import prod

import torch
from torch import Tensor

import wspace
from wspace.action import State, Transform, shape_of
from wspace.space import WeightSpace


def closeness(a: State, b: State, moved: State, space: WeightSpace) -> Tensor:
    """``(|a|² + |b|² - |a - moved|²) / 2`` over parameters, ties once; of each row."""
    total = torch.zeros((), dtype=torch.float64)
    for p in space.params:
        if not p.buffer:
            x, y, z = (s[p.name].to(torch.complex128) for s in (a, b, moved))
            squares = 0.5 * (x.abs() ** 2 + y.abs() ** 2 - (x - z).abs() ** 2)
            lead = squares.dim() - len(p.axes)
            total = (
                total + squares.flatten(lead).sum(-1) if lead < squares.dim() else total + squares
            )
    return total


def elements(space: WeightSpace, kinds: tuple[str, ...] = ("permutation",)) -> Transform:
    """Every element of a small group as one batch: permutations, with those within, and signs."""
    groups = [g for g in space.groups.values() if not g.fixed and "permutation" in kinds]
    options: list[list[Tensor]] = []
    for g in groups:
        shape = shape_of(g, space)
        each = [*permutations(range(g.size))]
        many = product(each, repeat=prod(shape[:-1]))
        options.append([torch.tensor(choice).reshape(shape) for choice in many])
    gauges = [i for i, gauge in enumerate(space.gauges) if gauge.kind == "sign" and "sign" in kinds]
    for i in gauges:
        shape = shape_of(space.all_groups[space.gauges[i].group], space)
        every = product((1.0, -1.0), repeat=prod(shape))
        options.append([torch.tensor(s, dtype=torch.float64).reshape(shape) for s in every])
    columns = [torch.stack(column) for column in zip(*product(*options), strict=True)]
    p = {g.name: x for g, x in zip(groups, columns, strict=False)}
    return Transform(space, p, dict(zip(gauges, columns[len(groups) :], strict=True)))


def best_by_force(
    a: State, b: State, space: WeightSpace, kinds: tuple[str, ...] = ("permutation",)
) -> float:
    """The largest closeness that any element reaches."""
    every = elements(space, kinds)
    x, y = ({n: t.expand(*every.batch, *t.shape) for n, t in s.items()} for s in (a, b))
    return float(closeness(x, y, wspace.act(every, y, space), space).max())


def random_state(space: WeightSpace, generator: torch.Generator, *batch: int) -> dict[str, Tensor]:
    """Normal weights of unit gain, float64 (complex where the space is)."""
    out: dict[str, Tensor] = {}
    for p in space.params:
        dtype = torch.complex128 if p.dtype.startswith("complex") else torch.float64
        x = torch.randn((*batch, *p.shape), generator=generator, dtype=dtype)
        out[p.name] = x / max(1, p.numel // max(1, p.shape[0] if p.shape else 1)) ** 0.5
    return out
