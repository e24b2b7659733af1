"""Where the groups of a space stand in the activations of a program: which tensor, which dimension.

A *site* is a group seen in one result of one operator (or, for a group private to the branches of a
family, in the same result of every branch). It says how to lay the tensor out as ``(samples, *sizes
of over, size)``: every dimension that no group of the space moves, be it batch, token, pixel or
class, is a sample. Nothing here is run; see `observe`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from wspace.space import Axis, Concat, Group, Param, WeightSpace
from wspace.trace.derive import Naming
from wspace.trace.program import ACTIVE, INPUT, PARAM, Call, Program, Value
from wspace.trace.solve import Solver

CONTRACTION, NONLINEARITY, COMPUTED, REARRANGED = (
    "contraction", "nonlinearity", "computed", "rearranged",
)  # fmt: skip
KINDS = (CONTRACTION, NONLINEARITY, COMPUTED, REARRANGED)
_CONTRACTIONS = frozenset(
    """
    mm addmm bmm baddbmm mv addmv dot linear convolution _convolution _trilinear _grouped_mm
    _cdist_forward embedding _embedding_bag _embedding_bag_forward_only
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention
    """.split()
)
_SOFTMAX = frozenset("_softmax _safe_softmax _log_softmax softmax log_softmax glu".split())
_LINEAR = frozenset("add sub rsub neg mul div where masked_fill addcmul addcdiv".split())
_REARRANGE = frozenset(
    """
    clone _to_copy view _unsafe_view reshape t transpose permute expand unsqueeze squeeze slice
    select split split_with_sizes unsafe_split chunk unbind cat stack alias detach repeat
    constant_pad_nd pixel_shuffle pixel_unshuffle im2col col2im roll flip index index_select gather
    copy as_strided view_as_real view_as_complex native_dropout uniform channel_shuffle narrow
    unflatten flatten contiguous
    """.split()
)
_Step = tuple[tuple[int, ...], int, int, int]
"""A shape to lay a tensor out in, then a dimension of it to narrow: which, from where, how far."""


@dataclass(frozen=True, slots=True)
class Place:
    """One result of one operator, and how to lay it out.

    Attributes:
        call: Number of the operator in the program.
        output: Which of its results.
        steps: Views and cuts that leave one dimension for every factor.
        sizes: Sizes of these factors.
        samples: Factors that no group moves.
        over: For every group on which the site's depends, its factors; none where that is a family.
        units: Factors of the group itself.
        others: Factors of other groups, over which the mean is taken.
    """

    call: int
    output: int
    steps: tuple[_Step, ...]
    sizes: tuple[int, ...]
    samples: tuple[int, ...]
    over: tuple[tuple[int, ...], ...]
    units: tuple[int, ...]
    others: tuple[int, ...] = ()

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(samples, *over, size)``; ``(samples, size)`` in a branch of a family."""
        for shape, at, start, length in self.steps:
            tensor = tensor.reshape(shape).narrow(at, start, length)
        x = tensor.reshape(self.sizes)
        if x.is_complex():  # real and imaginary parts are samples
            return self._laid_out(torch.view_as_real(x), len(self.sizes))
        return self._laid_out(x)

    def _laid_out(self, x: Tensor, *more: int) -> Tensor:
        over = [d for dims in self.over for d in dims]
        x = x.permute(*more, *self.samples, *over, *self.units, *self.others)
        size = self.sizes
        contexts = [prod(size[d] for d in dims) for dims in self.over if dims]
        lead = prod(x.shape[: len(more) + len(self.samples)])
        shape = [lead, *contexts, prod(size[d] for d in self.units)]
        if self.others:
            x = x.reshape(*shape, -1).mean(-1)
        return x.reshape(shape)


@dataclass(frozen=True, slots=True)
class Site:
    """A group in the activations of a program.

    Attributes:
        group: Its name in the space.
        kind: ``"contraction"`` (the result of a matrix product, convolution or look-up),
            ``"nonlinearity"``, ``"computed"`` (a sum, a norm, …) or ``"rearranged"``.
        label: Parameter that leads here and the operator, for reading.
        places: Where: one, or one for every index of the family that the group depends on.
        family: Position in ``over`` of the group that indexes `places`; -1 if it is one place.
        beside: Other groups that stand beside it, over which the mean is taken.
    """

    group: str
    kind: str
    label: str
    places: tuple[Place, ...]
    family: int = -1
    beside: tuple[str, ...] = ()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Features ``(samples, *over, size)`` from those of every place."""
        return parts[0] if self.family < 0 else torch.stack(list(parts), 1 + self.family)


# ------------------------------------------------------------------------- all sites


def find_sites(
    space: WeightSpace, program: Program, naming: Naming, params: Iterable[Param]
) -> list[Site]:
    """Every site of every group of a space in a program, in the order of its operators.

    Args:
        space: The space.
        program: A run of the module it describes, solved.
        naming: The groups found in that run.
        params: `Param` records of that run; they say which of its groups are the space's.

    Returns:
        The sites; none for what does not depend on the inputs.
    """
    search = _Search(space, naming, params)
    labels = Labels(program)
    found: list[Site] = []
    branches: dict[tuple[str, int], dict[int, list[tuple[Site, tuple[int, ...]]]]] = {}
    depends: set[int] = set()
    inside = Branches(program, naming, search.names)
    for i, call in enumerate(program.calls):
        if not any(v.kind == INPUT or id(v) in depends for v in call.ins):
            continue
        depends |= {id(v) for v in call.outs}
        partly = inside.of(call)
        kind = _kind(call, depends)
        for k, value in enumerate(call.outs):
            if not (value.dtype.is_floating_point or value.dtype.is_complex):
                continue
            for one in search.sites(i, k, value):
                over = space.all_groups[one.group].over
                if partly - ({(over[one.family], one.branch)} if one.family >= 0 else set()):
                    continue  # it stands for one branch of a family, or a sum of a few
                site = Site(one.group, kind, labels.of(call), (one.place,), one.family, one.beside)
                if one.family < 0:
                    found.append(site)
                else:
                    rows = branches.setdefault((one.group, one.family), {})
                    rows.setdefault(one.branch, []).append((site, one.still))
    for (name, family), rows in branches.items():
        group = space.all_groups[space.all_groups[name].over[family]]
        found += _joined(rows, group.size)
    return sorted(found, key=lambda s: s.places[0].call)


def _joined(rows: Mapping[int, list[tuple[Site, tuple[int, ...]]]], size: int) -> Iterator[Site]:
    """Sites of the branches of a family put together, if all see the same samples."""
    if sorted(rows) != list(range(size)):
        return
    if len({len(row) for row in rows.values()}) > 1:
        return
    for column in zip(*(rows[k] for k in range(size)), strict=True):
        first = column[0]
        if all(
            (s.kind, s.beside, still, s.places[0].sizes)
            == (first[0].kind, first[0].beside, first[1], first[0].places[0].sizes)
            for s, still in column
        ):
            yield replace(first[0], places=tuple(s.places[0] for s, _ in column))


def _kind(call: Call, depends: set[int]) -> str:
    if call.name in _CONTRACTIONS:
        return CONTRACTION
    if call.name in _SOFTMAX:
        return NONLINEARITY
    if call.name in _REARRANGE:
        return REARRANGED
    if torch.Tag.pointwise not in call.op.tags:
        return COMPUTED
    moving = [v for v in call.ins if id(v) in depends and v.kind == ACTIVE]
    product = call.name in ("mul", "div") and len(moving) > 1
    return NONLINEARITY if product or call.name not in _LINEAR else COMPUTED


class Branches:
    """Which branches of families a value comes from, where it does not come from all of them."""

    def __init__(self, program: Program, naming: Naming, names: Mapping[str, str]) -> None:
        self.naming, self.names = naming, names
        self.slots: dict[int, frozenset[tuple[str, int]]] = {}
        self.sizes: dict[str, int] = {}
        for v in program.params:
            slot = naming.slot(v)
            if slot is not None:
                (name, k), _ = slot
                self.slots[id(v)] = frozenset({(name, k)})
                self.sizes[name] = max(self.sizes.get(name, 0), k + 1)

    def of(self, call: Call) -> set[tuple[str, int]]:
        """Index group (as the space calls it) and index of each branch that the results show."""
        if not self.sizes:
            return set()
        found = {slot for v in call.ins for slot in self.slots.get(id(v), ())}
        read = self.naming.slot_read(call)
        found |= {read} if read else set()
        self.slots.update((id(v), frozenset(found)) for v in call.outs)
        count = Counter(name for name, _ in found)
        return {(self.names.get(n, n), k) for n, k in found if count[n] < self.sizes[n]}


class Labels:
    """Names of values for reading: the last parameter on the way to them."""

    def __init__(self, program: Program) -> None:
        self.names: dict[int, str] = {
            id(v): v.names[0].rpartition(".")[0] or v.names[0] for v in program.params
        }
        for call in program.calls:
            own = [self.names[id(v)] for v in call.ins if id(v) in self.names]
            static = [self.names[id(v)] for v in call.ins if v.kind == PARAM]
            name = (static or own or [""])[0]
            for v in call.outs:
                self.names[id(v)] = name

    def of(self, call: Call) -> str:
        """Label of the first result of a call."""
        name = self.names.get(id(call.outs[0]), "")
        return f"{name}: {call.name.strip('_')}" if name else call.name.strip("_")


# ----------------------------------------------------------------------- one value


@dataclass(frozen=True, slots=True)
class _View:
    """Part of a tensor in which every dimension is one atom."""

    atoms: tuple[int, ...]
    steps: tuple[_Step, ...]


class _Found(NamedTuple):
    """A group in a value, with the branch it is private to, and the atoms of its samples."""

    group: str
    place: Place
    family: int
    branch: int
    still: tuple[int, ...]
    beside: tuple[str, ...]


class _Search:
    """Finds sites in single values."""

    def __init__(self, space: WeightSpace, naming: Naming, params: Iterable[Param]) -> None:
        self.space, self.naming, self.s = space, naming, naming.s
        self.names = correspondence(space, params)

    def _group(self, atom: int) -> str | None:
        """Name, in the space, of the group that an atom belongs to."""
        owner = self.naming.owner(atom)
        return None if owner is None else self.names.get(self.naming.group(owner).name)

    def sites(self, call: int, output: int, value: Value) -> "Iterator[_Found]":
        """Groups in a value.

        Yields:
            The group and its place, for every group in every part of the value.
        """
        for view in _views(self.s, value):
            if any(self.s.cases(a) is not None for a in view.atoms):
                continue  # which piece stands there depends on something the value does not show
            names = [self._group(a) for a in view.atoms]
            for name in dict.fromkeys(n for n in names if n is not None):
                if not self.space.all_groups[name].fixed:
                    yield from self._site(name, (call, output), view, names)

    def _site(
        self, name: str, at: tuple[int, int], view: _View, names: list[str | None]
    ) -> "Iterator[_Found]":
        group = self.space.all_groups[name]
        units = self._factors(name, view, names)
        branch = {self.naming.branch(view.atoms[d]) for d in units or ()}
        if units is None or len(branch) != 1:
            return
        slot = branch.pop()
        family = -1
        over: list[tuple[int, ...]] = []
        for i, o in enumerate(group.over):
            dims = self._factors(o, view, names)
            if dims is None and slot is not None and self._group(slot[0]) == o:
                family, dims = i, ()
            if dims is None:
                return
            over.append(dims)
        if (slot is None) != (family < 0):
            return
        taken = {*units, *(d for dims in over for d in dims)}
        rest = [d for d in range(len(names)) if d not in taken]
        others = [d for d in rest if (n := names[d]) and not self.space.all_groups[n].fixed]
        samples = [d for d in rest if d not in others]
        place = Place(
            *at,
            view.steps,
            tuple(self.s.size((a,)) for a in view.atoms),
            tuple(samples),
            tuple(over),
            units,
            tuple(others),
        )
        yield _Found(
            name,
            place,
            family,
            slot[1] if slot else 0,
            tuple(view.atoms[d] for d in samples),
            tuple(dict.fromkeys(n for d in others if (n := names[d]))),
        )

    def _factors(self, name: str, view: _View, names: list[str | None]) -> tuple[int, ...] | None:
        """Dimensions of a group's atoms in their order; None unless each is there just once."""
        dims = [d for d, n in enumerate(names) if n == name]
        if not dims:
            return None
        owner = self.naming.owner(view.atoms[dims[0]])
        where = {self.naming.unit(view.atoms[d]): d for d in dims}
        needed = self.naming.units(owner) if owner is not None else ()
        if len(needed) != len(dims) or set(where) != set(needed):
            return None
        return tuple(where[a] for a in needed)


def _views(s: Solver, value: Value) -> Iterator[_View]:
    """The parts of a value between the cuts of its concatenations."""
    atoms = tuple(a for axis in value.axes for a in s.resolve(axis))
    yield from _cut(s, atoms, ())


def _cut(s: Solver, atoms: tuple[int, ...], steps: tuple[_Step, ...]) -> Iterator[_View]:
    for i, a in enumerate(atoms):
        parts = s.parts(a)
        told = {j for j, b in enumerate(atoms) if (c := s.cases(b)) is not None and c[0] == a}
        if parts is None or not (told or s.free((a,))):
            continue
        sizes, start = tuple(s.size((b,)) for b in atoms), 0
        for k, part in enumerate(parts):
            step = (sizes, i, start, s.size(part))
            pieces = [_piece(s, b, k) if j in told else (b,) for j, b in enumerate(atoms)]
            pieces[i] = s.resolve(part)
            yield from _cut(s, tuple(b for piece in pieces for b in piece), (*steps, step))
            start += s.size(part)
        return
    yield _View(atoms, steps)


def _piece(s: Solver, atom: int, k: int) -> tuple[int, ...]:
    case = s.cases(atom)
    return (atom,) if case is None else s.resolve(case[1][k])


# ------------------------------------------------------------- two runs of one module


def correspondence(space: WeightSpace, params: Iterable[Param]) -> dict[str, str]:
    """Group of a run → group of the space that stands in the same places of the parameters."""
    pairs: dict[str, set[str]] = {}
    for p in params:
        ours = space.by_name.get(p.name)
        if ours is None:
            continue
        for a, b in zip(p.axes, ours.axes, strict=True):
            _compare(a, b, pairs)
        if p.at and ours.at:
            pairs.setdefault(p.at[0], set()).add(ours.at[0])
    single = {a: next(iter(bs)) for a, bs in pairs.items() if len(bs) == 1}
    counts: dict[str, int] = {}
    for b in single.values():
        counts[b] = counts.get(b, 0) + 1
    return {a: b for a, b in single.items() if counts[b] == 1}


def _compare(a: Axis, b: Axis, pairs: dict[str, set[str]]) -> None:
    if len(a.factors) != len(b.factors) or a.size != b.size:
        return
    for x, y in zip(a.factors, b.factors, strict=True):
        if isinstance(x, Concat) and isinstance(y, Concat):
            if len(x.parts) == len(y.parts):
                for p, q in zip(x.parts, y.parts, strict=True):
                    _compare(p, q, pairs)
        elif isinstance(x, Group) and isinstance(y, Group) and _alike(x, y):
            pairs.setdefault(x.name, set()).add(y.name)


def _alike(a: Group, b: Group) -> bool:
    """True for two free groups of one size, or two fixed ones on which others depend."""
    return (a.size, a.fixed) == (b.size, b.fixed) and (not a.fixed or "#" in a.name)
