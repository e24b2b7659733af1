"""`ChunkedHead`: all weights in a row, cut into chunks that one small generator makes."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import (
    Head,
    linear,
    normal_vectors,
    perceptron,
    set_apart,
    split,
)

PARTS = 512
"""Chunks that are looked at to set them apart."""


class ChunkedHead(Head):
    """A perceptron of the condition's vector and a chunk's vector; its last map makes a chunk.

    The vectors of chunks are learned, and the same for all conditions. The last chunk is cut off at
    the end of the target. Parameters grow as hidden × chunk, and for the rest only as the number of
    chunks. Von Oswald, Henning, Grewe, Sacramento (2020), "Continual learning with hypernetworks",
    section 2.3 (arXiv 1906.00695).

    Entries that have the same place in different chunks come from one row of the last map. Where a
    unit's weights fill several chunks, their sum varies more than that of independent ones: take
    chunks of several times the largest fan-in (with one of 64 for 64 inputs, activations of a
    network without a base grow by 4 in 6 layers; with one of 1,000 they keep their size).

    Args:
        chunk: Entries of a chunk.
        hidden: Widths of the perceptron.
        embedding: Length of a chunk's vector.
        at_once: Chunks that are made at a time; None for all of them. In training, those batches
            are computed again on the way back, so that their hidden layers take no memory (which
            the transforms of `torch.func` do not support).
    """

    def __init__(
        self,
        chunk: int,
        hidden: Sequence[int] = (100,),
        *,
        embedding: int = 32,
        at_once: int | None = None,
    ) -> None:
        super().__init__()
        if chunk < 1 or embedding < 1 or (at_once is not None and at_once < 1):
            raise HyperError(
                message("hypernetwork: ChunkedHead needs sizes of at least 1",
                        got=f"chunk={chunk}, embedding={embedding}, at_once={at_once}")
            )  # fmt: skip
        self.chunk, self.hidden = chunk, tuple(hidden)
        self.embedding, self.at_once = embedding, at_once

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.numel // self.chunk)

    def build(self, generator: torch.Generator | None) -> None:
        """Makes the perceptron and the vectors of the chunks.

        Args:
            generator: Source of randomness.
        """
        self.chunks = nn.Parameter(torch.randn(self.count, self.embedding, generator=generator))
        sizes = [self.width + self.embedding, *self.hidden]
        self.trunk = perceptron(sizes, generator)
        self.last = linear(sizes[-1], self.chunk, 1 / sizes[-1], generator)

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All weights of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        if self.at_once is None or self.at_once >= self.count:
            return split(self.rows(e, self.chunks).flatten(-2), self.weights)
        again = torch.is_grad_enabled()
        parts = [
            cast(Tensor, checkpoint(self.rows, e, c, use_reentrant=False))
            if again
            else self.rows(e, c)
            for c in self.chunks.split(self.at_once)
        ]
        return split(torch.cat([p.flatten(-2) for p in parts], -1), self.weights)

    def rows(self, e: Tensor, chunks: Tensor) -> Tensor:
        """Chunks of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.
            chunks: Vectors of chunks, ``(n, embedding)``.

        Returns:
            Their entries, ``(*batch, n, chunk)``.
        """
        return self.last(self.seen(e, chunks))

    def seen(self, e: Tensor, chunks: Tensor) -> Tensor:
        """What the last map sees.

        Args:
            e: Vectors, ``(*batch, width)``.
            chunks: Vectors of chunks, ``(n, embedding)``.

        Returns:
            ``(*batch, n, hidden)``.
        """
        batch = e.shape[:-1]
        there = chunks.expand(*batch, *chunks.shape)
        if self.width:
            e = e[..., None, :].expand(*batch, len(chunks), self.width)
            there = torch.cat([e, there], -1)
        return self.trunk(there)

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Sets chunks apart from each other, and gains so that variances are as given.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.
        """
        some = self.chunks[:PARTS]
        with torch.no_grad():
            set_apart(self.last, self.seen(normal_vectors(self, self.width, generator)[:64], some))
        super().reset(variances, generator)

    def silence(self) -> None:
        """Sets the last map to zero."""
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()
