"""One short rule per operator: how the axes of its outputs follow from those of its inputs.

A rule never sees a tensor. It takes the operator's arguments by their schema names (tensors as
`Value`, everything else as is), tells the solver which axes move together, and returns the axes of
its output (a tuple of them if there are several outputs). Operators without a rule are decomposed
or, failing that, frozen; so a missing rule loses symmetry and never invents one.

Rules here cover arithmetic, contractions, norms, reductions and pooling; those that only rearrange
are in `shapes.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

from wspace.trace.program import Call, Value
from wspace.trace.solve import Axis, Solver

Axes = list[Axis]
Result = Axes | tuple[Axes | None, ...] | None
F = TypeVar("F", bound=Callable[..., Result])
RULES: dict[str, Callable[..., Result]] = {}
_SIGNATURES: dict[str, tuple[str, ...]] = {}
_SCHEMAS: dict[OpOverload, list[tuple[str, Any]]] = {}


def rule(*names: str) -> Callable[[F], F]:
    """Decorator that registers a rule by name: ``"addmm"`` in aten, ``"space::name"`` elsewhere."""

    def register(function: F) -> F:
        code = function.__code__
        for name in names:
            RULES[name] = function
            _SIGNATURES[name] = code.co_varnames[1 : code.co_argcount]
        return function

    return register


def known(name: str, op: OpOverload) -> bool:
    """True if an operator has a rule of its own or shares the one for pointwise operators."""
    return name in RULES or torch.Tag.pointwise in op.tags


def arguments(call: Call) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in."""
    schema = _SCHEMAS.get(call.op)
    if schema is None:
        schema = [
            (a.name, a.default_value if a.has_default_value() else None)
            for a in call.op._schema.arguments  # pyright: ignore[reportPrivateUsage]
        ]
        _SCHEMAS[call.op] = schema
    bound = dict(schema)
    bound.update(zip(bound, call.args, strict=False))
    bound.update(call.kwargs)
    return bound


def apply(s: Solver, call: Call) -> Result:
    """Output axes of a call, or None if there is no rule for its operator."""
    function = RULES.get(call.name)
    if function is None:
        if torch.Tag.pointwise not in call.op.tags:
            return None
        return broadcast(s, call.ins)
    bound = arguments(call)
    return function(s, *(bound.get(n) if n != "call" else call for n in _SIGNATURES[call.name]))


# ---------------------------------------------------------------------- pointwise


def broadcast(s: Solver, values: Sequence[Value]) -> Axes:
    """Axes of an elementwise result: dimensions aligned at the right, sizes 1 stretched."""
    rank = max((len(v.shape) for v in values), default=0)
    out: Axes = []
    for d in range(-rank, 0):
        axis: Axis = ()
        for v in values:
            if len(v.shape) >= -d and v.shape[d] != 1:
                if axis:
                    s.unify(axis, v.axes[d])
                else:
                    axis = v.axes[d]
        out.append(axis)
    return out


def dims_of(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """Non-negative dimensions; all of them when `dim` is None or empty."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [d % rank for d in dims] if rank else []


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "_conj", "view_as_real_")
def _identity(s: Solver, self: Value) -> Result:
    return list(self.axes)


@rule("complex", "polar")
def _complex(s: Solver, call: Call) -> Result:
    return broadcast(s, call.ins)


@rule("copy")
def _copy(s: Solver, self: Value, src: Value) -> Result:
    broadcast(s, [self, src])
    return list(self.axes)


@rule("native_dropout")
def _native_dropout(s: Solver, input: Value) -> Result:
    return list(input.axes), list(input.axes)


@rule("uniform")
def _uniform(s: Solver, call: Call) -> Result:
    return s.fresh(call.outs[0].shape)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(s: Solver, self: Value, dim: int) -> Result:
    s.mix(self.axes, dims_of(dim, len(self.shape)))
    return list(self.axes)


@rule("cumsum", "cumprod", "logcumsumexp")
def _cumulative(s: Solver, self: Value, dim: int) -> Result:
    for d in dims_of(dim, len(self.shape)):
        s.freeze(self.axes[d])
        s.mix(self.axes, [d])
    return list(self.axes)


@rule("glu")
def _glu(s: Solver, self: Value, dim: int) -> Result:
    d = dim % len(self.shape)
    half = self.shape[d] // 2
    first = s.narrow(self.axes, d, 0, half)
    second = s.narrow(self.axes, d, half, 2 * half)
    for a, b in zip(first, second, strict=True):
        s.unify(a, b)
    return first


# ------------------------------------------------------------------- contractions


@rule("mm")
def _mm(s: Solver, self: Value, mat2: Value) -> Axes:
    s.unify(self.axes[1], mat2.axes[0])
    return [self.axes[0], mat2.axes[1]]


@rule("addmm")
def _addmm(s: Solver, self: Value, mat1: Value, mat2: Value) -> Result:
    return _add_bias(s, _mm(s, mat1, mat2), self)


@rule("bmm")
def _bmm(s: Solver, self: Value, mat2: Value) -> Axes:
    s.unify(self.axes[0], mat2.axes[0])
    s.unify(self.axes[2], mat2.axes[1])
    return [self.axes[0], self.axes[1], mat2.axes[2]]


@rule("baddbmm")
def _baddbmm(s: Solver, self: Value, batch1: Value, batch2: Value) -> Result:
    return _add_bias(s, _bmm(s, batch1, batch2), self)


@rule("mv")
def _mv(s: Solver, self: Value, vec: Value) -> Axes:
    s.unify(self.axes[1], vec.axes[0])
    return [self.axes[0]]


@rule("addmv")
def _addmv(s: Solver, self: Value, mat: Value, vec: Value) -> Result:
    return _add_bias(s, _mv(s, mat, vec), self)


@rule("dot", "vdot")
def _dot(s: Solver, call: Call) -> Result:
    a, b = call.args[:2]
    s.unify(a.axes[0], b.axes[0])
    return []


@rule("linear")
def _linear(s: Solver, input: Value, weight: Value, bias: Value | None) -> Result:
    s.unify(input.axes[-1], weight.axes[1])
    out = [*input.axes[:-1], weight.axes[0]]
    return out if bias is None else _add_bias(s, out, bias)


def _add_bias(s: Solver, out: Axes, bias: Value) -> Axes:
    for d in range(-len(bias.shape), 0):
        if bias.shape[d] != 1:
            s.unify(out[d], bias.axes[d])
    return out


@rule("_trilinear")
def _trilinear(
    s: Solver,
    i1: Value,
    i2: Value,
    i3: Value,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
) -> Result:
    views: list[Axes] = []
    for value, expand in ((i1, expand1), (i2, expand2), (i3, expand3)):
        axes = list(value.axes)
        for d in sorted(expand):
            axes.insert(d, ())
        views.append(axes)
    out: Axes = []
    for column in zip(*views, strict=True):
        present = [axis for axis in column if axis]
        for other in present[1:]:
            s.unify(present[0], other)
        out.append(present[0] if present else ())
    return [axis for d, axis in enumerate(out) if d not in sumdim]


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(
    s: Solver,
    input: Value,
    weight: Value,
    bias: Value | None,
    transposed: bool,
    groups: int,
    call: Call,
) -> Result:
    x, w = input.axes, weight.axes
    for axis in (*x[2:], *w[2:]):
        s.freeze(axis)
    source, target = (w[0], w[1]) if transposed else (w[1], w[0])
    if groups > 1:
        ins = s.reshape([x[1]], [groups, input.shape[1] // groups])
        grouped = s.reshape([w[0]], [groups, weight.shape[0] // groups])
        s.unify(ins[0], grouped[0])
        s.unify(ins[1], grouped[1] if transposed else source)
        target = grouped[0] + target if transposed else target
    else:
        s.unify(x[1], source)
    if bias is not None:
        s.unify(target, bias.axes[0])
    shape = call.outs[0].shape
    return [x[0], target, *(s.atom(n, fixed=True) for n in shape[2:])]


@rule("_grouped_mm")
def _grouped_mm(s: Solver, self: Value, mat2: Value, offs: Value | None) -> Result:
    if len(self.shape) != 2 or len(mat2.shape) != 3 or offs is None:
        return None
    s.unify(self.axes[1], mat2.axes[1])
    s.unify(mat2.axes[0], offs.axes[0])
    return [self.axes[0], mat2.axes[2]]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
)
def _attention(
    s: Solver, query: Value, key: Value, value: Value, attn_mask: Value | None, call: Call
) -> Result:
    q, k, v = (list(x.axes) for x in (query, key, value))
    for d in range(len(q) - 2):
        heads = q[d]
        if query.shape[d] != key.shape[d]:  # grouped-query attention
            repeat = query.shape[d] // key.shape[d]
            heads = s.reshape([q[d]], [key.shape[d], repeat])[0]
        s.unify(heads, k[d])
        s.unify(k[d], v[d])
    s.unify(q[-1], k[-1])
    s.unify(k[-2], v[-2])
    out = [*q[:-1], v[-1]]
    if attn_mask is not None:
        scores = [*q[:-1], k[-2]]
        for d in range(-len(attn_mask.shape), 0):
            if attn_mask.shape[d] != 1:
                s.unify(scores[d], attn_mask.axes[d])
    s.mix(k, [len(k) - 2])
    return (out, *(None for _ in call.outs[1:]))


@rule("_cdist_forward")
def _cdist(s: Solver, x1: Value, x2: Value) -> Result:
    for a, b in zip(x1.axes[:-2], x2.axes[:-2], strict=True):
        s.unify(a, b)
    s.unify(x1.axes[-1], x2.axes[-1])
    return [*x1.axes[:-1], x2.axes[-2]]


# -------------------------------------------------------------------------- norms


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "_batch_norm_with_update",
      "_batch_norm_no_update")  # fmt: skip
def _batch_norm(s: Solver, input: Value, call: Call) -> Result:
    channels = input.axes[1]
    for value in call.ins[1:]:
        s.unify(channels, value.axes[0])
    s.mix(input.axes, [d for d in range(len(input.shape)) if d != 1])
    width = input.shape[1:2]
    return (list(input.axes), *([channels] if o.shape == width else None for o in call.outs[1:]))


@rule("native_layer_norm")
def _layer_norm(
    s: Solver,
    input: Value,
    normalized_shape: list[int],
    weight: Value | None,
    bias: Value | None,
    call: Call,
) -> Result:
    return _normalize_last(s, input, normalized_shape, [weight, bias], call)


@rule("_fused_rms_norm", "rms_norm")
def _rms_norm(
    s: Solver, input: Value, normalized_shape: list[int], weight: Value | None, call: Call
) -> Result:
    return _normalize_last(s, input, normalized_shape, [weight], call)


def _normalize_last(
    s: Solver, x: Value, shape: list[int], affine: list[Value | None], call: Call
) -> Result:
    lead = len(x.shape) - len(shape)
    for value in affine:
        if value is not None:
            for a, b in zip(x.axes[lead:], value.axes, strict=True):
                s.unify(a, b)
    s.mix(x.axes, range(lead, len(x.shape)))
    kept = [*x.axes[:lead], *([()] * len(shape))]
    return (list(x.axes), *(kept for _ in call.outs[1:]))


@rule("native_group_norm")
def _group_norm(
    s: Solver, input: Value, weight: Value | None, bias: Value | None, group: int
) -> Result:
    x = list(input.axes)
    for value in (weight, bias):
        if value is not None:
            s.unify(x[1], value.axes[0])
    grouped = s.reshape([x[1]], [group, input.shape[1] // group])
    s.mix([x[0], *grouped, *x[2:]], range(2, len(x) + 1))
    return x, [x[0], grouped[0]], [x[0], grouped[0]]


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(s: Solver, v: Value, g: Value, dim: int, call: Call) -> Result:
    dim = dim % len(v.shape)
    s.unify(v.axes[dim], g.axes[dim if len(g.shape) == len(v.shape) else 0])
    s.mix(v.axes, [d for d in range(len(v.shape)) if d != dim])
    return (list(v.axes), *(list(g.axes) for _ in call.outs[1:]))


# --------------------------------------------------------------------- reductions


@rule("sum", "mean", "prod", "amax", "amin", "any", "all", "logsumexp", "std", "var", "nansum",
      "linalg_vector_norm", "norm", "max", "min", "median", "argmax", "argmin", "var_mean",
      "std_mean", "aminmax", "count_nonzero")  # fmt: skip
def _reduce(s: Solver, call: Call) -> Result:
    bound = arguments(call)
    x: Value = bound["self"]
    if isinstance(bound.get("other"), Value):  # max.other, min.other
        return broadcast(s, call.ins)
    dims = dims_of(bound.get("dim"), len(x.shape))
    s.mix(x.axes, dims)
    keep = bool(bound.get("keepdim"))
    out = [() if d in dims else axis for d, axis in enumerate(x.axes) if keep or d not in dims]
    if call.name in ("argmax", "argmin") or (
        call.name in ("max", "min", "median") and len(call.outs) > 1
    ):
        for d in dims:
            call.outs[-1].points = x.axes[d]
    return tuple(list(out) for _ in call.outs)


@rule("sort", "topk", "kthvalue", "msort")
def _sort(s: Solver, call: Call) -> Result:
    bound = arguments(call)
    x: Value = bound["self"]
    d = dims_of(bound.get("dim", -1), len(x.shape))[0] if x.shape else 0
    s.mix(x.axes, [d])
    size = call.outs[0].shape[d] if call.outs[0].shape else 1
    out = [s.atom(size, fixed=True) if i == d else axis for i, axis in enumerate(x.axes)]
    if len(call.outs) > 1:
        call.outs[1].points = x.axes[d]
    return tuple(list(out) for _ in call.outs)


# ------------------------------------------------------------------------ pooling


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d",
      "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d", "max_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
      "upsample_linear1d", "upsample_trilinear3d", "upsample_bicubic2d",
      "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
      "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d", "grid_sampler_2d",
      "grid_sampler_3d", "max_unpool2d")  # fmt: skip
def _spatial(s: Solver, call: Call) -> Result:
    x = call.ins[0]
    shape = call.outs[0].shape
    spatial = _SPATIAL_RANK.get(call.name) or next(
        int(c) for c in reversed(call.name.replace("_with_indices", "")) if c.isdigit()
    )
    lead = len(shape) - spatial
    for axis in x.axes[lead:]:
        s.freeze(axis)
    s.mix(x.axes, range(lead, len(shape)))
    tail = [s.atom(n, fixed=True) for n in shape[lead:]]
    return tuple([*x.axes[:lead], *tail] for _ in call.outs)


_SPATIAL_RANK = {"_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2, "grid_sampler_2d": 2}
