"""Exponents of a diagonal symmetry: unknowns, linear equations, and their bookkeeping by leaf.

Owns the algebra; which operator gives which equation is in `gauge_rules`, what the solutions mean
in `gauges`.
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from wspace.trace.derive import Naming, atoms_of
from wspace.trace.program import PARAM, Program, Value

Expr = dict[int, int | Fraction]
Row = list[Expr]
"""Exponents of one axis, one for every leaf of its tree."""


class System:
    """Linear equations over rationals (scale) or modulo 2 (sign), solved by substitution."""

    def __init__(self, *, sign: bool) -> None:
        self.sign = sign
        self.owners: list[Any] = []
        self.pivots: dict[int, Expr] = {}

    def unknown(self, owner: Any) -> Expr:
        """A new unknown, with what it is the exponent of."""
        self.owners.append(owner)
        return {len(self.owners) - 1: 1}

    def reduce(self, expr: Expr) -> Expr:
        """The expression in unknowns that no equation has eliminated."""
        if not any(var in self.pivots for var in expr):
            return expr
        todo, out = dict(expr), {}
        while todo:
            var, c = todo.popitem()
            pivot = self.pivots.get(var)
            if pivot is None:
                self._add(out, var, c)
            else:
                for w, d in pivot.items():
                    self._add(todo, w, c * d)
        return out

    def _add(self, expr: Expr, var: int, c: int | Fraction) -> None:
        total = expr.get(var, 0) + c
        if self.sign:
            total %= 2
        if total:
            expr[var] = total
        else:
            expr.pop(var, None)

    def combine(self, terms: Iterable[tuple[Expr, int]]) -> Expr:
        """The sum of several expressions, each times a whole number."""
        out: Expr = {}
        for expr, factor in terms:
            for var, c in expr.items():
                self._add(out, var, c * factor)
        return out

    def zero(self, expr: Expr) -> None:
        """Requires an expression to vanish."""
        expr = dict(self.reduce(expr))
        if not expr:
            return
        shifts = [v for v in expr if isinstance(self.owners[v], Shift)]
        pivot = max((v for v in expr if v not in shifts), default=max(expr))
        lead = expr.pop(pivot)
        unit = self.sign or lead in (1, -1)
        self.pivots[pivot] = {
            v: -c * lead if unit else Fraction(-c) / lead for v, c in expr.items()
        }

    def equal(self, a: Expr, b: Expr) -> None:
        """Requires two expressions to agree."""
        if a is not b and a != b:
            self.zero(self.combine([(a, 1), (b, -1)]))


class Shift:
    """The freedom to shift the argument of a sine through a bias."""

    def __init__(self, bias: Value, leaf: int, atom: int, amount: float) -> None:
        self.bias, self.leaf, self.atom, self.amount = bias, leaf, atom, amount


class Equations:
    """The exponents of every value of a program, and the equations between them.

    Attributes:
        sign: True if the equations are modulo 2.
        uses: Number of calls that read each value, by identity.
        makers: The call that made each value, by identity.
    """

    def __init__(self, naming: Naming, program: Program, *, sign: bool) -> None:
        self.naming, self.program = naming, program
        self.system = System(sign=sign)
        self.sign = sign
        self.made: dict[int, list[Row]] = {}
        self._leaves: dict[tuple[int, ...], list[int]] = {}
        self._free: dict[int, bool] = {}
        self.uses: dict[int, int] = {}
        self.makers = {id(o): c for c in program.calls for o in c.outs}
        for call in program.calls:
            for v in call.ins:
                self.uses[id(v)] = self.uses.get(id(v), 0) + 1

    # --------------------------------------------------------------- exponents

    def leaves(self, axis: tuple[int, ...]) -> list[int]:
        """Atoms of an axis, in order, with repetition; fixed ones included."""
        key = self.naming.s.resolve(axis)
        if key not in self._leaves:
            self._leaves[key] = list(atoms_of(self.naming.tree(axis)))
        return self._leaves[key]

    def is_free(self, atom: int) -> bool:
        """True if the atom is a group, fixed atoms having no exponent."""
        if atom not in self._free:
            self._free[atom] = self.naming.s.free((atom,))
        return self._free[atom]

    def runs(self, leaves: Iterable[int]) -> list[tuple[int, int]]:
        """Leaves in order, a run of fixed ones as its length: how it is cut says nothing."""
        out: list[tuple[int, int]] = []
        for atom in leaves:
            if self.is_free(atom):
                out.append((atom, 0))
            else:
                before = out.pop()[1] if out and out[-1][0] == -1 else 0
                out.append((-1, before + self.naming.s.size((atom,))))
        return out

    def rows(self, value: Value) -> list[Row]:
        """Exponents of a value: unknown for a parameter, zero for an input or constant."""
        rows = self.made.get(id(value))
        if rows is None:
            rows = []
            for d, axis in enumerate(value.axes):
                row: Row = []
                for i, atom in enumerate(self.leaves(axis)):
                    unknown = value.kind == PARAM and self.is_free(atom)
                    row.append(self.system.unknown((value, d, i, atom)) if unknown else {})
                rows.append(row)
            self.made[id(value)] = rows
        return rows

    def kill(self, rows: Iterable[Row]) -> None:
        """Requires every exponent of the rows to vanish."""
        for row in rows:
            for expr in row:
                self.system.zero(expr)

    def equate(self, a: Row, b: Row) -> None:
        """Requires two rows to agree; rows of different structure vanish."""
        if len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                self.system.equal(x, y)
        else:
            self.kill([a, b])

    def oppose(self, a: Row, b: Row) -> None:
        """Along a contracted axis the exponents of the two factors cancel."""
        if len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                self.system.zero(self.system.combine([(x, 1), (y, 1)]))
        else:
            self.kill([a, b])

    def neutral(self, value: Value) -> list[Row]:
        """Rows of a value that does not scale."""
        return [[{} for _ in self.leaves(axis)] for axis in value.axes]
