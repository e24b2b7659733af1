"""`FastWeightModel`: self-modifying cells in a residual stack, from sequences to sequences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.cells.self_reference import SRWM, DeltaNet, FakeSR, FastWeightCell

CELLS: dict[str, Callable[..., FastWeightCell]] = {
    "srwm": SRWM,
    "fake_sr": FakeSR,
    "delta_net": DeltaNet,
}
"""Cells by the names that configurations use."""


class FastWeightLayer(nn.Module):
    """A cell and a feed-forward block, each with a residual, as Irie et al. (2022) stack them.

        h = norm(h) + dropout(mix(cell(h)));   h = h + feed(norm(h))

    The cell reads ``h`` as it is, while what is carried past it is normalised.

    Args:
        cell: The cell.
        feedforward: Hidden units of the feed-forward block; 0 leaves it out.
        dropout: Probability of being zeroed, behind both.
    """

    def __init__(self, cell: FastWeightCell, feedforward: int, dropout: float = 0.0) -> None:
        super().__init__()
        width = cell.width
        self.cell, self.norm = cell, nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, width, bias=False), nn.Dropout(dropout))
        self.feed = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, feedforward),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(feedforward, width),
            nn.Dropout(dropout),
        ) if feedforward else None  # fmt: skip

    def forward(self, h: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs over a sequence.

        Args:
            h: Inputs, ``(*batch, T, width)``.
            state: The cell's; None to begin anew.

        Returns:
            Outputs ``(*batch, T, width)``, and the cell's state after the last step.
        """
        y, after = self.cell(h, state)
        h = self.norm(h) + self.mix(y)
        return (h if self.feed is None else h + self.feed(h)), after


class FastWeightModel(nn.Module):
    """Layers of self-modifying cells between two linear maps.

    Args:
        inputs: Length of an input.
        outputs: Length of an output.
        cell: Kind of the cells, one of `CELLS`.
        width: Length inside.
        layers: Number of layers.
        heads: Heads of every cell.
        feedforward: Hidden units of the feed-forward blocks; None for twice the width, 0 for none.
        dropout: Probability of being zeroed.
        options: Further options of the cells.

    Raises:
        HyperError: If there is no such cell, it has no such option, or sizes do not fit.

    Example:
        >>> import torch
        >>> model = FastWeightModel(5, 3, width=8, heads=2)
        >>> y, states = model(torch.randn(4, 7, 5))
        >>> y.shape, len(states)
        (torch.Size([4, 7, 3]), 2)
        >>> y, states = model(torch.randn(4, 1, 5), states)  # goes on
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        cell: str = "srwm",
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            expected = f"one of {', '.join(CELLS)}"
            raise HyperError(message("FastWeightModel: no such cell", expected=expected, got=cell))
        hidden = 2 * width if feedforward is None else feedforward
        self.enter = nn.Linear(inputs, width)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            try:
                made = CELLS[cell](width, heads, **(options or {}))
            except TypeError as error:
                text = message(f"FastWeightModel: options of {cell}", got=str(error))
                raise HyperError(text) from error
            self.layers.append(FastWeightLayer(made, hidden, dropout))
        self.leave = nn.Linear(width, outputs)

    def forward(
        self, x: Tensor, states: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs over a sequence.

        Args:
            x: Inputs, ``(*batch, T, inputs)``.
            states: What an earlier call gave for the same batch; None to begin anew.

        Returns:
            Outputs ``(*batch, T, outputs)``, and a state for every layer.

        Raises:
            HyperError: If states or inputs do not fit.
        """
        if states is not None and len(states) != len(self.layers):
            raise HyperError(
                message(
                    "FastWeightModel: one state for each layer",
                    expected=f"{len(self.layers)} states",
                    got=str(len(states)),
                )
            )
        h = self.enter(x)
        after: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            h, state = layer(h, None if states is None else states[i])
            after.append(state)
        return self.leave(h), tuple(after)
