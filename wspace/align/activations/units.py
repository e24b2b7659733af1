r"""Units of two models compared one with another: do they learn the same features?

The questions of Li et al. 2015 (Convergent Learning, arXiv:1511.07543), for any traced module:

- *one to one* (section 3): how alike are units that one assignment pairs;
- *one to many* (section 3.1): how alike is the best unit of the other model, whoever else has it;
- *few to one* (section 4): how well do 1, 2, … units of the other model predict a unit. They fit a
  lasso; here units are added greedily (forward selection), which needs no second look at the data.

Everything follows from the correlations of one pass over the data. The control is the same pairing
with the samples of the second model shuffled: what an assignment finds where there is nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wspace.action.places import axis_source
from wspace.align.activations.moments import Inputs, Network, Pair, SeenSite, network
from wspace.align.activations.pairs import ActivationMatching, assigned
from wspace.align.matching.assign import Assigner
from wspace.batchnorm import Batches
from wspace.space import Axis, WeightSpace
from wspace.trace.observe import Observer
from wspace.trace.sites import CONTRACTION, NONLINEARITY

CHUNK = 1 << 24
"""Numbers held at once while units are selected."""


@dataclass(frozen=True)
class GroupUnits:
    """One group of two models, unit by unit; in every context of the groups it depends on.

    Attributes:
        name: The group.
        results: The results in which its units were seen.
        samples: Samples, summed over these.
        correlation: Of units of `a` (rows) with units of `b`, mean over the results, ``(n, n)``.
        pairs: Unit of `b` that the assignment gives each unit of `a`, ``(n,)``, int64.
        chance: Correlation of pairs when the samples of `b` are shuffled, ``(n,)``, descending.
        errors: Share of the variance of each unit of `a` that 0, 1, 2, … units of `b` leave
            unexplained, ``(terms + 1, n)``.
        alive: Units of `a` whose activation ever changes, ``(n,)``.
    """

    name: str
    results: tuple[str, ...]
    samples: int
    correlation: Tensor
    pairs: Tensor
    chance: Tensor
    errors: Tensor
    alive: Tensor

    @property
    def matched(self) -> Tensor:
        """One to one: correlation of each unit of `a` with its own partner, ``(n,)``."""
        return self.correlation.gather(1, self.pairs[:, None])[:, 0]

    @property
    def best(self) -> Tensor:
        """One to many: correlation of each unit of `a` with the most like one, ``(n,)``."""
        return self.correlation.amax(1)

    @property
    def shared(self) -> int:
        """How many different units of `b` are the most like some unit of `a`."""
        return len(self.correlation.argmax(1)[self.alive].unique())

    def to_data(self) -> dict[str, Any]:
        """Plain numbers, lists and texts, for JSON; all but the correlations of all pairs."""
        return {
            "name": self.name,
            "size": len(self.pairs),
            "results": list(self.results),
            "samples": self.samples,
            "pairs": self.pairs.tolist(),
            "matched": self.matched.tolist(),
            "best": self.best.tolist(),
            "best unit": self.correlation.argmax(1).tolist(),
            "chance": self.chance.tolist(),
            "errors": self.errors.tolist(),
            "alive": self.alive.tolist(),
        }


@dataclass(frozen=True)
class UnitReport:
    """Units of two models compared.

    Attributes:
        groups: By name.
        matching: The transform that brings `b` to `a`.
        unobserved: Groups that could not be compared, and why.
    """

    groups: Mapping[str, GroupUnits]
    matching: ActivationMatching
    unobserved: Mapping[str, str]

    def __str__(self) -> str:
        rows = [
            ("group", "units", "dead", "one to one", "chance", "one to many", "MSE of 1, 2, 4 …")
        ]
        for g in self.groups.values():
            alive = g.alive if bool(g.alive.any()) else ~g.alive
            terms = [k for k in (1, 2, 4, 8, 16, 32) if k < len(g.errors)]
            rows.append(
                (
                    g.name,
                    f"{len(g.pairs)}",
                    f"{int((~g.alive).sum())}",
                    f"{float(g.matched[alive].mean()):.3f}",
                    f"{float(g.chance.mean()):.3f}",
                    f"{float(g.best[alive].mean()):.3f} ({g.shared} used)",
                    " ".join(f"{float(g.errors[k][alive].mean()):.3f}" for k in terms),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [f"{name}: not compared: {why}" for name, why in self.unobserved.items()]
        return "\n".join(lines)

    def to_data(self) -> dict[str, Any]:
        """Plain numbers, lists and texts, for JSON."""
        return {
            "groups": {name: g.to_data() for name, g in self.groups.items()},
            "unobserved": dict(self.unobserved),
        }


def compare_units(
    space: WeightSpace,
    a: Network,
    b: Network,
    batches: Batches,
    *,
    module: nn.Module | None = None,
    groups: Iterable[str] | None = None,
    sites: Sequence[str] = (CONTRACTION, NONLINEARITY),
    most: int | None = 4,
    rows: int | None = 16384,
    inputs: Callable[[Any], Inputs] | None = None,
    terms: int = 8,
) -> UnitReport:
    """How alike the units of two models are: one to one, one to many, and few to one.

    Args:
        space: Weight space of both.
        a: A module, or a state of `module`: its units are explained.
        b: Another: its units explain.
        batches: Inputs, as for `match_activations`; gone through once.
        module: What runs states.
        groups: Groups to compare; all when None.
        sites: Kinds of results to read, see `wspace.trace.observe.observe`.
        most: Results per group at most.
        rows: Samples per result and batch at most, evenly spread; None for all.
        inputs: Gives positional and keyword inputs of a batch.
        terms: Units of `b` that may predict one of `a`. Errors are on the samples seen: have many
            more of these than terms.

    Returns:
        The report.

    Raises:
        SpaceMismatch: If a model is not of the space, or a name is unknown.
        MeasureError: If there are no batches.

    Example:
        >>> import wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> space, state = wspace.trace(mlp, torch.zeros(1, 3)), mlp.state_dict()
        >>> report = compare_units(space, state, state, [torch.randn(99, 3)], module=mlp)
        >>> report.groups["h1"].pairs.tolist()
        [0, 1, 2, 3, 4]
    """
    observer = Observer(space, groups=groups, kinds=sites, most=most)
    pair = Pair(
        observer, network(a, module), network(b, module), rows=rows, within=True, control=True
    )
    seen = pair.watch(batches, inputs)
    matching = assigned(space, seen, "correlation")
    found: dict[str, GroupUnits] = {}
    for name in observer.groups:
        own = [s for s in seen.sites if s.group == name]
        if own and name in matching.permutations:
            found[name] = _compared(space, matching, own, terms)
    return UnitReport(found, matching, matching.unobserved)


def _compared(
    space: WeightSpace, matching: ActivationMatching, sites: Sequence[SeenSite], terms: int
) -> GroupUnits:
    group = space.all_groups[sites[0].group]
    aa, ab, bb = (_mean([s.moments.correlation(k) for s in sites]) for k in ("aa", "ab", "bb"))
    variance = aa.diagonal()
    nothing = _mean([s.control.correlation("ab") for s in sites if s.control is not None])
    axis = Axis((*(space.all_groups[o] for o in group.over), group))
    partner = Assigner(1).solve([nothing[None]])[0][0]
    return GroupUnits(
        name=group.name,
        results=tuple(s.label for s in sites),
        samples=sum(s.moments.count for s in sites),
        correlation=ab,
        pairs=axis_source(matching, axis, None),
        chance=nothing.gather(1, partner[:, None])[:, 0].sort(descending=True)[0],
        errors=unexplained(variance, ab, bb, terms) / variance.clamp_min(1e-300),
        alive=variance > 0,
    )


def _mean(tables: Sequence[Tensor]) -> Tensor:
    """Mean over results: the correlations of all samples, each result brought to one scale."""
    return torch.stack(list(tables)).mean(0).cpu()


def unexplained(variance: Tensor, cross: Tensor, gram: Tensor, terms: int) -> Tensor:
    r"""Variance of each target that 0, 1, 2, … predictors leave unexplained, chosen greedily.

    Forward selection: at each step the predictor that lowers the squared error of the least-squares
    fit most. With :math:`c` the covariances of what is left of a target with what is left of the
    predictors, and :math:`v` their variances, that is :math:`\arg\max_j c_j^2 / v_j`; both are
    updated as in a pivoted Cholesky factorisation, so no system is solved.

    Args:
        variance: Of the targets, ``(targets,)``.
        cross: Covariances of targets and predictors, ``(targets, predictors)``.
        gram: Covariances of predictors, ``(predictors, predictors)``.
        terms: Most predictors of one target.

    Returns:
        ``(terms + 1, targets)`` float64: never rising; fewer rows if there are fewer predictors.
    """
    terms = min(terms, cross.shape[1])
    step = max(CHUNK // max(cross.shape[1] * (terms + 2), 1), 1)
    parts = [
        _selected(variance[i : i + step], cross[i : i + step], gram, terms)
        for i in range(0, len(cross), step)
    ]
    return torch.cat(parts, 1)


def _selected(variance: Tensor, cross: Tensor, gram: Tensor, terms: int) -> Tensor:
    left, c = variance.double().clone(), cross.double().clone()
    gram = gram.double()
    v = gram.diagonal().expand_as(c).clone()
    floor = 1e-10 * gram.diagonal().max().clamp_min(1e-300)
    chosen: list[Tensor] = []  # factors q: (targets, predictors) each
    errors = [left.clone()]
    for _ in range(terms):
        gain = torch.where(v > floor, c.square() / v.clamp_min(floor), 0.0)
        most, j = gain.max(1, keepdim=True)
        q = gram[j[:, 0]]
        for earlier in chosen:
            q = q - earlier.gather(1, j) * earlier
        root = v.gather(1, j).clamp_min(floor).sqrt()
        q = torch.where(most > 0, q / root, 0.0)
        c = c - c.gather(1, j) / root * q
        v = v - q.square()
        v.scatter_(1, j, 0.0)
        left = (left - most[:, 0]).clamp_min(0.0)
        chosen.append(q)
        errors.append(left)
    return torch.stack(errors)
