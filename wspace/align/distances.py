"""How far many models are from each other, as functions and as weights, and a map of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from wspace.action import State, act
from wspace.align.matching.match import match
from wspace.align.merge import check_agreement
from wspace.batchnorm import moved
from wspace.errors import MeasureError, message
from wspace.restore import drawn_again
from wspace.space import WeightSpace
from wspace.trace.sandbox import attributes_restored, evaluation_mode, tensors_in

Distance = Literal["l2", "kl", "disagreement"]
ENTRIES = 1 << 24
"""Entries of what is held at once beside the outputs of all models for one batch."""


def function_distances(
    module: nn.Module,
    states: Sequence[State],
    inputs: Tensor | Iterable[Any],
    *,
    kind: Distance = "l2",
    chunk: int = 32,
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    r"""How differently models answer on given inputs.

    With :math:`f_i(x)` the outputs, and :math:`p_i` their softmax over the last axis:

    - ``"l2"``: :math:`\sqrt{\operatorname{mean}_x \lVert f_i(x) - f_j(x) \rVert^2}`, a metric on
      functions up to what they do elsewhere.
    - ``"kl"``: the mean of :math:`KL(p_i \,\|\, p_j)` in nats, *not* symmetric.
    - ``"disagreement"``: share of predictions (the largest of the last axis) that differ.

    Means are over inputs for ``"l2"``, over all axes but the last for the others.

    Args:
        module: Of the architecture of all; evaluated, and left as it was.
        states: The models.
        inputs: One batch as a tensor, or batches: a dict of arguments by name, of a tuple or list
            the first, or else the only argument.
        kind: Which.
        chunk: How many models run at once (`torch.func.vmap`); 1 runs each by itself, which
            modules need whose operators cannot be batched.
        output: The tensor of what the module returns; the first one found if None.

    Returns:
        ``(models, models)`` float64 with zeros on the diagonal.

    Raises:
        MeasureError: If the kind is unknown, or there are no inputs.
        MergeError: If the states do not agree.
    """
    if kind not in get_args(Distance):
        expected = ", ".join(get_args(Distance))
        raise MeasureError(message(f"function_distances: unknown kind {kind!r}", expected=expected))
    check_agreement(states, None, "function_distances")
    total, count = torch.zeros(len(states), len(states), dtype=torch.float64), 0
    run = {"l2": _squares, "kl": _divergences, "disagreement": _disagreements}[kind]
    for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
        y = torch.cat(list(_outputs(module, states, batch, chunk, output))).double()
        total += run(y).cpu()
        count += y.shape[1] if kind == "l2" else y[0].numel() // y.shape[-1]
    if not count:
        raise MeasureError(message("function_distances: no inputs", help="give at least one batch"))
    total = total / count
    return total.sqrt() if kind == "l2" else total


def _outputs(
    module: nn.Module,
    states: Sequence[State],
    batch: Any,
    chunk: int,
    output: Callable[[Any], Tensor] | None,
) -> Iterator[Tensor]:
    """Outputs of some models at a time: ``(models of the chunk, *output)``."""
    device = next((x.device for x in (*module.parameters(), *module.buffers())), None)
    args, kwargs = arguments(moved(batch, device))

    def call(state: dict[str, Tensor]) -> Tensor:
        found = functional_call(module, state, args, kwargs)
        return tensors_in(found)[0] if output is None else output(found)

    with (
        torch.no_grad(),
        drawn_again(module),
        evaluation_mode(module),
        attributes_restored(module),
    ):
        names = [n for n in states[0] if all(n in s for s in states)]
        for start in range(0, len(states), chunk):
            some = states[start : start + chunk]
            # New memory, since a forward pass may write into buffers.
            stacked = {n: torch.stack([s[n] for s in some]).to(device) for n in names}
            if chunk == 1:
                yield call({n: x[0] for n, x in stacked.items()})[None]
            else:
                yield vmap(call, randomness="same")(stacked)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call from a batch: a dict by name, of a tuple or list the first, or else it.

    Args:
        batch: Of a loader.

    Returns:
        Positional arguments, and those by name.
    """
    if isinstance(batch, dict):
        return (), batch
    return (batch[0] if isinstance(batch, tuple | list) else batch,), {}


def _squares(y: Tensor) -> Tensor:
    """Squared distances of all pairs, summed over everything: ``(models, models)``."""
    flat = y.reshape(len(y), -1)
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()


def _divergences(y: Tensor) -> Tensor:
    log = y.log_softmax(-1).reshape(len(y), -1)
    p = log.exp()
    own = torch.where(p > 0, p * log, 0.0).sum(1)
    # A logit of minus infinity is a probability of 0: no term where both have it.
    cross = p @ log.clamp_min(torch.finfo(log.dtype).min).mT
    return (own[:, None] - cross).clamp_min(0).fill_diagonal_(0)


def _disagreements(y: Tensor) -> Tensor:
    label = y.argmax(-1).reshape(len(y), -1)
    rows = max(1, ENTRIES // max(label.numel(), 1))
    parts = [(some[:, None] != label).sum(-1) for some in label.split(rows)]
    return torch.cat(parts).double()


def weight_distances(
    states: Sequence[State],
    space: WeightSpace,
    *,
    align: bool = False,
    kinds: Sequence[str] = ("permutation",),
    chunk: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Euclidean distances between the parameters of models, each tensor once and buffers left out.

    Args:
        states: The models, without batch axes.
        space: Their weight space.
        align: Whether the second of each pair is first matched to the first: an upper bound on the
            distance of their orbits, as matching finds a good transform and not always the best.
        kinds: Symmetries to match by.
        chunk: How many pairs are matched at once.
        generator: For the matching.

    Returns:
        ``(models, models)`` float64, symmetric, with zeros on the diagonal.

    Raises:
        SpaceMismatch: If a state does not fit the space.
    """
    for state in states:
        space.validate(state)
    names = [p.name for p in space.params if not p.buffer]
    if not align:
        total = torch.zeros(len(states), len(states), dtype=torch.float64)
        for name in names:
            total += _squares(torch.stack([_real(s[name]).cpu().double() for s in states]))
        return total.sqrt()
    out = torch.zeros(len(states), len(states), dtype=torch.float64)
    pairs = [(i, j) for j in range(len(states)) for i in range(j)]
    known = [p.name for p in space.params]
    for start in range(0, len(pairs), chunk):
        some = pairs[start : start + chunk]
        a, b = ({n: torch.stack([states[ij[k]][n] for ij in some]) for n in known} for k in (0, 1))
        b = act(match(a, b, space, kinds=kinds, generator=generator), b, space)
        found = [(_real(a[n]) - _real(b[n])).double().square().flatten(1).sum(1) for n in names]
        for (i, j), square in zip(some, sum(found, torch.zeros(())).tolist(), strict=True):
            out[i, j] = out[j, i] = sqrt(square)
    return out


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


# ------------------------------------------------------------------------------ a map


@dataclass(frozen=True)
class Embedding:
    """Points whose distances are near to given ones.

    Attributes:
        points: ``(models, dims)`` float64, centred; along the axes of largest spread.
        eigenvalues: ``(models,)`` of the centred products, the largest first: the squared spread
            along each axis. Negative ones say that the distances are not those of points.
    """

    points: Tensor
    eigenvalues: Tensor

    @property
    def explained(self) -> float:
        """Share of all spread, by absolute eigenvalue, that the points show."""
        size = self.eigenvalues.abs()
        shown = self.eigenvalues[: self.points.shape[1]].clamp_min(0)
        return float(shown.sum() / size.sum().clamp_min(torch.finfo(size.dtype).tiny))


def embed(distances: Tensor, dims: int = 2) -> Embedding:
    r"""Classical scaling: the points whose inner products are nearest to those of the distances.

    The eigenvectors of :math:`-\frac12 J D^{\circ 2} J`, with :math:`J` the centring matrix, times
    the roots of their eigenvalues; exact if the distances are Euclidean in `dims` dimensions. The
    sign of an axis is such that its largest coordinate is positive.

    Args:
        distances: ``(models, models)``, symmetric, such as the mean of a divergence both ways.
        dims: Of the points.

    Returns:
        The points, and how much of the spread they show.

    Raises:
        MeasureError: If the matrix is not one of distances.

    References:
        Torgerson (1952), Multidimensional scaling: I. Theory and method. Psychometrika 17.
    """
    d = distances.double()
    wrong = ""
    if d.dim() != 2 or d.shape[0] != d.shape[1]:
        wrong = f"shape {tuple(d.shape)}"
    elif not bool(torch.isfinite(d).all()):
        wrong = "entries that are not finite"
    elif d.numel() and not torch.allclose(d, d.mT, rtol=1e-6, atol=1e-9 * float(d.abs().max())):
        wrong = "one that is not symmetric"
    if wrong:
        raise MeasureError(
            message("embed: not a matrix of distances", expected="(models, models), symmetric",
                    got=wrong, help="for KL, give (d + d.T) / 2")
        )  # fmt: skip
    square = ((d + d.mT) / 2).square()
    inner = -(square - square.mean(0) - square.mean(1)[:, None] + square.mean()) / 2
    values, vectors = torch.linalg.eigh(inner)
    values, vectors = values.flip(0), vectors.flip(1)[:, :dims]
    points = vectors * values[:dims].clamp_min(0).sqrt()
    top = points.gather(0, points.abs().argmax(0)[None]) if len(points) else points.new_ones(1, 0)
    points = points * torch.where(top < 0, -1.0, 1.0)
    missing = dims - points.shape[1]
    return Embedding(nn.functional.pad(points, (0, max(missing, 0))), values)
