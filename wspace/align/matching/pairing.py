"""Two states as one problem: what may move, and their pieces side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wspace.action import State, Transform, moved
from wspace.align.matching.assign import inner_product
from wspace.align.matching.blocks import Block
from wspace.errors import SpaceMismatch, message
from wspace.nn.pieces import Piece, pieces
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
    """The mean of states, tensor by tensor as it is read; of float32 or better."""

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
