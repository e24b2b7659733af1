"""UNF: the preset of Universal Neural Functionals (Zhou et al. 2024, arXiv:2402.05232)."""

from torch import Tensor, nn

from wspace.action import State
from wspace.nn.layers import Dropout, FeatureNorm, Pointwise, Residual
from wspace.nn.linear import EquivariantLinear
from wspace.nn.readout import SpaceModel
from wspace.space import WeightSpace


class UNF(nn.Module):
    """Equivariant linear layers for any space, in residual blocks with layer norm.

    Each block is ``x + linear(relu(norm(x)))``. The published layer has no fixed axes and an
    incomplete bias; those of `EquivariantLinear` are complete.

    Args:
        space: Weight space of the states.
        hidden: Channels.
        layers: Number of equivariant layers.
        out: Length of the result; None for ``head="parameters"``.
        head: ``"invariant"`` or ``"parameters"`` (the state plus a change).
        basis: ``"full"`` or ``"np"``; see `EquivariantLinear`.
        dropout: Probability with which channels are zeroed.

    Shape:
        Input: a state, ``(*batch, *shape)`` for each parameter. Output: ``(*batch, out)``, or a
        state.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> space = wspace.trace(mlp, torch.zeros(1, 2))
        >>> model = UNF(space, hidden=8, layers=2, out=None, head="parameters")
        >>> model(mlp.state_dict())["2.weight"].shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        space: WeightSpace,
        hidden: int = 32,
        layers: int = 4,
        out: int | None = 1,
        *,
        head: str = "invariant",
        basis: str = "full",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [EquivariantLinear(space, 1, hidden, basis)]
        for _ in range(layers - 1):
            block = [FeatureNorm(space, hidden), Pointwise(nn.ReLU()), Dropout(space, dropout)]
            parts.append(Residual(*block, EquivariantLinear(space, hidden, hidden, basis)))
        parts += [FeatureNorm(space, hidden), Pointwise(nn.ReLU())]
        self.net = SpaceModel(space, nn.Sequential(*parts), hidden, out, head, basis=basis)

    def fit(self, states: list[State]) -> None:
        """Sets the statistics by which states are standardised; see `SpaceModel.fit`."""
        self.net.fit(states)

    def forward(self, state: State) -> Tensor | dict[str, Tensor]:
        """The prediction ``(*batch, out)``, or a changed state."""
        return self.net(state)
