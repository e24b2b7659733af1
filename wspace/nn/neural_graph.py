"""Neural graphs: `NeuralGraphGNN` (PNA with FiLM edges) and `NeuralGraphTransformer` (NG-T).

Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks"
(2024). Messages run along and against the edges of the parameter graph, which share their edge
terms; the published transformer attends over all pairs of units.
"""

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import message
from wspace.graph.structure import Structure
from wspace.nn.layout import Forms, forms_of
from wspace.nn.message import Step
from wspace.nn.metanet import Metanet, Part
from wspace.nn.neural_graph_edges import CAP, PNAEdges, RelationalEdges
from wspace.nn.pool import pooled


class _EdgeUpdate(nn.Module):
    r""":math:`e' = e + W\,\sigma(C e + A x_s + B x_t)`, with the node terms computed per node."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, channels, bias=False)
        self.outer = nn.Linear(channels, channels)

    def forward(self, e: Tensor, ends: Tensor) -> Tensor:
        return e + self.outer(F.silu(self.inner(e) + ends))


@lru_cache(maxsize=64)
def amplification(forms: Forms) -> tuple[Tensor, Tensor]:
    """Scalers of PNA, the log degree over its mean, for messages along and against edges, ``(N,)``.

    Corso et al., "Principal Neighbourhood Aggregation for Graph Nets" (2020), eq. 5. The mean is
    that of the graph itself, so an answer does not depend on what else is in the batch.

    Args:
        forms: The blocks of the graph.

    Returns:
        The scalers of the two directions.
    """
    logs = [(d + 1).log() for d in forms.degrees]
    return logs[0] / logs[0].mean(), logs[1] / logs[1].mean()


class PNALayer(nn.Module):
    r"""Messages :math:`s(e) \odot \mathrm{MLP}(x_i, x_j) + t(e)`, four averages, two scalers.

    Args:
        channels: Width C.
        part: See `wspace.nn.metanet.Part`.
    """

    reductions = (("sum", "sum", "max", "min"), ("sum", "sum", "max", "min"))
    kernel = PNAEdges

    def __init__(self, channels: int, *, part: Part = "all") -> None:
        super().__init__()
        self.part = part
        c, parts = channels, 1 if part == "edges" else 2
        self.norm = nn.LayerNorm(c)
        self.source, self.target = nn.Linear(c, parts * c), nn.Linear(c, parts * c)
        self.shared = nn.Linear(c, parts * c, bias=False)
        self.edge = _EdgeUpdate(c)
        if part == "edges":
            return
        self.film, self.pair = nn.Linear(c, 2 * c), nn.Linear(c, c)
        nn.init.ones_(self.film.bias[:c])  # scales start around 1
        self.node = nn.Sequential(nn.Linear(17 * c, c), nn.SiLU(), nn.Linear(c, c))
        self.whole = nn.Sequential(nn.Linear(2 * c, c), nn.SiLU(), nn.Linear(c, c))

    def nodes(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Projections for the edges; see `wspace.nn.message.MessageLayer`."""
        x = self.norm(x)
        return self.source(x) + self.shared(u)[:, None], self.target(x)

    def advance(self, e: Tensor, ps: Tensor, pt: Tensor) -> Tensor:
        """The next state of the edges."""
        c = e.shape[-1]
        return self.edge(e, ps[..., :c] + pt[..., :c])

    def step(self, e: Tensor, ps: Tensor, pt: Tensor) -> Step:
        """Edges, and sums, sums of squares, maxima and minima of messages in both directions."""
        c = e.shape[-1]
        e = self.edge(e, ps[..., :c] + pt[..., :c])
        scale, shift = self.film(e).split(c, -1)
        pair = self.pair(F.silu(ps[..., c:] + pt[..., c:]))
        m = torch.addcmul(shift, scale, pair)
        squares = m.square()

        def four(dim: int) -> tuple[Tensor, ...]:
            return m.sum(dim), squares.sum(dim), m.amax(dim), m.amin(dim)

        return e, four(3), four(2)

    def update(
        self, x: Tensor, u: Tensor, received: Any, structure: Structure
    ) -> tuple[Tensor, Tensor]:
        """The next states of nodes and of the whole."""
        forms = forms_of(structure)
        parts = [self.norm(x)]
        pairs = zip(received, forms.degrees, amplification(forms), strict=True)
        for (total, squares, top, low), degree, scaler in pairs:
            count = degree.to(x).unsqueeze(-1)
            mean = total / count
            spread = (squares / count - mean.square()).clamp(min=0)
            some = torch.cat([mean, (spread + 1e-6).sqrt(), top, low], -1)
            parts += [some, some * scaler.to(x).unsqueeze(-1)]
        x = x + self.node(torch.cat(parts, -1))
        return x, u + self.whole(torch.cat([u, pooled(structure, x)], -1))


class NeuralGraphGNN(Metanet):
    """NG-GNN: principal neighbourhood aggregation with edge-modulated messages.

    Options are those of `Metanet`.

    Example:
        >>> import torch, wspace
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> graph = wspace.encode(wspace.trace(net, torch.zeros(1, 3)), net.state_dict())
        >>> NeuralGraphGNN(7, channels=16)(graph).shape
        torch.Size([7])
    """

    def make_layer(self, channels: int, *, part: Part, **options: Any) -> nn.Module:
        """One layer."""
        return PNALayer(channels, part=part, **options)


class RelationalLayer(nn.Module):
    r"""Relational attention over the edges at a unit, in both directions, and a feed-forward part.

    .. math::
        q_{ij} = W_q x_i + E_q e_{ij}, \quad k_{ij} = W_k x_j + E_k e_{ij}, \quad
        v_{ij} = (W_v x_j) \odot (E_m e_{ij}) + E_v e_{ij}

    Diao and Loynd, "Relational Attention" (2023), with normalisation before each part, logits over
    the root of the head width and bounded softly by `CAP`. Bounded logits need no maximum over the
    neighbours, so sums over blocks can be taken in any order.

    Args:
        channels: Width C.
        heads: Attention heads; must divide `channels`.
        part: See `wspace.nn.metanet.Part`.

    Raises:
        ValueError: If `heads` does not divide `channels`.
    """

    reductions = (("sum", "sum"), ("sum", "sum"))
    kernel = RelationalEdges

    def __init__(self, channels: int, *, heads: int = 8, part: Part = "all") -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                message(
                    f"neural graph transformer: {heads} heads do not divide {channels} channels",
                    help="choose another `heads` or `channels`",
                )
            )
        self.part = part
        c, parts = channels, 1 if part == "edges" else 4
        self.heads = heads
        self.norm = nn.LayerNorm(c)
        self.source, self.target = nn.Linear(c, parts * c), nn.Linear(c, parts * c)
        self.shared = nn.Linear(c, c, bias=False)
        self.edge = _EdgeUpdate(c)
        if part == "edges":
            return
        self.edge_norm, self.relate = nn.LayerNorm(c), nn.Linear(c, 4 * c)
        nn.init.ones_(self.relate.bias[2 * c : 3 * c])  # factors of the values start around 1
        self.merge = nn.Linear(2 * c, c)
        self.feed = nn.Sequential(
            nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.SiLU(), nn.Linear(2 * c, c)
        )
        self.whole = nn.Sequential(nn.Linear(2 * c, c), nn.SiLU(), nn.Linear(c, c))

    def nodes(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Edge terms, and queries, keys and values of the two directions."""
        x = self.norm(x + self.shared(u)[:, None])
        return self.source(x), self.target(x)

    def advance(self, e: Tensor, ps: Tensor, pt: Tensor) -> Tensor:
        """The next state of the edges."""
        c = e.shape[-1]
        return self.edge(e, ps[..., :c] + pt[..., :c])

    def step(self, e: Tensor, ps: Tensor, pt: Tensor) -> Step:
        """Edges, and weighted sums of values and sums of weights in both directions."""
        c = e.shape[-1]
        e = self.edge(e, ps[..., :c] + pt[..., :c])
        related = self.relate(self.edge_norm(e))
        along = self._attend(related, pt[..., c : 2 * c], ps[..., 2 * c :], 3)
        return e, along, self._attend(related, ps[..., c : 2 * c], pt[..., 2 * c :], 2)

    def _attend(
        self, related: Tensor, query: Tensor, other: Tensor, dim: int
    ) -> tuple[Tensor, Tensor]:
        eq, ek, em, ev = related.chunk(4, -1)
        key, value = other.chunk(2, -1)
        c = eq.shape[-1]
        logits = ((eq + query) * (ek + key)).unflatten(-1, (-1, self.heads)).sum(-2)
        weight = torch.exp(CAP * torch.tanh(logits * ((self.heads / c) ** 0.5 / CAP)))
        values = torch.addcmul(ev, em, value).unflatten(-1, (-1, self.heads))
        total = (weight.unsqueeze(-2) * values).sum(dim).flatten(-2)
        return total, weight.sum(dim)

    def update(
        self, x: Tensor, u: Tensor, received: Any, structure: Structure
    ) -> tuple[Tensor, Tensor]:
        """The next states of nodes and of the whole."""
        parts = []
        for total, weight in received:
            share = weight.clamp(min=torch.finfo(weight.dtype).tiny).unsqueeze(-2)
            parts.append((total.unflatten(-1, (-1, self.heads)) / share).flatten(-2))
        x = x + self.merge(torch.cat(parts, -1))
        x = x + self.feed(x)
        return x, u + self.whole(torch.cat([u, pooled(structure, x)], -1))


class NeuralGraphTransformer(Metanet):
    """NG-T: relational attention over the parameter graph.

    Options are those of `Metanet`, and ``heads``, the number of attention heads.

    Example:
        >>> import torch, wspace
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> graph = wspace.encode(wspace.trace(net, torch.zeros(1, 3)), net.state_dict())
        >>> NeuralGraphTransformer(7, channels=16, heads=4)(graph).shape
        torch.Size([7])
    """

    edges_at_once: ClassVar[int] = 1 << 14

    def make_layer(self, channels: int, *, part: Part, **options: Any) -> nn.Module:
        """One layer."""
        return RelationalLayer(channels, part=part, **options)
