r"""Canonical forms: one state for all that a network's symmetries make of it.

In this order, each step on what the one before left:

1. *scale*: the balanced state (`balance`);
2. *phase*: with :math:`\sin(\omega(Wx + b))` a bias is moved by whole multiples of
   :math:`\pi/\omega` into :math:`(-\pi/2\omega, \pi/2\omega]`. (The published algorithm takes
   :math:`\omega = 1` whatever the frequency is, and changes the last layer, too, which has no sine;
   Kalogeropoulos et al. 2024, ScaleGMN, appendix.)
3. *permutation*: units are sorted by keys that see moduli only (`ranks`);
4. *sign*: as many entries as can be are made positive (`parity`);
5. units that tie in all moduli are sorted by signed keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wspace.action import KINDS, State, Transform, act
from wspace.align.canonical.balance import balance
from wspace.align.canonical.laying import Course
from wspace.align.canonical.parity import signs
from wspace.align.canonical.ranks import Ranks, moved_ranks, sorting
from wspace.errors import SpaceMismatch, message
from wspace.nn.pieces import by_unit, pieces
from wspace.space import WeightSpace

CHOICES = 64


def canonicalize(
    state: State, space: WeightSpace, *, kinds: Sequence[str] = KINDS
) -> dict[str, Tensor]:
    """The canonical state of an orbit: the same for a state and for all that the group makes of it.

    Args:
        state: Tensors by name, ``(*batch, *shape)``.
        space: Weight space of the state.
        kinds: Symmetries to factor out.

    Returns:
        ``act(canonical(state, space, kinds=kinds), state, space)``: the same function.

    Raises:
        SpaceMismatch: If the state does not fit the space, or a kind is unknown.

    Example:
        >>> import torch, wspace
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> space, state = wspace.trace(mlp, torch.zeros(1, 3)), mlp.state_dict()
        >>> other = wspace.act(wspace.sample(space, kinds=("permutation", "scale")), state, space)
        >>> a, b = canonicalize(state, space), canonicalize(other, space)
        >>> all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
        True
    """  # noqa: DOC502 (canonical raises)
    return act(canonical(state, space, kinds=kinds), state, space)


def canonical(state: State, space: WeightSpace, *, kinds: Sequence[str] = KINDS) -> Transform:
    """The group element that brings a state to its canonical form.

    With permutations and signs alone the form is exact: the same bits from every state of an
    orbit. Scales and phases round, so keys that differ by rounding only count as equal.

    Equal units, dead units (all entries zero) and equal branches may be stored in any order, since
    their order cannot be seen; the form is canonical all the same. It may not be where units tie in
    every sum of entries and are nevertheless not images of each other, which random weights do
    with probability zero. A sine's bias on the edge of its interval may round to either end.

    Args:
        state: Tensors by name, ``(*batch, *shape)``.
        space: Weight space of the state.
        kinds: Symmetries to factor out.

    Returns:
        The transform, batched if the state is; groups and gauges of other kinds stay.

    Raises:
        SpaceMismatch: If the state does not fit the space, or a kind is unknown.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown:
        raise SpaceMismatch(
            message(
                f"canonical: unknown {', '.join(map(repr, unknown))}", expected=f"kinds of {KINDS}"
            )
        )
    course = Course(state, space)
    if 0 in course.batch:
        return course.transform
    present = {g.kind for g in space.gauges} & {*kinds}
    if "scale" in present:
        course.move({}, {i: s.reshape(course.rows, *s.shape[len(course.batch) :])
                         for i, s in balance(course.state, space).factors.items()})  # fmt: skip
    if "phase" in present:
        course.move({}, _phases(course))
    free = [g.name for g in space.groups.values() if not g.fixed] if "permutation" in kinds else []
    close = _close(course) if present & {"scale", "phase"} else 0.0
    ranks = Ranks(course, free, signed="sign" not in present, close=close)
    ranks.settle()
    if "sign" not in present:
        ranks.separate(CHOICES)
    _sort(course, ranks)
    if "sign" in present:
        course.move({}, signs(course))
        if ranks.open():
            ranks.signed = True
            ranks.settle()
            ranks.separate(CHOICES)
            _sort(course, ranks)
    return course.transform


def _sort(course: Course, ranks: Ranks) -> None:
    permutations = sorting(course, ranks.ranks)
    course.move(permutations, {})
    ranks.ranks = dict(moved_ranks(course, ranks.ranks, permutations))


def _close(course: Course) -> float:
    """Relative difference that rounding may leave between keys."""
    widths = [torch.finfo(x.dtype).eps for x in course.state.values() if x.is_floating_point()]
    return 2.0**-30 if max(widths, default=0.0) < 1e-12 else 2.0**-17


def _phases(course: Course) -> dict[int, Tensor]:
    """Whole turns that bring every sine's bias next to zero, ``(rows, *over, size)`` by gauge."""
    found: dict[int, Tensor] = {}
    for piece in pieces(course.space, buffers=True):
        for k, slot in enumerate(piece.slots):
            for i, amount in slot.shifts:
                if i not in found and course.space.gauges[i].kind == "phase":
                    turns = by_unit(course.read(piece), piece, k)[..., 0] / amount
                    found[i] = -(turns - 0.5).ceil()
    return found
