"""A state moved by a group element: gathered axis by axis, then multiplied and shifted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from wspace.action.places import along_axis, axis_source
from wspace.action.transform import State, Transform, rows_of
from wspace.errors import SpaceMismatch, message
from wspace.space import Axis, Group, Param, WeightSpace


def act(transform: Transform, state: State, space: WeightSpace) -> dict[str, Tensor]:
    """The state moved by a group element; the function it computes is unchanged.

    Args:
        transform: Group element of `space`. A batched one moves each row by the element of that
            row: its batch axes are the first ones of the state, which may have more behind them.
        state: Tensors by name, ``(*batch, *shape)``; entries that `space` does not know are passed
            on unchanged. Not modified.
        space: Weight space of the state.

    Returns:
        New tensors for what moved; untouched tensors are the same objects. Tied names stay tied.

    Raises:
        SpaceMismatch: If the state or the transform does not fit the space, or the batch axes of
            the transform are not the first ones of the state.
    """
    if transform.space is not space and transform.space != space:
        raise SpaceMismatch("act: the transform belongs to another weight space")
    space.validate(state)
    out = dict(state)
    for p in space.params:
        value = moved(transform, p.name, state, space)
        for name in (p.name, *p.ties):
            if name in state:
                out[name] = value
    return out


def moved(transform: Transform, name: str, state: State, space: WeightSpace) -> Tensor:
    """One tensor of ``act(transform, state, space)``, which reads no other than it needs.

    So a state that does not fit into memory is moved tensor by tensor. Nothing is checked but the
    name and the batch axes: ``space.validate(state)`` once is for the caller.

    Args:
        transform: Group element of `space`, batched or not.
        name: Of the tensor; a tied name will do.
        state: Tensors by name, ``(*batch, *shape)``.
        space: Weight space of the state.

    Returns:
        The tensor, ``(*batch, *shape)``; that of the state itself if nothing moves it.

    Raises:
        SpaceMismatch: If the batch axes of the transform are not the first ones of the tensor.
    """
    p = space.by_name.get(name)
    if p is None:
        return state[name]
    x = _taken(transform, p, state, space) if p.at else state[p.name]
    if not transform.batch:
        return _move(transform, p, x)
    _check(transform.batch, p, x)
    lead = x.shape[len(transform.batch) : x.dim() - len(p.axes)]
    rows = x.reshape(prod(transform.batch), prod(lead), *p.shape)
    after = _move(transform, p, rows)
    return x if after is rows else after.reshape(x.shape)


def _check(batch: tuple[int, ...], p: Param, x: Tensor) -> None:
    lead = tuple(x.shape[: x.dim() - len(p.axes)])
    if lead[: len(batch)] != batch:
        raise SpaceMismatch(
            message(
                f"act: {p.name!r} does not have the batch axes of the transform",
                expected=f"batch axes {batch}, and perhaps more behind them",
                got=f"batch axes {lead}",
                help="`wspace.sample(space, batch=…)` draws one element for each row",
            )
        )


# ------------------------------------------------------------------------- families


def _taken(t: Transform, p: Param, state: State, space: WeightSpace) -> Tensor:
    """The slice of a family that moves to the place of `p`: row by row, if `t` is batched."""
    names, (group, index) = _siblings(space)[p.family], p.at or ("", 0)
    q = t.permutations.get(group)
    if q is None or not q.numel():
        return state[p.name]
    if not t.batch:
        return state[names[int(q[index])]]
    source = q[..., index].flatten()
    order = source.argsort(stable=True)
    k, parts = len(t.batch), []
    for i, rows in zip(*_runs(source, order), strict=True):
        x = state[names[i]]
        _check(t.batch, p, x)
        parts.append(x.flatten(0, k - 1).index_select(0, rows.to(x.device)))
    x = torch.cat(parts).index_select(0, order.argsort().to(parts[0].device))
    return x.reshape(*t.batch, *x.shape[1:])


def _runs(source: Tensor, order: Tensor) -> tuple[list[int], Sequence[Tensor]]:
    """Distinct sources in order, and the rows of each."""
    values, counts = source.unique(return_counts=True)
    return values.tolist(), order.split(counts.tolist())


@lru_cache(maxsize=64)
def _siblings(space: WeightSpace) -> dict[str, list[str]]:
    """The slices of every family, in order."""
    members: dict[str, dict[int, str]] = {}
    for p in space.params:
        if p.at:
            members.setdefault(p.family, {})[p.at[1]] = p.name
    return {family: [found[i] for i in sorted(found)] for family, found in members.items()}


# --------------------------------------------------------------------------- tensors
# Under a batched transform a tensor is ``(rows, other batch axes in one, *shape)``.


def _move(t: Transform, p: Param, x: Tensor) -> Tensor:
    plan = _plans(t.space)[p.name]
    x = _gather(t, p, plan, x)
    for i, d, occurrence, exponent, amount in plan.factors:
        if i in t.factors:
            gauge, factor = t.space.gauges[i], rows_of(t.factors[i], t.batch)
            if exponent is None:
                x = x + _laid(t, p, (d, gauge.group, occurrence), factor * amount, 0.0, x)
                continue
            if gauge.kind == "phase":
                values = 1 - 2 * torch.remainder(factor * exponent, 2)
            else:
                values = factor ** float(exponent)
            x = x * _laid(t, p, (d, gauge.group, occurrence), values, 1.0, x)
    return x


@dataclass(frozen=True, slots=True)
class _Plan:
    """What may move a parameter.

    Attributes:
        groups: Names of the groups on each axis.
        local: True if no group of an axis depends on a group of another axis.
        factors: Gauge, dimension, occurrence, and the exponent, or None and the amount of a shift.
    """

    groups: tuple[tuple[str, ...], ...]
    local: bool
    factors: tuple[tuple[int, int, int, int | None, float], ...]


@lru_cache(maxsize=64)
def _plans(space: WeightSpace) -> dict[str, _Plan]:
    factors: dict[str, list[tuple[int, int, int, int | None, float]]] = {}
    for i, gauge in enumerate(space.gauges):
        for name, d, occurrence, exponent in gauge.slots:
            factors.setdefault(name, []).append((i, d, occurrence, exponent, 0.0))
        for name, d, occurrence, amount in gauge.shifts:
            factors.setdefault(name, []).append((i, d, occurrence, None, amount))
    return {
        p.name: _Plan(
            tuple(tuple(dict.fromkeys(g.name for g in axis.groups())) for axis in p.axes),
            p.local,
            tuple(factors.get(p.name, ())),
        )
        for p in space.params
    }


def _laid(
    t: Transform, p: Param, where: tuple[int, str, int], values: Tensor, neutral: float, x: Tensor
) -> Tensor:
    """Numbers per unit of one occurrence of a group, so that they broadcast to the tensor."""
    d, group, occurrence = where
    batched = bool(t.batch)
    along = along_axis(p, d, group, occurrence, values, neutral, batched=batched)
    shape = [1] * x.dim()
    shape[x.dim() - len(p.axes) + d] = along.shape[-1]
    if batched:
        shape[0] = len(along)
    return along.reshape(shape).to(x)


def _gather(t: Transform, p: Param, plan: _Plan, x: Tensor) -> Tensor:
    moving = [d for d, names in enumerate(plan.groups) if any(n in t.permutations for n in names)]
    if plan.local or not moving:
        lead = x.dim() - len(p.axes)
        for d in moving:
            x = _take(x, lead + d, axis_source(t, p.axes[d], p.at).to(x.device))
        return x
    factors = [f for axis in p.axes for f in axis.factors]
    groups = [f for f in factors if isinstance(f, Group)]
    if len(groups) == len(factors) and len({g.name for g in groups if g.kinds}) == sum(
        bool(g.kinds) for g in groups
    ):
        return _gather_factors(t, p, x, groups)
    lead_shape = x.shape[: x.dim() - len(p.axes)]
    source = axis_source(t, Axis(tuple(factors)), p.at).to(x.device)
    flat = x.reshape(*lead_shape, p.numel)
    return _take(flat, len(lead_shape), source).reshape(x.shape)


def _take(x: Tensor, d: int, source: Tensor) -> Tensor:
    """Entries along dimension `d` from positions ``(size,)``, or ``(rows, size)`` row by row."""
    if source.dim() == 1:
        return x.index_select(d, source)
    n = source.shape[-1]
    if prod(x.shape[1:d]) == 1:  # whole slices: each is copied in one go
        first = torch.arange(len(source), device=x.device)[:, None] * n
        flat = x.reshape(len(source) * n, *x.shape[d + 1 :])
        return flat.index_select(0, (source + first).flatten()).reshape(x.shape)
    shape = [n if i == d else 1 for i in range(x.dim())]
    shape[0] = len(source)
    return x.gather(d, source.reshape(shape).expand(x.shape))


def _gather_factors(t: Transform, p: Param, x: Tensor, factors: list[Group]) -> Tensor:
    """Gather factor by factor, outermost first, so that inner ones are read at output indices."""
    lead = x.shape[: x.dim() - len(p.axes)]
    y = x.reshape(*lead, *(f.size for f in factors))
    names = [f.name for f in factors]
    rows = 1 if t.batch else 0
    for k in sorted(range(len(factors)), key=lambda k: _depth(factors[k], t.space)):
        q = t.permutations.get(factors[k].name)
        if q is None:
            continue
        q = rows_of(q, t.batch)
        if p.at and p.at[0] in factors[k].over:
            q = q.select(rows + factors[k].over.index(p.at[0]), p.at[1])
        over = [o for o in factors[k].over if not p.at or o != p.at[0]]
        shape = [1] * len(factors)
        places = [*(names.index(o) for o in over), k]
        for place in places:
            shape[place] = factors[place].size
        order = sorted(range(len(places)), key=places.__getitem__)
        index = q.permute(*range(rows), *(rows + i for i in order)).to(y.device)
        index = index.reshape(*lead[:rows], *[1] * (len(lead) - rows), *shape)
        y = torch.gather(y, len(lead) + k, index.expand(y.shape))
    return y.reshape(x.shape)


def _depth(group: Group, space: WeightSpace) -> int:
    return 1 + max((_depth(space.all_groups[o], space) for o in group.over), default=0)
