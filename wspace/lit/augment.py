"""What is done to networks while a metanet is trained on them.

An `Augment` maps a graph and a generator to a graph of the same space. Each network of a batch is
changed in its own way unless an option says otherwise; buffers and integer entries are left alone
by those that change values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from wspace.action import KINDS, sample
from wspace.errors import WSpaceError, message
from wspace.graph import ParameterGraph
from wspace.space import Role

Augment = Callable[[ParameterGraph, torch.Generator], ParameterGraph]
"""A change of networks in training; the generator is on the CPU."""


@dataclass(frozen=True)
class Symmetry:
    """Moves networks by random elements of their symmetry group: their function stays.

    Attributes:
        kinds: Which symmetries: ``"permutation"``, ``"scale"``, ``"sign"``, ``"phase"``.
        parts: Different elements in one batch; the rows that share one are moved together, which
            is faster than one for each. 0 for one for each row.
    """

    kinds: tuple[str, ...] = ("permutation",)
    parts: int = 8

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            WSpaceError: If a kind is unknown.
        """
        unknown = [k for k in self.kinds if k not in KINDS]
        if unknown:
            raise WSpaceError(
                message(f"Symmetry: unknown kinds {unknown}", expected=f"some of {KINDS}")
            )

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph with its units relabelled and rescaled."""
        if not graph.batch:
            return graph.act(sample(graph.space, generator=generator, kinds=self.kinds))
        rows = torch.arange(graph.batch[0])
        parts = rows.tensor_split(min(self.parts or len(rows), len(rows)) or 1)
        moved = [
            _rows(graph, part).act(sample(graph.space, generator=generator, kinds=self.kinds))
            for part in parts
        ]
        return _with(graph, {n: torch.cat([g.values[n] for g in moved]) for n in graph.values})


@dataclass(frozen=True)
class Noise:
    """Adds normal noise to parameters.

    Attributes:
        std: Standard deviation of the noise over that of the tensor's own entries, network by
            network; a tensor of equal entries stays.
    """

    std: float = 0.05

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph with noise on its parameters."""
        source, lead, changed = _near(graph, generator), len(graph.batch), {}
        for p in graph.space.params:
            x = graph.values[p.name]
            if p.buffer or not p.numel:
                continue
            entries = x.flatten(lead) if x.dim() > lead else x[..., None]
            spread = entries.std(-1, correction=0).reshape(*graph.batch, *[1] * (x.dim() - lead))
            noise = torch.randn(x.shape, generator=source, device=x.device, dtype=x.dtype)
            changed[p.name] = x + self.std * spread * noise
        return _with(graph, changed)


@dataclass(frozen=True)
class Drop:
    """Sets weights to zero, as pruning at random does.

    Attributes:
        share: Probability for an entry of a weight matrix; biases and norms stay.
    """

    share: float = 0.1

    def __call__(self, graph: ParameterGraph, generator: torch.Generator) -> ParameterGraph:
        """The graph with some weights missing."""
        source, changed = _near(graph, generator), {}
        for p in graph.space.params:
            if p.role in {Role.MATRIX, Role.TABLE}:
                x = graph.values[p.name]
                kept = torch.rand(x.shape, generator=source, device=x.device) >= self.share
                changed[p.name] = x * kept
        return _with(graph, changed)


def augmented(
    graphs: Sequence[ParameterGraph], augment: Sequence[Augment], generator: torch.Generator
) -> list[ParameterGraph]:
    """Graphs after all changes, in order.

    Args:
        graphs: Graphs.
        augment: What is done to each, one after another.
        generator: Source of randomness, on the CPU.

    Returns:
        New graphs of the same spaces; the given ones are not changed.
    """
    out: list[ParameterGraph] = []
    for graph in graphs:
        for change in augment:
            graph = change(graph, generator)  # noqa: PLW2901
        out.append(graph)
    return out


def stream(*numbers: int) -> torch.Generator:
    """A generator that depends on some whole numbers and on nothing else.

    Not that of a cohort (`wspace.zoo.generator_of`): what is drawn from it is in no file.

    Args:
        numbers: A seed, and what tells apart what is drawn with it.

    Returns:
        A fresh generator on the CPU.
    """
    seed = 0
    for n in numbers:
        seed = (seed * 6364136223846793005 + n + 1442695040888963407) % (1 << 63)
    return torch.Generator().manual_seed(seed)


generator_of = stream  # its name before; wspace.lit.nowcasting still says it


def _near(graph: ParameterGraph, generator: torch.Generator) -> torch.Generator:
    """A generator where the graph is; drawing there is faster than moving what was drawn."""
    device = next((x.device for x in graph.values.values()), torch.device("cpu"))
    if device.type == generator.device.type:
        return generator
    seed = int(torch.randint(1 << 62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def _rows(graph: ParameterGraph, rows: Tensor) -> ParameterGraph:
    start, stop = int(rows[0]), int(rows[-1]) + 1
    values = {name: x[start:stop] for name, x in graph.values.items()}
    return replace(graph, values=MappingProxyType(values))


def _with(graph: ParameterGraph, changed: dict[str, Any]) -> ParameterGraph:
    return replace(graph, values=MappingProxyType({**graph.values, **changed}))
