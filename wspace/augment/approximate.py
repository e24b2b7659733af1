"""Augmentations that change the function of a network a little; labels are taken to stay."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wspace.augment.augmentation import (
    Augmentation,
    Effect,
    check_share,
    near,
    over_rows,
    with_values,
)
from wspace.graph import ParameterGraph
from wspace.space import Role

WEIGHTS = frozenset({Role.MATRIX, Role.TABLE})
"""Roles of parameters that may be thinned out: no biases, no norms."""


@dataclass(frozen=True)
class Noise(Augmentation):
    """Adds normal noise to parameters: approximate.

    Buffers stay, and so do integer parameters and tensors of equal entries.

    Attributes:
        std: Standard deviation of the noise over that of the tensor's own entries, network by
            network.
    """

    effect: ClassVar[Effect] = "approximate"

    std: float = 0.05

    def __post_init__(self) -> None:
        """Checks the options."""
        check_share("Noise", "std", self.std, float("inf"))

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph with noise on its parameters."""
        source, lead, changed = near(graph, generator), len(graph.batch), {}
        for p in graph.space.params:
            x = graph.values[p.name]
            if p.buffer or not p.numel or not (x.is_floating_point() or x.is_complex()):
                continue
            entries = x.flatten(lead) if x.dim() > lead else x[..., None]
            spread = entries.std(-1, correction=0).reshape(*graph.batch, *[1] * (x.dim() - lead))
            noise = torch.randn(x.shape, generator=source, device=x.device, dtype=x.dtype)
            changed[p.name] = x + self.std * spread * noise
        return with_values(graph, changed)


@dataclass(frozen=True)
class Drop(Augmentation):
    """Sets random weights to zero, as pruning at random does: approximate.

    Attributes:
        share: Probability for an entry of a weight matrix; biases and norms stay, the survivors are
            not scaled up.
    """

    effect: ClassVar[Effect] = "approximate"

    share: float = 0.1

    def __post_init__(self) -> None:
        """Checks the options."""
        check_share("Drop", "share", self.share)

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph with some weights missing."""
        source = near(graph, generator)

        def thinned(x: Tensor) -> Tensor:
            kept = torch.rand(x.shape, generator=source, device=x.device) >= self.share
            return x.masked_fill(~kept, 0)

        return _each_weight(graph, thinned)


@dataclass(frozen=True)
class Quantile(Augmentation):
    """Sets the smallest weights to zero, as pruning by magnitude does: approximate.

    Every weight matrix of every network loses its entries below a quantile of their absolute
    values, which is drawn between 0 and `most`.

    Attributes:
        most: Largest quantile.
    """

    effect: ClassVar[Effect] = "approximate"

    most: float = 0.1

    def __post_init__(self) -> None:
        """Checks the options."""
        check_share("Quantile", "most", self.most)

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph with the smallest weights missing."""
        lead = len(graph.batch)

        def thinned(x: Tensor) -> Tensor:
            entries = x.detach().abs().flatten(lead)
            u = torch.rand(graph.batch[:1], dtype=torch.float64, generator=generator)
            gone = (self.most * u * entries.shape[-1]).long().to(x.device)
            gone = over_rows(gone, entries).expand(*graph.batch, 1)
            endless = entries.new_full((*graph.batch, 1), torch.inf)
            ranked = torch.cat([entries.sort(-1).values, endless], -1)
            return x.masked_fill((entries < ranked.gather(-1, gone)).reshape(x.shape), 0)

        return _each_weight(graph, thinned)


def _each_weight(graph: ParameterGraph, change: Callable[[Tensor], Tensor]) -> ParameterGraph:
    changed = {
        p.name: change(graph.values[p.name])
        for p in graph.space.params
        if p.role in WEIGHTS and p.numel and not p.buffer
    }
    return with_values(graph, changed)
