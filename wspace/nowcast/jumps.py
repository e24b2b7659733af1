"""The jumps of a training run: when, how far, kept or not, and a log of them.

`Jumps` follows an optimizer's steps. `Nowcaster` is built on it, and so are the callbacks for
Lightning and the Hugging Face Trainer, which leave the optimizer as it is.
"""

import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from wspace.batchnorm import statistics
from wspace.errors import NowcastError, message
from wspace.nowcast.forecast import Forecast, predictable
from wspace.nowcast.guard import Guard, measured, reestimate
from wspace.nowcast.history import History
from wspace.nowcast.kept import (
    Kept,
    copied_buffers,
    put_buffers,
    together_with,
    write,
    write_whole,
)
from wspace.nowcast.predictor import Predictor
from wspace.nowcast.ranks import Ranks, in_parts, innermost, like_part, own_part, reshard
from wspace.nowcast.schedule import horizon_at
from wspace.nowcast.settings import Jump, Settings
from wspace.restore import drawn_again, generators_of
from wspace.space import WeightSpace

VERSION = 1


class Jumps:
    """Follows an optimizer's steps, and moves the module's parameters ahead now and then.

    What moves: parameters of the optimizer that are the module's, require gradients, are dense and
    of a common floating-point type, and were so at every snapshot since the last jump. All others
    stay as they are (`left_alone` says why); frozen ones are not stored.

    Args:
        optimizer: Whose steps count.
        module: The module that is trained; also wrapped by DDP or `torch.compile`.
        space: Its weight space, for predictors that need the wiring; they trace if None.
        predictor: Says where parameters are heading.
        settings: When and how to jump.

    Attributes:
        log: The jumps so far.

    Raises:
        NowcastError: If the settings are impossible, or none of the optimizer's parameters is the
            module's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        space: WeightSpace | None,
        predictor: Predictor,
        settings: Settings,
    ) -> None:
        self.settings = settings.checked(predictor, optimizer)
        self.optimizer, self.module = optimizer, innermost(module)
        guard = self.settings.guard
        self._outer = together_with(module, guard.module if guard else None)
        self._step, self.log = 0, list[Jump]()
        self._warned = False
        self._unsure: list[Tensor] = []  # of steps not counted yet: 0, or else it was skipped
        self.ranks = Ranks(settings.process_group, alone=settings.alone)
        self.spacing = settings.period // predictor.context
        self.history = History(
            predictor.context - 1, device=settings.history_device, dtype=settings.history_dtype
        )
        self._forecast = Forecast(
            predictor, self.module, space, settings.topology, self.history, self.ranks
        )
        if not self._owned():
            raise NowcastError(
                message(
                    "Nowcaster: none of the optimizer's parameters belongs to the module",
                    expected=f"parameters of this {type(self.module).__name__}",
                    help="pass the very module that the optimizer was made for, not a copy",
                )
            )

    def attach(self) -> RemovableHandle:
        """Follows the optimizer from now on.

        Steps that a gradient scaler makes it skip do not count.

        Returns:
            A handle; its ``remove()`` ends it.
        """
        return self.optimizer.register_step_post_hook(lambda opt, args, kwargs: self._hook(opt))

    def _hook(self, optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # fused optimizers skip by themselves
        if skipped is None:
            self.after_step()
            return
        self._unsure.append(skipped.detach().clone())
        if (self._step + len(self._unsure)) % self.spacing:
            return  # nothing can be due, so there is no need to wait for the device
        last = self._unsure.pop()
        self._count()
        if not float(last):
            self.after_step()

    def _count(self) -> None:
        """Counts the steps of which it was not known yet whether they were made."""
        if self._unsure:
            skipped = torch.stack([x.reshape(()) for x in self._unsure]).tolist()
            self._unsure.clear()
            self._step += sum(not x for x in skipped)

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        self._count()
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._unsure.clear()
        self._step = value

    def after_step(self) -> None:
        """Counts a step of the optimizer, and does what is due after it."""
        self.step += 1
        if self.step % self.spacing:
            return
        reshard(self.module)
        if self.step % self.settings.period:
            try:
                self.history.record(self._recorded())
            except Exception as error:
                self.history.clear()
                self._failed(error, Jump(self.step, reason="the snapshot failed"))
            return
        try:
            self._jump()
        finally:
            self.history.clear()

    # ------------------------------------------------------------ which parameters

    def _owned(self) -> dict[str, Tensor]:
        ours = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {n: p for n, p in self.module.named_parameters() if id(p) in ours}

    def movable(self) -> dict[str, Tensor]:
        """Parameters that may move now, by name; shared ones once."""
        return {n: p for n, p in self._owned().items() if p.requires_grad and not predictable(p)}

    @property
    def left_alone(self) -> dict[str, str]:
        """Parameters of the module or the optimizer that do not move, and why."""
        owned = self._owned()
        found: dict[str, str] = {}
        for name, p in self.module.named_parameters():
            if name not in owned:
                found[name] = "not in the optimizer"
            elif why := "frozen" if not p.requires_grad else predictable(p):
                found[name] = why
        groups = self.optimizer.param_groups
        ours = {id(p) for p in owned.values()}
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                if id(p) not in ours:
                    found[f"param_groups[{i}][{j}]"] = "not in the module"
        return found

    def _recorded(self) -> dict[str, Tensor]:
        live = self.movable()
        if not self.ranks.first and not any(in_parts(p) for p in live.values()):
            return {}  # the first process predicts for all
        return live

    def _ready(self) -> dict[str, Tensor]:
        """What may move and has a complete window, the same in all processes."""
        live = self.movable()
        ready = [
            self.history.complete(n, p) or not (in_parts(p) or self.ranks.first)
            for n, p in live.items()
        ]
        if self.ranks.several and live:
            missing = self.ranks.summed(torch.tensor([not r for r in ready], dtype=torch.float64))
            ready = [not m for m in missing.tolist()]
        return {n: p for (n, p), r in zip(live.items(), ready, strict=True) if r}

    # ------------------------------------------------------------ one jump

    def _jump(self) -> None:
        start, entry = time.perf_counter(), Jump(self.step)
        try:
            how = self.settings
            horizon = horizon_at(how.horizon, self.step, how.period, how.total_steps)
            live = self._ready()
            self.ranks.check_replicas([p for p in live.values() if not in_parts(p)])
            if not horizon or not live:
                entry = replace(
                    entry, reason="no complete history" if horizon else "the horizon is 0"
                )
            else:
                entry = replace(entry, tried=(horizon,))
                entry = self._attempted(entry, live, horizon)
        except Exception as error:
            entry = replace(entry, seconds=time.perf_counter() - start)
            self._failed(error, entry)
            return
        self.log.append(replace(entry, seconds=time.perf_counter() - start))

    def _attempted(self, entry: Jump, live: dict[str, Tensor], horizon: int) -> Jump:
        """A jump that either is made whole, or leaves everything as it was."""
        local = {n: own_part(p) for n, p in live.items()}
        runs = self.settings.guard is not None or self.settings.refresh is not None
        kept = self.ranks.together(
            lambda: Kept(self._outer, local if runs else {}, self.history.device)
        )
        done = False
        try:
            with drawn_again(self._outer):
                if self.settings.guard is None:
                    values = self._forecast(live, horizon)
                    if runs:
                        self._move(local, values)
                    else:
                        write_whole(local, values, self.ranks.together)
                    entry = replace(entry, horizon=horizon, reason="accepted")
                else:
                    entry = self._guarded(self.settings.guard, entry, live, kept)
            done = entry.horizon > 0
        finally:
            if not done:
                kept.put_back()
        if done and self.settings.moments == "reset":
            for p in live.values():
                self.optimizer.state.pop(p, None)
        return entry

    def _guarded(self, guard: Guard, entry: Jump, live: dict[str, Tensor], kept: Kept) -> Jump:
        """Moves the module to the horizon that the guard chooses, or says why to none."""
        local = {n: own_part(p) for n, p in live.items()}
        before = self._loss(guard)
        if not guard.accepts(before, before):
            why = "the held loss is not finite before the jump"
            return replace(entry, tried=(), before=before, reason=why)
        tried: list[int] = []
        best: tuple[float, int, dict[str, Tensor], dict[str, Tensor]] | None = None
        after = before
        for k in guard.horizons(entry.tried[0]):
            if tried:
                kept.put_back()  # every horizon is predicted from where the model was
            tried.append(k)
            values = self._forecast(live, k)
            self._move(local, values)
            after = self._loss(guard)
            if guard.accepts(before, after) and (best is None or after < best[0]):
                best = after, k, values, copied_buffers(self._outer)
                if guard.choose == "first":
                    break
        entry = replace(entry, tried=tuple(tried), before=before, after=after)
        if best is None:
            return replace(entry, reason="the held loss rose")
        write(local, best[2])
        put_buffers(self._outer, best[3])
        return replace(entry, horizon=best[1], after=best[0], reason="accepted")

    def _move(self, local: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """Writes values, and estimates BatchNorm's statistics for them if that is asked for."""
        write(local, values)
        batches = self.settings.refresh
        if batches is None:
            return
        try:
            with drawn_again(self._outer, generators_of(batches)):  # for all horizons the same
                count = self.ranks.together(lambda: reestimate(self.module, batches))
        finally:
            reshard(self.module)
        if count and self.ranks.several:
            for x in statistics(self.module):
                x.copy_(self.ranks.mean_of(x))

    def _loss(self, guard: Guard) -> float:
        try:
            found = self.ranks.together(lambda: measured(self._outer, guard.loss))
        finally:
            reshard(self._outer)
        return self.ranks.mean(found)

    def _failed(self, error: Exception, entry: Jump) -> None:
        """Notes an error in the log, then raises it or warns the first time."""
        head = str(error).partition("\n")[0]
        reason = f"{entry.reason}: " if entry.reason else ""
        self.log.append(replace(entry, reason=f"{reason}{type(error).__name__}: {head}"))
        if self.settings.on_error == "raise":
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(
                message(
                    f"Nowcaster: no jump at step {self.step}, training goes on without",
                    got=f"{type(error).__name__}: {error}",
                    help="later ones are noted in the log only; on_error='raise' stops there",
                ),
                RuntimeWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------ resumption

    def state_dict(self) -> dict[str, Any]:
        """All that a resumption needs, for `torch.load(..., weights_only=True)`.

        Tensors are the buffers themselves. With DDP the first process alone holds the history; of
        parameters in parts it is a `DTensor` laid out as they are.

        Returns:
            Plain values and tensors.
        """
        history = self.history.state_dict()
        live = dict(self.module.named_parameters())
        history["tensors"] = {
            n: [like_part(live[n], x) for x in past]
            for n, past in history["tensors"].items()
            if n in live
        }
        return {
            "version": VERSION,
            "step": self.step,
            "period": self.settings.period,
            "context": self.history.size + 1,
            "warned": self._warned,
            "history": history,
            "log": [{**asdict(jump), "tried": list(jump.tried)} for jump in self.log],
        }

    def restart(self) -> None:
        """Counts from zero, without a past."""
        self.history.clear()
        self.step, self.log, self._warned = 0, [], False

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises unless `load_state_dict` can take a state; changes nothing.

        Args:
            state: What was saved.

        Raises:
            NowcastError: If it is of another version, or its history does not fit the module.
        """
        if state.get("version") != VERSION:
            raise NowcastError(
                message(
                    "Nowcaster: this saved state cannot be read",
                    expected=f"version {VERSION}",
                    got=f"version {state.get('version')!r}",
                )
            )
        lost = {"step", "period", "context", "warned", "history", "log"} - state.keys()
        if lost:
            raise NowcastError(
                message("Nowcaster: this saved state is not whole", got=f"no {sorted(lost)}")
            )
        _entries(state)
        if self._continues(state):
            self.history.check(state["history"], dict(self.module.named_parameters()))

    def _continues(self, state: Mapping[str, Any]) -> bool:
        """True if the saved history is of use here."""
        every = self.settings.period, self.history.size + 1
        here = self.ranks.first or any(in_parts(p) for p in self.module.parameters())
        return here and (state["period"], state["context"]) == every

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        With another period or context than before, steps go on and the history starts afresh.

        Args:
            state: What was saved.
        """
        self.check(state)
        log = _entries(state)
        if self._continues(state):
            live = dict(self.module.named_parameters())
            self.history.load_state_dict(state["history"], live)
        else:
            self.history.clear()
        self.step, self._warned, self.log = int(state["step"]), bool(state["warned"]), log


def _entries(state: Mapping[str, Any]) -> list[Jump]:
    entries: list[dict[str, Any]] = state["log"]
    return [replace(Jump(**entry), tried=tuple(entry["tried"])) for entry in entries]
