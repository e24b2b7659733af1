"""Sizes of axes as polynomials in the sizes of groups, and when two of them stay equal."""

from collections.abc import Mapping
from fractions import Fraction

from wspace.space import Axis, Group

Polynomial = dict[tuple[str, ...], Fraction]
"""Names of groups → coefficient of the product of their sizes; ``()`` for the constant."""


def constant(x: int) -> Polynomial:
    """A number that depends on no group."""
    return {(): Fraction(x)}


def of_axis(axis: Axis) -> Polynomial:
    """The size of an axis in terms of the sizes of its free groups."""
    out = constant(1)
    for f in axis.factors:
        if isinstance(f, Group):
            out = times(out, constant(f.size) if f.fixed else {(f.name,): Fraction(1)})
        else:
            terms: Polynomial = {}
            for part in f.parts:
                terms = plus(terms, of_axis(part))
            out = times(out, terms)
    return out


def plus(a: Polynomial, b: Polynomial, factor: int = 1) -> Polynomial:
    """The sum of two polynomials, the second one times a number."""
    out = dict(a)
    for key, c in b.items():
        out[key] = out.get(key, Fraction(0)) + c * factor
    return {k: c for k, c in out.items() if c}


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    """The product of two polynomials."""
    out: Polynomial = {}
    for p, x in a.items():
        for q, y in b.items():
            key = tuple(sorted((*p, *q)))
            out[key] = out.get(key, Fraction(0)) + x * y
    return out


def over(a: Polynomial, b: Polynomial) -> Polynomial | None:
    """The quotient by a single term that divides every term; None if it does not."""
    if len(b) != 1:
        return None
    ((names, c),) = b.items()
    out: Polynomial = {}
    for key, x in a.items():
        left = list(key)
        for g in names:
            if g not in left:
                return None
            left.remove(g)
        out[tuple(left)] = x / c
    return out


def renamed(a: Polynomial, alias: Mapping[str, str]) -> Polynomial:
    """The polynomial with other groups in the place of some."""
    out: Polynomial = {}
    for names, c in a.items():
        key = tuple(sorted(alias.get(g, g) for g in names))
        out[key] = out.get(key, Fraction(0)) + c
    return out


def rest(a: Polynomial, b: Polynomial) -> tuple[Polynomial, Polynomial]:
    """Two polynomials without the terms that they have in common."""
    common = {k: min(a[k], b[k]) for k in a.keys() & b.keys()}
    return plus(a, common, -1), plus(b, common, -1)


def paired(a: Polynomial, b: Polynomial, size: Mapping[str, int]) -> list[tuple[str, str]] | None:
    """Which groups must be of one size for two polynomials to stay equal.

    Args:
        a: The one.
        b: The other, equal to it now.
        size: Sizes of groups now.

    Returns:
        Pairs of groups; none if the two are the same; None if equal sizes are not enough.
    """

    def rows(p: Polynomial) -> list[tuple[list[int], Fraction, list[str]]]:
        found = [(sorted(names, key=lambda g: (size[g], g)), c) for names, c in p.items()]
        return sorted(([size[g] for g in names], c, names) for names, c in found)

    left, right = map(rows, rest(a, b))
    if [r[:2] for r in left] != [r[:2] for r in right]:
        return None
    return [
        (g, h)
        for x, y in zip(left, right, strict=True)
        for g, h in zip(x[2], y[2], strict=True)
        if g != h
    ]
