"""Where an ascent starts: the identity, chance, or what can be matched with certainty first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wspace.align.ascent import Ascent
from wspace.align.assign import Assigner
from wspace.align.blocks import Block

STARTS = ("forward", "sinkhorn", "identity", "random")


def begin(
    start: str, problem: Ascent, assigner: Assigner, generator: torch.Generator | None
) -> None:
    """Sets an ascent to its start.

    Args:
        start: One of `STARTS`.
        problem: The ascent, at the identity; changed in place.
        assigner: Solves assignments.
        generator: Source of randomness, on the CPU.
    """
    if start == "random":
        scatter(problem, generator)
    elif start == "forward":
        forward(problem, assigner)


def scatter(problem: Ascent, generator: torch.Generator | None) -> None:
    """Starts at random permutations.

    Args:
        problem: The ascent; changed in place.
        generator: Source of randomness, on the CPU.
    """
    for g in problem.moves.permutations:
        keys = torch.rand(problem.shape(g), generator=generator, dtype=torch.float64)
        problem.moves.permutations[g] = keys.argsort(-1).to(problem.device)


def forward(problem: Ascent, assigner: Assigner) -> None:
    """Starts by matching each group by what meets only groups that are matched already.

    First the group of which most is known at once (the first layer's), then, with that matched,
    the next one.

    Args:
        problem: The ascent; changed in place.
        assigner: Solves assignments.
    """
    known: set[str] = {*problem.symmetry.sizes} - {g for u in problem.units for g in u}
    left = [*range(len(problem.units))]
    while left:
        ready = {i: _known(problem, problem.units[i], known) for i in left}
        share = {i: _weight(ready[i]) / _weight(_blocks(problem, problem.units[i])) for i in left}
        best = max(left, key=lambda i: share[i])
        if ready[best]:
            assigner.run([problem.unit_step(problem.units[best], ready[best])])
        known |= {*problem.units[best]}
        left.remove(best)


def _blocks(problem: Ascent, unit: Sequence[str]) -> list[Block]:
    return [b for b in problem.blocks if any(b.places(g) for g in unit)]


def _known(problem: Ascent, unit: Sequence[str], known: set[str]) -> list[Block]:
    """Blocks of a unit whose other groups are known or fixed."""
    settled = known | {*unit}
    free = problem.symmetry.sizes
    blocks = _blocks(problem, unit)
    return [b for b in blocks if all(s.group in settled for s in b.slots if s.group in free)]


def _weight(blocks: Sequence[Block]) -> float:
    return sum(float(b.size) for b in blocks)
