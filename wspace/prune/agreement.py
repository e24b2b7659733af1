"""Modules run on the example inputs, and how far their outputs are apart."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from wspace.restore import drawn_again
from wspace.trace.sandbox import (
    attributes_restored,
    dense_experts,
    double_precision,
    evaluation_mode,
    state_restored,
    tensors_in,
)

Example = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword inputs."""
POWERS = (0.5, -0.5, 1.0, -1.0)
"""Powers of the share of units left by which code may scale what it computes from them."""
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
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
        stack.enter_context(state_restored(module, values=False))
        stack.enter_context(_tables_restored(module))
        if next((x.dtype for x in module.parameters()), None) == torch.float64:
            stack.enter_context(double_precision())
        torch.manual_seed(0)
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (example[0], dict(example[1])))
        if state:
            found = functional_call(module, dict(state), args, kwargs)
        else:
            found = module(*args, **kwargs)
        return [t.detach() for t in tensors_in(found)]


@contextmanager
def _tables_restored(module: nn.Module) -> Generator[None]:
    """Context after which tables that are renormalised when they are read are as before."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables = [m.weight for m in module.modules() if isinstance(m, kinds) and m.max_norm is not None]
    before = [x.detach().clone() for x in tables]
    try:
        yield
    finally:
        for x, old in zip(tables, before, strict=True):
            x.data.copy_(old)


def gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference of any output, relative to the largest entry of that output.

    Args:
        a: Outputs.
        b: Other outputs, as many.

    Returns:
        The difference; infinite where shapes, whole numbers, or the places of numbers that are not
        finite differ.
    """
    gaps = [0.0]
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        if not (x.is_floating_point() or x.is_complex()):
            gaps.append(0.0 if torch.equal(x, y) else float("inf"))
        elif x.numel():
            scale = float(x.abs().nan_to_num(0, 0, 0).max()) or 1.0
            gaps.append(float((x - y).abs().nan_to_num(0, 0, 0).max()) / scale)
    return max(gaps)


def agree(a: Sequence[Tensor], b: Sequence[Tensor], module: nn.Module) -> bool:
    """Whether outputs are equal but for rounding, in the precision of a module."""
    return agrees(gap(a, b), module)


def agrees(difference: float, module: nn.Module) -> bool:
    """Whether a relative difference is rounding, in the precision of a module."""
    dtype = next((x.dtype for x in module.parameters()), torch.float32)
    return difference <= _TOLERANCE.get(dtype, _LOW)
