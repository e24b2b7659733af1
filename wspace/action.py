"""How a weight space's symmetry group acts on states: sample, act, compose, inverse.

One convention, stated once: permutations *gather*. ``act(t, state)[i] = state[p[i]]``, hence
``act(compose(t, u), state) = act(t, act(u, state))`` with ``compose(p, q) = q[p]``.

A group that depends on others (``over``) has one permutation for each of their indices: a tensor
of shape ``(*sizes of over, size)`` read at the *output* indices. With ``p`` over heads and ``q``
within each head, ``out[h, d] = in[p[h], q[h, d]]``.

Diagonal factors multiply after the permutation: ``out[i] = s[i] ** exponent * in[p[i]]``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from wspace.errors import SpaceMismatch, message
from wspace.space import Axis, Concat, Gauge, Group, Param, WeightSpace

State = Mapping[str, Tensor]
KINDS = ("permutation", "scale", "sign", "phase")


@dataclass(frozen=True)
class Transform:
    """An element of the symmetry group of `space`.

    Attributes:
        space: The weight space it acts on.
        permutations: Group name → indices, ``(*sizes of over, size)``, int64. A group that is
            absent stays in place.
        factors: Index into ``space.gauges`` → one number per unit, ``(*sizes of over, size)``,
            float64: positive (scale), ±1 (sign) or whole (phase). Absent means neutral.
    """

    space: WeightSpace
    permutations: Mapping[str, Tensor]
    factors: Mapping[int, Tensor]

    def __repr__(self) -> str:
        return (
            f"Transform({len(self.permutations)} groups permuted, {len(self.factors)} gauges, "
            f"of {len(self.space.groups)} groups)"
        )


def identity(space: WeightSpace) -> Transform:
    """The group element that moves nothing."""
    return Transform(space, {}, {})


def sample(
    space: WeightSpace,
    *,
    generator: torch.Generator | None = None,
    kinds: Sequence[str] = ("permutation",),
    groups: Sequence[str] | None = None,
) -> Transform:
    """A random group element.

    Args:
        space: The weight space.
        generator: Source of randomness (CPU); None for torch's global one.
        kinds: Which symmetries to use: ``"permutation"``, ``"scale"`` (factors log-uniform in
            [1/4, 4]), ``"sign"``, ``"phase"`` (whole multiples −2 … 2).
        groups: Names of the groups to move; all free ones when None.

    Returns:
        The transform.

    Raises:
        SpaceMismatch: If a kind or a group is not one of the space's.
    """
    unknown = [k for k in kinds if k not in KINDS]
    unknown += [g for g in groups or () if g not in space.groups]
    if unknown:
        raise SpaceMismatch(
            message(
                f"sample: unknown {', '.join(map(repr, unknown))}",
                expected=f"kinds among {KINDS} and groups among {tuple(space.groups)}",
            )
        )
    chosen = set(space.groups if groups is None else groups)
    permutations = {}
    if "permutation" in kinds:
        for g in space.groups.values():
            if g.name in chosen and not g.fixed:
                keys = torch.rand(shape_of(g, space), generator=generator, dtype=torch.float64)
                permutations[g.name] = keys.argsort(-1)
    factors = {}
    for i, gauge in enumerate(space.gauges):
        if gauge.kind in kinds and gauge.group in chosen:
            shape = shape_of(space.all_groups[gauge.group], space)
            factors[i] = _draw(gauge.kind, shape, generator)
    return Transform(space, permutations, factors)


def _draw(kind: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "scale":
        return 4 ** (2 * u - 1)
    if kind == "sign":
        return torch.where(u < 0.5, -1.0, 1.0).double()
    return torch.floor(5 * u) - 2


def shape_of(group: Group, space: WeightSpace) -> tuple[int, ...]:
    """Shape of the tensor that holds one number per unit of a group: ``(*over, size)``."""
    return (*(space.all_groups[o].size for o in group.over), group.size)


# --------------------------------------------------------------------------- action


def act(transform: Transform, state: State, space: WeightSpace) -> dict[str, Tensor]:
    """The state moved by a group element; the function it computes is unchanged.

    Args:
        transform: Group element of `space`.
        state: Tensors by name, ``(*batch, *shape)``; entries that `space` does not know are passed
            on unchanged. Not modified.
        space: Weight space of the state.

    Returns:
        New tensors for what moved; untouched tensors are the same objects. Tied names stay tied.

    Raises:
        SpaceMismatch: If the state or the transform does not fit the space.
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
    name: ``space.validate(state)`` once is for the caller.

    Args:
        transform: Group element of `space`.
        name: Of the tensor; a tied name will do.
        state: Tensors by name, ``(*batch, *shape)``.
        space: Weight space of the state.

    Returns:
        The tensor, ``(*batch, *shape)``; that of the state itself if nothing moves it.
    """
    p = space.by_name.get(name)
    if p is None:
        return state[name]
    if not p.at:
        return _move(transform, p, state[p.name])
    return _move(transform, p, state[_siblings(space)[p.name][transform.permutations]])


class _Family:
    """Slices of one family; looks up which slice moves to the place of another."""

    def __init__(self, names: list[str], group: str, index: int) -> None:
        self.names, self.group, self.index = names, group, index

    def __getitem__(self, permutations: Mapping[str, Tensor]) -> str:
        p = permutations.get(self.group)
        return self.names[self.index if p is None else int(p[self.index])]


@lru_cache(maxsize=64)
def _siblings(space: WeightSpace) -> dict[str, _Family]:
    members: dict[str, dict[int, str]] = {}
    for p in space.params:
        if p.at:
            members.setdefault(p.family, {})[p.at[1]] = p.name
    out = {}
    for p in space.params:
        if p.at:
            names = [members[p.family][i] for i in sorted(members[p.family])]
            out[p.name] = _Family(names, *p.at)
    return out


def _move(t: Transform, p: Param, x: Tensor) -> Tensor:
    if any(g.name in t.permutations for axis in p.axes for g in axis.groups()):
        x = _gather(t, p, x)
    for i, gauge in enumerate(t.space.gauges):
        if i in t.factors:
            x = _rescale(t, p, gauge, t.factors[i], x)
    return x


def _gather(t: Transform, p: Param, x: Tensor) -> Tensor:
    if _local(p):
        lead = x.dim() - len(p.axes)
        for d, axis in enumerate(p.axes):
            if any(g.name in t.permutations for g in axis.groups()):
                x = x.index_select(lead + d, _axis_source(t, axis, p.at).to(x.device))
        return x
    factors = [f for axis in p.axes for f in axis.factors]
    groups = [f for f in factors if isinstance(f, Group)]
    if len(groups) == len(factors) and len({g.name for g in groups if g.kinds}) == sum(
        bool(g.kinds) for g in groups
    ):
        return _gather_factors(t, p, x, groups)
    lead_shape = x.shape[: x.dim() - len(p.axes)]
    source = _axis_source(t, Axis(tuple(factors)), p.at).to(x.device)
    return x.reshape(*lead_shape, -1).index_select(-1, source).reshape(x.shape)


def _local(p: Param) -> bool:
    """True if no group of an axis depends on a group of another axis."""
    for axis in p.axes:
        here = {g.name for g in axis.groups()} | ({p.at[0]} if p.at else set())
        if any(o not in here for g in axis.groups() for o in g.over):
            return False
    return True


def _gather_factors(t: Transform, p: Param, x: Tensor, factors: list[Group]) -> Tensor:
    """Gather factor by factor, outermost first, so that inner ones are read at output indices."""
    lead = x.shape[: x.dim() - len(p.axes)]
    y = x.reshape(*lead, *(f.size for f in factors))
    names = [f.name for f in factors]
    for k in sorted(range(len(factors)), key=lambda k: _depth(factors[k], t.space)):
        q = t.permutations.get(factors[k].name)
        if q is None:
            continue
        if p.at and p.at[0] in factors[k].over:
            q = q.select(factors[k].over.index(p.at[0]), p.at[1])
        over = [o for o in factors[k].over if not p.at or o != p.at[0]]
        shape = [1] * len(factors)
        places = [*(names.index(o) for o in over), k]
        for place in places:
            shape[place] = factors[place].size
        order = sorted(range(len(places)), key=places.__getitem__)
        index = q.permute(order).reshape(shape).to(y.device)
        full = [*lead, *(f.size for f in factors)]
        y = torch.gather(y, len(lead) + k, index.expand(full))
    return y.reshape(x.shape)


def _depth(group: Group, space: WeightSpace) -> int:
    return 1 + max((_depth(space.all_groups[o], space) for o in group.over), default=0)


# ------------------------------------------------------------------ indices along an axis
# Contexts: an axis inside a product is laid out once for every index of the other factors.
# `env` maps group names to their output index in each context, a tensor of shape (contexts,).

Env = Mapping[str, Tensor]


def _axis_source(t: Transform, axis: Axis, at: tuple[str, int] | None) -> Tensor:
    """Positions along `axis` that its entries are read from: int64, ``(axis.size,)``."""
    if len(axis.factors) == 1 and isinstance(g := axis.factors[0], Group) and not g.over:
        return t.permutations[g.name]
    env = {at[0]: torch.tensor([at[1]])} if at else {}
    return _positions(t, axis, env, 1).flatten()


def _positions(t: Transform, axis: Axis, env: Env, contexts: int) -> Tensor:
    """Source positions within `axis` for every context: ``(contexts, axis.size)``."""
    source = torch.zeros(1, dtype=torch.int64)
    for f, outer, place in _grid(axis, env, contexts):
        if isinstance(f, Concat):
            inner, start = [], 0
            for part in f.parts:
                inner.append(start + _positions(t, part, *outer))
                start += part.size
            step = place(torch.cat(inner, 1))
        else:
            moved = t.permutations.get(f.name)
            here = torch.arange(f.size)[None]
            step = place(here if moved is None else _read(moved, f, *outer))
        source = source * f.size + step
    return source.expand(contexts, *(f.size for f in axis.factors)).reshape(contexts, -1)


def _grid(
    axis: Axis, env: Env, contexts: int
) -> Iterator[tuple[Group | Concat, tuple[Env, int], Callable[[Tensor], Tensor]]]:
    """Each factor of an axis with the contexts around it, and how to place ``(contexts, size)``.

    The grid has shape ``(contexts, *sizes of the factors)``; placing returns a tensor that
    broadcasts to it.

    Yields:
        The factor, its environment and number of contexts, and the placing function.
    """
    sizes = [f.size for f in axis.factors]
    for j, f in enumerate(axis.factors):
        around = [contexts, *sizes[:j], *sizes[j + 1 :]]
        rows = prod(around)
        inner = {k: _spread(v, 0, around) for k, v in env.items()}
        for i, other in enumerate(axis.factors):
            if i != j and isinstance(other, Group):
                inner[other.name] = _spread(torch.arange(other.size), i + (i < j), around)

        def place(x: Tensor, around: list[int] = around, j: int = j) -> Tensor:
            if x.shape[0] == 1:
                return x.reshape([-1 if i == j + 1 else 1 for i in range(len(around) + 1)])
            return x.reshape(*around, -1).movedim(-1, j + 1)

        yield f, (inner, rows), place


def _spread(x: Tensor, dim: int, shape: list[int]) -> Tensor:
    """A vector laid along one dimension of a grid, flattened."""
    return x.reshape([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape).reshape(-1)


def _read(values: Tensor, group: Group, env: Env, contexts: int) -> Tensor:
    """Per-unit numbers of a group in every context: ``(contexts, size)``, or ``(1, size)``."""
    if not group.over:
        return values[None]
    return values[tuple(env[o].expand(contexts) for o in group.over)]


def _rescale(t: Transform, p: Param, gauge: Gauge, factor: Tensor, x: Tensor) -> Tensor:
    lead = x.dim() - len(p.axes)
    for name, d, occurrence, exponent in gauge.slots:
        if name == p.name:
            if gauge.kind == "phase":
                values = 1 - 2 * torch.remainder(factor * exponent, 2)
            else:
                values = factor ** float(exponent)
            along = along_axis(p, d, gauge.group, occurrence, values, 1.0)
            x = x * along.reshape([-1 if i == lead + d else 1 for i in range(x.dim())]).to(x)
    for name, d, occurrence, amount in gauge.shifts:
        if name == p.name:
            along = along_axis(p, d, gauge.group, occurrence, factor * amount, 0.0)
            x = x + along.reshape([-1 if i == lead + d else 1 for i in range(x.dim())]).to(x)
    return x


def along_axis(
    p: Param, d: int, group: str, occurrence: int, values: Tensor, neutral: float
) -> Tensor:
    """Per-unit values of one occurrence of a group laid along an axis.

    Args:
        p: The parameter.
        d: Dimension of the parameter.
        group: Name of the group.
        occurrence: Which appearance of the group in that axis.
        values: One number per unit, ``(*sizes of over, size)``.
        neutral: What stands elsewhere.

    Returns:
        ``(axis size,)``, float64.
    """
    env = {p.at[0]: torch.tensor([p.at[1]])} if p.at else {}
    turns = iter(range(10**9))

    def lay(axis: Axis, env: Env, contexts: int) -> Tensor:
        out = torch.full((1,), neutral, dtype=torch.float64)
        for f, outer, place in _grid(axis, env, contexts):
            if isinstance(f, Concat):
                step = place(torch.cat([lay(part, *outer) for part in f.parts], 1))
            elif f.name == group and next(turns) == occurrence:
                step = place(_read(values, f, *outer))
            else:
                continue
            out = torch.where(step == neutral, out, step)
        return out.expand(contexts, *(f.size for f in axis.factors)).reshape(contexts, -1)

    return lay(p.axes[d], env, 1).flatten()


# ---------------------------------------------------------------------------- group


def compose(first: Transform, second: Transform) -> Transform:
    """The element that acts as `second` and then `first`: ``act(first, act(second, state))``.

    Args:
        first: Applied last, as in the composition of functions.
        second: Applied first; of the same space.

    Returns:
        One transform with the effect of both.

    Raises:
        SpaceMismatch: If the two belong to different spaces.
    """
    t, u = first, second
    if t.space != u.space:
        raise SpaceMismatch("compose: the transforms belong to different weight spaces")
    space = t.space
    permutations = {}
    for name in {**t.permutations, **u.permutations}:
        g = space.all_groups[name]
        permutations[name] = _full(u, g)[_pull(t, g)]
    factors: dict[int, Tensor] = {}
    for i in sorted({*t.factors, *u.factors}):
        gauge = space.gauges[i]
        g = space.all_groups[gauge.group]
        shape = shape_of(g, space)
        neutral = 0.0 if gauge.kind == "phase" else 1.0
        a = t.factors.get(i, torch.full(shape, neutral, dtype=torch.float64))
        b = u.factors.get(i, torch.full(shape, neutral, dtype=torch.float64))[_pull(t, g)]
        if gauge.kind == "phase":
            b = b * _total_sign(t, gauge)
        factors[i] = a + b if gauge.kind == "phase" else a * b
    return Transform(space, permutations, factors)


def inverse(transform: Transform) -> Transform:
    """The element that undoes another: ``act(inverse(t), act(t, state)) = state``.

    Args:
        transform: Any group element.

    Returns:
        Its inverse.
    """
    t = transform
    space = t.space
    permutations = {}
    for name in t.permutations:
        g = space.all_groups[name]
        pull = _pull(t, g)
        back = torch.empty(shape_of(g, space), dtype=torch.int64)
        back[pull] = torch.arange(g.size).expand(back.shape)
        permutations[name] = back
    bare = Transform(space, permutations, {})
    factors: dict[int, Tensor] = {}
    for i, factor in t.factors.items():
        gauge = space.gauges[i]
        pull = _pull(bare, space.all_groups[gauge.group])
        if gauge.kind == "phase":
            factors[i] = -(factor * _total_sign(t, gauge))[pull]
        else:
            factors[i] = (1 / factor)[pull]
    return Transform(space, permutations, factors)


def _full(t: Transform, g: Group) -> Tensor:
    p = t.permutations.get(g.name)
    shape = shape_of(g, t.space)
    return torch.arange(g.size).expand(shape) if p is None else p


def _pull(t: Transform, g: Group) -> tuple[Tensor, ...]:
    """Source index of every unit of a group, as an index tuple of shape ``(*over, size)``."""
    shape = shape_of(g, t.space)
    grids = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    out_index = dict(zip((*g.over, g.name), grids, strict=True))
    source = []
    for name in (*g.over, g.name):
        h = t.space.all_groups[name]
        p = _full(t, h)
        source.append(p[tuple(out_index[o] for o in (*h.over, name))])
    return tuple(source)


def _total_sign(t: Transform, gauge: Gauge) -> Tensor:
    """Sign that a transform gives to the tensors a phase is added to, per unit."""
    shape = shape_of(t.space.all_groups[gauge.group], t.space)
    sign = torch.ones(shape, dtype=torch.float64)
    where = {slot[:3] for slot in gauge.shifts}
    for i, factor in t.factors.items():
        other = t.space.gauges[i]
        for *slot, exponent in other.slots:
            if tuple(slot) in where and other.group == gauge.group:
                if other.kind == "phase":
                    sign = sign * (-1.0) ** (factor * exponent)
                else:
                    sign = sign * factor**exponent
                break
    return sign
