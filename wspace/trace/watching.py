"""The run in which a module computes with numbers that remember: what says how long a dimension is.

A mode that sees every call of a torch function hands out the lengths of tensors as `Number`
objects, and writes down which numbers were used as lengths, as counts, or as factors.
"""

# pyright: reportPrivateUsage=false

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wspace.trace.numbers import Computed, Demand, Length, Number, Numbers, of
from wspace.trace.program import Value, where

_LENGTHS = (Tensor.size, Tensor.shape.__get__)  # type: ignore[attr-defined]
_CONVOLUTIONS = (
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d,
)  # fmt: skip
_FACTORS = (
    Tensor.mul, Tensor.div, Tensor.__mul__, Tensor.__truediv__, Tensor.__rmul__, torch.mul,
    torch.div, Tensor.__rtruediv__, Tensor.add, Tensor.__add__, Tensor.mul_, Tensor.div_,
    Tensor.__pow__, torch.pow, torch.true_divide, Tensor.true_divide,
)  # fmt: skip
_SORTS = (torch.sort, Tensor.sort, torch.argsort, Tensor.argsort, torch.msort, Tensor.msort)
_LIKE = (
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like,
    torch.randn_like,
)  # fmt: skip
_SHAPES = (
    (0, (torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn, torch.arange)),
    (1, (torch.reshape, torch.broadcast_to, Tensor.view, Tensor.reshape, Tensor.expand,
         Tensor.broadcast_to, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty,
         Tensor.new_full)),
)  # fmt: skip
"""Functions with a shape among their arguments, and where it starts."""


class Watching(TorchFunctionMode):
    """Mode that hands out lengths as `Number` objects and writes down what they are used for."""

    def __init__(self, run: Numbers, value_of: Callable[[Tensor], Value]) -> None:
        super().__init__()
        self.run, self.value_of = run, value_of
        self._rules: dict[Any, Callable[[_Call], None]] = {
            **{f: self._shape for _, functions in _SHAPES for f in functions},
            **dict.fromkeys((Tensor.unflatten, torch.unflatten), self._unflatten),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            **dict.fromkeys((F.group_norm, torch.group_norm), self._group_norm),
            **dict.fromkeys((F.layer_norm, torch.layer_norm, F.rms_norm), self._norm),
            **dict.fromkeys((F.one_hot,), self._one_hot),
            **dict.fromkeys(
                (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes),
                self._split,
            ),
            **dict.fromkeys((Tensor.narrow, torch.narrow), self._narrow),
            **dict.fromkeys((torch.repeat_interleave, Tensor.repeat_interleave), self._repeat),
            **dict.fromkeys(_FACTORS, self._factor),
            **dict.fromkeys((torch.chunk, Tensor.chunk), self._chunks),
            **dict.fromkeys((torch.topk, Tensor.topk), self._choice),
            **dict.fromkeys(_LIKE, self._like),
            **dict.fromkeys(_SORTS, self._sort),
            F.pad: self._pad,
            Tensor.__getitem__: self._slices,
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._heads,
        }
        self._starts = {f: start for start, functions in _SHAPES for f in functions}

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LENGTHS:
            return self._lengths(args[0], func(*args, **kwargs), *args[1:], **kwargs)
        out = func(*args, **kwargs)
        if (rule := self._rules.get(func)) is not None:
            rule(_Call(func, args, kwargs, out))
        return out

    def _lengths(self, tensor: Tensor, found: Any, dim: int | None = None) -> Any:
        value = self.value_of(tensor)
        if isinstance(found, int):
            return self.run.number(found, Length(value, (dim or 0) % tensor.dim()))
        return torch.Size([self.run.number(n, Length(value, i)) for i, n in enumerate(found)])

    def _demand(self, number: Any, tensor: Any, dim: int, part: str = "whole") -> None:
        if isinstance(tensor, Tensor) and isinstance(number, int) and number not in (-1, 1):
            source = "" if isinstance(number, Number) else where()
            value = self.value_of(tensor)
            self.run.demands.append(Demand(of(number), value, dim % tensor.dim(), part, source))

    # -------------------------------------------------------------------- rules

    def _shape(self, call: "_Call") -> None:
        rest = call.args[self._starts[call.func] :]
        named = [x for k in ("shape", "size") if isinstance(x := call.kwargs.get(k), list | tuple)]
        sizes = [*named, *rest][0] if named or rest and isinstance(rest[0], list | tuple) else rest
        if isinstance(call.out, Tensor) and len(sizes) == call.out.dim():
            for i, n in enumerate(sizes):
                if isinstance(n, int) and int(n) == call.out.shape[i]:
                    self._demand(n, call.out, i)

    def _like(self, call: "_Call") -> None:
        x = call.args[0] if call.args else call.kwargs["input"]
        value = self.value_of(x)
        for i, n in enumerate(x.shape):
            self._demand(self.run.number(n, Length(value, i)), call.out, i)

    def _sort(self, call: "_Call") -> None:
        x = call.args[0] if call.args else call.kwargs["input"]
        value = self.value_of(x)
        for out in call.out if isinstance(call.out, tuple) else (call.out,):
            for i, n in enumerate(x.shape):
                self._demand(self.run.number(n, Length(value, i)), out, i)

    def _pad(self, call: "_Call") -> None:
        x, pads = call.args[0], call.get("pad", 1, ())
        value = self.value_of(x)
        for k in range(len(pads) // 2):
            i = x.dim() - 1 - k
            more = int(pads[2 * k]) + int(pads[2 * k + 1])
            length = Computed("add", Length(value, i), more)
            self._demand(self.run.number(x.shape[i] + more, length), call.out, i)

    def _unflatten(self, call: "_Call") -> None:
        dim = call.get("dim", 1, 0) % call.args[0].dim()
        for i, n in enumerate(call.get("sizes", 2, ())):
            self._demand(n, call.out, dim + i)

    def _convolution(self, call: "_Call") -> None:
        self._demand(call.get("groups", 6, 1), call.get("weight", 1, None), 0, "first")

    def _group_norm(self, call: "_Call") -> None:
        self._demand(call.get("num_groups", 1, 1), call.out, 1, "first")

    def _norm(self, call: "_Call") -> None:
        for i, n in enumerate(reversed(call.get("normalized_shape", 1, ()))):
            self._demand(n, call.out, -1 - i)

    def _one_hot(self, call: "_Call") -> None:
        self._demand(call.get("num_classes", 1, -1), call.out, -1)

    def _split(self, call: "_Call") -> None:
        size = call.get("split_size_or_sections", 1, None) or call.get("split_size", 1, ())
        sizes = size if isinstance(size, list | tuple) else [size] * len(call.out)
        for n, part in zip(sizes, call.out, strict=False):
            if int(n) == part.shape[call.get("dim", 2, 0)]:
                self._demand(n, part, call.get("dim", 2, 0))

    def _chunks(self, call: "_Call") -> None:
        x, count, dim = call.args[0], call.get("chunks", 1, 1), call.get("dim", 2, 0)
        length = Computed("floordiv", Length(self.value_of(x), dim % x.dim()), int(count))
        for part in call.out if x.shape[dim] % count == 0 else ():
            self._demand(self.run.number(part.shape[dim], length), part, dim)

    def _choice(self, call: "_Call") -> None:
        x, dim = call.args[0], call.get("dim", 2, -1)
        self.run.chosen.append((int(call.get("k", 1, 1)), self.value_of(x), dim % x.dim()))

    def _narrow(self, call: "_Call") -> None:
        self._demand(call.get("length", 3, -1), call.out, call.get("dim", 1, 0))

    def _repeat(self, call: "_Call") -> None:
        repeats, dim = call.get("repeats", 1, -1), call.get("dim", 2, None)
        if isinstance(repeats, int) and dim is not None:
            self._demand(repeats, call.out, dim, "last")

    def _attention(self, call: "_Call") -> None:
        if call.get("scale", 6, None) is None:
            self.run.dots.append(self.value_of(call.args[0]))

    def _factor(self, call: "_Call") -> None:
        for x in call.args[1:2]:
            if isinstance(x, Number):
                self.run.floated(x)

    def _heads(self, call: "_Call") -> None:
        """`nn.MultiheadAttention` has one width for its input, its heads and its output."""
        query, width, heads, packed, out = (call.args[i] for i in (0, 3, 4, 5, 11))
        for tensor, dim in ((query, -1), (out, 1), (out, 0)):
            self._demand(width, tensor, dim)
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self._demand(width, call.kwargs.get(name), 0)
        if isinstance(packed, Tensor):
            for i in range(3):
                self._demand(width, packed[i * int(width) : (i + 1) * int(width)], 0)
        self._demand(heads, out, 1, "first")

    def _slices(self, call: "_Call") -> None:
        """What a slice with a number at an end leaves is as long as the ends say."""
        x, key = call.args[0], call.args[1]
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, Tensor | list) for k in keys) or not isinstance(call.out, Tensor):
            return
        used = sum(k is not None and k is not Ellipsis for k in keys)
        dim = place = 0
        for k in keys:
            if k is Ellipsis:
                place += x.dim() - used
                dim += x.dim() - used
            elif k is None:
                place += 1
            elif isinstance(k, slice):
                if x.shape[dim] != call.out.shape[place] and k.step in (None, 1):
                    self._demand(self._ends(k, x, dim), call.out, place)
                dim, place = dim + 1, place + 1
            else:
                dim += 1

    def _ends(self, k: slice, x: Tensor, dim: int) -> int:
        """Length of a slice, as a number of the code."""
        whole = self.run.number(x.shape[dim], Length(self.value_of(x), dim))
        start, stop = k.start or 0, whole if k.stop is None else k.stop
        start = start if start >= 0 else whole + start
        stop = stop if stop >= 0 else whole + stop
        return stop - start if start else stop


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that the mode saw."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def get(self, name: str, place: int, default: Any) -> Any:
        """An argument by name or place."""
        return self.kwargs.get(name, self.args[place] if len(self.args) > place else default)
