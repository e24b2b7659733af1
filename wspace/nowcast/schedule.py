"""How far a training run jumps, and when: the horizon of every jump."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

from wspace.errors import NowcastError, message


@dataclass(frozen=True)
class Decay:
    """Horizons that fall from the longest to 1 over a run, as a power of time.

    ``K_j = round(linspace(longest^(1/power), 1, n)_j ^ power)`` for ``n = max(1, total // period)``
    jumps. A jump after the last of the run has horizon 1.

    Attributes:
        longest: Horizon of the first jump, in spacings of the history.
        power: Exponent; 1 falls in a line, more falls faster at first.

    Example:
        >>> Decay().table(5000, 1000)
        (40, 25, 13, 5, 1)

    References:
        Knyazev et al. (2025), Accelerating training with neuron interaction and nowcasting
        networks, ICLR. arXiv:2409.04434 (there "k-decay")
    """

    longest: int = 40
    power: float = 2.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            NowcastError: If they are not positive.
        """
        if self.longest < 1 or not self.power > 0:
            raise NowcastError(
                message(
                    "Decay: impossible options",
                    expected="longest of at least 1, and a positive power",
                    got=f"longest={self.longest}, power={self.power}",
                )
            )

    def table(self, total_steps: int, period: int) -> tuple[int, ...]:
        """Horizons of all jumps of a run.

        Args:
            total_steps: Optimizer steps of the whole run.
            period: Steps from jump to jump.

        Returns:
            One horizon for each jump; for a run shorter than a period, the longest alone.
        """
        count = max(1, total_steps // period)
        top = sqrt(self.longest) if self.power == 2 else self.longest ** (1 / self.power)
        step = (1 - top) / max(1, count - 1)
        return tuple(round((top + j * step) ** self.power) for j in range(count))


DECAY = Decay()
"""The published schedule."""

Horizon = int | Decay | Callable[[int], int]
"""Horizon of the jumps: always the same, decaying, or a function of the step of the jump."""


def horizon_at(horizon: Horizon, step: int, period: int, total_steps: int | None) -> int:
    """Horizon of the jump at a step.

    Args:
        horizon: As the user gave it.
        step: A multiple of `period`.
        period: Steps from jump to jump.
        total_steps: Steps of the whole run; only `Decay` needs it.

    Returns:
        Number of spacings, at least 0.

    Raises:
        NowcastError: If a function gives something else, or `Decay` has no total.
    """
    if isinstance(horizon, Decay):
        if total_steps is None:
            raise NowcastError(
                message(
                    "Nowcaster: horizons that decay need the length of the run",
                    expected="total_steps=...",
                    help="or give a fixed horizon, such as horizon=10",
                )
            )
        table, at = horizon.table(total_steps, period), step // period - 1
        return table[at] if at < len(table) else 1
    found: Any = horizon if isinstance(horizon, int) else horizon(step)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise NowcastError(
            message(
                f"Nowcaster: impossible horizon at step {step}",
                expected="a whole number of spacings, at least 0",
                got=repr(found),
            )
        )
    return found
