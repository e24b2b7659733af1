"""NFN and NFT: presets of Zhou et al. (2023), arXiv:2302.14040 and arXiv:2305.13546."""

from torch import Tensor, nn

from wspace.action import State
from wspace.errors import SpaceMismatch, message
from wspace.nn.attention import WeightSpaceAttention
from wspace.nn.layers import Dropout, FeatureNorm, Pointwise, Residual
from wspace.nn.linear import EquivariantLinear
from wspace.nn.readout import SpaceModel
from wspace.space import WeightSpace

POSITIONS = 3
"""Sinusoids for each input and output in "np" mode, as in the published configurations."""


class NFN(nn.Module):
    """Equivariant linear layers with ReLU, or blocks of attention between slices of weights.

    Args:
        space: Weight space of the states.
        hidden: Channels.
        layers: Number of equivariant layers, or of blocks of attention.
        out: Length of the result; None for ``head="parameters"``.
        head: ``"invariant"`` or ``"parameters"`` (the state plus a change).
        mode: ``"hnp"``: inputs and outputs are fixed. ``"np"``: layers treat them as permutable,
            and sinusoids of their positions are added to the state, so that they can be told apart.
        attention: True for NFT: after a first linear layer, blocks of norm and attention, norm and
            a pointwise network, each added to its input.
        dropout: Probability with which channels are zeroed.

    Shape:
        Input: a state, ``(*batch, *shape)`` for each parameter. Output: ``(*batch, out)``, or a
        state.

    Raises:
        SpaceMismatch: If `mode` is unknown.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> space = wspace.trace(mlp, torch.zeros(1, 2))
        >>> model = NFN(space, hidden=8, layers=2, out=10, mode="np")
        >>> model(mlp.state_dict()).shape
        torch.Size([10])
    """

    def __init__(
        self,
        space: WeightSpace,
        hidden: int = 32,
        layers: int = 4,
        out: int | None = 1,
        *,
        head: str = "invariant",
        mode: str = "hnp",
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in {"np", "hnp"}:
            raise SpaceMismatch(message(f"NFN: mode {mode!r}", expected="'np' or 'hnp'"))
        positions = POSITIONS if mode == "np" else 0
        first = EquivariantLinear(space, 1, hidden, mode, positions=positions)
        parts: list[nn.Module] = [first]
        if attention:
            for _ in range(layers):
                parts += _block(space, hidden, "np" if mode == "np" else "full", dropout)
            parts.append(FeatureNorm(space, hidden))
        else:
            for _ in range(layers - 1):
                parts += [Pointwise(nn.ReLU()), Dropout(space, dropout)]
                parts.append(EquivariantLinear(space, hidden, hidden, mode))
            parts.append(Pointwise(nn.ReLU()))
        self.net = SpaceModel(space, nn.Sequential(*parts), hidden, out, head, basis=mode)

    def fit(self, states: list[State]) -> None:
        """Sets the statistics by which states are standardised; see `SpaceModel.fit`."""
        self.net.fit(states)

    def forward(self, state: State) -> Tensor | dict[str, Tensor]:
        """The prediction ``(*batch, out)``, or a changed state."""
        return self.net(state)


def _block(space: WeightSpace, hidden: int, basis: str, dropout: float) -> list[nn.Module]:
    """One block of NFT."""
    heads = next(h for h in (4, 2, 1) if hidden % h == 0)
    wide = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
    attend = WeightSpaceAttention(space, hidden, heads, basis=basis)
    return [
        Residual(FeatureNorm(space, hidden), attend, Dropout(space, dropout)),
        Residual(FeatureNorm(space, hidden), Pointwise(wide), Dropout(space, dropout)),
    ]
