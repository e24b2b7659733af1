"""Jumps for Lightning, beside the module's own optimizer.

``Trainer(callbacks=[NowcastCallback(predictor)])`` works with automatic and manual optimization.
A module may as well make a `wspace.nowcast.Nowcaster` in ``configure_optimizers``.
"""

import copy
import random
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from math import isfinite
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric

from wspace.errors import NowcastError, message
from wspace.nowcast import Drift, Follower, Guard, Jump, Predictor, Settings, follower
from wspace.nowcast.follow import Handles
from wspace.restore import drawn_again
from wspace.space import WeightSpace

Loss = Callable[[LightningModule], float | Tensor]


class NowcastCallback(Callback):
    """Moves a module's parameters ahead now and then, as `wspace.nowcast.Nowcaster` does.

    Checkpoints hold steps and history; a resumed run goes on as if nothing had been between, and so
    does one that the same trainer fits again. Every jump is logged (``nowcast/horizon``, and with a
    guard ``nowcast/before`` and ``nowcast/after``). Horizons decay over the trainer's steps unless
    `total_steps` is given.

    With a `Drift` validation during training sees the running averages, and training ends with them
    in the module (`averaged`). Checkpoints hold what is trained, and averages in the callback's
    state.

    Args:
        predictor: Says where parameters are heading; or a `Drift`.
        space: Weight space of the part that `module` names, for predictors that know the wiring.
        module: Which part of the module moves, such as ``"model"``; all of it if empty.
        optimizer: Index of the optimizer to follow, if there are several.
        held: What a jump is judged by: a number of validation batches, of which the mean of what
            ``validation_step`` returns (or of what it logs as `monitor`) must not rise; or a
            function of the module that gives a loss. None: see `guard`.
        monitor: Name of the logged value that is the loss, where ``validation_step`` returns none.
        guard: With `held` a dict of `Guard`'s options other than the loss; else a `Guard`, or None
            to keep every jump.
        averaged: With a `Drift`, whether validation and the end of training are at the averages.
        **options: See `Settings`.

    Attributes:
        core: What follows the optimizer, once training has begun.

    Raises:
        NowcastError: If `held` and `guard` do not fit together.
    """

    def __init__(
        self,
        predictor: Predictor | Drift,
        space: WeightSpace | None = None,
        *,
        module: str = "",
        optimizer: int = 0,
        held: int | Loss | None = None,
        monitor: str | None = None,
        guard: Guard | Mapping[str, Any] | None = None,
        averaged: bool = True,
        **options: Any,
    ) -> None:
        wrong: type = Mapping if held is None else Guard
        if isinstance(guard, wrong):
            raise NowcastError(
                message(
                    "NowcastCallback: guard and held do not fit together",
                    expected="a Guard, or held=... and perhaps a dict of a guard's options",
                )
            )
        Settings(**options)
        self.predictor, self.space, self.options = predictor, space, options
        self.module, self.optimizer, self.monitor = module, optimizer, monitor
        self.held = held
        self.guard: Guard | Mapping[str, Any] | None = guard
        self.core: Follower | None = None
        self._saved: dict[str, Any] = {}
        self._handle: Handles | None = None
        self._averaged = averaged and isinstance(predictor, Drift)
        self._away = ExitStack()  # holds the averages in the module while it is validated
        self._told = 0
        self._ended = 0  # the trainer's step, where training has ended

    @property
    def state_key(self) -> str:
        """One for each optimizer that is followed."""
        return self._generate_state_key(optimizer=self.optimizer, module=self.module)

    @property
    def jumps(self) -> list[Jump]:
        """The jumps so far, also those that were not kept."""
        return [] if self.core is None else self.core.log

    # ------------------------------------------------------------ Lightning's events

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to follow the optimizer.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        options: dict[str, Any] = {"total_steps": _steps(trainer), **self.options}
        settings = Settings(**options, guard=self._guard(trainer, pl_module))
        part = pl_module.get_submodule(self.module)
        optimizer = trainer.optimizers[self.optimizer]
        former, self.core = (
            self.core,
            follower(optimizer, part, self.space, self.predictor, settings),
        )
        same = former is not None and former.module is self.core.module
        if former and same and not self._saved and trainer.global_step == self._ended:
            self._saved = former.state_dict()  # the trainer fits again
        if self._saved:
            self.core.load_state_dict(self._saved)
            self._saved = {}
        self._told = self.core.made
        self._handle = self.core.attach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs new jumps.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        del trainer, outputs, batch, batch_idx
        for jump in self.core.news(self._told) if self.core is not None else ():
            found = {"horizon": jump.horizon, "before": jump.before, "after": jump.after}
            shown = {f"nowcast/{k}": float(x) for k, x in found.items() if x is not None}
            pl_module.log_dict(shown, on_step=True, on_epoch=False)
            self._told += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the module its averages, if it is in training."""
        del trainer, pl_module
        if self._averaged and self.core is not None and self._handle is not None:
            self._away.enter_context(self.core.averaged())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives it back what is trained."""
        del trainer, pl_module
        self._away.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends to follow the optimizer, at the averages of a `Drift`."""
        if self._averaged and self.core is not None and self._handle is not None:
            self.core.finish()
        self._end(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends to follow the optimizer."""
        self._end(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Steps, history and log, for the checkpoint."""
        return self._saved if self.core is None else self.core.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what a checkpoint holds until training begins.

        Args:
            state_dict: What `state_dict` gave.
        """
        self._saved = state_dict

    def _end(self, trainer: Trainer) -> None:
        self._away.close()
        self._ended = trainer.global_step or -1
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # ------------------------------------------------------------ the held loss

    def _guard(self, trainer: Trainer, module: LightningModule) -> Guard | None:
        held, guard = self.held, self.guard
        if isinstance(guard, Guard):
            return replace(guard, module=module if guard.module is None else guard.module)
        if held is None:
            return None
        how: Mapping[str, Any] = {"module": module, **(guard or {})}
        if not isinstance(held, int):
            return Guard(lambda: held(module), **how)
        batches = _first(trainer, held)
        return Guard(lambda: self._validated(trainer, module, batches), **how)

    def _validated(self, trainer: Trainer, module: LightningModule, batches: list[Any]) -> float:
        """Mean of the module's validation loss over batches; leaves no trace in its metrics."""
        found: list[float] = []
        with _silent(module) as logged, trainer.precision_plugin.val_step_context():
            for i, batch in enumerate(batches):
                logged.clear()
                moved = trainer.strategy.batch_to_device(batch)
                answer: Any = module.validation_step(moved, i)
                if self.monitor is not None:
                    answer = logged.get(self.monitor)
                elif isinstance(answer, Mapping):
                    answer = answer.get("loss")
                if answer is None:
                    raise NowcastError(
                        message(
                            f"NowcastCallback: {type(module).__name__}.validation_step gives no "
                            + (self.monitor or "loss"),
                            got=f"logged {sorted(logged)}",
                            help="monitor='NAME' of the loss that it logs, or held=function",
                        )
                    )
                found.append(float(answer))
        return sum(found) / len(found)


def _steps(trainer: Trainer) -> int | None:
    total = float(trainer.estimated_stepping_batches)
    return int(total) if isfinite(total) else None


def _first(trainer: Trainer, count: int) -> list[Any]:
    """The first validation batches, on the CPU; the same in every run, shuffled or not."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    loaders: Any = trainer.val_dataloaders
    with drawn_again(trainer.lightning_module):
        random.seed(0)
        torch.default_generator.manual_seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        first = next(_flat(loaders), None)
        found = [] if first is None else list(islice(iter(first), count))
    if not found or count < 1:
        raise NowcastError(
            message(
                "NowcastCallback: there are no validation batches to judge jumps by",
                expected="a validation loader, and held of at least 1",
                help="give one to the trainer, or held=function",
            )
        )
    return found


def _flat(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for item in loaders:
            yield from _flat(item)
    elif loaders is not None:
        yield loaders


@contextmanager
def _silent(module: LightningModule) -> Generator[dict[str, Any]]:
    """Within it, what the module logs goes into the dict given, and its metrics forget it."""
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *args: Any, **options: Any) -> None:
        logged[name] = value.compute() if isinstance(value, Metric) else value

    def log_dict(values: Mapping[str, Any], *args: Any, **options: Any) -> None:
        for name, value in values.items():
            log(name, value)

    metrics = [(m, copy.deepcopy(vars(m))) for m in module.modules() if isinstance(m, Metric)]
    own: dict[str, Any] = {"log": log, "log_dict": log_dict}
    before = {k: vars(module)[k] for k in own if k in vars(module)}
    vars(module).update(own)
    try:
        yield logged
    finally:
        for k in own:
            del vars(module)[k]
        vars(module).update(before)
        for m, state in metrics:
            vars(m).clear()
            vars(m).update(state)
