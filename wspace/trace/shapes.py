"""Rules for operators that only rearrange: views, slices, concatenation, padding, indexing."""

from typing import Any

import torch
from torch import Tensor

from wspace.trace.program import CONST, Call, Value
from wspace.trace.rules import Axes, Result, arguments, dims_of, rule
from wspace.trace.solve import Solver

# -------------------------------------------------------------------------- views


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _view(s: Solver, self: Value, call: Call) -> Result:
    if call.outs[0].dtype.itemsize != self.dtype.itemsize:
        return None
    return s.reshape(self.axes, call.outs[0].shape)


@rule("permute")
def _permute(s: Solver, self: Value, dims: list[int]) -> Result:
    return [self.axes[d] for d in dims]


@rule("transpose")
def _transpose(s: Solver, self: Value, dim0: int, dim1: int) -> Result:
    axes = list(self.axes)
    if axes:
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return axes


@rule("t")
def _t(s: Solver, self: Value) -> Result:
    return list(reversed(self.axes))


@rule("unsqueeze")
def _unsqueeze(s: Solver, self: Value, dim: int) -> Result:
    axes = list(self.axes)
    axes.insert(dim % (len(axes) + 1), ())
    return axes


@rule("squeeze")
def _squeeze(s: Solver, self: Value, dim: int | list[int] | None) -> Result:
    dims = dims_of(dim, len(self.shape))
    return [a for d, a in enumerate(self.axes) if d not in dims or self.shape[d] != 1]


@rule("expand")
def _expand(s: Solver, self: Value, call: Call) -> Result:
    return _stretch(s, self, call.outs[0].shape)


def _stretch(s: Solver, value: Value, shape: tuple[int, ...]) -> Axes:
    """Axes after broadcasting to `shape`; a stretched dimension is uniform, so free."""
    extra = len(shape) - len(value.shape)
    out: Axes = []
    new: list[int] = []
    for d, size in enumerate(shape):
        if d >= extra and value.shape[d - extra] == size:
            out.append(value.axes[d - extra])
        else:
            out.append(s.atom(size))
            new.append(d)
    for d in new:
        s.depend(out[d], [axis for i, axis in enumerate(out) if i != d])
    return out


@rule("repeat")
def _repeat(s: Solver, self: Value, repeats: list[int]) -> Result:
    extra = len(repeats) - len(self.shape)
    axes = [()] * extra + list(self.axes)
    copies = [s.atom(r) for r in repeats]
    for i, c in enumerate(copies):
        s.depend(c, [*axes, *(o for j, o in enumerate(copies) if j != i)])
    return [c + a for c, a in zip(copies, axes, strict=True)]


# ------------------------------------------------------------- slices and joining


@rule("select")
def _select(s: Solver, self: Value, dim: int, index: int) -> Result:
    d, i = dim % len(self.shape), index % self.shape[dim]
    axes = s.narrow(self.axes, d, i, i + 1)
    return axes[:d] + axes[d + 1 :]


@rule("slice", "narrow")
def _slice(s: Solver, self: Value, call: Call) -> Result:
    bound = arguments(call)
    rank, d = len(self.shape), bound["dim"] % len(self.shape)
    size = self.shape[d]
    length = call.outs[0].shape[d]
    step, start = bound.get("step", 1), bound.get("start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if step > 1 and s.free(self.axes[d]) and size == length * step and start < step:
        axes = [*self.axes[:d], *s.reshape([self.axes[d]], [length, step]), *self.axes[d + 1 :]]
        axes = s.narrow(axes, d + 1, start, start + 1)
        return axes[: d + 1] + axes[d + 2 :]
    if step != 1 or length == 0:
        s.freeze(self.axes[d])
        return [s.atom(length, fixed=True) if i == d else self.axes[i] for i in range(rank)]
    return s.narrow(self.axes, d, start, start + length)


@rule("split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk", "tensor_split",
      "unsafe_split_with_sizes", "hsplit", "split_copy")  # fmt: skip
def _split(s: Solver, self: Value, dim: int, call: Call) -> Result:
    d = dim % len(self.shape)
    start, out = 0, []
    for piece in call.outs:
        out.append(s.narrow(self.axes, d, start, start + piece.shape[d]))
        start += piece.shape[d]
    return tuple(out)


@rule("unbind")
def _unbind(s: Solver, self: Value, dim: int, call: Call) -> Result:
    d = dim % len(self.shape)
    pieces = (s.narrow(self.axes, d, i, i + 1) for i in range(len(call.outs)))
    return tuple(p[:d] + p[d + 1 :] for p in pieces)


@rule("cat", "concat")
def _cat(s: Solver, tensors: list[Value], dim: int) -> Result:
    tensors = [t for t in tensors if t.shape != (0,)]
    d = dim % len(tensors[0].shape)
    out = list(tensors[0].axes)
    for other in tensors[1:]:
        for i, axis in enumerate(other.axes):
            if i != d:
                s.unify(out[i], axis)
    out[d] = s.concat([t.axes[d] for t in tensors])
    return out


@rule("stack")
def _stack(s: Solver, tensors: list[Value], dim: int) -> Result:
    return s.stack([t.axes for t in tensors], dim % (len(tensors[0].shape) + 1))


@rule("constant_pad_nd")
def _pad(s: Solver, self: Value, pad: list[int]) -> Result:
    out = list(self.axes)
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        d = len(out) - 1 - i
        if before or after:
            out = s.narrow(out, d, max(-before, 0), self.shape[d] - max(-after, 0))
            zeros = [s.atom(max(n, 0)) if n > 0 else None for n in (before, after)]
            parts = [zeros[0], out[d], zeros[1]]
            sizes = [max(before, 0), s.size(out[d]), max(after, 0)]
            kept = [p for p, n in zip(parts, sizes, strict=True) if n and p is not None]
            out[d] = s.concat(kept) if s.free(out[d]) else s.atom(sum(sizes), fixed=True)
    return out


@rule("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(s: Solver, self: Value, call: Call) -> Result:
    bound = arguments(call)
    *lead, c, h, w = self.axes
    *_, nc, nh, nw = self.shape
    if call.name == "pixel_shuffle":
        r = bound["upscale_factor"]
        c, i, j = s.reshape([c], [nc // r**2, r, r])
        return [*lead, c, h + i, w + j]
    r = bound["downscale_factor"]
    h, i = s.reshape([h], [nh // r, r])
    w, j = s.reshape([w], [nw // r, r])
    return [*lead, c + i + j, h, w]


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(s: Solver, self: Value, groups: int) -> Result:
    g, c = s.reshape([self.axes[1]], [groups, self.shape[1] // groups])
    return [self.axes[0], c + g, *self.axes[2:]]


@rule("flip", "roll", "tril", "triu", "rot90")
def _reorder(s: Solver, self: Value, call: Call) -> Result:
    bound = arguments(call)
    rank = len(self.shape)
    dims = range(rank - 2, rank) if call.name in ("tril", "triu") else bound.get("dims")
    for d in dims_of(list(dims or []), rank):
        s.freeze(self.axes[d])
        s.mix(self.axes, [d])
    return list(self.axes)


@rule("as_strided", "as_strided_scatter")
def _as_strided(s: Solver, self: Value, call: Call) -> Result:
    out = call.outs[0].shape
    strides = zip(arguments(call)["stride"], _contiguous(out), out, strict=True)
    if out == self.shape and all(a == b for a, b, size in strides if size > 1):
        return list(self.axes)
    return None


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return strides[::-1]


@rule("unfold")
def _unfold(s: Solver, self: Value, dimension: int, call: Call) -> Result:
    d = dimension % len(self.shape)
    s.freeze(self.axes[d])
    s.mix(self.axes, [d])
    shape = call.outs[0].shape
    axes = list(self.axes)
    axes[d] = s.atom(shape[d], fixed=True)
    return [*axes, s.atom(shape[-1], fixed=True)]


@rule("im2col", "col2im")
def _patches(s: Solver, self: Value, kernel_size: list[int], call: Call) -> Result:
    taps = kernel_size[0] * kernel_size[1]
    shape = call.outs[0].shape
    s.mix(self.axes, range(len(self.axes) - (2 if call.name == "im2col" else 1), len(self.axes)))
    if call.name == "im2col":
        lead, (h, w) = self.axes[:-3], self.axes[-2:]
        s.freeze(h + w)
        channels = self.axes[-3] + s.atom(taps, fixed=True)
        return [*lead, channels, s.atom(shape[-1], fixed=True)]
    c, k = s.reshape([self.axes[-2]], [self.shape[-2] // taps, taps])
    s.freeze(k + self.axes[-1])
    return [*self.axes[:-2], c, *(s.atom(n, fixed=True) for n in shape[-2:])]


@rule("diagonal")
def _diagonal(s: Solver, self: Value, dim1: int, dim2: int, offset: int, call: Call) -> Result:
    a, b = dim1 % len(self.shape), dim2 % len(self.shape)
    rest = [axis for d, axis in enumerate(self.axes) if d not in (a, b)]
    if offset == 0 and self.shape[a] == self.shape[b]:
        s.unify(self.axes[a], self.axes[b])
        return [*rest, self.axes[a]]
    s.freeze(self.axes[a] + self.axes[b])
    return [*rest, s.atom(call.outs[0].shape[-1], fixed=True)]


# ----------------------------------------------------------------------- indexing


def _look_up(s: Solver, value: Value, d: int, index: Value) -> None:
    """Says that dimension `d` of `value` is read at the positions that `index` holds."""
    if index.points is not None and s.size(index.points) == value.shape[d]:
        s.unify(index.points, value.axes[d])
        s.point(index.axes, value.axes[d])
    elif index.kind == CONST and index.data is not None and _constant(index.data):
        at = int(index.data.flatten()[0]) % value.shape[d]
        s.narrow(value.axes, d, at, at + 1)
    else:
        s.freeze(value.axes[d])


def _constant(data: Tensor) -> bool:
    return data.numel() > 0 and bool((data == data.flatten()[0]).all())


@rule("embedding")
def _embedding(s: Solver, weight: Value, indices: Value) -> Result:
    _look_up(s, weight, 0, indices)
    return [*indices.axes, weight.axes[1]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(s: Solver, weight: Value, indices: Value, call: Call) -> Result:
    _look_up(s, weight, 0, indices)
    for value in call.ins[1:]:
        for axis in value.axes:
            s.freeze(axis)
    bags = s.atom(call.outs[0].shape[0], fixed=True)
    return ([bags, weight.axes[1]], *(None for _ in call.outs[1:]))


@rule("view_as_complex")
def _view_as_complex(s: Solver, self: Value) -> Result:
    s.freeze(self.axes[-1])
    return list(self.axes[:-1])


@rule("view_as_real")
def _view_as_real(s: Solver, self: Value) -> Result:
    return [*self.axes, s.atom(2, fixed=True)]


@rule("index_select")
def _index_select(s: Solver, self: Value, dim: int, index: Value) -> Result:
    d = dim % max(len(self.shape), 1)
    _look_up(s, self, d, index)
    axes = list(self.axes)
    axes[d] = index.axes[0] if index.axes else ()
    return axes


@rule("gather", "take_along_dim")
def _gather(s: Solver, self: Value, dim: int, index: Value) -> Result:
    d = dim % len(self.shape)
    _look_up(s, self, d, index)
    for i, (a, b) in enumerate(zip(self.axes, index.axes, strict=True)):
        if i != d:
            if self.shape[i] == index.shape[i]:
                s.unify(a, b)
            else:
                s.freeze(a)
                s.freeze(b)
    return list(index.axes)


@rule("index", "_unsafe_index")
def _index(s: Solver, self: Value, indices: list[Value | None], call: Call) -> Result:
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if any(i.dtype in (torch.bool, torch.uint8) for _, i in used):
        return _index_mask(s, self, indices, call)
    for d, index in used:
        _look_up(s, self, d, index)
    ranked = max(len(i.shape) for _, i in used)
    joint: Axes = []
    for d in range(-ranked, 0):
        present = [i.axes[d] for _, i in used if len(i.shape) >= -d and i.shape[d] != 1]
        for other in present[1:]:
            s.unify(present[0], other)
        joint.append(present[0] if present else ())
    dims = [d for d, _ in used]
    rest = [axis for d, axis in enumerate(self.axes) if d not in dims]
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    at = dims[0] if adjacent else 0
    return [*rest[:at], *joint, *rest[at:]]


def _index_mask(s: Solver, self: Value, indices: list[Value | None], call: Call) -> Result:
    """Boolean indexing: the masked dimensions become one fixed list of hits."""
    out: Axes = []
    d = 0
    placed = False
    for index in indices:
        if index is None:
            out.append(self.axes[d])
            d += 1
            continue
        span = len(index.shape) if index.dtype in (torch.bool, torch.uint8) else 1
        for axis in (*self.axes[d : d + span], *index.axes):
            s.freeze(axis)
        d += span
        if not placed:
            out.append(s.atom(call.outs[0].shape[len(out)], fixed=True))
            placed = True
    out += self.axes[d:]
    if len(out) != len(call.outs[0].shape):
        return None
    return out


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(s: Solver, self: Value, indices: list[Value | None], values: Value) -> Result:
    span = 0
    for d, index in enumerate(indices):
        if index is not None:
            if index.dtype in (torch.bool, torch.uint8):
                for axis in (*self.axes[d : d + len(index.shape)], *index.axes):
                    s.freeze(axis)
                span = max(span, d + len(index.shape))
            else:
                _look_up(s, self, d, index)
                for axis in index.axes:
                    s.freeze(axis)
                span = max(span, d + 1)
        else:
            span = max(span, d + 1)
    tail = len(self.shape) - span
    for d in range(-min(tail, len(values.shape)), 0):
        if values.shape[d] != 1:
            s.unify(self.axes[d], values.axes[d])
    for axis in values.axes[: len(values.axes) - tail] if tail else values.axes:
        s.freeze(axis)
    return list(self.axes)


@rule("index_add", "index_copy")
def _index_add(s: Solver, self: Value, dim: int, index: Value, source: Value) -> Result:
    d = dim % len(self.shape)
    _look_up(s, self, d, index)
    s.unify(index.axes[0], source.axes[d])
    for i, (a, b) in enumerate(zip(self.axes, source.axes, strict=True)):
        if i != d:
            s.unify(a, b)
    return list(self.axes)


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(s: Solver, self: Value, dim: int, index: Value, src: Any, call: Call) -> Result:
    d = dim % len(self.shape)
    _look_up(s, self, d, index)
    for other in (index, src):
        if isinstance(other, Value):
            for i, (a, b) in enumerate(zip(self.axes, other.axes, strict=True)):
                if i != d and self.shape[i] == other.shape[i]:
                    s.unify(a, b)
                elif i != d:
                    s.freeze(a + b)
    if isinstance(src, Value):
        s.unify(src.axes[d], index.axes[d]) if src.shape[d] == index.shape[d] else s.freeze(
            src.axes[d]
        )
    return list(self.axes)


@rule("select_scatter", "slice_scatter", "diagonal_scatter")
def _slice_scatter(s: Solver, self: Value, src: Value, dim: int, call: Call) -> Result:
    d = dim % len(self.shape)
    s.freeze(self.axes[d])
    axes = [a for i, a in enumerate(self.axes) if i != d or call.name == "slice_scatter"]
    for a, b in zip(axes, src.axes, strict=True):
        if s.size(a) == s.size(b):
            s.unify(a, b)
        else:
            s.freeze(a + b)
    return list(self.axes)


@rule("nonzero", "_local_scalar_dense", "item", "bincount", "unique_dim")
def _positions(s: Solver, self: Value, call: Call) -> Result:
    for axis in self.axes:
        s.freeze(axis)
    return tuple([s.atom(n, fixed=True) for n in out.shape] for out in call.outs)


@rule("histc")
def _histc(s: Solver, self: Value, bins: int) -> Result:
    for axis in self.axes:
        s.freeze(axis)
    if self.points is not None and s.size(self.points) == bins:
        return [self.points]
    return [s.atom(bins, fixed=True)]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fft(s: Solver, self: Value, dim: list[int], call: Call) -> Result:
    out = list(self.axes)
    for d in dims_of(dim, len(self.shape)):
        s.freeze(out[d])
        s.mix(self.axes, [d])
        out[d] = s.atom(call.outs[0].shape[d], fixed=True)
    return out
