"""The description of a weight space: which units index each axis of each parameter.

Data only: no tensors, no torch. Everything here is frozen, hashable, printable on one screen and
survives a round trip through JSON. What the description *means* is in `action`; how it is derived
from a module is in `trace`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from math import prod
from typing import Any, Self

from wspace.errors import SpaceMismatch, message
from wspace.wiring import Wiring

FORMAT = 1


class Role(Enum):
    """How a parameter enters the computation, from the operators that use it."""

    MATRIX = "matrix"
    """Contracted with activations: linear and convolution weights, recurrent matrices."""
    SHIFT = "shift"
    """Added: biases, position embeddings."""
    SCALE = "scale"
    """Multiplied elementwise: norm gains, layer scales, gates."""
    TABLE = "table"
    """Looked up by index: embeddings, relative-position tables."""
    STATISTIC = "statistic"
    """A float buffer, such as a running mean."""
    UNUSED = "unused"
    """Read by no operator in the traced pass."""
    OTHER = "other"
    """Used in some other way, or in several."""


@dataclass(frozen=True, slots=True)
class Group:
    """A set of `size` interchangeable units.

    Attributes:
        name: Unique within its space.
        size: Number of units.
        kinds: Symmetries that act on it: ``"permutation"``, ``"scale"``, ``"sign"``, ``"phase"``.
            Empty for a *fixed* group: inputs, outputs, kernel taps, vocabulary.
        over: Names of groups on whose index the permutation may depend (wreath product): head dims
            over heads may be permuted differently in every head.
    """

    name: str
    size: int
    kinds: tuple[str, ...] = ()
    over: tuple[str, ...] = ()

    @property
    def fixed(self) -> bool:
        """True if no unit of the group may be permuted."""
        return "permutation" not in self.kinds

    def __mul__(self, other: "Group | Axis") -> "Axis":
        return Axis((self,)) * other

    def __add__(self, other: "Group | Axis") -> "Axis":
        return Axis((self,)) + other

    def __str__(self) -> str:
        return self.name + ("!" if self.fixed else "")


@dataclass(frozen=True, slots=True)
class Concat:
    """A list of axes laid one after another, as a factor of an axis."""

    parts: tuple["Axis", ...]

    @property
    def size(self) -> int:
        """Sum of the sizes of the parts."""
        return sum(p.size for p in self.parts)

    def __str__(self) -> str:
        return "(" + " + ".join(map(str, self.parts)) + ")"


@dataclass(frozen=True, slots=True)
class Axis:
    """One tensor axis: a row-major product of groups (``h*d``) and concatenations (``(a + b)``).

    Attributes:
        factors: Slowest-varying first; empty for an axis of size 1.

    Example:
        >>> h, d = Group("h", 3, ("permutation",)), Group("d", 4)
        >>> str(h * d), (h * d).size, str(h + d)
        ('h*d!', 12, '(h + d!)')
    """

    factors: tuple[Group | Concat, ...] = ()

    @property
    def size(self) -> int:
        """Number of indices."""
        return prod(f.size for f in self.factors)

    def groups(self) -> Iterator[Group]:
        """Every group in the axis, in order, with repetition."""
        for f in self.factors:
            if isinstance(f, Group):
                yield f
            else:
                for part in f.parts:
                    yield from part.groups()

    def pieces(self) -> tuple["Axis", ...]:
        """The parts if the axis is one concatenation, else the axis itself."""
        if len(self.factors) == 1 and isinstance(self.factors[0], Concat):
            return tuple(q for p in self.factors[0].parts for q in p.pieces())
        return (self,)

    @property
    def fixed(self) -> bool:
        """True if no index of the axis can move."""
        return all(g.fixed for g in self.groups())

    def __mul__(self, other: "Group | Axis") -> "Axis":
        right = other if isinstance(other, Axis) else Axis((other,))
        return Axis(self.factors + right.factors)

    def __add__(self, other: "Group | Axis") -> "Axis":
        right = other if isinstance(other, Axis) else Axis((other,))
        return Axis((Concat((*self.pieces(), *right.pieces())),))

    def __str__(self) -> str:
        return "*".join(map(str, self.factors)) or "1"


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter or float buffer.

    Attributes:
        name: Qualified name, as in ``state_dict``.
        axes: One per dimension.
        role: How it is used.
        dtype: Element type, e.g. ``"float32"``.
        ties: Other names of the same tensor.
        buffer: True for a buffer.
        at: For a parameter that is one slice of a family (one expert of a mixture): the group that
            indexes the family and the index, e.g. ``("h2", 0)``. Otherwise None.
        family: Name of the first slice of that family.
    """

    name: str
    axes: tuple[Axis, ...]
    role: Role = Role.OTHER
    dtype: str = "float32"
    ties: tuple[str, ...] = ()
    buffer: bool = False
    at: tuple[str, int] | None = None
    family: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def fixed(self) -> bool:
        """True if no free group moves it."""
        return all(axis.fixed for axis in self.axes)

    @property
    def local(self) -> bool:
        """True if no group of an axis depends on a group of another axis."""
        top = {self.at[0]} if self.at else set[str]()
        inside = [top | {g.name for g in axis.groups()} for axis in self.axes]
        return all(
            o in known
            for axis, known in zip(self.axes, inside, strict=True)
            for g in axis.groups()
            for o in g.over
        )

    def __str__(self) -> str:
        at = f" @ {self.at[0]}={self.at[1]}" if self.at else ""
        return f"{self.name}({', '.join(map(str, self.axes))}){at}"


@dataclass(frozen=True, slots=True)
class Gauge:
    """A diagonal symmetry: every unit of a group is multiplied by its own factor.

    With one factor ``s[u]`` per unit, each *slot* ``(param, dim, occurrence, exponent)`` multiplies
    the parameter along `dim` by ``s ** exponent``; `occurrence` counts the appearances of the group
    in that axis. Factors are positive for ``"scale"`` and ±1 for ``"sign"``. For ``"phase"`` there
    is an integer ``k[u]``: slots multiply by ``(-1) ** (k * exponent)`` and `shifts`
    ``(param, dim, occurrence, amount)`` add ``k * amount``.

    Attributes:
        kind: ``"scale"``, ``"sign"`` or ``"phase"``.
        group: Name of the group.
        slots: Where the factor enters, and with which exponent.
        shifts: Where the phase is added; amounts in radians over the sine's frequency.
    """

    kind: str
    group: str
    slots: tuple[tuple[str, int, int, int], ...]
    shifts: tuple[tuple[str, int, int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Opaque:
    """An operator that had no rule: the groups it touches were fixed.

    Attributes:
        op: Operator name.
        source: ``file:line in function`` of the code that called it.
    """

    op: str
    source: str = ""


@dataclass(frozen=True)
class WeightSpace:
    """The parameters of one architecture, the groups that index them, and nothing else.

    Hashable, so it is the key for caching and batching; groups that no parameter uses are absent.

    Attributes:
        params: Parameters and float buffers, in the module's order; tied tensors once.
        gauges: Diagonal symmetries (scale, sign, phase).
        opaque: Operators that had to be frozen.
        capture: ``"abstract"`` (no weight was read) or ``"concrete"`` (control flow depends on
            weights, so the space holds for the branch that the example inputs took).
        wiring: How parameters connect, for the parameter graph; None if it was not derived.
        example: The positional and keyword inputs that the module was traced with, for what has to
            run it again; None if the space was read from a file. No part of the description:
            equality, JSON and pickles leave it out.
    """

    params: tuple[Param, ...]
    gauges: tuple[Gauge, ...] = ()
    opaque: tuple[Opaque, ...] = ()
    capture: str = "abstract"
    wiring: Wiring | None = None
    extra: tuple[Group, ...] = field(default=())
    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = field(
        default=None, compare=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "example": None}

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Every free group by name, in order of first appearance."""
        found: dict[str, Group] = {}
        for p in self.params:
            for axis in p.axes:
                for g in axis.groups():
                    if g.kinds:
                        found.setdefault(g.name, g)
        for g in self.extra:
            found.setdefault(g.name, g)
        return found

    @cached_property
    def all_groups(self) -> dict[str, Group]:
        """Every group by name, fixed ones included."""
        found = {g.name: g for p in self.params for axis in p.axes for g in axis.groups()}
        found.update({g.name: g for g in self.extra})
        return found

    @cached_property
    def by_name(self) -> dict[str, Param]:
        """Parameters by name, ties included."""
        return {n: p for p in self.params for n in (p.name, *p.ties)}

    def __getitem__(self, name: str) -> Param:
        try:
            return self.by_name[name]
        except KeyError:
            raise SpaceMismatch(
                message(f"space: no parameter {name!r}", help="see `space.params`")
            ) from None

    @cached_property
    def coverage(self) -> float:
        """Share of parameter elements (buffers aside) on an axis that some free group moves."""
        total = sum(p.numel for p in self.params if not p.buffer)
        moved = sum(p.numel for p in self.params if not p.buffer and (not p.fixed or p.at))
        return moved / total if total else 0.0

    @cached_property
    def _hash(self) -> int:
        return hash((self.params, self.gauges, self.opaque, self.capture, self.extra))

    def __hash__(self) -> int:
        return self._hash

    def validate(self, state: Mapping[str, Any]) -> None:
        """Checks that `state` has a tensor of the right trailing shape for every parameter.

        Args:
            state: Tensors by name; leading batch axes allowed, the same for all.

        Raises:
            SpaceMismatch: Listing every missing and mis-shaped tensor.
        """
        wrong = [f"no tensor {p.name!r}" for p in self.params if p.name not in state]
        batch: tuple[int, ...] | None = None
        for p in self.params:
            if p.name not in state:
                continue
            shape = tuple(state[p.name].shape)
            lead = len(shape) - len(p.shape)
            if lead < 0 or shape[lead:] != p.shape:
                wrong.append(
                    f"{p.name!r} of shape {shape}, expected trailing {p.shape} "
                    f"from axes ({', '.join(map(str, p.axes))})"
                )
            elif batch is None:
                batch = shape[:lead]
            elif batch != shape[:lead]:
                wrong.append(f"{p.name!r} with batch axes {shape[:lead]}, others have {batch}")
        if wrong:
            raise SpaceMismatch(
                message(
                    "state does not fit its weight space",
                    got=wrong,
                    help="trace the module this state came from; batch axes lead",
                )
            )

    # ------------------------------------------------------------------- text

    def __str__(self) -> str:
        lines = ["WeightSpace  " + self.summary()]
        for g in self.groups.values():
            if g.over or g.kinds != ("permutation",):
                lines.append("  " + describe(g))
        lines += [
            f"  {p}{''.join(' = ' + t for t in p.ties)}{' [buffer]' if p.buffer else ''}"
            for p in self.params
        ]
        lines += [f"  frozen by {o.op}{' at ' + o.source if o.source else ''}" for o in self.opaque]
        return "\n".join(lines)

    def summary(self) -> str:
        """Groups with sizes, coverage, and what was frozen, on one line."""
        groups = "  ".join(f"{g.name}[{g.size}]" for g in self.groups.values()) or "no free group"
        notes = f"coverage {self.coverage:.3f}"
        if self.opaque:
            notes += f", {len(self.opaque)} opaque"
        if self.capture != "abstract":
            notes += f", {self.capture} capture"
        return f"{groups}  ({notes})"

    # ------------------------------------------------------------------- JSON

    def to_json(self) -> str:
        """The space as JSON text; `from_json` inverts it."""
        groups = list(self.all_groups.values())
        index = {g: i for i, g in enumerate(groups)}

        def axis_to(axis: Axis) -> list[Any]:
            return [
                index[f] if isinstance(f, Group) else {"concat": [axis_to(p) for p in f.parts]}
                for f in axis.factors
            ]

        return json.dumps(
            {
                "format": FORMAT,
                "groups": [[g.name, g.size, g.kinds, g.over] for g in groups],
                "extra": [index[g] for g in self.extra],
                "params": [
                    [
                        p.name,
                        [axis_to(a) for a in p.axes],
                        p.role.value,
                        *(p.dtype, p.ties, p.buffer, p.at, p.family),
                    ]
                    for p in self.params
                ],
                "gauges": [[g.kind, g.group, g.slots, g.shifts] for g in self.gauges],
                "opaque": [[o.op, o.source] for o in self.opaque],
                "capture": self.capture,
                "wiring": None if self.wiring is None else self.wiring.to_data(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The space written by `to_json`.

        Args:
            text: JSON text.

        Returns:
            A space equal to the one written.

        Raises:
            SpaceMismatch: If the text is not a weight space of a known format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise SpaceMismatch(f"space: format {data['format']}, this version reads {FORMAT}")
            return cls._from_data(data)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SpaceMismatch(
                message("space: not a weight space", got=f"{type(error).__name__}: {error}")
            ) from error

    @classmethod
    def _from_data(cls, data: dict[str, Any]) -> Self:
        groups = [
            Group(name, size, tuple(kinds), tuple(over))
            for name, size, kinds, over in data["groups"]
        ]

        def axis_from(items: list[Any]) -> Axis:
            if any(isinstance(f, int) and f < 0 for f in items):
                raise ValueError(f"no group number {min(f for f in items if isinstance(f, int))}")
            return Axis(
                tuple(
                    groups[f]
                    if isinstance(f, int)
                    else Concat(tuple(axis_from(p) for p in f["concat"]))
                    for f in items
                )
            )

        return cls(
            params=tuple(
                Param(
                    name,
                    tuple(map(axis_from, axes)),
                    Role(role),
                    dtype,
                    tuple(ties),
                    buffer,
                    None if at is None else (at[0], at[1]),
                    family,
                )
                for name, axes, role, dtype, ties, buffer, at, family in data["params"]
            ),
            gauges=tuple(
                Gauge(kind, group, tuple(map(tuple, slots)), tuple(map(tuple, shifts)))
                for kind, group, slots, shifts in data["gauges"]
            ),
            opaque=tuple(Opaque(*o) for o in data["opaque"]),
            capture=data["capture"],
            wiring=None if data["wiring"] is None else Wiring.from_data(data["wiring"]),
            extra=tuple(groups[i] for i in data["extra"]),
        )


def describe(group: Group) -> str:
    """A group on one line: size, kinds, what it depends on."""
    text = f"{group.name}[{group.size}]: {', '.join(group.kinds) or 'fixed'}"
    if group.over:
        text += f"; its own for each {'*'.join(group.over)}"
    return text
