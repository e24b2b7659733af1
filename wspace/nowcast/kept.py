"""What a jump must leave as it was: parameters and buffers."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from wspace.nowcast.history import copy_all
from wspace.nowcast.ranks import chunks
from wspace.restore import buffers_of, entries_once, modes_of, put_back, put_modes

ENTRIES = 1 << 24
"""Entries that are written at once where nothing else holds what was there before."""


def together_with(module: nn.Module, other: nn.Module | None) -> nn.Module:
    """One module of which both are part; neither is changed.

    Args:
        module: A module.
        other: Another, perhaps around it or within it.

    Returns:
        Whichever contains the other, or else a list of both.
    """
    if other is None or any(m is other for m in module.modules()):
        return module
    if any(m is module for m in other.modules()):
        return other
    return nn.ModuleList([module, other])


# --------------------------------------------------------------- parameters and all


class Kept:
    """The parameters, buffers and modes of a module as they were, to be put back.

    Args:
        module: The module.
        live: Local tensors that may be changed, by name.
        device: Where the copies are; beside each tensor if None.
    """

    def __init__(
        self, module: nn.Module, live: Mapping[str, Tensor], device: torch.device | None
    ) -> None:
        self._live = dict(live)
        self._values = {
            n: torch.empty_like(x, device=device or x.device).copy_(x) for n, x in live.items()
        }
        self._buffers, self._modes = buffers_of(module), modes_of(module)

    def put_back(self) -> None:
        """Everything as it was, in place, bit for bit."""
        write(self._live, self._values)
        put_back(self._buffers)
        put_modes(self._modes)


def write(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into tensors, which stay where they are in memory.

    Args:
        live: The tensors.
        values: New values, by name.
    """
    copy_all([live[n] for n in values], list(values.values()))
    torch.clear_autocast_cache()


def write_whole(
    live: Mapping[str, Tensor],
    values: dict[str, Tensor],
    together: Callable[[Callable[[], None]], None],
) -> None:
    """As `write`, all of them or, if anything comes between, none.

    Former values take the place of new ones as these are used up, so that both together are never
    much more than one copy.

    Args:
        live: The tensors.
        values: New values, by name; emptied.
        together: Does work that must succeed in all processes; see `Ranks.together`.
    """
    old: dict[str, Tensor] = {}

    def work() -> None:
        for names in chunks([(n, live[n]) for n in values], ENTRIES):
            old.update({n: live[n].detach().clone() for n in names})
            copy_all([live[n] for n in names], [values[n] for n in names])
            for n in names:
                del values[n]

    try:
        together(work)
    except BaseException:
        write(live, old)
        raise
    torch.clear_autocast_cache()


# ---------------------------------------------------------------------------- buffers


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers by name."""
    return {name: entries_once(x).clone() for name, x in module.named_buffers()}


@torch.no_grad()
def put_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies what `copied_buffers` gave into the buffers of these names."""
    for name, x in module.named_buffers():
        if name in values:
            entries_once(x).copy_(values[name])
