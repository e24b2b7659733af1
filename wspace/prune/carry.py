"""An optimizer that goes on with a module that was pruned while it trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wspace.errors import PruneError, message
from wspace.prune.restriction import Restriction


def carry(
    optimizer: torch.optim.Optimizer, module: nn.Module, few: Restriction, small: nn.Module
) -> None:
    """Lets an optimizer go on with a small module: same groups and options, moments cut.

    Args:
        optimizer: An optimizer of `module`, changed in place.
        module: The large module.
        few: What is kept.
        small: The small module.

    Raises:
        PruneError: If the optimizer holds a parameter that is not of the module.
    """
    large = dict(module.named_parameters(remove_duplicate=False))
    names = {id(x): name for name, x in large.items()}
    there = dict(small.named_parameters(remove_duplicate=False))
    wrong = [
        f"a parameter of shape {tuple(x.shape)}"
        for group in optimizer.param_groups
        for x in group["params"]
        if id(x) not in names
    ]
    if wrong:
        raise PruneError(
            message(
                "carry: the optimizer holds parameters that are not of the module",
                expected="an optimizer of the pruned part alone",
                got=wrong,
            )
        )
    former = dict(optimizer.state)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        stay: list[nn.Parameter] = []
        for x in group["params"]:
            name = names[id(x)]
            if (new := few.names.get(name, "")) not in there:
                continue
            stay.append(there[new])
            if x in former:
                optimizer.state[there[new]] = _cut(former[x], x, few, name)
        group["params"] = stay


def _cut(state: Mapping[str, Any], x: Tensor, few: Restriction, name: str) -> dict[str, Any]:
    """What an optimizer knows of a parameter, for the small one."""
    p = few.large.by_name[name]
    return {
        key: few.cut(p, value).clone()
        if isinstance(value, Tensor) and value.shape == x.shape
        else value
        for key, value in state.items()
    }
