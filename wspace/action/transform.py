"""Elements of the symmetry group of a weight space, and the group they form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from wspace.errors import SpaceMismatch, message
from wspace.space import Gauge, Group, WeightSpace

State = Mapping[str, Tensor]
KINDS = ("permutation", "scale", "sign", "phase")


@dataclass(frozen=True)
class Transform:
    """An element of the symmetry group of `space`, or one for each row of a batch.

    Attributes:
        space: The weight space it acts on.
        permutations: Group name → indices, ``(*batch, *sizes of over, size)``, int64. A group that
            is absent stays in place.
        factors: Index into ``space.gauges`` → one number per unit,
            ``(*batch, *sizes of over, size)``, float64: positive (scale), ±1 (sign) or whole
            (phase). Absent means neutral.
    """

    space: WeightSpace
    permutations: Mapping[str, Tensor]
    factors: Mapping[int, Tensor]

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """Batch axes in front of every tensor; empty for one element, or where nothing moves.

        Raises:
            SpaceMismatch: If the tensors have different batch axes, or fewer than no batch needs.
        """
        groups, gauges = self.space.all_groups, self.space.gauges
        held = [(name, name, p) for name, p in self.permutations.items()]
        held += [(f"gauge {i}", gauges[i].group, s) for i, s in self.factors.items()]
        found: dict[tuple[int, ...], str] = {}
        for label, name, values in held:
            group, shape = groups[name], tuple(values.shape)
            lead = len(shape) - len(group.over) - 1
            if lead < 0:
                raise SpaceMismatch(
                    message(
                        f"transform: the indices of {label!r} do not fit",
                        expected=f"trailing shape {shape_of(group, self.space)}",
                        got=f"shape {shape}",
                    )
                )
            found.setdefault(shape[:lead], label)
        if len(found) > 1:
            raise SpaceMismatch(
                message(
                    "transform: different batch axes",
                    expected="the same in front of every tensor",
                    got=[f"{batch} of {label!r}" for batch, label in found.items()],
                )
            )
        return next(iter(found), ())

    def __repr__(self) -> str:
        batch = f", batch {self.batch}" if self.batch else ""
        return (
            f"Transform({len(self.permutations)} groups permuted, {len(self.factors)} gauges, "
            f"of {len(self.space.groups)} groups{batch})"
        )


def identity(space: WeightSpace) -> Transform:
    """The group element that moves nothing."""
    return Transform(space, {}, {})


def sample(
    space: WeightSpace,
    *,
    batch: Sequence[int] = (),
    generator: torch.Generator | None = None,
    kinds: Sequence[str] = ("permutation",),
    groups: Sequence[str] | None = None,
) -> Transform:
    """A random group element, or one for each row of a batch.

    Args:
        space: The weight space.
        batch: Batch axes: one element, drawn by itself, for each of their indices.
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
                shape = (*batch, *shape_of(g, space))
                keys = torch.rand(shape, generator=generator, dtype=torch.float64)
                permutations[g.name] = keys.argsort(-1)
    factors = {}
    for i, gauge in enumerate(space.gauges):
        if gauge.kind in kinds and gauge.group in chosen:
            shape = (*batch, *shape_of(space.all_groups[gauge.group], space))
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


def compose(first: Transform, second: Transform) -> Transform:
    """The element that acts as `second` and then `first`: ``act(first, act(second, state))``.

    Args:
        first: Applied last, as in the composition of functions.
        second: Applied first; of the same space. If one of the two is batched and the other is
            not, the other stands for every row.

    Returns:
        One transform with the effect of both.

    Raises:
        SpaceMismatch: If the two belong to different spaces or have different batch axes.
    """
    t, u = first, second
    if t.space != u.space:
        raise SpaceMismatch("compose: the transforms belong to different weight spaces")
    batch = t.batch or u.batch
    if u.batch not in ((), batch):
        raise SpaceMismatch(
            message(
                "compose: the transforms have different batch axes",
                expected="equal ones, or none on one side",
                got=f"{t.batch} and {u.batch}",
            )
        )
    space = t.space
    permutations = {}
    for name in {**t.permutations, **u.permutations}:
        g = space.all_groups[name]
        permutations[name] = _full(u, g, batch)[_pull(t, g, batch)]
    factors: dict[int, Tensor] = {}
    for i in sorted({*t.factors, *u.factors}):
        gauge = space.gauges[i]
        g = space.all_groups[gauge.group]
        shape = (*batch, *shape_of(g, space))
        neutral = torch.full((), 0.0 if gauge.kind == "phase" else 1.0, dtype=torch.float64)
        a = t.factors.get(i, neutral).expand(shape)
        b = u.factors.get(i, neutral).expand(shape)[_pull(t, g, batch)]
        if gauge.kind == "phase":
            b = b * _total_sign(t, gauge)
        factors[i] = a + b if gauge.kind == "phase" else a * b
    return Transform(space, permutations, factors)


def inverse(transform: Transform) -> Transform:
    """The element that undoes another: ``act(inverse(t), act(t, state)) = state``.

    Args:
        transform: Any group element, batched or not.

    Returns:
        Its inverse, row by row.
    """
    t = transform
    space, batch = t.space, t.batch
    permutations = {}
    for name in t.permutations:
        g = space.all_groups[name]
        pull = _pull(t, g, batch)
        back = torch.empty((*batch, *shape_of(g, space)), dtype=torch.int64)
        back[pull] = torch.arange(g.size).expand(back.shape)
        permutations[name] = back
    bare = Transform(space, permutations, {})
    factors: dict[int, Tensor] = {}
    for i, factor in t.factors.items():
        gauge = space.gauges[i]
        pull = _pull(bare, space.all_groups[gauge.group], batch)
        if gauge.kind == "phase":
            factors[i] = -(factor * _total_sign(t, gauge))[pull]
        else:
            factors[i] = (1 / factor)[pull]
    return Transform(space, permutations, factors)


def _full(t: Transform, g: Group, batch: tuple[int, ...]) -> Tensor:
    p = t.permutations.get(g.name)
    return (torch.arange(g.size) if p is None else p).expand(*batch, *shape_of(g, t.space))


def _pull(t: Transform, g: Group, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Source of every unit of a group, as an index tuple of shape ``(*batch, *over, size)``."""
    shape = (*batch, *shape_of(g, t.space))
    grids = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    rows, names = grids[: len(batch)], (*g.over, g.name)
    out_index = dict(zip(names, grids[len(batch) :], strict=True))
    source = list(rows)
    for name in names:
        h = t.space.all_groups[name]
        p = _full(t, h, batch)
        source.append(p[(*rows, *(out_index[o] for o in (*h.over, name)))])
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


def rows_of(values: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Numbers per unit with all batch axes flattened into one: ``(rows, *over, size)``."""
    return values if len(batch) < 2 else values.reshape(prod(batch), *values.shape[len(batch) :])
