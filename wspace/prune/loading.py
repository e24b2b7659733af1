"""A pruned state in the module it came from: how many units each group has left, from shapes."""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from wspace.action import shape_of
from wspace.errors import CheckpointError, message
from wspace.io import Checkpoint, Layout, fit_checkpoint, load_checkpoint, save_checkpoint
from wspace.prune.compact import compact
from wspace.prune.pruner import Inputs, Pruner
from wspace.prune.restriction import Restriction, prunable
from wspace.space import WeightSpace
from wspace.trace.polynomials import Polynomial, of_axis

Equation = tuple[Polynomial, int, str]
COUNTS = "wspace.prune.counts"
"""Under this name the metadata of a file says how many units each group has."""


def counts_of(
    space: WeightSpace,
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many units every group has in a pruned state, from the shapes of its tensors.

    Args:
        space: Weight space of the whole network.
        shapes: Shapes by name; names of other tensors are passed over.
        known: What is known already: of attention, shapes tell only the product of heads and head
            dimensions.

    Returns:
        Prunable group → number of units.

    Raises:
        CheckpointError: If the shapes are not those of a restriction of the space, or do not
            determine it.
    """
    sizes = {n: g.size for n, g in space.all_groups.items() if n not in prunable(space)}
    sizes |= _family_sizes(space, shapes)
    sizes |= {g: n for g, n in (known or {}).items() if g in space.groups}
    equations = [
        (of_axis(axis), shapes[p.name][d], f"{p.name!r}, dimension {d}")
        for p in space.params
        if len(shapes.get(p.name, ())) == len(p.axes) and p.axes
        for d, axis in enumerate(p.axes)
    ]
    while True:
        found = False
        for terms, total, where in equations:
            unknown = {g for key in terms for g in key if g not in sizes}
            if len(unknown) == 1:
                name = unknown.pop()
                sizes[name] = _solved(terms, total, name, sizes, where)
                found = True
        if not found:
            break
    left = [g for g in prunable(space) if g not in sizes]
    if len(left) > 0 and (whole := _whole(space, sizes, equations)):
        return whole
    wrong = [
        f"{where} is {total}, but its groups have {value}"
        for terms, total, where in equations
        if (value := _value(terms, sizes)) != total and not left
    ]
    if left or wrong:
        raise CheckpointError(
            message(
                "prune: the state is not a pruned state of this network",
                expected="tensors of the network's names with some units of its groups taken out",
                got=wrong or [f"nothing that tells how many units {g!r} has" for g in left],
                help="give the module as it was before pruning, and its space; where shapes do not "
                "tell (heads and their dimensions), give counts=, or save with `prune.save`",
            )
        )
    return {g: sizes[g] for g in prunable(space)}


def load(
    module: nn.Module,
    space: WeightSpace,
    source: str | Path | Mapping[str, Tensor],
    counts: Mapping[str, int] | None = None,
    **inputs: Unpack[Inputs],
) -> nn.Module:
    """The small module that a pruned checkpoint belongs to, with its weights.

    Which units are gone does not matter, only how many: so any checkpoint of this network with
    narrower groups is loaded, whoever made it.

    Args:
        module: The network before pruning; its weights are not used and not changed.
        space: Its weight space.
        source: A checkpoint file or folder (see `wspace.load_checkpoint`), or a state by name.
        counts: Group → units left, where shapes do not tell; a file written by `save` knows.
        **inputs: ``args`` and ``kwargs``: example inputs, where the space has none.

    Returns:
        A module of the checkpoint's sizes that holds its tensors.

    Raises:
        CheckpointError: If the checkpoint is not a pruned state of this network.
        PruneError: If the module's code does not allow the sizes.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> small = wspace.prune.prune(mlp, space, amount=0.5)
        >>> wspace.prune.load(mlp, space, small.state_dict())[0].out_features
        4
    """  # noqa: DOC502 (compact raises)
    state = source if isinstance(source, Mapping) else load_checkpoint(source)
    noted = _noted(state) if isinstance(state, Checkpoint) else {}
    shapes = {n: tuple(x.shape) for n, x in state.items()}
    if unknown := [g for g in counts or {} if g not in space.groups]:
        raise CheckpointError(
            message(
                f"prune: counts of {', '.join(map(repr, unknown))}",
                expected=f"groups of the space: {', '.join(space.groups)}",
            )
        )
    counts = counts_of(space, shapes, {**noted, **(counts or {})})
    free = prunable(space)
    keep = {
        g: (torch.arange(free[g].size) < n).expand(shape_of(free[g], space))
        for g, n in counts.items()
    }
    pruner = Pruner(module, space, **inputs)
    few = Restriction(space, keep)
    small = compact(module, few, pruner.sizes.solve(few.small))
    fitted = fit_checkpoint(state, small)
    small.load_state_dict(dict(fitted), strict=False)
    return small


def save(module: nn.Module, few: Restriction, path: str | Path) -> None:
    """Writes a pruned module so that `load` needs nothing else: weights, and the counts of units.

    Args:
        module: The small module.
        few: What was kept of the large one.
        path: A new or old file, ``.safetensors``.

    Raises:
        CheckpointError: If the module is not of the small space, or the path names another format.
    """
    path = Path(path)
    state = module.state_dict()
    missing = [
        f"{p.name!r} of shape {p.shape}"
        for p in few.small.params
        if p.name not in state or tuple(state[p.name].shape) != p.shape
    ]
    if path.suffix != ".safetensors" or missing:
        raise CheckpointError(
            message(
                f"prune: {type(module).__name__} cannot be saved to {path.name}",
                expected="a module of the small space and a file .safetensors",
                got=[f"no tensor {line}" for line in missing] or f"the suffix {path.suffix!r}",
            )
        )
    notes = {"format": "pt", COUNTS: json.dumps(few.counts())}
    save_checkpoint(state, path, like=Layout("safetensors", path, metadata={path.name: notes}))


def _noted(state: Checkpoint) -> dict[str, int]:
    for notes in state.layout.metadata.values():
        if COUNTS in notes:
            return {str(g): int(n) for g, n in json.loads(notes[COUNTS]).items()}
    return {}


def _whole(
    space: WeightSpace, sizes: Mapping[str, int], equations: Sequence[Equation]
) -> dict[str, int]:
    """The counts if groups that shapes do not tell lost nothing; empty if that does not fit."""
    sizes = {**{n: g.size for n, g in prunable(space).items()}, **sizes}
    if all(_value(terms, sizes) == total for terms, total, _ in equations):
        return {g: sizes[g] for g in prunable(space)}
    return {}


def _family_sizes(space: WeightSpace, shapes: Mapping[str, Any]) -> dict[str, int]:
    """Units of groups that index families: as many as members are there."""
    present: dict[tuple[str, str], int] = {}
    for p in space.params:
        if p.at:
            key = (p.at[0], p.family)
            present[key] = present.get(key, 0) + (p.name in shapes)
    found: dict[str, int] = {}
    for (group, family), n in present.items():
        if found.setdefault(group, n) != n or not n:
            raise CheckpointError(
                message(
                    "prune: the state does not have all tensors of its branches",
                    expected=f"as many of each kind as branches are left of {group!r}",
                    got=f"{n} like {family!r} and {found[group]} of another kind",
                )
            )
    return found


def _value(terms: Polynomial, sizes: Mapping[str, int]) -> int:
    return int(sum(c * prod(sizes[g] for g in key) for key, c in terms.items()))


def _solved(terms: Polynomial, total: int, name: str, sizes: Mapping[str, int], where: str) -> int:
    """The one unknown size in an equation: linear, or a power of the size alone."""
    for n in range(1, total + 1):
        value = _value(terms, {**sizes, name: n})
        if value == total:
            return n
        if value > total:
            break
    raise CheckpointError(
        message(
            f"prune: {where} does not fit the network",
            expected=f"a size that some number of units of {name!r} gives",
            got=f"{total}",
            help="give the module that was pruned, before pruning, and its space",
        )
    )
