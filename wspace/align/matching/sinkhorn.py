"""Soft assignments, annealed: a start that lets all groups find each other at the same time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wspace.align.matching.ascent import Ascent
from wspace.align.matching.assign import Assigner
from wspace.align.matching.blocks import Block

TEMPERATURES = tuple(0.7**k for k in range(12))
"""Of the annealing, in units of the spread of the costs; from nearly uniform to nearly hard."""
NORMALISATIONS = 20
"""Rows and columns are normalised so often at each temperature."""


def anneal(problem: Ascent, assigner: Assigner) -> None:
    r"""Starts at the projection of soft assignments.

    A soft assignment is a doubly stochastic matrix ``P``. With B moved by those of all other groups
    and ``C`` the inner products, that of a group becomes the maximum of ``<C, P> + T H(P)``, with
    `H` the entropy: the matrix ``exp(C / T)``, rows and columns normalised in turn (Sinkhorn and
    Knopp 1967; Cuturi 2013, arXiv:1306.0895). `T` falls. Groups with dependants, and these, stay at
    the identity.

    Args:
        problem: The ascent; changed in place.
        assigner: Solves assignments.
    """
    s = problem.symmetry
    groups = [g for g in s.sizes if g in s.permuted and not s.over[g] and not s.dependants[g]]
    soft: dict[str, Tensor] = {}
    for g in groups:
        n = s.sizes[g]
        soft[g] = torch.full((problem.rows, n, n), 1 / n, device=problem.device)
    for temperature in TEMPERATURES:
        for g in groups:
            slopes = _slopes(problem, g, soft)
            spread = slopes.std((1, 2), keepdim=True).clamp(min=torch.finfo(slopes.dtype).tiny)
            soft[g] = normalised(slopes / (temperature * spread))
    for g, p in zip(groups, assigner.solve([*soft.values()]), strict=True):
        problem.moves.permutations[g] = p


def _slopes(problem: Ascent, g: str, soft: Mapping[str, Tensor]) -> Tensor:
    """Inner products of units of A with units of B, which all others have moved softly."""
    n = problem.symmetry.sizes[g]
    total = torch.zeros(problem.rows, n, n, device=problem.device)
    for block in problem.of[g]:
        a, b = block.load()
        for k in block.places(g):
            x = a.movedim(1 + k, 1).flatten(2)
            y = _moved(block, b, k, soft).movedim(1 + k, 1).flatten(2)
            total += (x @ y.mT).to(total.dtype)
    return total


def _moved(block: Block, b: Tensor, but: int, soft: Mapping[str, Tensor]) -> Tensor:
    """B of a block, all slots but one moved by soft assignments."""
    for k, slot in enumerate(block.slots):
        if k != but and slot.group in soft:
            front = b.movedim(1 + k, 1)
            mixed = soft[slot.group].to(b.dtype) @ front.flatten(2)
            b = mixed.reshape(front.shape).movedim(1, 1 + k)
    return b


def normalised(logits: Tensor) -> Tensor:
    """``exp(logits)`` with rows and columns scaled to sum to 1.

    Args:
        logits: ``(rows, n, n)``.

    Returns:
        Doubly stochastic matrices, up to what is left after the last scaling.
    """
    kernel = (logits - logits.amax(2, keepdim=True)).exp()
    rows = torch.ones_like(kernel[:, :, :1])
    columns = torch.ones_like(kernel[:, :1])
    least = torch.finfo(kernel.dtype).tiny
    for _ in range(NORMALISATIONS):
        columns = 1 / (kernel * rows).sum(1, keepdim=True).clamp(min=least)
        rows = 1 / (kernel * columns).sum(2, keepdim=True).clamp(min=least)
    return kernel * rows * columns
