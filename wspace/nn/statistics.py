"""Simple baselines: what weights say without a graph, in the interface of a metanet.

Every baseline is called on a graph, whose batch axes stand for several networks, or on a list of
graphs, and answers with a vector for each network. `Baseline.fit_statistics` sets the scale of the
features from training data once; training and evaluation then compute the same, and no network's
answer depends on the others in its batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import log, log1p, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import SpaceMismatch, message
from wspace.graph.parameter import ParameterGraph
from wspace.graph.structure import structure_of
from wspace.nn.batch import by_space
from wspace.nn.probes import Probes
from wspace.nn.scales import ROLES, fan_in, graphs_in
from wspace.space import Param, WeightSpace

Values = dict[str, Tensor]
"""Parameters of several networks of one space by name, ``(rows, *shape)``."""

Features = list[tuple[int, Tensor]]
"""Features ``(rows, n, width)``, each with the row of `Baseline.center` that standardises it."""

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
STATISTICS = 2 + len(QUANTILES)
CODE = len(ROLES) + 7
"""Length of `tensor_codes`."""


class Baseline(nn.Module):
    """What the baselines share: lists, batch axes, and features that are standardised.

    A subclass gives `features` of several networks of one space, and the `answer` to them.

    Args:
        space: The only weight space whose graphs are accepted; None for any.
        slots: Number of kinds of features that have a mean and a standard deviation of their own.
        width: Size of a feature.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, space: WeightSpace | None, slots: int, width: int) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("center", torch.zeros(slots, width))
        self.register_buffer("spread", torch.ones(slots, width))

    def features(self, values: Values, space: WeightSpace) -> Features:
        """Features before standardisation."""
        raise NotImplementedError

    def answer(self, features: Sequence[Tensor], space: WeightSpace) -> Tensor:
        """Answers ``(rows, out)`` to standardised features."""
        raise NotImplementedError

    def forward(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> Tensor:
        """Runs on one graph or a list of graphs.

        Args:
            graphs: A graph, whose leading batch axes stand for several networks; or a list, of
                mixed architectures where the baseline is not made for one space.

        Returns:
            ``(*batch, out)``; for a list ``(rows, out)``, graphs in order, one row per network.

        Raises:
            SpaceMismatch: If the baseline is made for another space, or the list is empty.
        """
        if isinstance(graphs, ParameterGraph):
            rows = self._rows([graphs])
            return rows.unflatten(0, graphs.batch) if graphs.batch else rows[0]
        out: dict[int, Tensor] = {}
        for places in by_space(graphs):
            sizes = [prod(graphs[i].batch) for i in places]
            parts = self._rows([graphs[i] for i in places]).split(sizes)
            out.update(zip(places, parts, strict=True))
        return torch.cat([out[i] for i in range(len(graphs))])

    def fit_statistics(self, graphs: ParameterGraph | Sequence[ParameterGraph]) -> None:
        """Sets mean and standard deviation of the features from training networks.

        Until then nothing is scaled, except that weight matrices are multiplied by the root of
        their fan-in where features of several tensors are compared. A feature that never varies
        is only centred.

        Args:
            graphs: Training networks, as in `forward`.

        Raises:
            SpaceMismatch: If the baseline is made for another space, or the list is empty.
        """
        graphs = graphs_in(graphs)
        count = torch.zeros(len(self.center), 1, dtype=torch.float64)
        total = torch.zeros(self.center.shape, dtype=torch.float64)
        square = torch.zeros(self.center.shape, dtype=torch.float64)
        with torch.no_grad():
            for places in by_space(graphs):
                some = [graphs[i] for i in places]
                for slot, x in self.features(self._values(some), some[0].space):
                    y = x.double().flatten(0, 1).cpu()
                    count[slot] += len(y)
                    total[slot] += y.sum(0)
                    square[slot] += y.square().sum(0)
        mean = total / count.clamp(min=1)
        spread = (square / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        varies = spread > 1e-6 * (square / count.clamp(min=1)).sqrt()
        self.center.copy_(mean)
        self.spread.copy_(torch.where(varies, spread, 1.0))

    def _rows(self, graphs: Sequence[ParameterGraph]) -> Tensor:
        """Answers for graphs of one space, ``(rows, out)``."""
        values, space = self._values(graphs), graphs[0].space
        features = [
            (x - self.center[slot]) / self.spread[slot] for slot, x in self.features(values, space)
        ]
        return self.answer(features, space)

    def _values(self, graphs: Sequence[ParameterGraph]) -> Values:
        """Parameters of graphs of one space, stacked, in the baseline's own precision."""
        space = graphs[0].space
        if self.space is not None and space is not self.space and space != self.space:
            raise SpaceMismatch(
                message(
                    f"{type(self).__name__}: the graph is of another weight space",
                    expected=self.space.summary(),
                    got=space.summary(),
                    help="this baseline reads one architecture",
                )
            )
        out: Values = {}
        for p in space.params:
            parts = [g.values[p.name].reshape(-1, *p.shape) for g in graphs]
            out[p.name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.center.dtype)
        return out


class FlatMLP(Baseline):
    """A perceptron on all parameters in a row: **not** invariant to permutations of units.

    Moving a network's hidden units leaves its function and changes the answer, so this is the
    baseline that every equivariant network should beat. Every tensor has its own mean and scale.

    Args:
        space: Weight space of the networks.
        out: Length of the answer.
        hidden: Widths of the hidden layers.
        dropout: Share of hidden units left out in training.
    """

    def __init__(
        self,
        space: WeightSpace,
        out: int = 1,
        *,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(space, len(space.params), 1)
        length = sum(p.numel for p in space.params)
        self.head = _perceptron((length, *hidden, out), dropout)

    def features(self, values: Values, space: WeightSpace) -> Features:
        """Every tensor's entries."""
        return [
            (i, _unit_scale(p, values[p.name]).flatten(1)[..., None])
            for i, p in enumerate(space.params)
        ]

    def answer(self, features: Sequence[Tensor], space: WeightSpace) -> Tensor:
        """Perceptron on the entries of all tensors."""
        del space
        return self.head(torch.cat([x.flatten(1) for x in features], 1))


class StatNN(Baseline):
    """A perceptron on seven statistics of every tensor, which no permutation of units changes.

    Mean, variance and the quantiles at 0, 25, 50, 75 and 100 %. For one space the statistics of
    all tensors are concatenated, as published; otherwise each tensor's statistics are joined by a
    code of its role and depth (`tensor_codes`), mapped, and averaged over tensors, so that
    architectures may be mixed.

    Unterthiner, Keysers, Gelly, Bousquet, Tolstikhin (2020), "Predicting Neural Network Accuracy
    from Weights", section 4 (arXiv 2002.11448).

    Args:
        out: Length of the answer.
        space: Weight space of the networks, or None for any architectures.
        hidden: Widths of the hidden layers; mapping and answer have these each if `space` is None.
        dropout: Share of hidden units left out in training.
    """

    def __init__(
        self,
        out: int = 1,
        *,
        space: WeightSpace | None = None,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
    ) -> None:
        slots = len(ROLES) if space is None else len(space.params)
        super().__init__(space, slots, STATISTICS)
        if space is None:
            self.each = _perceptron((STATISTICS + CODE, *hidden), dropout)
            self.head = _perceptron((2 * hidden[-1], *hidden, out), dropout)
        else:
            self.each = nn.Identity()
            filled = sum(p.numel > 0 for p in space.params)
            self.head = _perceptron((STATISTICS * filled, *hidden, out), dropout)

    def features(self, values: Values, space: WeightSpace) -> Features:
        """Seven statistics of every tensor."""
        return [
            (_role(p) if self.space is None else i, _statistics(_unit_scale(p, values[p.name])))
            for i, p in enumerate(space.params)
            if p.numel
        ]

    def answer(self, features: Sequence[Tensor], space: WeightSpace) -> Tensor:
        """Perceptron on the statistics of all tensors."""
        if self.space is not None:
            return self.head(torch.cat([x.flatten(1) for x in features], 1))
        return self.head(_over_tensors(self.each, torch.cat([*features], 1), space))


class ParameterDeepSets(Baseline):
    """Entries of all tensors as a set: each knows its tensor's role and depth, not its units.

    An entry and its tensor's code are mapped and averaged over the tensor; the averages are mapped
    again with the code and averaged over tensors. Averaging per tensor first keeps biases from
    drowning among weights. Invariant to more than permutations of units: entries of one tensor may
    be permuted at will. Takes any architectures.

    Zaheer et al. (2017), "Deep Sets", theorem 2 (arXiv 1703.06114).

    Args:
        out: Length of the answer.
        channels: Width.
        hidden: Widths of the hidden layers of the answer.
        dropout: Share of hidden units left out in training.
    """

    def __init__(
        self,
        out: int = 1,
        *,
        channels: int = 64,
        hidden: Sequence[int] = (128,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(None, len(ROLES), 1)
        self.value = nn.Linear(1, channels)
        self.code = nn.Linear(CODE, channels, bias=False)
        self.entry = nn.Sequential(nn.SiLU(), nn.Linear(channels, channels), nn.SiLU())
        self.each = _perceptron((channels + CODE, channels, channels), dropout)
        self.head = _perceptron((2 * channels, *hidden, out), dropout)

    def features(self, values: Values, space: WeightSpace) -> Features:
        """Every tensor's entries."""
        return [
            (_role(p), _unit_scale(p, values[p.name]).flatten(1)[..., None])
            for p in space.params
            if p.numel
        ]

    def answer(self, features: Sequence[Tensor], space: WeightSpace) -> Tensor:
        """Average over the entries of a tensor, then over tensors."""
        codes = self.code(_codes_like(space, features[0]))
        averages = [
            self.entry(self.value(x) + code).mean(1)
            for x, code in zip(features, codes, strict=True)
        ]
        return self.head(_over_tensors(self.each, torch.stack(averages, 1), space))


class ProbeOnly(Baseline):
    """A perceptron on the networks' answers to learned inputs; weights are not looked at.

    Invariant to every symmetry of the networks, since it sees only their function. `Probes` says
    how the inputs are made.

    Args:
        module: The architecture; see `Probes`.
        space: Its weight space.
        out: Length of the answer.
        count: Number of probes.
        hidden: Widths of the hidden layers.
        dropout: Share of hidden units left out in training.
        classes: True if the last axis of the outputs holds logits of classes. Their range differs
            by orders of magnitude between networks, so what is read is the probabilities, and the
            logits less their mean, :math:`y / (1 + |y|)`.
        options: Further options of `Probes`: ``inputs``, ``example``, ``learn``, ``loop`` …
    """

    def __init__(
        self,
        module: nn.Module,
        space: WeightSpace,
        out: int = 1,
        *,
        count: int = 32,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        classes: bool = False,
        **options: Any,
    ) -> None:
        readings = 2 if classes else 1
        super().__init__(space, readings, 1)
        self.probes, self.classes = Probes(module, space, count=count, **options), classes
        self.head = _perceptron((readings * prod(self.probes.shape), *hidden, out), dropout)

    def features(self, values: Values, space: WeightSpace) -> Features:
        """Outputs on all probes."""
        names = [(name, p.name) for p in space.params for name in (p.name, *p.ties)]
        outputs = self.probes({name: values[of] for name, of in names}).outputs
        if not self.classes:
            return [(0, outputs.flatten(1)[..., None])]
        centred = outputs - outputs.mean(-1, keepdim=True)
        readings = F.softsign(centred), outputs.softmax(-1)
        return [(slot, x.flatten(1)[..., None]) for slot, x in enumerate(readings)]

    def answer(self, features: Sequence[Tensor], space: WeightSpace) -> Tensor:
        """Perceptron on the outputs."""
        del space
        return self.head(torch.cat([x.flatten(1) for x in features], 1))


# --------------------------------------------------------------------- features


@lru_cache(maxsize=64)
def tensor_codes(space: WeightSpace) -> Tensor:
    """What every tensor of a space is, apart from its values.

    Args:
        space: Weight space with a wiring.

    Returns:
        ``(tensors, CODE)`` for the tensors that have entries: role (one-hot), whether it is a
        buffer, depth of the units it acts on (share of the largest, logarithm from either end),
        logarithms of its number of entries and of its fan-in, number of dimensions.

    Raises:
        SpaceMismatch: If the space has no wiring.
    """
    structure = structure_of(space)
    depths = [n.depth for n in structure.nodes]
    deepest = max(depths, default=0)
    rows: list[list[float]] = []
    for p in space.params:
        if not p.numel:
            continue
        blocks = structure.holders.get(p.name, ())
        depth = max((depths[structure.blocks[i].target.nodes] for i in blocks), default=0)
        rows.append(
            [
                *(float(p.role is role) for role in ROLES),
                float(p.buffer),
                depth / max(deepest, 1),
                log1p(depth) / 3,
                log1p(deepest - depth) / 3,
                log(p.numel) / 10,
                log(fan_in(p)) / 5,
                len(p.shape) / 4,
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def _codes_like(space: WeightSpace, x: Tensor) -> Tensor:
    return tensor_codes(space).to(x)


def _over_tensors(each: nn.Module, x: Tensor, space: WeightSpace) -> Tensor:
    """Mean and maximum over tensors of a map of features ``(rows, tensors, n)`` and codes."""
    codes = _codes_like(space, x).expand(len(x), -1, -1)
    mapped = each(torch.cat([x, codes], -1))
    return torch.cat([mapped.mean(1), mapped.amax(1)], -1)


def _role(p: Param) -> int:
    return ROLES.index(p.role)


def _unit_scale(p: Param, x: Tensor) -> Tensor:
    """Weight matrices times the root of their fan-in, so that tensors of all sizes compare."""
    return x * fan_in(p) ** 0.5


def _statistics(x: Tensor) -> Tensor:
    """Mean, variance and quantiles of each network's tensor, ``(rows, 1, STATISTICS)``."""
    ordered = x.flatten(1).sort(1).values
    last = ordered.shape[1] - 1
    variance, mean = torch.var_mean(ordered, 1, correction=0)
    out = [mean, variance]
    for q in QUANTILES:  # torch.quantile refuses large tensors
        place = q * last
        low = int(place)
        out.append(torch.lerp(ordered[:, low], ordered[:, min(low + 1, last)], place - low))
    return torch.stack(out, 1)[:, None]


def _perceptron(sizes: Sequence[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers += [nn.SiLU(), nn.Dropout(dropout)] if i else []
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)
