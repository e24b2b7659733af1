"""Augmentations that keep the function of a network: random elements of its symmetry group."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from wspace.action import KINDS, sample
from wspace.augment.augmentation import Augmentation, Effect
from wspace.errors import WSpaceError, message
from wspace.graph import ParameterGraph


def check_kinds(name: str, kinds: tuple[str, ...]) -> None:
    """Raises unless kinds of symmetries are known.

    Args:
        name: Who asks.
        kinds: Names of kinds.

    Raises:
        WSpaceError: If one is unknown.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown:
        raise WSpaceError(message(f"{name}: unknown kinds {unknown}", expected=f"some of {KINDS}"))


@dataclass(frozen=True)
class Symmetry(Augmentation):
    """Moves networks by random elements of their symmetry group: exact, each by its own.

    Attributes:
        kinds: Which symmetries: ``"permutation"``, ``"scale"``, ``"sign"``, ``"phase"``; kinds
            that a space does not have do nothing.
    """

    effect: ClassVar[Effect] = "exact"

    kinds: tuple[str, ...] = ("permutation",)

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            WSpaceError: If a kind is unknown.
        """
        check_kinds("Symmetry", self.kinds)

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph with its units relabelled and rescaled."""
        batch = graph.batch[:1]
        return graph.act(sample(graph.space, batch=batch, generator=generator, kinds=self.kinds))
