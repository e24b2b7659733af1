"""The best signs and phases of pairs of units, all pairs at once.

Signs of one unit that meet in no tensor are chosen apart; others by elimination: the sign of each
gauge in turn is maximised over, for every choice of those it meets. The norms of a transformer meet
the residual stream and not each other, so that their number does not matter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

Key = tuple[int, ...]
_Signs = tuple[float, ...]
_Term = tuple[Key, dict[_Signs, Tensor]]


@dataclass(frozen=True, slots=True)
class Shift:
    """What a phase adds to the value of pairs: ``amount`` per turn, on `count` entries.

    Attributes:
        key: Gauges whose sign reaches these entries.
        gauge: The phase gauge.
        amount: Added to every entry, per turn.
        count: Number of entries for each unit.
        a: Sum of A's entries, broadcast to the pairs.
        b: Sum of B's.
    """

    key: Key
    gauge: int
    amount: float
    count: int
    a: Tensor
    b: Tensor


@dataclass(slots=True)
class Similarity:
    """Inner products of units of A with units of B, apart for what signs treat differently.

    Attributes:
        parts: Gauges that multiply → inner products, float64, all of one shape.
        shifts: What phases add.
    """

    parts: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    shifts: list[Shift] = field(default_factory=list[Shift])

    @property
    def some(self) -> Tensor:
        """Any of the tables."""
        return next(iter(self.parts.values()))

    def add(self, key: Key, x: Tensor) -> None:
        """Adds inner products to a part."""
        x = x.double()
        self.parts[key] = self.parts[key] + x if key in self.parts else x

    def map(self, change: Callable[[Tensor], Tensor]) -> "Similarity":
        """The same of every table of pairs changed alike."""
        some = self.some
        shifts = [
            Shift(
                s.key, s.gauge, s.amount, s.count, *(change(x.expand_as(some)) for x in (s.a, s.b))
            )
            for s in self.shifts
        ]
        return Similarity({k: change(x) for k, x in self.parts.items()}, shifts)

    def chosen(self, p: Tensor) -> "Similarity":
        """Of tables ``(rows, n, n)``, the pairs of an assignment: ``(rows, n)``."""
        return self.map(lambda x: x.gather(-1, p[..., None])[..., 0])

    def value(self, factors: Mapping[int, Tensor]) -> Tensor:
        """Value of every pair under given factors.

        Args:
            factors: Gauge → ±1 for signs, whole turns for phases, of the shape of the tables.

        Returns:
            float64, of the shape of the tables.
        """
        turning = {s.gauge for s in self.shifts}
        sign = {g: 1 - 2 * torch.remainder(x, 2) if g in turning else x for g, x in factors.items()}

        def signed(key: Key, x: Tensor) -> Tensor:
            for g in key:
                x = x * sign[g]
            return x

        total = sum((signed(key, x) for key, x in self.parts.items()), torch.zeros_like(self.some))
        for s in self.shifts:
            turn = s.amount * factors[s.gauge]
            total = total + turn * (s.a - signed(s.key, s.b)) - 0.5 * s.count * turn**2
        return total

    def best(self) -> Tensor:
        """Value of every pair under its best factors."""
        return self._search(choose=False)[0]

    def choice(self) -> tuple[Tensor, dict[int, Tensor]]:
        """Value of every pair under its best factors, and these."""
        return self._search(choose=True)

    def _search(self, *, choose: bool) -> tuple[Tensor, dict[int, Tensor]]:
        total = self.parts.get((), torch.zeros_like(self.some))
        terms = [*self._terms()]
        steps: list[tuple[int, Key, dict[_Signs, Tensor]]] = []
        while left := sorted({g for scope, _ in terms for g in scope}):
            gauge = min(left, key=lambda g: len({o for s, _ in terms if g in s for o in s}))
            joined = [term for term in terms if gauge in term[0]]
            scope, table, picks = _maximised(gauge, joined, choose=choose)
            terms = [term for term in terms if gauge not in term[0]] + [(scope, table)]
            steps.append((gauge, scope, picks))
            for empty in [t for t in terms if not t[0]]:
                total = total + empty[1][()]
            terms = [t for t in terms if t[0]]
        return total, self._picked(steps) if choose else {}

    def _terms(self) -> Iterator[_Term]:
        """What is maximised, as a sum of functions of a few signs each."""
        for key, x in self.parts.items():
            if key:
                yield (
                    key,
                    {signs: x if _even(signs) else -x for signs in _choices(len(key))},
                )
        for gauge in dict.fromkeys(s.gauge for s in self.shifts):
            here = [s for s in self.shifts if s.gauge == gauge]
            scope = tuple(sorted({gauge, *(g for s in here for g in s.key)}))
            table: dict[_Signs, Tensor] = {}
            for signs in _choices(len(scope)):
                slope, turns = self._turns(here, dict(zip(scope, signs, strict=True)))
                table[signs] = slope * turns - 0.5 * _bend(here) * turns**2
            yield scope, table

    def _turns(
        self, here: Sequence[Shift], sign: Mapping[int, float | Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gain per turn of a phase, and the best number of turns of the parity that is given."""
        slope = torch.zeros_like(self.some)
        for s in here:
            b = s.b
            for g in s.key:
                b = b * sign[g]
            slope = slope + s.amount * (s.a - b)
        odd = 0.5 - 0.5 * sign[here[0].gauge]
        return slope, 2 * torch.round((slope / _bend(here) - odd) / 2) + odd

    def _picked(self, steps: Sequence[tuple[int, Key, dict[_Signs, Tensor]]]) -> dict[int, Tensor]:
        """The factors, from the last gauge eliminated to the first."""
        sign: dict[int, Tensor] = {}
        for gauge, scope, picks in reversed(steps):
            found = torch.ones_like(self.some)
            for signs, flipped in picks.items():
                here = flipped
                for g, s in zip(scope, signs, strict=True):
                    here = here & (sign[g] == s)
                found = torch.where(here, -1.0, found)
            sign[gauge] = found
        turns = {
            gauge: self._turns([s for s in self.shifts if s.gauge == gauge], sign)[1]
            for gauge in {s.gauge for s in self.shifts}
        }
        return sign | turns


def _choices(n: int) -> Iterator[_Signs]:
    yield from product((1.0, -1.0), repeat=n)


def _even(signs: _Signs) -> bool:
    return signs.count(-1.0) % 2 == 0


def _bend(here: Sequence[Shift]) -> float:
    return sum(s.count * s.amount**2 for s in here)


def _maximised(
    gauge: int, terms: Sequence[_Term], *, choose: bool
) -> tuple[Key, dict[_Signs, Tensor], dict[_Signs, Tensor]]:
    """A sum of terms, maximised over one sign for each choice of the others."""
    scope = tuple(sorted({g for s, _ in terms for g in s} - {gauge}))
    best: dict[_Signs, Tensor] = {}
    picks: dict[_Signs, Tensor] = {}
    for signs in _choices(len(scope)):
        sign = dict(zip(scope, signs, strict=True))

        def value(s: float, sign: Mapping[int, float] = sign) -> Tensor:
            at = {**sign, gauge: s}
            first, *more = (table[tuple(at[g] for g in names)] for names, table in terms)
            return sum(more, first)

        plain, flipped = value(1.0), value(-1.0)
        best[signs] = torch.maximum(plain, flipped)
        if choose:
            picks[signs] = flipped > plain
    return scope, best, picks
