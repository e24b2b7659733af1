"""The edges of `PNALayer` and `RelationalLayer` with the gradient written out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wspace.nn.edge_kernel import (
    Edges,
    Ends,
    Inner,
    ResidualKernel,
    Weights,
    add_product,
    bent,
    bent_back,
    bounded,
    rows,
    to_ends,
    wide,
)

CAP = 10.0
"""Bound of attention logits: ``CAP * tanh(logit / CAP)``."""

_UPDATE = ("edge.inner.weight", "edge.outer.weight", "edge.outer.bias")


class _Updated(ResidualKernel):
    """Edges that are updated first, with the first C of the terms of both ends, then read."""

    def again(self, e: Edges, ends: Ends, new: Tensor | None, out: Tensor | None = None) -> Inner:
        """What the update bends, and the next state."""
        c = e.shape[-1]
        before = self.before(e, ends[0][..., :c], ends[1][..., :c])
        if new is None:
            new = self.keep("next", e.shape, before) if out is None else out
            self.update(e, self.hidden(before), new)
        return before, new

    def only_update_back(self, e: Edges, inner: Inner, ends: Ends, ahead: Tensor) -> Ends:
        """Gradients if no messages were sent."""
        own = self.update_back(e, inner[0], ahead, None)
        first, last = (
            F.pad(x, (0, y.shape[-1] - x.shape[-1])) for x, y in zip(own, ends, strict=True)
        )
        return first, last


class PNAEdges(_Updated):
    """The edges of `PNALayer`."""

    names = (*_UPDATE, "film.weight", "film.bias", "pair.weight", "pair.bias")

    def forward(
        self, e: Edges, ends: Ends, out: Tensor | None, *, send: bool
    ) -> tuple[Inner, list[Tensor]]:
        """The next state; sums, sums of squares, maxima and minima of messages, both ways."""
        before, new = self.again(e, ends, None, out)
        if not send:
            return (before, new), []
        m = self._message(new, ends)
        squares = torch.mul(m, m, out=self.room("square", m.shape, m))
        sums = [[m.sum(d), squares.sum(d), m.amax(d), m.amin(d)] for d in (3, 2)]
        return (before, new), [*sums[0], *sums[1]]

    def _message(self, new: Tensor, ends: Ends) -> Tensor:
        """Messages; leaves ``film``, ``pair`` and what the latter is made of in buffers."""
        c, (ps, pt) = new.shape[-1], ends
        shape = new.shape
        film = self.room("film", (*shape[:-1], 2 * c), new)
        torch.addmm(self.weight(4), rows(new), self.weight(3).mT, out=rows(film))
        sums = torch.add(ps[..., c:], pt[..., c:], out=self.room("sums", shape, new))
        both, pair = bent(sums, self.room("both", shape, new)), self.room("pair", shape, new)
        torch.addmm(self.weight(6), rows(both), self.weight(5).mT, out=rows(pair))
        out = self.room("message", shape, new)
        return torch.addcmul(film[..., c:], film[..., :c], pair, out=out)

    def gradient(
        self, e: Edges, inner: Inner, ends: Ends, ahead: Tensor | None, sent: list[Tensor] | None
    ) -> Ends:
        """Of both ends' terms."""
        if sent is None:
            assert ahead is not None
            return self.only_update_back(e, inner, ends, ahead)
        new = inner[1]
        grad = self._of_messages(self._message(new, ends), sent)
        begin, end = self._message_back(grad, new)
        more = self.room("ahead", new.shape, new)
        film = rows(self.room("film back", (*new.shape[:-1], 2 * new.shape[-1]), new))
        if ahead is None:
            torch.mm(film, self.weight(3), out=rows(more))
        else:
            torch.addmm(rows(ahead), film, self.weight(3), out=rows(more))
        first, last = self.update_back(e, inner[0], more, None)
        return torch.cat([first, begin], -1), torch.cat([last, end], -1)

    def _of_messages(self, m: Tensor, sent: list[Tensor]) -> Tensor:
        """Gradient of every message from those of its sums, squares, maxima and minima."""
        grad, other = self.room("grad", m.shape, m), self.room("square", m.shape, m)
        into, back = [x.unsqueeze(3) for x in sent[:4]], [x.unsqueeze(2) for x in sent[4:]]
        torch.add(into[1], back[1], out=other)
        torch.add(into[0], back[0], out=grad).addcmul_(m, other, value=2)
        for dim, some in ((3, into), (2, back)):
            for value, peak in zip(some[2:], (m.amax(dim, True), m.amin(dim, True)), strict=True):
                torch.eq(m, peak, out=other)  # 1 where it is attained, shared among ties
                grad.addcmul_(other, value / other.sum(dim, keepdim=True))
        return grad

    def _message_back(self, grad: Tensor, new: Tensor) -> Ends:
        """Gradients of the pair's terms; leaves that of ``film`` in a buffer."""
        c, shape = new.shape[-1], new.shape
        film, pair = (
            self.room(n, s, new) for n, s in (("film", (*shape[:-1], 2 * c)), ("pair", shape))
        )
        back = self.room("film back", film.shape, new)
        torch.mul(grad, pair, out=back[..., :c])
        back[..., c:] = grad
        self.collect(3, back, new)
        self.collect_sum(4, back)
        grad.mul_(film[..., :c])
        self.collect(5, grad, self.room("both", shape, new))
        self.collect_sum(6, grad)
        torch.mm(rows(grad), self.weight(5), out=rows(pair))
        return to_ends(bent_back(pair, self.room("sums", shape, new)))


class RelationalEdges(_Updated):
    """The edges of `RelationalLayer`."""

    names = (
        *_UPDATE,
        *("edge_norm.weight", "edge_norm.bias", "relate.weight", "relate.bias"),
    )

    def __init__(self, layer: Any, weights: Weights, dtype: torch.dtype, *, keep: bool) -> None:
        super().__init__(layer, weights, dtype, keep=keep)
        self.heads: int = layer.heads
        scale, shift, relate, bias = (self.weight(i) for i in (3, 4, 5, 6))
        self.relate, self.bias = relate * scale, bias + relate @ shift  # of the bare normal
        self.relate_grad, self.bias_grad = (
            torch.zeros_like(x, dtype=wide(x)) for x in (self.relate, self.bias)
        )
        eye = torch.eye(self.heads, dtype=dtype, device=relate.device)
        self.spread = eye.repeat(1, relate.shape[1] // self.heads)
        self.eps: float = layer.edge_norm.eps

    def finish(self) -> None:
        """Brings gradients from the folded weights to those of the norm and the map."""
        self.total(3).add_((self.relate_grad * self.weight(5)).sum(0))
        self.total(4).add_(self.bias_grad @ self.weight(5).to(self.bias_grad.dtype))
        self.total(5).addcmul_(self.relate_grad, self.weight(3))
        self.total(5).addr_(self.bias_grad, self.weight(4).to(self.bias_grad.dtype))
        self.total(6).add_(self.bias_grad)

    def forward(
        self, e: Edges, ends: Ends, out: Tensor | None, *, send: bool
    ) -> tuple[Inner, list[Tensor]]:
        """The next state; weighted sums of values and sums of weights, both ways."""
        before, new = super().again(e, ends, None, out)
        if not send:
            return (before, new), []
        related = self._relate(new)
        made: list[Tensor] = []
        for dim in (3, 2):
            look = self._look(related, ends, dim)
            self._widened(look.weight, look.query)
            made += [look.values.mul_(look.query).sum(dim), look.weight.sum(dim)]
        return (before, new, *related), made

    def again(self, e: Edges, ends: Ends, new: Tensor | None, out: Tensor | None = None) -> Inner:
        """What the update bends, the next state, and what `_relate` makes of it."""
        before, new = super().again(e, ends, new, out)
        return before, new, *self._relate(new)

    def _relate(self, new: Tensor) -> list[Tensor]:
        """Queries, keys, factors and values of the edges."""
        normal, _ = self._normal(new)
        made = [self.keep(name, new.shape, new) for name in ("q", "k", "m", "v")]
        pairs = zip(made, self.relate.chunk(4), self.bias.chunk(4), strict=True)
        for out, weight, bias in pairs:
            torch.addmm(bias, rows(normal), weight.mT, out=rows(out))
        return made

    def _normal(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Edges with mean 0 and variance 1, and what they were multiplied with."""
        normal = self.room("normal", new.shape, new)
        torch.sub(new, new.mean(-1, keepdim=True), out=normal)
        size = torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
        factor = size.square_().div_(new.shape[-1]).add_(self.eps).rsqrt_()
        return normal.mul_(factor), factor

    def _look(self, related: Sequence[Tensor], ends: Ends, dim: int) -> "_Look":
        """Weights and values of the edges for those who receive, reduced over `dim`."""
        own, other = _sides(ends, dim)
        shape, c = related[0].shape, related[0].shape[-1]
        query, key, values = (self.room(n, shape, own[1]) for n in ("query", "key", "values"))
        torch.add(related[0], own[1], out=query)
        torch.add(related[1], other[2], out=key)
        logits = self._over_heads(torch.mul(query, key, out=values))
        logits.mul_((self.heads / c) ** 0.5 / CAP)
        bound = bounded(logits, logits)
        weight = torch.exp(bound * CAP)
        torch.addcmul(related[3], related[2], other[3], out=values)
        return _Look(query, key, values, weight, bound)

    def _over_heads(self, x: Tensor) -> Tensor:
        """Sums over the channels of every head, ``(…, heads)``; channel i is of head i % heads."""
        lead, flat, width = x.shape[:-1], rows(x), x.shape[-1] // self.heads
        while width % 2 == 0:  # halves are long rows, heads are short ones
            width //= 2
            flat = flat[:, : width * self.heads] + flat[:, width * self.heads :]
        if width > 1:
            flat = flat.unflatten(1, (width, self.heads)).sum(1)
        elif flat.data_ptr() == x.data_ptr():
            flat = flat.clone()
        return flat.view(*lead, self.heads)

    def _widened(self, x: Tensor, out: Tensor) -> Tensor:
        """A number for every head as one for every channel."""
        torch.mm(rows(x), self.spread, out=rows(out))
        return out

    def gradient(
        self, e: Edges, inner: Inner, ends: Ends, ahead: Tensor | None, sent: list[Tensor] | None
    ) -> Ends:
        """Of both ends' terms."""
        if sent is None:
            assert ahead is not None
            return self.only_update_back(e, inner, ends, ahead)
        new = inner[1]
        related = inner[2:]
        back = [self.room(f"{n} back", new.shape, new) for n in ("q", "k", "m", "v")]
        into = self._look_back(related, back, ends, (3, sent[0], sent[1]), fresh=True)
        out = self._look_back(related, back, ends, (2, sent[2], sent[3]), fresh=False)
        grad = self._norm_back(back, *self._normal(new))
        if ahead is not None:
            grad.add_(ahead)
        first, last = self.update_back(e, inner[0], grad, None)
        begin = torch.cat([first, out[0], into[1], into[2]], -1)
        return begin, torch.cat([last, into[0], out[1], out[2]], -1)

    def _look_back(
        self,
        related: Sequence[Tensor],
        back: Sequence[Tensor],
        ends: Ends,
        sent: tuple[int, Tensor, Tensor],
        *,
        fresh: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the receiver's query, of the sender's key and value.

        Args:
            related: What `_relate` returned.
            back: Where its gradients are written, or added if not `fresh`.
            ends: Terms of both ends.
            sent: Dimension that was reduced; gradients of the sums of values and of weights.
            fresh: Whether `back` has no value yet.

        Returns:
            Gradients of query, key and value.
        """
        dim, total, share = sent
        total, share = total.unsqueeze(dim), share.unsqueeze(dim)
        query, key, values, weight, bound = self._look(related, ends, dim)
        grad = values.mul_(total)
        to_weight = self._over_heads(grad).add_(share).mul_(weight)
        slope = bound.square_().neg_().add_(1)
        to_weight.mul_(slope).mul_((self.heads / query.shape[-1]) ** 0.5)
        wide_grad = self._widened(to_weight, self.room("wide", query.shape, query))
        to_value = self._widened(weight, values).mul_(total)
        key.mul_(wide_grad)
        query.mul_(wide_grad)
        factor = _sides(ends, dim)[1][3]
        if fresh:
            back[0].copy_(key)
            back[1].copy_(query)
            torch.mul(to_value, factor, out=back[2])
            back[3].copy_(to_value)
        else:
            back[0].add_(key)
            back[1].add_(query)
            back[2].addcmul_(to_value, factor)
            back[3].add_(to_value)
        away = 5 - dim
        to_value.mul_(related[2])
        return key.sum(dim, True), query.sum(away, True), to_value.sum(away, True)

    def _norm_back(self, back: Sequence[Tensor], normal: Tensor, factor: Tensor) -> Tensor:
        """Gradient of the next state through `_relate`."""
        grad = self.room("ahead", normal.shape, normal)
        pieces = zip(back, self.relate.chunk(4), self.relate_grad.chunk(4), strict=True)
        for i, (some, weight, total) in enumerate(pieces):
            add_product(total, rows(some).mT, rows(normal))
            if i == 0:
                torch.mm(rows(some), weight, out=rows(grad))
            else:
                torch.addmm(rows(grad), rows(some), weight, out=rows(grad))
        self.bias_grad.add_(torch.cat([rows(some).sum(0) for some in back]))
        along = torch.mul(grad, normal, out=back[0]).mean(-1, keepdim=True)
        grad.sub_(grad.mean(-1, keepdim=True)).addcmul_(normal, along, value=-1)
        return grad.mul_(factor)


class _Look(NamedTuple):
    query: Tensor
    key: Tensor
    values: Tensor
    weight: Tensor
    bound: Tensor


def _sides(ends: Ends, dim: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Who receives and who sends: terms of the edge, query, key and value of each."""
    ps, pt = (x.chunk(4, -1) for x in ends)
    return (pt, ps) if dim == 3 else (ps, pt)
