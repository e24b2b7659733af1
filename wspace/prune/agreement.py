"""Modules run on the example inputs, and how far their outputs are apart."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from wspace.restore import drawn_again
from wspace.trace.sandbox import (
    attributes_restored,
    dense_experts,
    evaluation_mode,
    tensors_in,
)

Example = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword inputs."""
POWERS = (0.5, -0.5, 1.0, -1.0)
"""Powers of the share of units left by which code may scale what it computes from them."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_LOW = 5e-2


@torch.no_grad()
def outputs(
    module: nn.Module, example: Example, state: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """What a module returns in evaluation mode; it is left as it was.

    Args:
        module: The module.
        example: Its inputs, not modified.
        state: Parameters to run it with instead of its own.

    Returns:
        The tensors among its outputs.
    """
    with ExitStack() as stack:
        for context in (evaluation_mode, attributes_restored, drawn_again, dense_experts):
            stack.enter_context(context(module))
        torch.manual_seed(0)
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (example[0], dict(example[1])))
        if state:
            found = functional_call(module, dict(state), args, kwargs)
        else:
            found = module(*args, **kwargs)
        return [t.detach() for t in tensors_in(found)]


def gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference of any output, relative to the largest entry of that output."""
    gaps = [0.0]
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if (x.is_floating_point() or x.is_complex()) and x.numel():
            scale = float(x.abs().nan_to_num().max()) or 1.0
            gaps.append(float((x - y).abs().nan_to_num().max()) / scale)
    return max(gaps)


def agree(a: Sequence[Tensor], b: Sequence[Tensor], module: nn.Module) -> bool:
    """Whether outputs are equal but for rounding, in the precision of a module."""
    dtype = next((x.dtype for x in module.parameters()), torch.float32)
    return gap(a, b) <= _TOLERANCE.get(dtype, _LOW)
