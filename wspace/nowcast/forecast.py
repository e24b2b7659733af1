"""What a predictor says of a module in training: windows in, new values of its parameters out.

Nothing here changes the module. Where several processes train it, the first predicts what all of
them hold whole, and shares it. Of a tensor that is in parts (`fully_shard`) each process predicts
its own part, with moments summed over processes; for a predictor that needs the whole model, the
parts are gathered in the first.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wspace.errors import NowcastError, message
from wspace.nowcast.history import History
from wspace.nowcast.predictor import Past, Predictor
from wspace.nowcast.ranks import (
    Ranks,
    chunks,
    gathered,
    in_parts,
    layouts,
    own_part,
    reducer,
    scattered,
)
from wspace.space import WeightSpace

ENTRIES = 1 << 24
"""Entries for which windows are laid out at once, by a predictor that takes tensors one by one."""
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class _Traced:
    """The weight space of a module without one: traced once, as long as the module is the same."""

    def __init__(self) -> None:
        self._space: WeightSpace | None = None
        self._shapes: list[tuple[Any, ...]] = []

    def of(self, module: nn.Module) -> WeightSpace | None:
        """The module's weight space.

        Args:
            module: The module.

        Returns:
            The one traced before, unless parts, parameters or shapes are others. None if it cannot
            be traced with inputs guessed from it.
        """
        from wspace.nowcast.wiring import space_of

        shapes: list[tuple[Any, ...]] = [(n, type(m)) for n, m in module.named_modules()]
        every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
        firsts: dict[int, str] = {}
        shapes += [(n, tuple(x.shape), firsts.setdefault(id(x), n)) for n, x in every]
        if shapes != self._shapes:
            self._space = None
            with suppress(NowcastError):  # a predictor that cannot do without says so itself
                self._space = space_of(Past(module, {}, (), "traced"))
            self._shapes = shapes
        return self._space

    def __reduce__(self) -> Any:
        return _Traced, ()  # a copy traces for itself


@dataclass(frozen=True)
class Forecast:
    """New values of parameters.

    Attributes:
        predictor: What predicts.
        module: The module, without wrappers.
        space: Its weight space, if known.
        topology: For the predictor.
        history: Past states.
        ranks: The processes.
    """

    predictor: Predictor
    module: nn.Module
    space: WeightSpace | None
    topology: str
    history: History
    ranks: Ranks
    _traced: _Traced = field(default_factory=_Traced)

    @torch.no_grad()
    def __call__(self, live: Mapping[str, Tensor], horizon: int) -> dict[str, Tensor]:
        """What this process holds of every tensor, `horizon` spacings from now.

        Args:
            live: Parameters to predict, by name; each has a complete window.
            horizon: Number of spacings, at least 1.

        Returns:
            New local tensors, finite, of the parameters' dtypes and on their devices.

        Raises:
            NowcastError: If a past or predicted value is not finite, or the predictor gave
                something else than it was asked for. All processes raise together.
        """
        self.ranks.together(lambda: self._check(live))
        if self.predictor.graphical:
            found = self._from_whole_model(live, horizon)
        else:
            found: dict[str, Tensor] = {}
            for like, names in layouts(live.items()):
                some = {n: live[n] for n in names}
                if like is None:
                    found |= self._from_first(some, lambda x=some: self._by_tensor(x, horizon))
                else:
                    reduce = reducer(like)
                    found |= self.ranks.together(
                        lambda x=some, r=reduce: self._by_tensor(x, horizon, r)
                    )
        return {n: found[n] for n in live}

    def _check(self, live: Mapping[str, Tensor]) -> None:
        bad: list[str] = []
        rounded = True
        for name, x in live.items():
            mine = in_parts(x) or self.ranks.first
            past, part = self.history.window(name) if mine else [], own_part(x)
            if not all(finite(y) for y in (*past, self._rounded(part))):
                bad.append(repr(name))
                rounded = rounded and self.history.lossy(part) and finite(part)
        if bad:
            what, why = "is not finite", "lower the learning rate, or clip gradients"
            if rounded:  # the parameters themselves are finite
                what, why = f"overflows {self.history.dtype}", "history_dtype=torch.bfloat16"
            raise NowcastError(
                message(
                    f"Nowcaster: the history {what}",
                    got=[f"NaN or infinity in {name}" for name in bad[:8]],
                    help=why,
                )
            )

    def _rounded(self, x: Tensor) -> Tensor:
        """The present, as the history would hold it."""
        return x.to(self.history.dtype) if self.history.lossy(x) else x

    # ------------------------------------------------------------ tensor by tensor

    def _by_tensor(
        self,
        live: Mapping[str, Tensor],
        horizon: int,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        more: Any = {} if reduce is None else {"moments": reduce}
        for names in chunks(list(live.items()), ENTRIES):
            parts = {n: own_part(live[n]) for n in names}
            windows = {n: self._window(self.history.window(n), x) for n, x in parts.items()}
            made = self.predictor.predict(
                self.module,
                [{n: w[i] for n, w in windows.items()} for i in range(self.history.size + 1)],
                horizon=horizon,
                topology=self.topology,
                space=self.space,
                names=names,
                **more,
            )
            found |= {n: self._finished(n, made, x, windows[n][-1]) for n, x in parts.items()}
        return found

    def _from_first(
        self, live: Mapping[str, Tensor], work: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What the first process makes, in all of them."""
        made = self.ranks.together(lambda: work() if self.ranks.first else {})
        if not self.ranks.several:
            return made
        return {n: self.ranks.share(made.get(n, _empty(x))) for n, x in live.items()}

    # ------------------------------------------------------------ the model as a whole

    def _from_whole_model(self, live: Mapping[str, Tensor], horizon: int) -> dict[str, Tensor]:
        every = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        apart = any(in_parts(x) for x in every.values())
        if apart and self.space is None:
            raise NowcastError(
                message(
                    "Nowcaster: a module in parts cannot be traced",
                    expected="its weight space, traced before `fully_shard`",
                    help="space = wspace.trace(module, inputs); fully_shard(module)",
                )
            )
        windows: dict[str, list[Tensor]] = {}
        now: dict[str, Tensor] = {}
        for name, x in every.items():
            mine = name in live and (in_parts(x) or self.ranks.first)
            part = own_part(x)
            past = self.history.window(name) if mine else []
            whole = [gathered(x, y.to(part.device)) for y in (*past, part)]
            if self.ranks.first:
                now[name] = whole[-1]
                window = self._window(whole[:-1], whole[-1])
                windows[name] = window if mine else window * (self.history.size + 1)

        def work() -> dict[str, Tensor]:
            known = self.topology != "traced" or self.space is not None
            made = self.predictor.predict(
                self.space if apart and self.space is not None else self.module,
                [{n: w[i] for n, w in windows.items()} for i in range(self.history.size + 1)],
                horizon=horizon,
                topology=self.topology,
                space=self.space if known else self._traced.of(self.module),
                names=list(live),
            )
            return {n: self._finished(n, made, now[n], windows[n][-1]) for n in live}

        if not apart:
            return self._from_first(live, work)
        made = self.ranks.together(lambda: work() if self.ranks.first else {})
        found: dict[str, Tensor] = {}
        for n, x in live.items():
            whole = made.pop(n) if n in made else _empty(x)
            found[n] = scattered(x, whole) if in_parts(x) else self.ranks.share(whole)
        return found

    # ------------------------------------------------------------ one tensor

    def _window(self, past: Iterable[Tensor], x: Tensor) -> list[Tensor]:
        """Snapshots and the present, as they are predicted from: at least float32."""
        if not x.is_floating_point():
            return [x]
        wide = torch.promote_types(x.dtype, torch.float32)
        device = next((p.device for p in self.predictor.parameters()), x.device)
        return [y.to(device, wide) for y in (*past, self._rounded(x))]

    def _finished(self, name: str, made: Mapping[str, Tensor], x: Tensor, last: Tensor) -> Tensor:
        """The prediction as a new value of a tensor; it moves on from the exact present."""
        y = made.get(name)
        if y is None or y.shape != x.shape:
            raise NowcastError(
                message(
                    f"Nowcaster: {type(self.predictor).__name__} did not predict {name!r}",
                    expected=f"a tensor of shape {tuple(x.shape)}",
                    got="none" if y is None else f"shape {tuple(y.shape)}",
                )
            )
        if self.history.lossy(x):
            y = x.to(y) + (y - last)
        y = y.to(x.device, x.dtype)
        if not finite(y):
            raise NowcastError(
                message(
                    f"Nowcaster: the prediction of {name!r} is not finite",
                    expected=f"finite numbers in {x.dtype}",
                    help="use a shorter horizon",
                )
            )
        shared = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        return y.clone() if shared else y


def predictable(x: Tensor) -> str:
    """Why a tensor cannot be predicted; empty if it can."""
    if isinstance(x, nn.parameter.UninitializedParameter):
        return "not initialised yet"
    if x.layout != torch.strided:
        return f"sparse ({x.layout})"
    return "" if x.dtype in DTYPES else f"of dtype {x.dtype}"


def finite(x: Tensor) -> bool:
    """Whether all entries are; in one pass, without a copy."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)  # NaN if any entry is
    return bool((high - high == low - low).cpu())


def _empty(x: Tensor) -> Tensor:
    """Room for the whole of a tensor, which may be in parts."""
    return torch.empty(x.shape, dtype=x.dtype, device=own_part(x).device)
