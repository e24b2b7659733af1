"""What a model of one weight space returns: a vector for each network, or changed parameters."""

from torch import Tensor, nn

from wspace.action import State
from wspace.errors import SpaceMismatch, message
from wspace.nn.cells import Features
from wspace.nn.layers import Scale, Standardize, from_features, to_features
from wspace.nn.linear import EquivariantLinear, InvariantPool
from wspace.space import WeightSpace

SMALL = 0.01
"""Size of the first changes that a model makes to parameters, in deviations of the data."""


class InvariantReadout(nn.Module):
    """Pooled features, then a multilayer perceptron: the same for all members of an orbit.

    Args:
        space: Weight space of the features.
        channels: Channels of the features.
        hidden: Width of the hidden layer.
        out: Length of the result.
    """

    def __init__(self, space: WeightSpace, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.pool = InvariantPool(space, channels, hidden)
        self.map = nn.Sequential(nn.ReLU(), nn.Linear(hidden, out))

    def forward(self, features: Features) -> Tensor:
        """The result, ``(*batch, out)``."""
        return self.map(self.pool(features))


class SpaceModel(nn.Module):
    """A model of states of one space: standardise, run a trunk of equivariant layers, read out.

    Args:
        space: Weight space of the states.
        trunk: Modules from features of one channel to features of `hidden` channels.
        hidden: Channels of the trunk's result.
        out: Length of the result of an invariant head; None for ``head="parameters"``.
        head: ``"invariant"`` returns ``(*batch, out)``. ``"parameters"`` returns the state plus a
            change, which is small at first but not zero, so that every weight has a gradient.
        basis: Basis of the last equivariant map.

    Attributes:
        standardize: Statistics of the data; see `fit`.

    Shape:
        Input: a state, ``(*batch, *shape)`` for each parameter. Output: as `head` says.

    Raises:
        SpaceMismatch: If `head` and `out` do not go together.
    """

    def __init__(
        self,
        space: WeightSpace,
        trunk: nn.Module,
        hidden: int,
        out: int | None,
        head: str = "invariant",
        *,
        basis: str = "full",
    ) -> None:
        super().__init__()
        if (head, out is None) not in {("invariant", False), ("parameters", True)}:
            raise SpaceMismatch(
                message(
                    f"model: head {head!r} with out={out}",
                    expected="head 'invariant' with a length, or 'parameters' with out=None",
                )
            )
        self.space = space
        self.standardize = Standardize(space)
        self.trunk = trunk
        self.readout: nn.Module
        if out is None:
            last = EquivariantLinear(space, hidden, 1, basis)
            self.readout = nn.Sequential(last, Scale(space, SMALL))
        else:
            self.readout = InvariantReadout(space, hidden, 4 * hidden, out)

    def fit(self, states: list[State]) -> None:
        """Sets the statistics by which states are standardised.

        Args:
            states: States, batched or not, all of them counted equally.

        Raises:
            SpaceMismatch: If a state does not fit the space.
        """
        self.standardize.fit(to_features(state, self.space) for state in states)

    def forward(self, state: State) -> Tensor | dict[str, Tensor]:
        """The prediction for each network, or its changed parameters.

        Args:
            state: For each parameter ``(*batch, *shape)``.

        Returns:
            ``(*batch, out)``, or for each parameter ``(*batch, *shape)``.

        Raises:
            SpaceMismatch: If the state does not fit the space.
        """
        features = to_features(state, self.space)
        result = self.readout(self.trunk(self.standardize(features)))
        if isinstance(result, Tensor):
            return result
        std = self.standardize
        changed = {
            name: x + result[name] * std.std[std.numbers[name]] for name, x in features.items()
        }
        return from_features(changed, self.space)
