"""How many channels of predicted tensors are copies of others, and noise that makes none so."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wspace.hyper.graph.architecture import architecture_of
from wspace.space import WeightSpace


def channel_diversity(state: Mapping[str, Tensor], space: WeightSpace) -> dict[str, float]:
    """Distinct units over units, for every tensor with more than one entry for each.

    Repeating a tile makes units identical, and training cannot tell them apart again.

    Args:
        state: Tensors by name, ``(*shape)``.
        space: Their weight space.

    Returns:
        By name (ties once) a share: 1 if no two rows of the tensor, taken along the units of its
        result, are equal to the last bit.
    """
    out: dict[str, float] = {}
    for form in architecture_of(space).forms:
        if form.fan_in == 1 or form.out.size == 1 or form.name not in state:
            continue
        rows = form.canonical(state[form.name]).reshape(form.out.size, -1)
        out[form.name] = len(torch.unique(rows, dim=0)) / form.out.size
    return out


def with_noise(
    state: Mapping[str, Tensor],
    space: WeightSpace,
    share: float = 0.01,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """A state with normal noise on its matrices and tables: no two channels stay identical.

    What is published does this after the fact; unit codes make it unnecessary.

    Args:
        state: Predicted tensors by name.
        space: Their weight space.
        share: Deviation of the noise over the root mean square of each tensor.
        generator: Source of randomness.

    Returns:
        A new state; tied names share one tensor.
    """
    out = dict(state)
    for form in architecture_of(space).forms:
        x = state[form.name]
        if form.kind in ("matrix", "table"):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            x = x + share * x.detach().square().mean().sqrt() * noise
            out |= dict.fromkeys(form.names, x)
    return out
