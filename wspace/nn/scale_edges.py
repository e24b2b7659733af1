"""The edges of `ScaleLayer` with the gradient written out."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from wspace.nn.edge_kernel import (
    EdgeKernel,
    Edges,
    Ends,
    Inner,
    Weights,
    bent,
    bent_back,
    bounded,
    rows,
)


class ScaleEdges(EdgeKernel):
    """The edges of `ScaleLayer`."""

    names = ("inner.weight", "gate.weight", "gate.bias", "mix.weight")

    def __init__(self, layer: Any, weights: Weights, dtype: torch.dtype, *, keep: bool) -> None:
        super().__init__(layer, weights, dtype, keep=keep)
        self.both: bool = layer.both

    def forward(
        self, e: Edges, ends: Ends, out: Tensor | None, *, send: bool
    ) -> tuple[Inner, list[Tensor]]:
        """The next state; typed messages, those at untyped ends apart, and invariants."""
        inner = self.again(e, ends, None)
        new = self._next(inner, ends, out)
        if not send:
            return inner, []
        hidden, product = self._hidden(inner), self.room("product", e.shape, new)
        made: list[Tensor] = []
        for dim, (own, other) in self._ways(ends):
            total, typed = torch.mul(new, other[0], out=product).sum(dim), own[-1].squeeze(dim)
            made += [total * typed, total * (1 - typed), hidden.sum(dim)]
        return inner, made

    def again(self, e: Edges, ends: Ends, new: Tensor | None) -> Inner:
        """What is bent to the hidden layer, the mixed edges, and their gates."""
        begins, to = self._split(ends)
        before, mixed, gates = (
            self.keep(name, e.shape, ends[0]) for name in ("before", "mixed", "gates")
        )
        told, _ = self._told(e, begins, to)
        torch.add(begins[-2], to[-2], out=before)
        torch.addmm(rows(before), rows(told), self.weight(0).mT, out=rows(before))
        e.map(self.weight(3), mixed)
        hidden = self._hidden((before,))
        torch.addmm(self.weight(2) + 1, rows(hidden), self.weight(1).mT, out=rows(gates))
        return before, mixed, gates

    def _hidden(self, inner: Inner) -> Tensor:
        return bent(inner[0], self.room("hidden", inner[0].shape, inner[0]))

    def _next(self, inner: Inner, ends: Ends, out: Tensor | None) -> Tensor:
        _, mixed, gates = inner
        new = self.room("next", mixed.shape, mixed) if out is None else out
        torch.mul(mixed, gates, out=new)
        if self.both:
            begins, to = self._split(ends)
            new.addcmul_(begins[2], to[2])
        return new

    def _told(
        self, e: Edges, begins: Sequence[Tensor], to: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Invariants of the edges themselves, and what they were divided by."""
        told = self.room("told", e.shape, begins[0])
        if self.both:
            torch.mul(e.value, begins[1], out=told).mul_(to[1])
            return bounded(told, told), None
        torch.mul(e.value, e.value, out=told)
        mean = told.mean(-1, keepdim=True)
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        return told.div_(mean), mean

    def _split(self, ends: Ends) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Terms of the source and the target: typed or not, hint, and which of the two."""
        c = self.weight(0).shape[0]
        begins, to = (x.split([c] * (x.shape[-1] // c) + [1], -1) for x in ends)
        return begins, to

    def _ways(self, ends: Ends) -> list[tuple[int, tuple[Sequence[Tensor], Sequence[Tensor]]]]:
        """Dimension to reduce; terms of who receives, and of who sends."""
        begins, to = self._split(ends)
        return [(3, (to, begins)), *([(2, (begins, to))] if self.both else [])]

    def gradient(
        self, e: Edges, inner: Inner, ends: Ends, ahead: Tensor | None, sent: list[Tensor] | None
    ) -> Ends:
        """Of both ends' terms."""
        back = torch.zeros_like(ends[0]), torch.zeros_like(ends[1])
        begins, to = self._split(back)
        _, mixed, gates = inner
        grad = self._of_messages(inner, ends, ahead, sent, back)
        product, hidden = self.room("product", e.shape, grad), self._hidden(inner)
        self.collect(1, torch.mul(grad, mixed, out=product), hidden)
        self.collect_sum(2, product)
        torch.mm(rows(product), self.weight(1), out=rows(hidden))
        for i, dim in enumerate((3, 2)[: len(sent or ()) // 3]):
            hidden.add_(cast("list[Tensor]", sent)[3 * i + 2].unsqueeze(dim))
        torch.sum(bent_back(hidden, inner[0]), 2, keepdim=True, out=begins[-2])
        torch.sum(hidden, 3, keepdim=True, out=to[-2])
        e.map_back(rows(grad.mul_(gates)), self.weight(3), self.total(3), None)
        self._told_back(e, hidden, ends, back)
        return back

    def _of_messages(
        self,
        inner: Inner,
        ends: Ends,
        ahead: Tensor | None,
        sent: list[Tensor] | None,
        back: Ends,
    ) -> Tensor:
        """Gradient of the next state, in a buffer; those of the terms that meet it, in `back`."""
        grad = self.room("grad", inner[0].shape, inner[0])
        product = self.room("product", grad.shape, grad)
        grad.zero_() if ahead is None else grad.copy_(ahead)
        if sent is not None:
            new = self._next(inner, ends, None)
            for i, ((dim, (own, other)), (_, (_, to_other))) in enumerate(
                zip(self._ways(ends), self._ways(back), strict=True)
            ):
                typed = own[-1].squeeze(dim)
                total = (sent[3 * i] * typed + sent[3 * i + 1] * (1 - typed)).unsqueeze(dim)
                grad.addcmul_(total, other[0])
                torch.sum(
                    torch.mul(new, total, out=product), 5 - dim, keepdim=True, out=to_other[0]
                )
        if self.both:
            for dim, one, other in zip(
                (2, 3), self._split(back), self._split(ends)[::-1], strict=True
            ):
                torch.sum(torch.mul(grad, other[2], out=product), dim, keepdim=True, out=one[2])
        return grad

    def _told_back(self, e: Edges, grad: Tensor, ends: Ends, back: Ends) -> None:
        """Gradients of what `_told` reads, and of the map of it, from that of the hidden layer."""
        begins, to = self._split(ends)
        told, mean = self._told(e, begins, to)
        self.collect(0, grad, told)
        own = self.room("product", grad.shape, grad)
        torch.mm(rows(grad), self.weight(0), out=rows(own))
        if mean is not None:
            own.sub_(torch.mul(own, told, out=told).mean(-1, keepdim=True))
            e.give(own.mul_(e.value).mul_(2 / mean))
            return
        own.mul_(told.square_().neg_().add_(1))
        edge = torch.mul(own, e.value, out=grad)
        for dim, one, other in zip((2, 3), self._split(back), (to, begins), strict=True):
            torch.sum(torch.mul(edge, other[1], out=told), dim, keepdim=True, out=one[1])
        e.give(own.mul_(begins[1]).mul_(to[1]))
