"""The MixUp family: networks that are weighted means of two, and what their targets are.

The partner of a network is another row of its batch, so of its own space; the partners of all rows
form one random circle. A row without another stays as it is, with its target. Every parameter and
every float buffer (running statistics belong to the function) is mixed; integer entries, and what
the space does not know, stay those of the row. Each mix is approximate.

Shamsian, Navon, Zhang, Zhang, Fetaya, Chechik, Maron (2024), "Improved Generalization of Weight
Space Networks via Augmentations", section 4 (arXiv 2402.04081). There weights are uniform, and
alignment knows permutations alone.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from wspace.align.matching.match import match
from wspace.augment.approximate import Noise
from wspace.augment.augmentation import (
    Augment,
    Augmentation,
    Augmented,
    Compose,
    Effect,
    check_share,
    mixes,
    over_rows,
    unmixed,
    with_values,
)
from wspace.augment.exact import Symmetry, check_kinds
from wspace.augment.mixture import Mixture
from wspace.errors import WSpaceError, message
from wspace.graph import ParameterGraph

MATCHED = ("permutation", "sign", "phase")
"""Symmetries by which a partner is aligned where its space has them."""


@dataclass(frozen=True)
class Mixing(Augmentation):
    """What all of the family share: the weight of a row's own network.

    Attributes:
        bounds: Least and largest weight of a row's own network; uniform between them.
        beta: For weights from a Beta(beta, beta) distribution instead, laid between the bounds.
    """

    effect: ClassVar[Effect] = "approximate"

    bounds: tuple[float, float] = (0.0, 1.0)
    beta: float | None = None

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            WSpaceError: If bounds are no shares in order, or beta is not positive.
        """
        name, (low, high) = type(self).__name__, self.bounds
        check_share(name, "the lower bound", low, high)
        check_share(name, "the upper bound", high)
        if self.beta is not None and not self.beta > 0:
            raise WSpaceError(message(f"{name}: beta is positive, got {self.beta:g}"))

    def weights(self, rows: int, generator: torch.Generator) -> Tensor:
        """Weights of the own network, one for each row.

        Args:
            rows: How many.
            generator: Source of randomness, on the CPU.

        Returns:
            ``(rows,)``, float64.
        """
        low, high = self.bounds
        if self.beta is None:
            u = torch.rand(rows, dtype=torch.float64, generator=generator)
        else:  # torch draws these from its global generator only
            seed = int(torch.randint(1 << 62, (), generator=generator))
            drawn = np.random.default_rng(seed).beta(self.beta, self.beta, rows)
            u = torch.from_numpy(drawn)
        return torch.lerp(torch.full_like(u, low), torch.full_like(u, high), u)


@dataclass(frozen=True)
class PartnerMixing(Mixing):
    """Mixing with other rows; a subclass says what is done to these first.

    Attributes:
        targets: ``"mixed"``, with the weights of the networks, or ``"nearest"``: that of the
            network with the larger weight (weights-only MixUp).
    """

    targets: Literal["mixed", "nearest"] = "mixed"

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            WSpaceError: If `targets` is unknown.
        """
        super().__post_init__()
        if self.targets not in ("mixed", "nearest"):
            raise WSpaceError(
                message(
                    f"{type(self).__name__}: unknown targets",
                    expected="'mixed' or 'nearest'",
                    got=repr(self.targets),
                )
            )

    @property
    def mixes(self) -> bool:
        """True: targets have to be mixed too."""
        return True

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """Refuses, since the targets would be lost."""
        raise WSpaceError(unmixed(type(self).__name__))

    @abstractmethod
    def brought(
        self, graph: ParameterGraph, partner: ParameterGraph, generator: torch.Generator
    ) -> ParameterGraph:
        """The partners as they are mixed in.

        Args:
            graph: Networks.
            partner: The partner of each.
            generator: Source of randomness, on the CPU.

        Returns:
            A graph of the same space and batch.
        """

    def apply(self, graph: ParameterGraph, generator: torch.Generator) -> Augmented:
        """The mixed graph, and what was mixed."""
        if not graph.batch or graph.batch[0] < 2:
            return Augmented(graph, None)
        rows = graph.batch[0]
        partner, weight = circle(rows, generator), self.weights(rows, generator)
        others = {name: x[partner.to(x.device)] for name, x in graph.values.items()}
        brought = self.brought(graph, with_values(graph, others), generator)
        pairs = torch.stack([torch.arange(rows), partner], 1)
        if self.targets == "nearest":
            nearest = torch.where(weight >= 0.5, pairs[:, 0], pairs[:, 1])[:, None]
            mixture = Mixture(nearest, torch.ones_like(weight)[:, None])
        else:
            mixture = Mixture(pairs, torch.stack([weight, 1 - weight], 1))
        return Augmented(mean(graph, brought, weight), mixture)


@dataclass(frozen=True)
class MixUp(PartnerMixing):
    """Weighted means of networks as they are: approximate.

    With ``targets="nearest"`` it is weights-only MixUp.
    """

    def brought(
        self, graph: ParameterGraph, partner: ParameterGraph, generator: torch.Generator
    ) -> ParameterGraph:
        """The partners as they are."""
        del graph, generator
        return partner


@dataclass(frozen=True)
class PermutedMixUp(PartnerMixing):
    """Weighted means with partners that are moved by random symmetries first: approximate.

    Attributes:
        kinds: Which symmetries.
    """

    kinds: tuple[str, ...] = ("permutation",)

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        check_kinds("PermutedMixUp", self.kinds)

    def brought(
        self, graph: ParameterGraph, partner: ParameterGraph, generator: torch.Generator
    ) -> ParameterGraph:
        """The partners moved."""
        del graph
        return Symmetry(self.kinds)(partner, generator)


@dataclass(frozen=True)
class AlignedMixUp(PartnerMixing):
    """Weighted means with partners that are aligned to the network first: approximate.

    Attributes:
        kinds: Symmetries by which partners are aligned; those that a space does not have are left
            out.
        sweeps: Upper limit on the sweeps of `wspace.align.match`.
    """

    kinds: tuple[str, ...] = MATCHED
    sweeps: int = 100

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        check_kinds("AlignedMixUp", self.kinds)

    def brought(
        self, graph: ParameterGraph, partner: ParameterGraph, generator: torch.Generator
    ) -> ParameterGraph:
        """The partners aligned."""
        return aligned(graph, partner, self.kinds, self.sweeps, generator)


@dataclass(frozen=True)
class SelfMixUp(Mixing):
    """Weighted means of a network and an aligned changed copy of itself: approximate.

    Targets stay: nothing else is mixed in.

    Attributes:
        augment: What makes the copy.
        kinds: Symmetries by which it is aligned; those that a space does not have are left out.
        sweeps: Upper limit on the sweeps of `wspace.align.match`.
    """

    augment: Sequence[Augment] = (Symmetry(("permutation", "sign", "phase")), Noise(0.1))
    kinds: tuple[str, ...] = MATCHED
    sweeps: int = 100

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            WSpaceError: If a part of `augment` mixes networks.
        """
        super().__post_init__()
        check_kinds("SelfMixUp", self.kinds)
        if mixes(self.augment):
            raise WSpaceError(
                message("SelfMixUp: the copy of a network would be one of others too",
                        expected="augmentations that mix nothing in `augment`")
            )  # fmt: skip

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The mixed graph."""
        copy = Compose(self.augment)(graph, generator)
        brought = aligned(graph, copy, self.kinds, self.sweeps, generator)
        if not graph.batch:
            return mean(graph, brought, self.weights(1, generator)[0])
        return mean(graph, brought, self.weights(graph.batch[0], generator))


def circle(rows: int, generator: torch.Generator) -> Tensor:
    """A partner for every row, never the row itself: all rows in one random circle.

    Args:
        rows: How many, at least 2.
        generator: Source of randomness, on the CPU.

    Returns:
        ``(rows,)``, int64: every row once.
    """
    order = torch.randperm(rows, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def aligned(
    graph: ParameterGraph,
    partner: ParameterGraph,
    kinds: Sequence[str],
    sweeps: int,
    generator: torch.Generator,
) -> ParameterGraph:
    """Partners brought to networks, row by row; trajectories by their last states.

    Args:
        graph: Networks.
        partner: The partner of each.
        kinds: Symmetries that may be used; `wspace.align.match` minds those that the space has.
        sweeps: Upper limit on sweeps.
        generator: Source of randomness, on the CPU.

    Returns:
        The partners moved by symmetries.
    """
    if not kinds:
        return partner
    space = graph.space
    last = (slice(None), *[-1] * (len(graph.batch) - 1)) if graph.batch else ()
    a, b = ({name: x[last] for name, x in g.values.items()} for g in (graph, partner))
    return partner.act(match(a, b, space, kinds=kinds, sweeps=sweeps, generator=generator))


def mean(graph: ParameterGraph, other: ParameterGraph, weight: Tensor) -> ParameterGraph:
    """Weighted means of two graphs, tensor by tensor.

    Args:
        graph: Networks, ``(B, …)`` or unbatched.
        other: Networks of the same space and batch.
        weight: Of the first, ``(B,)`` or a scalar; where it is 1, the first come back bit by bit.

    Returns:
        The means; integer entries are those of `graph`.
    """
    changed: dict[str, Tensor] = {}
    for name, x in graph.values.items():
        if x.is_floating_point() or x.is_complex():
            w = over_rows(weight, x).to(x.dtype)
            changed[name] = torch.lerp(other.values[name], x, w)
    return with_values(graph, changed)
