"""Slow, independent checks of parameter graphs: isomorphism, colour refinement, direct wiring."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wspace.graph import ParameterGraph
from wspace.graph.parameter import window

Row = tuple[int | None, int, str, tuple[int, ...], float | None]


def rows(graph: ParameterGraph) -> Iterator[Row]:
    """Every entry: source unit, target unit, label, feature indices, value; units in a row."""
    s = graph.structure
    for i, b in enumerate(s.blocks):
        sizes = b.sizes
        target = (s.target(i) + s.offsets[b.target.nodes]).expand(sizes).reshape(-1).tolist()
        if b.source is None:
            source = [None] * len(target)
        else:
            source = (s.source(i) + s.offsets[b.source.nodes]).expand(sizes).reshape(-1).tolist()
        values = [None] * len(target) if b.structural else graph.block(i).reshape(-1).tolist()
        loops = [k for k, role in enumerate(b.roles) if role == "feature"]
        grid = (
            torch.cartesian_prod(*(torch.arange(n) for n in sizes)) if sizes else torch.zeros(1, 0)
        )
        grid = grid.reshape(len(target), -1)[:, loops].tolist()
        label = f"{b.op}|{b.tag}|{b.again}"
        yield from zip(source, target, [label] * len(target), map(tuple, grid), values, strict=True)


def assert_each_entry_once(graph: ParameterGraph) -> None:
    """Every entry of every parameter is held by exactly one block."""
    s = graph.structure
    for p in graph.space.params:
        count = torch.zeros(p.shape)
        for i in s.holders.get(p.name, ()):
            b = s.blocks[i]
            view = window(count, b)
            view[(..., *[0] * sum(d < 0 for d in b.of))] += 1
        wrong = (count != 1).nonzero()
        assert not len(wrong), (
            f"{p.name}: {len(wrong)} entries not held once, first {wrong[0].tolist()}"
        )


def relabelling(one: ParameterGraph, two: ParameterGraph) -> dict[int, int]:
    """The map of units under which two graphs of distinct values agree."""
    mine, other = list(rows(one)), list(rows(two))
    assert len(mine) == len(other), "different numbers of entries"
    places: dict[object, list[Row]] = defaultdict(list)
    for row in other:
        if row[4] is not None:
            places[row[2:]].append(row)
    units: dict[int, set[int]] = {}
    for source, target, *label in mine:
        if label[2] is None:
            continue
        found = places.get(tuple(label))
        assert found, f"no entry {label} in the other graph"
        for end, k in ((source, 0), (target, 1)):
            if end is not None:
                images = {row[k] for row in found}
                units[end] = units[end] & images if end in units else images
    for end, images in units.items():
        assert images, f"unit {end} would have to be two units at once"
    _propagate(mine, other, units)
    _assert_structure(one, mine, other, units)
    return {u: next(iter(v)) for u, v in units.items() if len(v) == 1}


def _propagate(mine: list[Row], other: list[Row], units: dict[int, set[int]]) -> None:
    """Follows structural entries from units that are known to those that no parameter touches."""
    ahead: dict[object, set[int]] = defaultdict(set)
    for source, target, label, _, value in other:
        if value is None and source is not None:
            ahead[source, label, 0].add(target)
            ahead[target, label, 1].add(source)
    for _ in range(4):
        for source, target, label, _, value in mine:
            if value is not None or source is None:
                continue
            for known, new, side in ((source, target, 0), (target, source, 1)):
                if known in units and len(units[known]) == 1:
                    images = ahead[next(iter(units[known])), label, side]
                    units[new] = units[new] & images if new in units else set(images)
                    assert units[new], f"structural entries {label} of unit {new} do not fit"


def _assert_structure(
    graph: ParameterGraph, mine: list[Row], other: list[Row], units: dict[int, set[int]]
) -> None:
    names = {u: next(iter(v)) for u, v in units.items() if len(v) == 1}
    assert len(set(names.values())) == len(names), "two units have one image"
    s = graph.structure
    of = [i for i, n in enumerate(s.nodes) for _ in range(n.size)]
    for u, v in names.items():
        a, b = s.nodes[of[u]], s.nodes[of[v]]
        assert (a.kind, a.op, a.depth, a.acts, a.fixed) == (b.kind, b.op, b.depth, b.acts, b.fixed)
        if a.fixed and of[u] == of[v]:
            assert u == v, f"a fixed unit of set {of[u]} moved"
    there = Counter(row[:3] for row in other if row[4] is None)
    here = Counter(
        (names[a], names[b], label)
        for a, b, label, _, value in mine
        if value is None and a in names and b in names
    )
    assert not here - there, (
        f"structural entries {list(here - there)[:3]} are not in the other graph"
    )


def fingerprint(graph: ParameterGraph, rounds: int = 6) -> str:
    """Colour refinement: equal for isomorphic graphs, whatever the order of nodes and sets."""
    s = graph.structure
    colours = [
        _digest((n.kind, n.op, n.acts, u if n.fixed else -1))
        for n in s.nodes
        for u in range(n.size)
    ]
    entries = [(a, b, _digest((label, taps, value))) for a, b, label, taps, value in rows(graph)]
    for _ in range(rounds):
        around: list[list[str]] = [[] for _ in colours]
        for a, b, label in entries:
            if a is None:
                around[b].append(label)
            else:
                around[b].append(label + "<" + colours[a])
                around[a].append(label + ">" + colours[b])
        colours = [_digest((c, *sorted(x))) for c, x in zip(colours, around, strict=True)]
    return _digest(tuple(sorted(colours)))


def _digest(x: object) -> str:
    return hashlib.blake2b(repr(x).encode(), digest_size=12).hexdigest()


# ------------------------------------------------------------------ direct wiring


class Clamp:
    """Runs a module with every contraction's output held at its recorded value, but for one shift.

    Norms over channels are replaced by a multiple, so that a change in one channel stays in it.
    What then changes at the input of a contraction came there directly.
    """

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.parts = {
            n: m
            for n, m in module.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d) or type(m).__name__ == "Conv1D"
        }
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.shift: tuple[str, int] | None = None
        self.clamp = False
        self.size = 0.0
        self.generator = torch.Generator().manual_seed(0)
        self.handles = [
            m.register_forward_hook(self._hook(n), with_kwargs=True) for n, m in self.parts.items()
        ]
        for m in module.modules():
            if "LayerNorm" in type(m).__name__ or "RMSNorm" in type(m).__name__:
                self.handles.append(m.register_forward_hook(lambda m, x, y: x[0] * 1.25))
        self._run()
        self.clamp = True
        self._run()
        self.before = {n: x[0] for n, x in self.inputs.items()}

    def _hook(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
            self.inputs[name].append(args[0])
            if not self.clamp:
                self.outputs[name].append(out)
                return None
            out = self.outputs[name][0]
            if self.shift is not None and self.shift[0] == name:
                out = out.clone()
                part = out.select(self.channel(name), self.shift[1])
                # not one amount for all tokens: softmax would not see that in the keys
                part += self.size * torch.rand(part.shape, generator=self.generator).to(part)
            return out

        return hook

    def channel(self, name: str) -> int:
        return 1 if isinstance(self.parts[name], nn.Conv2d) else -1

    def _run(self) -> None:
        self.inputs.clear()
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it would pass the hooks by
        with torch.no_grad():
            self.module(*self.args, **self.kwargs)
        torch.backends.mha.set_fastpath_enabled(fast)

    def reached(self, name: str, unit: int) -> dict[str, set[int]]:
        """Input channels of every contraction that an output channel of one reaches."""
        self.shift = name, unit
        out: dict[str, set[int]] = defaultdict(set)
        for self.size in (0.37, 50.0, -50.0):  # so that no rectifier hides it
            self._run()
            for n, x in self.inputs.items():
                changed = (x[0] != self.before[n]).movedim(self.channel(n), 0).flatten(1).any(1)
                out[n] |= set(changed.nonzero().flatten().tolist())
        return out
