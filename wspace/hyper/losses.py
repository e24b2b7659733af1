"""Losses on generated states: nearness of weights up to symmetry, and nearness of functions.

Which symmetry brings one state to another is not found here: a function does that, such as
`wspace.align.match`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.action import State, Transform, act
from wspace.errors import HyperError, message
from wspace.hyper.call import call
from wspace.space import WeightSpace

Align = Callable[[State, State, WeightSpace], Transform]
"""From two states with the same batch axes, the transform that brings the second to the first."""


def orbit_loss(
    made: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    space: WeightSpace,
    *,
    align: Align,
    buffers: bool = False,
) -> Tensor:
    r"""Mean square of what is left between states when a symmetry has moved one to the other.

    With :math:`t` what `align` finds, :math:`\sum_k |\theta_k - (t \cdot \theta^*)_k|^2 / n`. The
    transform is held while the gradient is taken, which is the gradient of the minimum wherever
    that is differentiable. Two networks that differ by a symmetry are at distance 0, while the
    plain mean square would pull a generator to the average of all of them.

    Args:
        made: Generated states, ``(*batch, *shape)``; gradients flow into them.
        wanted: States to be near to, with the same batch axes.
        space: Weight space of both.
        align: For example `wspace.align.match`; others pass their options by
            `functools.partial`.
        buffers: Whether float buffers count.

    Returns:
        A loss for every network, ``(*batch)``.

    Raises:
        HyperError: If the batch axes differ. SpaceMismatch: If a state does not fit the space.

    Example:
        >>> import torch, wspace
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space, state = wspace.trace(net, torch.zeros(1, 3)), net.state_dict()
        >>> g = torch.Generator().manual_seed(0)
        >>> moved = wspace.act(wspace.sample(space, generator=g), state, space)
        >>> float(orbit_loss(moved, state, space, align=wspace.align.match))
        0.0
    """
    for state in (made, wanted):
        space.validate(state)
    params = [p for p in space.params if buffers or not p.buffer]
    lead = [made[p.name].shape[: made[p.name].dim() - len(p.axes)] for p in params[:1]]
    other = [wanted[p.name].shape[: wanted[p.name].dim() - len(p.axes)] for p in params[:1]]
    if lead != other:
        raise HyperError(
            message("orbit_loss: other batch axes", expected=str(lead), got=str(other))
        )
    names = {p.name for p in space.params}
    still = {n: x.detach() for n, x in made.items() if n in names}
    goal = {n: x.detach() for n, x in wanted.items() if n in names}
    with torch.no_grad():
        moved = act(align(still, goal, space), goal, space)
    count = sum(p.numel for p in params)
    axes = len(lead[0])
    parts = [(made[p.name] - moved[p.name]).square().flatten(axes).sum(-1) for p in params]
    return torch.stack(parts).sum(0) / count


def functional_loss(
    module: nn.Module,
    made: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *args: Any,
    divergence: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> Tensor:
    """How far the answers of generated networks are from those of others, on shared inputs.

    Args:
        module: The architecture; its own weights are not used where states have them.
        made: Generated states, at most one batch axis; gradients flow into them.
        wanted: States whose function is wanted.
        args: Inputs of the module, the same for all networks.
        divergence: From the answers of both, made first, to a number.

    Returns:
        The number.
    """
    answers = call(module, made, args, inputs="shared")
    with torch.no_grad():
        goals = call(module, wanted, args, inputs="shared")
    return divergence(answers, goals)
