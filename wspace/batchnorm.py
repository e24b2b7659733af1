"""Statistics of BatchNorm layers estimated anew, after a module's parameters were moved."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from wspace.errors import MeasureError, message
from wspace.restore import modes_of, put_modes

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches to estimate statistics with, more than once; a function gives them anew every time."""


@torch.no_grad()
def reestimate(module: nn.Module, batches: Batches, *, frozen: bool = False) -> int:
    """Estimates the statistics of BatchNorm layers anew: the mean over batches.

    As `torch.optim.swa_utils.update_bn`, except that only layers of batch normalisation are in
    training mode, so that dropout neither disturbs the statistics nor draws random numbers.

    Args:
        module: The module. All modes are put back.
        batches: Arguments of a call: a dict by name, of a tuple or list the first, else the batch.
        frozen: Also those of layers in evaluation mode. Otherwise these keep what they have:
            whoever trains with frozen statistics means it.

    Returns:
        Number of batches; 0, without asking for any, if nothing is to be estimated.

    Raises:
        MeasureError: If there are no batches.
    """
    layers = _estimated(module, frozen)
    if not layers:
        return 0
    device = next((x.device for x in (*module.parameters(), *module.buffers())), None)
    modes, momenta, count = modes_of(module), [m.momentum for m in layers], 0
    try:
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over batches, all of one weight
            layer.train()
        for batch in batches() if callable(batches) else batches:
            called(module, moved(batch, device))
            count += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        put_modes(modes)
    if not count:
        raise MeasureError(
            message(
                "no batches to estimate BatchNorm's statistics with",
                help="refresh=[batch, ...], or a function that gives batches anew",
            )
        )
    return count


def statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances, themselves, of the layers that `reestimate` estimates."""
    layers = _estimated(module, frozen=False)
    return [x for m in layers for x in (m.running_mean, m.running_var) if x is not None]


def _estimated(module: nn.Module, frozen: bool) -> list[BatchNorm]:
    """Layers that estimate statistics as they are trained; those frozen by ``eval()`` if asked."""
    return [
        m
        for m in module.modules()
        if isinstance(m, BatchNorm) and m.track_running_stats and (m.training or frozen)
    ]


def called(module: nn.Module, batch: Any) -> Any:
    """What a module returns for a batch: a dict by name, of a tuple or list the first, or else it.

    Args:
        module: The module.
        batch: Of a loader.

    Returns:
        Its output.
    """
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, tuple | list):
        return module(batch[0])
    return module(batch)


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on a device; as it is if None."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: moved(x, device) for k, x in batch.items()}
    if isinstance(batch, tuple | list):
        return [moved(x, device) for x in batch]
    return batch
