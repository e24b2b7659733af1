"""A module put back as it was: modes, buffers, and the random generators it may draw from.

For everything that runs a module to measure it. Parameters are not touched here.
"""

import random
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Modes = list[tuple[nn.Module, bool]]
Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]


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
        (m, name, x, entries_once(x).clone())
        for m in module.modules()
        for name, x in m.named_buffers(recurse=False)
    ]


@torch.no_grad()
def put_back(buffers: Buffers) -> None:
    """Puts back what `buffers_of` gave, also where another took its place."""
    for m, name, x, value in buffers:
        if getattr(m, name) is not x:  # a forward pass has put another in its place
            setattr(m, name, x)
        entries_once(x).copy_(value)


def entries_once(x: Tensor) -> Tensor:
    """A view of a tensor with every entry of memory once, if it is expanded; else the tensor."""
    x = x.detach()
    if x.layout != torch.strided:
        return x
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x
