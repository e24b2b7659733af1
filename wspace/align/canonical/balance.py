r"""Balancing: the positive scales under which a network's weights have the least total square.

Multiplying the units of a gauge by :math:`s_u = e^{x_u}` multiplies an entry by
:math:`e^{\langle k, x\rangle}`, so the total square is a sum of exponentials of linear functions of
:math:`x`: convex, and strictly so in every direction that changes the weights. Its minimum is
therefore one state of the orbit, whatever state of the orbit it was found from. For a unit of a
ReLU network it is where the incoming and outgoing weights have the same norm (path-SGD's and
weight decay's fixed point; Neyshabur, Salakhutdinov, Srebro 2015; Stock et al. 2019, "Equi-norm").

Where all weights of a unit scale the same way there is no minimum: the unit's own exponents are
then met by a counterweight :math:`-2x_u`, which puts its weights at unit norm. A unit without
weights keeps the factor 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from wspace.action import State, Transform, shape_of
from wspace.align.canonical.laying import batch_of
from wspace.nn.pieces import Piece, pieces, places
from wspace.space import WeightSpace

STILL = 1e-11  # largest change of a logarithm in a last step; that step's error is far smaller
LITTLE = 1e-22  # gain of a last step, relative to the total
RIDGE = 1e-9
FORCING = 1e-4
HALVINGS = 12


def balance(state: State, space: WeightSpace, *, steps: int = 100) -> Transform:
    """The scales that make the total square of a state least.

    Newton's method; its linear systems by conjugate gradients, which read every tensor once or
    twice. Buffers that a gauge multiplies count; tied tensors count once.

    Commutes with permutations and signs, and gives the same state wherever in the orbit of the
    scales it starts, up to rounding. If the zeros of the weights let some entries shrink for ever
    while none grows, as in some pruned networks, there is no minimum: it stops after `steps`.

    Args:
        state: Tensors by name, ``(*batch, *shape)``; read one at a time, and the squares of those
            that some scale moves are kept in float64.
        space: Weight space of the state.
        steps: Largest number of Newton steps.

    Returns:
        A transform of scales only, batched if the state is: ``act(balance(state, space), state,
        space)`` is the balanced state.

    Raises:
        SpaceMismatch: If the state does not fit the space.

    Example:
        >>> import torch, wspace
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> space, state = wspace.trace(mlp, torch.zeros(1, 3)), mlp.state_dict()
        >>> even = wspace.act(balance(state, space), state, space)
        >>> before = even["0.weight"].square().sum(1) + even["0.bias"].square()
        >>> torch.allclose(before, even["2.weight"].square().sum(0))
        True
    """  # noqa: DOC502 (batch_of raises)
    batch = batch_of(state, space)
    groups = dict.fromkeys(g.group for g in space.gauges if g.kind == "scale")
    if not groups or 0 in batch:
        return Transform(space, {}, {})
    unknowns = _Unknowns(space, tuple(groups), prod(batch))
    logs = _Problem(unknowns, _terms(unknowns, state, space, len(batch))).solve(steps)
    factors = {
        i: x.exp().reshape(*batch, *x.shape[1:])
        for name, gauges in unknowns.gauges.items()
        for i, x in zip(gauges, unknowns.of(logs, name).unbind(-1), strict=True)
    }
    return Transform(space, {}, factors)


class _Factor(NamedTuple):
    """How the factors of one group multiply the squares of a term.

    Attributes:
        group: The group.
        places: Axes of the squares that its units lie along, ``(*over, own)``.
        exponents: One for each of the group's gauges.
    """

    group: str
    places: tuple[int, ...]
    exponents: tuple[float, ...]


@dataclass
class _Term:
    """Squares of entries that are multiplied in one way, summed over what no scale tells apart.

    Attributes:
        squares: ``(rows, *axes)``, float64.
        factors: What multiplies them.
    """

    squares: Tensor
    factors: tuple[_Factor, ...]

    def marginal(self, weights: Sequence[Tensor], target: tuple[int, ...]) -> Tensor:
        """The weighted squares summed over all axes but some.

        Args:
            weights: For each factor, ``(rows, *over, size)``.
            target: The axes that remain, in order.

        Returns:
            ``(rows, *target)``.
        """
        if len(weights) == 2 and target in ((0,), (1,)) and self.squares.dim() == 3:
            own, other = weights if target == self.factors[0].places else reversed(weights)
            x = self.squares if target == (0,) else self.squares.mT
            return own * (x @ other[..., None])[..., 0]
        x, axes = self.squares, list(range(self.squares.dim() - 1))
        order = range(len(weights))
        waiting = sorted(order, key=lambda f: (self._inside(f, target), -self._depth(f)))
        while waiting:
            f, *waiting = waiting
            needed = {*target, *(j for w in waiting for j in self.factors[w].places)}
            left = [a for a in axes if a in needed]
            places = self.factors[f].places
            x = torch.einsum(x, _labels(axes), weights[f], _labels(places), _labels(left))
            axes = left
        return x if axes == list(target) else torch.einsum(x, _labels(axes), _labels(target))

    def _inside(self, f: int, target: tuple[int, ...]) -> bool:
        return set(self.factors[f].places) <= set(target)

    def _depth(self, f: int) -> int:
        return len(self.factors[f].places)


def _labels(axes: Sequence[int]) -> list[int]:
    return [0, *(1 + a for a in axes)]


def _terms(unknowns: "_Unknowns", state: State, space: WeightSpace, lead: int) -> list[_Term]:
    """The total square as few terms: pieces that are multiplied in one way are added up."""
    found: dict[tuple[object, ...], _Term] = {}
    for piece in pieces(space, buffers=True):
        scaled = [k for k, s in enumerate(piece.slots) if s.scales]
        if not scaled:
            continue
        kept = sorted({j for k in scaled for j in places(piece, k)})
        x = piece.read(state, lead).cpu().double().square().sum(-1)
        gone = [1 + k for k in range(len(piece.slots)) if k not in kept]
        x = x.sum(gone) if gone else x
        factors = tuple(_factor(unknowns, piece, k, kept) for k in scaled)
        key = (x.shape, factors)
        if key in found:
            found[key].squares = found[key].squares + x
        else:
            found[key] = _Term(x, factors)
    return list(found.values())


def _factor(unknowns: "_Unknowns", piece: Piece, k: int, kept: list[int]) -> _Factor:
    slot = piece.slots[k]
    held = dict(slot.scales)
    exponents = tuple(float(held.get(i, 0)) for i in unknowns.gauges[slot.group])
    return _Factor(slot.group, tuple(kept.index(j) for j in places(piece, k)), exponents)


class _Unknowns:
    """A vector ``(rows, unknowns)``: for every unit of a group, one number for each of its gauges.

    Attributes:
        gauges: Group → its scale gauges.
        shapes: Group → ``(*over, size, gauges)``.
        rows: Number of rows.
        total: Number of unknowns.
    """

    def __init__(self, space: WeightSpace, groups: Sequence[str], rows: int) -> None:
        self.rows, self.total = rows, 0
        self.gauges: dict[str, tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, slice] = {}
        for name in groups:
            own = [i for i, g in enumerate(space.gauges) if (g.kind, g.group) == ("scale", name)]
            self.gauges[name] = tuple(own)
            self.shapes[name] = (*shape_of(space.all_groups[name], space), len(own))
            self._where[name] = slice(self.total, self.total + prod(self.shapes[name]))
            self.total += prod(self.shapes[name])

    def zeros(self) -> Tensor:
        """The vector of zeros, float64."""
        return torch.zeros(self.rows, self.total, dtype=torch.float64)

    def of(self, vector: Tensor, group: str) -> Tensor:
        """The numbers of one group, ``(rows, *over, size, gauges)``: a view."""
        return vector[:, self._where[group]].unflatten(1, self.shapes[group])

    def common(self, vector: Tensor) -> Tensor:
        """Sums over the units of each gauge, ``(rows, all gauges)``."""
        parts = [self.of(vector, g).flatten(1, -2).sum(1) for g in self.gauges]
        return torch.cat(parts, 1)

    def spread(self, values: Tensor) -> Tensor:
        """The vector that gives all units of a gauge one number, from ``(rows, all gauges)``."""
        out, start = self.zeros(), 0
        for g, gauges in self.gauges.items():
            own = values[:, start : start + len(gauges)]
            start += len(gauges)
            view = self.of(out, g)
            view.copy_(own.reshape(self.rows, *[1] * (view.dim() - 2), len(gauges)).expand_as(view))
        return out


class _Problem:
    """The total square as a function of the logarithms of the scales, and its minimum."""

    def __init__(self, unknowns: _Unknowns, terms: list[_Term]) -> None:
        self.u, self.terms = unknowns, terms
        self.rates = {
            (f.group, f.exponents): torch.tensor(f.exponents, dtype=torch.float64)
            for term in terms
            for f in term.factors
        }
        self.totals = torch.stack([self._total(term) for term in terms])
        self.pull, self.alive = self._counterweights()

    def _total(self, term: _Term) -> Tensor:
        """Exponents of factors common to all units of each gauge."""
        parts: list[Tensor] = []
        for g, gauges in self.u.gauges.items():
            none = torch.zeros(len(gauges), dtype=torch.float64)
            parts.append(sum((self.rate(f) for f in term.factors if f.group == g), none))
        return torch.cat(parts)

    def rate(self, f: _Factor) -> Tensor:
        """Exponents of the gauges of a factor's group, ``(gauges,)``."""
        return self.rates[f.group, f.exponents]

    def weights(self, x: Tensor) -> list[list[Tensor]]:
        """For each term, what its factors are at a point."""
        known = {
            (g, exponents): (2 * self.u.of(x, g) @ rate).exp()
            for (g, exponents), rate in self.rates.items()
        }
        return [[known[f.group, f.exponents] for f in term.factors] for term in self.terms]

    def own(self, weights: list[list[Tensor]]) -> Iterator[tuple[_Factor, Tensor]]:
        """Weighted squares of every unit, for each factor of each term."""
        for term, held in zip(self.terms, weights, strict=True):
            for f in term.factors:
                yield f, term.marginal(held, f.places)

    def _counterweights(self) -> tuple[Tensor, Tensor]:
        """1 for a unit whose weights only grow with its factor, −1 if they only shrink, else 0.

        Returns:
            Those numbers, and whether a unit has any weights.
        """
        up, down = self.u.zeros(), self.u.zeros()
        for f, own in self.own(self.weights(self.u.zeros())):
            for side, sign in ((up, 1), (down, -1)):
                acts = sign * self.rate(f) > 0
                self.u.of(side, f.group).add_((own > 0)[..., None] & acts)
        pull = ((up > 0) & (down == 0)).double() - ((down > 0) & (up == 0)).double()
        return pull, (up > 0) | (down > 0)

    def value(self, x: Tensor) -> Tensor:
        """The total square less the counterweights, ``(rows,)``."""
        parts = [t.marginal(w, ()) for t, w in zip(self.terms, self.weights(x), strict=True)]
        return sum(parts[1:], parts[0]) - 2 * (self.pull * x).sum(1)

    def solve(self, steps: int) -> Tensor:
        """Newton's method; rows that stand still are left alone."""
        x, moving = self.u.zeros(), torch.ones(self.u.rows, dtype=torch.bool)
        best = self.value(x)
        for _ in range(steps):
            model = _Quadratic(self, x)
            step = model.minimum(moving)
            size, gain = step.abs().amax(1), -(model.slope * step).sum(1)
            step = step / size.clamp(min=1.0)[:, None] * moving[:, None]
            value = self.value(x + step)
            for _ in range(HALVINGS):
                worse = value > best + 1e-13 * best.abs()
                if not worse.any():
                    break
                step = torch.where(worse[:, None], step / 2, step)
                value = self.value(x + step)
            x, best = x + step, torch.minimum(value, best)
            moving = moving & (size > STILL) & (gain > LITTLE * best.abs())
            if not moving.any():
                break
        return x * self.alive


class _Quadratic:
    """The second-order model of a problem at a point."""

    def __init__(self, problem: _Problem, x: Tensor) -> None:
        self.p, self.u = problem, problem.u
        self.weights = problem.weights(x)
        self.slope = -2 * problem.pull
        self.local = {
            g: torch.zeros(self.u.rows, *shape, shape[-1], dtype=torch.float64)
            for g, shape in self.u.shapes.items()
        }
        for f, own in problem.own(self.weights):
            rate = problem.rate(f)
            self.u.of(self.slope, f.group).add_(2 * own[..., None] * rate)
            self.local[f.group] += 4 * own[..., None, None] * (rate[:, None] * rate)
        for a in self.local.values():  # gauges may have the same effect, up to what is zero
            a.diagonal(dim1=-2, dim2=-1).mul_(1 + RIDGE)
        self.inverse = {g: _inverted(a) for g, a in self.local.items()}
        pairs = zip(problem.terms, self.weights, strict=True)
        n = torch.stack([t.marginal(w, ()) for t, w in pairs], 1)
        curve = 4 * torch.einsum("rp,pg,ph->rgh", n, problem.totals, problem.totals)
        self.coarse = _inverted(curve)

    def times(self, v: Tensor) -> Tensor:
        """The second derivative in a direction."""
        out = self.u.zeros()
        for g, a in self.local.items():
            self.u.of(out, g).copy_((a @ self.u.of(v, g)[..., None])[..., 0])
        for term, weights in zip(self.p.terms, self.weights, strict=True):
            for j, f in enumerate(term.factors if len(term.factors) > 1 else ()):
                turned = list(weights)
                turned[j] = weights[j] * (self.u.of(v, f.group) @ self.p.rate(f))
                for k, other in enumerate(term.factors):
                    if k != j:
                        part = term.marginal(turned, other.places)
                        view = self.u.of(out, other.group)
                        view.add_(4 * part[..., None] * self.p.rate(other))
        return out

    def eased(self, r: Tensor) -> Tensor:
        """An approximate solution: each unit alone, and each gauge as a whole."""
        out = self.u.spread((self.coarse @ self.u.common(r)[..., None])[..., 0])
        for g, a in self.inverse.items():
            self.u.of(out, g).add_((a @ self.u.of(r, g)[..., None])[..., 0])
        return out

    def minimum(self, moving: Tensor) -> Tensor:
        """The step to the minimum of the model, by conjugate gradients."""
        x, r = self.u.zeros(), -self.slope * moving[:, None]
        z = self.eased(r)
        d, rz = z, (r * z).sum(1)
        goal = FORCING**2 * rz
        for _ in range(200):
            turning = self.times(d)
            curve = (d * turning).sum(1)
            live = (rz > goal) & (curve > 0)
            if not live.any():
                break
            length = torch.where(live, rz / torch.where(live, curve, 1.0), 0.0)[:, None]
            x, r = x + length * d, r - length * turning
            z = self.eased(r)
            after = (r * z).sum(1)
            ratio = torch.where(live, after / torch.where(live, rz, 1.0), 0.0)
            d, rz = z + ratio[:, None] * d, torch.where(live, after, rz)
        return x


def _inverted(a: Tensor) -> Tensor:
    """Inverses of positive semidefinite matrices ``(..., n, n)``; 0 for a matrix of zeros."""
    size = a.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    unit = torch.where(size > 0, size, 1.0)
    ridge = 1e-10 * torch.eye(a.shape[-1], dtype=a.dtype)
    return torch.linalg.inv(a / unit + ridge) / unit * (size > 0)
