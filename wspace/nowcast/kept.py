"""What a jump must leave as it was: parameters, buffers, modes and random generators."""

import random
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wspace.nowcast.history import copy_all
from wspace.nowcast.ranks import chunks

ENTRIES = 1 << 24
"""Entries that are written at once where nothing else holds what was there before."""

Modes = list[tuple[nn.Module, bool]]
Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]


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


# ----------------------------------------------------------------- random generators


@contextmanager
def drawn_again(module: nn.Module, generators: Sequence[torch.Generator] = ()) -> Generator[None]:
    """Puts back the random generators: torch's (of all devices used), Python's and NumPy's.

    Args:
        module: It says which devices are used.
        generators: Others to put back.

    Yields:
        Nothing.
    """
    numpy: Any = sys.modules.get("numpy")
    python, array = random.getstate(), numpy.random.get_state() if numpy else None
    devices = {x.device for x in (*module.parameters(), *module.buffers())}
    other = [d for d in devices if d.type in {"cuda", "xpu", "mps"}]
    kind = other[0].type if other else "cuda"
    states = [(g, g.get_state()) for g in generators]
    try:
        with torch.random.fork_rng(other, device_type=kind):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array)
        for generator, state in states:
            generator.set_state(state)


def generators_of(batches: Any) -> list[torch.Generator]:
    """Random generators that a `DataLoader` draws from, if it has its own.

    Args:
        batches: A loader, or anything else.

    Returns:
        Those of the loader and of its samplers.
    """
    batch_sampler = getattr(batches, "batch_sampler", None)
    holders = [
        batches,
        getattr(batches, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    found = [getattr(x, "generator", None) for x in holders]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


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


# ------------------------------------------------------------------ buffers and modes


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers by name."""
    return {name: _once(x).clone() for name, x in module.named_buffers()}


@torch.no_grad()
def put_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies what `copied_buffers` gave into the buffers of these names."""
    for name, x in module.named_buffers():
        if name in values:
            _once(x).copy_(values[name])


def modes_of(module: nn.Module) -> Modes:
    """Every part of a module, and whether it is in training mode."""
    return [(m, m.training) for m in module.modules()]


def put_modes(modes: Modes) -> None:
    """Puts back what `modes_of` gave."""
    for m, training in modes:
        m.training = training


def buffers_of(module: nn.Module) -> Buffers:
    """Every buffer of a module: where it is, itself, and a copy."""
    return [
        (m, name, x, _once(x).clone())
        for m in module.modules()
        for name, x in m.named_buffers(recurse=False)
    ]


@torch.no_grad()
def put_back(buffers: Buffers) -> None:
    """Puts back what `buffers_of` gave, also where another took its place."""
    for m, name, x, value in buffers:
        if getattr(m, name) is not x:  # a forward pass has put another in its place
            setattr(m, name, x)
        _once(x).copy_(value)


def _once(x: Tensor) -> Tensor:
    """A view of a tensor with every entry of memory once, if it is expanded; else the tensor."""
    x = x.detach()
    if x.layout != torch.strided:
        return x
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x
