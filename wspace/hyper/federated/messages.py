"""What server and clients send each other, and how many bytes that is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class Message(NamedTuple):
    """One message between the server and one client.

    Attributes:
        sender: Who sends it.
        what: What it holds.
        bytes: Size of its tensors.
    """

    sender: Literal["server", "client"]
    what: str
    bytes: int


@dataclass(frozen=True)
class Round:
    """What happened in a round.

    Attributes:
        losses: Each client's loss before its first local step, ``(B,)``.
        samples: Examples that each client trained on, ``(B,)``.
        messages: What the server and one client sent each other, in order; every client of the
            round the same.
    """

    losses: Tensor
    samples: Tensor
    messages: tuple[Message, ...]

    def bytes(self, sender: Literal["server", "client"]) -> int:
        """Bytes that one client gets (sent by the server), or sends."""
        return sum(m.bytes for m in self.messages if m.sender == sender)


def size_of(tensors: Tensor | Mapping[str, Tensor] | Iterable[Tensor], clients: int = 1) -> int:
    """Bytes of tensors, for one of several clients that they are stacked for.

    Args:
        tensors: One, several, or several by name.
        clients: How many share the leading axis; 1 if there is no such axis.

    Returns:
        Bytes.
    """
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    found = tensors.values() if isinstance(tensors, Mapping) else tensors
    return sum(x.numel() * x.element_size() for x in found) // clients
