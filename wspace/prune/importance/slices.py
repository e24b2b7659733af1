"""What the slices of every unit hold: sums, distances, and which slices count as weights.

A *slice* is one index of one slot of a piece (`wspace.nn.pieces`): a row of one matrix, a column of
the next, an entry of a gain. Nothing here loops over units, and all of it is equivariant.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from wspace.action import State
from wspace.errors import PruneError, message
from wspace.nn.pieces import LOW, Piece, by_unit, pieces, places
from wspace.prune.restriction import prunable
from wspace.space import Param, Role, WeightSpace

Scores = dict[str, Tensor]
"""Group → float64 ``(*batch, *sizes of over, size)``, higher = more worth keeping."""
Reduction = Literal["mean", "sum", "max", "prod", "first"]
Normalize = Literal["none", "mean", "max", "sum"]
CHUNK = 1 << 22
"""Entries of a piece that are in float64 at once when distances are measured."""
SAME = 1e-12
"""Squared distance, relative to the squared norms, at which two units count as one."""
_IDLE = (Role.UNUSED, Role.STATISTIC)
_T = TypeVar("_T")


def unit_sums(
    values: State, space: WeightSpace, *, buffers: bool = False
) -> dict[str, list[Tensor]]:
    """Sums of numbers per entry over the slices of every unit.

    Args:
        values: A number for every entry of every parameter, ``(*batch, *shape)`` by name; tied
            tensors count once. Complex numbers count as the sum of their parts.
        space: The weight space.
        buffers: Whether float buffers count too.

    Returns:
        Prunable group → ``(*batch, *sizes of over, size)``, float64, for each slot in which it
        occurs, in the order of the space. A group may occur twice in one parameter; an entry on the
        diagonal is then in both sums.

    Raises:
        SpaceMismatch: If `values` do not fit the space.

    Example:
        >>> import wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> ones = {n: torch.ones_like(x) for n, x in mlp.state_dict().items()}
        >>> [x.tolist() for x in unit_sums(ones, space)["h1"]]  # rows, biases, columns
        [[3.0, 3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]]
    """  # noqa: DOC502 (batch_of raises)
    out: dict[str, list[Tensor]] = {name: [] for name in prunable(space)}
    for group, _, x in unit_slices(values, space, buffers=buffers):
        out[group].append(x)
    return out


def unit_slices(
    values: State,
    space: WeightSpace,
    of: Callable[[Tensor], Tensor] | None = None,
    *,
    buffers: bool = False,
) -> Iterator[tuple[str, Param, Tensor]]:
    """Group, parameter and sums ``(*batch, *over, size)`` of each slot; `of` acts on entries."""
    batch, free = batch_of(values, space), prunable(space)
    held: tuple[str, ...] = ()
    given: dict[str, Tensor] = {}
    for piece in pieces(space, buffers=buffers):
        wanted = [k for k, slot in enumerate(piece.slots) if slot.group in free]
        if not wanted:
            continue
        if piece.names != held:
            held = piece.names
            given = {n: of(values[n].detach()) if of else values[n] for n in held}
        x = piece.read(given, len(batch))
        if len(wanted) > 1 < x.shape[-1]:  # what no slot holds is summed once for all
            x = x.sum(-1, keepdim=True, dtype=torch.float64)
        for k in wanted:
            y = summed(x, piece, k)
            yield piece.slots[k].group, space[piece.names[0]], y.reshape(*batch, *y.shape[1:])


def summed(x: Tensor, piece: Piece, k: int) -> Tensor:
    """Sums of a tensor of a piece's layout over all but a slot and those that it depends on.

    Args:
        x: ``(rows, *slots, rest)``.
        piece: The piece.
        k: Which slot.

    Returns:
        ``(rows, *over, size)``, float64.
    """
    where = places(piece, k)
    others = [1 + i for i in range(len(piece.slots) + 1) if i not in where]
    order = sorted(where)
    return x.sum(others, dtype=torch.float64).permute(0, *(1 + order.index(i) for i in where))


def batch_of(state: State, space: WeightSpace) -> tuple[int, ...]:
    """Batch axes of a state, which is checked to fit; buffers may be missing.

    Args:
        state: Tensors by name, ``(*batch, *shape)``.
        space: The weight space.

    Returns:
        Sizes of the leading axes.

    Raises:
        SpaceMismatch: If the state does not fit the space.
    """  # noqa: DOC502 (validate raises)
    like = {p.name: state[p.name] for p in space.params if p.name in state}
    batch: tuple[int, ...] = ()
    for p in space.params:
        if p.name in like and not p.buffer:
            shape = tuple(like[p.name].shape)
            batch = shape[: max(0, len(shape) - len(p.shape))]
            break
    for p in space.params:
        if p.buffer and p.name not in like:
            like[p.name] = torch.zeros(()).expand(*batch, *p.shape)
    space.validate(like)
    return batch


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, tied ones under every name; no copies."""
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {name: x.detach() for name, x in named}


# ----------------------------------------------------------------------------- numbers


def powers(state: State, space: WeightSpace, p: float, shifts: bool) -> dict[str, list[Tensor]]:
    """Sums of powers of weights, by group: of the slices that count; groups without are absent."""
    every: dict[str, list[tuple[Role, Tensor]]] = {}

    def power(x: Tensor) -> Tensor:
        x = x.abs() if x.is_complex() or p != 2 else x
        x = x.float() if x.dtype in LOW else x
        return x if p == 1 else x.square() if p == 2 else x.double() ** p

    for group, param, x in unit_slices(state, space, power):
        every.setdefault(group, []).append((param.role, x))
    found = {g: counted(slices, shifts) for g, slices in every.items()}
    return {g: slices for g, slices in found.items() if slices}


def counted(every: list[tuple[Role, _T]], shifts: bool) -> list[_T]:
    """The slices that count as weights: shifts only if asked for, or where there are no others."""
    used = [(role, x) for role, x in every if role not in _IDLE]
    main = [(role, x) for role, x in used if role is not Role.SHIFT]
    return [x for _, x in (used if shifts else main or used)]


def reduced(slices: list[Tensor], how: Reduction) -> Tensor:
    """Numbers per unit of several slices, combined.

    Args:
        slices: ``(*batch, *over, size)`` each; at least one.
        how: The way.

    Returns:
        ``(*batch, *over, size)``.
    """
    x = torch.stack(slices)
    if how == "first":
        return x[0]
    return x.amax(0) if how == "max" else {"mean": x.mean, "sum": x.sum, "prod": x.prod}[how](0)


def normalized(x: Tensor, dims: int, how: Normalize) -> Tensor:
    """Scores divided by their mean, largest or sum over the last `dims` axes; zeros stay."""
    if how == "none":
        return x
    axes = [*range(-dims, 0)]
    by = {"mean": x.mean, "max": x.amax, "sum": x.sum}[how](axes, keepdim=True)
    return torch.where(by > 0, x / torch.where(by > 0, by, 1.0), x)


def lamp(x: Tensor) -> Tensor:
    """Each of ``(*batch, n)`` over the sum of those no smaller; equal ones (to rounding) alike."""
    up = x.sort(-1).values
    above = up.flip(-1).cumsum(-1).flip(-1)
    first = torch.searchsorted(up, x * (1 - SAME)).clamp_max(x.shape[-1] - 1)
    return torch.where(x <= 0, 0.0, x / above.gather(-1, first).clamp_min(1e-300))  # NaN stays


def gram(state: State, piece: Piece, k: int, lead: int) -> Tensor:
    """Inner products of the units of a slot, the mean unit taken out: ``(contexts, n, n)``."""
    x = piece.read(state, lead)
    moving = [1 + j for j in range(len(piece.slots)) if k in _ruling(piece, j)]
    if moving:
        x = x.double().square().sum(moving, keepdim=True).sqrt()
    x = by_unit(x, piece, k)
    x = x.reshape(-1, *x.shape[-2:])
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, CHUNK // max(1, prod(x.shape[:2]))), -1):
        y = part.double()
        y = y - y.mean(1, keepdim=True)
        total = total + y @ y.mT
    return total


def _ruling(piece: Piece, j: int) -> set[int]:
    """Slots on which the order along a slot depends, directly or not."""
    over = set(piece.slots[j].over)
    return over.union(*(_ruling(piece, i) for i in over))


def distances(products: Tensor) -> Tensor:
    """Sums of distances to all others from inner products: ``(contexts, n)``."""
    norms = products.diagonal(dim1=-2, dim2=-1)
    both = norms[:, :, None] + norms[:, None, :]
    square = both - 2 * products
    return torch.where(square <= SAME * both, 0.0, square).sqrt().sum(-1)  # NaN stays


# ------------------------------------------------------------------------------ checks


def check_finite(name: str, scores: Scores, state: State, space: WeightSpace) -> None:
    """Checks that scores are numbers, and names the weights that are not if they are not.

    Args:
        name: Of the criterion.
        scores: By group.
        state: The weights they come from.
        space: Their space.

    Raises:
        PruneError: If a score is not finite.
    """
    wrong = [g for g, x in scores.items() if not (x.is_meta or bool(x.isfinite().all()))]
    empty = [p.name for p in space.params if p.name in state and state[p.name].is_meta]
    if not wrong and not empty:
        return
    bad = [
        f"parameter {p.name!r} with values that are not finite"
        for p in space.params
        if p.name in state and not p.buffer and not bool(state[p.name].isfinite().all())
    ] if not empty else [f"{n!r} on the meta device" for n in empty]  # fmt: skip
    raise PruneError(
        message(
            f"{name}: scores are not finite",
            expected="real weights, all finite",
            got=bad or f"an overflow in {', '.join(map(repr, wrong))}",
        )
    )


def check_option(name: str, option: str, value: str, known: tuple[str, ...]) -> None:
    """Checks an option that is one of some words.

    Args:
        name: Whose option it is.
        option: Its name.
        value: What was given.
        known: What there is.

    Raises:
        PruneError: If it is none of them.
    """
    if value not in known:
        raise PruneError(
            message(f"{name}: no such {option}",
                    expected=f"one of {', '.join(map(repr, known))}", got=repr(value))
        )  # fmt: skip
