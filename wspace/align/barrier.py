"""Losses on the way from one model to another, and how high they rise: the loss barrier.

A module is lent for the measurement and put back as it was: its tensors are never written to, since
other memory takes their place, so the states may be the module's own.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wspace.action import State, Transform, act
from wspace.align.combine import Kind, check_kind, interpolated
from wspace.align.matching.match import match
from wspace.align.merge import check_agreement, combines
from wspace.batchnorm import Batches, reestimate
from wspace.errors import MeasureError, MergeError, message
from wspace.restore import drawn_again, generators_of
from wspace.space import WeightSpace
from wspace.trace.sandbox import attributes_restored, persistent_float_buffers

Number = float | Tensor
Loss = Callable[[nn.Module], Number | Mapping[str, Number]]
"""Gives the loss of a module as it stands, or several metrics by name, the loss first."""


@dataclass(frozen=True)
class LossPath:
    """Metrics at points of a line between two models.

    Attributes:
        points: Where, ``(points,)`` float64: 0 is the first model and 1 the second.
        metrics: Name → values, ``(points,)`` float64; ``"loss"`` if the loss was one number.
    """

    points: Tensor
    metrics: Mapping[str, Tensor]

    @property
    def losses(self) -> Tensor:
        """The first metric, ``(points,)``."""
        return next(iter(self.metrics.values()))

    @property
    def height(self) -> float:
        """How far the first metric rises above the straight line between its ends."""
        return float(self._above(self.losses).max())

    @property
    def heights(self) -> dict[str, float]:
        r"""By metric: :math:`\max_t L(t) - [(1 - t) L(0) + t L(1)]` over points from 0 to 1.

        Never below 0, which it is at the ends. Frankle et al. 2020 (arXiv:1912.05671) compare with
        the mean of both ends, Entezari et al. 2022 (arXiv:2110.06296) with this line.
        """
        return {name: float(self._above(values).max()) for name, values in self.metrics.items()}

    @property
    def depths(self) -> dict[str, float]:
        """By metric: how far it falls below the line, for what is better the higher it is."""
        return {name: -float(self._above(values).min()) for name, values in self.metrics.items()}

    def _above(self, values: Tensor) -> Tensor:
        """How far values are above the line, at points from 0 to 1; NaN if one of them is."""
        at = self.points.tolist()
        if 0 not in at or 1 not in at:
            raise MeasureError(
                message(
                    "LossPath: no height without both ends",
                    expected="points 0 and 1 among the points",
                    got=f"{at}",
                )
            )
        first, last = values[at.index(0)], values[at.index(1)]
        inside = (self.points > 0) & (self.points < 1)
        t, v = self.points[inside], values[inside]
        return torch.cat([v - ((1 - t) * first + t * last), first[None] * 0])


@dataclass(frozen=True)
class Barrier:
    """Losses along the straight line between two models, and along that to the matched second.

    Attributes:
        straight: From `a` to `b`.
        aligned: From `a` to `b` moved by `transform`; None if nothing was matched.
        transform: What brings `b` to `a`; None if nothing was matched.
    """

    straight: LossPath
    aligned: LossPath | None = None
    transform: Transform | None = None

    @property
    def points(self) -> Tensor:
        """Where losses were measured, ``(points,)``."""
        return self.straight.points

    @property
    def losses(self) -> Tensor:
        """The first metric along the straight line, ``(points,)``."""
        return self.straight.losses

    @property
    def height(self) -> float:
        """The barrier of the straight line; that after matching is ``aligned.height``."""
        return self.straight.height

    def __repr__(self) -> str:
        after = "" if self.aligned is None else f", aligned {self.aligned.height:.4g}"
        return f"Barrier(height {self.height:.4g}{after}, {len(self.points)} points)"


def barrier(
    module: nn.Module,
    a: State,
    b: State,
    loss: Loss,
    *,
    space: WeightSpace | None = None,
    transform: Transform | None = None,
    points: int | Sequence[float] = 25,
    refresh: Batches | None = None,
    kind: Kind = "linear",
    kinds: Sequence[str] = ("permutation",),
    generator: torch.Generator | None = None,
) -> Barrier:
    """How far the loss rises between two models, as they are and after matching.

    Args:
        module: Of the architecture of both. It is left bit for bit as it was (parameters, buffers,
            gradients, attributes, modes, random generators), also when the loss raises.
        a: State of the first model: all parameters and buffers by name; tied ones once will do.
        b: State of the second.
        loss: Called with the module at every point, in evaluation mode, without gradients, with the
            random generators in the same state. Returns a number, or several by name.
        space: Their weight space, to match them. Without it and `transform` only the straight line
            is measured.
        transform: What brings `b` to `a`, if it is known already.
        points: How many, evenly from 0 to 1, or where.
        refresh: Batches to estimate the statistics of BatchNorm with, anew at every point, the ends
            included: averaged statistics fit no network between (Jordan et al. 2023,
            arXiv:2211.08403, call it RESET). As `wspace.batchnorm.reestimate` takes them.
        kind: ``"linear"`` or ``"spherical"``, as `interpolate` has it.
        kinds: Symmetries to match by.
        generator: For the matching.

    Returns:
        The losses along both lines, and what the second was moved by.

    Raises:
        MergeError: If the states do not agree, or are not of this module.
        MeasureError: If the loss is not a number, or batches can be read only once.
        SpaceMismatch: If a state does not fit the space.
    """
    options: dict[str, Any] = {"points": points, "refresh": refresh, "kind": kind}
    _check(module, a, b, refresh)
    check_kind(kind)
    if transform is None and space is not None:
        transform = match(a, b, space, kinds=kinds, generator=generator)
    straight = loss_path(module, a, b, loss, **options)
    if transform is None:
        return Barrier(straight)
    aligned = loss_path(module, a, act(transform, b, transform.space), loss, **options)
    return Barrier(straight, aligned, transform)


def loss_path(
    module: nn.Module,
    a: State,
    b: State,
    loss: Loss,
    *,
    points: int | Sequence[float] = 25,
    refresh: Batches | None = None,
    kind: Kind = "linear",
) -> LossPath:
    """Losses on the line from one model to another, such as from the start of training to its end.

    Args:
        module: Of the architecture of both; left as it was.
        a: State at 0.
        b: State at 1.
        loss: As for `barrier`.
        points: How many, evenly from 0 to 1, or where: also beyond.
        refresh: As for `barrier`.
        kind: ``"linear"`` or ``"spherical"``.

    Returns:
        The points and the metrics there.

    Raises:
        MergeError: If the states do not agree, or are not of this module.
        MeasureError: If the loss is not a number, or batches can be read only once.

    References:
        Goodfellow, Vinyals, Saxe (2015), Qualitatively characterizing neural network optimization
        problems. arXiv:1412.6544
    """
    _check(module, a, b, refresh)
    check_kind(kind)
    if isinstance(points, int):
        at = torch.linspace(0, 1, points, dtype=torch.float64)
    else:
        at = torch.as_tensor(points, dtype=torch.float64)
    if at.dim() != 1 or not len(at):
        raise MeasureError(message("loss_path: no points", expected="one or more", got=f"{points}"))
    found: list[dict[str, float]] = []
    with torch.no_grad(), lent(module) as put:
        for t in at.tolist():
            put(lambda name, t=t: _between(a, b, name, t, kind), set(a))
            with drawn_again(module, generators_of(refresh)):
                if refresh is not None:
                    reestimate(module, refresh, frozen=True)
                module.eval()
                found.append(_numbers(loss(module)))
            if found[-1].keys() != found[0].keys():
                raise MeasureError(
                    message("loss_path: other metrics than before",
                            expected=f"{list(found[0])}", got=f"{list(found[-1])} at {t}")
                )  # fmt: skip
    values = {n: torch.tensor([f[n] for f in found], dtype=torch.float64) for n in found[0]}
    return LossPath(at, values)


def _between(a: State, b: State, name: str, t: float, kind: Kind) -> Tensor:
    x = a[name]
    return interpolated(x, b[name], t, kind=kind) if combines(x) else x


def _numbers(found: Number | Mapping[str, Number]) -> dict[str, float]:
    named = found if isinstance(found, Mapping) else {"loss": found}
    wrong = [
        f"{name!r} of shape {tuple(x.shape)}"
        for name, x in named.items()
        if isinstance(x, Tensor) and x.numel() != 1
    ]
    if wrong or not named:
        raise MeasureError(
            message("loss_path: the loss is not one number for each metric",
                    got=wrong or "none", help="take the mean")
        )  # fmt: skip
    return {n: float(x.detach() if isinstance(x, Tensor) else x) for n, x in named.items()}


# ------------------------------------------------------------------------- the module

Put = Callable[[Callable[[str], Tensor], "set[str]"], None]


@contextmanager
def lent(module: nn.Module) -> Generator[Put]:
    """A module whose tensors may be replaced, and which is put back bit for bit.

    Args:
        module: The module.

    Yields:
        A function that puts values in the place of parameters and buffers: it is given the value of
        a name, and the names to ask for. Buffers of other names become what they were before.
    """
    tensors: dict[int, tuple[Tensor, list[str]]] = {}
    for name, x in _named(module):
        tensors.setdefault(id(x), (x, []))[1].append(name)
    before = [(x, x.data, x.grad if x.is_leaf else None) for x, _ in tensors.values()]

    def put(value: Callable[[str], Tensor], names: set[str]) -> None:
        for (x, own), (_, data, _) in zip(tensors.values(), before, strict=True):
            known = [n for n in own if n in names]
            new = value(known[0]).to(data.device, data.dtype) if known else data
            if x.is_leaf:
                x.grad = None
            x.data = new.detach().clone()
        torch.clear_autocast_cache()  # it may hold parameters as they were

    try:
        with attributes_restored(module):
            yield put
    finally:
        for x, data, grad in before:
            if x.is_leaf:
                x.grad = None
            x.data = data
            if x.is_leaf:
                x.grad = grad
        torch.clear_autocast_cache()


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _check(module: nn.Module, a: State, b: State, refresh: Batches | None) -> None:
    """Checks the states against the module, and that batches can be read again."""
    check_agreement([a, b], None, "barrier")
    own: dict[int, list[str]] = {}
    tensors = dict(_named(module))
    for name, x in tensors.items():
        own.setdefault(id(x), []).append(name)
    needed = {id(x) for _, x in (*module.named_parameters(), *persistent_float_buffers(module))}
    wrong = [
        f"no {' or '.join(map(repr, n))}"
        for i, n in own.items()
        if i in needed and not a.keys() & {*n}
    ]
    wrong += [f"{n!r}, which the module does not have" for n in a if n not in tensors]
    wrong += [
        f"{n!r} of {tuple(x.shape)}, the module's is {tuple(tensors[n].shape)}"
        for n, x in a.items()
        if n in tensors and tensors[n].shape != x.shape
    ]
    if wrong:
        raise MergeError(message(f"barrier: the states are not of this {type(module).__name__}",
                                 expected="its parameters and buffers", got=wrong))  # fmt: skip
    if isinstance(refresh, Iterator):  # `iter` of a loader would draw random numbers
        raise MeasureError(
            message("barrier: batches that can be read only once", got=type(refresh).__name__,
                    help="give a list, a DataLoader, or a function that returns batches")
        )  # fmt: skip
