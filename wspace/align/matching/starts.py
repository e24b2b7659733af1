"""Where an ascent starts: the identity, chance, or what can be matched with certainty first."""

from collections.abc import Sequence

import torch

from wspace.align.matching.ascent import Ascent
from wspace.align.matching.assign import Assigner
from wspace.align.matching.blocks import Block
from wspace.align.matching.climb import apart
from wspace.align.matching.sinkhorn import anneal

WORKED_OUT = ("forward", "sinkhorn")
STARTS = (*WORKED_OUT, "identity", "random")


def begin(
    start: str, problem: Ascent, assigner: Assigner, generator: torch.Generator | None
) -> set[int]:
    """Sets an ascent to its start.

    Args:
        start: One of `STARTS`.
        problem: The ascent, at the identity; changed in place.
        assigner: Solves assignments.
        generator: Source of randomness, on the CPU.

    Returns:
        Units that may gain; the others are known to be best as they are.
    """
    if start == "random":
        scatter(problem, generator)
    elif start == "forward":
        return forward(problem, assigner)
    elif start == "sinkhorn":
        anneal(problem, assigner)
    return {*range(len(problem.units))}


def scatter(problem: Ascent, generator: torch.Generator | None) -> None:
    """Starts at random permutations.

    Args:
        problem: The ascent; changed in place.
        generator: Source of randomness, on the CPU.
    """
    for g in problem.moves.permutations:
        keys = torch.rand(problem.shape(g), generator=generator, dtype=torch.float64)
        problem.moves.permutations[g] = keys.argsort(-1).to(problem.device)


def forward(problem: Ascent, assigner: Assigner) -> set[int]:
    """Starts by matching each group by what meets only groups that are matched already.

    First the group of which most is known at once (the first layer's), then, with that matched,
    the next one.

    Args:
        problem: The ascent; changed in place.
        assigner: Solves assignments.

    Returns:
        Units that may gain; the others are known to be best as they are.
    """
    known: set[str] = {*problem.symmetry.sizes} - {g for u in problem.units for g in u}
    left, unsure = [*range(len(problem.units))], {*range(len(problem.units))}
    total = [_weight(_blocks(problem, unit)) for unit in problem.units]
    while left:
        ready = {i: _known(problem, problem.units[i], known) for i in left}
        share = {i: _weight(ready[i]) / total[i] for i in left}
        best = max(left, key=lambda i: share[i])
        whole = [i for i in left if share[i] == 1.0]
        now = apart(whole, problem.neighbours, assigner.threads) if whole else [best]
        steps = [problem.unit_step(problem.units[i], ready[i]) for i in now if ready[i]]
        gained = iter(assigner.run(steps))
        for i in now:
            if ready[i] and bool(next(gained).any()):
                unsure |= problem.neighbours[i]
            if i in whole and problem.exact(problem.units[i]):
                unsure.discard(i)
            known |= {*problem.units[i]}
            left.remove(i)
    return unsure


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
