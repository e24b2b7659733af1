"""Which groups of a space must keep equal sizes, and which cannot change, for its code to work."""

from typing import Any

from wspace.space import Axis, WeightSpace
from wspace.trace import polynomials
from wspace.trace.numbers import Attribute, Computed
from wspace.trace.requirements import Requirement, attributes, depth, free, now


class Ties:
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
            key=lambda r: (max(depth(r.number), depth(r.axis)), _terms(r.axis)),
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
            return free(number)
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
                self._define(r.axis, left or polynomials.constant(now(r.number)))
                right = self._polynomial(r.axis) or polynomials.constant(now(r.axis))
            if left is None:
                self._define(r.number, right)
                left = self._polynomial(r.number)
            pairs = None if left is None else polynomials.paired(left, right, self.size)
            if pairs is None:
                apart = polynomials.rest(left or {}, right)
                names = {g for form in apart for key in form for g in key}
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
        names = list(dict.fromkeys(map(str, attributes(r.number))))
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
        return exact if exact is not None else polynomials.constant(now(number))

    def _define(self, number: Any, form: polynomials.Polynomial) -> None:
        """Says what the largest unknown attribute of a number is; smaller ones stay as they are."""
        unknown = [a for a in dict.fromkeys(attributes(number)) if a not in self.forms]
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
        if attribute in attributes(number.b):
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
