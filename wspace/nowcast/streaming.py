"""A `NiNoGraph`'s prediction without gradients: nodes in memory, edges made again chunk by chunk.

The first messages are linear in the windows, so only sums of these are needed. A second message
multiplies a map of an edge's state by the sum of a target and a source term: the target's factors
out of the sum over edges, and only the source's needs a product for each pair of units; where many
sources meet one target it is a product of the states with the terms, transposed. Edges that differ
in nothing but their value (`Topology.merged`) share it.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from wspace.errors import NowcastError, message
from wspace.nn.edge_kernel import Room
from wspace.nowcast.predictor import Past
from wspace.nowcast.topology import Edges, Topology, flat

if TYPE_CHECKING:
    from wspace.nowcast.graph import NiNoGraph

EPS = 1e-6
"""What is added to a standard deviation before dividing by it."""

LINE = 16
"""Numbers in a line of a processor's cache."""

Ranges = tuple[slice, slice, slice, slice]


def moved(last: Tensor, change: Tensor, moments: tuple[float, float], *, drift: bool) -> Tensor:
    """Last values moved by scaled changes.

    Args:
        last: Last values.
        change: Their changes, in the units that the past was scaled to.
        moments: Mean and standard deviation of the past.
        drift: Scale back as the published code does, by the standard deviation alone; the scaled
            last value shrinks by the way.

    Returns:
        New values, in the wider type of both.
    """
    mean, std = moments
    if not drift:
        return torch.add(last, change, alpha=std + EPS)
    last = last.to(torch.promote_types(last.dtype, change.dtype))
    return torch.add(last, change, alpha=std).add_(mean - last, alpha=EPS / (std + EPS))


class Stream:
    """One prediction.

    Args:
        net: The predictor.
        topology: How the model is wired.
        past: Windows and what to predict.
        horizon: Spacings ahead.
    """

    def __init__(self, net: "NiNoGraph", topology: Topology, past: Past, horizon: int) -> None:
        _check_covered(topology, past)
        self.net, self.past, self.horizon = net, past, horizon
        self.plain = not net.laplacian and net.token is None
        self.topology = topology.merged if self.plain else topology
        self.like = net.head.weight.new_empty(
            0, device=next(iter(past.windows.values()))[-1].device
        )
        low = net.precision == "bfloat16" and self.like.dtype == torch.float32
        self.low = self.like.to(torch.bfloat16) if low else self.like
        self.f = net.fused(horizon=horizon, dtype=torch.float64)
        self.room = Room()
        self.window_map = self._map(self.f.edge0[0])
        self.edge_map = self._edge_map(self.f.edge1[0])
        self.hidden_map = self._edge_map(self.f.hidden[0]), self._map(self.f.hidden[1])
        self.head_map = self._map(self.f.head[0][..., 0]), self._map(self.f.head[1][..., 0])
        self.windows = {name: [flat(x) for x in some] for name, some in past.windows.items()}

    def run(self) -> Iterator[tuple[str, Tensor]]:
        """New tensors for the names asked for."""
        v = self._first_nodes()
        self.first_ends = self._ends(0, v)
        v = self._second_nodes(v)
        self.last_ends = self._ends(1, v)
        blocks: dict[str, list[Edges]] = {}
        for b in self.topology.blocks:
            blocks.setdefault(b.param, []).append(b)
        for name in self.past.names:
            yield name, self._decoded(name, blocks.get(name, []))

    # ----------------------------------------------------------------------- nodes

    def _map(self, m: Tensor) -> Tensor:
        return m.to(self.like)

    def _edge_map(self, m: Tensor) -> Tensor:
        return m.to(self.low)

    def _ends(self, layer: int, v: Tensor) -> tuple[Tensor, Tensor]:
        """Terms of every node in an edge update: as a source, as a target."""
        s, t = self.f.ends[layer]
        return v @ self._map(s), v @ self._map(t)

    def _update(self, layer: int, v: Tensor, received: Tensor) -> Tensor:
        own, other, bias = (self._map(m) for m in self.f.node[layer])
        return F.silu((v @ own).add(bias).addmm(received, other))

    def _degrees(self) -> Tensor:
        return self._map(self.topology.degrees)[:, None]

    def _first_nodes(self) -> Tensor:
        """States of the nodes after the first round."""
        n = self.topology.nodes
        v = self._map(self.net.codes_of(self.topology))
        target, source, bias = (self._map(m) for m in self.f.pair[0])
        u, w = v @ target + bias, v @ source
        values = self.like.new_zeros(n, self.f.scale0[0].shape[0])
        kinds = self.like.new_zeros(n, self.net.kinds)
        cross = None if self.plain else torch.zeros_like(u)
        scale, rows = (self._map(m) for m in self.f.scale0)
        for b in self.topology.blocks:
            at = b.target.to(values.device)
            each = float(b.sizes[2] * b.sizes[3])
            kinds[:, b.kind].index_add_(0, at, values.new_full((len(at),), each))
            self._sum_values(b, values)
            if cross is not None:
                cross.index_add_(0, at, self._cross(b, w, scale, rows[b.kind]))
        d = self._degrees()
        values /= d
        kinds /= d
        shift, more = (self._map(m) for m in self.f.shift0)
        scales = values @ scale + kinds @ rows
        received = (u + w if cross is None else u) * scales + values @ shift + kinds @ more
        if cross is not None:
            received += cross / d
        return self._update(0, v.expand(n, -1), received)

    def _sum_values(self, b: Edges, values: Tensor) -> None:
        """Adds the windows of all edges into every target."""
        at = b.target.to(values.device)
        if not b.param:
            each = b.value * b.sizes[2] * b.sizes[3]
            values[:, : self.net.context].index_add_(
                0, at, values.new_full((len(at), self.net.context), each)
            )
            return
        for part, sizes in self._chunks(b):
            x = self._window(b, part, sizes)
            some = x.view(len(x), sizes[0] * sizes[1], -1).sum(-1)
            values[:, : len(x)].index_add_(0, _targets(at, b, part), some.mT)

    def _cross(self, b: Edges, w: Tensor, scale: Tensor, row: Tensor) -> Tensor:
        """Sums over edges of the scale times the source's term, ``(P * T, C)``."""
        p, t, s, q, _ = b.sizes
        sources = w[b.source.to(w.device)].view(p, s, -1)
        total = (sources.sum(1, keepdim=True) * (q * row)).expand(p, t, -1).contiguous()
        if not b.param:
            c = self.net.context
            total += sources.sum(1, keepdim=True) * (q * b.value * scale[:c].sum(0))
            return total.flatten(0, 1)
        for part, sizes in self._chunks(b):
            x = self._window(b, part, sizes)
            n, k = len(x), len(x)
            x = x.view(n, *sizes).sum(-1).permute(1, 2, 0, 3).reshape(sizes[0], -1, sizes[2])
            made = (x @ sources[part[0], part[2]]).view(sizes[0], sizes[1], k, -1)
            total[part[0], part[1]] += (made * scale[:k]).sum(2)
        return total.flatten(0, 1)

    def _second_nodes(self, v: Tensor) -> Tensor:
        """States of the nodes after the second round."""
        target, source, bias = (self._map(m) for m in self.f.pair[1])
        u, w = v @ target + bias, v @ source
        states, cross, around = (torch.zeros_like(u) for _ in range(3))
        scale = self._edge_map(self.f.scale1[0])
        for b in self.topology.blocks:
            p, t, s, q, _ = b.sizes
            at = b.target.to(v.device)
            sources = w[b.source.to(w.device)].view(p, s, -1)
            total = sources.sum(1, keepdim=True).mul_(q).expand(p, t, -1)
            around.index_add_(0, at, total.reshape(p * t, -1))
            terms = self._terms(b, self.first_ends)
            for part, sizes in self._chunks(b):
                z = self._first(b, part, sizes, terms)
                z = z.sum(3) if sizes[3] > 1 else z.squeeze(3)
                where = _targets(at, b, part)
                states.index_add_(0, where, z.sum(2).flatten(0, 1))
                made = self._product(z, sources[part[0], part[2]], scale)
                cross.index_add_(0, where, made)
        d = self._degrees()
        states /= d
        scale, row = (self._map(m) for m in self.f.scale1)
        shift, more = (self._map(m) for m in self.f.shift1)
        received = u * (states @ scale + row) + (cross + row * around) / d + states @ shift + more
        return self._update(1, v, received)

    def _product(self, z: Tensor, w: Tensor, m: Tensor) -> Tensor:
        """Sums over sources of (z m) ⊙ w, ``(p * t, C)``; z ``(p, t, s, C)``, w ``(p, s, C)``."""
        p, t, s, c = z.shape
        if s == 1:
            return (self._times(z.reshape(-1, c), m).view(p, t, c) * w).flatten(0, 1)
        if s < c or m.dtype != z.dtype:
            made = self._times(z.reshape(-1, c), m)
            return (made.view(p, t, s, c) * w[:, None]).sum(2).flatten(0, 1)
        both = self.room("product", (p * t, c, c), z)
        wide = w[:, None].expand(p, t, s, c).reshape(p * t, s, c)
        torch.bmm(z.reshape(p * t, s, c).mT, wide, out=both)
        return both.mul_(m).sum(1)

    def _times(self, x: Tensor, m: Tensor) -> Tensor:
        """``x m`` in the type of m, in a kept buffer."""
        if m.dtype != x.dtype:
            x = self.room("low", x.shape, m).copy_(x)
        return torch.mm(x, m, out=self.room("product", (len(x), m.shape[1]), m))

    # ----------------------------------------------------------------------- edges

    def _chunks(self, b: Edges) -> Iterator[tuple[Ranges, Sequence[int]]]:
        """Parts of a block of about `chunk` edges, parallel ones innermost.

        Where targets lie side by side in memory, a part has a line of them.

        Yields:
            Ranges of P, T, S and Q, and their lengths.
        """
        left, steps = max(1, self.net.chunk), [1, 1, 1, 1]
        if b.strides is not None and 0 < b.strides[1] < max(b.strides[2:4]):
            steps[1] = max(1, min(b.sizes[1], left, LINE))
            left //= steps[1]
        for i in (3, 2, 1, 0):
            more = max(1, min(-(-b.sizes[i] // steps[i]), left))
            steps[i] *= more
            left //= more
        cuts = [
            [slice(a, min(a + step, n)) for a in range(0, n, step)]
            for n, step in zip(b.sizes, steps, strict=False)
        ]
        for p, t, s, q in product(*cuts):
            yield (p, t, s, q), [r.stop - r.start for r in (p, t, s, q)]

    def _window(self, b: Edges, part: Ranges, sizes: Sequence[int]) -> Tensor:
        """Scaled windows of a chunk, ``(F * c, edges)``."""
        c, f = self.net.context, b.sizes[4]
        x = self.room("window", (f, c, *sizes), self.like)
        for i, whole in enumerate(self.windows[b.param]):
            found = (
                b.view(whole)[part] if b.index is None else whole[b.index[part].to(whole.device)]
            )
            x[:, i].copy_(found.movedim(-1, 0))
        mean, std = self.past.moments[b.param]
        return x.sub_(mean).mul_(1 / (std + EPS)).view(f * c, -1)

    def _terms(self, b: Edges, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Node terms of a block, ``(P, 1, S, 1, C)`` with the kind's, and ``(P, T, 1, 1, C)``."""
        p, t, s, _, _ = b.sizes
        first = ends is self.first_ends
        row = self._map(self.f.edge0[1][b.kind] if first else self.f.edge1[1])
        if first and not b.param:
            row = row + b.value * self._map(self.f.edge0[0])[: self.net.context].sum(0)
        source = ends[0][b.source.to(row.device)] + row
        target = ends[1][b.target.to(row.device)]
        return source.view(p, 1, s, 1, -1), target.view(p, t, 1, 1, -1)

    def _sum_of_terms(
        self, name: str, part: Ranges, sizes: Sequence[int], terms: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Both node terms of every edge of a chunk, ``(p, t, s, q, C)``, in a kept buffer."""
        source, target = terms[0][part[0], :, part[2]], terms[1][part[0], part[1]]
        out = self.room(name, (*sizes, source.shape[-1]), self.like)
        return torch.add(source.expand(out.shape), target, out=out)

    def _first(
        self, b: Edges, part: Ranges, sizes: Sequence[int], terms: tuple[Tensor, Tensor]
    ) -> Tensor:
        """σ of the first edge update, ``(p, t, s, q, C)``."""
        z = self._sum_of_terms("first", part, sizes, terms)
        if b.param:
            x = self._window(b, part, sizes)
            z.view(-1, z.shape[-1]).addmm_(x.mT, self.window_map[: len(x)])
        return F.silu(z, inplace=True)

    def _decoded(self, name: str, blocks: Sequence[Edges]) -> Tensor:
        """The prediction of one parameter."""
        before, how = self.windows[name][-1], self.past.moments[name]
        out = torch.empty(self.past.windows[name][-1].shape).to(before)
        row = out.view(-1)
        if any(b.index is not None for b in blocks):  # an entry may be several edges: their mean
            total, times = (row.new_zeros(len(row), dtype=self.like.dtype) for _ in range(2))
            for b, part, made in self._predicted(name, blocks):
                at = b.entries_of(part).flatten().to(row.device)
                total.index_add_(0, at, made.flatten())
                times.index_add_(0, at, torch.ones_like(made).flatten())
            row.copy_(moved(before, total.div_(times), how, drift=self.net.drift))
        else:
            for b, part, made in self._predicted(name, blocks):
                last = b.view(before)[part]
                new = moved(last, made.to(row.device), how, drift=self.net.drift)
                b.view(row)[part].copy_(new)
        return out

    def _predicted(
        self, name: str, blocks: Sequence[Edges]
    ) -> Iterator[tuple[Edges, Ranges, Tensor]]:
        """Scaled changes of all chunks of a parameter, ``(p, t, s, q, F)``."""
        for b in blocks:
            terms, more = self._terms(b, self.first_ends), self._terms(b, self.last_ends)
            for part, sizes in self._chunks(b):
                yield b, part, self._change(b, part, sizes, (terms, more)).view(*sizes, -1)

    def _change(
        self,
        b: Edges,
        part: Ranges,
        sizes: Sequence[int],
        terms: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Scaled changes of a chunk, ``(edges, F)``."""
        z = self._first(b, part, sizes, terms[0])
        c, taps = z.shape[-1], b.sizes[4]
        z, y = z.view(-1, c), self._sum_of_terms("second", part, sizes, terms[1]).view(-1, c)
        m, (hidden, row), (head, bias) = self.edge_map, self.hidden_map, self.head_map
        if m.dtype == y.dtype:
            F.silu(y.addmm_(z, m), inplace=True)
            F.silu(torch.addmm(row, y, hidden, out=z), inplace=True)
        else:
            F.silu(y.add_(self._times(z, m)), inplace=True)
            F.silu(torch.add(self._times(y, hidden), row, out=z), inplace=True)
        return torch.addmm(bias[:taps], z, head[:, :taps])


def _targets(at: Tensor, b: Edges, part: Ranges) -> Tensor:
    p, t = b.sizes[:2]
    return at.view(p, t)[part[:2]].reshape(-1)


def _check_covered(topology: Topology, past: Past) -> None:
    held = {b.param for b in topology.blocks}
    lost = [n for n in past.names if n not in held and past.windows[n][-1].numel()]
    missing = [n for n in held if n and n not in past.windows]
    if lost or missing:
        raise NowcastError(
            message(
                "predict: states and topology do not fit",
                expected="every parameter of the module in both",
                got=[f"{n!r} in one only" for n in (*lost, *missing)],
            )
        )
