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

from wspace.errors import PruneError, message
from wspace.space import Axis, Concat, Group, WeightSpace
from wspace.trace.again import Run, ValueOf, look
from wspace.trace.derive import Naming
from wspace.trace.numbers import (
    OPERATIONS,
    Attribute,
    Computed,
    Demand,
    Expression,
    Length,
    Numbers,
    remembered,
)
from wspace.trace.program import Call, Value
from wspace.trace.requirements import (
    Requirement,
    attributes,
    depth,
    free,
    named_by,
    now,
    settle,
    unmet,
)
from wspace.trace.solve import Axis as Atoms
from wspace.trace.ties import Ties
from wspace.trace.watching import Watching


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
        left = sorted(self.requirements, key=lambda r: depth(r.number))
        while left:
            again = [r for r in left if not settle(r, groups, values)]
            if len(again) == len(left):  # the smallest one stays as it is
                unknown = {a for r in left for a in attributes(r.number) if a not in values}
                smallest = min(unknown, key=lambda a: a.value)
                values[smallest] = smallest.value
            left = again
        wrong = [w for r in self.requirements if (w := unmet(r, groups, values))]
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
    """  # noqa: DOC502 (look raises)
    return look(space, module, args, kwargs, SizesLook())[0]


class SizesLook:
    """A look for the numbers in a module's code."""

    def __init__(self) -> None:
        self.numbers = Numbers()

    @contextmanager
    def within(self, module: nn.Module, value_of: ValueOf) -> Generator[None]:
        """The module's numbers remember, for the time of a run.

        Yields:
            Nothing.
        """
        self.numbers = Numbers()
        with remembered(module, self.numbers), Watching(self.numbers, value_of):
            yield

    def read(self, run: Run) -> Sizes:
        """What was found."""
        reader = _Reader(run.space, run.naming, run.names)
        return reader.read(self.numbers, run.module, run.program.calls)


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
        ties = Ties(self.space, requirements)
        ties.pinned |= self.pinned
        scaled: dict[str, str] = {}
        for value in run.dots:
            for axis in self._axes(value, len(value.shape) - 1):
                scaled |= dict.fromkeys(free(axis), "scaled_dot_product_attention")
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
                names = free(axis)
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
                        why = f"{now(demand.number)} is the length of a part of it"
                        self.pinned.setdefault(
                            name, f"{why} at {demand.source or named_by(demand.number)}"
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
        wanted = now(demand.number)
        k = len(axis.factors)
        cuts = [
            axis.factors[:i] if demand.part == "first" else axis.factors[k - i :]
            for i in range(k + 1)
        ]
        for cut in cuts:
            if prod(f.size for f in cut) == wanted:
                return Axis(cut)
        for g in free(axis):
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
