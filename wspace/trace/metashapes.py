"""Result shapes of frequent operators, on the meta device, without their slow Python functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _batch_norm_shape(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    empty = torch.empty(0, dtype=x.dtype, device="meta")
    return torch.empty_like(x), empty, empty


def _convolution_shape(x: Tensor, w: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """Shape of a convolution's result; what does not fit goes to PyTorch's own check."""
    stride, padding, dilation, transposed, output_padding, groups = options
    source, rank = (w.shape[0], w.dim() - 2) if transposed else (w.shape[1] * groups, w.dim() - 2)
    if x.shape[1] != source or not len(stride) == len(padding) == len(dilation) == rank:
        return torch.ops.aten.convolution(x, w, bias, *options)
    sizes = []
    for i in range(rank):
        n, reach = x.shape[2 + i], dilation[i] * (w.shape[2 + i] - 1)
        if transposed:
            sizes.append((n - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i] + 1)
        else:
            sizes.append((n + 2 * padding[i] - reach - 1) // stride[i] + 1)
    channels = w.shape[1] * groups if transposed else w.shape[0]
    return torch.empty(x.shape[0], channels, *sizes, dtype=x.dtype, device="meta")


ALIKE = frozenset(
    """
    relu gelu silu sigmoid tanh add mul sub leaky_relu elu hardswish hardsigmoid hardtanh exp
    rsqrt sqrt neg sin cos softplus
    """.split()
)
SHAPES: dict[str, Callable[..., Any]] = {
    "native_batch_norm": _batch_norm_shape,
    "convolution": _convolution_shape,
}
"""Shapes of operators whose own meta functions are slow Python."""
