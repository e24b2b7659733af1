"""Numbers of the code that must equal sizes of a space: what they are, and what they become."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from wspace.space import Axis, Group
from wspace.trace.numbers import OPERATIONS, Attribute, Computed, Length


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


def free(axis: Axis) -> list[str]:
    """Names of the free groups of an axis, each once."""
    return list(dict.fromkeys(g.name for g in axis.groups() if not g.fixed))


def now(number: Any) -> int:
    """A number as it is now."""
    if isinstance(number, Attribute):
        return number.value
    if isinstance(number, Length):
        return number.value.shape[number.dim]
    if isinstance(number, Computed):
        return OPERATIONS[number.op](now(number.a), now(number.b))
    return number.size if isinstance(number, Axis) else number


def named_by(number: Any) -> str:
    """The attributes that a number comes from, for reading."""
    return ", ".join(dict.fromkeys(map(str, attributes(number)))) or "an unknown place"


def settle(r: Requirement, groups: Mapping[str, Group], values: dict[Attribute, int]) -> bool:
    """Finds the value of the one attribute that is not known; True if none is left."""
    unknown = [a for a in dict.fromkeys(attributes(r)) if a not in values]
    if not unknown or not r.equal:
        return True
    if len(unknown) > 1:
        return False
    (attribute,) = unknown
    if r.number == attribute:
        values[attribute] = evaluate(r.axis, groups, values)
        return True
    bound = max(attribute.value, *(g.size for g in groups.values())) + 1
    for value in (attribute.value, *range(bound, 0, -1)):
        values[attribute] = value
        if evaluate(r.number, groups, values) == evaluate(r.axis, groups, values):
            return True
    values[attribute] = attribute.value
    return True


def unmet(r: Requirement, groups: Mapping[str, Group], values: Mapping[Attribute, int]) -> str:
    """What is wrong with a requirement when groups have these sizes; empty if it holds.

    Args:
        r: The requirement.
        groups: Groups with their new sizes.
        values: New values of attributes; others keep theirs.

    Returns:
        The text.
    """
    known = {a: values.get(a, a.value) for a in attributes(r)}
    found, target = evaluate(r.number, groups, known), evaluate(r.axis, groups, known)
    if (found == target) == r.equal:
        return ""
    who = ", ".join(map(str, dict.fromkeys(attributes(r)))) or "a number"
    at = f" at {r.source}" if r.source else ""
    if not r.equal:
        return f"{who}{at}: {found} on both sides of a comparison that was false"
    return f"{who}{at}: {found} where {r.axis} needs {target}"


def attributes(number: Any) -> Iterator[Attribute]:
    """The attributes in a number or in both sides of a requirement, with repetition.

    Yields:
        Attributes from left to right.
    """
    if isinstance(number, Attribute):
        yield number
    elif isinstance(number, Computed):
        yield from attributes(number.a)
        yield from attributes(number.b)
    elif isinstance(number, Requirement):
        yield from attributes(number.number)
        yield from attributes(number.axis)


def evaluate(number: Any, groups: Mapping[str, Group], values: Mapping[Attribute, int]) -> int:
    """A number when groups have these sizes and attributes these values; -1 if it has none."""
    if isinstance(number, Attribute):
        return values[number]
    if isinstance(number, Computed):
        a, b = (evaluate(x, groups, values) for x in (number.a, number.b))
        return OPERATIONS[number.op](a, b) if b or number.op in ("add", "sub", "mul") else -1
    return size_of(number, groups) if isinstance(number, Axis) else number


def size_of(axis: Axis, groups: Mapping[str, Group]) -> int:
    """Size of an axis when its groups have other sizes."""
    return prod(
        groups[f.name].size
        if isinstance(f, Group) and f.name in groups
        else f.size
        if isinstance(f, Group)
        else sum(size_of(p, groups) for p in f.parts)
        for f in axis.factors
    )


def depth(number: Any) -> int:
    """Plain numbers and attributes come before what is computed from them."""
    return 1 + max(depth(number.a), depth(number.b)) if isinstance(number, Computed) else 0
