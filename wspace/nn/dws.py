"""DWSNet: the preset of Deep Weight Space networks (Navon et al. 2023, arXiv:2301.12780)."""

from torch import Tensor, nn

from wspace.action import State
from wspace.nn.layers import Dropout, FeatureBatchNorm, Pointwise
from wspace.nn.linear import EquivariantLinear
from wspace.nn.readout import SpaceModel
from wspace.space import WeightSpace


class DWSNet(nn.Module):
    """Equivariant linear layers with batch norm and ReLU, then an invariant layer.

    The published network has one map for each pair of parameters of a multilayer perceptron, with
    inputs and outputs fixed. The same maps, and those it leaves out, are computed here together,
    for any space.

    Args:
        space: Weight space of the states.
        hidden: Channels.
        layers: Number of equivariant layers.
        out: Length of the result; None for ``head="parameters"``.
        head: ``"invariant"`` or ``"parameters"`` (the state plus a change).
        dropout: Probability with which channels are zeroed.

    Shape:
        Input: a state, ``(*batch, *shape)`` for each parameter. Output: ``(*batch, out)``, or a
        state.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> space = wspace.trace(mlp, torch.zeros(1, 2))
        >>> model = DWSNet(space, hidden=8, layers=2, out=10).eval()
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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for k in range(layers):
            parts.append(EquivariantLinear(space, hidden if k else 1, hidden, "dws"))
            parts += [FeatureBatchNorm(space, hidden), Pointwise(nn.ReLU())]
            parts.append(Dropout(space, dropout))
        self.net = SpaceModel(space, nn.Sequential(*parts), hidden, out, head, basis="dws")

    def fit(self, states: list[State]) -> None:
        """Sets the statistics by which states are standardised; see `SpaceModel.fit`."""
        self.net.fit(states)

    def forward(self, state: State) -> Tensor | dict[str, Tensor]:
        """The prediction ``(*batch, out)``, or a changed state."""
        return self.net(state)
