"""Which node of the parameter graph is which unit of which group."""

from functools import lru_cache

import torch
from torch import Tensor

from wspace.graph.structure import Structure, structure_of, units_of
from wspace.prune.learned.effects import strips
from wspace.prune.restriction import prunable
from wspace.space import WeightSpace
from wspace.wiring import Block, Ends


@lru_cache(maxsize=64)
def unit_nodes(space: WeightSpace) -> dict[str, tuple[Tensor, Tensor]]:
    """The nodes that stand for units of each prunable group.

    A node stands for a unit if entries of parameters that are attached to it belong to that unit,
    on the side where the entries run over the node's set. Node sets that are products (heads ×
    head dims) give several nodes to a unit of the outer group, and so do groups with several node
    sets, as a residual stream has.

    Args:
        space: Weight space with a wiring.

    Returns:
        Group name → nodes, numbered over all sets, and their units, row-major in
        ``(*sizes of over, size)``: int64 tensors of one length, each pair once. Empty where no
        node could be found.

    Raises:
        SpaceMismatch: If the space has no wiring.
    """  # noqa: DOC502 (structure_of raises)
    structure = structure_of(space)
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for name, group in prunable(space).items():
        where, pairs = strips(space, group), list[Tensor]()
        for block in structure.blocks:
            for numbers in where.get(block.param, []):
                for ends in (block.source, block.target):
                    if ends is not None:
                        pairs += _pairs(structure, block, ends, numbers)
        found = torch.cat([torch.zeros(0, 2, dtype=torch.int64), *pairs]).unique(dim=0)
        out[name] = found[:, 0], found[:, 1]
    return out


def _pairs(structure: Structure, block: Block, ends: Ends, numbers: Tensor) -> list[Tensor]:
    """Nodes of one end of a block and the units of its entries, ``(k, 2)``; or nothing."""
    # only the dimensions along which numbers vary are looked at, and the loops over them
    dims = [d for d, n in enumerate(numbers.shape) if n > 1]
    loops = [k for k, d in enumerate(block.of) if d in dims]
    if not set(loops) & set(ends.loops):
        return []
    for d in dims:
        start, stop, step = block.window[d]
        numbers = numbers.narrow(d, start, stop - start)
        numbers = numbers.index_select(d, torch.arange(0, stop - start, step))
    order = sorted(loops, key=lambda k: (block.of[k], k))
    x = numbers.reshape([block.sizes[k] for k in order])
    for at, k in reversed(list(enumerate(order))):
        if k not in ends.loops:  # not of this end: entries have to agree
            if bool((x != x.select(at, 0).unsqueeze(at)).any()):
                return []
            x = x.select(at, 0)
    order = [k for k in order if k in ends.loops]
    x = x.permute([order.index(k) for k in sorted(order)])
    shape = [block.sizes[k] if k in order else 1 for k in range(len(block.sizes))]
    nodes = units_of(ends, block.sizes)
    units = x.reshape(shape).expand_as(nodes) if x.numel() else x.reshape(0)
    known = units >= 0
    if not bool(known.any()):
        return []
    nodes = nodes + structure.offsets[ends.nodes]
    return [torch.stack([nodes[known], units[known]], 1)]
