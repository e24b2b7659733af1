"""Which equations between exponents each operator implies.

A handler takes the equations so far and a call, and returns the exponents of its outputs, one row
per dimension. `give_up` says that nothing may scale.
"""

import math
from collections.abc import Callable
from typing import Any

from wspace.trace.derive import Tree, atoms_of
from wspace.trace.exponents import Equations, Row, Shift
from wspace.trace.program import PARAM, Call, Value
from wspace.trace.rules import arguments, dims_of

_HOMOGENEOUS = frozenset("relu leaky_relu _prelu_kernel".split())
_ODD = frozenset("tanh sin erf asinh atan sinh hardtanh_symmetric sign round".split())
_EVEN = frozenset("abs cos cosh".split())
_LINEAR = frozenset(
    """
    neg clone detach alias _to_copy lift_fresh contiguous native_dropout positive
    """.split()
)
_VIEWS = frozenset(
    """
    view _unsafe_view reshape _reshape_alias flatten unflatten permute transpose t unsqueeze
    squeeze expand repeat pixel_shuffle pixel_unshuffle diagonal channel_shuffle
    native_channel_shuffle as_strided
    """.split()
)
_SUMS = frozenset("add sub where copy lerp maximum minimum rsub".split())
_POOLS = frozenset(
    """
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_avg_pool1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_bilinear2d upsample_linear1d reflection_pad2d replication_pad2d constant_pad_nd
    """.split()
)
_MAX_POOLS = frozenset(
    """
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d
    """.split()
)
_REDUCE = frozenset(("sum", "mean"))
_REDUCE_MAX = frozenset(("amax", "amin"))
_CUTS = frozenset(
    """
    split split_with_sizes unsafe_split unsafe_split_with_sizes chunk slice select unbind narrow
    """.split()
)


def apply(p: Equations, call: Call) -> list[list[Row]]:
    """Exponents of a call's outputs, by dimension and leaf."""
    name = call.name
    if call.inplace and name not in _LINEAR | _HOMOGENEOUS | _SUMS | _ODD:
        return give_up(p, call)
    handler = _HANDLERS.get(name)
    if handler is not None:
        return handler(p, call)
    odd = name in _ODD and p.sign
    if name in _LINEAR or odd or (name in _HOMOGENEOUS and not p.sign):
        p.kill(r for v in call.ins[1:] if v.kind == PARAM for r in p.rows(v))
        return [_phase(p, call, p.rows(call.ins[0]))] * len(call.outs)
    if name in _EVEN and p.sign:
        return [_phase(p, call, p.neutral(call.ins[0]))]
    if name == "abs":
        return [p.rows(call.ins[0])]
    return give_up(p, call)


def give_up(p: Equations, call: Call) -> list[list[Row]]:
    """Exponents of an operator through which nothing may scale."""
    for v in call.ins:
        p.kill(p.rows(v))
    return [p.neutral(o) for o in call.outs]


# ------------------------------------------------------------------------ phases


def _phase(p: Equations, call: Call, rows: list[Row]) -> list[Row]:
    """Adds the freedom to flip a sine's sign by shifting its argument through a bias."""
    if call.name not in ("sin", "cos") or not p.sign or call.inplace:
        return rows
    value, omega = call.ins[0], 1.0
    while (maker := p.makers.get(id(value))) is not None and p.uses[id(value)] == 1:
        bound = arguments(maker)
        scalar = bound.get("other")
        if maker.name == "mul" and isinstance(scalar, int | float) and scalar:
            omega *= float(scalar)
        elif not (
            maker.name in ("view", "_unsafe_view")
            and maker.outs[0].shape[-1] == maker.ins[0].shape[-1]
        ):
            break
        value = bound["self"]
    bias = _bias_of(p, maker, value) if maker is not None else None
    if bias is None or p.uses[id(value)] != 1:
        return rows
    last = 1 if maker is not None and maker.name == "convolution" else len(call.outs[0].axes) - 1
    out = list(rows)
    leaves = p.leaves(bias.axes[0])
    if leaves != p.leaves(call.outs[0].axes[last]):
        return rows
    shifted = []
    for i, (expr, atom) in enumerate(zip(rows[last], leaves, strict=True)):
        if p.is_free(atom):
            turn = p.system.unknown(Shift(bias, i, atom, math.pi / omega))
            shifted.append(p.system.combine([(expr, 1), (turn, 1)]))
        else:
            shifted.append(expr)
    out[last] = shifted
    return out


def _bias_of(p: Equations, maker: Call, value: Value) -> Value | None:
    """The vector that is added to a linear map's result and to nothing else."""
    bias: Any
    if maker.name == "addmm" and maker.outs[0] is value:
        bias = maker.args[0]
    elif maker.name == "convolution":
        bias = maker.args[2]
    elif maker.name == "add":
        bias = next((v for v in maker.ins if v.kind == PARAM), None)
    else:
        return None
    alone = isinstance(bias, Value) and bias.kind == PARAM and len(bias.shape) == 1
    return bias if alone and p.uses[id(bias)] == 1 and len(bias.names) == 1 else None


# ----------------------------------------------------------------------- operators


def _broadcast(p: Equations, call: Call, join: Callable[[list[tuple[Row, int]]], Row]) -> list[Row]:
    """Rows of an elementwise result, from the rows that meet in each dimension."""
    out = call.outs[0]
    rank = len(out.shape)
    rows: list[Row] = []
    for d in range(-rank, 0):
        meeting = [
            (p.rows(v)[d], i)
            for i, v in enumerate(call.ins)
            if len(v.shape) >= -d and v.shape[d] == out.shape[d] and out.shape[d] != 1
        ]
        absent = any(len(v.shape) < -d or v.shape[d] != out.shape[d] for v in call.ins)
        if not meeting:
            rows.append([{} for _ in p.leaves(out.axes[d])])
        elif len({len(r) for r, _ in meeting}) > 1:
            p.kill(r for r, _ in meeting)
            rows.append([{} for _ in p.leaves(out.axes[d])])
        else:
            rows.append(join([*meeting, *([(_NONE, -1)] if absent else [])]))
    return rows


_NONE: Row = []


def _sum(p: Equations, call: Call) -> list[list[Row]]:
    def join(meeting: list[tuple[Row, int]]) -> Row:
        first = meeting[0][0]
        for row, i in meeting[1:]:
            p.kill([first]) if i < 0 else p.equate(first, row)
        return first

    constant = any(not isinstance(a, Value) and a not in (None, 0) for a in call.args[:2])
    rows = _broadcast(p, call, join)
    if constant and call.name in ("add", "sub", "rsub"):
        p.kill(rows)
    return [rows]


def _product(p: Equations, call: Call) -> list[list[Row]]:
    divide = call.name == "div"

    def join(meeting: list[tuple[Row, int]]) -> Row:
        real = [(row, -1 if divide and i == 1 else 1) for row, i in meeting if i >= 0]
        return [
            p.system.combine((row[k], factor) for row, factor in real)
            for k in range(len(real[0][0]))
        ]

    if divide and not isinstance(call.args[0], Value):
        return give_up(p, call)
    return [_broadcast(p, call, join)]


def _mm(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    a, b = (p.rows(v) for v in call.ins[-2:])
    p.oppose(a[-1], b[-2])
    out = [a[-2], b[-1]]
    if len(a) == 3:
        batch = _added(p, a[0], b[0])
        out = [batch, *out]
    if call.name in ("addmm", "baddbmm"):
        _meet_bias(p, bound["self"], out, call.outs[0])
    return [out]


def _added(p: Equations, a: Row, b: Row) -> Row:
    """Exponents of an elementwise product along one axis."""
    if len(a) != len(b):
        p.kill([a, b])
        return [{} for _ in a]
    return [p.system.combine([(x, 1), (y, 1)]) for x, y in zip(a, b, strict=True)]


def _meet_bias(p: Equations, bias: Value, out: list[Row], value: Value) -> None:
    rows = p.rows(bias)
    for d in range(-len(value.shape), 0):
        if len(bias.shape) >= -d and bias.shape[d] == value.shape[d]:
            p.equate(out[d], rows[d])
        else:
            p.kill([out[d]])


def _convolution(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    x, w = p.rows(bound["input"]), p.rows(bound["weight"])
    source, target = (w[0], w[1]) if bound["transposed"] else (w[1], w[0])
    neutral = p.neutral(call.outs[0])
    if bound["groups"] == 1:
        p.oppose(x[1], source)
    elif bound["groups"] == bound["input"].shape[1] and len(x[1]) == len(target) == 1:
        target = _added(p, x[1], target)  # depthwise
    else:
        p.kill([x[1], source])
        if bound["transposed"]:
            p.kill([target])
            target = neutral[1]
    p.kill([*x[2:], *w[2:]])
    if bound["bias"] is not None:
        p.equate(target, p.rows(bound["bias"])[0])
    return [[x[0], target, *neutral[2:]]]


def _batch_norm(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    x = p.rows(bound["input"])
    mean, var = bound.get("running_mean"), bound.get("running_var")
    if mean is None or var is None or bound.get("training"):
        p.kill(x)
        out = x[1]
    else:
        p.equate(x[1], p.rows(mean)[0])
        p.kill([*p.rows(var), *x[2:]])
        out = x[1]
    weight, bias = bound.get("weight"), bound.get("bias")
    if weight is not None:
        w = p.rows(weight)[0]
        out = _added(p, out, w)
    if bias is not None:
        p.equate(out, p.rows(bias)[0])
    else:
        p.equate(out, out)
    return [[x[0], out, *x[2:]]]


def _layer_norm(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    x: Value = bound["input"]
    lead = len(x.shape) - len(bound["normalized_shape"])
    p.kill(p.rows(x))
    out = p.neutral(x)
    weight, bias = bound.get("weight"), bound.get("bias")
    if weight is not None:
        out = [*out[:lead], *p.rows(weight)]
    if bias is not None:
        for a, b in zip(out[lead:], p.rows(bias), strict=True):
            p.equate(a, b)
    return [out]


def _group_norm(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    p.kill(p.rows(bound["input"]))
    out = p.neutral(bound["input"])
    if bound.get("weight") is not None and len(p.rows(bound["weight"])[0]) == len(out[1]):
        out[1] = p.rows(bound["weight"])[0]
    if bound.get("bias") is not None:
        p.equate(out[1], p.rows(bound["bias"])[0])
    return [out]


def _view(p: Equations, call: Call) -> list[list[Row]]:
    """Leaves keep their order under a reshape; moved dimensions take theirs along."""
    x, out = call.ins[0], call.outs[0]
    rows = p.rows(x)
    name = call.name
    if name == "permute":
        return [[rows[d] for d in call.args[1]]]
    if name in ("transpose", "t"):
        order = list(range(len(rows)))
        if order:
            i, j = (call.args[1], call.args[2]) if name == "transpose" else (0, -1)
            order[i], order[j] = order[j], order[i]
        return [[rows[d] for d in order]]
    atoms = [a for axis in x.axes for a in p.leaves(axis)]
    flat = list(zip([e for row in rows for e in row], atoms, strict=True))
    made: list[Row] = []
    position = 0
    for axis in out.axes:
        row: Row = []
        for atom in p.leaves(axis):
            if position < len(flat) and flat[position][1] == atom:
                row.append(flat[position][0])
                position += 1
            elif name in ("expand", "repeat"):
                row.append({})
            else:
                return give_up(p, call)
        made.append(row)
    return [made] if position == len(flat) else give_up(p, call)


def _cut(p: Equations, call: Call) -> list[list[Row]]:
    """Slices of an axis: the leaves of the parts inside the slice, where the cuts fall on parts."""
    bound = arguments(call)
    x: Value = bound["self"]
    dim = bound.get("dim", 0) % len(x.shape)
    rows = p.rows(x)
    starts = _starts(call, bound, x, dim)
    made = []
    for start, out in zip(starts, call.outs, strict=True):
        drops = len(out.shape) < len(x.shape)
        length = 1 if drops else out.shape[dim]
        row = _within(p, x, dim, start, start + length) if bound.get("step", 1) == 1 else None
        if not drops and not any(p.is_free(a) for a in p.leaves(x.axes[dim])):
            row = p.neutral(out)[dim]
        rest = rows[:dim] + ([] if drops else [row or []]) + rows[dim + 1 :]
        if row is None or (drops and row):
            p.kill([rows[dim]])
            rest = rows[:dim] + ([] if drops else [p.neutral(out)[dim]]) + rows[dim + 1 :]
        made.append(rest)
    return made


def _starts(call: Call, bound: dict[str, Any], x: Value, dim: int) -> list[int]:
    if call.name in ("slice", "narrow", "select"):
        start = bound.get("start", bound.get("index")) or 0
        return [min(max(start + x.shape[dim] if start < 0 else start, 0), x.shape[dim])]
    starts = [0]
    for out in call.outs[:-1]:
        starts.append(starts[-1] + (1 if call.name == "unbind" else out.shape[dim]))
    return starts


def _within(p: Equations, x: Value, dim: int, start: int, stop: int) -> Row | None:
    """Exponents of the leaves of an axis that lie in a range; None if it cuts through one."""
    row, found, position = p.rows(x)[dim], [], 0

    def visit(tree: Tree, offset: int) -> bool:
        nonlocal position
        total = _tree_size(p, tree)
        count = len(list(atoms_of(tree)))
        if total == 0 or offset + total <= start or offset >= stop:
            position += count
            return True
        if start <= offset and offset + total <= stop:
            found.extend(row[position : position + count])
            position += count
            return True
        if len(tree) == 1 and isinstance(tree[0], list):
            for part in tree[0]:
                if not visit(part, offset):
                    return False
                offset += _tree_size(p, part)
            return True
        return all(not p.is_free(a) for a in atoms_of(tree)) and _skip(count)

    def _skip(count: int) -> bool:
        nonlocal position
        position += count
        return True

    return found if visit(p.naming.tree(x.axes[dim]), 0) else None


def _tree_size(p: Equations, tree: Tree) -> int:
    out = 1
    for node in tree:
        if isinstance(node, list):
            out *= sum(_tree_size(p, t) for t in node)
        else:
            out *= p.naming.s.size((node,))
    return out


def _cat(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    tensors = [t for t in bound["tensors"] if t.shape != (0,)]
    dim = bound.get("dim", 0) % len(tensors[0].shape)
    out = list(p.rows(tensors[0]))
    for other in tensors[1:]:
        for d, row in enumerate(p.rows(other)):
            if d != dim:
                p.equate(out[d], row)
    rows, parts = [p.rows(t)[dim] for t in tensors], [p.leaves(t.axes[dim]) for t in tensors]
    whole = p.leaves(call.outs[0].axes[dim])
    if whole and not p.is_free(whole[0]) and all(part == whole[1:] for part in parts):
        for row in rows[1:]:  # shuffled later: a fixed index over one group, which scales as one
            p.equate(rows[0], row)
        out[dim] = [{}, *rows[0]]
        return [out]
    if p.runs(a for part in parts for a in part) != p.runs(whole):
        return give_up(p, call)
    each = (zip(part, row, strict=True) for part, row in zip(parts, rows, strict=True))
    moved = iter([e for part in each for a, e in part if p.is_free(a)])
    out[dim] = [next(moved) if p.is_free(a) else {} for a in whole]
    return [out]


def _reduce(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    x: Value = bound["self"]
    if p.sign and call.name in _REDUCE_MAX:
        return give_up(p, call)
    dims = dims_of(bound.get("dim"), len(x.shape))
    rows = p.rows(x)
    p.kill(rows[d] for d in dims)
    keep = bool(bound.get("keepdim"))
    return [[[] if d in dims else r for d, r in enumerate(rows) if keep or d not in dims]]


def _pool(p: Equations, call: Call) -> list[list[Row]]:
    if call.name == "constant_pad_nd" and call.kwargs.get("value"):
        return give_up(p, call)
    if p.sign and call.name in _MAX_POOLS:
        return give_up(p, call)
    x = call.ins[0]
    rows, out = p.rows(x), p.neutral(call.outs[0])
    made = []
    for d, row in enumerate(rows):
        same = p.naming.s.resolve(x.axes[d]) == p.naming.s.resolve(call.outs[0].axes[d])
        if not same:
            p.kill([row])
        made.append(row if same else out[d])
    return [made]


def _embedding(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    rows = p.rows(bound["weight"])
    p.kill([rows[0]])
    return [[*p.neutral(call.outs[0])[:-1], rows[1]]]


def _attention(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    q, k, v = (p.rows(bound[n]) for n in ("query", "key", "value"))
    p.oppose(q[-1], k[-1])
    p.kill([*q[:-1], *k[:-1], *v[:-1]])
    if bound.get("attn_mask") is not None:
        p.kill(p.rows(bound["attn_mask"]))
    return [[*p.neutral(call.outs[0])[:-1], v[-1]]]


def _weight_norm(p: Equations, call: Call) -> list[list[Row]]:
    bound = arguments(call)
    v, g = bound["v"], bound["g"]
    dim = bound.get("dim", 0) % len(v.shape)
    rows, gain = p.rows(v), p.rows(g)
    p.kill(r for d, r in enumerate(rows) if d != dim)
    target = gain[dim if len(g.shape) == len(v.shape) else 0]
    if p.sign:
        target = _added(p, target, rows[dim])
    out = p.neutral(call.outs[0])
    out[dim] = target
    return [out]


def _pow(p: Equations, call: Call) -> list[list[Row]]:
    exponent = call.args[1]
    if exponent != 2:
        return give_up(p, call)
    rows = p.rows(call.args[0])
    return [[[p.system.combine([(e, 2)]) for e in r] for r in rows]]


_HANDLERS: dict[str, Callable[[Equations, Call], list[list[Row]]]] = {
    **dict.fromkeys(_SUMS - {"where"}, _sum),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _mm),
    "convolution": _convolution,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    "native_group_norm": _group_norm,
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_CUTS, _cut),
    "cat": _cat,
    **dict.fromkeys(_REDUCE | _REDUCE_MAX, _reduce),
    **dict.fromkeys(_POOLS | _MAX_POOLS, _pool),
    "embedding": _embedding,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_weight_norm_interface": _weight_norm,
    "uniform": lambda p, call: [p.neutral(call.outs[0])],
    "pow": _pow,
}
