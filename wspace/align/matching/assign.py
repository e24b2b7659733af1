"""Linear assignments, in parallel threads, for computations that run side by side.

Costs are similarities, to be maximised. An assignment `p` takes ``cost[i, p[i]]``.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
            answers = dict(zip(costs, self.solve([*costs.values()]), strict=True)) if costs else {}
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
    for pair in zip(x.split(PIECE, 1), y.split(PIECE, 1), strict=True):
        u, v = (t.double() for t in pair)
        total += (u[0] @ v[0]) if len(u) == 1 else (u * v).sum(1)
    return total
