"""Weights: tensors computed from parameters alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wspace.trace.wire.units import Leaf, State, Weight, extend, varying
from wspace.trace.wire.views import Ids


def blend(weights: Sequence[Weight], op: str) -> Weight:
    """A weight computed elementwise from others; a parameter counts once."""
    leaves: dict[int, Leaf] = {}
    for w in weights:
        for leaf in w.leaves:
            old = leaves.get(leaf.param)
            if old is None or (old.whole and not leaf.whole):
                leaves[leaf.param] = replace(leaf, trail=extend(leaf.trail, op))
    return Weight(tuple(leaves.values()))


def join_weights(states: list[State], sizes: list[int], d: int, rank: int) -> Weight:
    """Weights side by side along a dimension; what is no weight leaves a gap."""
    leaves: list[Leaf] = []
    start, total = 0, sum(sizes)
    for s, n in zip(states, sizes, strict=True):
        for leaf in s.leaves if isinstance(s, Weight) else ():
            coords: list[Ids] = []
            for k, c in enumerate(leaf.coords):
                if k and c.shape[d] == 1:
                    coords.append(c)
                    continue
                full = list(c.shape)
                full[d] = n
                rim = [(0, 0)] * c.ndim
                rim[d] = (start, total - start - n)
                padded = np.broadcast_to(c, full)
                coords.append(np.pad(padded, rim, constant_values=0 if k else -1))
            leaves.append(replace(leaf, coords=tuple(coords)))
        start += n
    return Weight(tuple(leaves))


def reduce_weight(
    weight: Weight, rank: int, dims: set[int], gone: tuple[int, ...], op: str
) -> Weight:
    """A weight summed, averaged … over dimensions, of which those in `gone` are dropped."""
    return Weight(
        tuple(
            replace(
                leaf,
                coords=tuple(drop(c, dims, gone) for c in leaf.coords),
                trail=extend(leaf.trail, op),
                whole=leaf.whole
                or (leaf.coords if any(varying(c, rank) & dims for c in leaf.coords) else ()),
            )
            for leaf in weight.leaves
        )
    )


def drop(a: Ids, dims: set[int], gone: tuple[int, ...]) -> Ids:
    """The first index along some dimensions, of which those in `gone` are removed."""
    for d in dims:
        a = a.take([0], d) if a.shape[d] > 1 else a
    return a.squeeze(gone) if gone else a
