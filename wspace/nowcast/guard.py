"""Whether a jump is kept: a held loss before and after, and everything put back if it is not."""

import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from wspace.errors import NowcastError, message
from wspace.nowcast.history import copy_all

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches to re-estimate BatchNorm's statistics with; a function gives them anew for every jump."""


@dataclass(frozen=True)
class Guard:
    """Keeps a jump only if a held loss does not rise; else tries a shorter one.

    The loss is asked without gradients, with the module in evaluation mode; generators and buffers
    are put back. A loss that is not finite is never accepted, neither before nor after. With
    several processes the mean of their losses counts.

    Attributes:
        loss: Gives the loss of the module as it stands, on data held for this; always the same.
        shrink: The next horizon tried is ``max(1, int(k * shrink))``.
        attempts: Horizons tried at most.
        choose: ``"first"``: the longest that is accepted; ``"best"``: of all those tried, the one
            of least loss.
        tolerance: By how much the loss may rise.
    """

    loss: Callable[[], float | Tensor]
    shrink: float = 0.5
    attempts: int = 4
    choose: Literal["first", "best"] = "first"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            NowcastError: If one is impossible.
        """
        wrong = ""
        if not callable(self.loss):
            wrong = f"a loss that is a function\n  got {type(self.loss).__name__}"
        elif not 0 < self.shrink < 1:
            wrong = f"0 < shrink < 1\n  got {self.shrink}"
        elif self.attempts < 1:
            wrong = f"attempts of at least 1\n  got {self.attempts}"
        elif self.choose not in {"first", "best"}:
            wrong = f"choose of 'first' or 'best'\n  got {self.choose!r}"
        elif not (isfinite(self.tolerance) and self.tolerance >= 0):
            wrong = f"a tolerance of at least 0\n  got {self.tolerance}"
        if wrong:
            raise NowcastError(message("Guard: impossible options", expected=wrong))

    def horizons(self, longest: int) -> Iterator[int]:
        """Horizons to try, the longest first, each once.

        Args:
            longest: The first.

        Yields:
            At most `attempts` horizons.
        """
        k = longest
        for _ in range(self.attempts):
            yield k
            if k == 1:
                return
            k = max(1, int(k * self.shrink))

    def accepts(self, before: float, after: float) -> bool:
        """True if the loss after a jump is finite, and no higher than allowed."""
        return isfinite(before) and isfinite(after) and after <= before + self.tolerance


def measured(module: nn.Module, loss: Callable[[], float | Tensor]) -> float:
    """A loss without gradients, of the module in evaluation mode; buffers and modes are put back.

    Args:
        module: What the loss is of.
        loss: Gives it.

    Returns:
        The loss.
    """
    torch.clear_autocast_cache()  # it may hold parameters as they were
    buffers, modes = _buffers(module), _modes(module)
    try:
        module.eval()
        with torch.no_grad(), drawn_again(module):
            return float(loss())
    finally:
        _put_modes(modes)
        _put_buffers(buffers)
        torch.clear_autocast_cache()


@contextmanager
def drawn_again(module: nn.Module) -> Generator[None]:
    """Puts back the random generators: torch's (of all devices used), Python's and NumPy's.

    Args:
        module: It says which devices are used.

    Yields:
        Nothing.
    """
    numpy: Any = sys.modules.get("numpy")
    python, array = random.getstate(), numpy.random.get_state() if numpy else None
    devices = {x.device for x in (*module.parameters(), *module.buffers())}
    other = [d for d in devices if d.type in {"cuda", "xpu", "mps"}]
    kind = other[0].type if other else "cuda"
    try:
        with torch.random.fork_rng(other, device_type=kind):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array)


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
        self._buffers, self._modes = _buffers(module), _modes(module)

    def put_back(self) -> None:
        """Everything as it was, in place, bit for bit."""
        write(self._live, self._values)
        _put_buffers(self._buffers)
        _put_modes(self._modes)


def write(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into tensors, which stay where they are in memory.

    Args:
        live: The tensors.
        values: New values, by name.
    """
    copy_all([live[n] for n in values], list(values.values()))
    torch.clear_autocast_cache()


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers by name."""
    return {name: x.detach().clone() for name, x in module.named_buffers()}


@torch.no_grad()
def put_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies values into the buffers of these names."""
    for name, x in module.named_buffers():
        if name in values:
            x.copy_(values[name])


@torch.no_grad()
def reestimate(module: nn.Module, batches: Batches) -> int:
    """Estimates the statistics of BatchNorm layers anew: the mean over batches.

    As `torch.optim.swa_utils.update_bn`, except that only layers of batch normalisation are in
    training mode, so that dropout neither disturbs the statistics nor draws random numbers.

    Args:
        module: The module. All modes are put back.
        batches: Arguments of a call: a dict by name, of a tuple or list the first, else the batch.

    Returns:
        Number of batches; 0, without asking for any, if nothing is to be estimated.

    Raises:
        NowcastError: If there are no batches.
    """
    layers = [m for m in module.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    device = next(module.parameters()).device
    modes, momenta, count = _modes(module), [m.momentum for m in layers], 0
    try:
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over batches, all of one weight
            layer.train()
        for batch in batches() if callable(batches) else batches:
            _call(module, _moved(batch, device))
            count += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        _put_modes(modes)
    if not count:
        raise NowcastError(
            message(
                "Nowcaster: no batches to estimate BatchNorm's statistics with",
                help="refresh=[batch, ...], or a function that gives batches anew",
            )
        )
    return count


def statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of BatchNorm layers, themselves."""
    layers = [m for m in module.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    return [x for m in layers for x in (m.running_mean, m.running_var) if x is not None]


def _call(module: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        module(**batch)
    elif isinstance(batch, tuple | list):
        module(batch[0])
    else:
        module(batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _moved(x, device) for k, x in batch.items()}
    if isinstance(batch, tuple | list):
        return [_moved(x, device) for x in batch]
    return batch


Modes = list[tuple[nn.Module, bool]]
Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]


def _modes(module: nn.Module) -> Modes:
    return [(m, m.training) for m in module.modules()]


def _put_modes(modes: Modes) -> None:
    for m, training in modes:
        m.training = training


def _buffers(module: nn.Module) -> Buffers:
    return [
        (m, name, x, x.detach().clone())
        for m in module.modules()
        for name, x in m.named_buffers(recurse=False)
    ]


@torch.no_grad()
def _put_buffers(buffers: Buffers) -> None:
    for m, name, x, value in buffers:
        if getattr(m, name) is not x:  # a forward pass has put another in its place
            setattr(m, name, x)
        x.copy_(value)
