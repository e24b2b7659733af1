"""The last step of a wiring: what no block holds, depths, activations and groups of node sets."""

from collections import Counter
from dataclasses import replace

import numpy as np

from wspace.space import Axis
from wspace.trace.derive import Naming
from wspace.trace.program import Value
from wspace.trace.wire.places import block_of, fit
from wspace.trace.wire.units import Builder
from wspace.wiring import Block, NodeSet, Wiring


def leftovers(b: Builder) -> None:
    """What no block holds becomes a feature of the global unit, or of units of its own."""
    for i, value in enumerate(b.params):
        rank = len(value.shape)
        for window in b.ledger.rest(i):
            coords = [np.zeros((1,) * rank, np.int64)]
            for k, w in enumerate(window):
                shape = [-1 if j == k else 1 for j in range(len(window))]
                coords.append(np.arange(*w).reshape(shape))
            sizes = [len(range(*w)) for w in window]
            ends = [
                b.new_units(sizes, dims, "hidden", "rest", False) for dims in _free_parts(b, value)
            ]
            for shape in fit(b.sets, coords, ends or [np.zeros((1,) * rank, np.int64)]):
                b.blocks.append(block_of(shape, b.names[i], "global", "rest"))


def _free_parts(b: Builder, value: Value) -> list[set[int]]:
    """Dimensions that may be permuted, in at most two sets; dependent ones together."""
    s = b.solver
    dims = [d for d in range(len(value.shape)) if value.shape[d] > 1 and b.free(value, [d])]
    atoms = {d: set(s.resolve(value.axes[d])) for d in dims}
    parts: list[set[int]] = []
    for d in dims:
        near = {
            e
            for e in dims
            if any(s.over(x) & atoms[e] for x in atoms[d])
            or any(s.over(x) & atoms[d] for x in atoms[e])
        }
        touching = [p for p in parts if p & near]
        parts = [p for p in parts if not p & near] + [set().union({d}, *touching)]
    if len(parts) > 2:
        parts = [parts[0], set().union(*parts[1:])]
    return parts


def finish(b: Builder, outputs: dict[int, list[str]], naming: Naming) -> Wiring:
    """The wiring: occurrences of blocks told apart, node sets with what their blocks say of them.

    Args:
        b: Node sets and blocks.
        outputs: Numbers of the sets that the module returns, with their last operators.
        naming: Named groups of the parameters.

    Returns:
        The wiring.
    """
    used = {0, *outputs}
    for block in b.blocks:
        used |= {e.nodes for e in (block.source, block.target) if e is not None}
    number = {old: new for new, old in enumerate(sorted(used))}
    depth, acts = dict.fromkeys(number, 0), {old: dict[str, None]() for old in number}
    groups: dict[int, dict[str, None]] = {old: {} for old in number}
    axes = {v.names[0]: [naming.axis(t) for t in naming.trees[id(v)]] for v in b.params}
    blocks: list[Block] = []
    seen: Counter[tuple[object, ...]] = Counter()
    for found in b.blocks:
        block = found
        if block.source is None:
            key = (
                block.target.nodes,
                block.op,
                block.tag,
                block.window if block.structural else (),
            )
            seen[key] += 1
            if seen[key] > 1 and not _same_use(block, blocks):
                block = replace(block, tag=f"{block.tag}#{seen[key]}")
        else:
            source, target = block.source.nodes, block.target.nodes
            depth[target] = max(depth[target], depth[source] + 1)
            acts[source].update(dict.fromkeys(_acts(block.tag)))
        _note_groups(groups, block, axes)
        blocks.append(block)
    for old, trails in outputs.items():
        acts[old].update((f"out:{x}", None) for trail in trails for x in _acts(trail))
    nodes = tuple(
        NodeSet(
            b.sets.sizes[old],
            "output" if old in outputs and old else b.sets.kinds[old],
            b.sets.ops[old],
            depth[old],
            b.sets.fixed[old],
            tuple(acts[old]),
            tuple(groups[old]),
        )
        for old in number
    )
    return Wiring(
        nodes, tuple(_renumber(x, number) for x in blocks), tuple(dict.fromkeys(b.unknown))
    )


def _same_use(block: Block, blocks: list[Block]) -> bool:
    """True if the last block is another piece of the same use."""
    last = blocks[-1] if blocks else None
    return last is not None and (last.param, last.op) == (block.param, block.op)


def _acts(tag: str) -> list[str]:
    trail = tag.rsplit("|", maxsplit=1)[-1] if "|" in tag or "=" not in tag else ""
    return [x for x in trail.split(";") if x and not x.isdigit()]


def _note_groups(
    groups: dict[int, dict[str, None]], block: Block, axes: dict[str, list[Axis]]
) -> None:
    for ends in (block.source, block.target):
        if ends is None or block.structural:
            continue
        for loop in ends.loops:
            k = block.of[loop]
            if k >= 0:
                names = (g.name for g in axes[block.param][k].groups() if not g.fixed)
                groups[ends.nodes].update(dict.fromkeys(names))


def _renumber(block: Block, number: dict[int, int]) -> Block:
    ends = [
        None if e is None else replace(e, nodes=number[e.nodes])
        for e in (block.source, block.target)
    ]
    assert ends[1] is not None
    return replace(block, source=ends[0], target=ends[1])
