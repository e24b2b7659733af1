"""`Metanet`: what all graph metanets share, from a graph or a mixed list of graphs to an answer."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from wspace.errors import SpaceMismatch, message
from wspace.graph import ParameterGraph
from wspace.nn.batch import by_space, stacked
from wspace.nn.embed import Embedding
from wspace.nn.heads import GraphHead, NeuronHead, ParameterHead
from wspace.nn.message import CHUNK, MessagePassing
from wspace.nn.pool import pooled
from wspace.nn.scales import RoleScales, graphs_in

Head = Literal["graph", "neuron", "parameter"]
Part = Literal["all", "nodes", "edges"]
"""What of a layer is needed: all; all but the next state of the edges, since no one reads it; or
only that, since a head reads it."""


class Metanet(nn.Module):
    """Base of the graph metanets: embedding, layers of messages, and a head.

    Under `torch.compile` a metanet runs as it is: the structure of a graph is no tensor program.

    A subclass gives the layers (`make_layer`), which follow `wspace.nn.message.MessageLayer` and
    have a method ``update(x, u, received, structure)``.

    Args:
        out: Length of the vector per network (head ``"graph"``) or per unit (``"neuron"``);
            ignored by ``"parameter"``.
        channels: Width C.
        layers: Number of layers.
        head: What is returned; see `forward`.
        probes: Probes of the networks' function, for networks of one module; their activations
            become node features.
        dropout: Dropout on node states.
        stream: True to recompute edge states instead of keeping them (memory does not grow with
            parameters × channels), False to keep them, None to decide by size.
        chunk: Edges computed at once; None for the number that was measured to be fast.
        options: Options of the layers.
    """

    edges_at_once: ClassVar[int] = CHUNK

    def __init__(
        self,
        out: int = 1,
        *,
        channels: int = 64,
        layers: int = 4,
        head: Head = "graph",
        probes: nn.Module | None = None,
        dropout: float = 0.0,
        stream: bool | None = None,
        chunk: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kind: Head = head
        self.stream, self.chunk = stream, chunk or self.edges_at_once
        self.embedding = self.make_embedding(
            channels, 0 if probes is None else int(cast(Any, probes).count)
        )
        self.probes = probes
        self.scales = RoleScales()
        parts: list[Part] = ["all"] * layers
        if head != "parameter" and parts:
            parts[-1] = "nodes"
        self.layers = nn.ModuleList(
            self.make_layer(channels, part=part, **options) for part in parts
        )
        self.dropout = nn.Dropout(dropout)
        self.start = nn.Parameter(torch.zeros(channels))
        self.last = None
        if head == "parameter":
            self.last = self.make_layer(channels, part="edges", **options)
        self.head = self.make_head(head, channels, out, dropout, **options)

    def make_embedding(self, channels: int, probes: int) -> Embedding:
        """Makes the first states; a subclass may have its own."""
        return Embedding(channels, probes)

    def make_head(
        self, kind: Head, channels: int, out: int, dropout: float, **options: Any
    ) -> nn.Module:
        """The head; a subclass may have its own."""
        heads = {
            "graph": lambda: GraphHead(channels, out, dropout=dropout),
            "neuron": lambda: NeuronHead(channels, out),
            "parameter": lambda: ParameterHead(channels),
        }
        if kind not in heads:
            raise ValueError(
                message(f"metanet: unknown head {kind!r}", expected=f"one of {tuple(heads)}")
            )
        return heads[kind]()

    def make_layer(self, channels: int, *, part: Part, **options: Any) -> nn.Module:
        """One layer, or the part of it that is needed."""
        raise NotImplementedError

    def fit_statistics(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> None:
        """Sets the sizes by which tensors are divided, by role, from training networks.

        Until then tensors are taken as they are, weight matrices times the root of their fan-in.
        Probes always run the networks as they are.

        Args:
            graphs: Training networks, as in `forward`.

        Raises:
            SpaceMismatch: If there are none.
        """
        self.scales.fit(graphs_in(graphs))

    def forward(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> Any:
        """Runs on one graph, or on a list of graphs of any architectures.

        Args:
            graphs: A graph, whose leading batch axes stand for several networks of one space; or a
                list of graphs, mixed as they come.

        Returns:
            Head ``"graph"``: ``(*batch, out)``; for a list ``(rows, out)``, graphs in order, one
            row for each network. Head ``"neuron"``: for every node set ``(*batch, size, out)``.
            Head ``"parameter"``: a state. For a list, the last two return lists.

        Raises:
            SpaceMismatch: If a graph has no edges, the list is empty, or probes are of another
                space.
        """
        if torch.compiler.is_compiling():  # the structure of a graph is no tensor program
            return torch.compiler.disable(self._run)(graphs)  # pyright: ignore
        return self._run(graphs)

    def _run(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> Any:
        if isinstance(graphs, ParameterGraph):
            return self._one(graphs)
        return _scattered(graphs, self._one, self.kind)

    def _one(self, graph: ParameterGraph) -> Any:
        if not graph.structure.edges:
            raise SpaceMismatch(
                message("metanet: the graph has no edges", help="is there a parameter at all?")
            )
        x, u, edges = self.begin(graph)
        for layer in self.layers:
            received = edges.run(cast(Any, layer), x, u)
            x, u = cast(Any, layer).update(x, u, received, graph.structure)
            x = self.regularize(x)
        return self.answer(graph, x, u, edges)

    def begin(self, graph: ParameterGraph) -> tuple[Tensor, Tensor, MessagePassing]:
        """First states of the nodes ``(B, N, C)`` and of the whole ``(B, C)``, and the edges."""
        structure, rows, probed = graph.structure, prod(graph.batch), self.probed(graph)
        graph = self.scales(graph)
        x = self.embedding.nodes(graph, rows, probed)
        u = self.start.expand(rows, -1) + pooled(structure, x)
        coefficients, codes = self.embedding.edges(structure)
        edges = MessagePassing(graph, coefficients, codes, stream=self.stream, chunk=self.chunk)
        return x, u, edges

    def regularize(self, x: Tensor) -> Tensor:
        """Dropout between layers, on node states."""
        return self.dropout(x)

    def answer(self, graph: ParameterGraph, x: Tensor, u: Tensor, edges: MessagePassing) -> Any:
        """What the head makes of the last states, the batch axes of the graph in front."""
        structure, batch = graph.structure, graph.batch
        if self.kind == "graph":
            return self.head(structure, x, u).reshape(*batch, -1)
        if self.kind == "neuron":
            made = self.head(structure, x, u)
            return {n: y.reshape(*batch, *y.shape[1:]) for n, y in made.items()}
        last, unit = cast(Any, self.last), self.scales(graph)
        made = self.head(unit, x, u, lambda final: edges.read(last, x, u, final))
        return self.scales.inverse(made, graph.space)

    def probed(self, graph: ParameterGraph) -> dict[int, Tensor]:
        """Activations of the probes by node set, ``(B, size, count)``; empty without probes."""
        if self.probes is None:
            return {}
        rows = prod(graph.batch)
        return {n: y.reshape(rows, *y.shape[-2:]) for n, y in self.probes(graph).nodes.items()}


def _scattered(graphs: Sequence[ParameterGraph], run: Any, kind: Head) -> Any:
    """Runs every space's graphs at once and puts the answers in the order of the list."""
    out: list[Any] = [None] * len(graphs)
    for places in by_space(graphs):
        some = [graphs[i] for i in places]
        parts = _cut(run(stacked(some)), [prod(g.batch) for g in some])
        for i, part, g in zip(places, parts, some, strict=True):
            out[i] = part if kind == "graph" else _shaped(part, g, kind)
    return torch.cat(out) if kind == "graph" else out


def _cut(answer: Tensor | Mapping[Any, Tensor], rows: list[int]) -> list[Any]:
    if isinstance(answer, Tensor):
        return list(answer.split(rows))
    pieces = {k: v.split(rows) for k, v in answer.items()}
    return [{k: v[i] for k, v in pieces.items()} for i in range(len(rows))]


def _shaped(part: Mapping[Any, Tensor], graph: ParameterGraph, kind: Head) -> dict[Any, Tensor]:
    """Rows of one graph with its batch axes, and what else its state held."""
    out = {k: v.reshape(*graph.batch, *v.shape[1:]) for k, v in part.items()}
    return {**out, **graph.rest} if kind == "parameter" else out
