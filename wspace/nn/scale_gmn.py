r"""`ScaleGMN`: message passing that respects scale and sign symmetries as well as permutations.

Multiplying a hidden unit by :math:`q_i` (positive behind ReLU, a sign behind tanh or sine) turns
:math:`W_{ij}` (from :math:`i` to :math:`j`) into :math:`q_j W_{ij} / q_i` and leaves the function
unchanged. Kalogeropoulos et al., "Scale Equivariant Graph Metanetworks" (2024), give every unit a
state that transforms with :math:`q_i`. Here a unit has three:

- :math:`x_i`, multiplied by :math:`q_i`, like an activation, fed by messages along the edges:
  :math:`\sum_i x_i \odot \Gamma e_{ij}`, multiplied by :math:`q_i \cdot q_j / q_i = q_j`;
- :math:`y_i`, divided by :math:`q_i`, like a gradient, fed by messages against the edges:
  :math:`\sum_j y_j \odot \Gamma e_{ij}`, multiplied by :math:`q_j^{-1} \cdot q_j / q_i = 1 / q_i`;
- :math:`z_i`, invariant, fed by invariants such as :math:`x_i \odot y_i` and
  :math:`e_{ij} \odot x_i \odot y_j`.

So the way back needs no reciprocal of a weight, which the published bidirectional form asks for and
which zeros in the weights forbid.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.graph import ParameterGraph
from wspace.graph.structure import Structure
from wspace.nn.embed import Embedding
from wspace.nn.gauge_types import GaugeTypes, gauge_types
from wspace.nn.heads import GraphHead, NeuronHead, ParameterHead, Reader
from wspace.nn.layout import EdgeForm, forms_of
from wspace.nn.message import MessagePassing, Step
from wspace.nn.metanet import Head, Metanet, Part
from wspace.nn.pool import pooled
from wspace.nn.scale_edges import ScaleEdges
from wspace.space import WeightSpace


def unit_vector(x: Tensor) -> Tensor:
    """``x`` over its norm, 0 for 0: unchanged by positive factors, whatever their size."""
    peak = x.abs().amax(-1, keepdim=True)
    safe = torch.where(peak > 0, peak, torch.ones_like(peak))
    x = x / safe
    square = x.square().sum(-1, keepdim=True)
    return x * torch.where(square > 0, square, torch.ones_like(square)).rsqrt() * x.shape[-1] ** 0.5


def _shares(e: Tensor) -> Tensor:
    """Squares over their mean, 0 for 0: unchanged by signs and positive factors."""
    square = e.square()
    mean = square.mean(-1, keepdim=True)
    return square / torch.where(mean > 0, mean, torch.ones_like(mean))


def tamed(x: Tensor, masks: Tensor) -> Tensor:
    """States of bounded size where no scale forbids it: over the root of 1 + their mean square."""
    bounded = x * (1 + x.square().mean(-1, keepdim=True)).rsqrt()
    return torch.where(masks[..., :1] > 0, x, bounded)


class Invariant(nn.Module):
    r"""Invariants of a vector: of its direction where it has a scale, even where it has a sign.

    Args:
        channels: Width C of the vector.
        out: Number of invariants.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.map = nn.Linear(channels, out)

    def forward(self, x: Tensor, masks: Tensor) -> Tensor:
        """``(B, N, out)`` from ``(B, N, C)`` and, where 1, scale and sign ``(B, N, 2)``."""
        scale, sign = masks.split(1, -1)
        plus = self.map(torch.where(scale > 0, unit_vector(x), x))
        minus = 2 * self.map.bias - plus
        return F.silu(plus) + F.silu(torch.where(sign > 0, minus, plus))


class _Pair(nn.Module):
    r"""Invariants :math:`(\Gamma x) \odot (\Gamma' y)` of two states with opposite factors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left = nn.Linear(channels, channels, bias=False)
        self.right = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.left(x) * self.right(y))


class _Terms(nn.Module):
    """What one end of an edge contributes: typed terms, or the same made of invariants.

    Two terms have the factor of the first state, the third that of the second state.
    """

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__()
        c, self.parts = channels, parts
        self.first = nn.Linear(c, min(parts, 2) * c, bias=False)
        self.second = nn.Linear(c, c, bias=False) if parts == 3 else None
        self.gate, self.plain = nn.Linear(c, c), nn.Linear(c, parts * c)
        nn.init.normal_(self.gate.weight, std=0.3 * c**-0.5)

    def forward(self, first: Tensor, second: Tensor, inv: Tensor) -> Tensor:
        gate = 1 + self.gate(inv)
        typed = (self.first(first).unflatten(-1, (-1, inv.shape[-1])) * gate.unsqueeze(-2)).flatten(
            -2
        )
        if self.second is None:
            return typed
        return torch.cat([typed, self.second(second) * gate], -1)


class ScaleLayer(nn.Module):
    r"""One round of scale- and sign-equivariant messages.

    A node's state is :math:`(x, y, z)` and two numbers that say whether it has a scale and a sign.

    Args:
        channels: Width C of each of the three.
        bidirectional: False to send along the edges only; then :math:`y` stays as it is, and the
            invariants of an edge are the squares of its direction.
        part: See `wspace.nn.metanet.Part`.
    """

    def __init__(self, channels: int, *, bidirectional: bool = True, part: Part = "all") -> None:
        super().__init__()
        c, self.both, self.part = channels, bidirectional, part
        self.norm, self.of_x = nn.LayerNorm(c), Invariant(c, c)
        self.of_y = Invariant(c, c) if bidirectional else None
        self.pair = _Pair(c) if bidirectional else None
        self.join = nn.Linear((4 if bidirectional else 2) * c, c)
        self.shared = nn.Linear(c, c, bias=False)
        self.source = _Terms(c, 3) if bidirectional else None if part == "edges" else _Terms(c, 1)
        self.target = _Terms(c, 3) if bidirectional else None
        self.hints = nn.Linear(c, 2 * c)
        self.inner, self.gate = nn.Linear(c, c, bias=False), nn.Linear(c, c)
        self.mix = nn.Linear(c, c, bias=False)
        nn.init.normal_(self.gate.weight, std=0.3 * c**-0.5)
        if part == "edges":
            return
        sides = 2 if bidirectional else 1
        self.merge = nn.ModuleList(nn.Linear(c, c, bias=False) for _ in range(sides))
        self.gates = nn.Linear(c, sides * c)
        self.node = nn.Sequential(nn.Linear((2 + 2 * sides) * c, c), nn.SiLU(), nn.Linear(c, c))
        self.whole = nn.Sequential(nn.Linear(2 * c, c), nn.SiLU(), nn.Linear(c, c))

    kernel = ScaleEdges

    @classmethod
    def reader(cls, channels: int, *, bidirectional: bool) -> "ScaleLayer":
        """Only what `invariants` needs."""
        layer = cls(channels, bidirectional=bidirectional, part="edges")
        for name in ("source", "target", "hints", "inner", "gate", "mix"):
            setattr(layer, name, None)
        return layer

    @property
    def reductions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Typed, untyped and invariant messages to targets, and to sources."""
        return ("sum",) * 3, ("sum",) * 3 if self.both else ()

    def invariants(self, states: Tensor, u: Tensor) -> Tensor:
        """What no gauge changes in the states of the nodes, ``(B, N, C)``."""
        x, y, z, masks = parts_of(states)
        x, y = tamed(x, masks), tamed(y, masks)
        parts = [self.norm(z), self.of_x(x, masks)]
        if self.of_y is not None and self.pair is not None:
            parts += [self.of_y(y, masks), self.pair(x, y)]
        return F.silu(self.join(torch.cat(parts, -1)) + self.shared(u)[:, None])

    def nodes(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """For both ends: typed terms, invariants to make untyped ones of, and hints."""
        inv = self.invariants(x, u)
        begin, end = self.hints(inv).chunk(2, -1)
        first, second, _, masks = parts_of(x)
        first, second = tamed(first, masks), tamed(second, masks)
        if self.source is not None:
            begin = torch.cat([self.source(first, second, inv), inv, begin], -1)
        if self.target is not None:
            end = torch.cat([self.target(second, first, inv), inv, end], -1)
        return begin, end

    def advance(self, e: Tensor, ps: Tensor, pt: Tensor) -> Tensor:
        """The next state of the edges, typed as they are."""
        return self._update(e, *self._ends(e, ps, pt))[0]

    def _update(
        self, e: Tensor, begins: Sequence[Tensor], ends: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The next state of the edges, and invariants of them and their ends."""
        v = torch.tanh(e * begins[1] * ends[1]) if self.both else _shares(e)
        hidden = F.silu(self.inner(v) + (begins[-1] + ends[-1]))
        mixed = self.mix(e)
        e = torch.addcmul(mixed, mixed, self.gate(hidden))
        return (torch.addcmul(e, begins[2], ends[2]) if self.both else e), hidden

    def step(self, e: Tensor, ps: Tensor, pt: Tensor) -> Step:
        """Edges; typed messages, those at untyped ends apart, and invariants, both ways."""
        begins, ends = self._ends(e, ps, pt)
        e, hidden = self._update(e, begins, ends)
        along, typed = (e * begins[0]).sum(3), pt[..., -1:].squeeze(3)
        out = (along * typed, along * (1 - typed), hidden.sum(3))
        if not self.both:
            return e, out, ()
        against, typed = (e * ends[0]).sum(2), ps[..., -1:].squeeze(2)
        return e, out, (against * typed, against * (1 - typed), hidden.sum(2))

    @staticmethod
    def _ends(e: Tensor, ps: Tensor, pt: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        c = e.shape[-1]
        return ps[..., :-1].split(c, -1), pt[..., :-1].split(c, -1)

    def update(
        self, x: Tensor, u: Tensor, received: Any, structure: Structure
    ) -> tuple[Tensor, Tensor]:
        """The next states of nodes and of the whole."""
        *typed, z, masks = parts_of(x)
        parts = [self.norm(z), u[:, None].expand_as(z)]
        gates = (1 + self.gates(parts[0])).chunk(len(self.merge), -1)
        for i, merge in enumerate(self.merge):
            degree = forms_of(structure).degrees[i].to(x).unsqueeze(-1)
            own, other, told = received[i]
            typed[i] = typed[i] + merge(own / degree.sqrt()) * gates[i]
            parts += [other / degree.sqrt(), told / degree]
        z = z + self.node(torch.cat(parts, -1))
        u = u + self.whole(torch.cat([u, pooled(structure, z)], -1))
        return torch.cat([*typed, z, masks], -1), u


def parts_of(states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The three states of all nodes, ``(B, N, C)`` each, and the two masks, ``(B, N, 2)``."""
    c = states.shape[-1] // 3
    x, y, z, masks = states.split([c, c, c, 2], -1)
    return x, y, z, masks


class ScaleEmbedding(Embedding):
    """First states: node features where their type puts them, kinds and positions in the rest."""

    def nodes(self, graph: ParameterGraph, batch: int, probed: dict[int, Tensor]) -> Tensor:
        """The three states of all nodes and the masks, ``(batch, N, 3 C + 2)``."""
        structure, types = graph.structure, gauge_types(graph.space)
        forms = forms_of(structure)
        kinds = self.kinds(structure, nodes=True)
        sizes = torch.tensor([n.size for n in structure.nodes], device=kinds.device)
        fixed = kinds.repeat_interleave(sizes, 0) + self._position(structure, kinds)
        fixed = fixed.expand(batch, *fixed.shape)
        masks = torch.stack([types.scale, types.sign], -1).to(fixed).expand(batch, -1, -1)
        plain = fixed * (1 - masks.amax(-1, keepdim=True))
        typed, other = [], []
        codes = self.kinds(structure, nodes=False)[[f.index for f in forms.features]]
        taps = self.feature_taps(list(forms.features), codes)
        for form, tap, own in zip(forms.features, taps, types.features, strict=True):
            units = form.target + structure.offsets[form.block.target.nodes]
            value = form.raw(graph, batch).to(tap.dtype) @ tap
            (typed if own else other).append((units, value))
        if self.probes is not None:
            for n, values in probed.items():
                units = torch.arange(structure.nodes[n].size) + structure.offsets[n]
                (typed if types.activation(n, forms) else other).append(
                    (units, self.probes(values.to(fixed.dtype)))
                )
        return torch.cat([_added(plain, typed), plain, _added(fixed, other), masks], -1)


def _added(x: Tensor, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    if not rows:
        return x
    where = torch.cat([units for units, _ in rows]).to(x.device)
    values = torch.cat([v for _, v in rows], 1).to(x.dtype)
    return x + torch.zeros_like(x).index_add(1, where, values)


class _Select:
    """Gives a block's edges the typed or the invariant terms of an end, and says which."""

    def __init__(self, types: GaugeTypes, codes: dict[int, Tensor]) -> None:
        self.types, self.codes = types, codes
        self.places = {index: i for i, index in enumerate(codes)}

    def __call__(
        self, layer: Any, form: EdgeForm, source: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        into, out = self.types.edges[self.places[form.index]]
        code = self.codes[form.index]
        begin, end = _picked(source, layer.source, out), _picked(target, layer.target, into)
        hint = end[..., -len(code) - 1 : -1] + code.to(end.dtype)  # what the block is: invariant
        return begin, torch.cat([end[..., : -len(code) - 1], hint, end[..., -1:]], -1)


def _picked(x: Tensor, terms: _Terms | None, typed: bool) -> Tensor:  # noqa: FBT001
    """Terms of one end by its type, its hint, and a number that says which type it is."""
    flag = x.new_full((*x.shape[:-1], 1), float(typed))
    if terms is None:
        return torch.cat([x, flag], -1)
    c = terms.gate.out_features
    own, inv, hint = x.split([terms.parts * c, c, c], -1)
    return torch.cat([own if typed else terms.plain(inv).to(own.dtype), hint, flag], -1)


class ScaleHead(nn.Module):
    """A head for networks or units on invariants of the states.

    Args:
        channels: Width C of the states.
        inner: Head that reads node states of this width.
        bidirectional: Whether the second state is in use.
    """

    def __init__(
        self, channels: int, inner: GraphHead | NeuronHead, *, bidirectional: bool
    ) -> None:
        super().__init__()
        self.inner = inner
        self.read = ScaleLayer.reader(channels, bidirectional=bidirectional)

    def forward(self, structure: Structure, x: Tensor, u: Tensor) -> Any:
        """What the inner head makes of the invariants."""
        return self.inner(structure, self.read.invariants(x, u), u)


class ScaleParameterHead(nn.Module):
    r"""A new state :math:`\theta' = g\,\theta + \Delta(\theta)`, changes typed as entries are.

    Args:
        channels: Width C of the states.
        scale: Factor of the change at the start.
    """

    def __init__(self, channels: int, *, bidirectional: bool, scale: float = 0.1) -> None:
        super().__init__()
        c = channels
        self.plain = ParameterHead(c, scale=scale, edge=nn.Linear(c, c, bias=False), node=None)
        self.read = ScaleLayer.reader(channels, bidirectional=bidirectional)
        self.typed, self.gate = nn.Linear(c, c, bias=False), nn.Linear(c, c)
        self.free = nn.Linear(c, c)

    def forward(
        self,
        graph: ParameterGraph,
        x: Tensor,
        u: Tensor,
        read: Reader,
    ) -> dict[str, Tensor]:
        """The new state; see `ParameterHead`."""
        types = gauge_types(graph.space)
        inv = self.read.invariants(x, u)
        first, *_ = parts_of(x)
        rows = self.typed(first) * (1 + self.gate(inv)), self.free(inv)
        choose = {
            form.index: rows[0 if typed else 1]
            for form, typed in zip(forms_of(graph.structure).features, types.features, strict=True)
        }
        return self.plain.state(graph, choose, read)


class ScaleGMN(Metanet):
    """Graph metanet that respects positive scale, sign flips and permutations.

    Options are those of `Metanet`, and ``bidirectional`` (True): whether to send messages against
    the edges too. Gauges that do not act through the activation of a unit are not respected; see
    `ignored`.

    Example:
        >>> import torch, wspace
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> space = wspace.trace(net, torch.zeros(1, 3))
        >>> ScaleGMN.ignored(space)
        ()
        >>> ScaleGMN(7, channels=16)(wspace.encode(space, net.state_dict())).shape
        torch.Size([7])
    """

    @staticmethod
    def ignored(space: WeightSpace) -> tuple[int, ...]:
        """Places in ``space.gauges`` of the gauges that this network does not respect."""
        return gauge_types(space).ignored

    def make_embedding(self, channels: int, probes: int) -> Embedding:
        """First states by type."""
        return ScaleEmbedding(channels, probes)

    def make_layer(self, channels: int, *, part: Part, **options: Any) -> nn.Module:
        """One layer."""
        return ScaleLayer(channels, part=part, **options)

    def make_head(
        self, kind: Head, channels: int, out: int, dropout: float, **options: Any
    ) -> nn.Module:
        """The head on invariants; changes of parameters have the types of the parameters."""
        both = options.get("bidirectional", True)
        if kind == "parameter":
            return ScaleParameterHead(channels, bidirectional=both)
        inner = super().make_head(kind, channels, out, dropout)
        return ScaleHead(channels, cast(Any, inner), bidirectional=both)

    def begin(self, graph: ParameterGraph) -> tuple[Tensor, Tensor, MessagePassing]:
        """First states of the nodes and of the whole, and the edges with typed ends."""
        structure, rows, probed = graph.structure, prod(graph.batch), self.probed(graph)
        graph = self.scales(graph)
        x = self.embedding.nodes(graph, rows, probed)
        u = self.start.expand(rows, -1) + pooled(structure, parts_of(x)[2])
        coefficients, codes = self.embedding.edges(structure)
        forms = forms_of(structure).edges
        bare = torch.tensor([[float(f.block.structural)] for f in forms]).to(codes)
        own = dict(zip((f.index for f in forms), codes.unbind(0), strict=True))
        select = _Select(gauge_types(graph.space), own)
        edges = MessagePassing(
            *(graph, coefficients, codes * bare),
            stream=self.stream,
            chunk=self.chunk,
            select=select,
        )
        return x, u, edges

    def regularize(self, x: Tensor) -> Tensor:
        """Dropout on the invariant part of the states."""
        first, second, z, masks = parts_of(x)
        return torch.cat([first, second, self.dropout(z), masks], -1)
