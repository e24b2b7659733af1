"""What a predicted tensor looks like: units out, units in, taps; which units; how it is scaled.

Every tensor has one form ``(out, in, *taps)``, read off the wiring and the axes of its space: a
dimension that the units of a result walk is *out*, one that the units of an operand walk is *in*,
fixed factors beside free ones (kernel taps, places of a flatten) and positions are *taps*. Linear
layers that store their weight transposed, and layers after a flatten, need no case of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from wspace.graph import structure_of
from wspace.space import Axis, Concat, Group, Param, Role, WeightSpace
from wspace.wiring import Block

Kind = Literal["matrix", "table", "scale", "shift"]
"""How a tensor is scaled: by its fan-in, by its width, around 1, around 0."""


@dataclass(frozen=True, eq=False)
class Units:
    """The units along one end of a tensor.

    Attributes:
        unit: Number of every unit within its group, int64 ``(n,)``: the same for all tensors that
            the group indexes.
        piece: Number of the piece of a concatenation that it lies in, int64 ``(n,)``.
        fixed: True if no unit may be moved, so that a number means a place.
    """

    unit: Tensor
    piece: Tensor
    fixed: bool

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.unit)


@dataclass(frozen=True, eq=False)
class TensorForm:
    """A parameter as ``(out, in, *taps)``.

    Attributes:
        name: Its name.
        names: All its names; ties share one tensor.
        shape: Its shape.
        kind: How it is scaled.
        split: Its shape once dimensions are split into their parts.
        order: The parts in the order out, in, taps.
        taps: Sizes of the taps; empty if there are none, or only one.
        out: Units of the result.
        into: Units of the operand; a single one if there is none.
        gain: The numerator of its variance: 2, or 1 for depthwise kernels and tables.
        dtype: Name of its element type.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    split: tuple[int, ...]
    order: tuple[int, ...]
    taps: tuple[int, ...]
    out: Units
    into: Units
    gain: float
    dtype: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """The form's shape ``(out, in, *taps)``."""
        return (self.out.size, self.into.size, *self.taps)

    @property
    def fan_in(self) -> int:
        """Entries that are summed for one unit of the result: in × taps."""
        return self.into.size * prod(self.taps)

    @property
    def vector(self) -> bool:
        """True if there is one entry for each unit and it multiplies no operand."""
        return self.fan_in == 1 and self.kind in ("scale", "shift")

    @property
    def deviation(self) -> float:
        """Root of the mean square that the tensor should have, for matrices and tables."""
        width = self.fan_in if self.kind == "matrix" else self.out.size
        return (self.gain / width) ** 0.5

    def place(self, x: Tensor) -> Tensor:
        """A tensor of this form in the shape of the parameter.

        Args:
            x: ``(*batch, out, in, *taps)``.

        Returns:
            ``(*batch, *shape)``.
        """
        lead = x.dim() - len(self.sizes)
        parts = [self.split[k] for k in self.order]
        x = x.reshape([*x.shape[:lead], *parts])
        back = [self.order.index(k) for k in range(len(self.order))]
        x = x.permute([*range(lead), *(lead + k for k in back)])
        return x.reshape([*x.shape[:lead], *self.shape])

    def canonical(self, x: Tensor) -> Tensor:
        """The inverse of `place`.

        Args:
            x: ``(*batch, *shape)``.

        Returns:
            ``(*batch, out, in, *taps)``.
        """
        lead = x.dim() - len(self.shape)
        x = x.reshape([*x.shape[:lead], *self.split])
        x = x.permute([*range(lead), *(lead + k for k in self.order)])
        return x.reshape([*x.shape[:lead], *self.sizes])


def forms_of(space: WeightSpace) -> list[TensorForm]:
    """The forms of all parameters that can be predicted, in the order of the space.

    Args:
        space: Weight space that came from `trace`.

    Returns:
        One form for every floating-point parameter; buffers have none.

    Raises:
        SpaceMismatch: If the space has no wiring.
    """  # noqa: DOC502 (structure_of raises)
    blocks: dict[str, list[Block]] = {}
    for b in structure_of(space).blocks:
        if b.param and not b.again:
            blocks.setdefault(b.param, []).append(b)
    return [_form(p, blocks.get(p.name, [])) for p in space.params if predictable(p)]


def predictable(p: Param) -> bool:
    """True for parameters with real entries; buffers and complex numbers are kept as they are."""
    return not p.buffer and "float" in p.dtype


def _form(p: Param, blocks: list[Block]) -> TensorForm:
    parts = [part for d in range(len(p.axes)) for part in _parts(p, d, blocks)]
    split = tuple(size for size, _, _ in parts)
    ends: dict[str, list[int]] = {"out": [], "in": [], "tap": []}
    for k, (_, end, _) in enumerate(parts):
        ends[end].append(k)
    out, into = (_merged([parts[k] for k in ends[end]]) for end in ("out", "in"))
    taps = tuple(split[k] for k in ends["tap"] if split[k] > 1)
    kind = _kind(p, blocks, into.size * prod(taps))
    depthwise = into.size == 1 and any("both" in b.roles for b in blocks)
    return TensorForm(
        name=p.name,
        names=(p.name, *p.ties),
        shape=p.shape,
        kind=kind,
        split=split,
        order=tuple(ends["out"] + ends["in"] + ends["tap"]),
        taps=taps,
        out=out,
        into=into,
        gain=1.0 if kind == "table" or depthwise else 2.0,
        dtype=p.dtype,
    )


Part = tuple[int, str, Units]
"""A factor of a dimension: size, end, units."""


def _parts(p: Param, dim: int, blocks: list[Block]) -> Iterator[Part]:
    """The factors of a dimension: free ones at one end, fixed ones beside them as taps."""
    axis, end = p.axes[dim], _end(p, dim, blocks)
    fixed = [isinstance(f, Group) and f.fixed for f in axis.factors]
    if end == "tap" or axis.size == 1 or all(fixed) or not any(fixed):
        yield axis.size, "tap" if axis.size == 1 else end, _units(axis)
        return
    for f, still in zip(axis.factors, fixed, strict=True):
        yield f.size, "tap" if still else end, _units(Axis((f,)))


def _end(p: Param, dim: int, blocks: list[Block]) -> str:
    roles = {r for b in blocks for r, d in zip(b.roles, b.of, strict=True) if d == dim}
    if roles & {"target", "both"}:
        return "out"
    if roles:
        return "in" if "source" in roles else "tap"
    return ("out", "in", "tap")[min(dim, 2)]  # not seen in the pass: as layers of torch have it


def _units(axis: Axis) -> Units:
    pieces: list[Axis] = [axis]
    if len(axis.factors) == 1 and isinstance(axis.factors[0], Concat):
        pieces = list(axis.pieces())
    unit = torch.cat([torch.arange(q.size) for q in pieces])
    piece = torch.cat([torch.full((q.size,), i) for i, q in enumerate(pieces)])
    return Units(unit, piece, axis.fixed)


def _merged(parts: list[Part]) -> Units:
    if len(parts) == 1:
        return parts[0][2]
    count = prod(size for size, _, _ in parts)
    fixed = all(units.fixed for _, _, units in parts)
    return Units(torch.arange(count), torch.zeros(count, dtype=torch.int64), fixed)


def _kind(p: Param, blocks: list[Block], fan: int) -> Kind:
    if p.role is Role.SCALE:
        return "scale"
    if p.role is Role.TABLE or (blocks and blocks[0].op == "embedding"):
        return "table"
    if p.role is Role.MATRIX:
        return "matrix"
    if p.role is Role.SHIFT:
        return "shift" if fan == 1 else "table"
    return "shift" if fan == 1 else "matrix"
