"""Which numbers in a module's code follow from which sizes of its weight space.

`numbers` runs the module and writes down every number that says how long a dimension is; here the
dimensions become axes of the space. So it is known which attributes have to change when units are
taken out of a group (`Sizes.solve`), which groups one attribute holds to the same size (`ties`),
which groups the code fixes with a number of its own (`pinned`), and for which groups a size is also
used as a factor, such as the root of the head dimension in attention (`scaled`).
"""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn

from wspace.errors import PruneError, SpaceMismatch, message
from wspace.space import Axis, Concat, Group, WeightSpace
from wspace.trace import named, polynomials
from wspace.trace.capture import capture
from wspace.trace.derive import Naming, build_params
from wspace.trace.numbers import (
    OPERATIONS,
    Attribute,
    Computed,
    Demand,
    Expression,
    Length,
    Numbers,
    Watching,
    remembered,
)
from wspace.trace.program import Call, Value
from wspace.trace.rules import known
from wspace.trace.sandbox import persistent_float_buffers
from wspace.trace.sites import correspondence
from wspace.trace.solve import Axis as Atoms


@dataclass(frozen=True, slots=True)
class Requirement:
    """A number of the code that has to be as large as a (part of an) axis, or as another number.

    Attributes:
        number: The number and how it is computed; lengths are axes.
        axis: What it is the size of, or the other number.
        source: Where in the code, for a plain number.
        equal: False if the two are compared and must go on to differ.
    """

    number: Any
    axis: Any
    source: str = ""
    equal: bool = True


@dataclass(frozen=True)
class Sizes:
    """The numbers in a module's code that depend on sizes of its space.

    Attributes:
        requirements: Numbers that must equal the size of an axis.
        pinned: Group → why its size cannot change: a number in the code, or an attribute that
            stands for something else too.
        scaled: Group → where its size is used as a factor (``1 / sqrt(head_dim)``).
        least: Group → how many units must stay, where the code chooses that many of them.
        tied: Pairs of groups that must be of one size.
    """

    requirements: tuple[Requirement, ...]
    pinned: Mapping[str, str] = field(default_factory=dict)
    scaled: Mapping[str, str] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()

    def ties(self) -> list[list[str]]:
        """Sets of groups that an attribute holds to the same size, in order of appearance."""
        sets: list[list[str]] = []
        for pair in self.tied:
            joined = [s for s in sets if set(s) & set(pair)]
            merged = [g for s in joined for g in s]
            merged += [g for g in pair if g not in merged]
            sets = [s for s in sets if s not in joined] + [merged]
        return sets

    def solve(self, small: WeightSpace) -> dict[Attribute, int]:
        """New values of attributes for a space of the same groups with other sizes.

        Args:
            small: The space with its new sizes.

        Returns:
            The attributes that change, with their values.

        Raises:
            PruneError: If an attribute would need two values, or a plain number would have to
                change.
        """
        groups = small.all_groups
        values: dict[Attribute, int] = {}
        left = sorted(self.requirements, key=lambda r: _depth(r.number))
        while left:
            again = [r for r in left if not _settle(r, groups, values)]
            if len(again) == len(left):  # the smallest one stays as it is
                unknown = {a for r in left for a in _attributes(r.number) if a not in values}
                smallest = min(unknown, key=lambda a: a.value)
                values[smallest] = smallest.value
            left = again
        wrong = [w for r in self.requirements if (w := _unmet(r, groups, values))]
        wrong += [
            f"{g} with {groups[g].size} units, of which {n} are chosen"
            for g, n in self.least.items()
            if groups[g].size < n
        ]
        if wrong:
            raise PruneError(
                message(
                    "prune: the module's code does not allow these sizes",
                    expected="numbers in the code that follow the sizes of its tensors",
                    got=list(dict.fromkeys(wrong)),
                    help="keep as many units in groups that share an attribute, leave groups that "
                    "the code fixes as they are (`wspace.prune.sizes(module, space).pinned`), or "
                    "make the number an attribute of the module",
                )
            )
        return {a: v for a, v in values.items() if v != a.value}


def find_sizes(
    space: WeightSpace,
    module: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Sizes:
    """Finds the numbers in a module's code that depend on the sizes of its space.

    The module is run once, as in `trace`, and left as it was.

    Args:
        space: Its weight space.
        module: The module; no weights are needed.
        args: Example positional inputs.
        kwargs: Example keyword inputs.

    Returns:
        What was found.

    Raises:
        SpaceMismatch: If the module is not of this space.
        TraceError: If the module fails on these inputs.
    """  # noqa: DOC502 (capture raises)
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    runs: list[Numbers] = []

    @contextmanager
    def within(value_of: Any) -> Generator[None]:
        run = Numbers()
        runs.append(run)
        with remembered(module, run), Watching(run, value_of):
            yield

    program = capture(module, args, kwargs or {}, known, within)
    naming, _ = named(program)
    buffers = {name for name, _ in persistent_float_buffers(module)}
    params = build_params(naming, program, buffers, {})
    if {p.name: p.shape for p in params} != {p.name: p.shape for p in space.params}:
        raise SpaceMismatch(
            message(
                f"prune: {type(module).__name__} is not a module of this space",
                expected="the parameters and buffers that the space lists",
                help="trace this module: wspace.trace(module, args, kwargs)",
            )
        )
    names = correspondence(space, params)
    return _Reader(space, naming, names).read(runs[-1], module, program.calls)


# --------------------------------------------------------------------- from values to axes


class _Reader:
    """Turns what a run showed into requirements on axes of the space."""

    def __init__(self, space: WeightSpace, naming: Naming, names: Mapping[str, str]) -> None:
        self.space, self.naming, self.names = space, naming, names
        self.pinned: dict[str, str] = {}

    def read(self, run: Numbers, module: nn.Module, calls: Iterable[Call]) -> Sizes:
        """The sizes that a run showed."""
        found: dict[Requirement, None] = {}
        for demand in run.demands:
            number = self._expression(demand.number)
            if not isinstance(number, Axis):
                self._pin_joint(demand)
            for axis in self._axes(demand.value, demand.dim):
                if (part := self._part(axis, demand)) is not None:
                    found[Requirement(number, part, demand.source)] = None
        found |= dict.fromkeys(self._compared(run))
        found |= dict.fromkeys(self._rectangular(calls))
        found |= dict.fromkeys(_recurrent(module, self.space))
        requirements = tuple(r for r in found if r.number != r.axis)
        ties = _Ties(self.space, requirements)
        ties.pinned |= self.pinned
        scaled: dict[str, str] = {}
        for value in run.dots:
            for axis in self._axes(value, len(value.shape) - 1):
                scaled |= dict.fromkeys(_free(axis), "scaled_dot_product_attention")
        for expression, source in run.scales:
            for g in ties.groups_in(self._expression(expression)):
                scaled.setdefault(g, source)
        return Sizes(requirements, ties.pinned, scaled, self._least(run), tuple(ties.pairs))

    def _compared(self, run: Numbers) -> Iterator[Requirement]:
        for a, b, equal, source in run.compared:
            x, y = self._expression(a), self._expression(b)
            if isinstance(x, int | Axis):
                x, y = y, x
            if not isinstance(x, int) and x != y:
                yield Requirement(x, y, source, equal)

    def _rectangular(self, calls: Iterable[Call]) -> Iterator[Requirement]:
        """A dimension whose units differ along another dimension is as long everywhere."""
        for call in calls:
            for value in call.outs:
                for dim in range(len(value.shape)):
                    first, *others = self._axes(value, dim) or [None]
                    yield from (Requirement(first, axis) for axis in others)

    def _least(self, run: Numbers) -> dict[str, int]:
        """How many units of a group are needed: as many as are chosen among them."""
        least: dict[str, int] = {}
        for count, value, dim in run.chosen:
            for axis in self._axes(value, dim):
                names = _free(axis)
                for g in names:
                    whole = self.space.all_groups[g].size
                    needed = whole if len(names) > 1 else -(-count * whole // axis.size)
                    least[g] = max(least.get(g, 1), needed)
        return least

    def _axes(self, value: Value, dim: int) -> list[Axis]:
        """What a dimension is made of; several where that differs along another dimension."""
        if value.axes is None:
            return []
        found = (self.naming.extent(axis) for axis in self._cases(value.axes[dim]))
        return [self._in_space(axis) for axis in found if axis is not None]

    def _pin_joint(self, demand: Demand) -> None:
        """Pins groups of which a number says how long one factor is: nothing else tells them apart.

        A product that no operator looks into is one group, though the code may view it as two axes.
        """
        for axis in self._cases(demand.value.axes[demand.dim]) if demand.value.axes else ():
            if self.naming.extent(axis) is None:
                for atom in self.naming.s.resolve(axis):
                    owner = self.naming.owner(atom)
                    name = None if owner is None else self.names.get(self.naming.group(owner).name)
                    if name is not None:
                        why = f"{_now(demand.number)} is the length of a part of it"
                        self.pinned.setdefault(
                            name, f"{why} at {demand.source or _named_by(demand)}"
                        )

    def _cases(self, axis: Atoms) -> Iterator[Atoms]:
        solver = self.naming.s
        factors = solver.resolve(axis)
        for i, atom in enumerate(factors):
            case = solver.cases(atom)
            if case is not None and case[0] not in factors[:i]:
                for choice in case[1]:
                    yield from self._cases((*factors[:i], *choice, *factors[i + 1 :]))
                return
        yield factors

    def _in_space(self, axis: Axis) -> Axis:
        factors: list[Group | Concat] = []
        for f in axis.factors:
            if isinstance(f, Concat):
                factors.append(Concat(tuple(self._in_space(p) for p in f.parts)))
            else:
                known = self.space.all_groups.get(self.names.get(f.name, ""))
                factors.append(known or Group(str(f.size), f.size))
        return Axis(tuple(factors))

    def _part(self, axis: Axis, demand: Demand) -> Axis | None:
        """The slow or fast factors that a number counts."""
        if demand.part == "whole":
            return axis
        wanted = _now(demand.number)
        k = len(axis.factors)
        cuts = [
            axis.factors[:i] if demand.part == "first" else axis.factors[k - i :]
            for i in range(k + 1)
        ]
        for cut in cuts:
            if prod(f.size for f in cut) == wanted:
                return Axis(cut)
        for g in _free(axis):
            self.pinned.setdefault(g, f"{wanted} does not split the axis {axis}")
        return None

    def _expression(self, number: Expression) -> Any:
        if isinstance(number, Length):
            axes = self._axes(number.value, number.dim)
            return axes[0] if axes else number.value.shape[number.dim]
        if isinstance(number, Computed):
            a, b = self._expression(number.a), self._expression(number.b)
            if isinstance(a, int) and isinstance(b, int):
                return OPERATIONS[number.op](a, b)
            return Computed(number.op, a, b)
        return number


def _named_by(demand: Demand) -> str:
    """The attributes that a number comes from, for reading."""
    return ", ".join(dict.fromkeys(map(str, _attributes(demand.number)))) or "an unknown place"


def _free(axis: Axis) -> list[str]:
    return list(dict.fromkeys(g.name for g in axis.groups() if not g.fixed))


def _now(number: Any) -> int:
    """A number as it is now."""
    if isinstance(number, Attribute):
        return number.value
    if isinstance(number, Length):
        return number.value.shape[number.dim]
    if isinstance(number, Computed):
        return OPERATIONS[number.op](_now(number.a), _now(number.b))
    return number.size if isinstance(number, Axis) else number


# ------------------------------------------------------------------------- ties and pins


class _Ties:
    """Which groups must be of one size, and which cannot change, for all requirements to hold.

    A number is a polynomial in the sizes of groups; an attribute is what it was first required to
    be. Where two polynomials that must be equal differ in the names of groups only, these groups
    are tied; where they differ otherwise, their groups are pinned.
    """

    def __init__(self, space: WeightSpace, requirements: tuple[Requirement, ...]) -> None:
        self.size = {n: g.size for n, g in space.all_groups.items()}
        self.pinned: dict[str, str] = {}
        self.pairs: list[tuple[str, str]] = []
        self.alias: dict[str, str] = {}
        self.forms: dict[Attribute, polynomials.Polynomial] = {}
        ordered = sorted(
            (r for r in requirements if r.equal),
            key=lambda r: (max(_depth(r.number), _depth(r.axis)), _terms(r.axis)),
        )
        while fresh := self._round(ordered):
            self.pairs += fresh
            for g, h in fresh:
                a, b = self.alias.get(g, g), self.alias.get(h, h)
                joined = [x for x in (b, *self.alias) if self.alias.get(x, x) == b]
                self.alias |= dict.fromkeys(joined, a)

    def groups_in(self, number: Any) -> list[str]:
        """Groups whose sizes a number says."""
        if isinstance(number, Axis):
            return _free(number)
        if isinstance(number, Attribute):
            form = self.forms.get(number, {})
            heads = {g for key in form for g in key}
            return [g for g in self.size if self.alias.get(g, g) in heads]
        if isinstance(number, Computed):
            return [*self.groups_in(number.a), *self.groups_in(number.b)]
        return []

    def _round(self, requirements: list[Requirement]) -> list[tuple[str, str]]:
        self.forms, bad = {}, dict[str, str]()
        fresh: list[tuple[str, str]] = []
        for r in requirements:
            left, right = self._polynomial(r.number), self._polynomial(r.axis)
            if right is None:
                self._define(r.axis, left or polynomials.constant(_now(r.number)))
                right = self._polynomial(r.axis) or polynomials.constant(_now(r.axis))
            if left is None:
                self._define(r.number, right)
                left = self._polynomial(r.number)
            pairs = None if left is None else polynomials.paired(left, right, self.size)
            if pairs is None:
                names = {g for form in (left or {}, right) for key in form for g in key}
                tied = [g for g in self.size if self.alias.get(g, g) in names]
                bad |= {g: self._why(r) for g in tied if g not in bad}
            else:
                fresh += [p for p in pairs if p not in fresh]
        if not fresh:
            self.pinned |= bad
        return fresh

    def _why(self, r: Requirement) -> str:
        if isinstance(r.number, int):
            return f"the number {r.number} at {r.source or 'an unknown place'}"
        names = list(dict.fromkeys(map(str, _attributes(r.number))))
        return f"{' and '.join(names) or 'a length'}, which stands for other sizes too"

    def _polynomial(self, number: Any) -> polynomials.Polynomial | None:
        """A number in terms of groups; None where an attribute is not known yet."""
        if isinstance(number, Axis):
            return polynomials.renamed(polynomials.of_axis(number), self.alias)
        if isinstance(number, Attribute):
            return self.forms.get(number)
        if not isinstance(number, Computed):
            return polynomials.constant(number)
        a, b = self._polynomial(number.a), self._polynomial(number.b)
        if a is None or b is None:
            return None
        if number.op in ("add", "sub"):
            return polynomials.plus(a, b, 1 if number.op == "add" else -1)
        if number.op == "mul":
            return polynomials.times(a, b)
        exact = polynomials.over(a, b) if number.op == "floordiv" else None
        return exact if exact is not None else polynomials.constant(_now(number))

    def _define(self, number: Any, form: polynomials.Polynomial) -> None:
        """Says what the largest unknown attribute of a number is; smaller ones stay as they are."""
        unknown = [a for a in dict.fromkeys(_attributes(number)) if a not in self.forms]
        *others, largest = sorted(unknown, key=lambda a: a.value)
        self.forms |= {a: polynomials.constant(a.value) for a in others}
        inverse = self._inverse(number, largest, form)
        self.forms[largest] = inverse or polynomials.constant(largest.value)

    def _inverse(
        self, number: Any, attribute: Attribute, form: polynomials.Polynomial
    ) -> polynomials.Polynomial | None:
        """What an attribute must be for a number that holds it once to be as given."""
        if number == attribute:
            return form
        if not isinstance(number, Computed):
            return None
        inner, other = number.a, number.b
        if attribute in _attributes(number.b):
            inner, other = number.b, number.a
            if number.op not in ("add", "mul"):
                return None
        known = self._polynomial(other)
        if known is None:
            return None
        outer = {
            "add": lambda: polynomials.plus(form, known, -1),
            "sub": lambda: polynomials.plus(form, known),
            "mul": lambda: polynomials.over(form, known),
            "floordiv": lambda: polynomials.times(form, known),
        }.get(number.op, lambda: None)()
        return None if outer is None else self._inverse(inner, attribute, outer)


def _terms(number: Any) -> int:
    return len(polynomials.of_axis(number)) if isinstance(number, Axis) else 1


def _depth(number: Any) -> int:
    """Plain numbers and attributes come before what is computed from them."""
    return 1 + max(_depth(number.a), _depth(number.b)) if isinstance(number, Computed) else 0


# ----------------------------------------------------------------------------- new values


def _settle(r: Requirement, groups: Mapping[str, Group], values: dict[Attribute, int]) -> bool:
    """Finds the value of the one attribute that is not known; True if none is left."""
    unknown = [a for a in dict.fromkeys(_attributes(r)) if a not in values]
    if not unknown or not r.equal:
        return True
    if len(unknown) > 1:
        return False
    (attribute,) = unknown
    bound = max(attribute.value, *(g.size for g in groups.values())) + 1
    for value in (attribute.value, *range(bound, 0, -1)):
        values[attribute] = value
        if _evaluate(r.number, groups, values) == _evaluate(r.axis, groups, values):
            return True
    values[attribute] = attribute.value
    return True


def _unmet(r: Requirement, groups: Mapping[str, Group], values: Mapping[Attribute, int]) -> str:
    known = {a: values.get(a, a.value) for a in _attributes(r)}
    found, target = _evaluate(r.number, groups, known), _evaluate(r.axis, groups, known)
    if (found == target) == r.equal:
        return ""
    who = ", ".join(map(str, dict.fromkeys(_attributes(r)))) or "a number"
    at = f" at {r.source}" if r.source else ""
    if not r.equal:
        return f"{who}{at}: {found} on both sides of a comparison that was false"
    return f"{who}{at}: {found} where {r.axis} needs {target}"


def _attributes(number: Any) -> Iterator[Attribute]:
    if isinstance(number, Attribute):
        yield number
    elif isinstance(number, Computed):
        yield from _attributes(number.a)
        yield from _attributes(number.b)
    elif isinstance(number, Requirement):
        yield from _attributes(number.number)
        yield from _attributes(number.axis)


def _evaluate(number: Any, groups: Mapping[str, Group], values: Mapping[Attribute, int]) -> int:
    if isinstance(number, Attribute):
        return values[number]
    if isinstance(number, Computed):
        a, b = (_evaluate(x, groups, values) for x in (number.a, number.b))
        return OPERATIONS[number.op](a, b) if b or number.op in ("add", "sub", "mul") else -1
    return _size(number, groups) if isinstance(number, Axis) else number


def _size(axis: Axis, groups: Mapping[str, Group]) -> int:
    """Size of an axis when its groups have other sizes."""
    return prod(
        groups[f.name].size
        if isinstance(f, Group) and f.name in groups
        else f.size
        if isinstance(f, Group)
        else sum(_size(p, groups) for p in f.parts)
        for f in axis.factors
    )


# ---------------------------------------------------------------------- recurrent layers


def _recurrent(module: nn.Module, space: WeightSpace) -> Iterator[Requirement]:
    """Sizes that a recurrent layer keeps once for all its layers and directions."""
    for path, m in module.named_modules():
        if not isinstance(m, nn.RNNBase):
            continue
        for name, _ in m.named_parameters(recurse=False):
            axes = space.by_name[f"{path}.{name}" if path else name].axes
            if name.startswith("weight_hr"):
                yield Requirement(Attribute(path, ("proj_size",), None, m.proj_size), axes[0])
            elif name.startswith("weight_hh") and m.proj_size:
                hidden = Attribute(path, ("hidden_size",), None, m.hidden_size)
                yield Requirement(Computed("mul", 4, hidden), axes[0])
            elif name.startswith("weight_hh"):
                yield Requirement(Attribute(path, ("hidden_size",), None, m.hidden_size), axes[1])
