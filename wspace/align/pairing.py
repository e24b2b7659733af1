"""Two states as one problem: what may move, and their pieces side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wspace.action import State, Transform, moved
from wspace.align.ascent import Symmetry
from wspace.align.assign import inner_product
from wspace.align.blocks import Block
from wspace.align.pieces import Piece, pieces
from wspace.errors import SpaceMismatch, message
from wspace.space import WeightSpace


class Moved(Mapping[str, Tensor]):
    """A state moved by a group element, tensor by tensor as it is read."""

    def __init__(self, t: Transform, state: State, space: WeightSpace) -> None:
        self.t, self.state, self.space = t, state, space

    def __getitem__(self, name: str) -> Tensor:
        return moved(self.t, name, self.state, self.space)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


class Mean(Mapping[str, Tensor]):
    """The mean of states, tensor by tensor as it is read; float64 where they are of low precision."""

    def __init__(self, states: Sequence[State]) -> None:
        self.states = states

    def __getitem__(self, name: str) -> Tensor:
        first = self.states[0][name]
        wide = first.dtype if first.is_complex() else torch.float64
        total = first.to(wide)
        for state in self.states[1:]:
            total = total + state[name].to(total)
        return (total / len(self.states)).to(first.dtype if first.itemsize >= 4 else torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.states[0])

    def __len__(self) -> int:
        return len(self.states[0])


def batch_of(states: Mapping[str, State], space: WeightSpace, who: str) -> tuple[int, ...]:
    """The batch axes that states share.

    Args:
        states: By the name that messages call them.
        space: Weight space of all.
        who: The function that asks, for messages.

    Returns:
        Sizes of the batch axes.

    Raises:
        SpaceMismatch: Listing every missing and mis-shaped tensor of every state, or if the batch
            axes differ.
    """
    wrong: list[str] = []
    found: dict[str, tuple[int, ...]] = {}
    for label, state in states.items():
        try:
            space.validate(state)
        except SpaceMismatch as error:
            wrong += [f"{label}: {line.strip()}" for line in str(error).splitlines()[1:-1]]
            continue
        lead: tuple[int, ...] = ()
        if space.params:
            x = state[space.params[0].name]
            lead = tuple(x.shape[: x.dim() - len(space.params[0].axes)])
        found[label] = lead
    if wrong:
        raise SpaceMismatch(
            message(
                f"{who}: states do not fit the weight space",
                got=[line.replace(": got ", ": ") for line in wrong],
                help="trace the module these states came from; batch axes lead",
            )
        )
    if len({*found.values()}) > 1:
        raise SpaceMismatch(
            message(
                f"{who}: states of different batch axes",
                expected="the same leading axes for all",
                got=[f"{lead} of {label}" for label, lead in found.items()],
            )
        )
    return next(iter(found.values()))


def symmetry_of(space: WeightSpace, kinds: Sequence[str], groups: Sequence[str] | None) -> Symmetry:
    """What may move.

    Phases of groups on which others depend, or that occur twice in one tensor, stay as they are.

    Args:
        space: The weight space.
        kinds: Symmetries to use; scales are none of the ascent's.
        groups: Groups that may move; all free ones when None.

    Returns:
        The symmetry.
    """
    chosen = {*(space.groups if groups is None else groups)}
    permuted = {g.name for g in space.groups.values() if not g.fixed and g.name in chosen}
    permuted = permuted if "permutation" in kinds else set[str]()
    gauges = {
        i: gauge.group
        for i, gauge in enumerate(space.gauges)
        if gauge.kind in kinds and gauge.kind != "scale" and gauge.group in chosen
    }
    ruling = {o for g in space.groups.values() for o in g.over}
    twice = {
        s.group
        for piece in pieces(space)
        for s in piece.slots
        if sum(t.group == s.group for t in piece.slots) > 1
    }
    phases = {i for i in gauges if space.gauges[i].kind == "phase"}
    held = {i for i in phases if gauges[i] in ruling | twice}
    for piece in pieces(space):  # of two phases that move one tensor, the first
        here = [i for s in piece.slots for i, _ in s.shifts if i in phases - held]
        held |= {*here[1:]}
    gauges = {i: g for i, g in gauges.items() if i not in held}
    free = [g for g in space.groups.values() if g.name in permuted or g.name in gauges.values()]
    return Symmetry(
        sizes={g.name: g.size for g in free},
        over={g.name: g.over for g in free},
        permuted=frozenset(permuted),
        gauges=gauges,
        phases=frozenset(phases - held),
    )


@dataclass(frozen=True)
class Pairing:
    """Pieces of two states side by side.

    Attributes:
        blocks: The pairs of pieces.
        inner: Inner product of each pair, ``(rows,)``, float64.
        rows: Number of rows: the batch axes, flattened.
        device: Where A's tensors are.
    """

    blocks: list[Block]
    inner: list[Tensor]
    rows: int
    device: torch.device

    @property
    def objective(self) -> Tensor:
        """Inner product of the states, ``(rows,)``."""
        return sum(self.inner, torch.zeros(self.rows, dtype=torch.float64, device=self.device))


def pair(
    a: State, b: State, space: WeightSpace, lead: tuple[int, ...], *, buffers: bool, who: str
) -> Pairing:
    """Two states' pieces, read once to measure them.

    Args:
        a: Tensors by name, ``(*batch, *shape)``.
        b: Of the same shapes.
        space: Weight space of both.
        lead: Batch axes.
        buffers: Whether float buffers count.
        who: The function that asks, for messages.

    Returns:
        The pairing.

    Raises:
        SpaceMismatch: Naming every tensor that has a NaN or an infinity.
    """
    device = a[space.params[0].name].device if space.params else torch.device("cpu")
    found = Pairing([], [], prod(lead), device)
    wrong: dict[str, None] = {}
    for piece in pieces(space, buffers=buffers):
        block, inner = _block(piece, a, b, len(lead), device)
        found.blocks.append(block)
        found.inner.append(inner)
        if not bool(torch.isfinite(block.error).all()):
            wrong |= dict.fromkeys(piece.names)
    if wrong:
        raise SpaceMismatch(
            message(
                f"{who}: weights that are NaN, infinite or too large to square",
                got=[f"{name!r} of {_where(a, b, name)}" for name in wrong],
                help="nothing is near to them; take a checkpoint from before training diverged",
            )
        )
    return found


def _where(a: State, b: State, name: str) -> str:
    bad = [label for label, x in (("a", a), ("b", b)) if not bool(x[name].isfinite().all())]
    return " and ".join(bad or ["a and b"])


def _block(
    piece: Piece, a: State, b: State, lead: int, device: torch.device
) -> tuple[Block, Tensor]:
    def load() -> tuple[Tensor, Tensor]:
        x, y = piece.read(a, lead).to(device), piece.read(b, lead).to(device)
        if x.dtype != y.dtype:
            x, y = x.double(), y.double()
        return x, y

    x, y = load()
    sizes = x.flatten(1).norm(dim=1).double() * y.flatten(1).norm(dim=1).double()
    inner = inner_product(x, y)
    return Block(piece.slots, load, torch.finfo(x.dtype).eps * sizes, x[0].numel()), inner
