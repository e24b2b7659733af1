"""`ParameterGraph`: a state seen as a graph, and the way back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from wspace.action import Transform, act
from wspace.errors import SpaceMismatch, message
from wspace.graph.structure import Structure, structure_of
from wspace.space import WeightSpace
from wspace.wiring import Block


def window(x: Tensor, block: Block) -> Tensor:
    """The entries of a block: a view of the parameter, ``(*batch, *loops)``.

    Args:
        x: The parameter, ``(*batch, *shape)``.
        block: A block of this parameter.

    Returns:
        A view; loops that repeat entries have stride 0.
    """
    lead = x.dim() - len(block.window)
    shape = list(x.shape[:lead])
    for k, (start, stop, step) in enumerate(block.window):
        if (start, stop, step) != (0, x.shape[lead + k], 1):
            x = x[(slice(None),) * (lead + k) + (slice(start, stop, step),)]
        shape += [n for n, d in zip(block.sizes, block.of, strict=True) if d == k]
    repeated = [n for n, d in zip(block.sizes, block.of, strict=True) if d < 0]
    x = _split(x, lead, block)
    return x.reshape(shape) if not repeated else _repeat(x, shape, repeated)


def _split(x: Tensor, lead: int, block: Block) -> Tensor:
    for k in reversed(range(len(block.window))):
        sizes = [n for n, d in zip(block.sizes, block.of, strict=True) if d == k]
        if sizes:
            x = x.unflatten(lead + k, sizes) if len(sizes) > 1 else x
        else:
            x = x.squeeze(lead + k)
    return x


def _repeat(x: Tensor, shape: list[int], repeated: list[int]) -> Tensor:
    x = x.reshape(shape)
    return x[(..., *[None] * len(repeated))].expand(*shape, *repeated)


@dataclass(frozen=True, eq=False)
class ParameterGraph:
    """A state as a graph: node sets, and blocks of parameters between them.

    Attributes:
        space: Weight space of the state.
        values: Every parameter and float buffer by name, ``(*batch, *shape)``: the state's own
            tensors, ties once.
        rest: What else the state held (integer buffers); `decode` returns it.
    """

    space: WeightSpace
    values: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]

    @property
    def structure(self) -> Structure:
        """Unit indices of every block; shared by all graphs of the space."""
        return structure_of(self.space)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        for p in self.space.params:
            shape = tuple(self.values[p.name].shape)
            return shape[: len(shape) - len(p.axes)]
        return ()

    def block(self, index: int) -> Tensor:
        """Entries of one block, ``(*batch, *loops)``: a view of the parameter.

        Args:
            index: Place in ``structure.blocks``.

        Returns:
            The entries; `Block.roles` says what each dimension runs over.

        Raises:
            SpaceMismatch: If the block is structural, so that it has no entries.
        """
        block = self.structure.blocks[index]
        if block.structural:
            raise SpaceMismatch(f"graph: block {index} ({block.op}) is structural and has no value")
        return window(self.values[block.param], block)

    def edges(self) -> list[tuple[Block, Tensor | None]]:
        """Every block between node sets with its entries, None for structural ones."""
        s = self.structure
        return [(s.blocks[i], None if s.blocks[i].structural else self.block(i)) for i in s.edges]

    def features(self, nodes: int) -> list[tuple[Block, Tensor]]:
        """Blocks that are features of the units of one node set, with their entries."""
        s = self.structure
        return [(s.blocks[i], self.block(i)) for i in s.features[nodes]]

    def replace(self, values: Mapping[str, Tensor]) -> Self:
        """The graph with other tensors for some parameters.

        Args:
            values: New tensors by name (any of a parameter's tied names), batch axes first.

        Returns:
            A graph of the same space.

        Raises:
            SpaceMismatch: If a name is unknown or a shape does not fit.
        """
        merged = {**self.values, **{self.space[name].name: x for name, x in values.items()}}
        self.space.validate(merged)
        return replace(self, values=MappingProxyType(merged))

    def replace_blocks(self, values: Mapping[int, Tensor]) -> Self:
        """The graph with other entries in some blocks.

        Args:
            values: New entries by place in ``structure.blocks``, ``(*batch, *loops)``; loops that
                repeat entries must agree, their first index is read.

        Returns:
            A graph of the same space; parameters of untouched blocks are the same objects.

        Raises:
            SpaceMismatch: If a block holds no entries of its own or a shape does not fit.
        """
        fresh: dict[str, Tensor] = {}
        for index, new in values.items():
            block = self.structure.blocks[index]
            if block.structural or block.again:
                raise SpaceMismatch(
                    message(
                        f"graph: block {index} of {block.param or block.op!r} holds no entries",
                        expected="a block that is neither structural nor `again`",
                        help="`graph.structure.holders` lists the blocks of each parameter",
                    )
                )
            old = self.values[block.param]
            if block.param not in fresh:
                fresh[block.param] = old.to(new.dtype, copy=True)
            view = window(fresh[block.param], block)
            if view.shape != new.shape:
                raise SpaceMismatch(
                    message(
                        f"graph: new entries of block {index} ({block.param!r}) do not fit",
                        expected=f"shape {tuple(view.shape)}",
                        got=f"shape {tuple(new.shape)}",
                    )
                )
            repeats = sum(d < 0 for d in block.of)
            first = (..., *[0] * repeats)
            fresh[block.param] = _written(fresh[block.param], block, new[first])
        return self.replace(fresh)

    def act(self, transform: Transform) -> Self:
        """The graph of the state moved by a group element: a relabelling of its units.

        Args:
            transform: Group element of the graph's space.

        Returns:
            A graph of the same space.

        Raises:
            SpaceMismatch: If the transform belongs to another space.
        """
        moved = act(transform, self.values, self.space)
        return replace(self, values=MappingProxyType(moved))

    def __repr__(self) -> str:
        s = self.structure
        entries = sum(prod(x.shape[len(self.batch) :]) for x in self.values.values())
        batch = f", batch {self.batch}" if self.batch else ""
        return (
            f"ParameterGraph({len(s.nodes)} node sets, {s.total} units, {len(s.blocks)} blocks, "
            f"{entries} entries{batch})"
        )


def _written(x: Tensor, block: Block, new: Tensor) -> Tensor:
    """The parameter with the entries of a block replaced; differentiable in the new entries."""
    lead = x.dim() - len(block.window)
    sizes = [len(range(*w)) for w in block.window]
    new = new.reshape(*x.shape[:lead], *sizes)
    if tuple(new.shape) == tuple(x.shape):
        return new
    x = x.clone() if x.requires_grad or not new.requires_grad else x
    key = (slice(None),) * lead + tuple(slice(*w) for w in block.window)
    index = torch.zeros_like(x, dtype=torch.bool)
    index[key] = True
    return x.masked_scatter(index, new)


def encode(space: WeightSpace, state: Mapping[str, Tensor]) -> ParameterGraph:
    """The parameter graph of a state: views, no copy.

    Args:
        space: Weight space of the state, from `wspace.trace`.
        state: Tensors by name, ``(*batch, *shape)``. What the space does not know, such as integer
            buffers, is kept aside.

    Returns:
        The graph; `decode` inverts it bit for bit.

    Raises:
        SpaceMismatch: If the state does not fit the space, tied names hold different values, or
            the space has no wiring.

    Example:
        >>> import torch, wspace
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> graph = encode(space, mlp.state_dict())
        >>> graph
        ParameterGraph(4 node sets, 11 units, 4 blocks, 32 entries)
        >>> all(torch.equal(x, mlp.state_dict()[k]) for k, x in decode(graph).items())
        True
    """
    structure_of(space)
    space.validate(state)
    _check_ties(space, state)
    known = space.by_name
    values = {p.name: state[p.name] for p in space.params}
    rest = {name: x for name, x in state.items() if name not in known}
    return ParameterGraph(space, MappingProxyType(values), MappingProxyType(rest))


def _check_ties(space: WeightSpace, state: Mapping[str, Tensor]) -> None:
    """Refuses a state in which tied names differ: one of the two would be lost."""
    wrong: list[str] = []
    for p in space.params:
        x = state[p.name]
        for name in p.ties:
            y = state.get(name, x)
            if y is x or y.is_meta or (y.data_ptr() == x.data_ptr() and y.shape == x.shape):
                continue
            if y.shape != x.shape or not torch.equal(x, y):
                wrong.append(f"{p.name!r} and {name!r}, which are one parameter, with two values")
    if wrong:
        raise SpaceMismatch(
            message(
                "encode: tied parameters differ",
                got=wrong,
                help="trace the module with these parameters untied",
            )
        )


def decode(graph: ParameterGraph) -> dict[str, Tensor]:
    """The state of a graph: the inverse of `encode`.

    Args:
        graph: A graph.

    Returns:
        Tensors by name, those of the graph; tied names share one tensor.
    """
    state = {name: graph.values[p.name] for p in graph.space.params for name in (p.name, *p.ties)}
    state.update(graph.rest)
    return state
