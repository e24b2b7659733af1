"""Unrolled families: parallel branches that differ only in their parameters.

A Python loop over experts, ``sum(gate[:, i] * expert(x) for i, expert in enumerate(experts))``,
records one copy of the expert for each. The sum does not care about their order, so exchanging two
experts, and the two entries of the gate that belong to them, is a symmetry that no single operator
shows. It is found here: the terms of a sum (an addition tree, repeated `index_add`, or a stack) are
walked in step, and where all of them run the same operators on the same shared values, with
parameters of their own and the shared gate read at an index of their own, they are a family.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wspace.trace.program import ACTIVE, CONST, INPUT, PARAM, Call, Program, Value
from wspace.trace.rules import arguments

_ACCUMULATE = frozenset(("add", "index_add"))
_SLOT_READS = frozenset(("select", "slice", "eq"))


@dataclass
class Family:
    """Branches that may be exchanged.

    Attributes:
        params: One tuple of parameters per place in the branch, ordered by slot.
        reads: Calls that read a shared value at the branch's own index.
        size: Number of branches.
        axis: Filled in by the solver: the atom that stands for the branches.
    """

    params: list[tuple[Value, ...]]
    reads: list[Call]
    size: int
    axis: tuple[int, ...] = ()


@dataclass
class _Walk:
    """State of one walk in step over all branches."""

    producers: dict[int, Call]
    params: dict[tuple[int, ...], tuple[Value, ...]] = field(default_factory=dict)
    reads: list[tuple[Call, ...]] = field(default_factory=list)
    indices: list[tuple[int, ...]] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)

    def values(self, row: Sequence[Any]) -> bool:
        """True if the values of a row are computed alike in every branch."""
        first = row[0]
        if all(v is first for v in row):
            return True
        if len({id(v) for v in row}) < len(row):
            return False
        key = tuple(id(v) for v in row)
        if key in self.seen:
            return True
        self.seen.add(key)
        if any(v.kind != first.kind or len(v.shape) != len(first.shape) for v in row):
            return False
        if first.kind == PARAM:
            if any(v.shape != first.shape or v.dtype != first.dtype for v in row):
                return False
            self.params[key] = tuple(row)
            return True
        if first.kind in (CONST, INPUT):
            return first.kind == CONST and _equal_constants(row)
        calls = [self.producers.get(id(v)) for v in row]
        if any(c is None for c in calls):
            return False
        return self.calls([c for c in calls if c is not None], row)

    def calls(self, calls: Sequence[Call], row: Sequence[Value]) -> bool:
        """True if the calls that produced a row are the same operator on like arguments."""
        first = calls[0]
        if any(c.op is not first.op for c in calls):
            return False
        places = {_place(c, v) for c, v in zip(calls, row, strict=True)}
        if len(places) > 1:
            return False
        if all(c.args[0] is first.args[0] for c in calls) and first.name in _SLOT_READS:
            return self.slots(calls)
        columns = [_flat(c) for c in calls]
        if len({len(c) for c in columns}) > 1:
            return False
        rows = [v.shape[0] if v.shape else None for v in row]
        for items in zip(*columns, strict=True):
            if isinstance(items[0], Value):
                if not all(isinstance(x, Value) for x in items) or not self.values(items):
                    return False
            elif any(
                x != items[0] and not (x == n and items[0] == rows[0])
                for x, n in zip(items, rows, strict=True)
            ):
                return False
        return True

    def slots(self, calls: Sequence[Call]) -> bool:
        """True if the calls read one shared value, each at one index of its own."""
        shared: Value = calls[0].args[0]
        places = [_slot(c) for c in calls]
        if any(p is None for p in places) or len({p[0] for p in places if p}) > 1:
            return False
        dim = places[0][0] if places[0] else 0
        indices = tuple(p[1] for p in places if p)
        size = len(calls) if dim is None else shared.shape[dim]
        if sorted(indices) != list(range(size)):
            return False
        self.reads.append(tuple(calls))
        self.indices.append(indices)
        return len(set(self.indices)) == 1


def _place(call: Call, value: Value) -> int:
    """Which output of a call a value is."""
    return next(i for i, out in enumerate(call.outs) if out is value)


def _slot(call: Call) -> tuple[int | None, int] | None:
    """Dimension and index that a call reads; dimension None for a comparison with an index."""
    shared: Value = call.args[0]
    if call.name == "eq":
        index = call.args[1]
        return (None, index) if isinstance(index, int) and not isinstance(index, bool) else None
    bound = arguments(call)
    dim = bound["dim"] % len(shared.shape)
    if call.name == "select":
        return dim, bound["index"] % shared.shape[dim]
    if call.outs[0].shape[dim] != 1:
        return None
    return dim, (bound["start"] or 0) % shared.shape[dim]


def _flat(call: Call) -> list[Any]:
    items: list[Any] = []
    for x in (*call.args, *call.kwargs.values()):
        items.extend(x) if isinstance(x, list | tuple) else items.append(x)
    return items


def _equal_constants(row: Sequence[Value]) -> bool:
    data = [v.data for v in row]
    return all(d is not None and data[0] is not None and torch.equal(d, data[0]) for d in data)


def find_families(program: Program) -> list[Family]:
    """Every family of a program: for each sum, the largest set of terms computed alike."""
    producers = {id(o): c for c in program.calls for o in c.outs}
    uses: dict[int, int] = {}
    for call in program.calls:
        for v in call.ins:
            uses[id(v)] = uses.get(id(v), 0) + 1
    for v in program.outputs:
        uses[id(v)] = uses.get(id(v), 0) + 1
    families, claimed = [], set()
    for terms in _sums(program, producers, uses):
        for row in _alike(terms, producers):
            family = _family(row, producers)
            if family is not None and not claimed & {id(v) for ps in family.params for v in ps}:
                claimed |= {id(v) for ps in family.params for v in ps}
                families.append(family)
    return families


def _sums(
    program: Program, producers: dict[int, Call], uses: dict[int, int]
) -> Iterator[list[tuple[Value, ...]]]:
    """Terms of every maximal sum; a term is the values that it adds (and where it adds them)."""
    inner: set[int] = set()
    for call in reversed(program.calls):
        if call.name == "stack" and len(call.args[0]) > 1 and _reduced(program, call, uses):
            yield [(v,) for v in call.args[0]]
        if id(call) in inner or not _accumulates(call):
            continue
        terms: list[tuple[Value, ...]] = []
        stack = [call]
        while stack:
            c = stack.pop()
            inner.add(id(c))
            if c.name == "index_add":
                terms.append((c.args[2], c.args[3]))
                operands = [c.args[0]]
            else:
                operands = list(c.args[:2])
            for v in operands:
                below = producers.get(id(v))
                if below is not None and _accumulates(below) and uses[id(v)] == 1:
                    stack.append(below)
                elif c.name == "add":
                    terms.append((_started(v, producers, uses),))
        if len(terms) > 2 or (len(terms) == 2 and call.name in _ACCUMULATE):
            yield terms


def _reduced(program: Program, call: Call, uses: dict[int, int]) -> bool:
    """True if a stack is only ever summed over its new dimension, so that its order is lost."""
    (out,) = call.outs
    readers = [c for c in program.calls if any(v is out for v in c.ins)]
    dim = (arguments(call).get("dim") or 0) % len(out.shape)
    return (
        uses.get(id(out), 0) == len(readers)
        and bool(readers)
        and all(
            c.name in ("sum", "mean")
            and c.args[0] is out
            and any(
                d % len(out.shape) == dim
                for d in (arguments(c).get("dim") or range(len(out.shape)))
            )
            for c in readers
        )
    )


def _started(value: Value, producers: dict[int, Call], uses: dict[int, int]) -> Value:
    """The first term of a sum that starts with the number 0, as Python's does."""
    call = producers.get(id(value))
    if call is None or call.name != "add" or uses[id(value)] != 1:
        return value
    numbers = [x for x in call.args[:2] if not isinstance(x, Value)]
    return call.ins[0] if numbers == [0] else value


def _accumulates(call: Call) -> bool:
    if call.name not in _ACCUMULATE or call.kwargs.get("alpha", 1) != 1:
        return False
    operands = call.args[:2] if call.name == "add" else (call.args[0],)
    return all(isinstance(v, Value) and v.kind == ACTIVE for v in operands) and all(
        v.shape == call.outs[0].shape for v in operands
    )


def _alike(
    terms: list[tuple[Value, ...]], producers: dict[int, Call]
) -> Iterator[list[tuple[Value, ...]]]:
    """Terms sorted into classes that may be families: made by the same last operators."""
    classes: dict[tuple[Any, ...], list[tuple[Value, ...]]] = {}
    for term in terms:
        key = tuple(_outline(v, producers, 3) for v in term)
        classes.setdefault(key, []).append(term)
    for members in classes.values():
        if len(members) > 1:
            yield members


def _outline(value: Value, producers: dict[int, Call], depth: int) -> Any:
    call = producers.get(id(value))
    if call is None or depth == 0:
        return value.kind
    return (str(call.op), *(_outline(v, producers, depth - 1) for v in call.ins))


def _family(row: list[tuple[Value, ...]], producers: dict[int, Call]) -> Family | None:
    walk = _Walk(producers)
    if not all(walk.values(column) for column in zip(*row, strict=True)) or not walk.params:
        return None
    every = [v for ps in walk.params.values() for v in ps]
    if len({id(v) for v in every}) < len(every):
        return None
    order = range(len(row))
    if walk.indices:
        if len(walk.indices[0]) != len(row):
            return None
        order = sorted(order, key=walk.indices[0].__getitem__)
    return Family(
        params=[tuple(ps[k] for k in order) for ps in walk.params.values()],
        reads=[calls[k] for calls in walk.reads for k in order],
        size=len(row),
    )
