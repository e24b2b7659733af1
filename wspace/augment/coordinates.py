"""Augmentations that change a network's function by a map of its input, exactly.

For networks of coordinates: images, shapes and fields. After ``W ← W A`` and ``b ← b + W t`` for
every matrix that the input is multiplied with and the vector added there, the network computes
``f(A x + t)``. Which matrices these are is in the wiring of the space, where `wspace.trace` found
it; a network that reads its input in any other way is refused. Whether labels survive is for the
user to say: a digit that is mirrored is another one.

The rotations, zooms and shifts of Shamsian et al. (2024), "Improved Generalization of Weight Space
Networks via Augmentations" (arXiv 2402.04081), for any number of coordinates and any network that
reads them so.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import radians
from typing import ClassVar

import torch
from torch import Tensor

from wspace.augment.augmentation import Augmentation, Effect, check_share, with_values
from wspace.errors import SpaceMismatch, WSpaceError, message
from wspace.graph import ParameterGraph
from wspace.graph.structure import wiring_of
from wspace.space import WeightSpace
from wspace.wiring import Input

Map = tuple[Tensor, Tensor | None]
"""A matrix, ``(*rows, d, d)``, and a shift, ``(*rows, d)``, or None for no shift."""


@dataclass(frozen=True)
class InputMap(Augmentation):
    """What all of them share: a subclass draws the maps.

    Attributes:
        input: Which of the tensors that the networks take, counted as they were traced.
    """

    effect: ClassVar[Effect] = "known input map"

    input: int = field(default=0, kw_only=True)

    @abstractmethod
    def maps(self, rows: int, size: int, generator: torch.Generator) -> Map:
        """Random maps of coordinates.

        Args:
            rows: How many.
            size: Coordinates.
            generator: Source of randomness, on the CPU.

        Returns:
            Matrices ``(rows, size, size)`` and shifts ``(rows, size)`` or None, float64.
        """

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph whose networks read mapped coordinates."""
        size = input_of(graph.space, self.input).size
        matrix, shift = self.maps(graph.batch[0] if graph.batch else 1, size, generator)
        if not graph.batch:
            matrix, shift = matrix[0], None if shift is None else shift[0]
        return with_input(graph, matrix, shift, input=self.input)


@dataclass(frozen=True)
class Centred(InputMap):
    """Maps around a point that stays where it is.

    Attributes:
        center: The point; one number for all coordinates, or one for each. Anything but 0 needs
            networks with biases.
    """

    center: float | tuple[float, ...] = field(default=0.0, kw_only=True)

    @abstractmethod
    def matrices(self, rows: int, size: int, generator: torch.Generator) -> Tensor:
        """Random matrices, ``(rows, size, size)``, float64."""

    def maps(self, rows: int, size: int, generator: torch.Generator) -> Map:
        """Random matrices, and the shifts that keep the center."""
        matrix = self.matrices(rows, size, generator)
        given = (self.center,) * size if isinstance(self.center, int | float) else self.center
        if len(given) != size:
            name = type(self).__name__
            text = f"{name}: the center does not fit the input"
            raise WSpaceError(message(text, expected=f"{size} numbers", got=str(len(given))))
        center = torch.tensor(given, dtype=torch.float64)
        return matrix, center - matrix @ center if any(given) else None


@dataclass(frozen=True)
class Translate(InputMap):
    """Moves what a network shows: known input map ``f(x + t)``.

    Attributes:
        most: Largest shift of a coordinate, in its own units; uniform up to it both ways.
    """

    most: float = 0.25

    def __post_init__(self) -> None:
        """Checks the options."""
        check_share("Translate", "most", self.most, float("inf"))

    def maps(self, rows: int, size: int, generator: torch.Generator) -> Map:
        """Random shifts."""
        u = torch.rand(rows, size, dtype=torch.float64, generator=generator)
        eye = torch.eye(size, dtype=torch.float64).expand(rows, -1, -1)
        return eye, self.most * (2 * u - 1)


@dataclass(frozen=True)
class Rotate(Centred):
    """Turns what a network shows: known input map ``f(A x)``, `A` a rotation.

    Two coordinates turn by the angle; more turn in a random plane.

    Attributes:
        degrees: Largest angle; uniform up to it both ways.
    """

    degrees: float = 30.0

    def __post_init__(self) -> None:
        """Checks the options."""
        check_share("Rotate", "degrees", self.degrees, 360.0)

    def matrices(self, rows: int, size: int, generator: torch.Generator) -> Tensor:
        """Random rotations.

        Args:
            rows: How many.
            size: Coordinates.
            generator: Source of randomness, on the CPU.

        Returns:
            ``(rows, size, size)``, float64.

        Raises:
            WSpaceError: If there is one coordinate, which cannot turn.
        """
        if size < 2:
            text = f"Rotate: {size} coordinate cannot turn"
            raise WSpaceError(message(text, expected="2 coordinates or more", help="use Flip"))
        u = torch.rand(rows, dtype=torch.float64, generator=generator)
        angle = (radians(self.degrees) * (2 * u - 1))[:, None, None]
        plane = torch.eye(size, 2, dtype=torch.float64).expand(rows, -1, -1)
        if size > 2:
            drawn = torch.randn(rows, size, 2, dtype=torch.float64, generator=generator)
            plane = torch.linalg.qr(drawn).Q
        quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        still, turned = plane @ plane.mT, plane @ quarter @ plane.mT
        eye = torch.eye(size, dtype=torch.float64)
        return eye + (angle.cos() - 1) * still + angle.sin() * turned


@dataclass(frozen=True)
class Zoom(Centred):
    """Scales what a network shows: known input map ``f(A x)``, `A` diagonal and positive.

    Attributes:
        share: Factors are uniform between 1 - share and 1 + share; above 1, what is shown shrinks.
        each: True for a factor of its own for every coordinate.
    """

    share: float = 0.2
    each: bool = False

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            WSpaceError: If `share` is no number from 0 and below 1.
        """
        if not 0 <= self.share < 1:
            text = "Zoom: share makes no sense"
            expected = "a number from 0 and below 1, so that nothing is mirrored"
            raise WSpaceError(message(text, expected=expected, got=f"{self.share:g}"))

    def matrices(self, rows: int, size: int, generator: torch.Generator) -> Tensor:
        """Random zooms."""
        drawn = size if self.each else 1
        u = torch.rand(rows, drawn, dtype=torch.float64, generator=generator)
        return torch.diag_embed((1 + self.share * (2 * u - 1)).expand(rows, size))


@dataclass(frozen=True)
class Flip(Centred):
    """Mirrors what a network shows: known input map ``f(A x)``, `A` diagonal with ±1.

    Attributes:
        axes: Coordinates that may be mirrored; None for all.
        probability: For each of them.
    """

    axes: Sequence[int] | None = None
    probability: float = 0.5

    def __post_init__(self) -> None:
        """Checks the options."""
        check_share("Flip", "probability", self.probability)

    def matrices(self, rows: int, size: int, generator: torch.Generator) -> Tensor:
        """Random reflections.

        Args:
            rows: How many.
            size: Coordinates.
            generator: Source of randomness, on the CPU.

        Returns:
            ``(rows, size, size)``, float64.

        Raises:
            WSpaceError: If the input does not have one of `axes`.
        """
        axes = list(range(size)) if self.axes is None else list(self.axes)
        if any(not 0 <= a < size for a in axes):
            text = f"Flip: axes {axes} of {size} coordinates"
            raise WSpaceError(message(text, expected=f"numbers from 0 to {size - 1}"))
        u = torch.rand(rows, len(axes), dtype=torch.float64, generator=generator)
        signs = torch.ones(rows, size, dtype=torch.float64)
        signs[:, axes] = torch.where(u < self.probability, -1.0, 1.0).double()
        return torch.diag_embed(signs)


def input_of(space: WeightSpace, number: int = 0, *, shifted: bool = False) -> Input:
    """How networks read an input, where a map of it is a map of their weights.

    Args:
        space: Their weight space.
        number: Of the input.
        shifted: True if it is to be shifted, which biases have to take up.

    Returns:
        The matrices that it is multiplied with, and their biases.

    Raises:
        SpaceMismatch: If the input is read in another way too, is not known, or meets a matrix
            without a bias and is to be shifted.
    """
    inputs = wiring_of(space).inputs
    if not 0 <= number < len(inputs):
        raise SpaceMismatch(
            message(
                f"augment: no input {number}",
                expected=f"one of the {len(inputs)} tensors that the networks take",
                help=""
                if inputs
                else "the space is of an earlier version of wspace: trace the module, or build the "
                "zoo, anew",
            )
        )
    found = inputs[number]
    if found.others or not found.readings:
        raise SpaceMismatch(
            message(
                f"augment: no change of weights maps input {number} of these networks",
                expected="an input that is multiplied with matrices, and read by nothing else",
                got=[f"it is read by {name}" for name in found.others] or "an input nothing reads",
            )
        )
    bare = [r.param for r in found.readings if not r.biases]
    if shifted and bare:
        raise SpaceMismatch(
            message(
                f"augment: input {number} cannot be shifted",
                expected="a bias of its own after every matrix that reads the input",
                got=[f"none after {name!r}" for name in bare],
                help="Rotate, Zoom and Flip around 0 need no bias",
            )
        )
    return found


def with_input(
    graph: ParameterGraph, matrix: Tensor, shift: Tensor | None = None, *, input: int = 0
) -> ParameterGraph:
    """Networks that compute ``f(A x + t)``, exactly.

    Args:
        graph: Networks; not modified.
        matrix: `A`, ``(*rows, d, d)``, where `rows` are the first batch axes of the graph, or none.
        shift: `t`, ``(*rows, d)``; None for none.
        input: Which of the tensors that the networks take.

    Returns:
        A graph of the same space.

    Raises:
        SpaceMismatch: If the networks read the input in another way than by matrices, have no bias
            for the shift, or the map does not fit.
    """
    found = input_of(graph.space, input, shifted=shift is not None)
    d, rows = found.size, graph.batch[: matrix.dim() - 2]
    if matrix.shape != (*rows, d, d) or (shift is not None and shift.shape != (*rows, d)):
        raise SpaceMismatch(
            message(
                "augment: the map does not fit the input",
                expected=f"a matrix of shape {(*rows, d, d)} and a shift of shape {(*rows, d)}",
                got=f"{tuple(matrix.shape)}"
                + ("" if shift is None else f" and {tuple(shift.shape)}"),
            )
        )
    changed: dict[str, Tensor] = {}
    behind = len(graph.batch) - len(rows)
    for reading in found.readings:
        name = reading.param
        x = changed[name] if name in changed else graph.values[name].clone()
        part = x.narrow(x.dim() - 2 + reading.dim, reading.start, d)
        part = part if reading.dim == 1 else part.mT
        a = matrix.reshape(*rows, *[1] * behind, d, d).to(x)
        for bias in reading.biases if shift is not None else ():
            t = shift.reshape(*rows, *[1] * behind, d, 1).to(x)  # type: ignore[union-attr]
            before = changed.get(bias, graph.values[bias])
            changed[bias] = before + (part @ t).squeeze(-1)
        part.copy_(part @ a)
        changed[name] = x
    return with_values(graph, changed)
