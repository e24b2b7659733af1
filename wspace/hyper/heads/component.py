"""`ComponentHead`: one generator for all tensors, or rows, of a kind, told apart by a vector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, cast

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import Head, linear, normal_vectors, perceptron, set_apart
from wspace.hyper.target import Weight

By = Literal["shape", "role", "row"]


@dataclass(frozen=True)
class Family:
    """Weights that one last map makes.

    Attributes:
        shape: Shape of what it makes; each of its weights is a corner of it, or rows like it.
        weights: The weights.
        counts: Components of each: 1, or its rows.
    """

    shape: tuple[int, ...]
    weights: tuple[Weight, ...]
    counts: tuple[int, ...]


class ComponentHead(Head):
    """A perceptron of the condition's vector and a component's, and a last map for each family.

    Components are whole tensors, or rows of tensors, and each has a learned vector. Those of one
    family share the last map, and are made in one computation.

    Args:
        hidden: Widths of the perceptron, which all share.
        embedding: Length of a component's vector.
        by: What makes a family: ``"shape"``: tensors of one shape. ``"role"``: tensors of one role
            and number of dimensions; the map makes the largest of them, and of the others the
            entries whose indices are small enough. ``"row"``: rows (first index) of one shape,
            of all tensors; tensors of one dimension stay whole.
    """

    def __init__(
        self, hidden: Sequence[int] = (100,), *, embedding: int = 32, by: By = "shape"
    ) -> None:
        super().__init__()
        if by not in {"shape", "role", "row"}:
            raise HyperError(
                message(f"hypernetwork: unknown by={by!r}", expected="'shape', 'role' or 'row'")
            )
        self.hidden, self.embedding = tuple(hidden), embedding
        self.by: By = by

    def build(self, generator: torch.Generator | None) -> None:
        """Makes the perceptron, the last maps and the vectors of components.

        Args:
            generator: Source of randomness.
        """
        self.families = _families(self.weights, self.by)
        counts = [sum(f.counts) for f in self.families]
        self.vectors = nn.Parameter(torch.randn(sum(counts), self.embedding, generator=generator))
        sizes = [self.width + self.embedding, *self.hidden]
        self.trunk = perceptron(sizes, generator)
        n = sizes[-1]
        self.last = nn.ModuleList(linear(n, prod(f.shape), 1 / n, generator) for f in self.families)

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All weights of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        found: dict[str, Tensor] = {}
        for family, last, h in zip(self.families, self.last, self.seen(e), strict=True):
            made = last(h).split(family.counts, -2)
            for w, x in zip(family.weights, made, strict=True):
                found[w.name] = self._placed(x, w, family)
        return {w.name: found[w.name] for w in self.weights}

    def _placed(self, x: Tensor, w: Weight, family: Family) -> Tensor:
        """A weight out of its components, ``(*batch, components, entries)``."""
        batch = x.shape[:-2]
        if self.by != "role":
            return x.reshape((*batch, *w.shape))
        corner = tuple(slice(n) for n in w.shape)
        return x.reshape((*batch, *family.shape))[(..., *corner)]

    def seen(self, e: Tensor) -> Sequence[Tensor]:
        """What the last map of every family sees.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            For every family ``(*batch, components, hidden)``.
        """
        batch = e.shape[:-1]
        there = self.vectors.expand(*batch, *self.vectors.shape)
        if self.width:
            e = e[..., None, :].expand(*batch, len(self.vectors), self.width)
            there = torch.cat([e, there], -1)
        return self.trunk(there).split([sum(f.counts) for f in self.families], -2)

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Sets rows apart from each other, and gains so that variances are as given.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.
        """
        if self.by == "row":
            with torch.no_grad():
                parts = self.seen(normal_vectors(self, self.width, generator)[:64])
            for last, seen in zip(self.last, parts, strict=True):
                set_apart(cast(nn.Linear, last), seen)
        super().reset(variances, generator)

    def silence(self) -> None:
        """Sets the last maps to zero."""
        with torch.no_grad():
            for p in self.last.parameters():
                p.zero_()


def _families(weights: Sequence[Weight], by: By) -> list[Family]:
    groups: dict[object, list[Weight]] = {}
    for w in weights:
        row = by == "row" and len(w.shape) > 1
        key = (w.role, len(w.shape)) if by == "role" else (row, w.shape[1:] if row else w.shape)
        groups.setdefault(key, []).append(w)
    made: list[Family] = []
    for group in groups.values():
        shape = tuple(max(sizes) for sizes in zip(*(w.shape for w in group), strict=True))
        counts = [1] * len(group)
        if by == "row" and len(shape) > 1:
            shape, counts = shape[1:], [w.shape[0] for w in group]
        made.append(Family(shape, tuple(group), tuple(counts)))
    return made
