"""What a graph metanet returns: one vector per network, per unit, or a new state.

Heads read the last node states; the parameter head reads the edges a last time.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.graph import ParameterGraph, decode
from wspace.graph.structure import Structure
from wspace.nn.embed import Kinds, Taps
from wspace.nn.layout import forms_of
from wspace.nn.pool import pooled

Reader = Callable[[Callable[[Tensor, int], Tensor]], list[Tensor | None]]


class GraphHead(nn.Module):
    """One vector per network: pooled node states through an MLP; invariant.

    Args:
        channels: Width of the node states.
        out: Length of the vector.
        hidden: Width of the MLP; that of the nodes if None.
        dropout: Dropout inside the MLP.
    """

    def __init__(
        self, channels: int, out: int, *, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width, pools = hidden or channels, 6
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(pools * channels, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.LayerNorm(width),
            _readout(width, out),
        )

    def forward(self, structure: Structure, x: Tensor, u: Tensor) -> Tensor:
        """Vectors ``(B, out)`` from node states ``(B, N, C)`` and global states ``(B, C)``."""
        x = self.norm(x)
        parts = [pooled(structure, x, kind) for kind in ("input", "hidden", "output")]
        spread = pooled(structure, x.square(), None) - pooled(structure, x, None).square()
        peak = x.amax(1)
        return self.mlp(torch.cat([*parts, spread.clamp(min=0), peak, u], -1))


def _reading(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU())


def _readout(channels: int, out: int) -> nn.Linear:
    """A linear map whose outputs start with variance 1 behind a LayerNorm."""
    linear = nn.Linear(channels, out)
    nn.init.normal_(linear.weight, std=channels**-0.5)
    nn.init.zeros_(linear.bias)
    return linear


class NeuronHead(nn.Module):
    """A vector for every unit; moves with the units.

    Args:
        channels: Width of the node states.
        out: Length of the vectors.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.unit, self.whole = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.out = nn.Sequential(nn.LayerNorm(channels), _readout(channels, out))

    def forward(self, structure: Structure, x: Tensor, u: Tensor) -> dict[int, Tensor]:
        """For every node set ``(B, size, out)``, from node and global states."""
        made = self.out(F.silu(self.unit(self.norm(x)) + self.whole(u)[:, None]))
        parts = made.split([n.size for n in structure.nodes], 1)
        return dict(enumerate(parts))


class ParameterHead(nn.Module):
    r"""A new state: :math:`\theta' = g\,\theta + \Delta(\theta)`; moves with the state.

    The change of an entry is read from its edge's state and its tap; that of a node feature from
    the node's. It is measured in units of the root of the fan-in, as the first states of edges are.

    Args:
        channels: Width of the states.
        residual: True to start from :math:`g = 1`, the identity; False for :math:`g = 0`.
        scale: Factor of the change at the start.
        edge: Map from edge states; one with a norm and an activation if None.
        node: The same for node states; None for no map.
    """

    def __init__(
        self,
        channels: int,
        *,
        residual: bool = True,
        scale: float = 0.1,
        edge: nn.Module | None = None,
        node: nn.Module | Literal["own"] | None = "own",
    ) -> None:
        super().__init__()
        self.kinds = Kinds(channels)
        self.taps, self.feature_taps = Taps(channels), Taps(channels)
        self.edge = edge or _reading(channels)
        self.node = _reading(channels) if node == "own" else node
        self.gain = nn.Parameter(torch.tensor(1.0 if residual else 0.0))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(
        self, graph: ParameterGraph, x: Tensor, u: Tensor, read: Reader
    ) -> dict[str, Tensor]:
        """The new state.

        Args:
            graph: The graph that went in.
            x: Node states, ``(B, N, C)``.
            u: Global states, ``(B, C)``; the edges have seen them.
            read: Runs the edges a last time: `MessagePassing.read` with its layer bound.

        Returns:
            Tensors by name, ``(*batch, *shape)``, in the types that came in.
        """
        rows = x if self.node is None else self.node(x)
        features = forms_of(graph.structure).features
        return self.state(graph, {f.index: rows for f in features}, read)

    def state(
        self, graph: ParameterGraph, rows: Mapping[int, Tensor], read: Reader
    ) -> dict[str, Tensor]:
        """The new state from what is known of nodes, ``(B, N, C)`` for every feature block."""
        structure = graph.structure
        forms = forms_of(structure)
        codes = self.kinds(structure, nodes=False)
        share = codes.shape[-1] ** -0.5 * self.scale
        made = self.taps(list(forms.edges), codes[[f.index for f in forms.edges]])
        taps = [t.mT * (share * f.sizes[2] ** -0.5) for t, f in zip(made, forms.edges, strict=True)]
        changes = read(lambda e, i: self.edge(e) @ taps[i])
        blocks: dict[int, Tensor] = {}
        for form, change in zip(forms.edges, changes, strict=True):
            if change is not None and not form.block.again:
                blocks[form.index] = form.entries_back(change, graph.batch)
        own = [f for f in forms.features if not f.block.again]
        made = self.feature_taps(own, codes[[f.index for f in own]])
        for form, tap in zip(own, made, strict=True):
            units = form.target + structure.offsets[form.block.target.nodes]
            there = rows[form.index][:, units.to(codes.device)]
            change = there @ (tap.mT * (share * form.sizes[1] ** 0.5))
            blocks[form.index] = form.entries_back(change, graph.batch)
        return decode(self._changed(graph, blocks))

    def _changed(self, graph: ParameterGraph, changes: dict[int, Tensor]) -> ParameterGraph:
        new = {}
        for index, change in changes.items():
            old = graph.block(index)
            new[index] = (self.gain * old + change).to(old.dtype)
        return graph.replace_blocks(new)
