"""Layers of recurrent cells over a sequence: what `HyperLSTM` and `LayerNormLSTM` share."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message

State = TypeVar("State", bound=tuple[Tensor, ...])


class RecurrentCell(nn.Module, Generic[State]):
    """A cell that runs over whole sequences.

    Attributes:
        input_size: Length of an input.
        hidden_size: Length of a hidden state.
    """

    input_size: int
    hidden_size: int

    def widths(self) -> tuple[int, ...]:
        """Lengths of the parts of a state."""
        raise NotImplementedError

    def pack(self, parts: Sequence[Tensor]) -> State:
        """A state of its parts."""
        raise NotImplementedError

    def sequence(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Runs over a sequence.

        Args:
            x: Inputs, ``(T, B, input_size)``.
            state: State at the start, parts ``(B, width)``.

        Returns:
            Hidden states ``(T, B, hidden_size)``, and the state at the end.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> State:
        """One step.

        Args:
            x: Input, ``(B, input_size)``.
            state: State before it, parts ``(B, width)``; zeros for None.

        Returns:
            State behind it; its first part is the hidden state.

        Raises:
            HyperError: If a shape or dtype does not fit.
        """
        x = self.checked(x, ("batch", "input_size"))
        state = self.checked_state(state, x, ())
        with torch.autocast(x.device.type, enabled=False):
            return self.sequence(x.unsqueeze(0), state)[1]

    def checked(self, x: Tensor, axes: Sequence[str]) -> Tensor:
        """The input, in the cell's dtype under autocast.

        Args:
            x: The input.
            axes: Names of its axes, for the message.

        Returns:
            The input.

        Raises:
            HyperError: If its shape or dtype does not fit.
        """
        like = next(self.parameters())
        who = type(self).__name__
        given: Any = x
        if not isinstance(given, Tensor) or x.dim() != len(axes):
            got = f"shape {tuple(x.shape)}" if isinstance(given, Tensor) else type(given).__name__
            help = "there is no form without a batch, and none for packed sequences"
            raise HyperError(
                message(f"{who}: input", expected=f"({', '.join(axes)})", got=got, help=help)
            )
        if x.shape[-1] != self.input_size or 0 in x.shape[:-1]:
            raise HyperError(
                message(
                    f"{who}: input does not fit",
                    expected=f"last axis {self.input_size}, and no empty axis",
                    got=f"shape {tuple(x.shape)}",
                )
            )
        if torch.is_autocast_enabled(x.device.type):
            return x.to(like.dtype)
        if x.dtype != like.dtype:
            raise HyperError(
                message(f"{who}: dtype of the input", expected=str(like.dtype), got=str(x.dtype))
            )
        return x

    def checked_state(self, state: State | None, x: Tensor, lead: tuple[int, ...]) -> State:
        """A state that fits an input; zeros for None.

        Args:
            state: The state.
            x: The input, ``(…, B, input_size)``.
            lead: Axes before that of the batch.

        Returns:
            The state.

        Raises:
            HyperError: Listing every part of a shape or dtype that does not fit.
        """
        want = [(*lead, x.shape[-2], n) for n in self.widths()]
        if state is None:
            return self.pack([x.new_zeros(shape) for shape in want])
        found = [(tuple(part.shape), part.dtype) for part in state]
        if found != [(shape, x.dtype) for shape in want]:
            raise HyperError(
                message(
                    f"{type(self).__name__}: state does not fit",
                    expected=f"shapes {', '.join(map(str, want))} of {x.dtype}",
                    got=[f"{shape} of {dtype}" for shape, dtype in found],
                )
            )
        return self.pack(list(state))


class Layers(nn.Module, Generic[State]):
    """Cells on top of each other, called like `torch.nn.LSTM`.

    Args:
        cells: The cells, the lowest first.
        batch_first: Whether inputs and outputs are ``(B, T, …)`` instead of ``(T, B, …)``.
    """

    def __init__(self, cells: Sequence[RecurrentCell[State]], *, batch_first: bool) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.batch_first = batch_first

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs over a sequence.

        Args:
            x: Inputs, ``(T, B, input_size)``, or ``(B, T, input_size)`` with `batch_first`.
            state: State at the start, parts ``(num_layers, B, width)``; zeros for None.

        Returns:
            Hidden states of the last layer, ``(T, B, hidden_size)`` or ``(B, T, hidden_size)``, and
            the state at the end, parts ``(num_layers, B, width)``.

        Raises:
            HyperError: If a shape or dtype does not fit.
        """
        cells = cast("list[RecurrentCell[State]]", list(self.cells))
        axes = ("batch", "time") if self.batch_first else ("time", "batch")
        x = cells[0].checked(x, (*axes, "input_size"))
        if self.batch_first:
            x = x.transpose(0, 1)
        state = cells[0].checked_state(state, x, (len(cells),))
        ends: list[State] = []
        with torch.autocast(x.device.type, enabled=False):
            for i, cell in enumerate(cells):
                x, end = cell.sequence(x, cell.pack([part[i] for part in state]))
                ends.append(end)
        last = cells[0].pack([torch.stack(parts) for parts in zip(*ends, strict=True)])
        return (x.transpose(0, 1) if self.batch_first else x), last


def check_options(who: str, sizes: Sequence[int], dropout: float = 0.0) -> None:
    """Checks options that all cells have.

    Args:
        who: Whose, for the message.
        sizes: Must be positive.
        dropout: Must be in [0, 1).

    Raises:
        HyperError: If they are not.
    """
    if min(sizes) < 1:
        raise HyperError(message(f"{who}: sizes", expected="positive numbers", got=str(sizes)))
    if not 0 <= dropout < 1:
        raise HyperError(
            message(f"{who}: recurrent_dropout", expected="a share in [0, 1)", got=str(dropout))
        )
