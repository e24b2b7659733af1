"""`Augmentation`: a random change of networks, what it does to their function, and lists of them.

An augmentation maps a graph and a generator to a graph of the same space; it never changes what it
is given. The first batch axis tells networks apart, and each is changed in its own way; symmetries,
input maps and mixing treat what lies behind, the times of a trajectory, alike. The generator is on
the CPU, and all that is random comes from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from wspace.augment.mixture import Mixture
from wspace.errors import WSpaceError, message
from wspace.graph import ParameterGraph

Effect = Literal["exact", "known input map", "approximate"]
"""What becomes of the function that a network computes.

It stays (``"exact"``); it becomes ``f(A x + t)`` with `A` and `t` that are known (``"known input
map"``); or it changes in another way (``"approximate"``).
"""

EFFECTS: tuple[Effect, ...] = ("exact", "known input map", "approximate")
"""From the one that keeps most to the one that keeps least."""

Augment = Callable[[ParameterGraph, torch.Generator], ParameterGraph]
"""A change of networks in training: an `Augmentation`, or a function of the same form."""


class Augmented(NamedTuple):
    """A graph after an augmentation.

    Attributes:
        graph: The graph, with the rows of the one before.
        mixture: What the targets of its rows are, if rows were mixed; None if each kept its own.
    """

    graph: ParameterGraph
    mixture: Mixture | None


class Augmentation(ABC):
    """A random change of networks.

    A subclass says what it makes of a graph; one that mixes networks overrides `apply` and `mixes`.

    Attributes:
        effect: What becomes of the function of a network.
    """

    effect: ClassVar[Effect]

    @property
    def mixes(self) -> bool:
        """True if targets have to be mixed with the networks."""
        return False

    @abstractmethod
    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The changed graph.

        Args:
            graph: Networks of one space; not modified.
            generator: Source of randomness, on the CPU.

        Returns:
            A graph of the same space and batch.

        Raises:
            WSpaceError: If networks are mixed, so that their targets have to be too (`apply`).
        """

    def apply(self, graph: ParameterGraph, generator: torch.Generator) -> Augmented:
        """The changed graph, and what its targets are.

        Args:
            graph: Networks of one space; not modified.
            generator: Source of randomness, on the CPU.

        Returns:
            The graph, and which rows were mixed into each.
        """
        return Augmented(self(graph, generator), None)


@dataclass(frozen=True)
class Compose(Augmentation):
    """Augmentations one after another, each on all networks or on some.

    Its `effect` is the one, of its parts, that keeps least.

    Attributes:
        augment: What is done, in order; a function of a graph and a generator will do.
        probabilities: With which each is done to a network; None for always.
    """

    augment: Sequence[Augment]
    probabilities: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            WSpaceError: If there are not as many probabilities as parts, or one is none.
        """
        p = self.probabilities
        if p is not None and (len(p) != len(self.augment) or not all(0 <= x <= 1 for x in p)):
            raise WSpaceError(
                message(
                    "Compose: probabilities do not fit",
                    expected=f"{len(self.augment)} numbers between 0 and 1",
                    got=str(list(p)),
                )
            )

    @property
    def effect(self) -> Effect:  # type: ignore[override]
        """The effect, of its parts, that keeps least."""
        return EFFECTS[max((EFFECTS.index(effect_of(a)) for a in self.augment), default=0)]

    @property
    def mixes(self) -> bool:
        """True if one of its parts mixes targets."""
        return mixes(self.augment)

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph after all parts."""
        if self.mixes:
            raise WSpaceError(unmixed(type(self).__name__))
        return self.apply(graph, generator).graph

    def apply(self, graph: ParameterGraph, generator: torch.Generator) -> Augmented:
        """The graph after all parts, and what its targets are."""
        found = Augmented(graph, None)
        for i, step in enumerate(self.augment):
            p = 1.0 if self.probabilities is None else self.probabilities[i]
            found = _after(found, step, p, generator)
        return found


def _after(
    before: Augmented, step: Augment, probability: float, generator: torch.Generator
) -> Augmented:
    graph, mixture = _applied(step, before.graph, generator)
    if probability < 1:
        chosen = torch.rand(before.graph.batch[:1], generator=generator) < probability
        graph = _chosen(chosen, graph, before.graph)
        mixture = None if mixture is None else mixture.kept(chosen)
    if mixture is None or before.mixture is None:
        return Augmented(graph, before.mixture if mixture is None else mixture)
    return Augmented(graph, before.mixture.then(mixture))


def _applied(step: Augment, graph: ParameterGraph, generator: torch.Generator) -> Augmented:
    if isinstance(step, Augmentation):
        return step.apply(graph, generator)
    return Augmented(step(graph, generator), None)


def _chosen(chosen: Tensor, new: ParameterGraph, old: ParameterGraph) -> ParameterGraph:
    """Some rows of one graph, the others of another."""
    changed = {
        name: torch.where(over_rows(chosen, x), x, old.values[name])
        for name, x in new.values.items()
        if x is not old.values[name]
    }
    return with_values(old, changed)


def effect_of(augment: Augment) -> Effect:
    """What a change does to the function of networks; of a plain function nothing is known.

    Args:
        augment: An augmentation or a function.

    Returns:
        The effect.
    """
    return augment.effect if isinstance(augment, Augmentation) else "approximate"


def mixes(augment: Sequence[Augment]) -> bool:
    """True if one of several augmentations mixes networks so that their targets are mixed too.

    Args:
        augment: Augmentations or functions.

    Returns:
        Whether targets have to be mixed.
    """
    return any(isinstance(a, Augmentation) and a.mixes for a in augment)


def augmented(
    graphs: Sequence[ParameterGraph], augment: Sequence[Augment], generator: torch.Generator
) -> tuple[list[ParameterGraph], Mixture | None]:
    """Graphs after all changes, in order; networks are mixed with others of their space only.

    Args:
        graphs: Graphs, each of another space.
        augment: What is done to each, one after another.
        generator: Source of randomness, on the CPU.

    Returns:
        New graphs of the same spaces, and which rows were mixed into each, counted over all graphs;
        None if none were. The given graphs are not changed.
    """
    found = [Compose(augment).apply(graph, generator) for graph in graphs]
    new = [one.graph for one in found]
    if all(one.mixture is None for one in found):
        return new, None
    parts = [
        Mixture.none(one.graph.batch[0] if one.graph.batch else 1)
        if one.mixture is None
        else one.mixture
        for one in found
    ]
    return new, Mixture.cat([part.to("cpu") for part in parts])


# --------------------------------------------------------------- for the augmentations


def unmixed(name: str) -> str:
    """The error of a caller that would lose what an augmentation does to targets."""
    return message(
        f"{name}: networks are mixed, so their targets have to be mixed too",
        help="call .apply(graph, generator), whose answer says what was mixed",
    )


def check_share(name: str, what: str, value: float, most: float = 1.0) -> None:
    """Raises unless an option is a number from 0 to `most`.

    Args:
        name: Of the class.
        what: Of the option.
        value: Its value.
        most: Its largest value.

    Raises:
        WSpaceError: If it is not.
    """
    if not 0 <= value <= most:
        expected = f"a number from 0 to {most:g}" if most < float("inf") else "a number from 0"
        raise WSpaceError(
            message(f"{name}: {what} makes no sense", expected=expected, got=f"{value:g}")
        )


def near(graph: ParameterGraph, generator: torch.Generator) -> torch.Generator:
    """A generator where the graph is; drawing there is faster than moving what was drawn."""
    device = next((x.device for x in graph.values.values()), torch.device("cpu"))
    if device.type == generator.device.type:
        return generator
    seed = int(torch.randint(1 << 62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def over_rows(x: Tensor, like: Tensor) -> Tensor:
    """One number for each row (or for an unbatched graph, one), to broadcast to a parameter."""
    return x.to(like.device).reshape(*x.shape, *[1] * (like.dim() - x.dim()))


def with_values(graph: ParameterGraph, changed: Mapping[str, Tensor]) -> ParameterGraph:
    """The graph with other tensors for some of its own names; nothing is checked."""
    return replace(graph, values=MappingProxyType({**graph.values, **changed}))
