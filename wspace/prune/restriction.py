"""What is left of a weight space when only some units of its groups are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from wspace.action import State, shape_of
from wspace.action.places import axis_kept, axis_taken
from wspace.errors import PruneError, message
from wspace.space import Axis, Concat, Gauge, Group, Param, WeightSpace

Keep = Mapping[str, Tensor]
"""Group name → bool ``(*sizes of over, size)``, true for units that stay; absent ones keep all."""


def prunable(space: WeightSpace) -> dict[str, Group]:
    """The groups that units can be taken from: free ones of more than one unit, by name."""
    return {n: g for n, g in space.groups.items() if not g.fixed and g.size > 1}


@dataclass(frozen=True, eq=False)
class Restriction:
    """A weight space with some units kept of each group, and the way to it and back.

    Attributes:
        large: The space that units are taken from.
        keep: Group name → bool ``(*sizes of over, size)``. A mask ``(size,)`` holds in every
            context; absent groups keep all.

    Raises:
        PruneError: If a group is unknown or cannot lose units, a mask has the wrong size or type,
            nothing would be left of a group, or counts differ between the contexts of a group.

    Example:
        >>> import torch, wspace
        >>> mlp = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> few = Restriction(space, {"h1": torch.tensor([True, False, True, True, False])})
        >>> few.counts(), {k: tuple(x.shape) for k, x in few.state(mlp.state_dict()).items()}
        ({'h1': 3}, {'0.weight': (3, 3), '0.bias': (3,), '2.weight': (2, 3), '2.bias': (2,)})
    """

    large: WeightSpace
    keep: Keep
    asked: Keep = field(init=False, repr=False)
    """The masks as they were given, in full shape: also for contexts that go themselves."""

    def __post_init__(self) -> None:
        asked, keep = _checked(self.large, self.keep)
        object.__setattr__(self, "asked", asked)
        object.__setattr__(self, "keep", keep)

    def counts(self) -> dict[str, int]:
        """Units that every prunable group has left (in each of its contexts)."""
        return {name: self._count(g) for name, g in prunable(self.large).items()}

    @cached_property
    def names(self) -> dict[str, str]:
        """Name in the small space of every name of the large one; members that go are absent."""
        return _renamed(self.large, self.keep)

    @cached_property
    def small(self) -> WeightSpace:
        """The space of what is left. It has no wiring: for graphs, trace the pruned module."""
        made: dict[str, Group] = {}
        for name, g in self.large.all_groups.items():
            made[name] = replace(g, size=self._count(g))
        names = self.names
        params: list[Param] = []
        first: dict[str, str] = {}
        for p in self.large.params:
            if p.name not in names:
                continue
            name = names[p.name]
            family = first.setdefault(p.family, name) if p.at else ""
            at = (p.at[0], self._rank(*p.at)) if p.at else None
            axes = tuple(_axis(a, made) for a in p.axes)
            ties = tuple(names[t] for t in p.ties)
            params.append(replace(p, name=name, axes=axes, ties=ties, at=at, family=family))
        gauges = tuple(_gauge(gauge, names) for gauge in self.large.gauges)
        extra = tuple(made[g.name] for g in self.large.extra)
        return replace(self.large, params=tuple(params), gauges=gauges, extra=extra, wiring=None)

    def state(self, state: State) -> dict[str, Tensor]:
        """What is left of a state of the large space.

        Args:
            state: Tensors by name, ``(*batch, *shape)``; entries that the space does not know are
                passed on. Not modified.

        Returns:
            Tensors of the small space, under its names and in the order of `state`: copies where
            something was cut, the same objects elsewhere. Tied names share one tensor.

        Raises:
            SpaceMismatch: If the state does not fit the large space.
        """  # noqa: DOC502 (validate raises)
        self.large.validate(state)
        out: dict[str, Tensor] = {}
        done: dict[str, Tensor] = {}
        for name, x in state.items():
            p = self.large.by_name.get(name)
            if p is None:
                out[name] = x
            elif name in self.names:
                if p.name not in done:
                    done[p.name] = self.cut(p, state[p.name])
                out[self.names[name]] = done[p.name]
        return out

    def expand(self, state: State) -> dict[str, Tensor]:
        """A state of the small space in the shapes of the large one, with zeros at what is gone.

        Args:
            state: Tensors of the small space by name, ``(*batch, *shape)``.

        Returns:
            New tensors by name of the large space; entries that the space does not know are passed
            on.

        Raises:
            SpaceMismatch: If the state does not fit the small space.
        """  # noqa: DOC502 (validate raises)
        self.small.validate(state)
        out = {name: x for name, x in state.items() if name not in self.small.by_name}
        like, lead = torch.zeros(()), ()
        for p in self.small.params[:1]:
            like = state[p.name]
            lead = like.shape[: like.dim() - len(p.axes)]
        for p in self.large.params:
            x = torch.zeros((*lead, *p.shape), dtype=like.dtype, device=like.device)
            if p.name in self.names:
                small = state[self.names[p.name]]
                x = torch.zeros((*lead, p.numel), dtype=small.dtype, device=small.device)
                x[..., self.entries(p).to(x.device)] = small.reshape(*lead, -1)
                x = x.reshape(*lead, *p.shape)
            for name in (p.name, *p.ties):
                out[name] = x
        return out

    def masked(self, state: State) -> dict[str, Tensor]:
        """A state of the large space in which every parameter of what goes is zero.

        Args:
            state: Tensors by name, ``(*batch, *shape)``. Not modified.

        Returns:
            Tensors of the same shapes: new ones where something is zero, the same objects
            elsewhere. Buffers are as they were.

        Raises:
            SpaceMismatch: If the state does not fit the large space.
        """  # noqa: DOC502 (validate raises)
        self.large.validate(state)
        out = dict(state)
        for p in self.touched:
            x = self.off(p, state[p.name])
            for name in (p.name, *p.ties):
                if name in state:
                    out[name] = x
        return out

    @cached_property
    def touched(self) -> tuple[Param, ...]:
        """Parameters (no buffers) of which some entry goes."""
        return tuple(
            p
            for p in self.large.params
            if not p.buffer
            and (p.name not in self.names or self.small[self.names[p.name]].shape != p.shape)
        )

    def kept(self, p: Param) -> Tensor:
        """Which entries of a parameter of the large space stay: bool, of its shape."""
        return self._lines(p, self.keep)

    def zeroed(self, p: Param) -> Tensor:
        """Which entries of a parameter are zero when the units that go are switched off: bool.

        All of a unit's entries, but for directions of a weight that is normalised (`weight_norm`):
        their length means nothing, and none would be no direction.

        Args:
            p: Parameter of the large space.

        Returns:
            True for entries to set to zero, of the parameter's shape.
        """
        return ~self._lines(p, self._active(p)) if p.name in self.names else ~self.kept(p)

    def off(self, p: Param, x: Tensor) -> Tensor:
        """A copy of a parameter with zeros at its `zeroed` entries, line by line where it can be.

        Args:
            p: Parameter of the large space.
            x: Its value, ``(*batch, *shape)``.

        Returns:
            A new tensor of the shape of `x`.
        """
        if not p.local or p.name not in self.names:
            return x.masked_fill(self.zeroed(p).to(x.device), 0)
        gone, out = self._active(p), x.clone()
        for d, axis in enumerate(p.axes, x.dim() - len(p.axes)):
            lines = (~axis_kept(gone, axis, p.at)).nonzero()[:, 0]
            if len(lines):
                out.index_fill_(d, lines.to(x.device), 0)
        return out

    def _active(self, p: Param) -> dict[str, Tensor]:
        """The masks of groups whose units are off when their entries of a parameter are zero."""
        return {g: m for g, m in self.keep.items() if (p.name, g) not in self._idle}

    @cached_property
    def _idle(self) -> set[tuple[str, str]]:
        return _idle(self.large)

    def _lines(self, p: Param, keep: Keep) -> Tensor:
        if p.name not in self.names:
            return torch.zeros(p.shape, dtype=torch.bool)
        if not p.local:
            whole = Axis(tuple(f for axis in p.axes for f in axis.factors))
            return axis_kept(keep, whole, p.at).reshape(p.shape)
        out = torch.ones((), dtype=torch.bool)
        for d, axis in enumerate(p.axes):
            lines = axis_kept(keep, axis, p.at)
            out = out & lines.reshape([-1 if i == d else 1 for i in range(len(p.axes))])
        return out.expand(p.shape)

    @cached_property
    def units(self) -> dict[str, Tensor]:
        """The unit that each one left is: group → ``(*sizes of over left, units left)``, int64."""
        found: dict[str, Tensor] = {}
        groups = self.large.all_groups
        for name in sorted(self.keep, key=lambda n: len(groups[n].over)):
            g, small = groups[name], self.small.all_groups[name]
            order = (~self.keep[name]).long().argsort(dim=-1, stable=True)
            sizes = [self.small.all_groups[o].size for o in g.over]
            index = torch.meshgrid(*map(torch.arange, (*sizes, small.size)), indexing="ij")
            at = dict(zip((*g.over, name), index, strict=True))
            outer = [
                found[o][tuple(at[q] for q in (*groups[o].over, o))] if o in found else at[o]
                for o in g.over
            ]
            found[name] = order[(*outer, at[name])]
        return found

    def entries(self, p: Param) -> Tensor:
        """Places of what is left of a parameter, in the order of the small one: int64, flat."""
        q = self.small[self.names[p.name]]
        if not p.local:
            small, large = (Axis(tuple(f for a in r.axes for f in a.factors)) for r in (q, p))
            return axis_taken(self.units, small, large, q.at)
        out = torch.zeros((), dtype=torch.int64)
        for small, large in zip(q.axes, p.axes, strict=True):
            out = out[..., None] * large.size + axis_taken(self.units, small, large, q.at)
        return out.flatten()

    def cut(self, p: Param, x: Tensor) -> Tensor:
        """What is left of one tensor; the tensor itself if nothing goes.

        Args:
            p: Parameter of the large space that stays, at least in part.
            x: Its value, ``(*batch, *shape)``.

        Returns:
            ``(*batch, *shape in the small space)``.
        """
        q = self.small[self.names[p.name]]
        if q.shape == p.shape:
            return x
        lead = x.dim() - len(p.axes)
        if not p.local:
            flat = x.reshape(*x.shape[:lead], p.numel)
            entries = self.entries(p).to(x.device)
            return flat.index_select(lead, entries).reshape(*x.shape[:lead], *q.shape)
        for d in sorted(range(len(p.axes)), key=lambda d: q.shape[d] - p.shape[d]):
            if q.shape[d] != p.shape[d]:
                lines = axis_taken(self.units, q.axes[d], p.axes[d], q.at)
                x = x.index_select(lead + d, lines.to(x.device))
        return x

    def _count(self, g: Group) -> int:
        mask = self.keep.get(g.name)
        return g.size if mask is None else int(mask.sum(-1).max())

    def _rank(self, group: str, index: int) -> int:
        mask = self.keep.get(group)
        return index if mask is None else int(mask[:index].sum())


# -------------------------------------------------------------------------- the mask


def _checked(space: WeightSpace, keep: Keep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that take something away, in full shape; then false in contexts that go, too."""
    free = prunable(space)
    wrong = [_unknown(space, name) for name in keep if name not in free]
    full: dict[str, Tensor] = {}
    for name, mask in keep.items():
        if name not in free:
            continue
        shape = shape_of(free[name], space)
        if not isinstance(mask, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            wrong.append(f"{name!r} of {type(mask).__name__}, expected a bool tensor {shape}")
        elif mask.dtype != torch.bool or tuple(mask.shape) not in (shape, shape[-1:]):
            wrong.append(
                f"{name!r} of {str(mask.dtype)[6:]} {tuple(mask.shape)}, expected bool {shape}"
            )
        else:
            full[name] = mask.detach().cpu().expand(shape).clone()
    asked = dict(full)
    if not wrong:
        inner = sorted(full, key=lambda name: len(free[name].over))
        wrong = [w for name in inner if (w := _uneven(space, free[name], full))]
    if wrong:
        raise PruneError(
            message(
                "prune: the units to keep do not fit the weight space",
                expected="a bool mask per free group that keeps at least one unit, and as many in "
                "every context",
                got=wrong,
                help="`print(space)` shows the groups and what they depend on",
            )
        )
    less = [name for name, mask in full.items() if not bool(mask.all())]
    return {name: asked[name] for name in less}, {name: full[name] for name in less}


def _unknown(space: WeightSpace, name: str) -> str:
    g = space.all_groups.get(name)
    if g is None:
        return f"{name!r}, which is no group of the space"
    return f"{name!r}, which cannot lose units: {'one unit' if g.size < 2 else 'it is fixed'}"


def _uneven(space: WeightSpace, g: Group, keep: dict[str, Tensor]) -> str:
    """What is wrong with the counts of a group, or nothing; clears contexts that go themselves."""
    mask = keep[g.name]
    alive = torch.ones(mask.shape[:-1], dtype=torch.bool)
    for k, outer in enumerate(g.over):
        if outer in keep:
            where = [*(g.over.index(o) for o in space.all_groups[outer].over), k]
            order = sorted(range(len(where)), key=where.__getitem__)
            sizes = [n if i in where else 1 for i, n in enumerate(alive.shape)]
            alive = alive & keep[outer].permute(order).reshape(sizes)
    keep[g.name] = mask & alive[..., None]
    counts = mask.sum(-1)[alive]
    least, most = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
    if least != most:
        return f"{g.name!r} with {least} units in one context and {most} in another"
    return "" if least else f"{g.name!r} with none of its {g.size} units"


def _idle(space: WeightSpace) -> set[tuple[str, str]]:
    """Parameters and groups along which their scale alone means nothing."""
    return {
        (gauge.slots[0][0], gauge.group)
        for gauge in space.gauges
        if gauge.kind == "scale" and len({slot[0] for slot in gauge.slots}) == 1
    }


# ------------------------------------------------------------------- the small space


def _axis(axis: Axis, groups: Mapping[str, Group]) -> Axis:
    """An axis with other groups of the same names in it."""
    return Axis(
        tuple(
            groups[f.name]
            if isinstance(f, Group)
            else Concat(tuple(_axis(part, groups) for part in f.parts))
            for f in axis.factors
        )
    )


def _gauge(gauge: Gauge, names: Mapping[str, str]) -> Gauge:
    return replace(
        gauge,
        slots=tuple((names[n], *rest) for n, *rest in gauge.slots if n in names),
        shifts=tuple((names[n], *rest) for n, *rest in gauge.shifts if n in names),
    )


def _renamed(space: WeightSpace, keep: Keep) -> dict[str, str]:
    """Small name of every large name: members of a family that go are absent, others move up."""
    families: dict[str, list[Param]] = {}
    for p in space.params:
        if p.at and p.at[0] in keep:
            families.setdefault(p.family, []).append(p)
    moved: dict[str, str] = {}
    gone: set[str] = set()
    for members in families.values():  # in the order of the module, which lists keep
        stay = [p for p in members if p.at and bool(keep[p.at[0]][p.at[1]])]
        for member, place in zip(stay, members, strict=False):
            moved |= dict(zip((member.name, *member.ties), (place.name, *place.ties), strict=True))
        gone |= {n for p in members if p not in stay for n in (p.name, *p.ties)}
    return {n: moved.get(n, n) for n in space.by_name if n not in gone}
