r"""What weights alone say of each unit: numbers for every node of a parameter graph.

Two passes over the graph estimate, without data, how large the signal in a unit is and how much of
what it sends arrives at the outputs. Means and variances are those of independent normal variables
(mean-field theory; Poole et al. 2016, arXiv 1606.05340), of mean 0 and variance 1 at the inputs:

.. math::
    \mu_t = \sum_s w_{ts} \mu'_s + b_t, \quad v_t = \sum_s w_{ts}^2 v'_s, \qquad
    S_s = \phi_s \sum_t w_{ts}^2 S_t,

where primes stand behind a unit's normalisation (:math:`\mu' = \beta, v' = \gamma^2` for BatchNorm)
and activation function, of mean squared slope :math:`\phi`. The taps of a kernel are taken as
half correlated. The sum of :math:`(\mu'^2_s + v'_s) w_{ts}^2 S_t` over all that a unit is read by
estimates the second moment of the change of the outputs when it is taken away. Everything is given
relative to the network's own averages, so that absolute sizes do not matter.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import pi, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from wspace.graph import ParameterGraph
from wspace.graph.structure import Structure
from wspace.nn.layout import EdgeForm, forms_of

SMALL = 1e-12
"""Least second moment: below this a unit is as good as absent."""

LOGS = ("incoming", "outgoing", "signal", "sensitivity", "effect", "variation")
"""Numbers whose logarithms are given relative to the node set's mean, and that to all sets'."""

OTHERS = ("offset", "peak", "likeness", "fixed")
FEATURES = 2 * len(LOGS) + len(OTHERS)
"""Length of the vector of a unit."""

CORRELATED = 0.5
"""Share of the variance that the taps of a kernel have in common."""

WIDEST = 4096
"""Units of one set that are compared pair by pair."""

_RECTIFIERS = ("relu", "gelu", "silu", "mish", "hardswish", "softplus")
_BOUNDED = ("tanh", "sigmoid", "erf", "sin")


def unit_features(graph: ParameterGraph) -> Tensor:
    """Features of all nodes, permutation-equivariant.

    Args:
        graph: A graph with any batch axes.

    Returns:
        ``(rows, N, FEATURES)``: rows are the batch axes, flattened; order of the last axis: `LOGS`
        relative to their node set, `LOGS` of node sets relative to the network, `OTHERS`.
    """
    field = _Field(graph)
    field.forward()
    field.backward()
    logs = torch.stack([(getattr(field, name) + SMALL).log() for name in LOGS], -1)
    own, sets = _centred(graph.structure, logs)
    plain = field.bias / (field.incoming + SMALL).sqrt()
    normal = field.shift / (field.scale.abs() + SMALL)
    offset = torch.where(field.normed, normal, plain).clamp(-4, 4)
    peak = ((field.peak + SMALL).log() - (field.outgoing + SMALL).log()).clamp(-8, 0)
    fixed = _fixed(graph.structure).to(offset).expand_as(offset)
    others = torch.stack([offset, peak, _likeness(graph, field.rows), fixed], -1)
    return torch.cat([own, sets, others], -1)


def estimated(features: Tensor) -> Tensor:
    """The logarithm of the estimated effect of every node, relative to the network's mean.

    Args:
        features: From `unit_features`.

    Returns:
        ``(rows, N)``.
    """
    k = LOGS.index("effect")
    return features[..., k] + features[..., len(LOGS) + k]


# --------------------------------------------------------------------------- two passes


@dataclass(frozen=True)
class _Level:
    """Signals as something reads them: behind norms and activation functions, or not."""

    mean: Tensor
    variance: Tensor
    slope: Tensor

    @property
    def moment(self) -> Tensor:
        """The second one."""
        return self.mean.square() + self.variance


class _Field:
    """Estimates for all nodes of some networks, ``(rows, N)`` each."""

    def __init__(self, graph: ParameterGraph) -> None:
        self.graph, self.rows = graph, prod(graph.batch)
        self.structure = graph.structure
        like = next(iter(graph.values.values()))
        zero = torch.zeros(self.rows, self.structure.total).to(like)
        self.zero = zero
        self.incoming, self.outgoing, self.peak = (zero.clone() for _ in range(3))
        self.mean, self.variance = zero.clone(), zero.clone()
        self.signal, self.sensitivity = zero.clone(), zero.clone()
        self.effect, self.variation = zero.clone(), zero.clone()
        self.bias, self.shift = zero.clone(), zero.clone()
        self.scale, self.spread = zero + 1, zero + 1
        self.normed = torch.zeros(zero.shape[1], dtype=torch.bool, device=zero.device)
        self.batch_normed = self.normed.clone()
        self._read_features()
        for form, (_, squares) in zip(self.forms, self.weights, strict=True):
            if not form.block.structural:
                source, target = self._ends(form)
                self.incoming.index_add_(1, target, squares.sum(3).flatten(1))
                self.outgoing.index_add_(1, source, squares.sum(2).flatten(1))
                top = squares.amax(2).flatten(1)
                self.peak.scatter_reduce_(1, source.expand_as(top), top, "amax")

    @property
    def forms(self) -> tuple[EdgeForm, ...]:
        return forms_of(self.structure).edges

    @cached_property
    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Of every block the sums over taps and what squares weigh, ``(rows, P, T, S)``."""
        return [self._weights(form) for form in self.forms]

    def _weights(self, form: EdgeForm) -> tuple[Tensor, Tensor]:
        raw = form.raw(self.graph, self.rows)
        if raw is None:  # what softmax gives weighs others and adds up to one
            block, nodes = form.block, self.structure.nodes
            assert block.source is not None
            silent = any("softmax" in act for act in nodes[block.source.nodes].acts)
            one = torch.full((1, *form.sizes[:3]), float(not silent)).to(self.zero)
            one = one.expand(self.rows, *form.sizes[:3])
            return one, one
        raw = raw.to(self.zero)
        sums, squares = raw.sum(-1), raw.square().sum(-1)
        if self.structure.nodes[form.block.target.nodes].kind == "output" and form.sizes[1] > 1:
            centred = raw - raw.mean(2, keepdim=True)  # logits matter up to a constant
            sums, squares = centred.sum(-1), centred.square().sum(-1)
        if form.block.op == "conv":
            squares = CORRELATED * sums.square() + (1 - CORRELATED) * squares
        return sums, squares

    def _read_features(self) -> None:
        for form in forms_of(self.structure).features:
            at = form.target + self.structure.offsets[form.block.target.nodes]
            at, tag = at.to(self.zero.device), form.block.tag
            raw = form.raw(self.graph, self.rows).to(self.zero)
            if tag.startswith("norm.scale"):
                self.scale[:, at] = self.scale[:, at] * raw.mean(-1)
            elif tag.startswith("norm.shift"):
                self.shift[:, at] = raw.mean(-1)
            elif tag.startswith("norm.var"):
                self.spread[:, at], self.batch_normed[at] = raw.mean(-1), True
            elif not tag.startswith("norm."):
                self.bias[:, at] = self.bias[:, at] + raw.mean(-1)
                if raw.shape[-1] > 1:  # positions: what varies over them
                    self.variance[:, at] = self.variance[:, at] + raw.var(-1)
            if tag.startswith("norm."):
                self.normed[at] = True

    def _ends(self, form: EdgeForm) -> tuple[Tensor, Tensor]:
        """Units of a block's two ends, numbered over all sets."""
        source, target = form.block.source, form.block.target
        assert source is not None
        at, device = self.structure.offsets, self.zero.device
        begin, end = form.source + at[source.nodes], form.target + at[target.nodes]
        return begin.to(device), end.to(device)

    def _places(self, i: int) -> slice:
        at = self.structure.offsets[i]
        return slice(at, at + self.structure.nodes[i].size)

    def _order(self) -> list[int]:
        nodes = self.structure.nodes
        return sorted(range(len(nodes)), key=lambda i: (nodes[i].depth, i))

    def levels(self, i: int) -> tuple[_Level, _Level, _Level]:
        """Signals of a node set: raw, behind its norm, and behind its activation function too."""
        at, nodes = self._places(i), self.structure.nodes[i]
        mean, variance = self.mean[:, at], self.variance[:, at]
        raw = _Level(mean, variance, torch.ones_like(mean))
        scale, shift, spread = self.scale[:, at], self.shift[:, at], self.spread[:, at]
        moment = raw.moment.mean(1, keepdim=True) + SMALL
        layer = _Level(
            shift + scale * mean * moment.rsqrt(),
            scale.square() * variance / moment,
            scale.square() / moment,
        )
        batch = _Level(shift, scale.square(), scale.square() / (spread + SMALL))
        kind, has = self.batch_normed[at], self.normed[at]
        normal = _Level(
            *[
                torch.where(has, torch.where(kind, b, a), r)
                for a, b, r in zip(_parts(layer), _parts(batch), _parts(raw), strict=True)
            ]
        )
        return raw, normal, _bent(normal, nodes.acts)

    def forward(self) -> None:
        """Means and variances, set by set in the order of depth."""
        known: dict[int, tuple[_Level, _Level, _Level]] = {}
        for i in self._order():
            at = self._places(i)
            into = [k for k, f in enumerate(self.forms) if f.block.target.nodes == i]
            if not into:
                self.variance[:, at] = self.variance[:, at] + 1
            for k in into:
                form, (sums, squares) = self.forms[k], self.weights[k]
                assert form.block.source is not None
                level = known.get(form.block.source.nodes)
                if level is None:  # a loop: as good as an input
                    level = self.levels(form.block.source.nodes)
                read, (p, _, s, _) = level[_behind(form)], form.sizes
                _, target = self._ends(form)
                shape = (self.rows, p, 1, s)
                mean, variance = read.mean[:, form.source], read.variance[:, form.source]
                moved = (sums * mean.reshape(shape)).sum(3).flatten(1)
                self.mean = self.mean.index_add(1, target, moved)
                spread = (squares * variance.reshape(shape)).sum(3).flatten(1)
                self.variance = self.variance.index_add(1, target, spread)
            self.mean[:, at] = self.mean[:, at] + self.bias[:, at]
            known[i] = self.levels(i)
            self.signal[:, at] = known[i][2].moment
        self.known = known

    def backward(self) -> None:
        """Shares of a unit's signal that arrive at the outputs, set by set against the depth."""
        for i in reversed(self._order()):
            at = self._places(i)
            out = [
                k for k, f in enumerate(self.forms) if f.block.source and f.block.source.nodes == i
            ]
            if self.structure.nodes[i].kind == "output" or not out:
                self.sensitivity[:, at], self.effect[:, at], self.variation[:, at] = 1.0, 1.0, 1.0
            for k in out:
                form, (_, squares) = self.forms[k], self.weights[k]
                source, target = self._ends(form)
                p, t, _, _ = form.sizes
                there = self.sensitivity[:, target].reshape(-1, p, t, 1)
                back = (squares * there).sum(2).flatten(1)
                level, own = self.known[i][_behind(form)], form.source.to(source.device)
                self.effect.index_add_(1, source, back * level.moment[:, own])
                self.variation.index_add_(1, source, back * level.variance[:, own])
                self.sensitivity.index_add_(1, source, back * level.slope[:, own])


def _parts(level: _Level) -> tuple[Tensor, Tensor, Tensor]:
    return level.mean, level.variance, level.slope


def _bent(x: _Level, acts: tuple[str, ...]) -> _Level:
    """Moments behind an activation function of a normal variable, and its mean squared slope."""
    if any(r in act for act in acts for r in _RECTIFIERS):
        deviation = (x.variance + SMALL).sqrt()
        z = x.mean / deviation
        active = torch.special.ndtr(z)
        density = (-0.5 * z.square()).exp() * (2 * pi) ** -0.5
        mean = x.mean * active + deviation * density
        second = x.moment * active + x.mean * deviation * density
        return _Level(mean, (second - mean.square()).clamp(min=0), x.slope * active)
    if any(r in act for act in acts for r in _BOUNDED):
        whole = 1 + x.moment
        return _Level(x.mean * whole.rsqrt(), x.variance / whole, x.slope / whole)
    return x


def _behind(form: EdgeForm) -> int:
    """What of its source a block reads: 0 raw, 1 behind its norm, 2 behind its activation."""
    tag = form.block.tag
    if any(word in tag for word in (*_RECTIFIERS, *_BOUNDED)):
        return 2
    return 1 if "norm" in tag else 0


# ---------------------------------------------------------------------------- relative


def _centred(structure: Structure, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms less the mean of their node set, and these means less that of hidden sets."""
    sizes = [n.size for n in structure.nodes]
    parts = logs.split(sizes, 1)
    means = torch.stack([x.mean(1) for x in parts], 1)
    hidden = [i for i, n in enumerate(structure.nodes) if n.kind == "hidden"]
    level = means[:, hidden or slice(None)].mean(1, keepdim=True)
    own = torch.cat([x - x.mean(1, keepdim=True) for x in parts], 1)
    repeats = torch.tensor(sizes, device=logs.device)
    return own, (means - level).repeat_interleave(repeats, 1).clamp(-20, 20)


def _likeness(graph: ParameterGraph, rows: int) -> Tensor:
    """Greatest cosine between the incoming weights of a unit and of another in its set."""
    structure = graph.structure
    like = next(iter(graph.values.values()))
    out = torch.zeros(rows, structure.total).to(like)
    for form in forms_of(structure).edges:
        p, t, s, f = form.sizes
        raw = form.raw(graph, rows) if p == 1 and 1 < t <= WIDEST else None
        if raw is None:
            continue
        x = F.normalize(raw.to(like).reshape(rows, t, s * f), dim=2)
        near = (x @ x.mT).masked_fill(torch.eye(t, dtype=torch.bool, device=x.device), -1.0)
        target = form.target + structure.offsets[form.block.target.nodes]
        out[:, target.to(x.device)] = near.amax(2)
    return out


@lru_cache(maxsize=64)
def _fixed(structure: Structure) -> Tensor:
    return torch.cat([torch.full((n.size,), float(n.fixed)) for n in structure.nodes])
