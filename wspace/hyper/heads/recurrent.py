"""`RecurrentHead`: chunks of weights one after another, each of which knows those before it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import Head, linear, normal_vectors, set_apart, split


class RecurrentHead(Head):
    """An LSTM cell that goes through the chunks of the target.

    It reads the condition's vector and the vector of a chunk, and a linear map of its hidden state
    is the chunk: chunk i depends on the vectors of the chunks up to i, and on no later one. In the
    spirit of Chandra, Varshney, Srijith, Gupta (2023), "Continual Learning with Dependency
    Preserving Hypernetworks", whose equations are not public.

    Args:
        chunk: Entries of a chunk; the last one is cut off at the end of the target.
        hidden: Units of the cell.
        embedding: Length of a chunk's vector.
    """

    def __init__(self, chunk: int, hidden: int = 64, *, embedding: int = 32) -> None:
        super().__init__()
        if min(chunk, hidden, embedding) < 1:
            raise HyperError(
                message("hypernetwork: RecurrentHead needs sizes of at least 1",
                        got=f"chunk={chunk}, hidden={hidden}, embedding={embedding}")
            )  # fmt: skip
        self.chunk, self.hidden, self.embedding = chunk, hidden, embedding

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.numel // self.chunk)

    def build(self, generator: torch.Generator | None) -> None:
        """Makes the cell, the output map and the vectors of the chunks.

        Args:
            generator: Source of randomness.
        """
        self.chunks = nn.Parameter(torch.randn(self.count, self.embedding, generator=generator))
        self.units = nn.ModuleList([_Units(self, self.hidden, 0, generator)])
        self.shift = nn.Parameter(torch.zeros(self.chunk))

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All weights of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        rows = self.shift
        for units, h in zip(self._units, self._states(e), strict=True):
            rows = rows + units.leave(h)
        return split(rows.movedim(0, -2).flatten(-2), self.weights)

    def states(self, e: Tensor) -> Tensor:
        """Hidden states, for regularisers that hold on to them.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            ``(*batch, chunks, hidden)``.
        """
        return torch.cat(self._states(e), -1).movedim(0, -2)

    def grow(
        self, count: int, *, freeze: bool = False, generator: torch.Generator | None = None
    ) -> list[nn.Parameter]:
        """Appends hidden units; what is made stays the same, to the bit.

        The new units see everything; the weights that lead from them to old units and to the output
        are zero, and trainable.

        Args:
            count: Number of new units.
            freeze: True to freeze the old units, the vectors of chunks and the output's shift.
            generator: Source of randomness.

        Returns:
            The new parameters, for the optimizer.

        Raises:
            HyperError: If the head is not bound, or the count is not positive.
        """
        if not self.weights or count < 1:
            raise HyperError(
                message("grow: no unit was added", expected="a bound head, and a positive count",
                        got=f"{len(self.weights)} weights, count={count}")
            )  # fmt: skip
        if freeze:
            self.requires_grad_(requires_grad=False)
        like = self.shift
        new = _Units(self, count, self.hidden, generator).to(like.device, like.dtype)
        self.units.append(new)
        self.hidden += count
        return list(new.parameters())

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Sets chunks apart from each other, and gains so that variances are as given.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.
        """
        with torch.no_grad():
            e = normal_vectors(self, self.width, generator)[:64]
            for units, seen in zip(self._units, self._states(e), strict=True):
                set_apart(units.leave, seen.movedim(0, -2))
        super().reset(variances, generator)

    def silence(self) -> None:
        """Sets the output map to zero."""
        with torch.no_grad():
            self.shift.zero_()
            for units in self._units:
                units.leave.weight.zero_()

    @property
    def _units(self) -> Sequence["_Units"]:
        return [u for u in self.units if isinstance(u, _Units)]

    def _states(self, e: Tensor) -> list[Tensor]:
        """Hidden states ``(chunks, *batch, n)`` of every block of units."""
        blocks, batch = self._units, e.shape[:-1]
        chunks = self.chunks.view(self.count, *[1] * len(batch), -1)
        there = chunks.expand(self.count, *batch, -1)
        if self.width:
            there = torch.cat([e.expand(self.count, *e.shape), there], -1)
        entering = [b.enter(there).unbind() for b in blocks]
        zero = [e.new_zeros(*batch, b.count, dtype=there.dtype) for b in blocks]
        hidden, cells, every = list(zero), list(zero), list[list[Tensor]]()
        for i in range(self.count):
            gates = _gates(blocks, [x[i] for x in entering], hidden)
            for k, g in enumerate(gates):
                hidden[k], cells[k] = _cell(g, cells[k])
            every.append(list(hidden))
        return [torch.stack(column) for column in zip(*every, strict=True)]


class _Units(nn.Module):
    """Units of the cell that were made together.

    Attributes:
        enter: From inputs to their gates (input, forget, cell, output).
        within: From the hidden states of all units so far to their gates.
        back: From their hidden states to the gates of all units before.
        leave: From their hidden states to a chunk.
    """

    def __init__(
        self, head: RecurrentHead, count: int, before: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.count = count
        n = head.width + head.embedding
        every = before + count
        self.enter = linear(n, 4 * count, 1 / n, generator)
        self.within = linear(every, 4 * count, 1 / every, generator, bias=False)
        self.leave = linear(count, head.chunk, 1 / count, generator, bias=False)
        self.back = linear(count, 4 * before, 1 / count, generator, bias=False) if before else None
        with torch.no_grad():
            self.enter.bias[count : 2 * count] = 1.0  # remember
            if self.back is not None:
                self.back.weight.zero_()
                self.leave.weight.zero_()


def _gates(
    blocks: Sequence[_Units], entering: Sequence[Tensor], hidden: Sequence[Tensor]
) -> list[Tensor]:
    """What enters the gates of every block."""
    gates: list[Tensor] = []
    for k, (block, x) in enumerate(zip(blocks, entering, strict=True)):
        seen = hidden[0] if k == 0 else torch.cat(list(hidden[: k + 1]), -1)
        gates.append(x + block.within(seen))
        if block.back is not None:
            sizes = [4 * b.count for b in blocks[:k]]
            for j, part in enumerate(block.back(hidden[k]).split(sizes, -1)):
                gates[j] = gates[j] + part
    return gates


def _cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Next hidden state and cell state."""
    i, f, g, o = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell
