"""How every node set and every block of a graph transforms under the scale and sign gauges.

The factor :math:`q_u` of a unit multiplies its activation. A block is *typed* at its target end if
its entries are multiplied by :math:`q_t`, at its source end if they are divided by :math:`q_s`; at
an end that is not typed the factor does not enter. Weight and bias of a ReLU layer are typed. With
BatchNorm in between there are two scalings of one unit, of which one is described.

Derived from the gauges of the weight space by numbers: every unit gets a factor of its own, and the
exponents of all entries are compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from wspace.action import along_axis, shape_of
from wspace.graph.structure import Structure, structure_of
from wspace.nn.layout import EdgeForm, FeatureForm, Forms, forms_of
from wspace.space import Gauge, WeightSpace
from wspace.wiring import Block


@dataclass(frozen=True, eq=False)
class GaugeTypes:
    """Types of all units and blocks.

    Attributes:
        scale: Units whose activation a positive factor multiplies, ``(N,)``, bool.
        sign: Units whose activation a sign multiplies, ``(N,)``, bool.
        edges: For every edge block: typed at its target, typed at its source.
        features: For every block of node features: typed.
        served: Places in ``space.gauges`` of the gauges described.
        ignored: Places of the others: phases, and scalings that do not reach an activation, such as
            that of a convolution in front of BatchNorm.
    """

    scale: Tensor
    sign: Tensor
    edges: tuple[tuple[bool, bool], ...]
    features: tuple[bool, ...]
    served: tuple[int, ...]
    ignored: tuple[int, ...]

    def activation(self, nodes: int, forms: Forms) -> bool:
        """True if what arrives at a node set, before norms, has the factors of its units."""
        return all(
            own[0]
            for own, form in zip(self.edges, forms.edges, strict=True)
            if form.block.target.nodes == nodes and not form.block.structural
        )


@lru_cache(maxsize=64)
def gauge_types(space: WeightSpace) -> GaugeTypes:
    """Types of all units and blocks of a space's graphs.

    Args:
        space: Weight space that came from `trace`.

    Returns:
        The types.
    """
    structure = structure_of(space)
    forms = forms_of(structure)
    served: list[tuple[int, _Reading]] = []
    order = sorted(range(len(space.gauges)), key=lambda i: space.gauges[i].kind)
    readings = {i: _Reading.of(space, i, forms) for i in order}
    chosen = [(i, r) for i, r in readings.items() if r is not None]
    for i, r in sorted(chosen, key=lambda pair: (not pair[1].outgoing, pair[0])):
        if all(r.agrees(other, forms) for _, other in served):
            served.append((i, r))
    masks = {k: torch.zeros(structure.total, dtype=torch.bool) for k in ("scale", "sign")}
    for i, r in served:
        masks[space.gauges[i].kind] |= r.rho != 0
    edges = tuple(
        _edge_type(k, form, [r for _, r in served], structure) for k, form in enumerate(forms.edges)
    )
    features = tuple(
        all(r.features[k] is not False for _, r in served) for k in range(len(forms.features))
    )
    places = tuple(sorted(i for i, _ in served))
    ignored = tuple(i for i in range(len(space.gauges)) if i not in places)
    return GaugeTypes(masks["scale"], masks["sign"], edges, features, places, ignored)


def _edge_type(
    k: int, form: EdgeForm, served: list["_Reading"], structure: Structure
) -> tuple[bool, bool]:
    """Typed at target and source; at an end without gauge, or without say, the answer is True."""
    if form.block.structural:
        same = all(r.same_ends(form, structure) for r in served)
        return same, same
    return (
        all(r.targets[k] is not False for r in served),
        all(r.sources[k] is not False for r in served),
    )


_Pairs = list[tuple[Tensor, Tensor]]


@dataclass
class _Reading:
    """One gauge: exponents of all units (``rho``), and how blocks relate to them.

    A block's entry is True if typed there, False if the factor does not enter although the unit has
    one, None if the units have none.
    """

    rho: Tensor
    outgoing: bool = False
    targets: list[bool | None] = field(default_factory=list)
    sources: list[bool | None] = field(default_factory=list)
    features: list[bool | None] = field(default_factory=list)

    @classmethod
    def of(cls, space: WeightSpace, index: int, forms: Forms) -> "_Reading | None":
        """Reads a gauge; None if its entries do not follow from factors of activations."""
        gauge = space.gauges[index]
        if gauge.kind == "phase":
            return None
        ends = _Ends(space, gauge)
        out = cls(torch.zeros(forms.structure.total, dtype=torch.float64))
        found, own = _all(map(ends.of, forms.edges)), _all(map(ends.of, forms.features))
        if found is None or own is None:
            return None
        s = forms.structure
        for form, pair in zip(forms.edges, found, strict=True):
            if pair[1].any():
                out.outgoing = True
                if not out._set(form, -pair[1], s, source=True):
                    return None
        for form, pair in zip((*forms.edges, *forms.features), (*found, *own), strict=True):
            fresh = pair[0].any() and not out._at(form, s, source=False).any()
            if fresh and not out._set(form, pair[0], s, source=False):
                return None
        return out if out._relate(forms, found, own) else None

    def _at(self, form: EdgeForm | FeatureForm, s: Structure, *, source: bool) -> Tensor:
        units = form.source if source and isinstance(form, EdgeForm) else form.target
        ends = form.block.source if source else form.block.target
        assert ends is not None
        return self.rho[units + s.offsets[ends.nodes]]

    def _set(
        self, form: EdgeForm | FeatureForm, values: Tensor, s: Structure, *, source: bool
    ) -> bool:
        before = self._at(form, s, source=source)
        if bool(((before != 0) & (before != values)).any()):
            return False
        units = form.source if source and isinstance(form, EdgeForm) else form.target
        ends = form.block.source if source else form.block.target
        assert ends is not None
        self.rho[units + s.offsets[ends.nodes]] = values
        return True

    def _relate(self, forms: Forms, found: _Pairs, own: _Pairs) -> bool:
        s = forms.structure
        for form, pair in zip(forms.edges, found, strict=True):
            if form.block.structural:
                self.targets.append(None)
                self.sources.append(None)
                continue
            into = _relation(pair[0], self._at(form, s, source=False))
            out = _relation(-pair[1], self._at(form, s, source=True))
            if into == "no" or out == "no":
                return False
            self.targets.append(_TYPED[into])
            self.sources.append(_TYPED[out])
        for form, pair in zip(forms.features, own, strict=True):
            into = _relation(pair[0], self._at(form, s, source=False))
            if into == "no":
                return False
            self.features.append(_TYPED[into])
        return True

    def same_ends(self, form: EdgeForm, s: Structure) -> bool:
        """True if every structural edge joins units of one factor."""
        p, t, n, _ = form.sizes
        into = self._at(form, s, source=False).view(p, t, 1)
        out = self._at(form, s, source=True).view(p, 1, n)
        return bool((into == out).all())

    def agrees(self, other: "_Reading", forms: Forms) -> bool:
        """True if no block is typed for one gauge and not for the other at the same units."""
        pairs = [
            *zip(self.targets, other.targets, strict=True),
            *zip(self.sources, other.sources, strict=True),
            *zip(self.features, other.features, strict=True),
        ]
        return all(a is None or b is None or a == b for a, b in pairs)


def _all(pairs: Iterable[tuple[Tensor, Tensor] | None]) -> _Pairs | None:
    """The pairs, or None if one of them is None."""
    out: _Pairs = []
    for pair in pairs:
        if pair is None:
            return None
        out.append(pair)
    return out


_TYPED = {"same": True, "none": False, "free": None}


def _relation(values: Tensor, rho: Tensor) -> str:
    if not rho.any():
        return "no" if values.any() else "free"
    if bool((values == rho).all()):
        return "same"
    return "no" if values.any() else "none"


class _Ends:
    """Exponents of a gauge at the two ends of blocks, units told apart by large prime factors."""

    def __init__(self, space: WeightSpace, gauge: Gauge) -> None:
        group = space.all_groups[gauge.group]
        shape = shape_of(group, space)
        count = 1
        for n in shape:
            count *= n
        r = torch.arange(count, dtype=torch.float64).reshape(shape) + 1000.0
        self.modulo = gauge.kind == "sign"
        self.along: dict[tuple[str, int], Tensor] = {}
        for name, d, occurrence, exponent in gauge.slots:
            e = exponent % 2 if self.modulo else exponent
            part = along_axis(space[name], d, gauge.group, occurrence, r, 0.0) * float(e)
            self.along[name, d] = self.along.get((name, d), 0.0) + part

    def of(self, form: EdgeForm | FeatureForm) -> tuple[Tensor, Tensor] | None:
        """At the target ``(P * T,)`` and, negative for a division, at the source ``(P * S,)``."""
        b = form.block
        if isinstance(form, EdgeForm):
            p, t, s, _ = form.sizes
            into, out = torch.zeros(p, t), torch.zeros(p, s)
        else:
            into, out = torch.zeros(1, form.sizes[0]), torch.zeros(1, 0)
        into, out = into.double(), out.double()
        for d in range(len(b.window)):
            values = self.along.get((b.param, d))
            if values is None or not values.any():
                continue
            values = values[slice(*b.window[d])]
            if values.any() and not self._place(b, d, values, into, out):
                return None
        return into.flatten(), out.flatten()

    def _place(self, b: Block, d: int, values: Tensor, into: Tensor, out: Tensor) -> bool:
        loops = [k for k, dim in enumerate(b.of) if dim == d]
        grid = values.reshape([b.sizes[k] for k in loops])
        for i, k in reversed(list(enumerate(loops))):
            if b.roles[k] == "feature":  # the places of a channel share its factor
                if bool((grid != grid.select(i, 0).unsqueeze(i)).any()):
                    return False
                grid = grid.select(i, 0)
        loops = [k for k in loops if b.roles[k] != "feature"]
        roles = {b.roles[k] for k in loops}
        if not roles or ("source" in roles and "target" in roles):
            return False
        where = [k for k, r in enumerate(b.roles) if r == "both"]
        if roles == {"both"} and b.source is not None:
            to_target = bool((grid >= 0).all())
            end = into if to_target else out
            full = _spread(b, grid, loops, where)
            end += full.reshape(-1, 1)
            return to_target or bool((grid <= 0).all())
        own = "source" if "source" in roles else "target"
        where += [k for k, r in enumerate(b.roles) if r == own]
        end = out if own == "source" else into
        sign = -1.0 if self.modulo and own == "source" else 1.0
        end += sign * _spread(b, grid, loops, where).reshape(end.shape)
        return True


def _spread(b: Block, grid: Tensor, loops: list[int], where: list[int]) -> Tensor:
    """Values over some loops, repeated over the others of `where`, in the order of `where`."""
    for i, k in enumerate(sorted(where)):
        if k not in loops:
            grid = grid.unsqueeze(i)
    grid = grid.expand([b.sizes[k] for k in sorted(where)])
    return grid.permute([sorted(where).index(k) for k in where])
