"""Results of operators on meta tensors: shapes, strides and dtypes, each worked out once.

Many meta kernels are Python and cost 0.1-0.9 ms a call. Networks repeat their blocks, so a call
with the same operator, layouts and numbers is answered from the first one.
"""

# pyright: reportPrivateUsage=false

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_LIKE_FIRST = frozenset(
    "aten.relu.default aten.gelu.default aten.silu.default aten.sigmoid.default aten.tanh.default "
    "aten.add.Tensor aten.mul.Tensor".split()
)
"""Operators whose result is laid out like their first operand, if the others have its shape."""
_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class MetaRunner:
    """Runs operators on meta tensors, remembering results for the life of one trace."""

    def __init__(self) -> None:
        self._pure: dict[OpOverload, bool] = {}
        self._results: dict[Hashable, tuple[bool, list[_Layout]]] = {}

    def __call__(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns."""
        if not self._is_pure(func):
            return func(*args, **kwargs)
        if str(func) in _LIKE_FIRST and _follow(args, args[0].shape):
            return torch.empty_like(args[0])
        if func is torch.ops.aten.native_batch_norm.default and _follow(args, args[0].shape[1:2]):
            out = torch.empty_like(args[0])
            return out, *(torch.empty(0, dtype=out.dtype, device="meta") for _ in range(2))
        try:
            key = (func, _key(args), tuple((k, _key(v)) for k, v in kwargs.items()))
            found = self._results.get(key)
        except TypeError:  # an argument that is not hashable
            return func(*args, **kwargs)
        if found is None:
            out = func(*args, **kwargs)
            outs = out if isinstance(out, tuple) else (out,)
            if all(isinstance(x, Tensor) for x in outs):
                self._results[key] = isinstance(out, tuple), [_layout(x) for x in outs]
            return out
        several, layouts = found
        outs = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in layouts
        )
        return outs if several else outs[0]

    def _is_pure(self, func: OpOverload) -> bool:
        """True if an operator returns fresh tensors and writes to none."""
        pure = self._pure.get(func)
        if pure is None:
            schema = func._schema
            pure = not schema.is_mutable and not any(r.alias_info for r in schema.returns)
            self._pure[func] = pure
        return pure


def _follow(args: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """True if all tensors after the first have this shape and the first one's float type."""
    first = args[0]
    return first.is_floating_point() and all(
        x.dtype == first.dtype and x.shape in (shape, ())
        if isinstance(x, Tensor)
        else not isinstance(x, list | tuple)
        for x in args[1:]
    )


def _layout(tensor: Tensor) -> _Layout:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _key(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return _layout(x)
    if isinstance(x, list | tuple):
        return tuple(_key(y) for y in x)
    return type(x), x  # 1, 1.0 and True are equal, and promote differently
