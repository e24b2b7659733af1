"""`FullHead`: all weights at once, from one linear map."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wspace.hyper.heads.rows import RowsHead


class FullHead(RowsHead):
    """A perceptron whose last map has a row for every entry of the target ("generate once").

    Parameters grow as hidden × target: for large targets take `ChunkedHead` or `ComponentHead`.

    Args:
        hidden: Widths of the layers before the last map; empty for a linear hypernetwork.
        steady: Whether what the last map sees is brought to one length, so that all conditions
            begin with weights of one size.
    """

    def pieces(self) -> list[tuple[int, ...]]:
        """The shapes of the weights."""
        return [w.shape for w in self.weights]

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All weights of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        return dict(zip((w.name for w in self.weights), self.made(e), strict=True))

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Draws the rows of every weight with the variance that gives it the wanted one.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.
        """
        self.draw([variances[w.name] for w in self.weights], generator)
