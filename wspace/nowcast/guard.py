"""Whether a jump is kept: a held loss before and after, and everything put back if it is not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wspace import batchnorm
from wspace.batchnorm import Batches
from wspace.errors import MeasureError, NowcastError, message
from wspace.nowcast.ranks import Ranks, reshard
from wspace.restore import buffers_of, drawn_again, generators_of, modes_of, put_back, put_modes


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
        module: What the loss runs, if that is more than the module whose parameters move: the model
            around it, or another beside it. It is evaluated, and put back, as the module is.
    """

    loss: Callable[[], float | Tensor]
    shrink: float = 0.5
    attempts: int = 4
    choose: Literal["first", "best"] = "first"
    tolerance: float = 0.0
    module: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            NowcastError: If one is impossible.
        """
        wrong, around = "", cast("Any", self.module)
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
        elif not (around is None or isinstance(around, nn.Module)):
            wrong = f"a module that is an nn.Module\n  got {type(around).__name__}"
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

    Raises:
        NowcastError: If the loss is not one number.
    """
    torch.clear_autocast_cache()  # it may hold parameters as they were
    buffers, modes = buffers_of(module), modes_of(module)
    try:
        module.eval()
        with torch.no_grad(), drawn_again(module):
            found = loss()
    finally:
        put_modes(modes)
        put_back(buffers)
        torch.clear_autocast_cache()
    if isinstance(found, Tensor) and found.numel() != 1:
        raise NowcastError(
            message("Guard: the loss is not one number", got=f"shape {tuple(found.shape)}",
                    help="take its mean")
        )  # fmt: skip
    return float(found)


def refreshed(module: nn.Module, outer: nn.Module, batches: Batches, ranks: Ranks) -> None:
    """Estimates BatchNorm's statistics anew; no generator is left changed.

    Args:
        module: The module whose layers they are.
        outer: All that may be run.
        batches: Arguments of calls.
        ranks: The processes; statistics are averaged over them.

    Raises:
        NowcastError: If there are no batches.
    """
    try:
        with drawn_again(outer, generators_of(batches)):  # always the same
            count = ranks.together(lambda: reestimate(module, batches))
    finally:
        reshard(module)
    if count and ranks.several:
        for x in batchnorm.statistics(module):
            x.copy_(ranks.mean_of(x))


def reestimate(module: nn.Module, batches: Batches) -> int:
    """As `wspace.batchnorm.reestimate`, of layers in training mode.

    Args:
        module: The module.
        batches: Arguments of calls.

    Returns:
        Number of batches.

    Raises:
        NowcastError: If there are no batches.
    """
    try:
        return batchnorm.reestimate(module, batches)
    except MeasureError as error:
        raise NowcastError(str(error)) from error
