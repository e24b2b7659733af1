"""Windows of training trajectories: a few past states, and the ones that came later.

Owns how a predictor's training examples are cut out of the states of a zoo and brought to the scale
that it works in: less the mean, over the deviation of all entries of a tensor in all past states.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wspace.errors import ZooError, message
from wspace.space import WeightSpace

EPSILON = 1e-6
"""Added to deviations, as predictors do."""


@dataclass(frozen=True)
class Windows:
    """How windows are cut.

    Attributes:
        strides: Smallest and largest spacing of the states of a window, in states of the zoo; each
            window draws one of those between, so that a predictor serves more than one period.
        each: Windows of every network in a batch.
        entries: Entries of each tensor that a predictor of single entries is trained on at a time,
            drawn anew for every batch; graph predictors see all.
        mirror: Whether such a predictor sees half of the windows with all signs reversed: nothing
            in training tells a weight from its negative.
        smooth: Instead of a later state, the target is the mean of the states up to so many
            spacings around it, as far as the trajectory goes on both sides: where training is
            heading, without the noise of its steps. Near horizons then ask for what the window
            itself says of its noise. 0 for the state, as published.
    """

    strides: tuple[int, int] = (1, 4)
    each: int = 4
    entries: int = 256
    mirror: bool = True
    smooth: int = 0


class Cut(NamedTuple):
    """Where windows lie.

    Attributes:
        row: Network of every window, ``(n,)``.
        past: Places of its past states on the time axis, oldest first, ``(n, c)``.
        ahead: Places of the states 1, 2 … spacings after the last, ``(n, longest)``; where the
            trajectory has ended, its last.
        known: Whether the trajectory goes so far, ``(n, longest)``.
        around: States on either side of which the target is a mean, ``(n, longest)``.
    """

    row: Tensor
    past: Tensor
    ahead: Tensor
    known: Tensor
    around: Tensor


class Scaled(NamedTuple):
    """Windows of one tensor, scaled.

    Attributes:
        name: Of the tensor.
        past: ``(n, c, entries)``.
        ahead: Targets ``(n, longest, entries)``.
        chosen: Which entries of the flat tensor these are, ``(entries,)``; None for all.
    """

    name: str
    past: Tensor
    ahead: Tensor
    chosen: Tensor | None


def cut(
    rows: int, states: int, how: Windows, lengths: tuple[int, int], generator: torch.Generator
) -> Cut:
    """Draws windows.

    Args:
        rows: Networks.
        states: Length of the time axis.
        how: How they are cut.
        lengths: Number of past states, and longest horizon.
        generator: On the CPU.

    Returns:
        `how.each` windows of every network, each with at least one state ahead.

    Raises:
        ZooError: If the trajectories are too short for the smallest stride.
    """
    context, longest = lengths
    low, high = how.strides
    most = min(high, (states - 1) // context)
    if most < low or low < 1:
        raise ZooError(
            message(
                f"windows: trajectories of {states} states are too short",
                expected=f"at least {max(1, low) * context + 1}: {context} past ones and one more, "
                f"{low} apart",
                help="build a zoo with more states, or choose smaller strides",
            )
        )
    n = rows * how.each
    stride = torch.randint(low, most + 1, (n,), generator=generator)
    room = states - context * stride  # starts from which one state ahead is left
    start = (torch.rand(n, generator=generator) * room).long().clamp(max=states - 1)
    start = torch.minimum(start, room - 1)
    past = start[:, None] + stride[:, None] * torch.arange(context)
    ahead = past[:, -1:] + stride[:, None] * torch.arange(1, longest + 1)
    row, known = torch.arange(rows).repeat_interleave(how.each), ahead < states
    ahead = ahead.clamp(max=states - 1)
    around = torch.minimum(stride[:, None] * how.smooth, ahead).minimum(states - 1 - ahead)
    return Cut(row, past, ahead, known, around)


def reach(states: int, how: Windows, context: int) -> int:
    """The longest horizon of which a trajectory knows the state, in spacings.

    Args:
        states: Length of the time axis; long enough for a window.
        how: How windows are cut.
        context: Number of past states.

    Returns:
        That of the narrowest window, at the beginning.
    """
    return (states - 1) // how.strides[0] - (context - 1)


def later(x: Tensor, where: Cut) -> Tensor:
    """Targets: the states ahead, or means around them.

    Args:
        x: Trajectories, ``(rows, states, entries)``.
        where: From `cut`.

    Returns:
        ``(n, longest, entries)``.
    """
    row, ahead, around = (i.to(x.device) for i in (where.row[:, None], where.ahead, where.around))
    if not bool(where.around.any()):
        return x[row, ahead]
    start = x[:, :1]  # sums of differences from it are exact enough
    sums = torch.cat([torch.zeros_like(start), (x - start).cumsum(1)], 1)
    count = (2 * around + 1)[..., None].to(x.dtype)
    return start[row[:, 0]] + (sums[row, ahead + around + 1] - sums[row, ahead - around]) / count


def deviation(past: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of every window over all its entries and states.

    Args:
        past: ``(n, c, entries)``.

    Returns:
        ``(n,)`` each; the deviation of one number is 0.
    """
    flat = past.flatten(1)
    spread, mean = torch.std_mean(flat, 1, correction=1 if flat.shape[1] > 1 else 0)
    return mean, spread


def scaled(
    values: Mapping[str, Tensor],
    names: Sequence[str],
    where: Cut,
    *,
    entries: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Scaled]:
    """Windows of all tensors.

    Args:
        values: Trajectories ``(rows, states, *shape)`` by name.
        names: Which tensors.
        where: From `cut`.
        entries: At most so many entries of each tensor; None for all.
        generator: Draws them; on the CPU.

    Yields:
        One tensor after another. Means and deviations are those of the whole tensor.
    """
    for name in names:
        x = values[name].flatten(2) if values[name].dim() > 2 else values[name][..., None]
        before = x[where.row.to(x.device)[:, None], where.past.to(x.device)]
        mean, spread = deviation(before)
        chosen = None
        if entries is not None and x.shape[2] > entries:
            chosen = torch.randperm(x.shape[2], generator=generator)[:entries].to(x.device)
            x, before = x[..., chosen], before[..., chosen]
        mean, factor = mean[:, None, None], (spread + EPSILON)[:, None, None]
        yield Scaled(name, (before - mean) / factor, (later(x, where) - mean) / factor, chosen)


def trained_names(space: WeightSpace) -> list[str]:
    """Names of the floating-point parameters of a space, buffers left out."""
    return [p.name for p in space.params if not p.buffer and "float" in p.dtype]


def line(context: int, longest: int) -> Tensor:
    """Weights of past values that extend their least-squares line, ``(longest, context)``."""
    t = torch.arange(context, dtype=torch.float64)
    t = t - t.mean()
    horizon = torch.arange(1, longest + 1, dtype=torch.float64)[:, None]
    spread = t.square().sum().clamp(min=1)
    return (1 / context + t * (t[-1] + horizon) / spread).float()
