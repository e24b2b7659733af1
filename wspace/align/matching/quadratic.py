r"""Quadratic assignment: groups that occur on two axes of one piece.

What is maximised over permutations, with the pieces' A and B, is

.. math:: f(P) = \langle C, P \rangle + \sum \langle A, P B P^\top \rangle.

For few units all of them are tried; else Frank-Wolfe over doubly stochastic matrices with exact
line search, from the identity and from the barycentre (Vogelstein et al. 2015, Fast Approximate
Quadratic Programming, algorithm 1), projected, then exchanges of two units while one gains.
"""

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from wspace.align.matching.assign import Ask

EVERY = 5
"""Up to so many units, all permutations are tried."""
STEPS = 30
"""Frank-Wolfe steps from each start."""
Pairs = Sequence[tuple[Tensor, Tensor]]


def quadratic(linear: Tensor, pairs: Pairs) -> Ask:
    """The best rearrangement that is found, for each row, and what it gains on the identity.

    Args:
        linear: ``(rows, n, n)``, float64.
        pairs: A and B of each piece, ``(rows, n, n, rest)``.

    Yields:
        Costs of linear assignments.

    Returns:
        Permutations ``(rows, n)``, and gains ``(rows,)``, float64, never negative.
    """
    rows, n, _ = linear.shape
    still = torch.arange(n, device=linear.device).expand(rows, n)
    start = value(linear, pairs, still)
    if n <= EVERY:
        every = torch.tensor([*permutations(range(n))], device=linear.device)
        found = torch.stack([value(linear, pairs, p.expand(rows, n)) for p in every])
        best, which = found.max(0)
        better = best > start
        return torch.where(better[:, None], every[which], still), (best - start).clamp(min=0)
    eye = torch.eye(n, dtype=torch.float64, device=linear.device).expand(rows, n, n)
    best, chosen = start, still
    for begin in (eye, torch.full_like(eye, 1 / n)):
        soft = yield from _frank_wolfe(linear, pairs, begin)
        p = yield soft
        p = _exchanged(linear, pairs, p)
        got = value(linear, pairs, p)
        better = got > best
        best, chosen = torch.where(better, got, best), torch.where(better[:, None], p, chosen)
    return chosen, best - start


def value(linear: Tensor, pairs: Pairs, p: Tensor) -> Tensor:
    """What is maximised, at permutations ``(rows, n)``: ``(rows,)``, float64."""
    total = linear.gather(-1, p[..., None])[..., 0].sum(-1)
    row = torch.arange(len(p), device=p.device)[:, None, None]
    for a, b in pairs:
        moved = b[row, p[:, :, None], p[:, None, :]]
        total = total + (a * moved).sum((1, 2, 3), dtype=torch.float64)
    return total


def _sides(a: Tensor, b: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to P on the first axis and on the second, the other one held."""
    r, n, _, f = a.shape
    soft = soft.to(a.dtype)
    # second axis of B moved: (rows, k, j*f), then contracted with A over k and f
    by_second = torch.einsum("rkl,rjlf->rjkf", soft, b).reshape(r, n, n * f)
    first = a.reshape(r, n, n * f) @ by_second.mT
    by_first = (soft @ b.reshape(r, n, n * f)).reshape(r, n, n, f)
    across = a.transpose(1, 2).reshape(r, n, n * f)
    second = across @ by_first.transpose(1, 2).reshape(r, n, n * f).mT
    return first.double(), second.double()


def _frank_wolfe(linear: Tensor, pairs: Pairs, soft: Tensor) -> Ask:
    done = torch.zeros(len(linear), dtype=torch.bool, device=linear.device)
    for _ in range(STEPS):
        sides = [_sides(a, b, soft) for a, b in pairs]
        slope = linear + sum((x + y for x, y in sides), torch.zeros_like(linear))
        target = yield slope
        step = torch.zeros_like(soft).scatter(2, target[..., None], 1.0) - soft
        along = (slope * step).sum((1, 2))
        bend = torch.zeros_like(along)
        for a, b in pairs:
            bend = bend + (_sides(a, b, step)[0] * step).sum((1, 2))
        full = along + bend > 0  # a step of 1 gains, which is the best where the slope rises
        inner = (-along / (2 * bend)).clamp(0, 1)
        size = torch.where(bend < 0, inner, full.double())
        done = done | (along <= 1e-9 * (slope * soft).sum((1, 2)).abs()) | (size == 0)
        soft = soft + torch.where(done, 0.0, size)[:, None, None] * step
        if bool(done.all()):
            break
    return soft


def _exchanged(linear: Tensor, pairs: Pairs, p: Tensor) -> Tensor:
    """Permutations improved by the exchange of two units that gains most, while one gains."""
    rows, n = p.shape
    row = torch.arange(rows, device=p.device)
    for _ in range(n):
        gains = _exchange_gains(linear, pairs, p)
        best, which = gains.flatten(1).max(1)
        good = best > 1e-12 * value(linear, pairs, p).abs()
        if not bool(good.any()):
            break
        i, k = which // n, which % n
        swapped = p.clone()
        swapped[row, i], swapped[row, k] = p[row, k], p[row, i]
        p = torch.where(good[:, None], swapped, p)
    return p


def _exchange_gains(linear: Tensor, pairs: Pairs, p: Tensor) -> Tensor:
    """What every exchange of two units would gain: ``(rows, n, n)``, float64."""
    row = torch.arange(len(p), device=p.device)[:, None, None]
    moved = linear.gather(2, p[:, None, :].expand_as(linear))
    total = _swap(moved)
    for a, given in pairs:
        b = given[row, p[:, :, None], p[:, None, :]]
        r, n, _, f = a.shape
        over_columns = a.reshape(r, n, n * f) @ b.reshape(r, n, n * f).mT
        at, bt = a.transpose(1, 2), b.transpose(1, 2)
        over_rows = at.reshape(r, n, n * f) @ bt.reshape(r, n, n * f).mT
        total = total + _swap(over_columns.double()) + _swap(over_rows.double())
        total = total + _crossing(a.double(), b.double())
    return total


def _swap(x: Tensor) -> Tensor:
    """``x[i, k] + x[k, i] - x[i, i] - x[k, k]``."""
    d = x.diagonal(dim1=1, dim2=2)
    return x + x.mT - d[:, :, None] - d[:, None, :]


def _crossing(a: Tensor, b: Tensor) -> Tensor:
    """Correction for the entries that both a row and a column of the exchange meet."""
    ad, bd = (x.diagonal(dim1=1, dim2=2).mT for x in (a, b))  # (rows, n, rest)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-1)

    at, bt = a.transpose(1, 2), b.transpose(1, 2)
    a_i, a_k, b_i, b_k = ad[:, :, None], ad[:, None], bd[:, :, None], bd[:, None]
    # Entries (i,i), (i,k), (k,i), (k,k): what the exchange gives, less what was there, less what
    # the sums over whole rows and whole columns took them for.
    exchanged = inner(a_i, b_k) + inner(a_k, b_i) + inner(a, bt) + inner(at, b)
    before = inner(a_i, b_i) + inner(a_k, b_k) + inner(a, b) + inner(at, bt)
    rows_took = inner(a_i, bt) + inner(a, b_k) + inner(at, b_i) + inner(a_k, b)
    rows_took = rows_took - before
    columns_took = inner(a_i, b) + inner(at, b_k) + inner(a, b_i) + inner(a_k, bt)
    columns_took = columns_took - before
    return exchanged - before - rows_took - columns_took
