"""`GraphMetanet`: an edge-updating message passing network with a global state (GMN)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.graph.structure import Structure
from wspace.nn.edge_kernel import Edges, Ends, Inner, ResidualKernel
from wspace.nn.layout import forms_of
from wspace.nn.message import Step
from wspace.nn.metanet import Metanet, Part
from wspace.nn.pool import pooled


class GMNEdges(ResidualKernel):
    """The edges of `GMNLayer`."""

    names = ("edge_in.weight", "edge_out.weight", "edge_out.bias")

    def forward(
        self, e: Edges, ends: Ends, out: Tensor | None, *, send: bool
    ) -> tuple[Inner, list[Tensor]]:
        """The next state and sums of the hidden layer."""
        before = self.before(e, *ends)
        hidden = self.hidden(before)
        if out is not None:
            self.update(e, hidden, out)
        return (before,), [hidden.sum(3), hidden.sum(2)] if send else []

    def again(self, e: Edges, ends: Ends, new: Tensor | None) -> Inner:
        """What the hidden layer bends."""
        return (self.before(e, *ends),)

    def gradient(
        self, e: Edges, inner: Inner, ends: Ends, ahead: Tensor | None, sent: list[Tensor] | None
    ) -> Ends:
        """Of both ends' terms."""
        grad = None
        if sent is not None:
            grad = self.room("grad", e.shape, inner[0])
            torch.add(sent[0].unsqueeze(3), sent[1].unsqueeze(2), out=grad)
        return self.update_back(e, inner[0], ahead, grad)


class GMNLayer(nn.Module):
    r"""One round: edges, then nodes, then the global state.

    .. math::
        h_{st} &= \sigma(A x_s + B x_t + C e_{st} + D u), \qquad e'_{st} = e_{st} + W h_{st} \\
        x'_i &= x_i + \mathrm{MLP}(x_i, \overline{h}_{\cdot i}, \overline{h}_{i \cdot}, u)

    Lim et al., "Graph Metanetworks for Processing Diverse Neural Architectures" (2024). Edges and
    messages share their hidden layer, and the last linear map of a message, which commutes with the
    average, is part of the node update; averages along and against the edges are told apart there.

    Args:
        channels: Width C.
        part: See `wspace.nn.metanet.Part`.
    """

    reductions = (("sum",), ("sum",))
    kernel = GMNEdges

    def __init__(self, channels: int, *, part: Part = "all") -> None:
        super().__init__()
        c, self.part = channels, part
        self.norm = nn.LayerNorm(c)
        self.source, self.target = nn.Linear(c, c), nn.Linear(c, c)
        self.shared = nn.Linear(c, c, bias=False)
        self.edge_in = nn.Linear(c, c, bias=False)
        self.edge_out = None if part == "nodes" else nn.Linear(c, c)
        if part == "edges":
            return
        self.node = nn.Sequential(nn.Linear(4 * c, 2 * c), nn.SiLU(), nn.Linear(2 * c, c))
        self.whole = nn.Sequential(nn.Linear(2 * c, c), nn.SiLU(), nn.Linear(c, c))

    def nodes(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Projections for the edges; see `wspace.nn.message.MessageLayer`."""
        x = self.norm(x)
        return self.source(x) + self.shared(u)[:, None], self.target(x)

    def advance(self, e: Tensor, ps: Tensor, pt: Tensor) -> Tensor:
        """The next state of the edges."""
        return self._next(e, F.silu(self.edge_in(e) + (ps + pt)))

    def _next(self, e: Tensor, hidden: Tensor) -> Tensor:
        return e if self.edge_out is None else e + self.edge_out(hidden)

    def step(self, e: Tensor, ps: Tensor, pt: Tensor) -> Step:
        """The next state of the edges, and sums of their hidden layer along and against them."""
        hidden = F.silu(self.edge_in(e) + (ps + pt))
        return self._next(e, hidden), (hidden.sum(3),), (hidden.sum(2),)

    def update(
        self, x: Tensor, u: Tensor, received: Any, structure: Structure
    ) -> tuple[Tensor, Tensor]:
        """The next states of nodes and of the whole."""
        (into,), (back,) = received
        degrees = forms_of(structure).degrees
        into, back = (m / d.to(m).unsqueeze(-1) for m, d in zip((into, back), degrees, strict=True))
        wide = u[:, None].expand_as(x)
        x = x + self.node(torch.cat([self.norm(x), into, back, wide], -1))
        return x, u + self.whole(torch.cat([u, pooled(structure, x)], -1))


class GraphMetanet(Metanet):
    """Graph metanetwork (GMN): edge-updating message passing on any parameter graph.

    Options are those of `Metanet`.

    Example:
        >>> import torch, wspace
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> graph = wspace.encode(wspace.trace(net, torch.zeros(1, 3)), net.state_dict())
        >>> GraphMetanet(7, channels=16)(graph).shape
        torch.Size([7])
    """

    def make_layer(self, channels: int, *, part: Part, **options: Any) -> nn.Module:
        """One layer."""
        return GMNLayer(channels, part=part, **options)
