"""Dense, streamed message passing over the blocks of a parameter graph.

A block is a dense tensor between two node sets, so a message is a broadcast and a reduction: no
edge list, no scatter over edges. Blocks are cut into chunks that stay in the cache.

The state of an edge at layer :math:`l` is a function of the raw block and of the node states of the
layers before, so it need not be stored: *streamed*, it is recomputed chunk by chunk in every layer,
and memory is that of the nodes plus one chunk. In training, chunks are checkpointed: their
intermediate results are recomputed in the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from wspace.graph import ParameterGraph
from wspace.nn.edge_kernel import EdgeKernel
from wspace.nn.explicit import KEEP, Piece, Round, first_state, kernel_of, weights_of
from wspace.nn.layout import Chunk, Cuts, EdgeForm, Range, cuts_of, forms_of

CHUNK = 1 << 13
"""Edges that are computed at once, if the caller asks for no other number."""
SAVED = 1 << 25
"""Numbers of edge state up to which training saves intermediate results, if not streamed."""
KEPT = 1 << 26
"""Numbers of edge state up to which it is kept between layers, if not told otherwise."""


Select = Callable[[Any, EdgeForm, Tensor, Tensor], tuple[Tensor, Tensor]]


Step = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


class MessageLayer(Protocol):
    """One round of message passing; `run` calls these in turn.

    Shapes: nodes ``(B, N, ·)``; at one chunk of a block ``e`` is ``(b, P, T, S, C)``, ``ps`` is
    ``(b, P, 1, S, ·)`` and ``pt`` is ``(b, P, T, 1, ·)``. Messages to targets are reduced over
    S, those to sources over T, by the rules that `reductions` names for the two.
    """

    reductions: tuple[tuple[str, ...], tuple[str, ...]]

    def nodes(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """What edges need of their source and of their target, ``(B, N, ·)`` each."""
        ...

    def advance(self, e: Tensor, ps: Tensor, pt: Tensor) -> Tensor:
        """The next state of the edges."""
        ...

    def step(self, e: Tensor, ps: Tensor, pt: Tensor) -> Step:
        """The next state of the edges, and their reduced messages to targets and to sources."""
        ...


class MessagePassing:
    """The edges of one batch of graphs of one space, and how they are computed.

    Args:
        graph: The graph, its batch axes in front.
        coefficients: For every edge block ``(F, C)``: what its taps contribute to the edge's first
            state, their scale included.
        codes: ``(edge blocks, C)``: a constant part of that state.
        stream: True to recompute edge states in every layer, False to keep them; None decides by
            their size.
        chunk: Edges computed at once.
        select: Changes what a block's edges see of their two ends in a layer,
            ``(B, P, 1, S, ·)`` and ``(B, P, T, 1, ·)``.
    """

    def __init__(
        self,
        graph: ParameterGraph,
        coefficients: Sequence[Tensor],
        codes: Tensor,
        *,
        stream: bool | None = None,
        chunk: int = CHUNK,
        select: Select | None = None,
    ) -> None:
        self._select = select
        self.forms = forms_of(graph.structure)
        self.batch = prod(graph.batch)
        plain = self._plain = torch.compiler.is_compiling() or _transformed()
        self.cuts = cuts_of(self.forms, self.batch, 1 << 62 if plain else chunk)
        self.chunks = [c for i, cut in enumerate(self.cuts) for c in cut.chunks(i)]
        numbers = sum(f.entries for f in self.forms.edges) * self.batch * codes.shape[-1]
        self.stream = (numbers > KEPT) if stream is None else stream
        self._wide, self._channels = codes.dtype, codes.shape[-1]
        self._low = _autocast_dtype(codes.device.type)
        self._checkpoint = not plain and (self.stream or numbers > SAVED)
        self._layers: list[MessageLayer] = []
        self._states = self._begin(graph, coefficients, codes)

    def _begin(
        self, graph: ParameterGraph, coefficients: Sequence[Tensor], codes: Tensor
    ) -> list["_State"]:
        """How the first state of every chunk is made from its entries."""
        out: list[_State] = []
        dtype = self._low or codes.dtype
        for i, (form, cuts) in enumerate(zip(self.forms.edges, self.cuts, strict=True)):
            raw, code = form.raw(graph, self.batch), codes[i].to(dtype)
            matrix = None if raw is None else coefficients[i].to(dtype)
            pieces = None if raw is None else _pieces(raw, cuts, "ts")
            for k, c in enumerate(cuts.chunks(i)):
                ranges = (c.batch, c.pairs, c.targets, c.sources)
                first = _First(matrix, code, [*(b - a for a, b in ranges), len(code)], i)
                out.append(_State(first, [] if pieces is None else [pieces[k]]))
        return out

    # ------------------------------------------------------------- one layer

    def run(self, layer: MessageLayer, x: Tensor, u: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One round of messages.

        Args:
            layer: The layer.
            x: Node states, ``(B, N, C)``.
            u: Global state, ``(B, C)``.

        Returns:
            What every node receives as a target and as a source: for each reduction of the layer
            ``(B, N, ·)``. Where no message arrives it is 0.
        """
        self._attach(layer, x, u)
        kinds = [(how, True) for how in layer.reductions[0]]
        kinds += [(how, False) for how in layer.reductions[1]]
        sums = [_Sum(how, to_target=to_target) for how, to_target in kinds]
        made: Iterator[Sequence[Any]] | None = self._explicit()
        if made is None:
            made = (self._call(s, _step) for s in self._states)
        for c, state, (e, *out) in zip(self.chunks, self._states, made, strict=True):
            if not self.stream:
                state.given, state.first, state.ends = [] if e is None else [e], None, []
            for total, part in zip(sums, out, strict=True):
                total.add(c, part)
        if not self.stream:
            self._layers.clear()
        received = [self._collect(total, x.shape[1]) for total in sums]
        split = len(layer.reductions[0])
        return received[:split], received[split:]

    def read(
        self, layer: MessageLayer, x: Tensor, u: Tensor, final: Callable[[Tensor, int], Tensor]
    ) -> list[Tensor | None]:
        """A value for every entry of every block that has values.

        Args:
            layer: Gives the last state of the edges.
            x: Node states, ``(B, N, C)``.
            u: Global state, ``(B, C)``.
            final: Edge states of a chunk ``(b, P, T, S, C)`` and the place of its block →
                ``(b, P, T, S, F)``.

        Returns:
            ``(B, P, T, S, F)`` for every edge block; None for structural ones.
        """
        self._attach(layer, x, u)
        out: list[Tensor | None] = []
        states = iter(zip(self.chunks, self._states, strict=True))
        for cuts in self.cuts:
            some = [next(states) for _ in cuts.chunks(0)]
            if self.forms.edges[some[0][0].form].block.structural:
                out.append(None)
                continue
            made = iter([self._call(s, _Final(final, c.form))[0] for c, s in some])
            rows = [
                [
                    [torch.cat([next(made) for _ in cuts.sources], 3) for _ in cuts.targets]
                    for _ in cuts.pairs
                ]
                for _ in cuts.batch
            ]
            out.append(torch.cat([torch.cat([torch.cat(t, 2) for t in p], 1) for p in rows]))
        return out

    def _attach(self, layer: MessageLayer, x: Tensor, u: Tensor) -> None:
        """Gives every chunk what the layer's edges need of their two ends."""
        self._layers.append(layer)
        sizes = [n.size for n in self.forms.structure.nodes]
        ends = layer.nodes(x, u)
        if self._low is not None:  # sums of node and edge terms would be float32 otherwise
            ends = ends[0].to(self._low), ends[1].to(self._low)
        ps, pt = (y.split(sizes, 1) for y in ends)
        states = iter(self._states)
        for form, cuts in zip(self.forms.edges, self.cuts, strict=True):
            p, t, s, _ = form.sizes
            assert form.block.source is not None
            source = _rows(ps[form.block.source.nodes], form.source).unflatten(1, (p, 1, s))
            target = _rows(pt[form.block.target.nodes], form.target).unflatten(1, (p, t, 1))
            if self._select is not None:
                source, target = self._select(layer, form, source, target)
            begins, ends = _pieces(source, cuts, "s"), _pieces(target, cuts, "t")
            for begin, end in zip(begins, ends, strict=True):
                next(states).ends += [begin, end]

    def _call(self, state: "_State", fn: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Edge state of a chunk through the layers it has not seen, then `fn`."""
        work = _Work(self._layers, state.first, fn)
        inputs = [*state.given, *state.ends]
        if torch.is_grad_enabled() and self._checkpoint:
            made = checkpoint(work, *inputs, use_reentrant=False, preserve_rng_state=False)
            return cast("tuple[Tensor, ...]", made)
        return work(*inputs)

    def _explicit(self) -> Iterator[Sequence[Any]] | None:
        """What `_call` gives for all chunks, if all layers have kernels."""
        kernels = [None if self._plain else kernel_of(layer) for layer in self._layers]
        if not kernels or None in kernels:
            return None
        some = cast("list[type[EdgeKernel]]", kernels)
        firsts = {s.first.form: s.first for s in self._states if s.first is not None}
        places = {form: i for i, form in enumerate(firsts)}
        inputs: list[Tensor | None] = []
        for layer, kernel in zip(self._layers, some, strict=True):
            inputs += weights_of(layer, kernel)
        for first in firsts.values():
            inputs += [first.matrix, first.code]
        pieces = []
        for state in self._states:
            given = state.given[0] if state.given else None
            if state.first is None:
                assert given is not None
                pieces.append(Piece(tuple(given.shape), None))
            else:
                pieces.append(Piece(tuple(state.first.shape), places[state.first.form]))
            inputs += [given, *state.ends]
        training = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in inputs
        )
        keep = training and not self._checkpoint and self._channels >= KEEP
        emit = not self.stream and getattr(self._layers[-1], "part", "all") != "nodes"
        plan = Round(
            tuple(self._layers), tuple(some), tuple(pieces), len(firsts), emit, keep, self._low
        )
        return plan.run(inputs, training=training)

    def _collect(self, total: "_Sum", nodes: int) -> Tensor:
        """Reduced messages of all chunks, brought to the nodes, ``(B, N, ·)``."""
        rows = [rows.flatten(1, 2) for rows in total.joined()]
        values = (torch.cat(rows, 1) if len(rows) > 1 else rows[0]).to(self._wide)
        units = self.forms.receivers[0 if total.to_target else 1].to(values.device)
        out = values.new_zeros(values.shape[0], nodes, values.shape[-1])
        if total.how == "sum":
            return out.index_add(1, units, values)
        index = units[None, :, None].expand_as(values)
        return out.scatter_reduce(1, index, values, f"a{total.how}", include_self=False)


class _Sum:
    """One kind of message of all chunks, reduced over chunks as they come."""

    def __init__(self, how: str, *, to_target: bool) -> None:
        self.how, self.to_target = how, to_target
        self.fold = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[how]
        self.parts: dict[int, dict[Range, dict[Range, dict[Range, Tensor]]]] = {}

    def add(self, c: Chunk, part: Tensor) -> None:
        """Takes in the messages of a chunk, ``(b, P, T, ·)`` or ``(b, P, S, ·)``."""
        rows = self.parts.setdefault(c.form, {}).setdefault(c.batch, {}).setdefault(c.pairs, {})
        key = c.targets if self.to_target else c.sources
        rows[key] = self.fold(rows[key], part) if key in rows else part

    def joined(self) -> list[Tensor]:
        """For every block ``(B, P, T, ·)`` or ``(B, P, S, ·)``."""
        return [
            _cat(
                [_cat([_cat(list(row.values()), 2) for row in p.values()], 1) for p in b.values()],
                0,
            )
            for b in self.parts.values()
        ]


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The type that automatic mixed precision computes in; None if it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _transformed() -> bool:
    """True inside `torch.func` transforms and forward-mode differentiation."""
    return _functorch.maybe_current_level() is not None or _dual()


def _dual() -> bool:
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


@dataclass
class _State:
    """Edges of one chunk: tensors given, how their first state is made, ends for every layer."""

    first: "_First | None"
    given: list[Tensor] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)


def _pieces(x: Tensor, cuts: Cuts, has: str) -> list[Tensor]:
    """``(B, P, T or 1, S or 1, …)`` cut as a block is; `has` names the ends that it depends on."""
    out: list[Tensor] = []
    for part in _split(x, cuts.batch, 0):
        for some in _split(part, cuts.pairs, 1):
            if "t" not in has:
                out += _split(some, cuts.sources, 3) * len(cuts.targets)
                continue
            for row in _split(some, cuts.targets, 2):
                each = _split(row, cuts.sources, 3) if "s" in has else [row] * len(cuts.sources)
                out += each
    return out


def _split(x: Tensor, cuts: Sequence[Range], dim: int) -> list[Tensor]:
    return [x] if len(cuts) == 1 else list(x.split([b - a for a, b in cuts], dim))


def _rows(x: Tensor, units: Tensor) -> Tensor:
    """Rows of ``(B, N, K)``; a view if the units follow one another."""
    start = _start(units)
    return (
        x.index_select(1, units.to(x.device)) if start is None else x.narrow(1, start, len(units))
    )


@lru_cache(maxsize=1 << 14)
def _start(units: Tensor) -> int | None:
    """First unit if the others follow it one by one."""
    if len(units) == 0 or bool((units[1:] - units[:-1] != 1).any()):
        return None
    return int(units[0])


def _step(layer: MessageLayer, e: Tensor, ps: Tensor, pt: Tensor) -> tuple[Tensor, ...]:
    e, to_target, to_source = layer.step(e, ps, pt)
    return (e, *to_target, *to_source)


class _Final:
    def __init__(self, final: Callable[[Tensor, int], Tensor], form: int) -> None:
        self.final, self.form = final, form

    def __call__(self, layer: MessageLayer, e: Tensor, ps: Tensor, pt: Tensor) -> tuple[Tensor]:
        return (self.final(layer.advance(e, ps, pt), self.form),)


@dataclass
class _First:
    """How the first state of a chunk is made of its entries: see `first_state`."""

    matrix: Tensor | None
    code: Tensor
    shape: Sequence[int]
    form: int

    def __call__(self, raw: Tensor | None = None) -> Tensor:
        return first_state(raw, self.matrix, self.code, self.shape)


class _Work:
    """Makes the first state of a chunk if needed, advances it, applies `fn` in the last layer."""

    def __init__(
        self,
        layers: Sequence[MessageLayer],
        first: Callable[..., Tensor] | None,
        fn: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        self.layers, self.first, self.fn = list(layers), first, fn

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        ends = len(inputs) - 2 * len(self.layers)
        given, nodes = inputs[:ends], inputs[ends:]
        e = given[0] if self.first is None else self.first(*given)
        for k, layer in enumerate(self.layers[:-1]):
            e = layer.advance(e, nodes[2 * k], nodes[2 * k + 1])
        return self.fn(self.layers[-1], e, nodes[-2], nodes[-1])
