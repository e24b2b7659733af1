"""View-like operators on *compressed* index arrays.

An index array tells, for every entry of a tensor, a number (which unit it is a value of; which
coordinate of a parameter it is). Along dimensions where that number does not vary the array has
size 1, whatever the tensor's size; so batch, tokens and pixels cost nothing, and arrays are as
small as what they distinguish. Arrays may have extra trailing dimensions, which are left alone.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wspace.trace.program import Call, Value
from wspace.trace.rules import arguments

Ids = NDArray[np.int64]
View = Callable[[Ids], Ids]
"""One output of an operator: from the input's index array to the output's."""


def same(a: Ids, b: Ids) -> bool:
    """True if two index arrays are equal."""
    return a is b or (a.shape == b.shape and bool((a == b).all()))


def compress(a: Ids, dims: Sequence[int]) -> Ids:
    """The array with size 1 along those of `dims` in which it does not vary."""
    for d in dims:
        if a.shape[d] > 1:
            first = a.take([0], d)
            if (a == first).all():
                a = first
    return a


def align(a: Ids, rank: int, wanted: int) -> Ids:
    """The array of a tensor of `rank` dimensions with leading ones, as of one of rank `wanted`."""
    return a if rank == wanted else a.reshape((1,) * (wanted - rank) + a.shape)


def reshape(a: Ids, old: Sequence[int], new: Sequence[int]) -> Ids:
    """The array of a tensor of shape `old` after a row-major view as `new`."""
    if tuple(old) == tuple(new):
        return a
    full: list[int] = []
    shape: list[int] = []
    check: list[int] = []
    for ins, outs in _chunks(old, new):
        varies = any(a.shape[i] > 1 for i in ins)
        full += [old[i] if varies and len(ins) > 1 else a.shape[i] for i in ins]
        if varies and len(ins) > 1 and len(outs):
            check += range(len(shape), len(shape) + len(outs))
        elif varies:
            check += range(len(shape), len(shape) + len(outs)) if len(outs) > 1 else []
        shape += [new[j] if varies else 1 for j in outs]
    extra = a.shape[len(old) :]
    a = np.broadcast_to(a, (*full, *extra)).reshape(*shape, *extra)
    return compress(a, check)


def _chunks(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Smallest runs of old and new dimensions that hold the same number of entries."""
    out: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        left = right = 1
        if i < len(old):
            left, i = left * old[i], i + 1
        if j < len(new):
            right, j = right * new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                raise ValueError(f"cannot view {old} as {new}")
        if left == 1 and (i - i0, j - j0) == (1, 1):
            pass
        out.append((range(i0, i), range(j0, j)))
    return out


def slices(a: Ids, dim: int, start: int, stop: int, step: int = 1) -> Ids:
    """The array after keeping ``start:stop:step`` of one dimension."""
    if a.shape[dim] == 1:
        return a
    return a[(slice(None),) * dim + (slice(start, stop, step),)]


def _drop(a: Ids, dim: int, index: int) -> Ids:
    return np.asarray(a.take(0 if a.shape[dim] == 1 else index, dim))


def views(call: Call) -> list[View] | None:
    """How each output of a view-like call follows from its first input; None if it is not one."""
    make = _VIEWS.get(call.name)
    if make is None:
        return None
    x = call.ins[0]
    return make(x, arguments(call), call)


Maker = Callable[[Value, dict[str, Any], Call], list[View] | None]
_VIEWS: dict[str, Maker] = {}


def _view(*names: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        for name in names:
            _VIEWS[name] = make
        return make

    return register


@_view("clone", "detach", "alias", "_to_copy", "contiguous", "_conj", "lift_fresh", "tril", "triu")
def _same(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    return [lambda a: a]


@_view("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def _reshape(x: Value, bound: dict[str, Any], call: Call) -> list[View] | None:
    new = call.outs[0].shape
    if prod(new) != prod(x.shape) or 0 in new:
        return None
    return [lambda a: reshape(a, x.shape, new)]


@_view("permute", "transpose", "t")
def _permute(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    rank = len(x.shape)
    order = list(range(rank))
    if call.name == "permute":
        order = [d % rank for d in bound["dims"]]
    elif rank:
        i, j = (0, rank - 1) if call.name == "t" else (bound["dim0"], bound["dim1"])
        order[i], order[j] = order[j], order[i]
    return [lambda a: a.transpose(*order, *range(rank, a.ndim))]


@_view("unsqueeze")
def _unsqueeze(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    dim = bound["dim"] % (len(x.shape) + 1)
    return [lambda a: np.expand_dims(a, dim)]


@_view("squeeze", "expand", "broadcast_to")
def _stretch(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    rank, out = len(x.shape), call.outs[0].shape
    if call.name != "squeeze":
        return [lambda a: align(a, rank, len(out))]
    dim = bound.get("dim")
    dims = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = tuple(d % rank for d in dims if x.shape[d] == 1) if rank else ()
    return [lambda a: a.squeeze(gone)]


@_view("select", "unbind")
def _select(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    d = bound["dim"] % len(x.shape)
    size = x.shape[d]
    indices = range(size) if call.name == "unbind" else [bound["index"] % size]
    return [lambda a, i=i: _drop(a, d, i) for i in indices]


@_view("slice", "narrow")
def _slice(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    d = bound["dim"] % len(x.shape)
    size, step = x.shape[d], bound.get("step") or 1
    start = bound.get("start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    stop = start + call.outs[0].shape[d] * step
    return [lambda a: slices(a, d, start, stop, step)]


@_view("split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk", "tensor_split",
       "unsafe_split_with_sizes", "hsplit", "split_copy")  # fmt: skip
def _split(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    d = bound.get("dim", 0) % len(x.shape)
    out: list[View] = []
    start = 0
    for piece in call.outs:
        stop = start + piece.shape[d]
        out.append(lambda a, start=start, stop=stop: slices(a, d, start, stop))
        start = stop
    return out


@_view("repeat")
def _repeat(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    rank, wanted = len(x.shape), len(call.outs[0].shape)
    repeats = bound["repeats"]

    def tile(a: Ids) -> Ids:
        a = align(a, rank, wanted)
        times = [r if n > 1 else 1 for r, n in zip(repeats, a.shape, strict=False)]
        return np.tile(a, times + [1] * (a.ndim - wanted))

    return [tile]


@_view("flip", "roll")
def _reorder(x: Value, bound: dict[str, Any], call: Call) -> list[View] | None:
    rank = len(x.shape)
    dims = bound.get("dims")
    if not dims:
        return None
    dims = [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    if call.name == "flip":
        return [lambda a: np.flip(a, tuple(dims))]
    return [lambda a: np.roll(a, bound["shifts"], dims)]


@_view("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
       "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def _pad(x: Value, bound: dict[str, Any], call: Call) -> list[View] | None:
    rank, widths = len(x.shape), [0] * (2 * len(x.shape))
    widths[: len(bound.get("pad") or bound["padding"])] = bound.get("pad") or bound["padding"]
    pairs = [(widths[2 * i], widths[2 * i + 1]) for i in reversed(range(rank))]

    def pad(a: Ids) -> Ids:
        for d, (before, after) in enumerate(pairs):
            if a.shape[d] == 1 or (before, after) == (0, 0):
                continue
            a = slices(a, d, max(-before, 0), a.shape[d] - max(-after, 0))
            rim = [(0, 0)] * a.ndim
            rim[d] = (max(before, 0), max(after, 0))
            a = np.pad(a, rim, constant_values=-1)
        return a

    return [pad]


@_view("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    *lead, c, h, w = x.shape if call.name.startswith("pixel") else (*x.shape[:2], 1, 1)
    k = len(lead)
    new = call.outs[0].shape

    def shuffle(a: Ids) -> Ids:
        extra = range(len(x.shape) + 2, a.ndim + 2)
        if call.name == "pixel_shuffle":
            r = bound["upscale_factor"]
            a = reshape(a, x.shape, (*lead, c // r**2, r, r, h, w))
            order, shape = (0, 3, 1, 4, 2), (*lead, c // r**2, h, r, w, r)
        else:
            r = bound["downscale_factor"]
            a = reshape(a, x.shape, (*lead, c, h // r, r, w // r, r))
            order, shape = (0, 2, 4, 1, 3), (*lead, c, r, r, h // r, w // r)
        a = a.transpose(*range(k), *(k + i for i in order), *extra)
        return reshape(a, shape, new)

    def regroup(a: Ids) -> Ids:
        g = bound["groups"]
        n, c, *rest = x.shape
        a = reshape(a, x.shape, (n, g, c // g, *rest)).swapaxes(1, 2)
        return reshape(a, (n, c // g, g, *rest), x.shape)

    return [shuffle if call.name.startswith("pixel") else regroup]


@_view("unfold")
def _unfold(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    d, size, step = bound["dimension"] % len(x.shape), bound["size"], bound["step"]
    count, rank = call.outs[0].shape[d], len(x.shape)
    where = np.arange(count)[:, None] * step + np.arange(size)

    def windows(a: Ids) -> Ids:
        if a.shape[d] == 1:
            return np.expand_dims(a, rank)
        return np.moveaxis(a.take(where, d), d + 1, rank)

    return [windows]


@_view("diagonal")
def _diagonal(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    rank = len(x.shape)
    i, j = bound["dim1"] % rank, bound["dim2"] % rank
    count = call.outs[0].shape[-1]
    shift = bound.get("offset") or 0
    here = np.arange(count)

    def take(a: Ids) -> Ids:
        rows = here + max(-shift, 0) if a.shape[i] > 1 else here[:1] * 0
        columns = here + max(shift, 0) if a.shape[j] > 1 else here[:1] * 0
        rows, columns = np.broadcast_arrays(rows, columns)
        a = np.moveaxis(a, (i, j), (0, 1))[rows, columns]
        return np.moveaxis(a, 0, rank - 2)

    return [take]


@_view("view_as_complex")
def _to_complex(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    return [lambda a: np.asarray(a.take(0, len(x.shape) - 1))]


@_view("view_as_real")
def _from_complex(x: Value, bound: dict[str, Any], call: Call) -> list[View]:
    return [lambda a: np.expand_dims(a, len(x.shape))]


@_view("index_select")
def _index_select(x: Value, bound: dict[str, Any], call: Call) -> list[View] | None:
    d = bound["dim"] % max(len(x.shape), 1)
    where = _numbers(bound["index"])
    if where is None:
        return None
    return [lambda a: a if a.shape[d] == 1 else a.take(where.reshape(-1), d)]


@_view("index", "_unsafe_index")
def _index(x: Value, bound: dict[str, Any], call: Call) -> list[View] | None:
    indices = bound["indices"]
    used = [d for d, i in enumerate(indices) if i is not None]
    numbers = [_numbers(i) if i is not None else None for i in indices]
    masks = any(str(i.dtype) in ("torch.bool", "torch.uint8") for i in indices if i is not None)
    together = used == list(range(used[0], used[-1] + 1))
    rank = max(len(indices[d].shape) for d in used)
    first = used[0] if together else 0

    def look_up(a: Ids) -> Ids:
        if masks or not any(a.shape[d] > 1 for d in used):
            span = sum(len(indices[d].shape) for d in used) if masks else len(used)
            kept = [n for i, n in enumerate(a.shape) if not first <= i < first + span]
            if not together:
                kept = [n for i, n in enumerate(a.shape) if i not in used]
            out = 1 if masks else rank
            return a.reshape(*kept[:first], *[1] * out, *kept[first:])
        if any(numbers[d] is None for d in used):
            raise ValueError("units looked up by what is not known")
        sizes = [x.shape[d] if d in used else n for d, n in enumerate(a.shape)]
        key = tuple(slice(None) if n is None else n for n in numbers)
        return compress(np.broadcast_to(a, sizes)[key], range(first, first + rank))

    return [look_up]


def _numbers(value: Value) -> NDArray[Any] | None:
    """The entries of an index that does not depend on parameters."""
    return None if value.data is None else value.data.cpu().numpy()
