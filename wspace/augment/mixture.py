"""`Mixture`: which rows of a batch went into each row, and what that does to their targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which rows of a batch were mixed into each row, and with which shares.

    Attributes:
        rows: Rows of the batch before it was mixed, ``(B, k)``, int64.
        shares: What each counts for, ``(B, k)``, float64; they sum to 1 in every row.
    """

    rows: Tensor
    shares: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def none(cls, count: int) -> Self:
        """The mixture of rows that were left alone.

        Args:
            count: Rows.

        Returns:
            Every row by itself, ``k = 1``.
        """
        return cls(torch.arange(count)[:, None], torch.ones(count, 1, dtype=torch.float64))

    def targets(self, values: Tensor) -> Tensor:
        """Numbers that rows have, mixed as the rows were.

        Args:
            values: Numbers before mixing, ``(B, …)``.

        Returns:
            Their weighted means, ``(B, …)``, in floats of `values`, or float32 for whole numbers.
        """
        values = values if values.is_floating_point() else values.float()
        shares = self.shares.to(values)
        return torch.einsum("bk,bk...->b...", shares, values[self.rows])

    def classes(self, labels: Tensor, count: int) -> Tensor:
        """Probabilities of classes, of rows that had one each.

        Cross entropy is linear in them: that with these is the weighted mean of the cross entropies
        with the labels of what was mixed.

        Args:
            labels: Classes before mixing, ``(B,)``.
            count: Number of classes.

        Returns:
            ``(B, count)``, float32; they sum to 1 in every row.
        """
        return self.targets(F.one_hot(labels.long(), count).float())

    def then(self, other: Self) -> Self:
        """This mixture, and another of its rows: what mixing twice comes to.

        Args:
            other: The later one; its rows are rows after the earlier.

        Returns:
            One mixture of the first rows, ``(B, k of one times k of the other)``.
        """
        rows = self.rows[other.rows]
        shares = other.shares[..., None] * self.shares[other.rows]
        return type(self)(rows.flatten(1), shares.flatten(1))

    def kept(self, chosen: Tensor) -> Self:
        """The mixture where only some rows were replaced by mixed ones.

        Args:
            chosen: Rows that were, ``(B,)``, bool.

        Returns:
            A mixture of the same shape.
        """
        own = torch.arange(len(self), device=self.rows.device)[:, None].expand_as(self.rows)
        first = torch.zeros_like(self.shares)
        first[:, 0] = 1
        chosen = chosen.to(self.rows.device)[:, None]
        rows = torch.where(chosen, self.rows, own)
        return type(self)(rows, torch.where(chosen, self.shares, first))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The mixture of batches that are laid one after another.

        Args:
            parts: One for each batch.

        Returns:
            A mixture of all their rows; where fewer were mixed, the others count for nothing.
        """
        width = max(part.rows.shape[1] for part in parts)
        rows, shares, start = [], [], 0
        for part in parts:
            missing = (0, width - part.rows.shape[1])
            rows.append(start + F.pad(part.rows, missing))
            shares.append(F.pad(part.shares, missing))
            start += len(part)
        return cls(torch.cat(rows), torch.cat(shares))

    def to(self, device: torch.device | str) -> Self:
        """The mixture on a device.

        Args:
            device: Where its tensors shall be.

        Returns:
            A mixture.
        """
        return type(self)(self.rows.to(device), self.shares.to(device))

    def __repr__(self) -> str:
        return f"Mixture({len(self)} rows of {self.rows.shape[1]} each)"
