"""`LowRankHead`: matrices as products of two thin ones."""

from collections.abc import Mapping, Sequence
from math import prod, sqrt

import torch
from torch import Tensor

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import normal_vectors
from wspace.hyper.heads.rows import RowsHead
from wspace.hyper.target import Weight


class LowRankHead(RowsHead):
    """Makes U and V for every tensor, and of them U V^T / sqrt(rank), in the tensor's shape.

    A tensor is taken as a matrix of its first dimension × the others. Tensors of one dimension, and
    those that thin factors would not make smaller, are made whole. Hu et al. (2021), "LoRA"
    (arXiv 2106.09685), made from a condition. Meant for a change of a base: by itself it makes
    networks whose layers have that rank.

    Args:
        rank: Columns of the factors.
        hidden: Widths of the layers before the last map.
        steady: As in `FullHead`.
    """

    def __init__(
        self, rank: int = 4, hidden: Sequence[int] = (100,), *, steady: bool = False
    ) -> None:
        super().__init__(hidden, steady=steady)
        if rank < 1:
            raise HyperError(
                message("hypernetwork: LowRankHead needs a rank", expected="1 or more",
                        got=f"{rank}")
            )  # fmt: skip
        self.rank = rank

    def pieces(self) -> list[tuple[int, ...]]:
        """Two factors, or one whole tensor, for every weight."""
        return [s for w in self.weights for s in self._shapes(w)]

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All changes for a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        parts = iter(self.made(e))
        made: dict[str, Tensor] = {}
        for w in self.weights:
            x = next(parts)
            if len(self._shapes(w)) == 2:
                x = x @ next(parts).mT / sqrt(self.rank)
                x = x.reshape((*e.shape[:-1], *w.shape))
            made[w.name] = x
        return made

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Draws the rows so that products have the wanted variances.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.
        """
        with torch.no_grad():
            sizes = self.trunk(normal_vectors(self, self.inputs, generator)).square().sum(-1)
        spread = float(sizes.square().mean() / sizes.mean().square())  # both factors grow together
        moments: list[float] = []
        for w in self.weights:
            thin = len(self._shapes(w)) == 2
            moments += [variances[w.name] / spread, 1.0] if thin else [variances[w.name]]
        self.draw(moments, generator)

    def silence(self) -> None:
        """Sets the first factors, and whole tensors, to zero: the second ones keep a gradient."""
        first = [k == 0 for w in self.weights for k in range(len(self._shapes(w)))]
        counts = torch.tensor([prod(s) for s in self.shapes])
        rows = torch.tensor(first).repeat_interleave(counts).to(self.last.weight.device)
        with torch.no_grad():
            self.last.weight[rows] = 0.0
            self.last.bias[rows] = 0.0

    def _shapes(self, w: Weight) -> list[tuple[int, ...]]:
        if len(w.shape) < 2:
            return [w.shape]
        n, m = w.shape[0], prod(w.shape[1:])
        thin = self.rank * (n + m) < n * m
        return [(n, self.rank), (m, self.rank)] if thin else [w.shape]
