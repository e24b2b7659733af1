"""A batch of networks of a zoo: one stacked graph for each weight space among them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from wspace.augment import Mixture
from wspace.graph import ParameterGraph


@dataclass(frozen=True, eq=False)
class ZooBatch:
    """Networks read from a zoo.

    Attributes:
        graphs: One for each weight space, ``(b, …)`` or with a time axis ``(b, T, …)``.
        table: Columns of numbers, in the order of the graphs: the order a metanet answers in.
        index: Rows of the whole zoo that was opened, whichever view of it was read, in the same
            order.
        mixture: Which networks were mixed into each in training, with which shares, by their places
            in the batch; None if none were. Columns and `index` are those of the network a row
            began with.
    """

    graphs: list[ParameterGraph]
    table: dict[str, Tensor]
    index: Tensor
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, target: torch.device | torch.dtype | str) -> Self:
        """The batch on a device, or with floats of a type.

        Args:
            target: A device moves everything; a dtype converts floats, integers stay.

        Returns:
            A batch; tensors that are already so are shared.
        """
        if isinstance(target, torch.dtype):
            return self._mapped(lambda x: x.to(target) if x.is_floating_point() else x)
        moved = self._mapped(lambda x: x.to(target, non_blocking=True))
        mixture = None if self.mixture is None else self.mixture.to(target)
        return replace(moved, mixture=mixture)

    def pin_memory(self) -> Self:
        """The batch in page-locked memory."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        graphs = [
            replace(
                graph,
                values=MappingProxyType({k: change(x) for k, x in graph.values.items()}),
                rest=MappingProxyType({k: change(x) for k, x in graph.rest.items()}),
            )
            for graph in self.graphs
        ]
        table = {name: change(x) for name, x in self.table.items()}
        return replace(self, graphs=graphs, table=table, index=change(self.index))

    def __repr__(self) -> str:
        columns = ", ".join(self.table) or "no columns"
        return f"ZooBatch({len(self)} networks of {len(self.graphs)} spaces; {columns})"
