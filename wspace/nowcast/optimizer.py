"""`Nowcaster`: any optimizer, with jumps ahead. One changed line in a training loop."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from wspace.batchnorm import Batches
from wspace.errors import NowcastError, message
from wspace.nowcast.drift import Drift
from wspace.nowcast.drifting import follower
from wspace.nowcast.guard import Guard
from wspace.nowcast.predictor import Predictor
from wspace.nowcast.ranks import Group
from wspace.nowcast.schedule import DECAY, Horizon
from wspace.nowcast.settings import Jump, Settings
from wspace.space import WeightSpace

KEY = "nowcast"
"""Entry of the state dict beside the optimizer's own."""


class Nowcaster(Optimizer):
    """An optimizer that, every `period` steps, moves parameters to where they are heading.

    Its parameter groups and state are those of the optimizer it is made of, so learning rates,
    schedulers, gradient scalers and hooks work as before. Only real steps count: neither
    micro-batches of gradient accumulation nor steps that a gradient scaler skips. Between jumps,
    without jumps that are kept, and at horizon 0 training is the plain optimizer's, bit for bit.

    A jump moves the parameters that `Follower` says, in place; buffers stay unless `refresh` is
    given. It is made whole or not at all: if it fails or is rejected, parameters, buffers, modes,
    random generators and the optimizer's state are as before. A parameter that is added, frozen or
    replaced during a window moves again in the next.

    The state dict is the optimizer's with one entry more. A plain optimizer's state dict can be
    loaded (counting and history start afresh), and this one by the plain optimizer.

    With DDP the first process keeps the history, predicts, and shares the outcome; the guard's
    losses are averaged. With `fully_shard` each keeps its part. `torch.distributed.checkpoint`'s
    ``get_optimizer_state_dict`` leaves the entry out: save ``nowcaster.core.state_dict()`` too.

    Args:
        optimizer: The optimizer that makes the steps.
        module: The module that it trains.
        space: Its weight space, for predictors that know the wiring; they trace if None.
        predictor: Says where parameters are heading; or a `Drift`.
        period: See `Settings`, as for all that follow.
        context: Past states.
        horizon: How far a jump goes.
        total_steps: Length of the run.
        guard: Judges jumps.
        moments: Whether the optimizer's state of moved parameters is kept.
        refresh: Batches for BatchNorm.
        history_device: Where past states are kept.
        history_dtype: As what.
        topology: For predictors that know the wiring.
        on_error: What follows if a jump fails.
        process_group: Processes that train together.
        alone: True if this process trains by itself.

    Attributes:
        base: The optimizer.
        core: What follows its steps.

    Raises:
        NowcastError: If settings are impossible, or module and optimizer do not belong together.

    Example:
        >>> from wspace.nowcast import LinearFit
        >>> model = nn.Linear(3, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = Nowcaster(base, model, None, LinearFit(), period=10, horizon=2)
        >>> for _ in range(10):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.jumps[0].step, optimizer.jumps[0].horizon, optimizer.jumps[0].reason
        (10, 2, 'accepted')
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        space: WeightSpace | None = None,
        predictor: Predictor | Drift | None = None,
        *,
        period: int | None = None,
        context: int | None = None,
        horizon: Horizon = DECAY,
        total_steps: int | None = None,
        guard: Guard | None = None,
        moments: Literal["keep", "reset"] = "keep",
        refresh: Batches | None = None,
        history_device: torch.device | str | None = None,
        history_dtype: torch.dtype | None = None,
        topology: str = "traced",
        on_error: Literal["skip", "raise"] = "skip",
        process_group: Group = None,
        alone: bool = False,
    ) -> None:
        settings = Settings(
            period=period,
            context=context,
            horizon=horizon,
            total_steps=total_steps,
            guard=guard,
            moments=moments,
            refresh=refresh,
            history_device=history_device,
            history_dtype=history_dtype,
            topology=topology,
            on_error=on_error,
            process_group=process_group,
            alone=alone,
        )
        self.base = optimizer
        chosen = _given(optimizer, predictor, guard)
        self.core = follower(optimizer, module, space, chosen, settings)
        super().__setstate__({})  # hooks and profiling of an Optimizer, without groups of its own

    # ------------------------------------------------------------ shared with the optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The optimizer's own."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's own."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; they take part in jumps from the next window on.

        Args:
            param_group: As for the optimizer.
        """
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's.

        Args:
            set_to_none: Whether gradients become None rather than zero.
        """
        self.base.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A step of the optimizer, and after every `period` of them a jump.

        Args:
            closure: As for the optimizer.
            **options: As for the optimizer.

        Returns:
            What the optimizer's step gives: the closure's loss, or None.
        """
        self.core.before_step()
        loss = self.base.step(**options) if closure is None else self.base.step(closure, **options)
        self.core.after_step()
        return loss

    # ------------------------------------------------------------ jumps

    @property
    def jumps(self) -> list[Jump]:
        """The jumps so far, also those that were not kept."""
        return self.core.log

    @property
    def steps(self) -> int:
        """Real steps of the optimizer so far."""
        return self.core.step

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the module has its running averages: to be validated or saved.

        For a `Drift`. Afterwards parameters and buffers are as before, bit for bit. BatchNorm's
        statistics are estimated for the averages if `refresh` is given.

        Returns:
            A context; the optimizer cannot step within it.

        Raises:
            NowcastError: If no averages are kept, or within another such context.
        """
        return self.core.averaged()

    def finish(self) -> None:
        """Gives the module its running averages for good, at the end of a run with a `Drift`.

        Raises:
            NowcastError: If no averages are kept, or within `averaged`.
        """
        self.core.finish()

    # ------------------------------------------------------------ resumption and copies

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict, and under ``"nowcast"`` steps, history and log."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        found = {**self.base.state_dict(), KEY: self.core.state_dict()}
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, found)
            found = found if changed is None else changed
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; what follows is as if nothing had been between.

        Args:
            state_dict: Of a nowcaster, or of a plain optimizer: then steps are counted from zero
                and the history is empty.

        Raises:
            NowcastError: If it does not fit.
        """
        found = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, found)
            found = found if changed is None else dict(changed)
        saved = found.pop(KEY, None)
        if saved is not None:
            self.core.check(saved)  # before anything has changed
        self.base.load_state_dict(found)
        if saved is None:
            self.core.restart()
            warnings.warn(
                "Nowcaster: loaded a plain optimizer's state; steps are counted from zero",
                UserWarning,
                stacklevel=2,
            )
        else:
            self.core.load_state_dict(saved)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self.core.before_step()
        how = self.core.settings
        if how.guard is not None or callable(how.refresh):
            raise NowcastError(
                message(
                    "Nowcaster: one with functions of the module cannot be copied or pickled",
                    got="a guard or refresh that would go on asking the first module",
                    help="make one for the copied optimizer and module; load_state_dict takes "
                    "its state",
                )
            )
        return {"base": self.base, "core": self.core}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__({})

    def __repr__(self) -> str:
        core = self.core
        how = f"period: {core.settings.period}, step: {core.step}, jumps: {len(core.log)}"
        return f"Nowcaster ({how})\n{self.base!r}"


def _given(optimizer: Any, predictor: Any, guard: Any) -> Predictor | Drift:
    """The predictor, or an error that says which argument is something else."""
    if isinstance(optimizer, Nowcaster):
        raise NowcastError(
            message(
                "Nowcaster: this optimizer already jumps ahead",
                expected="a plain torch.optim.Optimizer",
            )
        )
    shipped = (
        "such as wspace.nowcast.Drift(), LinearFit(), or wspace.nowcast.load('nino-mlp-small')"
    )
    wanted = (
        ("optimizer", optimizer, Optimizer, "the optimizer comes first, then the module"),
        ("predictor", predictor, Predictor | Drift, shipped),
        ("guard", guard, Guard | None, "wspace.nowcast.Guard(function) makes one"),
    )
    for name, value, kind, help in wanted:
        if not isinstance(value, kind):
            what = "is missing" if value is None else f"is a {type(value).__name__}"
            expected = getattr(kind, "__name__", name.capitalize())
            raise NowcastError(
                message(f"Nowcaster: the {name} {what}", expected=f"a {expected}", help=help)
            )
    return predictor
