"""A run that drifts ahead: `Drift` at work beside an optimizer; and which follower a run needs."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wspace.errors import NowcastError, message
from wspace.nowcast.drift import Averages, Drift, all_finite
from wspace.nowcast.follow import Follower
from wspace.nowcast.guard import Guard, measured, refreshed
from wspace.nowcast.jumps import Jumps
from wspace.nowcast.kept import Kept, together_with, write, write_whole
from wspace.nowcast.predictor import Predictor
from wspace.nowcast.ranks import in_parts, own_part, reshard
from wspace.nowcast.settings import Jump, Settings
from wspace.restore import buffers_of, put_back
from wspace.space import WeightSpace


def follower(
    optimizer: Optimizer,
    module: nn.Module,
    space: WeightSpace | None,
    predictor: Predictor | Drift,
    settings: Settings,
) -> Follower:
    """What follows an optimizer, by how it is to jump.

    Args:
        optimizer: Whose steps count.
        module: The module that is trained.
        space: Its weight space, for predictors that need the wiring.
        predictor: A predictor, or a drift.
        settings: When and how to jump.

    Returns:
        `Jumps` for a predictor, `Drifting` for a drift.

    Raises:
        NowcastError: If the settings are impossible, or none of the optimizer's parameters is the
            module's.
    """
    if isinstance(predictor, Drift):
        return Drifting(optimizer, module, predictor, settings)
    return Jumps(optimizer, module, space, predictor, settings)


class Drifting(Follower):
    """Keeps running averages of what is trained, and moves it ahead along their difference.

    Every process moves what it holds: with DDP all do the same, with `fully_shard` each its part.

    With a guard, every `Drift.judged` jumps its loss is asked of the *average*. If that has risen
    by more than the tolerance since the last time, jumps become `shrink` times as long; if not,
    they grow again by the square root of that, up to their full length. Nothing is undone: one jump
    is small, and raises the loss at once even where it pays later.

    Args:
        optimizer: Whose steps count.
        module: The module that is trained; also wrapped by DDP or `torch.compile`.
        drift: How it jumps.
        settings: When.

    Attributes:
        averages: The running averages.
        share: Share of the full length that jumps have now.

    Raises:
        NowcastError: If the settings are impossible, or none of the optimizer's parameters is the
            module's.
    """

    kind = "drift"

    def __init__(
        self, optimizer: Optimizer, module: nn.Module, drift: Drift, settings: Settings
    ) -> None:
        settings = settings.drifting(drift)
        super().__init__(optimizer, module, settings, drift.every)
        guard = settings.guard
        self._outer = together_with(module, guard.module if guard else None)
        self.drift, self.averages = drift, Averages(drift, device=settings.history_device)
        self.share, self._last = 1.0, float("inf")
        self._replicas = False  # whether processes were seen to train one model
        self._broken: Exception | None = None  # why the averages began anew

    def _due(self) -> None:
        try:
            self.averages.update(self.movable())
        except Exception as error:  # raised at the next jump, in all processes
            self.averages.clear()
            self._broken = self._broken or error
        if self.step % self.settings.interval == 0 and self.step >= self.drift.begin:
            self._jump()

    def _jump(self) -> None:
        start, entry = time.perf_counter(), Jump(self.step)
        try:
            entry = self._moved(entry)
            guard = self.settings.guard
            turn = self.step // self.settings.interval
            if guard is not None and turn % self.drift.judged == 0:
                moved, entry = entry, replace(entry, reason=f"{entry.reason}, but not judged")
                entry = self._judged(guard, moved)
        except Exception as error:
            if self.ranks.several:
                self.averages.clear()  # in all processes, so that they stay of one age
            self._failed(error, replace(entry, seconds=time.perf_counter() - start))
            return
        self._note(replace(entry, seconds=time.perf_counter() - start))

    # ------------------------------------------------------------ one jump

    def _moved(self, entry: Jump) -> Jump:
        """Moves parameters and averages together, or neither."""
        self.ranks.together(self._whole)
        live = self.movable()
        if not self._replicas:
            self.ranks.check_replicas([p for p in live.values() if not in_parts(p)])
            self._replicas = True
        lengths: list[float] = []

        def length(distance: float) -> float:
            lengths.append(self.share * self.drift.ahead(self.settings.interval, distance))
            return lengths[-1]

        moves, values = self.ranks.together(lambda: self._ahead(live, length))
        if self.ranks.any(not moves):
            why = "the jump is 0 steps long" if lengths else "the averages are of one time"
            return replace(entry, reason=why)
        write_whole({n: own_part(live[n]) for n in values}, values, self.ranks.together)
        self.averages.shift(moves)
        horizon = max(lengths) / self.settings.interval
        return replace(entry, tried=(horizon,), horizon=horizon, reason="accepted")

    def _whole(self) -> None:
        """Raises what went wrong since the last jump."""
        error, self._broken = self._broken, None
        if error is not None:
            raise error

    def _ahead(
        self, live: Mapping[str, Tensor], length: Callable[[float], float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Moves, and finite new values of this process's parts."""
        moves = self.averages.moves(live, length)
        parts = [own_part(live[n]) for n in moves]
        here = [m.to(x.device) for m, x in zip(moves.values(), parts, strict=True)]
        with torch.no_grad():
            wide = [x.to(m.dtype) for x, m in zip(parts, here, strict=True)]
            made = torch._foreach_add(wide, here) if wide else []  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            made = [y.to(x.dtype) for y, x in zip(made, parts, strict=True)]
        if not all_finite(made):
            bad = [n for n, y in zip(moves, made, strict=True) if not all_finite([y])]
            for name in bad:
                self.averages.forget(name)
            raise NowcastError(
                message(
                    "Nowcaster: averages or what they predict are not finite",
                    got=[f"NaN or infinity in {name!r}" for name in bad[:8]],
                    help="lower the learning rate, or clip gradients",
                )
            )
        return moves, dict(zip(moves, made, strict=True))

    # ------------------------------------------------------------ the guard

    def _judged(self, guard: Guard, entry: Jump) -> Jump:
        with self.averaged():
            try:
                found = self.ranks.together(lambda: measured(self._outer, guard.loss))
            finally:
                reshard(self._outer)
        before, after = self._last, self.ranks.mean(found)
        fell = isfinite(after) and after <= before + guard.tolerance
        factor = guard.shrink**-0.5 if fell else guard.shrink
        self.share = min(1.0, self.share * factor)
        self._last = after if isfinite(after) else before
        return replace(entry, before=before if isfinite(before) else None, after=after)

    # ------------------------------------------------------------ the average itself

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within it, the module has its short averages; afterwards everything is as before.

        BatchNorm's statistics are estimated for the averages if `Settings.refresh` is given.

        Yields:
            Nothing.

        Raises:
            NowcastError: If it is entered twice.
        """
        self._present()
        reshard(self.module)  # a forward pass may have left whole parameters
        live = self.movable()
        values = self.averages.values(live)
        local = {n: own_part(live[n]) for n in values}
        before = {n: x.clone() for n, x in local.items()}
        buffers = buffers_of(self._outer)
        self._away = True
        try:
            write(local, values)
            self._refresh()
            yield
        finally:
            self._away = False
            write({n: own_part(live[n]) for n in before}, before)  # perhaps they were cast
            put_back(buffers)
            reshard(self.module)

    def finish(self) -> None:
        """Gives the module its short averages for good; averages begin anew.

        BatchNorm's statistics are estimated for them if `Settings.refresh` is given.

        Raises:
            NowcastError: If it is called within `averaged`, or there are no batches to refresh
                with; the module is then as before.
        """
        self._present()
        reshard(self.module)
        live = self.movable()
        values = self.averages.values(live)
        local = {n: own_part(live[n]) for n in values}
        kept = Kept(self._outer, local, self.averages.device)
        try:
            write(local, values)
            self._refresh()
        except BaseException:
            kept.put_back()
            raise
        reshard(self.module)
        self.averages.clear()

    def _refresh(self) -> None:
        if self.settings.refresh is not None:
            refreshed(self.module, self._outer, self.settings.refresh, self.ranks)

    # ------------------------------------------------------------ resumption

    def _past(self) -> dict[str, Any]:
        history = self.averages.state_dict()
        history["tensors"] = self._laid_out(history["tensors"])
        return {
            "period": self.settings.interval,
            "context": 2,
            "history": history,
            "share": self.share,
            "last": self._last if isfinite(self._last) else None,
        }

    def _check_past(self, state: Mapping[str, Any]) -> None:
        self.averages.check(state["history"], dict(self.module.named_parameters()))

    def _take_past(self, state: Mapping[str, Any] | None) -> None:
        if state is None:
            self.averages.clear()
            self.share, self._last = 1.0, float("inf")
            return
        self.averages.load_state_dict(state["history"], dict(self.module.named_parameters()))
        last = state.get("last")
        self.share = float(state.get("share", 1.0))
        self._last = float("inf") if last is None else float(last)
