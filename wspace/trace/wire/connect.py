"""Contractions on units: linear maps, convolutions, attention, table lookups.

The dimensions of operands and result are labels of one grid, as in an einsum; unit numbers and
parameter coordinates are laid out on that grid.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from wspace.trace.program import Call, Value
from wspace.trace.rules import arguments
from wspace.trace.wire.places import Lost
from wspace.trace.wire.units import (
    Builder,
    Leaf,
    State,
    Units,
    Weight,
    extend,
    from_grid,
    map_state,
    to_grid,
    varying,
)
from wspace.trace.wire.views import Ids, reshape

Labels = Sequence[int]


class Walk(Protocol):
    """What a contraction asks of the walk over the program."""

    b: Builder
    state: dict[int, State]
    uses: Counter[int]

    def of(self, value: Value | None) -> State:
        """State of a value."""
        ...

    def pointwise(self, call: Call, op: str, values: list[Value], out: Value) -> State:
        """State of an elementwise result."""
        ...


class Operand:
    """One operand of a contraction: its state, its value, its labels."""

    def __init__(self, state: State, value: Value, labels: Labels) -> None:
        self.state, self.value, self.labels = state, value, list(labels)

    def sizes(self) -> dict[int, int]:
        """Size of every label."""
        shape = getattr(self, "shape", self.value.shape)
        return dict(zip(self.labels, shape, strict=True))


@dataclass(frozen=True)
class Goal:
    """What a contraction makes: labels of the result, its value, kind and attributes of blocks."""

    labels: Labels
    out: Value
    op: str
    tag: str = ""

    def units(
        self, b: Builder, arrays: Sequence[Ids], wanted: set[int], sizes: Sequence[int]
    ) -> Ids:
        """New units over the wanted labels, on the grid."""
        dims = [i for i, d in enumerate(self.labels) if d in wanted]
        if len(self.out.shape) == len(self.labels):
            fixed = not b.free(self.out, dims)
        elif self.op == "conv":
            fixed = not b.free(self.out, [1])
        else:
            fixed = not b.any_free([arrays])
        return b.named_by(arrays, sizes, wanted, self.op, fixed=fixed)


def contract(
    walk: Walk,
    values: tuple[Value, Value],
    labels: Sequence[Labels],
    out: Value,
    op: str,
    tag: str = "",
) -> State:
    """The state of a contraction of two values.

    Args:
        walk: The walk over the program.
        values: The two operands.
        labels: Labels of the dimensions of both operands and of the result.
        out: The result.
        op: Operator kind of the block.
        tag: Its attributes.

    Returns:
        Units of the result; a weight if both operands are parameters.
    """
    a = Operand(walk.of(values[0]), values[0], labels[0])
    c = Operand(walk.of(values[1]), values[1], labels[1])
    return combine(walk, a, c, Goal(labels[2], out, op, tag))


def combine(walk: Walk, a: Operand, c: Operand, goal: Goal) -> State:
    """As `contract`, for operands that may have been reshaped."""
    for operand in (a, c):
        if isinstance(operand.state, Units):
            operand.state = walk.b.realise(operand.state, len(operand.labels))
    if isinstance(a.state, Weight) and isinstance(c.state, Weight):
        if (chain := _chain(walk.b, a, c, goal.labels)) is not None:
            return chain
        summed = {i for i, x in enumerate(a.labels) if x in c.labels and x not in goal.labels}
        a.state = walk.b.materialise(a.state, a.value, summed, goal.op)
    if isinstance(a.state, Weight):
        a, c = c, a
    if isinstance(c.state, Weight):
        return _weigh(walk, a, c, goal)
    return _product(walk, a, c, goal)


def _grid(a: Operand, c: Operand, lo: Labels) -> list[int]:
    """Size of every label."""
    sizes = {**a.sizes(), **c.sizes()}
    return [sizes.get(d, 1) for d in range(1 + max([*sizes, *lo], default=0))]


def _lay(arrays: Sequence[Ids], labels: Labels, grid: int) -> list[Ids]:
    return [to_grid(t, labels, grid) for t in arrays]


def _weigh(walk: Walk, x: Operand, w: Operand, goal: Goal) -> Units:
    """An activation or an input times a weight: new units, and the blocks that lead to them."""
    b, lo, sizes = walk.b, goal.labels, _grid(x, w, goal.labels)
    grid = len(sizes)
    assert isinstance(w.state, Weight)
    leaves = [
        replace(leaf, coords=tuple(_lay(leaf.coords, w.labels, grid))) for leaf in w.state.leaves
    ]
    moves = {d for leaf in leaves for c in leaf.coords for d in varying(c, grid)}
    summed = {x_ for x_ in x.labels if x_ in w.labels and x_ not in lo}
    trail = x.state.trail if isinstance(x.state, Units) else ""
    tracks = _lay(x.state.tracks, x.labels, grid) if isinstance(x.state, Units) else []
    near = [t for t in tracks if varying(t, grid) & (summed | (moves & set(x.labels)))]
    far = [t for t in tracks if not any(t is n for n in near)]
    if not near and far and all(sizes[d] == 1 for d in summed):
        near, far = far[:1], far[1:]
    if not near:
        dims = [i for i, d in enumerate(x.labels) if d in summed]
        near = _lay([_axis(walk, x, dims)], x.labels, grid)
    wanted = {d for d in lo if d in moves or any(d in varying(t, grid) for t in near)}
    rows = [*near, *(c for leaf in leaves for c in leaf.coords)]
    target = goal.units(b, rows, wanted, sizes)
    units = from_grid(target, lo, grid)
    tag = "|".join(t for t in (goal.tag, trail) if t)
    for leaf in leaves:
        _place(b, leaf, near[0], target, (goal.op, tag, len(leaves) > 1), grid)
    for t in near[1:]:
        b.link(t, target, "mixed", trail)
    far = [t for t in far if varying(t, grid) <= set(lo)]
    for t in far:
        b.link(t, target, "along", trail)
    kept = tuple(from_grid(t, lo, grid) for t in far)
    return Units((units, *kept), "", True)


def _axis(walk: Walk, x: Operand, dims: list[int]) -> Ids:
    """Units of the summed dimensions of an input, or of an activation that names none there."""
    shape = getattr(x, "shape", x.value.shape)
    key = (id(x.value), tuple(dims), tuple(shape))
    known = walk.b.inputs.get(key)
    if known is None:
        fixed = not walk.b.free(x.value, dims) if len(shape) == len(x.value.shape) else True
        kind = "input"
        known = walk.b.new_units(shape, set(dims), kind, "input", fixed)
        walk.b.inputs[key] = known
    return known


def _place(
    b: Builder, leaf: Leaf, source: Ids, target: Ids, names: tuple[str, str, bool], grid: int
) -> None:
    """One parameter of a weight: an edge block, or a feature of the units at the end it names."""
    op, tag, several = names
    extra = leaf.coords[0].ndim - grid
    source, target = (t.reshape(*t.shape, *[1] * extra) for t in (source, target))
    moves = {d for c in leaf.coords for d in varying(c, grid)}
    at_source, at_target = varying(source, grid), varying(target, grid)
    if leaf.inner is not None:
        inner = leaf.inside(grid)
        forward = len(moves & (at_target - at_source)) >= len(moves & (at_source - at_target))
        ends = (inner, target) if forward else (source, inner)
        b.place(leaf, ends, op, tag)
    elif several and moves <= at_target:
        b.place(leaf, (target,), op, f"{op}.target|{tag}")
    elif several and moves <= at_source:
        b.place(leaf, (source,), op, f"{op}.source|{tag}")
    else:
        b.place(leaf, (source, target), op, tag)


def _chain(b: Builder, a: Operand, c: Operand, lo: Labels) -> Weight | None:
    """Two parameters contracted: a weight with units inside; None if it is not so simple."""
    assert isinstance(a.state, Weight) and isinstance(c.state, Weight)
    leaves = [*a.state.leaves, *c.state.leaves]
    if any(leaf.inner is not None or leaf.trail for leaf in leaves):
        return None
    sizes = _grid(a, c, lo)
    grid = len(sizes)
    summed = [x for x in a.labels if x in c.labels and x not in lo]
    shape = [sizes[d] for d in summed]
    fixed = not b.free(a.value, [a.labels.index(d) for d in summed])
    inner = b.sets.new(int(np.prod(shape)), "hidden", "weight", fixed=fixed).reshape(shape)
    out: list[Leaf] = []
    for operand in (a, c):
        for leaf in operand.state.leaves:  # type: ignore[union-attr]
            coords = _lay(leaf.coords, operand.labels, grid)
            coords = [
                t.transpose(*lo, *summed, *[d for d in range(grid) if d not in (*lo, *summed)])
                for t in coords
            ]
            coords = [t.reshape(t.shape[: len(lo) + len(summed)]) for t in coords]
            out.append(Leaf(leaf.param, tuple(coords), "", inner))
    return Weight(tuple(out))


def _product(walk: Walk, a: Operand, c: Operand, goal: Goal) -> State:
    """Two activations contracted: new units for what either names in the result."""
    b, lo, sizes = walk.b, goal.labels, _grid(a, c, goal.labels)
    grid = len(sizes)
    pools = [
        _lay(x.state.tracks, x.labels, grid) if isinstance(x.state, Units) else [] for x in (a, c)
    ]
    summed = set(a.labels) & set(c.labels) - set(lo)
    if not any(pools):
        return None
    alone = not (pools[0] and pools[1])
    if alone and not any(varying(t, grid) & summed for p in pools for t in p):
        state = next(x.state for x in (a, c) if isinstance(x.state, Units))
        tracks = [from_grid(t, lo, grid) for p in pools for t in p]
        return Units(tuple(tracks), extend(state.trail, "matmul"))
    wanted = {d for p in pools for t in p for d in varying(t, grid)} & set(lo)
    if alone:  # a constant matrix mixes units: its other dimension names the new ones
        other = c if pools[0] else a
        wanted |= {d for d in other.labels if d in lo and d not in (a if other is c else c).labels}
    made = replace(goal, op="product")
    target = made.units(b, [*pools[0], *pools[1]], wanted, sizes)
    units = from_grid(target, lo, grid)
    for slot, (x, pool) in enumerate(zip((a, c), pools, strict=True)):
        for t in pool:
            trail = x.state.trail if isinstance(x.state, Units) else ""
            b.link(t, target, "product", "|".join(s for s in (str(slot), trail) if s))
    return Units((units,))


# ------------------------------------------------------------------------ operators


def _matmul(walk: Walk, call: Call) -> list[State]:
    bound = arguments(call)
    name = call.name
    keys = {
        "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"),
        "dot": ("self", "tensor"), "vdot": ("self", "tensor"), "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec"),
    }[name]  # fmt: skip
    a, c = bound[keys[0]], bound[keys[1]]
    labels = {
        "mm": ("ai", "ib", "ab"), "addmm": ("ai", "ib", "ab"), "bmm": ("nai", "nib", "nab"),
        "baddbmm": ("nai", "nib", "nab"), "mv": ("ai", "i", "a"), "addmv": ("ai", "i", "a"),
        "dot": ("i", "i", ""), "vdot": ("i", "i", ""),
    }[name]  # fmt: skip
    out = call.outs[0]
    numbers = [["naib".index(x) for x in text] for text in labels]
    state = contract(walk, (a, c), numbers, out, "linear")
    if name.startswith(("addm", "badd")):
        state = _add(walk, call, state, bound["self"], out)
    return [state]


def _add(walk: Walk, call: Call, state: State, bias: Value, out: Value) -> State:
    """A contraction's result plus another operand."""
    walk.state[id(out)] = state
    walk.uses[id(out)] += 1
    try:
        result = walk.pointwise(call, "add", [out, bias], out)
    finally:
        walk.uses[id(out)] -= 1
    return result


def _linear(walk: Walk, call: Call) -> list[State]:
    bound = arguments(call)
    x, w, out = bound["input"], bound["weight"], call.outs[0]
    lead = list(range(len(x.shape) - 1))
    i, o = len(lead), len(lead) + 1
    state = contract(walk, (x, w), [[*lead, i], [o, i], [*lead, o]], out, "linear")
    if bound.get("bias") is not None:
        state = _add(walk, call, state, bound["bias"], out)
    return [state]


def _convolution(walk: Walk, call: Call) -> list[State]:
    bound = arguments(call)
    x, w, out = bound["input"], bound["weight"], call.outs[0]
    groups, transposed = bound["groups"], bound.get("transposed", False)
    space = len(x.shape) - 2
    n, g, i, o = 0, 1, 2, 3
    ins = [4 + k for k in range(space)]
    taps = [4 + space + k for k in range(space)]
    outs = [4 + 2 * space + k for k in range(space)]
    xs = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    ws = (groups, w.shape[0] // groups, *w.shape[1:])
    a = _viewed(walk, x, xs, [n, g, i, *ins])
    c = _viewed(walk, w, ws, [g, i, o, *taps] if transposed else [g, o, i, *taps])
    tag = f"stride={bound['stride']},padding={bound['padding']},dilation={bound['dilation']}"
    tag = (tag + (",transposed" if transposed else "")).replace(" ", "")
    wide = [n, g, o, *outs]
    made = combine(walk, a, c, Goal(wide, out, "conv", tag))
    channels = w.shape[1] if transposed else w.shape[0] // groups
    full = (out.shape[0], groups, channels, *out.shape[2:])
    state = map_state(made, lambda t: reshape(t, full, out.shape))
    bias = bound.get("bias")
    if bias is not None:
        spread = map_state(walk.of(bias), lambda t: t.reshape(1, *t.shape, *[1] * space))
        if isinstance(spread, Weight) and isinstance(state, Units):
            walk.b.feature(spread, state.tracks, len(out.shape), "add", "bias")
    return [state]


def _viewed(walk: Walk, value: Value, shape: tuple[int, ...], labels: Labels) -> Operand:
    state = map_state(walk.of(value), lambda t: reshape(t, value.shape, shape))
    operand = Operand(state, value, labels)
    operand.shape = shape  # type: ignore[attr-defined]
    return operand


def _attention(walk: Walk, call: Call) -> list[State]:
    """Scores, then their product with the values, as if written out."""
    bound = arguments(call)
    q, k, v = bound["query"], bound["key"], bound["value"]
    lead = len(q.shape) - 2
    t, s, d, e = lead, lead + 1, lead + 2, lead + 3
    operands = []
    for x, labels in ((q, (t, d)), (k, (s, d)), (v, (s, e))):
        state = walk.of(x)
        shape = (*q.shape[:lead], *x.shape[lead:])
        if x.shape != shape:
            state = map_state(state, lambda a, x=x, shape=shape: _repeat_heads(a, x.shape, shape))
        operand = Operand(state, x, [*range(lead), *labels])
        operand.shape = shape  # type: ignore[attr-defined]
        operands.append(operand)
    lo = [*range(lead), t, s]
    scores = combine(walk, operands[0], operands[1], Goal(lo, call.outs[0], "linear"))
    if isinstance(scores, Units):
        causal = ",causal" if bound.get("is_causal") else ""
        scores = replace(scores, trail=extend(scores.trail, "softmax" + causal), fresh=False)
    mask = bound.get("attn_mask")
    bias = walk.of(mask)
    if isinstance(scores, Units) and mask is not None and bias is not None:
        rank = len(lo)
        bias = map_state(bias, lambda a: a.reshape((1,) * (rank - len(mask.shape)) + a.shape))
        if isinstance(bias, Weight):
            walk.b.feature(bias, scores.tracks, rank, "add", "bias")
        else:
            _add_units(walk.b, bias, scores)
    middle = Operand(scores, q, lo)
    middle.shape = (*q.shape[:-1], k.shape[-2])  # type: ignore[attr-defined]
    made = combine(walk, middle, operands[2], Goal([*range(lead), t, e], call.outs[0], "linear"))
    return [made, *[None] * (len(call.outs) - 1)]


def _add_units(b: Builder, bias: State, scores: Units) -> None:
    if isinstance(bias, Units):
        for t in bias.tracks:
            b.link(t, scores.tracks[0], "add", bias.trail)


def _repeat_heads(a: Ids, old: tuple[int, ...], new: tuple[int, ...]) -> Ids:
    for d, (n, m) in enumerate(zip(old, new, strict=True)):
        if n != m and a.shape[d] > 1:
            a = np.repeat(a, m // n, d)
    return a


def _trilinear(walk: Walk, call: Call) -> list[State]:
    bound = arguments(call)
    rank = max(len(bound[f"i{j}"].shape) + len(bound[f"expand{j}"]) for j in (1, 2, 3))
    parts = [
        (bound[f"i{j}"], [d for d in range(rank) if d not in bound[f"expand{j}"]])
        for j in (1, 2, 3)
    ]
    lo = [d for d in range(rank) if d not in bound["sumdim"]]
    parts.sort(key=lambda p: isinstance(walk.of(p[0]), Weight))
    first, second, weight = parts
    a, c = (Operand(_named(walk, v, ls, lo), v, ls) for v, ls in (first, second))
    both = sorted({*first[1], *second[1]})
    sizes = {**a.sizes(), **c.sizes()}
    pair = _product(walk, a, c, Goal(both, call.outs[0], "product"))
    middle = Operand(pair, first[0], both)
    middle.shape = tuple(sizes[d] for d in both)  # type: ignore[attr-defined]
    w = Operand(walk.of(weight[0]), weight[0], weight[1])
    return [combine(walk, middle, w, Goal(lo, call.outs[0], "bilinear"))]


def _named(walk: Walk, value: Value, labels: Labels, lo: Labels) -> State:
    """State of a value, inputs given units along what is summed."""
    state = walk.of(value)
    if state is None:
        dims = [i for i, d in enumerate(labels) if d not in lo]
        return Units((_axis(walk, Operand(None, value, labels), dims),))
    return state


def _grouped_mm(walk: Walk, call: Call) -> list[State]:
    bound = arguments(call)
    return [
        contract(
            walk,
            (bound["self"], bound["mat2"]),
            [[0, 1], [2, 1, 3], [0, 3]],
            call.outs[0],
            "linear",
        )
    ]


def _cdist(walk: Walk, call: Call) -> list[State]:
    bound = arguments(call)
    x, y = bound["x1"], bound["x2"]
    lead = list(range(len(x.shape) - 2))
    p, r, m = len(lead), len(lead) + 1, len(lead) + 2
    labels = [[*lead, p, m], [*lead, r, m], [*lead, p, r]]
    return [contract(walk, (x, y), labels, call.outs[0], "linear")]


CONTRACTIONS: dict[str, Callable[[Walk, Call], list[State]]] = {
    **dict.fromkeys("mm bmm mv dot vdot addmm baddbmm addmv".split(), _matmul),
    **dict.fromkeys(
        "convolution _convolution convolution_overrideable mkldnn_convolution".split(), _convolution
    ),
    **dict.fromkeys(
        (
            "_scaled_dot_product_" + name
            for name in (
                "flash_attention_for_cpu flash_attention efficient_attention cudnn_attention "
                "fused_attention_overrideable attention_math attention_math_for_mps"
            ).split()
        ),
        _attention,
    ),
    "linear": _linear,
    "_trilinear": _trilinear,
    "_grouped_mm": _grouped_mm,
    "_cdist_forward": _cdist,
}


def look_up(b: Builder, call: Call, weight: Weight) -> Units:
    """Rows of a table: input units for the rows, new units for what a row holds."""
    bound = arguments(call)
    table = bound["weight"] if "weight" in bound else bound["self"]
    rank, out = len(table.shape), call.outs[0]
    if call.name in ("index", "_unsafe_index"):
        used = [d for d, i in enumerate(bound["indices"]) if i is not None]
        indices = [bound["indices"][d] for d in used]
        places = len(out.shape) - (rank - len(used))
        if used != list(range(used[0], used[-1] + 1)):
            raise Lost
    elif call.name == "gather":
        used, places, indices = [bound["dim"] % rank], 1, [bound["index"]]
    else:
        used = [bound["dim"] % rank if call.name == "index_select" else 0]
        indices = [bound["index"] if call.name == "index_select" else bound["indices"]]
        places = 1 if call.name != "embedding" else len(indices[0].shape)
    moves = {d for leaf in weight.leaves for c in leaf.coords for d in varying(c, rank)}
    key = ("rows", *(id(i) for i in indices), *(table.shape[d] for d in used))
    rows = b.inputs.get(key)
    if rows is None:
        kind = "input"
        sizes = [table.shape[d] if d in used else 1 for d in range(rank)]
        rows = b.sets.new(int(np.prod(sizes)), kind, "rows", fixed=not b.free(table, used))
        b.inputs[key] = rows
    source = rows.reshape([table.shape[d] if d in used else 1 for d in range(rank)])
    rest = [d for d in sorted(moves) if d not in used]
    target = b.new_units(table.shape, set(rest), "hidden", "embedding", not b.free(table, rest))
    for leaf in weight.leaves:
        _place(b, leaf, source, target, ("embedding", "", len(weight.leaves) > 1), rank)
    kept = [n for d, n in enumerate(target.shape) if d not in used]
    first = used[0]
    return Units((target.reshape(*kept[:first], *[1] * places, *kept[first:]),), "", True)
