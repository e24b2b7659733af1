"""When and how a training run jumps, and what is noted of each jump."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.optim import Optimizer

from wspace.batchnorm import Batches
from wspace.errors import NowcastError, message
from wspace.nowcast.drift import Drift
from wspace.nowcast.forecast import DTYPES
from wspace.nowcast.guard import Guard
from wspace.nowcast.predictor import Predictor
from wspace.nowcast.ranks import Group
from wspace.nowcast.schedule import Decay, Horizon, horizon_at

PERIOD, DRIFTING = 1000, 10
"""Steps from jump to jump, if nothing else is said: with a predictor, and with a drift."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """When and how to jump.

    Attributes:
        period: Optimizer steps from jump to jump; a multiple of the predictor's context. If None,
            1000, or 10 with a `Drift`.
        context: Past states; the predictor's if None.
        horizon: How far, in spacings of ``period // context`` steps: always the same, decaying
            over the run, or a function of the step.
        total_steps: Optimizer steps of the whole run; needed by horizons that decay.
        guard: Keeps a jump only if a held loss does not rise. Without, every jump is kept.
        moments: The optimizer's state of what has moved: ``"keep"``, or ``"reset"`` to none.
        refresh: Batches to re-estimate BatchNorm's statistics with after every jump, before it is
            judged; a function gives them anew. Without, no buffer ever changes.
        history_device: Where past states are kept; beside the parameters if None.
        history_dtype: As what. With less precision than the parameters', a jump is the movement
            predicted from rounded states, added to the exact parameters; moves that are small
            against the rounding are lost.
        topology: For predictors that know the wiring: ``"traced"`` or ``"published"``.
        on_error: What follows if a jump fails: ``"skip"`` goes on without it (the first time with a
            warning, always with an entry in the log), ``"raise"`` raises. The model is as before.
        process_group: Processes that train the module together; all if None.
        alone: True if this process trains by itself, whatever other processes there are.
    """

    period: int | None = None
    context: int | None = None
    horizon: Horizon = Decay()
    total_steps: int | None = None
    guard: Guard | None = None
    moments: Literal["keep", "reset"] = "keep"
    refresh: Batches | None = None
    history_device: torch.device | str | None = None
    history_dtype: torch.dtype | None = None
    topology: str = "traced"
    on_error: Literal["skip", "raise"] = "skip"
    process_group: Group = None
    alone: bool = False

    def checked(self, predictor: Predictor, optimizer: Optimizer) -> "Settings":
        """These settings for a predictor, or an error that says what is impossible.

        Args:
            predictor: It says the context, and the longest horizon.
            optimizer: What is trained with.

        Returns:
            Settings with the context filled in, and no horizon longer than the predictor's.

        Raises:
            NowcastError: If a setting is impossible.
        """
        context, horizon, wrong = predictor.context, self.horizon, ""
        period = PERIOD if self.period is None else self.period
        if self.context not in {None, context}:
            wrong = f"context={context}, which {type(predictor).__name__} needs\n" + (
                f"  got {self.context}"
            )
        elif period < 1 or period % context:
            wrong = f"a period that is a multiple of the context {context}\n  got {period}"
        elif self.moments == "reset" and isinstance(optimizer, torch.optim.Adagrad):
            wrong = "moments='keep': Adagrad sets up its state once, when it is made"
        elif isinstance(horizon, int) and not 0 <= horizon <= predictor.longest:
            wrong = f"a horizon of 0 to {predictor.longest}\n  got {horizon}"
        elif self.history_dtype is not None and self.history_dtype not in DTYPES:
            wrong = "a floating-point history of 16, 32 or 64 bits\n" + (
                f"  got {self.history_dtype}"
            )
        wrong = wrong or self._wrong()
        if wrong:
            raise NowcastError(message("Nowcaster: impossible settings", expected=wrong))
        if isinstance(horizon, Decay):
            horizon = replace(horizon, longest=min(horizon.longest, predictor.longest))
            horizon_at(horizon, period, period, self.total_steps)
        return replace(self, period=period, context=context, horizon=horizon)

    def drifting(self, drift: Drift) -> "Settings":
        """These settings for a drift, or an error that says what is impossible.

        Args:
            drift: It says how far jumps go.

        Returns:
            Settings with the period filled in.

        Raises:
            NowcastError: If a setting is impossible, or has no meaning for a drift.
        """
        period = DRIFTING if self.period is None else self.period
        given = {
            "horizon": self.horizon != Decay(),
            "context": self.context is not None,
            "topology": self.topology != "traced",
            "moments": self.moments != "keep",
            "history_dtype": self.history_dtype is not None,
        }
        needless = [name for name, is_given in given.items() if is_given]
        wrong = ""
        if needless:
            wrong = f"no {needless[0]}, which a Drift does not have; see its own options"
        elif period < 1 or period % drift.every:
            wrong = f"a period that is a multiple of Drift.every={drift.every}\n  got {period}"
        else:
            wrong = self._wrong()
        if wrong:
            raise NowcastError(message("Nowcaster: impossible settings", expected=wrong))
        return replace(self, period=period)

    def _wrong(self) -> str:
        """What is impossible with whatever predictor."""
        if self.moments not in {"keep", "reset"}:
            return f"moments of 'keep' or 'reset'\n  got {self.moments!r}"
        if self.on_error not in {"skip", "raise"}:
            return f"on_error of 'skip' or 'raise'\n  got {self.on_error!r}"
        if isinstance(self.refresh, Iterator):
            return "batches that can be read again: a list, a loader, or a function\n" + (
                f"  got a {type(self.refresh).__name__}, which is empty after the first jump"
            )
        return ""

    @property
    def interval(self) -> int:
        """The period, once it is known."""
        return PERIOD if self.period is None else self.period


@dataclass(frozen=True)
class Jump:
    """One entry of the log.

    Attributes:
        step: Optimizer steps before it.
        tried: Horizons tried.
        horizon: The one that was kept; 0 if none. In spacings of the history; with a `Drift` in
            periods.
        before: The guard's loss before; None without a guard. With a `Drift`, of the average when
            it was last judged.
        after: And after, of the horizon kept, or else of the last tried.
        seconds: How long it took.
        reason: ``"accepted"``, or why nothing has moved.
    """

    step: int
    tried: tuple[float, ...] = ()
    horizon: float = 0
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    reason: str = ""
