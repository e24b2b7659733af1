"""`RowsHead`: a perceptron whose last map has rows of its own for everything that is made."""

from collections.abc import Sequence
from math import prod, sqrt

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import Head, linear, normal_vectors, perceptron


class RowsHead(Head):
    """Base of heads that make everything at once. A subclass says what, in `pieces`.

    Args:
        hidden: Widths of the layers before the last map; empty for a linear hypernetwork.
        steady: Whether what the last map sees is brought to one length, so that all conditions
            begin with weights of one size.
    """

    def __init__(self, hidden: Sequence[int] = (100,), *, steady: bool = False) -> None:
        super().__init__()
        self.hidden, self.steady = tuple(hidden), steady

    def pieces(self) -> list[tuple[int, ...]]:
        """Shapes of what the last map makes, in order."""
        raise NotImplementedError

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
                    f"hypernetwork: {type(self).__name__} needs a condition",
                    help="TaskEmbedding(1, width) is one vector that is learned",
                )
            )
        self.shapes, self.inputs = self.pieces(), self.width
        sizes = [self.width, *self.hidden]
        self.trunk = perceptron(sizes, generator)
        if self.steady:
            self.trunk.append(nn.RMSNorm(sizes[-1], elementwise_affine=False))
        total = sum(map(prod, self.shapes))
        self.last = linear(sizes[-1], total, 1 / sizes[-1], generator)

    def made(self, e: Tensor) -> list[Tensor]:
        """What the last map makes of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            For every piece, ``(*batch, *shape)``: views of one tensor.
        """
        parts = self.last(self.trunk(e)).split([prod(s) for s in self.shapes], -1)
        batch = e.shape[:-1]
        return [p.reshape((*batch, *s)) for p, s in zip(parts, self.shapes, strict=True)]

    def draw(self, moments: Sequence[float], generator: torch.Generator | None) -> None:
        """Draws the rows of every piece so that its entries have given second moments.

        Args:
            moments: For every piece.
            generator: Source of randomness.
        """
        counts = torch.tensor([prod(s) for s in self.shapes])
        rows = torch.tensor([sqrt(m) for m in moments]).repeat_interleave(counts)
        with torch.no_grad():
            e = normal_vectors(self, self.inputs, generator)
            seen = self.trunk(e).square().sum(-1).mean()
            self.last.weight.normal_(generator=generator)
            self.last.weight.mul_(rows.to(self.last.weight)[:, None] / seen.sqrt())
            self.last.bias.zero_()

    def silence(self) -> None:
        """Sets the last map to zero."""
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()
