r"""Diagonal symmetries: positive scale, sign and sine phase, derived from the solved program.

Multiply hidden unit :math:`u` by :math:`s_u`: a tensor with that unit on some axis becomes
:math:`s_u^k` times itself there, for an exponent :math:`k` of its own. Every operator is a linear
equation between the exponents of its inputs and outputs: equal for a sum, added for a product,
opposite along a contracted axis, unchanged through a positively homogeneous function (relu), zero
where nothing of the kind holds (gelu, softmax). Exponents of parameters are the unknowns; each
independent solution is a `Gauge`.

The same equations modulo 2 give signs, with odd functions (tanh, sin, erf) in place of homogeneous
ones. A sine adds an unknown of its own: shifting its argument by :math:`\pi` flips its sign, and a
bias can shift the argument, :math:`b \to b + \pi/\omega` for :math:`\sin(\omega(Wx + b))`.

Exponents are kept for every occurrence of a group in an axis, so the query, key and value parts of
a fused projection scale separately.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from wspace.space import Gauge
from wspace.trace.derive import Naming
from wspace.trace.exponents import Equations, Row, Shift
from wspace.trace.gauge_rules import apply
from wspace.trace.program import Program, Value


def derive_gauges(naming: Naming, program: Program) -> tuple[Gauge, ...]:
    """Every independent diagonal symmetry of a solved program."""
    out: list[Gauge] = []
    for sign in (False, True):
        p = Equations(naming, program, sign=sign)
        for value in program.params:
            p.rows(value)
        _run(p, program)
        out += _solutions(p, "sign" if sign else "scale")
    return _finest(out, naming)


def _finest(gauges: Sequence[Gauge], naming: Naming) -> tuple[Gauge, ...]:
    """The symmetries that no finer one contains: a factor per unit contains one per head."""

    def places(gauge: Gauge) -> tuple[object, ...]:
        return (gauge.kind, *sorted((name, d, e) for name, d, _, e in gauge.slots))

    contained = {(places(g), index) for g in gauges for index in naming.over_of(g.group)}
    return tuple(g for g in gauges if g.shifts or (places(g), g.group) not in contained)


def _run(p: Equations, program: Program) -> None:
    """Turns every call of a program into equations."""
    for call in program.calls:
        made = apply(p, call)
        for value, rows in zip(call.outs, made, strict=False):
            p.made[id(value)] = _fit(p, value, rows)
        for value in call.outs[len(made) :]:
            p.made[id(value)] = p.neutral(value)
    for value in program.outputs:
        p.kill(p.rows(value))


def _fit(p: Equations, value: Value, rows: list[Row]) -> list[Row]:
    """The rows if they have the value's shape; otherwise nothing in them may scale."""
    if [len(r) for r in rows] == [len(p.leaves(axis)) for axis in value.axes]:
        return rows
    p.kill(rows)
    return p.neutral(value)


def _solutions(p: Equations, kind: str) -> Iterator[Gauge]:
    system = p.system
    by_free: dict[int, list[tuple[Any, int | Fraction]]] = {}
    for var, owner in enumerate(system.owners):
        for free, c in system.reduce({var: 1}).items():
            by_free.setdefault(free, []).append((owner, c))
    for terms in by_free.values():
        whole = math.lcm(*(c.denominator for _, c in terms))
        slots, shifts, atoms = [], [], set()
        for owner, c in terms:
            if isinstance(owner, Shift):
                atoms.add(owner.atom)
                shifts.append((owner.bias, 0, owner.leaf, owner.amount))
            else:
                value, d, i, atom = owner
                atoms.add(atom)
                slots.append((value, d, i, int(c * whole)))
        if len(atoms) == 1:
            yield from _gauge(p, kind, atoms.pop(), slots, shifts)


def _gauge(
    p: Equations,
    kind: str,
    atom: int,
    slots: Sequence[tuple[Value, int, int, int]],
    shifts: Sequence[tuple[Value, int, int, float]],
) -> Iterator[Gauge]:
    naming = p.naming
    if naming.skips(atom):
        return

    def place(value: Value, d: int, leaf: int) -> tuple[int, int]:
        before = p.leaves(value.axes[d])[:leaf]
        return d, sum(a == atom for a in before)

    entries = [(n, *place(v, d, i), c) for v, d, i, c in slots for n in naming.copies(v, atom)]
    added = [(n, *place(v, d, i), x) for v, d, i, x in shifts for n in naming.copies(v, atom)]
    group = naming.group(naming.canonical(atom))
    if naming.local(group, [(v, d) for v, d, *_ in (*slots, *shifts)]):
        kind = "phase" if shifts else kind
        yield Gauge(kind, group.name, tuple(entries), tuple(added))
