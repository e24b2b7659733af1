"""Rounds of messages as one autograd function, for layers that name an `EdgeKernel`.

Autograd saves what a layer computes, chunk by chunk. Here the forward pass saves nothing but what
costs more to compute than to store, and the backward pass goes over the chunks once more. If the
gradient itself is to be differentiated, it is that of the layer's own `step`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wspace.nn.edge_kernel import Affine, Dense, EdgeKernel, Edges, Ends, Inner, Room, wide

KEEP = 64
"""Channels from which products are kept for the backward pass: below, computing is cheaper."""


def kernel_of(layer: Any) -> type[EdgeKernel] | None:
    """The kernel that stands for the layer's `step` as it is now, if there is one.

    Args:
        layer: A layer of messages.

    Returns:
        The kernel; None too if a subclass has another `step`, or if a weight belongs to anything
        but a plain module (a hook, an adapter, a parametrization).
    """
    kind = type(layer)
    owners = [next((c for c in kind.__mro__ if n in vars(c)), None) for n in _DEFINING]
    if owners[0] is None or owners.count(owners[0]) < len(owners):
        return None
    modules = {n.rpartition(".")[0] for n in layer.kernel.names}
    plain = all(_plain(attrgetter(n)(layer)) for n in modules)
    return layer.kernel if plain else None


_DEFINING = ("kernel", "step", "advance")


def _plain(module: Any) -> bool:
    kinds = (nn.Linear, nn.LayerNorm, type(None))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) in kinds and not any(getattr(module, h, None) for h in hooks)


def weights_of(layer: Any, kernel: type[EdgeKernel]) -> list[Tensor | None]:
    """Weights in the order of `EdgeKernel.names`; None for those that the layer lacks."""
    found: list[Tensor | None] = []
    for name in kernel.names:
        module = attrgetter(name.rpartition(".")[0])(layer)
        found.append(None if module is None else attrgetter(name)(layer))
    return found


def first_state(
    raw: Tensor | None, matrix: Tensor | None, code: Tensor, shape: Sequence[int]
) -> Tensor:
    """First state of a chunk of edges, ``(b, P, T, S, C)``, from its entries."""
    if raw is None or matrix is None:
        return code.expand(*shape)
    raw = raw.to(code.dtype)
    if len(matrix) == 1:
        return torch.addcmul(code, raw, matrix[0])
    return raw @ matrix + code


@dataclass(frozen=True)
class Piece:
    """One chunk: the shape of its states, and where its first state comes from.

    Attributes:
        shape: ``(b, P, T, S, C)``.
        maps: Place of the matrix and the constant of its first state; None if the state is given.
    """

    shape: tuple[int, ...]
    maps: int | None


@dataclass(frozen=True)
class Round:
    """What is run on which chunks, without the tensors.

    Attributes:
        layers: Layers that bring the first state to the last, of which messages are wanted.
        kernels: Theirs.
        pieces: All chunks.
        maps: Number of pairs of matrix and constant.
        emit: Whether the next states are wanted.
        keep: Whether to keep products for the backward pass.
        low: Type of automatic mixed precision, if it is on.
    """

    layers: tuple[Any, ...]
    kernels: tuple[type[EdgeKernel], ...]
    pieces: tuple[Piece, ...]
    maps: int
    emit: bool
    keep: bool
    low: torch.dtype | None

    def run(
        self, inputs: Sequence[Tensor | None], *, training: bool
    ) -> Iterator[list[Tensor | None]]:
        """For every chunk the next state and the reduced messages.

        Args:
            inputs: Weights of all layers, pairs of matrix and constant, and for every chunk its
                entries or its state, and terms of source and target for every layer.
            training: Whether gradients are wanted.

        Yields:
            Next state, None if not wanted, and messages.
        """
        if not training:  # messages are reduced as they come
            work = _Work(self, inputs, [False] * len(inputs)).forward()
            for _ in self.pieces:
                with torch.autocast(_device(inputs), enabled=False):
                    some = next(work)[0]
                yield [*some] if self.emit else [None, *some]
            return
        made = iter(cast("tuple[Tensor, ...]", _Explicit.apply(self, *inputs)))
        count = sum(len(r) for r in self.layers[-1].reductions)
        for _ in self.pieces:
            yield [next(made) if self.emit else None, *(next(made) for _ in range(count))]

    def differentiable(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The same by the layers' own methods."""
        parts = _Parts(self, inputs)
        calls = [
            partial(_call, *one)
            for one in zip(self.layers, self.kernels, parts.weights, strict=True)
        ]
        out: list[Tensor] = []
        for piece, given, ends in parts.chunks():
            e = given
            if piece.maps is not None:
                matrix, code = parts.maps[piece.maps]
                assert code is not None
                e = first_state(given, matrix, code, piece.shape)
            for call, (ps, pt) in zip(calls[:-1], ends, strict=False):
                e = call("advance", e, ps, pt)
            e, along, against = calls[-1]("step", e, *ends[-1])
            out += [*([e] if self.emit else []), *along, *against]
        return out


class _Parts:
    """Inputs of a round by what they are."""

    def __init__(self, plan: Round, inputs: Sequence[Tensor | None]) -> None:
        self.plan, rest = plan, iter(inputs)
        self.weights = [[next(rest) for _ in k.names] for k in plan.kernels]
        self.maps = [(next(rest), next(rest)) for _ in range(plan.maps)]
        self.start = sum(map(len, self.weights)) + 2 * plan.maps
        self.stride = 1 + 2 * len(plan.layers)
        self._chunks = list(rest)[: self.stride * len(plan.pieces)]

    def chunks(self) -> Iterator[tuple[Piece, Tensor | None, list[tuple[Tensor, Tensor]]]]:
        """Every chunk: what is given of it, and terms of its ends for every layer."""
        some = iter(self._chunks)
        for piece in self.plan.pieces:
            given = next(some)
            ends = [(next(some), next(some)) for _ in self.plan.layers]
            yield piece, given, cast("list[tuple[Tensor, Tensor]]", ends)


def _call(
    layer: Any,
    kernel: type[EdgeKernel],
    weights: Sequence[Tensor | None],
    method: str,
    *inputs: Any,
) -> Any:
    """A method of a layer with these weights in it."""
    pairs = zip(kernel.names, weights, strict=True)
    given = {f"layer.{n}": w for n, w in pairs if w is not None}
    return functional_call(_Method(layer), given, (method, *inputs))


class _Method(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, method: str, *inputs: Any) -> Any:
        return getattr(self.layer, method)(*inputs)


class _Work:
    """One pass over the chunks, forward or backward."""

    def __init__(self, plan: Round, inputs: Sequence[Tensor | None], wants: Sequence[bool]) -> None:
        self.plan, self.parts, self.wants = plan, _Parts(plan, inputs), wants
        self.totals = [
            tuple(None if m is None else torch.zeros_like(m, dtype=wide(m)) for m in pair)
            for pair in self.parts.maps
        ]
        like = inputs[self.parts.start + 1]  # terms of a source
        assert like is not None
        self.kernels = [
            kernel(layer, weights, like.dtype, keep=plan.keep)
            for layer, kernel, weights in zip(
                plan.layers, plan.kernels, self.parts.weights, strict=True
            )
        ]
        self.room = Room()

    def edges(self, i: int, piece: Piece, given: Tensor | None) -> Edges:
        """The edges of chunk `i` before the first layer."""
        if piece.maps is None:
            assert given is not None
            return Dense(given)
        matrix, code = self.parts.maps[piece.maps]
        assert code is not None
        wants = self.wants[self.parts.start + i * self.parts.stride]
        pair = cast(Any, self.totals[piece.maps])
        return Affine(given, (matrix, code), piece.shape, pair, self.room, wants=wants)

    def through(self, e: Edges, ends: Sequence[Ends]) -> tuple[list[Edges], list[Inner]]:
        """The edges before every layer, and what the layers but the last compute of them."""
        states, inners = [e], []
        for kernel, own in zip(self.kernels[:-1], ends, strict=False):
            out = kernel.room("next", e.shape, own[0])
            inners.append(kernel.forward(e, own, out, send=False)[0])
            e = Dense(out)
            states.append(e)
        return states, inners

    def forward(self) -> Iterator[tuple[list[Tensor], Inner]]:
        """Next state and messages of every chunk, and what to keep of it."""
        last = self.kernels[-1]
        for i, (piece, given, ends) in enumerate(self.parts.chunks()):
            e = self.through(self.edges(i, piece, given), ends)[0][-1]
            new = ends[-1][0].new_empty(piece.shape) if self.plan.emit else None
            inner, sent = last.forward(e, ends[-1], new, send=True)
            yield sent if new is None else [new, *sent], inner if self.plan.keep else ()

    def backward(
        self, saved: tuple[Sequence[Tensor], Sequence[Tensor]], grads: Sequence[list[Tensor | None]]
    ) -> list[Tensor | None]:
        """Gradients of all inputs from the next states, what was kept, and gradients by chunk."""
        out: list[Tensor | None] = []
        last, (made, kept) = self.kernels[-1], saved
        width = len(kept) // len(self.plan.pieces)
        for i, (piece, given, ends) in enumerate(self.parts.chunks()):
            ahead, *some = grads[i] if self.plan.emit else [None, *grads[i]]
            sent = None if some[0] is None else cast("list[Tensor]", some)
            if ahead is None and sent is None:
                out += [None] * self.parts.stride
                continue
            states, inners = self.through(self.edges(i, piece, given), ends)
            stored = tuple(kept[i * width : (i + 1) * width])
            new = made[i] if self.plan.emit else None
            inners.append(stored or last.again(states[-1], ends[-1], new))
            back: list[Tensor | None] = []
            for j in reversed(range(len(states))):
                own = self.kernels[j].gradient(states[j], inners[j], ends[j], ahead, sent)
                back = [*own, *back]
                ahead, sent = states[j].grad, None
            out += [None if ahead is None or given is None else ahead.view_as(given), *back]
        for kernel in self.kernels:
            kernel.finish()
        weights = [g for k in self.kernels for g in k.grads]
        return [*weights, *(m for pair in self.totals for m in pair), *out]


def _device(inputs: Sequence[Tensor | None]) -> str:
    return next(x for x in inputs if x is not None).device.type


class _Explicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Round, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        device = _device(inputs)
        with torch.autocast(device, enabled=False):
            made = list(_Work(plan, inputs, ctx.needs_input_grad[1:]).forward())
        out, kept = [x for some, _ in made for x in some], [x for _, some in made for x in some]
        ctx.shapes, ctx.count = [x.shape for x in out], len(inputs)
        count = len(out) // len(plan.pieces)
        ctx.save_for_backward(*inputs, *(out[::count] if plan.emit else ()), *kept)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Round = ctx.plan
        inputs, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if torch.is_grad_enabled():
            return None, *_differentiable(plan, inputs, ctx.needs_input_grad[1:], grads)
        made = len(plan.pieces) if plan.emit else 0
        count = len(grads) // len(plan.pieces)
        chunks = [list(grads[i : i + count]) for i in range(0, len(grads), count)]
        for i, some in enumerate(chunks):
            some[plan.emit :] = _filled(
                some[plan.emit :], ctx.shapes[i * count + plan.emit : (i + 1) * count]
            )
        device = _device(inputs)
        with torch.autocast(device, enabled=False):
            work = _Work(plan, inputs, ctx.needs_input_grad[1:])
            return None, *work.backward((saved[:made], saved[made:]), chunks)


def _filled(grads: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> list[Tensor | None]:
    """Zeros for missing gradients, unless all are missing."""
    like = next((g for g in grads if g is not None), None)
    if like is None:
        return list(grads)
    pairs = zip(grads, shapes, strict=True)
    return [like.new_zeros(shape) if g is None else g for g, shape in pairs]


def _differentiable(
    plan: Round,
    inputs: Sequence[Tensor | None],
    wants: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by autograd, to be differentiated again."""
    # Some inputs are made of others: aliases end the paths that do not lie in this round.
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    device = _device(inputs)
    with torch.autocast(device, dtype=plan.low, enabled=plan.low is not None):
        out = plan.differentiable(inputs)
    pairs = [(y, g) for y, g in zip(out, grads, strict=True) if g is not None]
    some = [x for x, wanted in zip(inputs, wants, strict=True) if wanted and x is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], some, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
    )
    return [
        next(found) if w and x is not None else None for x, w in zip(inputs, wants, strict=True)
    ]
