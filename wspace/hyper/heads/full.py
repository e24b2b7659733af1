"""`FullHead`: all weights at once, from one linear map."""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import Head, linear, perceptron, split


class FullHead(Head):
    """A perceptron whose last map has a row for every entry of the target ("generate once").

    Parameters grow as hidden × target: for large targets take `ChunkedHead` or `ComponentHead`.

    Args:
        hidden: Widths of the layers before the last map; empty for a linear hypernetwork.
    """

    def __init__(self, hidden: Sequence[int] = (100,)) -> None:
        super().__init__()
        self.hidden = tuple(hidden)

    def build(self, generator: torch.Generator | None) -> None:
        """Makes the layers.

        Args:
            generator: Source of randomness.

        Raises:
            HyperError: If there is no condition.
        """
        if not self.width:
            raise HyperError(
                message(
                    "hypernetwork: FullHead needs a condition",
                    help="TaskEmbedding(1, width) is one vector that is learned",
                )
            )
        sizes = [self.width, *self.hidden]
        self.trunk = perceptron(sizes, generator)
        self.last = linear(sizes[-1], self.numel, 1 / sizes[-1], generator)

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All weights of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        return split(self.last(self.trunk(e)), self.weights)

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Draws the rows of every weight with the variance that gives it the wanted one.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.
        """
        n = self.last.in_features
        moment = 0.5 if self.hidden else 1.0  # of rectified entries that had second moment 1
        deviations = [sqrt(variances[w.name] / (n * moment)) for w in self.weights]
        counts = torch.tensor([w.numel for w in self.weights])
        rows = torch.tensor(deviations).repeat_interleave(counts)
        with torch.no_grad():
            self.last.weight.normal_(generator=generator).mul_(rows.to(self.last.weight)[:, None])
            self.last.bias.zero_()

    def silence(self) -> None:
        """Sets the last map to zero."""
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()
