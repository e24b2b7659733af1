"""One tensor of several models made one: averages, arcs, sums of task vectors, elected signs.

Everything here sees one tensor of each model at a time, so models of any size can be merged while
they are read and written; norms, angles and thresholds are those of the tensor. Leading batch axes
count models side by side: each row is combined for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from wspace.errors import MergeError, message

Name = Literal["average", "slerp", "task", "ties"]
Kind = Literal["linear", "spherical"]
NEEDS_BASE = ("task", "ties")
PARALLEL = 1e-6
"""Sine of an angle below which an arc is a straight line."""


@dataclass(frozen=True)
class Method:
    r"""A way to make one tensor of several :math:`\theta_1 … \theta_n`, and its options.

    - ``"average"``: :math:`\sum_i w_i \theta_i / \sum_i w_i`.
    - ``"slerp"``: of two, `spherical` at :math:`t = w_2 / (w_1 + w_2)` (Shoemake 1985).
    - ``"task"``: :math:`\theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)`, task arithmetic
      (Ilharco et al. 2022, arXiv:2212.04089).
    - ``"ties"`` (Yadav et al. 2023, arXiv:2306.01708, algorithm 1). Of each
      :math:`\tau_i = \theta_i - \theta_0` the :math:`\lceil d \cdot \text{entries} \rceil` largest
      in magnitude stay (and all equal to the least of them), the rest become zero. Every entry
      elects the sign of :math:`\sum_i w_i \tau_i`; with :math:`A` the models whose entry has that
      sign, the result is :math:`\theta_0 + \lambda \sum_A w_i \tau_i / \sum_A w_i`, and
      :math:`\theta_0` where nothing is left or the sum is zero. The paper trims a whole model at
      once; here each tensor is trimmed for itself.

    Attributes:
        name: Which.
        models: How many.
        weights: :math:`w`, one for each model; equal (for ``"task"``: 1) if None.
        density: Share :math:`d` of entries that ``"ties"`` keeps.
        scale: :math:`\lambda` of ``"task"`` and ``"ties"``.
    """

    name: Name
    models: int
    weights: tuple[float, ...] | None = None
    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MergeError: Listing all that are impossible.
        """
        w, wrong = self.shares, list[str]()
        if self.name not in get_args(Name):
            wrong.append(f"method {self.name!r}, expected one of {', '.join(get_args(Name))}")
        if self.models < 1:
            wrong.append("no models")
        if self.name == "slerp" and self.models != 2:
            wrong.append(f"{self.models} models, expected two for 'slerp'")
        if len(w) != self.models:
            wrong.append(f"{len(w)} weights for {self.models} models")
        elif not all(map(isfinite, w)):
            wrong.append(f"weights {w}, expected finite ones")
        elif self.name != "task" and not (min(w, default=1) >= 0 and (sum(w) > 0 or not w)):
            wrong.append(f"weights {w}, expected none below zero, and one above")
        if not 0 < self.density <= 1:
            wrong.append(f"density {self.density}, expected 0 < density <= 1")
        if not isfinite(self.scale):
            wrong.append(f"scale {self.scale}, expected a finite one")
        if wrong:
            raise MergeError(message("merge: impossible options", got=wrong))

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, also where none were given."""
        return (1.0,) * self.models if self.weights is None else self.weights


def merged(
    tensors: Sequence[Tensor], method: Method, base: Tensor | None = None, *, batch: int = 0
) -> Tensor:
    """One tensor of several, in the type and on the device of the first.

    Computed in float32 if all are of that or lower precision, else in float64; entries of a complex
    tensor are pairs of real ones.

    Args:
        tensors: One of each model, ``(*batch, *shape)``, floating point or complex.
        method: How.
        base: That of the common ancestor, for ``"task"`` and ``"ties"``.
        batch: Number of leading axes that count models.

    Returns:
        ``(*batch, *shape)``, new memory.

    Raises:
        MergeError: If the base is missing, or given where there is none.
    """
    if (base is not None) != (method.name in NEEDS_BASE):
        raise MergeError(
            message(
                f"merge: {'no base' if base is None else 'a base'} for {method.name!r}",
                expected=f"a base for {' and '.join(NEEDS_BASE)}, and none for the others",
            )
        )
    xs = _working([*tensors, *([] if base is None else [base])])
    weights, first = method.shares, tensors[0]
    if base is None and method.name == "slerp":
        out = _spherical(xs[0], xs[1], weights[1] / sum(weights), batch)
    elif base is None:
        out = _average(xs, [w / sum(weights) for w in weights])
    elif method.name == "task":
        out = xs[-1].clone()
        for w, x in zip(weights, xs[:-1], strict=True):
            out.add_(x - xs[-1], alpha=method.scale * w)
    else:
        out = xs[-1] + method.scale * _elected(xs, method, batch)
    return _finished(out, first)


def check_kind(kind: str) -> None:
    """Checks that there is such a line.

    Args:
        kind: As `interpolated` takes it.

    Raises:
        MergeError: If it is unknown.
    """
    if kind not in get_args(Kind):
        raise MergeError(
            message("interpolate: unknown kind", expected="linear or spherical", got=repr(kind))
        )


def interpolated(
    a: Tensor, b: Tensor, t: float, *, kind: Kind = "linear", batch: int = 0
) -> Tensor:
    r"""A point between two tensors, in the type and on the device of the first.

    ``"linear"`` is :math:`(1 - t) a + t b`. ``"spherical"``, with :math:`\omega` the angle between
    the two as vectors, is :math:`\frac{\sin (1-t)\omega}{\sin \omega} a + \frac{\sin t\omega}{\sin
    \omega} b`, and linear where :math:`\sin \omega` is below `PARALLEL` or a tensor is zero. Both
    give `a` for 0 and `b` for 1 bit for bit, and reach beyond for others.

    Args:
        a: ``(*batch, *shape)``.
        b: The same shape.
        t: Where.
        kind: Along which line.
        batch: Number of leading axes that count models.

    Returns:
        ``(*batch, *shape)``, new memory.
    """
    if t in {0, 1}:
        return (b if t else a).to(a, copy=True)
    x, y = _working([a, b])
    out = _average([x, y], [1 - t, t]) if kind == "linear" else _spherical(x, y, t, batch)
    return _finished(out, a)


def _working(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the first one's device, in one real type of at least single precision."""
    wide = any(x.dtype in {torch.float64, torch.complex128} for x in tensors)
    real = torch.float64 if wide else torch.float32
    device = tensors[0].device
    if any(x.is_complex() for x in tensors):
        whole = torch.complex128 if wide else torch.complex64
        return [torch.view_as_real(x.to(device, whole)) for x in tensors]
    return [x.to(device, real) for x in tensors]


def _finished(x: Tensor, like: Tensor) -> Tensor:
    return (torch.view_as_complex(x.contiguous()) if like.is_complex() else x).to(like.dtype)


def _average(xs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum with weights that add up to one, as the heaviest and differences to it."""
    # So equal tensors stay as they are, and what has no weight has no influence, not even NaN.
    heaviest = max(range(len(xs)), key=lambda i: weights[i])
    out = xs[heaviest].clone()
    for i, (w, x) in enumerate(zip(weights, xs, strict=True)):
        if w and i != heaviest:
            out.add_(x - xs[heaviest], alpha=w)
    return out


def _spherical(a: Tensor, b: Tensor, t: float, batch: int) -> Tensor:
    if t in {0, 1}:
        return (b if t else a).clone()
    line = _average([a, b], [1 - t, t])
    x, y = (v.reshape(*v.shape[:batch], -1) for v in (a, b))
    lengths = [torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, y)]
    u, v = (
        z / n.clamp_min(torch.finfo(n.dtype).tiny) for z, n in zip((x, y), lengths, strict=True)
    )
    apart, along = (
        torch.linalg.vector_norm(z, dim=-1, keepdim=True).double() for z in (u - v, u + v)
    )
    angle = 2 * torch.atan2(apart, along)  # accurate also for small angles (Kahan)
    sine = angle.sin()
    flat = (sine < PARALLEL) | (lengths[0] == 0) | (lengths[1] == 0)
    sine = sine.where(~flat, 1.0)
    arc = ((1 - t) * angle).sin().div(sine).to(x) * x + (t * angle).sin().div(sine).to(y) * y
    return torch.where(flat, line.reshape(x.shape), arc).reshape(a.shape)


def _elected(xs: Sequence[Tensor], method: Method, batch: int) -> Tensor:
    """Mean of trimmed differences to the last tensor over those of the elected sign."""
    weights = method.shares
    moves = [_trimmed(x - xs[-1], method.density, batch) for x in xs[:-1]]
    sign = sum(
        (w * m for w, m in zip(weights, moves, strict=True)), torch.zeros_like(xs[-1])
    ).sign()
    total, weight = torch.zeros_like(xs[-1]), torch.zeros_like(xs[-1])
    for w, move in zip(weights, moves, strict=True):
        agrees = move.sign() == sign
        total = total + torch.where(agrees, w * move, 0.0)
        weight = weight + w * agrees.to(weight)
    return total / weight.where(weight != 0, 1.0)


def _trimmed(x: Tensor, density: float, batch: int) -> Tensor:
    rows = x.abs().reshape(*x.shape[:batch], -1)
    entries = rows.shape[-1]
    kept = min(entries, ceil(density * entries * (1 - 1e-12)))  # not one more by rounding
    if kept == entries:
        return x
    least = rows.kthvalue(entries - kept + 1, dim=-1).values
    return torch.where(x.abs() >= least.reshape(*x.shape[:batch], *[1] * (x.dim() - batch)), x, 0.0)
