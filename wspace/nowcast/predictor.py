"""What every predictor of future states has in common: windows in, a whole new state out.

A predictor sees the last few states of a training run, equally far apart, and says what the state
will be some spacings later. What is the same for all of them is here: which tensors are predicted,
ties, entries that never moved, and that nothing but finite numbers comes out.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wspace.action import State
from wspace.errors import NowcastError, message
from wspace.space import WeightSpace

TOPOLOGIES = ("traced", "published")
PRECISIONS = ("float32", "bfloat16")
FREE = ("precision", "laplacian", "chunk", "still", "drift")
"""Options that do not change which weights a predictor has."""
CHUNK = 1 << 16
"""Entries that elementwise work on the CPU takes at once: what fits in a core's cache."""

Reduce = Callable[[Tensor], Tensor]
"""Sums ``(tensors, 3)`` float64 over ranks: of every tensor the count, sum and sum of squares."""


@dataclass(frozen=True)
class Past:
    """What a predictor is given, checked.

    Attributes:
        module: The module, or its weight space.
        windows: Past tensors of every parameter, oldest first, ties once.
        names: Those to predict.
        topology: ``"traced"`` or ``"published"``.
        space: The weight space, if one was given.
        example: Positional and named inputs to trace the module with, if any were given.
        reduce: How moments are summed over ranks, if a rank holds only a part.
    """

    module: nn.Module | WeightSpace
    windows: Mapping[str, tuple[Tensor, ...]]
    names: tuple[str, ...]
    topology: str
    space: WeightSpace | None = None
    example: tuple[Any, Any] = (None, None)
    reduce: Reduce | None = None
    moments: dict[str, tuple[float, float]] = field(default_factory=dict)


class Predictor(nn.Module):
    """Predicts a later state of a training run from the last few.

    Subclasses say how (`_ahead`); `predict` is the same for all.

    Args:
        still: Entries of which all past values are equal do not move.

    Attributes:
        context: Number of past states c.
        longest: Longest horizon it was made for, in spacings.
        graphical: True if it needs all tensors of a model together.
        origin: Where a trained predictor comes from; empty for another.
    """

    graphical: ClassVar[bool] = False

    def __init__(self, *, context: int = 5, longest: int = 40, still: bool = True) -> None:
        super().__init__()
        if context < 1 or longest < 1:
            raise NowcastError(
                message(
                    f"{type(self).__name__}: impossible context or horizon",
                    expected="at least one past state and one spacing",
                    got=f"context={context}, longest={longest}",
                )
            )
        self.context, self.longest, self.still = context, longest, still
        self.origin = ""

    @property
    def options(self) -> dict[str, Any]:
        """What makes a predictor of the same form that predicts alike: arguments of the class."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    @classmethod
    def checked(cls, what: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that a trained predictor can be given.

        Args:
            what: Whom they were given to, for the message.
            options: The options.

        Returns:
            They.

        Raises:
            NowcastError: If this predictor has no such option, or its weights say what it is.
        """
        known = [name for name in FREE if name in signature(cls).parameters]
        unknown = [f"{name!r}" for name in options if name not in known]
        if unknown:
            raise NowcastError(
                message(
                    f"{what}: {cls.__name__} cannot be given these options",
                    expected=f"options among {', '.join(known)}",
                    got=unknown,
                    help="all others are in the file",
                )
            )
        return dict(options)

    @abstractmethod
    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        """New contiguous tensors for ``past.names``, in any order."""

    def predict(
        self,
        module: nn.Module | WeightSpace,
        states: Sequence[State],
        *,
        horizon: int,
        topology: str = "traced",
        space: WeightSpace | None = None,
        names: Collection[str] | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        moments: Reduce | None = None,
    ) -> dict[str, Tensor]:
        """The state `horizon` spacings after the last one.

        Args:
            module: The module that is trained, or its weight space. It is only looked at.
            states: The last `context` states, oldest first, equally far apart: tensors by name, as
                ``named_parameters()`` or ``state_dict()`` has them.
            horizon: Number of spacings; 0 gives the last state.
            topology: ``"traced"``: as the module is wired; ``"published"``: as the published code
                wires it.
            space: The module's weight space; if None it is traced where the kinds of parameters or
                the wiring are needed, with `args` and `kwargs`, or once with guessed inputs.
            names: Parameters to predict; every floating-point one of the module if None.
            args: Example inputs to trace the module with.
            kwargs: Named ones.
            moments: Sums moments over ranks, when every rank has only its part of each tensor.

        Returns:
            A tensor for every name in the last state, none of which shares memory with an input or
            with another: predicted for `names`, else a copy of the last.

        Raises:
            NowcastError: If the states do not belong to the module, the horizon is too long, or a
                past or predicted value is not finite.
        """
        self._check(states, horizon, topology)
        example = args, kwargs
        with torch.inference_mode(False), torch.no_grad(), unmixed(self, states[-1].values()):
            ties = ties_of(module)
            wanted = _wanted(module, states[-1], ties, names)
            chosen = tuple(dict.fromkeys(ties[name] for name in states[-1] if name in wanted))
            if horizon == 0 or not chosen:
                return _assembled({}, states[-1], ties)
            space = module if isinstance(module, WeightSpace) else space
            windows = _windows(states, ties, set(chosen), everything=self.graphical)
            past = Past(module, windows, chosen, topology, space, example, moments)
            past.moments.update(_moments(windows, moments))
            return _assembled(dict(self._finished(past, horizon)), states[-1], ties)

    def _finished(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        for name, ahead in self._ahead(past, horizon):
            window = past.windows[name]
            made = ahead.to(window[-1].dtype)
            if not _settle(made, window, still=self.still):
                raise NowcastError(
                    message(
                        f"predict: the prediction of {name!r} is not finite",
                        help="the module is unchanged; use a shorter horizon, or skip this jump",
                    )
                )
            yield name, made

    def _check(self, states: Sequence[State], horizon: int, topology: str) -> None:
        wrong = ""
        if len(states) != self.context:
            wrong = f"expected {self.context} past states, oldest first\n  got {len(states)}"
        elif isinstance(horizon, bool) or not isinstance(horizon, Integral):
            wrong = f"expected a whole number of spacings as horizon\n  got {horizon!r}"
        elif not 0 <= horizon <= self.longest:
            wrong = f"expected a horizon of 0 to {self.longest} spacings\n  got {horizon}"
        elif topology not in TOPOLOGIES:
            wrong = f"expected a topology among {', '.join(TOPOLOGIES)}\n  got {topology!r}"
        if wrong:
            raise NowcastError(f"predict: {type(self).__name__} cannot do this\n  {wrong}")


def check_precision(precision: str) -> None:
    """Refuses a precision that no predictor computes in.

    Args:
        precision: One of `PRECISIONS`.

    Raises:
        NowcastError: If it is not.
    """
    if precision not in PRECISIONS:
        raise NowcastError(
            message("unknown precision", expected=" or ".join(PRECISIONS), got=repr(precision))
        )


def draw_small(net: nn.Module) -> None:
    """Draws the weights of linear layers and embeddings with deviation 0.02; biases are zero.

    Args:
        net: The network; changed in place.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


@contextmanager
def unmixed(net: nn.Module, tensors: Iterable[Tensor]) -> Generator[None]:
    """No autocast on the devices of a network and of tensors, whatever surrounds.

    Args:
        net: The network.
        tensors: What it works on.

    Yields:
        Nothing.
    """
    kinds = {"cpu", *(x.device.type for x in (*net.parameters(), *tensors))}
    with ExitStack() as stack:
        for kind in sorted(kinds):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# ------------------------------------------------------------------- which tensors


def ties_of(module: nn.Module | WeightSpace) -> dict[str, str]:
    """Every name of every floating-point parameter → its first name."""
    if isinstance(module, WeightSpace):
        some = [p for p in module.params if not p.buffer and "float" in p.dtype]
        return {name: p.name for p in some for name in (p.name, *p.ties)}
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(p), name)
        for name, p in module.named_parameters(remove_duplicate=False)
        if p.is_floating_point()
    }


def _wanted(
    module: nn.Module | WeightSpace,
    last: State,
    ties: Mapping[str, str],
    names: Collection[str] | None,
) -> set[str]:
    """Names to predict; with one of a parameter's names come those of its ties that are there."""
    if names is None:
        wanted = {name for name in last if name in ties}
        if not wanted and ties:
            raise NowcastError(
                message(
                    "predict: the states hold none of the module's parameters",
                    expected=f"names such as {next(iter(ties))!r}",
                    got=", ".join(map(repr, list(last)[:3])) or "no tensors",
                )
            )
        return wanted
    unknown = [name for name in names if name not in ties or name not in last]
    if unknown:
        raise NowcastError(
            message(
                "predict: these are not floating-point parameters that the states hold",
                got=[repr(name) for name in unknown],
                help=f"names of {type(module).__name__}'s parameters, as in the states",
            )
        )
    chosen = {ties[name] for name in names}
    return {name for name in last if ties.get(name) in chosen}


def _windows(
    states: Sequence[State], ties: Mapping[str, str], chosen: set[str], *, everything: bool
) -> dict[str, tuple[Tensor, ...]]:
    out: dict[str, tuple[Tensor, ...]] = {}
    wrong: list[str] = []
    for name in states[-1]:
        first = ties.get(name)
        if first is None or first in out or not (everything or first in chosen):
            continue
        window = tuple(s[name].detach() for s in states if name in s)
        if len(window) < len(states):
            wrong.append(f"{name!r} is missing in {len(states) - len(window)} states")
        elif len({x.shape for x in window}) > 1:
            wrong.append(f"{name!r} has shapes {[tuple(x.shape) for x in window]}")
        elif any(x.layout != torch.strided or not x.is_floating_point() for x in window):
            wrong.append(f"{name!r} is {window[-1].layout}, {window[-1].dtype}")
        out[first] = window
    if wrong:
        raise NowcastError(
            message(
                "predict: the past states do not fit together",
                expected="dense floating-point tensors of the same shapes in every state",
                got=wrong,
                help="leave a parameter out with `names=`, or start the history afresh",
            )
        )
    return out


def _assembled(
    made: Mapping[str, Tensor], last: State, ties: Mapping[str, str]
) -> dict[str, Tensor]:
    """New tensors under all their names, and copies of the others."""
    out: dict[str, Tensor] = {}
    given: set[str] = set()
    for name, x in last.items():
        first = ties.get(name, name)
        if first not in made:
            out[name] = x.detach().clone()
        else:  # the second name of a tied tensor gets a copy
            out[name] = made[first].clone() if first in given else made[first]
            given.add(first)
    return out


# ------------------------------------------------------------------------ numbers


def pieces(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, flat, cut into parts of at most `size` entries: views where possible.

    Args:
        tensors: Tensors of one shape.
        size: Entries at once; if None what a core's cache holds, on other devices what keeps them
            busy.

    Yields:
        The same part of each.
    """
    flat = [x.reshape(-1) for x in tensors]
    size = size or (CHUNK if flat[0].device.type == "cpu" else 64 * CHUNK)
    for start in range(0, flat[0].numel(), size):
        yield tuple(x[start : start + size] for x in flat)


def _moments(
    windows: Mapping[str, tuple[Tensor, ...]], reduce: Reduce | None
) -> dict[str, tuple[float, float]]:
    """Mean and unbiased standard deviation of every window, over its entries and states jointly."""
    rows, bad = [], []
    for name, window in windows.items():
        row = _sums(window)
        rows.append(row)
        if not bool(row.isfinite().all()):
            bad.append(f"a value that is not finite in {name!r}")
    if bad:
        raise NowcastError(
            message(
                "predict: the history is not finite",
                got=bad,
                help="start the history afresh after the run has recovered",
            )
        )
    if reduce is not None and rows:
        table = torch.stack([_unshifted(row) for row in rows])
        reduced = reduce(table)
        rows = [torch.cat([row, row.new_zeros(1)]) for row in reduced.cpu()]
    out: dict[str, tuple[float, float]] = {}
    for name, row in zip(windows, rows, strict=True):
        n, total, squares, shift = row.tolist()
        mean = total / n if n else 0.0
        variance = max(0.0, squares - n * mean * mean) / (n - 1) if n > 1 else 0.0
        out[name] = (mean + shift, variance**0.5)
    return out


def _sums(window: Sequence[Tensor]) -> Tensor:
    """Count, and of the values less a shift the sum and the sum of squares; the shift. Float64."""
    first = window[0].reshape(-1)[:1].cpu().double()
    shift = float(first) if first.numel() else 0.0
    whole = torch.zeros(2, dtype=torch.float64)
    count = 0
    room = torch.empty(0)
    for x in window:
        total = whole.to(x.device)  # of the earlier ones
        for (part,) in pieces(x):
            if room.numel() < part.numel() or room.device != part.device:
                room = part.new_empty(part.numel(), dtype=torch.float64)
            y = room[: part.numel()]
            y.copy_(part).sub_(shift)
            total = total + torch.stack([y.sum(), y.dot(y)])
            count += part.numel()
        whole = total
    return torch.tensor([count, *whole.tolist(), shift], dtype=torch.float64)


def _unshifted(row: Tensor) -> Tensor:
    n, total, squares, shift = row
    return torch.stack([n, total + n * shift, squares + 2 * shift * total + n * shift * shift])


def _settle(made: Tensor, window: Sequence[Tensor], *, still: bool) -> bool:
    """Puts entries that never moved back in place; whether all are finite."""
    bounds: list[Tensor] = []
    for out, *past in pieces(made, *window):
        last = past[-1]
        if still and len(past) > 1:
            moved = past[0] != last
            for x in past[1:-1]:
                moved |= x != last
            torch.where(moved, out, last, out=out)
        bounds.extend(out.aminmax())  # NaN if any entry is
    return not bounds or bool(torch.stack(bounds).isfinite().all())
