r"""`NiNoGraph`: a graph network that sees every parameter as an edge between the units it connects.

With a window :math:`x_e` of an edge from s to t, its kind :math:`\tau`, and codes p of nodes:

.. math::
    h_e = E_\tau + W x_e + b, \quad v = W' p + b'; \qquad \text{twice:}\quad
    m_e = (A h_e) \odot (P [v_t; v_s]) + B h_e, \quad
    v \leftarrow \sigma(L Q [v; \tfrac1{d} \sum_e m_e]), \quad
    h_e \leftarrow R\, \sigma(E h_e + S v_s + T v_t)

and :math:`\Delta_e = O_2 \sigma(O_1 h_e)` for each horizon and feature. Linear maps that meet are
one (`Fused`), so an edge costs three products with a square matrix in all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wspace.errors import NowcastError, message
from wspace.nowcast.predictor import Past, Predictor, check_precision, draw_small, unmixed
from wspace.nowcast.topology import TAPS, Edges, Topology


@dataclass(frozen=True)
class Fused:
    """The maps of a `NiNoGraph`, those that meet without a non-linearity as one. Maps act as x @ W.

    Attributes:
        scale0: Scale of the first messages, from a window: map ``(F·c, C)``, row of every kind.
        shift0: Their shift.
        pair: P of both layers: of the target, of the source, constant.
        node: Node updates of both layers: of the node, of what it received, constant.
        edge0: Edge states from a window: map, row of every kind.
        ends: Of both edge updates: of the source, of the target (biases are in the edge's).
        scale1: Scale of the second messages, from edge states: map, row.
        shift1: Their shift.
        edge1: Second edge states from first: map, row.
        hidden: Hidden layer of the head.
        head: Last layer: ``(C, F, K)`` and ``(F, K)``.
    """

    scale0: tuple[Tensor, Tensor]
    shift0: tuple[Tensor, Tensor]
    pair: tuple[tuple[Tensor, Tensor, Tensor], ...]
    node: tuple[tuple[Tensor, Tensor, Tensor], ...]
    edge0: tuple[Tensor, Tensor]
    ends: tuple[tuple[Tensor, Tensor], ...]
    scale1: tuple[Tensor, Tensor]
    shift1: tuple[Tensor, Tensor]
    edge1: tuple[Tensor, Tensor]
    hidden: tuple[Tensor, Tensor]
    head: tuple[Tensor, Tensor]


class Layer(nn.Module):
    """The maps of one round: messages, node update, edge update."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.film = nn.Linear(channels, 2 * channels)
        self.pair = nn.Linear(2 * channels, channels)
        self.mix = nn.Linear(2 * channels, channels)
        self.lift = nn.Linear(channels, channels)
        self.own, self.source, self.target, self.out = (
            nn.Linear(channels, channels) for _ in range(4)
        )


class NiNoGraph(Predictor):
    """Predicts every parameter from its own past and that of its neighbours in the graph.

    Args:
        channels: Width.
        context: Number of past states.
        longest: Number of horizons it predicts.
        kinds: Number of kinds of edges.
        codes: Number of Laplacian codes of a node.
        tokens: Rows of a table of token codes; 0 for none.
        laplacian: Compute the codes; otherwise they are zero, which makes a prediction exactly
            equivariant and costs nothing.
        precision: ``"float32"``, or ``"bfloat16"`` for the products of edge states with square
            matrices: faster where the processor has instructions for it, about 0.5 % of an update
            off. Predictors in float64 compute in float64.
        chunk: Edges computed at once.
        still: Entries of which all past values are equal do not move.
        drift: Scale back by slightly less than what was divided by, as the published code does: all
            entries shrink towards the mean, by 1e-6 of a standard deviation of 1.

    References:
        Knyazev et al. (2025), Accelerating training with neuron interaction and nowcasting
        networks. arXiv:2409.04434
    """

    graphical: ClassVar[bool] = True

    def __init__(
        self,
        channels: int = 128,
        *,
        context: int = 5,
        longest: int = 40,
        kinds: int = 15,
        codes: int = 8,
        tokens: int = 0,
        laplacian: bool = False,
        precision: str = "float32",
        chunk: int = 2048,
        still: bool = True,
        drift: bool = False,
    ) -> None:
        super().__init__(context=context, longest=longest, still=still)
        check_precision(precision)
        self.channels, self.kinds, self.codes, self.tokens = channels, kinds, codes, tokens
        self.laplacian, self.precision, self.chunk, self.drift = laplacian, precision, chunk, drift
        self.kind = nn.Embedding(kinds, channels)
        self.enter = nn.Linear(TAPS * context, channels)
        self.place = nn.Linear(codes, channels)
        self.token = nn.Embedding(tokens, channels) if tokens else None
        self.rounds = nn.ModuleList([Layer(channels) for _ in range(2)])
        self.hidden = nn.Linear(channels, channels)
        self.head = nn.Linear(channels, TAPS * longest)
        draw_small(self)

    def codes_of(self, topology: Topology) -> Tensor:
        """First states of the nodes, ``(nodes, C)``, or ``(1, C)`` where all are equal."""
        bias = self.place.bias
        v = bias[None]
        if self.laplacian:
            codes = topology.laplacian(self.codes)
            v = v + codes.to(bias) @ self.place.weight.mT
        if self.token is not None:
            ids = topology.tokens
            if ids is None:
                ids = torch.zeros(topology.nodes, dtype=torch.int64)
            if int(ids.max()) >= self.tokens:
                raise NowcastError(
                    message(
                        "NiNoGraph: more tokens than the predictor has codes for",
                        expected=f"at most {self.tokens - 1}",
                        got=f"{int(ids.max())}",
                        help="take a predictor without token codes",
                    )
                )
            v = v + self.token(ids.to(bias.device))
        return v

    def fused(self, *, horizon: int | None = None, dtype: torch.dtype | None = None) -> Fused:
        """The maps, fused; of one horizon or of all."""

        def w(layer: nn.Module) -> tuple[Tensor, Tensor]:
            linear = cast("nn.Linear", layer)
            dtype_ = dtype or linear.weight.dtype
            return linear.weight.to(dtype_).mT, linear.bias.to(dtype_)

        c = self.channels
        first, second = (cast("Layer", r) for r in self.rounds)
        enter, enter_bias = w(self.enter)
        start = enter, self.kind.weight.to(enter.dtype) + enter_bias
        edge, edge_bias = w(first.own)
        back = w(first.out)
        film0, film0_bias = w(first.film)
        film1, film1_bias = w(second.film)
        layers = (first, second)
        mixed = [_after(w(r.mix), w(r.lift)) for r in layers]
        own1, own1_bias = w(second.own)
        head, head_bias = w(self.head)
        some = slice(None) if horizon is None else slice(horizon - 1, horizon)
        more0 = w(first.source)[1] + w(first.target)[1]
        more1 = w(second.source)[1] + w(second.target)[1]
        return Fused(
            scale0=_after(start, (film0[:, :c], film0_bias[:c])),
            shift0=_after(start, (film0[:, c:], film0_bias[c:])),
            pair=tuple((m[:c], m[c:], b) for m, b in (w(r.pair) for r in layers)),
            node=tuple((m[:c], m[c:], b) for m, b in mixed),
            edge0=_after(start, (edge, edge_bias + more0)),
            ends=tuple((w(r.source)[0], w(r.target)[0]) for r in layers),
            scale1=_after(back, (film1[:, :c], film1_bias[:c])),
            shift1=_after(back, (film1[:, c:], film1_bias[c:])),
            edge1=_after(back, (own1, own1_bias + more1)),
            hidden=_after(w(second.out), w(self.hidden)),
            head=(
                head.unflatten(1, (TAPS, -1))[..., some],
                head_bias.unflatten(0, (TAPS, -1))[..., some],
            ),
        )

    def forward(self, topology: Topology, windows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Changes of all parameters, for all horizons, of several networks of one topology.

        It computes in the type of its weights, under autocast too.

        Args:
            topology: How the networks are wired.
            windows: Scaled past values of every parameter, ``(B, c, *shape)``.

        Returns:
            For every parameter ``(B, K, *shape)``: what to add to the last scaled value.
        """
        if not self.laplacian and self.token is None:
            topology = topology.merged
        with unmixed(self, windows.values()):
            return _Training(self, topology, windows)()

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        from wspace.nowcast.streaming import Stream
        from wspace.nowcast.wiring import topology_of

        yield from Stream(self, topology_of(past), past, horizon).run()


def _after(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two affine maps as one."""
    return first[0] @ second[0], first[1] @ second[0] + second[1]


class _Training:
    """One differentiable pass: the mathematics of `streaming`, edges kept or computed again."""

    def __init__(self, net: NiNoGraph, topology: Topology, windows: Mapping[str, Tensor]) -> None:
        self.net, self.topology, self.f = net, topology, net.fused()
        some = next(iter(windows.values()))
        self.batch, self.like = some.shape[0], net.head.weight
        self.windows = {k: x.to(self.like.dtype).flatten(2) for k, x in windows.items()}
        self.shapes = {k: x.shape[2:] for k, x in windows.items()}

    def __call__(self) -> dict[str, Tensor]:
        f, net = self.f, self.net
        degrees = self.topology.degrees.to(self.like)[:, None]
        v = net.codes_of(self.topology).expand(self.batch, self.topology.nodes, -1)
        for i in range(2):
            before = v
            if i == 1:
                s, t = f.ends[0]
                self.terms = (before @ s, before @ t)
            target, source, bias = f.pair[i]
            u, w = v @ target + bias, v @ source
            received = torch.zeros_like(v)
            for b in self.topology.blocks:
                made = self._kept(self._messages, i, b, u, w)
                received = received.index_add(1, b.target.to(v.device), made.flatten(1, 2))
            own, other, bias = f.node[i]
            v = F.silu(v @ own + (received / degrees) @ other + bias)
        s, t = f.ends[1]
        self.last_terms = (v @ s, v @ t)
        return self._decoded()

    def _kept(self, fn: Any, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled():
            return cast("Tensor", checkpoint(fn, *inputs, use_reentrant=False))
        return cast("Tensor", fn(*inputs))

    def _window(self, b: Edges) -> Tensor:
        """Features of a block, ``(B, P, T, S, Q, F * c)``."""
        if not b.param:
            x = torch.zeros(1, *b.sizes[:4], b.sizes[4], self.net.context).to(self.like)
            x[..., 0, :] = b.value
            return x.flatten(-2).expand(self.batch, *[-1] * 5)
        return b.view(self.windows[b.param]).movedim(1, -1).flatten(-2)

    def _ends(self, b: Edges, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Node terms at both ends, ``(B, P, 1, S, 1, C)`` and ``(B, P, T, 1, 1, C)``."""
        p, t, s, _, _ = b.sizes
        at = source[:, b.source.to(source.device)].unflatten(1, (p, 1, s, 1))
        return at, target[:, b.target.to(target.device)].unflatten(1, (p, t, 1, 1))

    def _first(self, b: Edges) -> Tensor:
        """σ of the first edge update, ``(B, P, T, S, Q, C)``."""
        x = self._window(b)
        m, rows = self.f.edge0
        s, t = self._ends(b, *self.terms)
        return F.silu(x @ m[: x.shape[-1]] + rows[b.kind] + s + t)

    def _messages(self, layer: int, b: Edges, u: Tensor, w: Tensor) -> Tensor:
        """Sums of messages to the targets, ``(B, P, T, C)``."""
        source, target = self._ends(b, w, u)
        if layer == 0:
            x = self._window(b)
            n = x.shape[-1]
            (m, rows), (k, more) = self.f.scale0, self.f.shift0
            scale, shift = x @ m[:n] + rows[b.kind], x @ k[:n] + more[b.kind]
        else:
            z = self._first(b)
            (m, row), (k, one) = self.f.scale1, self.f.shift1
            scale, shift = z @ m + row, z @ k + one
        return (scale * (target + source) + shift).sum((3, 4))

    def _changes(self, b: Edges) -> Tensor:
        """Changes of a block, ``(B, K, P, T, S, Q, F)``."""
        m, row = self.f.edge1
        s, t = self._ends(b, *self.last_terms)
        y = F.silu(self._first(b) @ m + row + s + t)
        m, row = self.f.hidden
        o = F.silu(y @ m + row)
        head, bias = (x[..., : b.sizes[4], :] for x in (self.f.head[0], self.f.head[1]))
        made = (o @ head.flatten(1) + bias.flatten()).unflatten(-1, (b.sizes[4], -1))
        return made.movedim(-1, 1)

    def _decoded(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, x in self.windows.items():
            blocks = [b for b in self.topology.blocks if b.param == name]
            parts = [self._kept(self._changes, b).flatten(2) for b in blocks]
            index = torch.cat([b.entries.flatten() for b in blocks]).to(x.device)
            times = torch.bincount(index, minlength=x.shape[-1]).clamp(min=1)
            made = torch.cat(parts, 2)
            total = made.new_zeros(*made.shape[:2], x.shape[-1]).index_add(2, index, made)
            out[name] = (total / times).unflatten(2, self.shapes[name] or (1,))
            if not self.shapes[name]:
                out[name] = out[name].squeeze(2)
        return out
