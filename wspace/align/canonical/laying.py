"""A state on the way to its canonical form, and which signs stand beside a slot."""

from math import prod

from torch import Tensor

from wspace.action import State, Transform, act, compose, identity, shape_of
from wspace.nn.pieces import Piece
from wspace.space import WeightSpace


def batch_of(state: State, space: WeightSpace) -> tuple[int, ...]:
    """The batch axes of a state.

    Args:
        state: Tensors by name, ``(*batch, *shape)``.
        space: Its weight space.

    Returns:
        Their sizes.

    Raises:
        SpaceMismatch: If the state does not fit the space.
    """  # noqa: DOC502 (validate raises)
    space.validate(state)
    for p in space.params:
        shape = tuple(state[p.name].shape)
        return shape[: len(shape) - len(p.axes)]
    return ()


class Course:
    """A state on its way, with the group element that has brought it there.

    Attributes:
        state: The state as it is now.
        transform: The element that brought it there.
        batch: Batch axes of the state.
        rows: Number of its rows.
    """

    def __init__(self, state: State, space: WeightSpace) -> None:
        self.space, self.batch = space, batch_of(state, space)
        self.rows = prod(self.batch)
        self.state: State = {p.name: state[p.name].detach() for p in space.params}
        self.transform = identity(space)

    def units(self, group: str) -> tuple[int, ...]:
        """Shape of numbers per unit: ``(rows, *over, size)``."""
        return (self.rows, *shape_of(self.space.all_groups[group], self.space))

    def read(self, piece: Piece) -> Tensor:
        """A piece of the state as it is now, ``(rows, *slots, rest)``, float64 on the CPU."""
        return piece.read(self.state, len(self.batch)).cpu().double()

    def move(self, permutations: dict[str, Tensor], factors: dict[int, Tensor]) -> None:
        """Moves the state on.

        Args:
            permutations: Indices by group, ``(rows, *over, size)``.
            factors: Numbers by gauge, ``(rows, *over, size)``.
        """
        step = Transform(
            self.space,
            {n: p.reshape(*self.batch, *p.shape[1:]) for n, p in permutations.items()},
            {i: s.reshape(*self.batch, *s.shape[1:]) for i, s in factors.items()},
        )
        self.transform = compose(step, self.transform)
        self.state = act(step, self.state, self.space)


def odd(piece: Piece, k: int, gauges: frozenset[int]) -> tuple[int, ...]:
    """Gauges among some that flip the sign of what lies in a slot."""
    return tuple(sorted(i for i, e in piece.slots[k].exponents if e % 2 and i in gauges))
