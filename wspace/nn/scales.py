"""Sizes of the entries of tensors over a data set, by what the tensors are: any architecture."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from wspace.errors import SpaceMismatch, message
from wspace.graph import ParameterGraph
from wspace.graph.structure import structure_of
from wspace.space import Param, Role, WeightSpace

ROLES = tuple(Role)
PLACES = 3
"""Tensors that read the network's input, those inside, and those that write its output."""


def fan_in(p: Param) -> int:
    """Entries of a weight matrix or kernel that are summed in one output; 1 for other tensors."""
    return p.numel // p.shape[0] if p.role is Role.MATRIX and len(p.shape) > 1 else 1


@lru_cache(maxsize=64)
def slots(space: WeightSpace) -> dict[str, int]:
    """What kind of tensor each parameter is: its role, and where it stands.

    Args:
        space: Weight space with a wiring.

    Returns:
        For every parameter a number below ``len(ROLES) * PLACES``.
    """
    structure = structure_of(space)
    out: dict[str, int] = {}
    for p in space.params:
        blocks = [structure.blocks[i] for i in structure.holders.get(p.name, ())]
        ends = {structure.nodes[b.target.nodes].kind for b in blocks}
        begins = {structure.nodes[b.source.nodes].kind for b in blocks if b.source is not None}
        place = 2 if "output" in ends else 0 if "input" in begins else 1
        out[p.name] = ROLES.index(p.role) * PLACES + place
    return out


class RoleScales(nn.Module):
    """Divides every tensor by the size that tensors of its kind have over a data set.

    One factor for all entries of a tensor, so all symmetries are kept; factors belong to roles and
    places, so they also fit architectures that were not in the data. Weight matrices are compared
    times the root of their fan-in. Until `fit` was called, nothing is changed and nothing copied.
    """

    spread: Tensor
    fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(len(ROLES) * PLACES))
        self.register_buffer("fitted", torch.tensor(data=False))

    @torch.no_grad()
    def fit(self, graphs: Iterable[ParameterGraph]) -> None:
        """Sets the sizes, root mean squares over all entries of a tensor, averaged over tensors.

        Args:
            graphs: Training networks, with any batch axes.

        Raises:
            SpaceMismatch: If there are none.
        """
        total = torch.zeros(len(self.spread), dtype=torch.float64)
        count = torch.zeros_like(total)
        for graph in graphs:
            for p in graph.space.params:
                if not p.numel:
                    continue
                slot, x = slots(graph.space)[p.name], graph.values[p.name]
                total[slot] += float(x.double().square().sum()) / p.numel * fan_in(p)
                count[slot] += x.numel() // p.numel
        if not bool(count.any()):
            raise SpaceMismatch(message("fit_statistics: no data", expected="at least one network"))
        size = (total / count.clamp(min=1)).sqrt()
        self.spread.copy_(torch.where(size > 0, size, 1.0))
        self.fitted.fill_(True)  # noqa: FBT003

    def forward(self, graph: ParameterGraph) -> ParameterGraph:
        """The graph with tensors of unit size."""
        if not bool(self.fitted):
            return graph
        return graph.replace(self._times(graph.values, graph.space, self.spread.reciprocal()))

    def inverse(self, state: Mapping[str, Tensor], space: WeightSpace) -> dict[str, Tensor]:
        """A state of unit size as one of the data's size."""
        if not bool(self.fitted):
            return dict(state)
        return dict(state) | self._times(state, space, self.spread)

    def _times(
        self, values: Mapping[str, Tensor], space: WeightSpace, factors: Tensor
    ) -> dict[str, Tensor]:
        kinds = slots(space)
        out: dict[str, Tensor] = {}
        for p in space.params:
            new = values[p.name] * factors[kinds[p.name]].to(values[p.name])
            out |= {name: new for name in (p.name, *p.ties) if name in values}
        return out


def graphs_in(graphs: ParameterGraph | Sequence[ParameterGraph]) -> Sequence[ParameterGraph]:
    """A graph or a sequence of graphs as a sequence."""
    return [graphs] if isinstance(graphs, ParameterGraph) else graphs
