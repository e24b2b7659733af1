"""Conditions: modules that turn what a network is conditioned on into a vector.

Each has an attribute ``width``, the length of the vector, and gives entries of second moment about
1 at initialisation, which is what heads expect.
"""

import torch
from torch import Tensor, nn


class TaskEmbedding(nn.Module):
    """A learned vector for each of several tasks.

    Args:
        count: Number of tasks.
        width: Length of the vectors.
        generator: Source of randomness.
    """

    def __init__(self, count: int, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Parameter(torch.randn(count, width, generator=generator))

    def forward(self, cond: int | Tensor) -> Tensor:
        """Vectors of tasks.

        Args:
            cond: Numbers of tasks, ``(*batch,)``.

        Returns:
            ``(*batch, width)``.
        """
        return self.table[cond]
