"""The jumps of a training run: when, how far, kept or not, and a log of them.

`Jumps` follows an optimizer's steps. `Nowcaster` is built on it, and so are the callbacks for
Lightning and the Hugging Face Trainer, which leave the optimizer as it is.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wspace.nowcast.follow import Follower
from wspace.nowcast.forecast import Forecast
from wspace.nowcast.guard import Guard, measured, refreshed
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
from wspace.nowcast.ranks import in_parts, own_part, reshard
from wspace.nowcast.schedule import horizon_at
from wspace.nowcast.settings import Jump, Settings
from wspace.restore import drawn_again
from wspace.space import WeightSpace


class Jumps(Follower):
    """Jumps at the end of every period, by what a predictor says of the states in it.

    A parameter moves if it was there, of one shape and type, and could move at every snapshot since
    the last jump. Frozen ones are not stored.

    Args:
        optimizer: Whose steps count.
        module: The module that is trained; also wrapped by DDP or `torch.compile`.
        space: Its weight space, for predictors that need the wiring; they trace if None.
        predictor: Says where parameters are heading.
        settings: When and how to jump.

    Raises:
        NowcastError: If the settings are impossible, or none of the optimizer's parameters is the
            module's.
    """

    kind = "windows"

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        space: WeightSpace | None,
        predictor: Predictor,
        settings: Settings,
    ) -> None:
        settings = settings.checked(predictor, optimizer)
        super().__init__(optimizer, module, settings, settings.interval // predictor.context)
        guard = settings.guard
        self._outer = together_with(module, guard.module if guard else None)
        self.history = History(
            predictor.context - 1, device=settings.history_device, dtype=settings.history_dtype
        )
        self._forecast = Forecast(
            predictor, self.module, space, settings.topology, self.history, self.ranks
        )

    def _due(self) -> None:
        if self.step % self.settings.interval:
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
            horizon = horizon_at(how.horizon, self.step, how.interval, how.total_steps)
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
        self._note(replace(entry, seconds=time.perf_counter() - start))

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
        for k in guard.horizons(int(entry.tried[0])):
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
        if self.settings.refresh is not None:
            refreshed(self.module, self._outer, self.settings.refresh, self.ranks)

    def _loss(self, guard: Guard) -> float:
        try:
            found = self.ranks.together(lambda: measured(self._outer, guard.loss))
        finally:
            reshard(self._outer)
        return self.ranks.mean(found)

    # ------------------------------------------------------------ resumption

    def _past(self) -> dict[str, Any]:
        history = self.history.state_dict()
        history["tensors"] = self._laid_out(history["tensors"])
        context = self.history.size + 1
        return {"period": self.settings.interval, "context": context, "history": history}

    def _check_past(self, state: Mapping[str, Any]) -> None:
        if self._continues(state):
            self.history.check(state["history"], dict(self.module.named_parameters()))

    def _continues(self, state: Mapping[str, Any]) -> bool:
        """True if the saved history is of use here."""
        every = self.settings.interval, self.history.size + 1
        here = self.ranks.first or any(in_parts(p) for p in self.module.parameters())
        return here and (state["period"], state["context"]) == every

    def _take_past(self, state: Mapping[str, Any] | None) -> None:
        if state is not None and self._continues(state):
            live = dict(self.module.named_parameters())
            self.history.load_state_dict(state["history"], live)
        else:
            self.history.clear()
