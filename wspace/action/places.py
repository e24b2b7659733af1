"""Positions along an axis: where its entries are read from, and what multiplies them.

An axis inside a product is laid out once for every index of the other factors: these are its
*contexts*. The environment maps group names to their output index in each context, a tensor of
shape ``(contexts,)``. The rows of a batch are contexts too, under the name `ROWS`.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from wspace.action.transform import Transform, rows_of
from wspace.space import Axis, Concat, Group, Param

Env = Mapping[str, Tensor]
ROWS = ""


def axis_source(t: Transform, axis: Axis, at: tuple[str, int] | None) -> Tensor:
    """Positions along an axis that its entries are read from.

    Args:
        t: The transform.
        axis: The axis.
        at: Of the parameter: the group of its family, and the place in it.

    Returns:
        int64, ``(axis.size,)``; ``(rows, axis.size)`` for a batched transform.
    """
    if len(axis.factors) == 1 and isinstance(g := axis.factors[0], Group) and not g.over:
        return rows_of(t.permutations[g.name], t.batch)
    env, contexts = _around(at, prod(t.batch) if t.batch else None)
    source = _positions(t, axis, env, contexts)
    return source if t.batch else source.flatten()


def axis_kept(keep: Mapping[str, Tensor], axis: Axis, at: tuple[str, int] | None) -> Tensor:
    """Which entries of an axis are left when only some units of its groups are kept.

    Args:
        keep: Group name → bool, ``(*sizes of over, size)``; groups that are absent keep all.
        axis: The axis.
        at: Of the parameter: the group of its family, and the place in it.

    Returns:
        bool, ``(axis.size,)``.
    """
    env, contexts = _around(at, None)
    return _kept(keep, axis, env, contexts).flatten()


def _kept(keep: Mapping[str, Tensor], axis: Axis, env: Env, contexts: int) -> Tensor:
    """Entries of `axis` that are left in every context: ``(contexts, axis.size)``."""
    out = torch.ones(1, dtype=torch.bool)
    for f, outer, place in _grid(axis, env, contexts):
        if isinstance(f, Concat):
            out = out & place(torch.cat([_kept(keep, part, *outer) for part in f.parts], 1))
        elif f.name in keep:
            out = out & place(_read(keep[f.name], f, *outer))
    return out.expand(contexts, *(f.size for f in axis.factors)).reshape(contexts, axis.size)


def axis_taken(
    units: Mapping[str, Tensor], small: Axis, large: Axis, at: tuple[str, int] | None
) -> Tensor:
    """Positions along an axis of the entries that are left, in the order of the smaller axis.

    Args:
        units: Group → the unit that each one left is, ``(*sizes of over left, units left)``, int64;
            groups that are absent keep all.
        small: The axis with the sizes that are left.
        large: The axis as it was.
        at: Of the parameter: the group of its family, and the place in it that is left.

    Returns:
        int64, ``(small.size,)``.
    """
    env, contexts = _around(at, None)
    return _taken(units, small, large, env, contexts).flatten()


def _taken(
    units: Mapping[str, Tensor], small: Axis, large: Axis, env: Env, contexts: int
) -> Tensor:
    """Positions in `large` for every context: ``(contexts, small.size)``."""
    source = torch.zeros(1, dtype=torch.int64)
    for (f, outer, place), whole in zip(_grid(small, env, contexts), large.factors, strict=True):
        if isinstance(f, Concat) and isinstance(whole, Concat):
            inner, start = [], 0
            for part, long in zip(f.parts, whole.parts, strict=True):
                inner.append(start + _taken(units, part, long, *outer))
                start += long.size
            step = place(torch.cat(inner, 1))
        elif isinstance(f, Group) and f.name in units:
            step = place(_read(units[f.name], f, *outer))
        else:
            step = place(torch.arange(f.size)[None])
        source = source * whole.size + step
    return source.expand(contexts, *(f.size for f in small.factors)).reshape(contexts, small.size)


def _around(at: tuple[str, int] | None, rows: int | None) -> tuple[Env, int]:
    """The environment of a whole axis, and the number of contexts: one, or one for each row."""
    env = {at[0]: torch.tensor([at[1]])} if at else {}
    return (env, 1) if rows is None else ({**env, ROWS: torch.arange(rows)}, rows)


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
            step = place(here if moved is None else _read(rows_of(moved, t.batch), f, *outer))
        source = source * f.size + step
    return source.expand(contexts, *(f.size for f in axis.factors)).reshape(contexts, axis.size)


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
            return x.reshape(*around, x.shape[-1]).movedim(-1, j + 1)

        yield f, (inner, rows), place


def _spread(x: Tensor, dim: int, shape: list[int]) -> Tensor:
    """A vector laid along one dimension of a grid, flattened."""
    along = [x.shape[0] if i == dim else 1 for i in range(len(shape))]
    return x.reshape(along).expand(shape).reshape(-1)


def _read(values: Tensor, group: Group, env: Env, contexts: int) -> Tensor:
    """Per-unit numbers of a group in every context: ``(contexts, size)``, or ``(1, size)``."""
    names = (ROWS, *group.over) if ROWS in env else group.over
    if not names:
        return values[None]
    return values[tuple(env[o].expand(contexts) for o in names)]


def along_axis(
    p: Param,
    d: int,
    group: str,
    occurrence: int,
    values: Tensor,
    neutral: float,
    *,
    batched: bool = False,
) -> Tensor:
    """Per-unit values of one occurrence of a group laid along an axis.

    Args:
        p: The parameter.
        d: Dimension of the parameter.
        group: Name of the group.
        occurrence: Which appearance of the group in that axis.
        values: One number per unit, ``(*sizes of over, size)``, or ``(rows, *over, size)``.
        neutral: What stands elsewhere.
        batched: Whether the first axis of `values` counts rows.

    Returns:
        ``(axis size,)``, or ``(rows, axis size)``; float64.
    """
    env, contexts = _around(p.at, values.shape[0] if batched else None)
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
        return out.expand(contexts, *(f.size for f in axis.factors)).reshape(contexts, axis.size)

    laid = lay(p.axes[d], env, contexts)
    return laid if batched else laid.flatten()
