"""Models of one architecture made one: interpolation and merging, in one frame.

Given a space, the models are first matched, so that the units that are combined do the same thing.
What happens to one tensor is in `combine`. Every result also comes as a `LazyState`, from
`interpolating` and `merging`: its tensors are computed one at a time, while they are written.

Rules for all functions here:

- Floating-point and complex tensors are combined. Every state must have the same ones; names that
  only some have are an error that lists them.
- Others (counters, indices, masks) are never averaged: they are those of the first state. Where
  another state has them too, those of more than one entry must be equal.
- Names tied in all states, or by the space, stay tied, and are computed once.
- Types and devices are those of the first state; what is narrower than float32 is computed in it.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from wspace.action import State
from wspace.align.combine import Kind, Method, Name, check_kind, interpolated, merged
from wspace.align.matching.match import match, match_many
from wspace.align.matching.pairing import Moved, batch_of
from wspace.errors import MergeError, message
from wspace.io import LazyState
from wspace.io.layout import tied_names
from wspace.space import WeightSpace

Align = bool | Literal["first", "many"]


def interpolate(
    a: State,
    b: State,
    t: float | Sequence[float] | Tensor,
    *,
    kind: Kind = "linear",
    space: WeightSpace | None = None,
    kinds: Sequence[str] = ("permutation",),
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""States on a line from `a` to `b`; matched first if a space is given.

    ``"linear"``: :math:`(1 - t)\, a + t\, b`. ``"spherical"``: along an arc, tensor by tensor, see
    `combine.interpolated`. With a space, :math:`b` is first brought to :math:`a` by
    ``act(match(a, b, space), b, space)``. The ends are bit for bit `a` and (the moved) `b`.

    Args:
        a: State at 0. With a space, leading batch axes count models, each matched for itself.
        b: State at 1.
        t: Where; a sequence or 1-D tensor gives all tensors a new leading axis of that length.
        kind: ``"linear"`` or ``"spherical"``.
        space: Weight space of both; None to take them as they are.
        kinds: Symmetries to match by.
        generator: For the matching.

    Returns:
        New tensors for all that is floating point; the others are those of `a`.

    Raises:
        MergeError: If names, shapes or integers of the two do not agree, or an option is unknown.
        SpaceMismatch: If a state does not fit the space.

    Example:
        >>> a, b = {"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([8.0, 0.0])}
        >>> interpolate(a, b, 0.25)["w"]
        tensor([2., 3.])
        >>> interpolate(a, b, [0, 1])["w"].shape
        torch.Size([2, 2])
    """
    return _whole(interpolating(a, b, t, kind=kind, space=space, kinds=kinds, generator=generator))


def interpolating(
    a: State,
    b: State,
    t: float | Sequence[float] | Tensor,
    *,
    kind: Kind = "linear",
    space: WeightSpace | None = None,
    kinds: Sequence[str] = ("permutation",),
    generator: torch.Generator | None = None,
) -> LazyState:
    """As `interpolate`, one tensor at a time.

    Args:
        a: State at 0.
        b: State at 1.
        t: Where.
        kind: ``"linear"`` or ``"spherical"``.
        space: Weight space of both; None to take them as they are.
        kinds: Symmetries to match by.
        generator: For the matching, which is done now.

    Returns:
        A state that computes its tensors when they are asked for.

    Raises:
        MergeError: If the two do not agree, or an option is unknown.
    """
    check_kind(kind)
    several = not isinstance(t, float | int) and torch.as_tensor(t).dim() > 0
    places = torch.as_tensor(t, dtype=torch.float64).reshape(-1).tolist()
    if not torch.as_tensor(t).dim() <= 1:
        raise MergeError(message("interpolate: t has too many axes", expected="at most one"))
    batch = check_agreement([a, b], space, "interpolate")
    end = b
    if space is not None:
        end = Moved(match(a, b, space, kinds=kinds, generator=generator), b, space)

    def compute(name: str) -> Tensor:
        x = a[name]
        if not combines(x):
            return x.expand(len(places), *x.shape) if several else x
        y = end[name]
        found = [interpolated(x, y, place, kind=kind, batch=batch) for place in places]
        return torch.stack(found) if several else found[0]

    outline = dict(a)
    if several:
        outline = {n: x.new_empty((len(places), *x.shape), device="meta") for n, x in a.items()}
    return LazyState(outline, compute, ties=_ties([a, b], space))


def merge(
    states: Sequence[State],
    space: WeightSpace | None = None,
    *,
    method: Name = "average",
    weights: Sequence[float] | None = None,
    base: State | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    align: Align = True,
    kinds: Sequence[str] = ("permutation",),
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One state of several; matched first if a space is given.

    The methods, their formulas and sources are in `combine.Method`.

    Args:
        states: The models. With a space, leading batch axes count models side by side.
        space: Weight space of all; None to take them as they are.
        method: ``"average"``, ``"slerp"``, ``"task"`` or ``"ties"``.
        weights: One for each state. ``"average"``, ``"slerp"`` and ``"ties"`` take them relative to
            their sum, ``"task"`` as they are; equal (for ``"task"``: 1) if None.
        base: Common ancestor, for ``"task"`` and ``"ties"``.
        density: Share of entries of each tensor that ``"ties"`` keeps.
        scale: Factor of what ``"task"`` and ``"ties"`` add to the base.
        align: Whether to match: True or ``"first"`` brings each model to the base, or to the first
            model without one; ``"many"`` brings all into one frame that is nobody's own
            (`match_many`), without a base only; False takes them as they are.
        kinds: Symmetries to match by.
        generator: For the matching.

    Returns:
        New tensors for all that is floating point; the others are those of the first state.

    Raises:
        MergeError: If the states do not agree, or an option is impossible.
        SpaceMismatch: If a state does not fit the space.

    Example:
        >>> states = [{"w": torch.tensor([float(i), 1.0])} for i in range(4)]
        >>> merge(states)["w"], merge(states, weights=[0, 0, 1, 1])["w"]
        (tensor([1.5000, 1.0000]), tensor([2.5000, 1.0000]))
        >>> merge(states[2:], method="task", base=states[1])["w"]
        tensor([4., 1.])
    """
    return _whole(
        merging(
            states, space, method=method, weights=weights, base=base, density=density,
            scale=scale, align=align, kinds=kinds, generator=generator,
        )
    )  # fmt: skip


def merging(
    states: Sequence[State],
    space: WeightSpace | None = None,
    *,
    method: Name = "average",
    weights: Sequence[float] | None = None,
    base: State | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    align: Align = True,
    kinds: Sequence[str] = ("permutation",),
    generator: torch.Generator | None = None,
) -> LazyState:
    """As `merge`, one tensor at a time.

    Args:
        states: The models.
        space: Weight space of all; None to take them as they are.
        method: ``"average"``, ``"slerp"``, ``"task"`` or ``"ties"``.
        weights: One for each state.
        base: Common ancestor, for ``"task"`` and ``"ties"``.
        density: Share of entries of each tensor that ``"ties"`` keeps.
        scale: Factor of what ``"task"`` and ``"ties"`` add to the base.
        align: How to match; see `merge`.
        kinds: Symmetries to match by.
        generator: For the matching, which is done now.

    Returns:
        A state that computes its tensors when they are asked for.

    Raises:
        MergeError: If the states do not agree, or an option is impossible.
    """
    shares = None if weights is None else tuple(map(float, weights))
    how = Method(method, len(states), shares, density, scale)
    many = align == "many"
    if many and base is not None or align not in {True, False, "first", "many"}:
        raise MergeError(
            message(
                f"merge: align={align!r} {'with a base' if many else 'is unknown'}",
                expected="True, False, 'first', or, without a base, 'many'",
            )
        )
    everyone = [*states, *([] if base is None else [base])]
    batch = check_agreement(everyone, space, "merge")
    read = list[State](states)
    if space is not None and align and many:
        moves = match_many(states, space, kinds=kinds, generator=generator)
        read = [Moved(t, x, space) for t, x in zip(moves, states, strict=True)]
    elif space is not None and align:
        frame = states[0] if base is None else base
        moves = {i: match(frame, x, space, kinds=kinds, generator=generator)
                 for i, x in enumerate(states) if x is not frame}  # fmt: skip
        read = [Moved(moves[i], x, space) if i in moves else x for i, x in enumerate(states)]

    def compute(name: str) -> Tensor:
        if not combines(states[0][name]):
            return states[0][name]
        origin = None if base is None else base[name]
        return merged([x[name] for x in read], how, origin, batch=batch)

    return LazyState(states[0], compute, ties=_ties(everyone, space))


# ------------------------------------------------------------------------------- parts


def _whole(state: LazyState) -> dict[str, Tensor]:
    first = {name: group[0] for group in state.ties for name in group}
    out: dict[str, Tensor] = {}
    for name in state:
        source = first.get(name, name)
        out[name] = out[source] if source in out else state[source]
        out.setdefault(source, out[name])
    return {name: out[name] for name in state}


def combines(x: Tensor) -> bool:
    """True for a tensor that is averaged, False for one that is taken from the first state."""
    return x.is_floating_point() or x.is_complex()


def _ties(states: Sequence[State], space: WeightSpace | None) -> list[list[str]]:
    """Names that are one tensor: by the space, and beyond it those that are one in all states."""
    params, by_space = ((), {}) if space is None else (space.params, space.by_name)
    groups = [[n for n in (p.name, *p.ties) if n in states[0]] for p in params]
    place: dict[str, list[int]] = {n: [] for n in states[0] if n not in by_space}
    for state in states:
        for i, names in enumerate(tied_names({n: state[n] for n in place if n in state})):
            for name in names:
                place[name].append(i)
    found: dict[tuple[int, ...], list[str]] = {}
    for name, key in place.items():
        found.setdefault(tuple(key), []).append(name)
    return [g for g in (*groups, *found.values()) if len(g) > 1]


def check_agreement(states: Sequence[State], space: WeightSpace | None, verb: str) -> int:
    """Checks that states can be combined.

    Args:
        states: The models, and the base if there is one.
        space: Their space.
        verb: For the message.

    Returns:
        Number of leading axes that count models; 0 without a space.

    Raises:
        MergeError: Listing all that do not agree.
    """
    batch: tuple[int, ...] = ()
    if space is not None:
        batch = batch_of({f"state {i}": x for i, x in enumerate(states, 1)}, space, verb)
    wrong = [
        text for i, state in enumerate(states[1:], 2) for text in _differs(states[0], state, i)
    ]
    if wrong:
        raise MergeError(
            message(
                f"{verb}: the states do not agree",
                expected="the same floating-point tensors in all, and equal integers",
                got=wrong,
                help="leave names out, or dequantize integers, before you combine them",
            )
        )
    return len(batch)


def _differs(first: State, other: State, number: int) -> Iterator[str]:
    """How a state differs from the first in more than values, one text for each name."""
    for name, x in first.items():
        if name not in other:
            if combines(x):
                yield f"{name!r} in state 1, not in state {number}"
            continue
        y = other[name]
        if x.shape != y.shape:
            yield f"{name!r} of {tuple(x.shape)} in state 1, {tuple(y.shape)} in state {number}"
        elif (x.is_complex(), combines(x)) != (y.is_complex(), combines(y)):
            yield f"{name!r} of {x.dtype} in state 1, {y.dtype} in state {number}"
        elif not combines(x) and x.numel() > 1 and not torch.equal(x, y.to(x.device)):
            yield f"{name!r} of {x.dtype}, other values in state {number} than in state 1"
    for name, y in other.items():
        if name not in first and combines(y):
            yield f"{name!r} in state {number}, not in state 1"
