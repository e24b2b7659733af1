"""Heads that change the values of a base: units scaled and shifted, weights masked."""

from collections.abc import Mapping, Sequence
from math import exp
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wspace.errors import HyperError, message
from wspace.hyper.heads.rows import RowsHead
from wspace.hyper.target import Weight
from wspace.space import Role


class FiLMHead(RowsHead):
    """Scales the weights of every unit by 1 + γ, and shifts its bias by β.

    With both generated, a linear layer answers (1 + γ) (W x) + b + β. Scales of norms are scaled,
    all other tensors of one dimension shifted. In tables, a unit is a column; in transposed
    convolutions an output channel, of all groups. Perez et al. (2018), "FiLM" (arXiv 1709.07871),
    on weights in place of activations.

    Args:
        hidden: Widths of the layers before the last map.
        deviation: Standard deviation of γ and β at the beginning, whatever the scheme.
    """

    needs_base: ClassVar[bool] = True

    def __init__(self, hidden: Sequence[int] = (100,), *, deviation: float = 0.1) -> None:
        super().__init__(hidden)
        self.deviation = deviation

    def pieces(self) -> list[tuple[int, ...]]:
        """A number for every unit of a weight, in a shape that fits it."""
        return [_units(w) for w in self.weights]

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """γ and β for a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)`` with 1 for all dimensions but that of the units.
        """
        return dict(zip((w.name for w in self.weights), self.made(e), strict=True))

    def merge(self, weight: Weight, made: Tensor, base: Tensor | None) -> Tensor:
        """Values of the base, scaled or shifted.

        Args:
            weight: The weight.
            made: γ or β, times the head's scale.
            base: Values of the target.

        Returns:
            Values, ``(*batch, *shape)``.
        """
        base = _there(self, base)
        shifted = len(weight.shape) < 2 and weight.role is not Role.SCALE
        return base + made if shifted else base * (1 + made)

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Draws the rows of γ and β.

        Args:
            variances: Not used: a change is relative to the base.
            generator: Source of randomness.
        """
        del variances
        self.draw([self.deviation**2] * len(self.weights), generator)


class MaskHead(RowsHead):
    """Multiplies a base by a mask σ(x + start) / σ(start), which is 1 where x is 0.

    Hard masks are 1 where x + start > 0 and else 0, with the gradient of the soft ones
    (straight-through: Bengio, Léonard, Courville 2013, arXiv 1308.3432).

    Args:
        hidden: Widths of the layers before the last map.
        by: What has a mask of its own: every ``"entry"``, or every ``"unit"`` (as in `FiLMHead`).
        hard: Whether masks are 0 or 1.
        start: How open masks begin.
        deviation: Standard deviation of x at the beginning, whatever the scheme.
    """

    needs_base: ClassVar[bool] = True

    def __init__(
        self,
        hidden: Sequence[int] = (100,),
        *,
        by: Literal["entry", "unit"] = "entry",
        hard: bool = False,
        start: float = 2.0,
        deviation: float = 0.5,
    ) -> None:
        super().__init__(hidden)
        if by not in {"entry", "unit"} or start <= 0:
            raise HyperError(
                message("hypernetwork: MaskHead cannot be made", got=f"by={by!r}, start={start}",
                        expected="by='entry' or 'unit', and a positive start")
            )  # fmt: skip
        self.by, self.hard, self.start, self.deviation = by, hard, start, deviation

    def pieces(self) -> list[tuple[int, ...]]:
        """A number for every entry, or for every unit in a shape that fits the weight."""
        return [w.shape if self.by == "entry" else _units(w) for w in self.weights]

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """What masks take away: 1 minus the mask.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, in the shapes of `pieces` behind the batch axes.
        """
        q = exp(-self.start)
        made: dict[str, Tensor] = {}
        for w, y in zip(self.weights, self.made(e), strict=True):
            x = y.clamp(-60.0, 60.0)  # the exponential stays finite in float32
            soft = -q * x.expm1() / (x.exp() + q)  # 1 - σ(x + start) / σ(start); 0 at x = 0
            made[w.name] = soft
            if self.hard:
                shut = (y + self.start <= 0).to(y.dtype)
                made[w.name] = shut + (soft - soft.detach())
        return made

    def merge(self, weight: Weight, made: Tensor, base: Tensor | None) -> Tensor:
        """Values of the base, masked.

        Args:
            weight: The weight.
            made: What is taken away, times the head's scale.
            base: Values of the target.

        Returns:
            Values, ``(*batch, *shape)``.
        """
        del weight
        return _there(self, base) * (1 - made)

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Draws the rows of the masks.

        Args:
            variances: Not used: a change is relative to the base.
            generator: Source of randomness.
        """
        del variances
        self.draw([self.deviation**2] * len(self.weights), generator)


def _units(w: Weight) -> tuple[int, ...]:
    """The weight's shape, with 1 for all dimensions but that of its units."""
    return tuple(n if k == w.axis or len(w.shape) == 1 else 1 for k, n in enumerate(w.shape))


def _there(head: RowsHead, base: Tensor | None) -> Tensor:
    if base is None:
        raise HyperError(
            message(f"hypernetwork: {type(head).__name__} changes values that are there",
                    expected="a base", got="None")
        )  # fmt: skip
    return base
