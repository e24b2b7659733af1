"""Assignments: linear ones in parallel threads, and the best signs and phases of each pair of units.

Costs are similarities, to be maximised. An assignment `p` takes ``cost[i, p[i]]``.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Self

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Ask = Generator[Tensor, Tensor, Any]
"""A computation that yields costs ``(rows, n, n)`` and is sent assignments ``(rows, n)``, int64."""
WORTH_A_THREAD = 96
"""Smallest assignment (units) that is worth handing to another thread; below, scipy needs less time
than the hand-over."""

PIECE = 1 << 19
"""Numbers that are made float64 at a time."""


class Assigner:
    """Solves linear assignments, several at once.

    Args:
        threads: How many threads; 1 solves them in the caller's.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.solved = 0
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, asks: Sequence[Ask]) -> list[Any]:
        """Runs computations side by side; what they ask for at the same time is solved together.

        Args:
            asks: The computations.

        Returns:
            What they return.
        """
        results: list[Any] = [None] * len(asks)
        answers: dict[int, Tensor | None] = dict.fromkeys(range(len(asks)))
        while answers:
            costs: dict[int, Tensor] = {}
            for i, answer in answers.items():
                try:
                    costs[i] = next(asks[i]) if answer is None else asks[i].send(answer)
                except StopIteration as stop:
                    results[i] = stop.value
            answers = dict(zip(costs, self.solve([*costs.values()]), strict=True))
        return results

    def solve(self, costs: Sequence[Tensor]) -> list[Tensor]:
        """The best assignment of each row of each of several costs.

        Args:
            costs: Each ``(rows, n, n)``, of its own `n`.

        Returns:
            For each, ``(rows, n)``, int64, on its device.
        """
        tables = [c.detach().to("cpu", torch.float64).numpy() for c in costs]
        rows = [row for table in tables for row in table]
        self.solved += len(rows)
        large = [row for row in rows if len(row) >= WORTH_A_THREAD]
        if self.threads > 1 and len(large) > 1:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads)
            found = self._pool.map(_assigned, rows)
        else:
            found = map(_assigned, rows)
        out: list[Tensor] = []
        for table, cost in zip(tables, costs, strict=True):
            answer = np.empty(table.shape[:2], dtype=np.int64)
            for i in range(len(table)):
                answer[i] = next(found)
            out.append(torch.from_numpy(answer).to(cost.device))
        return out


def _assigned(cost: np.ndarray) -> np.ndarray:
    return linear_sum_assignment(cost, maximize=True)[1]


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each row of two tensors, ``(rows,)``, computed in float64."""
    x, y = x.flatten(1), y.flatten(1)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for u, v in zip(x.split(PIECE, 1), y.split(PIECE, 1), strict=True):
        u, v = u.double(), v.double()
        total += (u[0] @ v[0]) if len(u) == 1 else (u * v).sum(1)
    return total


# -------------------------------------------------------------- signs and phases

Key = tuple[int, ...]


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

    def add(self, key: Key, x: Tensor) -> None:
        """Adds inner products to a part."""
        x = x.double()
        self.parts[key] = self.parts[key] + x if key in self.parts else x

    def map(self, change: Callable[[Tensor], Tensor]) -> "Similarity":
        """The same of every table of pairs changed alike."""
        some = next(iter(self.parts.values()))
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
        total = torch.zeros((), dtype=torch.float64)
        for key, x in self.parts.items():
            for g in key:
                x = x * sign[g] if g in sign else x
            total = total + x.cpu() if total.device != x.device and total.dim() else x + total.to(x)
        for s in self.shifts:
            k = factors[s.gauge]
            b = s.b
            for g in s.key:
                b = b * sign[g] if g in sign else b
            total = total + s.amount * k * (s.a - b) - 0.5 * s.count * (s.amount * k) ** 2
        return total

    def best(self) -> Tensor:
        """Value of every pair under its best factors."""
        return self._search(choose=False)[0]

    def choice(self) -> tuple[Tensor, dict[int, Tensor]]:
        """Value of every pair under its best factors, and these."""
        return self._search(choose=True)

    def _search(self, *, choose: bool) -> tuple[Tensor, dict[int, Tensor]]:
        some = next(iter(self.parts.values()))
        total = self.parts.get((), torch.zeros_like(some))
        found: dict[int, Tensor] = {}
        for gauges, keys, shifts in self._components():
            best, chosen = None, {}
            for value, factors in self._options(gauges, keys, shifts):
                if best is None:
                    best, chosen = value, factors
                    continue
                if choose:
                    better = value > best
                    chosen = {g: torch.where(better, factors[g], chosen[g]) for g in gauges}
                best = torch.maximum(best, value)
            if best is not None:
                total, found = total + best, found | chosen
        return total, found

    def _options(
        self, gauges: list[int], keys: list[Key], shifts: list[Shift]
    ) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
        """Value of every pair for each combination of signs, and the factors; neutral ones first."""
        some = next(iter(self.parts.values()))
        for signs in product((1.0, -1.0), repeat=len(gauges)):
            sign = dict(zip(gauges, signs, strict=True))

            def of(key: Key, sign: Mapping[int, float] = sign) -> float:
                return float(np.prod([sign[g] for g in key]))

            value = torch.zeros_like(some)
            for key in keys:
                value = value.add(self.parts[key], alpha=of(key))
            factors = {g: torch.full_like(some, s) for g, s in sign.items()}
            for gauge in dict.fromkeys(s.gauge for s in shifts):
                here = [s for s in shifts if s.gauge == gauge]
                slope = sum(
                    (s.amount * (s.a - of(s.key) * s.b) for s in here), torch.zeros_like(some)
                )
                bend = sum(s.count * s.amount**2 for s in here)
                odd = 0.5 - 0.5 * sign[gauge]
                turns = 2 * torch.round((slope / bend - odd) / 2) + odd
                value = value + slope * turns - 0.5 * bend * turns**2
                factors[gauge] = turns
            yield value, factors

    def _components(self) -> list[tuple[list[int], list[Key], list[Shift]]]:
        """Gauges that must be chosen together, with the parts and shifts that they reach."""
        sets: list[set[int]] = []
        links = [set(k) for k in self.parts] + [{s.gauge, *s.key} for s in self.shifts]
        for link in links:
            if link:
                meet = [s for s in sets if s & link]
                sets = [s for s in sets if not s & link] + [link.union(*meet)]
        return [
            (
                sorted(s),
                [k for k in self.parts if s & {*k}],
                [x for x in self.shifts if x.gauge in s],
            )
            for s in sorted(sets, key=min)
        ]
