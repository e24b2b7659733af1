r"""What a layer writes out to be fast: its work on a chunk of edges, and the gradient of it.

A kernel works in buffers that are used again (writing into fresh memory is five times slower) and
adds gradients of weights up in place; `wspace.nn.explicit` runs it.

A first state, :math:`r A + c` with the raw entries :math:`r`, is not multiplied out where a linear
map of it is wanted: :math:`W e = r (A W^\top) + W c` needs no product over edges (`Affine`).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

KEEP = 64
"""Channels from which a product is kept for the backward pass: below, computing it is cheaper."""

Inner = tuple[Tensor, ...]
Ends = tuple[Tensor, Tensor]
Weights = Sequence[Tensor | None]


class Room:
    """Buffers by name, used again by every chunk."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory, valid until the name is asked for again."""
        numbers = torch.Size(shape).numel()
        held = self.buffers.get((name, like.dtype))
        if held is None or held.numel() < numbers:
            held = self.buffers[name, like.dtype] = like.new_empty(numbers)
        return held[:numbers].view(*shape)


def rows(x: Tensor) -> Tensor:
    """``(…, C)`` as ``(rows, C)``, a view."""
    return x.view(-1, x.shape[-1])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in the wider type of `total`."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total.add_(a @ b)


def wide(x: Tensor) -> torch.dtype:
    """Type to add numbers like these up in."""
    return torch.promote_types(x.dtype, torch.float32)


class Dense:
    """Edge states of a chunk as they are, ``(b, P, T, S, C)``, and their gradient."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.shape = value, value.shape
        self.grad: Tensor | None = None

    def map(self, weight: Tensor, out: Tensor) -> None:
        """``out = W e``."""
        torch.mm(rows(self.value), weight.mT, out=rows(out))

    def add_map(self, weight: Tensor, out: Tensor) -> None:
        """``out += W e``, on rows."""
        torch.addmm(out, rows(self.value), weight.mT, out=out)

    def map_back(self, grad: Tensor, weight: Tensor, total: Tensor, plus: Tensor | None) -> None:
        """Gradients of a linear map: of W into `total`, of e; `plus` is one more of e."""
        add_product(total, grad.mT, rows(self.value))
        more = torch.empty_like(self.value)
        if plus is None:
            torch.mm(grad, weight, out=rows(more))
        else:
            torch.addmm(rows(plus), grad, weight, out=rows(more))
        self.grad = more if self.grad is None else self.grad.add_(more)

    def give(self, grad: Tensor) -> None:
        """Adds to the gradient of e."""
        self.grad = grad.clone() if self.grad is None else self.grad.add_(grad)


class Affine:
    r"""First edge states of a chunk, :math:`r A + c`, and the gradients of r, A and c.

    Args:
        raw: Entries r, ``(b, P, T, S, F)``; None if there are none.
        maps: A, ``(F, C)``, and c, ``(C,)``.
        shape: Shape of the states.
        totals: Where gradients of A and c are added up.
        room: Memory for the states.
        wants: Whether the gradient of r is needed.
    """

    def __init__(
        self,
        raw: Tensor | None,
        maps: tuple[Tensor | None, Tensor],
        shape: Sequence[int],
        totals: tuple[Tensor | None, Tensor],
        room: Room,
        *,
        wants: bool = False,
    ) -> None:
        self.shape, self.room, self.totals = torch.Size(shape), room, totals
        self.matrix, self.code = maps
        self.raw = None if raw is None else rows(raw.to(self.code.dtype).contiguous())
        self.grad: Tensor | None = None
        self.wants = wants and raw is not None
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The states, multiplied out."""
        if self._value is None:
            self._value = self.room("first", self.shape, self.code)
            self._write(rows(self._value), self.matrix, self.code)
        return self._value

    def _write(self, out: Tensor, matrix: Tensor | None, code: Tensor) -> None:
        if self.raw is None or matrix is None:
            out.copy_(code.expand_as(out))
        elif len(matrix) == 1:
            torch.addcmul(code, self.raw, matrix[0], out=out)
        else:
            torch.addmm(code, self.raw, matrix, out=out)

    def map(self, weight: Tensor, out: Tensor) -> None:
        """``out = W e``."""
        matrix = None if self.matrix is None else self.matrix @ weight.mT
        self._write(rows(out), matrix, weight @ self.code)

    def add_map(self, weight: Tensor, out: Tensor) -> None:
        """``out += W e``, on rows."""
        out.add_(weight @ self.code)
        if self.raw is not None and self.matrix is not None:
            matrix = self.matrix @ weight.mT
            if self.raw.shape[1] == 1:
                out.addcmul_(self.raw, matrix)
            else:
                torch.addmm(out, self.raw, matrix, out=out)

    def map_back(self, grad: Tensor, weight: Tensor, total: Tensor, plus: Tensor | None) -> None:
        """Gradients of a linear map: of W into `total`, of what e is made of."""
        taps, code = self._sums(grad)
        total.add_(torch.outer(code, self.code))
        if taps is not None and self.matrix is not None:
            total.add_(taps.mT @ self.matrix)
            taps = taps @ weight
        self._add(taps, code @ weight)
        if self.wants and self.matrix is not None:
            self._to_raw(grad @ (self.matrix @ weight.mT).mT)
        if plus is not None:
            self.give(plus)

    def give(self, grad: Tensor) -> None:
        """Adds the gradient of e to those of what it is made of."""
        self._add(*self._sums(rows(grad)))
        if self.wants and self.matrix is not None:
            self._to_raw(rows(grad) @ self.matrix.mT)

    def _sums(self, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        return None if self.raw is None else self.raw.mT @ grad, grad.sum(0)

    def _add(self, taps: Tensor | None, code: Tensor) -> None:
        if taps is not None and self.totals[0] is not None:
            self.totals[0].add_(taps)
        self.totals[1].add_(code)

    def _to_raw(self, grad: Tensor) -> None:
        self.grad = grad if self.grad is None else self.grad.add_(grad)


Edges = Dense | Affine


class EdgeKernel:
    """What one layer does to one chunk of edges after another, and the gradient of it.

    A subclass defines `forward`, `again` and `gradient`; all shapes are those of
    `wspace.nn.message.MessageLayer`. Weights are those that `names` lists, in the type that the
    edges are computed in; their gradients are added up in `grads`.

    Args:
        layer: The layer, for its options; its weights are not to be read, others stand for them.
        weights: The weights; None for one that the layer lacks.
        dtype: Type of the edge states.
        keep: Whether `keep` gives fresh memory.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """Weights, as attributes of the layer."""

    def __init__(self, layer: Any, weights: Weights, dtype: torch.dtype, *, keep: bool) -> None:
        del layer  # a subclass may read options
        self.weights = [None if w is None else w.detach().to(dtype) for w in weights]
        self.grads = [None if w is None else torch.zeros_like(w, dtype=wide(w)) for w in weights]
        self.room, self._keep = Room(), keep

    def weight(self, i: int) -> Tensor:
        """Weight `i`, which is there."""
        found = self.weights[i]
        assert found is not None
        return found

    def total(self, i: int) -> Tensor:
        """Where the gradient of weight `i` is added up."""
        found = self.grads[i]
        assert found is not None
        return found

    def keep(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for what `gradient` needs: fresh if it is kept until then."""
        return like.new_empty(shape) if self._keep else self.room(name, shape, like)

    def collect(self, i: int, grad: Tensor, x: Tensor) -> None:
        """Adds to the gradient of weight `i`, a matrix that maps `x`."""
        add_product(self.total(i), rows(grad).mT, rows(x))

    def collect_sum(self, i: int, grad: Tensor) -> None:
        """Adds to the gradient of weight `i`, a vector that is added to every edge."""
        self.total(i).add_(rows(grad).sum(0))

    def forward(
        self, e: Edges, ends: Ends, out: Tensor | None, *, send: bool
    ) -> tuple[Inner, list[Tensor]]:
        """Writes the next state to `out`, if it is wanted; reduces messages, if sent.

        Returns:
            What `gradient` is made of, in memory that `keep` gives, and the messages.
        """
        raise NotImplementedError

    def again(self, e: Edges, ends: Ends, new: Tensor | None) -> Inner:
        """The first of what `forward` returns, made once more; `new` is the next state, if kept."""
        raise NotImplementedError

    def gradient(
        self, e: Edges, inner: Inner, ends: Ends, ahead: Tensor | None, sent: list[Tensor] | None
    ) -> Ends:
        """Gradients of the terms of both ends; those of edges and weights are added.

        Args:
            e: The edges.
            inner: What `forward` or `again` returned.
            ends: Terms of the source and of the target.
            ahead: Gradient of the next state, not to be changed; None if there is none.
            sent: Gradients of the messages; None if none was sent.

        Returns:
            Gradients of `ends`.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Called when all chunks are done, before `grads` is read."""


class ResidualKernel(EdgeKernel):
    r"""Base of kernels whose edges become :math:`e + W\,\sigma(C e + a_s + a_t) + b`.

    C, W and b are the first three of `names`.
    """

    def before(self, e: Edges, ps: Tensor, pt: Tensor) -> Tensor:
        """What is bent."""
        before = torch.add(ps, pt, out=self.keep("before", e.shape, ps))
        e.add_map(self.weight(0), rows(before))
        return before

    def hidden(self, before: Tensor) -> Tensor:
        """The bent, in a buffer."""
        return bent(before, self.room("hidden", before.shape, before))

    def update(self, e: Edges, hidden: Tensor, out: Tensor) -> Tensor:
        """The next state in `out`."""
        torch.add(e.value, self.weight(2), out=out)
        torch.addmm(rows(out), rows(hidden), self.weight(1).mT, out=rows(out))
        return out

    def update_back(
        self, e: Edges, before: Tensor, ahead: Tensor | None, grad: Tensor | None
    ) -> Ends:
        """Gradients of the terms of both ends.

        Args:
            e: The edges.
            before: What was bent.
            ahead: Gradient of the next state.
            grad: More gradient of the hidden layer, changed; `ahead` or this is there.

        Returns:
            Those of the source and of the target.
        """
        if ahead is not None:
            self.collect(1, ahead, self.hidden(before))
            self.collect_sum(2, ahead)
            if grad is None:
                grad = self.room("grad", e.shape, before)
                torch.mm(rows(ahead), self.weight(1), out=rows(grad))
            else:
                torch.addmm(rows(grad), rows(ahead), self.weight(1), out=rows(grad))
        assert grad is not None
        bent_back(grad, before)
        e.map_back(rows(grad), self.weight(0), self.total(0), ahead)
        return to_ends(grad)


def bent(x: Tensor, out: Tensor) -> Tensor:
    """SiLU of `x` in `out`."""
    return torch.ops.aten.silu.out(x, out=out)


def bent_back(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of SiLU at `x`, in place of `grad`."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def bounded(x: Tensor, out: Tensor) -> Tensor:
    """Hyperbolic tangent in `out`: by the logistic function, whose kernel is five times faster."""
    if torch.finfo(x.dtype).bits < 32:  # near 0 the detour costs digits
        return out.copy_(bounded(wider := x.float(), wider))
    return torch.mul(x, 2, out=out).sigmoid_().mul_(2).sub_(1)


def to_ends(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of a sum of terms of both ends: of the source's and of the target's."""
    return grad.sum(2, keepdim=True), grad.sum(3, keepdim=True)
