"""Bodies of graph hypernetworks: from graphs of architectures to a state for every node."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.hyper.graph.architecture import FAR, MEASURES, MOST, ArchitectureGraph

Body = Literal["graphormer", "gated", "none"]
"""Attention with distances (GHN-3), a gated network over shortest paths (GHN-2), or nothing between
nodes: then every tensor is predicted from what is known of itself alone."""

WAVES = 8


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Several graphs beside each other, filled up to the largest.

    Attributes:
        graphs: The graphs.
        real: True for nodes, false for filling, ``(B, N)``.
        distances: ``(B, N, N)``.
        degrees: ``(B, N, 2)``.
    """

    graphs: tuple[ArchitectureGraph, ...]
    real: Tensor
    distances: Tensor
    degrees: Tensor


def batched(graphs: Sequence[ArchitectureGraph], device: torch.device) -> GraphBatch:
    """Puts graphs beside each other.

    Args:
        graphs: Graphs of any sizes.
        device: Where to.

    Returns:
        The batch.
    """
    n = max(g.size for g in graphs)
    real = torch.zeros(len(graphs), n, dtype=torch.bool)
    distances = torch.full((len(graphs), n, n), FAR + 1)
    degrees = torch.zeros(len(graphs), n, 2, dtype=torch.int64)
    for i, g in enumerate(graphs):
        real[i, : g.size] = True
        distances[i, : g.size, : g.size] = g.distances
        degrees[i, : g.size] = g.degrees
    return GraphBatch(tuple(graphs), real.to(device), distances.to(device), degrees.to(device))


class NodeEmbedding(nn.Module):
    """First states of nodes: words, sizes, depth and degrees.

    Words are hashed, so that no vocabulary has to be fixed: one that was never seen has a random
    code, the same wherever it appears.

    Args:
        channels: Width.
        buckets: Rows of the table of words.
    """

    def __init__(self, channels: int, buckets: int = 1024) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.EmbeddingBag(buckets, channels, mode="mean")
        self.degrees = nn.Embedding(2 * (MOST + 1), channels)
        self.measures = nn.Sequential(
            nn.Linear(MEASURES * (1 + 2 * WAVES), channels),
            nn.GELU(),
            nn.Linear(channels, channels),
        )
        nn.init.normal_(self.degrees.weight, std=0.1)

    def forward(self, batch: GraphBatch) -> Tensor:
        """First states, ``(B, N, C)``, zero where there is no node."""
        like = self.degrees.weight
        words = torch.cat([g.words for g in batch.graphs]).to(like.device) % self.buckets
        counts = torch.cat([g.counts for g in batch.graphs]).to(like.device)
        measures = torch.cat([g.measures for g in batch.graphs]).to(like)
        rates = 2.0 ** torch.arange(WAVES, device=like.device, dtype=like.dtype) * (pi / 4)
        phase = (measures[..., None] * rates).flatten(1)
        made = self.table(words, counts.cumsum(0) - counts) * 2
        made = made + self.measures(torch.cat([measures, phase.sin(), phase.cos()], 1))
        x = made.new_zeros(*batch.real.shape, made.shape[-1])
        x[batch.real] = made
        into, out = batch.degrees.unbind(-1)
        x = x + self.degrees(into) + self.degrees(out + MOST + 1)
        return x * batch.real[..., None]


class DistanceBias(nn.Module):
    """What is added to attention scores: a function of both distances, for every head.

    Args:
        heads: Attention heads.
        width: Width of the codes of distances.
    """

    def __init__(self, heads: int, width: int = 32) -> None:
        super().__init__()
        self.forth, self.back = nn.Embedding(FAR + 2, width), nn.Embedding(FAR + 2, width)
        self.read = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, heads))

    def forward(self, batch: GraphBatch) -> Tensor:
        """Scores ``(B, heads, N, N)``, minus infinity towards filling."""
        pairs = self.forth.weight[:, None] + self.back.weight[None]
        table = self.read(pairs).flatten(0, 1)  # every pair of distances once
        d = batch.distances
        bias = F.embedding(d * (FAR + 2) + d.mT, table).permute(0, 3, 1, 2)
        return bias.masked_fill(~batch.real[:, None, None], float("-inf"))


class GraphormerLayer(nn.Module):
    """Attention with given additions to its scores, and a perceptron; norms before both.

    Args:
        channels: Width.
        heads: Attention heads.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = perceptron(channels)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Next states ``(B, N, C)``."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def perceptron(channels: int) -> nn.Sequential:
    """Two layers, four times wider between them."""
    return nn.Sequential(
        nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
    )


class Graphormer(nn.Module):
    """Attention between all nodes of a graph, biased by the distances along and against its edges.

    Args:
        channels: Width.
        layers: Number of layers.
        heads: Attention heads.
    """

    def __init__(self, channels: int, layers: int, heads: int) -> None:
        super().__init__()
        self.bias = DistanceBias(heads)
        self.layers = nn.ModuleList(GraphormerLayer(channels, heads) for _ in range(layers))

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        """States of the nodes ``(B, N, C)`` after all layers."""
        bias = self.bias(batch)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Gated(nn.Module):
    """Gated updates with messages from all nodes on a path, divided by their distance.

    The published network visits nodes one after another; here all are updated at once, in `layers`
    rounds forward and backward with shared weights.

    Args:
        channels: Width.
        layers: Number of rounds.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.rounds = layers
        self.forth, self.back = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.cell = nn.GRUCell(channels, channels)

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        """States of the nodes ``(B, N, C)`` after all rounds."""
        d = batch.distances
        near = torch.where((d > 0) & (d <= FAR), 1 / d.clamp(min=1), 0).to(x)
        near = near / near.sum(1, keepdim=True).clamp(min=1)
        for _ in range(self.rounds):
            for read, paths in ((self.forth, near.mT), (self.back, near)):
                message = paths @ F.gelu(read(x))
                x = self.cell(message.flatten(0, 1), x.flatten(0, 1)).view_as(x)
        return x


class Alone(nn.Module):
    """Perceptrons on every node by itself: the ablation without a graph.

    Args:
        channels: Width.
        layers: Number of layers.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels), *perceptron(channels)) for _ in range(layers)
        )

    def forward(self, x: Tensor, batch: GraphBatch) -> Tensor:
        """States of the nodes ``(B, N, C)`` after all layers."""
        del batch
        for layer in self.layers:
            x = x + layer(x)
        return x
