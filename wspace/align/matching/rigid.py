"""Groups moved as they are, with all that depends on them: those that occur twice, and signs."""

from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wspace.align.matching.assign import Ask
from wspace.align.matching.blocks import Block
from wspace.align.matching.quadratic import EVERY, quadratic

if TYPE_CHECKING:
    from wspace.align.matching.ascent import Ascent

Blocks = Sequence[Block]


def rearranged(of: "Ascent", g: str, here: Blocks) -> Ask:
    """A better permutation of a group that some block has twice; its dependants ride along."""
    n = of.symmetry.sizes[g]
    rows = of.rows * of.of_contexts(g)
    none = torch.zeros(rows, dtype=torch.float64, device=of.device)
    if g not in of.symmetry.permuted:
        return none
    before = of.total(here)
    if any(_crossed(block, g) for block in here):
        by = _tried(of, g, here) if n <= EVERY else (yield _slopes(of, g, here))
    else:
        linear = torch.zeros(rows, n, n, dtype=torch.float64, device=of.device)
        pairs: list[tuple[Tensor, Tensor]] = []
        for block in here:
            a, b = of.read(block, g, skip=())
            if len(block.places(g)) == 1:
                linear += a @ b.mT
            else:
                pairs.append((a, b))
        by, gain = yield from quadratic(linear, pairs)
        still = torch.arange(n, device=of.device)
        by = torch.where((gain > of.contexts(g, of.least(here)))[:, None], by, still)
    kept = of.moves.copy()
    gain = _ridden(of, g, by, here) - before
    good = gain > of.least(here)
    of.moves.put_where(~good, kept)
    return torch.where(good, gain, 0.0)


def _ridden(of: "Ascent", g: str, by: Tensor, here: Blocks) -> Tensor:
    """Inner product of blocks once a group is rearranged, ``(rows,)``."""
    of.moves.ride(g, by.reshape(of.shape(g)), of.symmetry.dependants[g], of.symmetry.gauges)
    return of.total(here)


def _tried(of: "Ascent", g: str, here: Blocks) -> Tensor:
    """The best of all permutations of few units, in one context after another."""
    n, contexts = of.symmetry.sizes[g], of.of_contexts(g)
    best = of.total(here)
    chosen = torch.arange(n, device=of.device).repeat(of.rows, contexts, 1)
    start = of.moves
    for c in range(contexts):
        for p in permutations(range(n)):
            trial = chosen.clone()
            trial[:, c] = torch.tensor(p, device=of.device)
            of.moves = start.copy()
            value = _ridden(of, g, trial, here)
            better = value > best + of.least(here)
            best = torch.where(better, value, best)
            chosen = torch.where(better[:, None, None], trial, chosen)
    of.moves = start
    return chosen


def _slopes(of: "Ascent", g: str, here: Blocks) -> Tensor:
    """Gain of each unit moving to each place, were all others to stay: one table per context."""
    n = of.symmetry.sizes[g]
    rows = of.rows * of.of_contexts(g)
    total = torch.zeros(rows, n, n, dtype=torch.float64, device=of.device)
    for block in here:
        a, b = block.load()
        b = of.moves.apply(block.slots, b, frozenset())
        for k in block.places(g):
            front = [0, *(1 + o for o in block.slots[k].over), 1 + k]
            order = [*front, *(d for d in range(a.dim()) if d not in front)]
            x, y = (t.permute(order).reshape(rows, n, -1) for t in (a, b))
            total += x @ y.mT
    return total


def turned(of: "Ascent", g: str, here: Blocks) -> Tensor:
    """Turns signs of a group's units where that gains, gauge by gauge; the gain of each row."""
    gain = torch.zeros(of.rows, dtype=torch.float64, device=of.device)
    least = of.least(here)
    for i, name in of.symmetry.gauges.items():
        odd = [(b, [k for k in b.places(g) if i in of.key(b.slots[k])]) for b in here]
        if name != g or i in of.symmetry.phases or any(len(ks) > 1 for _, ks in odd):
            continue
        slope = torch.zeros(of.shape(g), dtype=torch.float64, device=of.device)
        for block, ks in odd:
            if ks:
                a, b = block.load()
                b = of.moves.apply(block.slots, b, frozenset())
                stay = [0, *(1 + o for o in block.slots[ks[0]].over), 1 + ks[0]]
                order = [*stay, *(d for d in range(a.dim()) if d not in stay)]
                product = (a.double() * b).permute(order)
                slope += product.flatten(len(stay)).sum(-1)
        wrong = slope < -least.reshape(-1, *[1] * (slope.dim() - 1))
        of.moves.factors[i] = torch.where(wrong, -1.0, 1.0) * of.moves.factors[i]
        gain += torch.where(wrong, -2 * slope, 0.0).flatten(1).sum(1)
    return gain


def _crossed(block: Block, g: str) -> bool:
    """True if a group is in a block three times, or in two contexts that differ."""
    places = block.places(g)
    return len(places) > 2 or len({block.slots[k].over for k in places}) > 1
