"""The loop of `HyperLSTM` over time: for autograd, and with the way back by hand.

Everything that does not depend on the state is made before: projections of the inputs, and the
composition of the two linear maps from the small cell's state to the factors. A step is then three
matrix products and what is done entry by entry.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wspace.hyper.cells.gates import ROWS, Norms, Record, Rewind, Tape, differentiable, step


class HyperState(NamedTuple):
    """State of a `HyperLSTM`.

    Attributes:
        h: Hidden state, ``(…, hidden_size)``.
        c: Cell state, ``(…, hidden_size)``.
        hyper_h: Hidden state of the small cell, ``(…, hyper_size)``.
        hyper_c: Its cell state, ``(…, hyper_size)``.
    """

    h: Tensor
    c: Tensor
    hyper_h: Tensor
    hyper_c: Tensor

    def detach(self) -> "HyperState":
        """The state without the graph it was made with."""
        return HyperState(*(part.detach() for part in self))


class Loop(NamedTuple):
    """What the loop needs; H, M are the units of the large and the small cell.

    Attributes:
        x: ``W_x x_t`` for all steps, ``(T, B, 4 H)``.
        hyper_x: The small cell's projected inputs with biases, ``(T, B, 4 M)``.
        state: State at the start.
        weight: ``W_h``, ``(4 H, H)``.
        hyper_weight: Weights of the small cell on ``[h; h^]``, ``(4 M, H + M)``.
        maps: From ``h^`` to ``[d_h; d_x; b]``, ``(12 H, M)``.
        shifts: Their constant parts, ``(12 H,)``.
        norms: Of the large cell; None for none.
        hyper_norms: Of the small cell.
        mask: Dropout of the large cell's candidates, ``(T, B, H)``.
    """

    x: Tensor
    hyper_x: Tensor
    state: HyperState
    weight: Tensor
    hyper_weight: Tensor
    maps: Tensor
    shifts: Tensor
    norms: Norms | None
    hyper_norms: Norms | None
    mask: Tensor | None

    def flat(self) -> tuple[Tensor | None, ...]:
        """All tensors, None for those there are not: 19."""
        none = (None,) * 4
        norms = *(self.norms or none), *(self.hyper_norms or none)
        weights = self.weight, self.hyper_weight, self.maps, self.shifts
        return self.x, self.hyper_x, *self.state, *weights, *norms, self.mask

    @classmethod
    def of(cls, flat: Sequence[Tensor | None]) -> "Loop":
        """The inverse of `flat`."""
        x, hyper_x, *rest = cast("list[Tensor]", list(flat[:10]))
        state, (weight, hyper_weight, maps, shifts) = HyperState(*rest[:4]), rest[4:]
        normed = flat[10] is not None
        norms = Norms(*cast("list[Tensor]", flat[10:14])) if normed else None
        small = Norms(*cast("list[Tensor]", flat[14:18])) if normed else None
        every = x, hyper_x, state, weight, hyper_weight, maps, shifts, norms, small, flat[18]
        return cls(*every)


def run(loop: Loop, eps: float, *, fused: bool) -> tuple[Tensor, HyperState]:
    """Runs the loop.

    Args:
        loop: What it needs.
        eps: Added to variances.
        fused: Whether gradients are taken by hand, where any are needed.

    Returns:
        Hidden states, ``(T, B, H)``, and the state at the end.
    """
    flat = loop.flat()
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat)
    if not (fused and needed):
        return by_autograd(loop, eps)
    out, *rest = cast("tuple[Tensor, ...]", ByHand.apply(eps, *flat))
    return out, HyperState(out[-1], *rest)


def by_autograd(loop: Loop, eps: float) -> tuple[Tensor, HyperState]:
    """The loop step by step, for autograd: any derivative of any order.

    Args:
        loop: What it needs.
        eps: Added to variances.

    Returns:
        Hidden states, ``(T, B, H)``, and the state at the end.
    """
    h, c, small_h, small_c = loop.state
    masks = [None] * len(loop.x) if loop.mask is None else loop.mask.unbind()
    out: list[Tensor] = []
    for x, small_x, mask in zip(loop.x, loop.hyper_x, masks, strict=True):
        sums = small_x + torch.cat([h, small_h], -1) @ loop.hyper_weight.mT
        small_h, small_c = step(sums, small_c, loop.hyper_norms, None, eps)
        by_h, by_x, shift = torch.addmm(loop.shifts, small_h, loop.maps.mT).chunk(3, -1)
        sums = by_h * (h @ loop.weight.mT) + by_x * x + shift
        h, c = step(sums, c, loop.norms, mask, eps)
        out.append(h)
    return torch.stack(out), HyperState(h, c, small_h, small_c)


class ByHand(torch.autograd.Function):
    """The loop with its gradient by hand; a gradient to be differentiated again is autograd's."""

    @staticmethod
    def forward(ctx: Any, eps: float, *flat: Tensor | None) -> tuple[Tensor, ...]:
        """See `run`."""
        loop = Loop.of(flat)
        out, kept = _forward(loop, eps)
        ctx.eps, ctx.count = eps, len(flat)
        ctx.save_for_backward(*flat, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `_backward`."""
        flat, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wants = ctx.needs_input_grad[1:]
        with torch.autocast(slopes[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                return None, *differentiable(_outputs, flat, wants, ctx.eps, slopes)
            return None, *_backward(Loop.of(flat), kept, slopes, ctx.eps)


def _outputs(flat: Sequence[Tensor | None], eps: float) -> tuple[Tensor, ...]:
    """What `ByHand` returns, by autograd."""
    out, end = by_autograd(Loop.of(flat), eps)
    return out, *end[1:]


def _forward(loop: Loop, eps: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of the loop, and what its way back needs."""
    (steps, batch, wide), size = loop.x.shape, loop.weight.shape[1]
    small = loop.maps.shape[1]
    states = loop.x.new_empty(steps + 1, batch, size + small)  # h and h^ side by side
    torch.cat([loop.state.h, loop.state.hyper_h], -1, out=states[0])
    products, factors = loop.x.new_empty(steps, batch, wide), loop.x.new_empty(batch, 3 * wide)
    tape = Tape(loop.state.c, steps, loop.norms, loop.mask, eps)
    small_tape = Tape(loop.state.hyper_c, steps, loop.hyper_norms, None, eps)
    weight, small_weight, maps = loop.weight.mT, loop.hyper_weight.mT, loop.maps.mT
    by_h, by_x, shift = factors.chunk(3, -1)
    before = states.unbind()
    hidden, small_hidden = (p.unbind() for p in states.split([size, small], -1))
    parts = zip(loop.x.unbind(), loop.hyper_x.unbind(), products.unbind(), strict=True)
    for t, (x, small_x, product) in enumerate(parts):
        torch.addmm(small_x, before[t], small_weight, out=small_tape.sums[t])
        small_tape.take(t, small_hidden[t + 1])
        torch.addmm(loop.shifts, small_hidden[t + 1], maps, out=factors)
        torch.mm(hidden[t], weight, out=product)
        torch.mul(by_h, product, out=tape.sums[t]).addcmul_(by_x, x).add_(shift)
        tape.take(t, hidden[t + 1])
    ends = tape.record.cells[-1], states[-1, :, size:], small_tape.record.cells[-1]
    made = states[1:, :, :size].contiguous(), *(end.clone() for end in ends)
    return made, (states, products, *tape.record, *small_tape.record)


def _backward(
    loop: Loop, kept: Sequence[Tensor], slopes: Sequence[Tensor], eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors of a loop, in the order of `Loop.flat`."""
    states, products = kept[:2]
    (steps, batch, wide), size = loop.x.shape, loop.weight.shape[1]
    span = min(steps, max(1, ROWS // batch))
    made = states.new_empty(span, batch, 3, wide)  # gradients of d_h, d_x, b; b's is the sums'
    scaled = states.new_empty(span, batch, wide)  # gradients of W_h h
    small_sums = states.new_empty(span, batch, loop.hyper_x.shape[-1])
    rewind = Rewind(Record(*kept[2:5]), loop.norms, loop.mask, eps, made[:, :, 2])
    small_rewind = Rewind(Record(*kept[5:]), loop.hyper_norms, None, eps, small_sums)
    # transposed: that way round the products are faster
    weights = [w.new_zeros(w.mT.shape) for w in (loop.weight, loop.hyper_weight, loop.maps)]
    shifts = torch.zeros_like(loop.shifts)
    by_x, by_small_x = torch.empty_like(loop.x), torch.empty_like(loop.hyper_x)
    end, c, small_c = torch.zeros_like(states[0]), slopes[1].clone(), slopes[3].clone()
    h, small_h = end[:, :size], end[:, size:]
    small_h.copy_(slopes[2])
    by_h, by_t, gates = (part.unbind() for part in made.unbind(2))
    flat = made.flatten(2).unbind()
    for stop in range(steps, 0, -span):
        start = max(0, stop - span)
        n = stop - start
        rewind.load(start, stop)
        small_rewind.load(start, stop)
        after = states[start + 1 : stop + 1, :, size:].flatten(0, 1)
        factors = torch.addmm(loop.shifts[: 2 * wide], after, loop.maps[: 2 * wide].mT)
        d_h, d_x = factors.view(n, batch, 2, wide).unbind(2)
        for t in range(stop - 1, start - 1, -1):
            k = t - start
            h.add_(slopes[0][t])
            rewind.back(k, h, c)
            torch.mul(gates[k], products[t], out=by_h[k])
            torch.mul(gates[k], loop.x[t], out=by_t[k])
            small_h.addmm_(flat[k], loop.maps)
            small_rewind.back(k, small_h, small_c)
            torch.mm(small_sums[k], loop.hyper_weight, out=end)
            torch.mul(gates[k], d_h[k], out=scaled[k])
            h.addmm_(scaled[k], loop.weight)
        torch.mul(made[:n, :, 2], d_x, out=by_x[start:stop])
        by_small_x[start:stop] = small_sums[:n]
        before, rows = states[start:stop].flatten(0, 1), made[:n].view(n * batch, -1)
        weights[0].addmm_(before[:, :size].mT, scaled[:n].flatten(0, 1))
        weights[1].addmm_(before.mT, small_sums[:n].flatten(0, 1))
        weights[2].addmm_(after.mT, rows)
        shifts.add_(rows.sum(0))
        rewind.add_up(n)
        small_rewind.add_up(n)
    start = h.clone(), c, small_h.clone(), small_c
    norms = *rewind.norm_slopes, *small_rewind.norm_slopes
    return by_x, by_small_x, *start, *(w.mT for w in weights), shifts, *norms, None
