r"""Matching of units by what they compute: how alike their activations are on data.

Li et al. 2015 (Convergent Learning, arXiv:1511.07543, section 3) pair the neurons of two networks
by the correlation of their activations and one assignment for each layer; Ainsworth et al. 2023
(Git Re-Basin, arXiv:2209.04836, section 3.1) by their inner product. Here a layer is a group of a
weight space, so every architecture is matched that can be traced: a group's activations are found
by `wspace.trace.observe`, and groups on which others depend (heads, say) are assigned together with
these.

All statistics come from one pass over the data, in float64, merged batch by batch (Chan, Golub and
LeVeque 1983), so no more is kept than the activations of one model on one batch and ``units²``
numbers for each result that is read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wspace.action import Transform, shape_of
from wspace.action.places import axis_source
from wspace.align.activations.moments import Inputs, Network, Pair, Seen, network
from wspace.align.matching.assign import Assigner
from wspace.align.matching.signs import Similarity
from wspace.batchnorm import Batches
from wspace.errors import SpaceMismatch, message
from wspace.space import Axis, Group, WeightSpace
from wspace.trace.observe import Observer
from wspace.trace.sites import CONTRACTION, NONLINEARITY


@dataclass(frozen=True)
class ActivationMatching(Transform):
    """A transform that brings one model's units to those of another, and how alike they are.

    Attributes:
        scores: Group → correlation (or inner product) of each unit of `a` with the unit brought to
            its place, mean over the results that were read: ``(*sizes of over, size)``, float64.
        unobserved: Groups left where they are, and why.
        samples: Number of samples per group, summed over its results.
    """

    scores: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    unobserved: Mapping[str, str] = field(default_factory=dict[str, str])
    samples: Mapping[str, int] = field(default_factory=dict[str, int])

    def __repr__(self) -> str:
        mean = {g: float(x.mean()) for g, x in self.scores.items()}
        rows = [f"{g} {x:.2f}" for g, x in mean.items()]
        rows += [f"{len(self.unobserved)} unobserved"] if self.unobserved else []
        return f"ActivationMatching({', '.join(rows)})"


def match_activations(
    space: WeightSpace,
    a: Network,
    b: Network,
    batches: Batches,
    *,
    module: nn.Module | None = None,
    kind: Literal["correlation", "inner"] = "correlation",
    kinds: Sequence[str] = ("permutation",),
    groups: Iterable[str] | None = None,
    sites: Sequence[str] = (CONTRACTION, NONLINEARITY),
    most: int | None = 4,
    rows: int | None = 16384,
    inputs: Callable[[Any], Inputs] | None = None,
    threads: int = 1,
) -> ActivationMatching:
    r"""Transform that brings `b` to `a`, its units to those of `a` with the most alike activations.

    For a group that depends on no other, maximises :math:`\sum_u S_{u, p(u)}` by one linear
    assignment, where :math:`S` is the mean over the results that show the group of the correlation
    (or the sum of the inner products) of units of `a` with units of `b`. Groups that depend on it
    are assigned for every pair of its units, and count with their best value: heads are paired so
    that their dimensions can be. This is the optimum, not a local one.

    Args:
        space: Weight space of both.
        a: Reference: a module, or a state of `module`.
        b: What is to be moved: a module, or a state.
        batches: Inputs; of a dict by name, of a tuple or list the first, else the batch itself
            (see `inputs`). Gone through once.
        module: What runs the states.
        kind: ``"correlation"`` of activations, which neither scale nor shift of a unit changes, or
            their ``"inner"`` product.
        kinds: ``"permutation"``, and ``"sign"`` to flip units too, where the space has sign
            symmetries that flip the activations. Scales are not sought: correlation ignores them.
        groups: Groups to match; all when None.
        sites: Kinds of results to read, see `wspace.trace.observe.observe`.
        most: Results per group at most.
        rows: Samples per result and batch at most, evenly spread; None for all.
        inputs: Gives positional and keyword inputs of a batch, for modules of several inputs.
        threads: Threads for the assignments.

    Returns:
        The transform, such that ``act(t, b, space)`` is aligned to `a`.

    Raises:
        SpaceMismatch: If a model is not of the space, or an option is not known.
        MeasureError: If there are no batches.

    Example:
        >>> import wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> space, state = wspace.trace(mlp, torch.zeros(1, 3)), mlp.state_dict()
        >>> t = wspace.sample(space)
        >>> found = match_activations(
        ...     space, state, wspace.act(t, state, space), [torch.randn(99, 3)], module=mlp
        ... )
        >>> torch.equal(found.permutations["h1"], wspace.inverse(t).permutations["h1"])
        True

    References:
        Li, Yosinski, Clune, Lipson, Hopcroft (2015), arXiv:1511.07543, section 3.
        Ainsworth, Hayase, Srinivasa (2023), arXiv:2209.04836, section 3.1.
    """
    unknown = [k for k in kinds if k not in ("permutation", "sign")]
    if unknown or "permutation" not in kinds or kind not in ("correlation", "inner"):
        raise SpaceMismatch(
            message(
                "match_activations: no such symmetry or measure",
                expected="kinds of 'permutation' and perhaps 'sign'; kind 'correlation' or 'inner'",
                got=f"kinds={tuple(kinds)}, kind={kind!r}",
            )
        )
    observer = Observer(space, groups=groups, kinds=sites, most=most)
    pair = Pair(
        observer, network(a, module), network(b, module), rows=rows, centred=kind == "correlation"
    )
    seen = pair.watch(batches, inputs, signs="sign" in kinds)
    return assigned(space, seen, kind, threads)


# ------------------------------------------------------------------------- assignment


class _Tables:
    """Similarities of all units of two models by group, and which group waits for which."""

    def __init__(self, space: WeightSpace, seen: Seen, kind: str) -> None:
        self.space = space
        self.own: dict[str, Similarity] = {}
        for site in seen.sites:
            table = site.table(kind).cpu()
            group = space.all_groups[site.group]
            contexts = prod(shape_of(group, space)[:-1])
            shape = (contexts, group.size, contexts, group.size)
            share = 1 / sum(s.group == site.group for s in seen.sites)
            weight = share if kind == "correlation" else 1.0
            similarity = self.own.setdefault(site.group, Similarity())
            similarity.add(site.flips, table.reshape(shape) * weight)
        groups = space.all_groups
        names = {n for g in self.own for n in (g, *groups[g].over) if not groups[n].fixed}
        self.tangled = sorted(n for n in names if not self._nested(n))
        self.groups = sorted(names - {*self.tangled}, key=lambda n: (-len(groups[n].over), n))

    def levels(self) -> list[list[str]]:
        """Groups seen, and those on which they depend; what depends on most others comes first."""
        depth = {n: len(self.space.all_groups[n].over) for n in self.groups}
        return [[n for n in self.groups if depth[n] == d] for d in sorted({*depth.values()})[::-1]]

    def parent(self, name: str) -> str | None:
        """The one group with which a group's units must be assigned; None if it stands alone."""
        groups = self.space.all_groups
        over = [o for o in groups[name].over if not groups[o].fixed]
        return max(over, key=lambda o: len(groups[o].over), default=None)

    def _nested(self, name: str) -> bool:
        """True if the groups that this one depends on depend on one another, in a chain."""
        groups = self.space.all_groups
        chain = sorted(groups[name].over, key=lambda o: len(groups[o].over))
        return all(
            groups[o].fixed or set(chain[:i]) <= set(groups[o].over) for i, o in enumerate(chain)
        )

    def pairs(self, name: str, below: Tensor | None) -> Tensor:
        """Value of pairs of units for each pair of contexts, ``(contexts², n, n)``."""
        own = self.own.get(name)
        tables = [x for x in (own.best() if own is not None else None, below) if x is not None]
        n = self.space.all_groups[name].size
        return sum(tables[1:], tables[0]).permute(0, 2, 1, 3).reshape(-1, n, n)

    def joined(self, child: str, value: Tensor) -> Tensor:
        """Best values of pairs of a child's contexts as those of pairs of units of its parent."""
        groups = self.space.all_groups
        over, parent = groups[child].over, self.parent(child)
        sizes = [groups[o].size for o in over]
        first = [o for o in over if o != parent]
        if parent is None or set(first) != set(groups[parent].over):
            raise AssertionError(f"{child} depends on {over}, {parent} not on all the others")
        order = [over.index(o) for o in (*groups[parent].over, parent)]
        value = value.reshape(*sizes, *sizes)
        value = value.permute(*order, *(len(over) + d for d in order))
        n = groups[parent].size
        return value.reshape(prod(sizes) // n, n, prod(sizes) // n, n)


def assigned(space: WeightSpace, seen: Seen, kind: str, threads: int = 1) -> ActivationMatching:
    """The best transform by what a pass over the data saw; see `match_activations`."""
    tables = _Tables(space, seen, kind)
    unobserved = dict(seen.unobserved)
    below: dict[str, Tensor] = {}
    best: dict[str, Tensor] = {}
    with Assigner(threads) as assigner:
        for names in tables.levels():  # from the inside out, for every pair of contexts
            pairs = [tables.pairs(name, below.get(name)) for name in names]
            for name, table, p in zip(names, pairs, assigner.solve(pairs), strict=True):
                contexts = isqrt(len(table))
                best[name] = p.reshape(contexts, contexts, -1)
                parent = tables.parent(name)
                if parent is not None:
                    value = table.gather(-1, p[..., None]).sum((-1, -2))
                    value = tables.joined(name, value)
                    below[parent] = below[parent] + value if parent in below else value
    for name in tables.tangled:
        over = ", ".join(space.all_groups[name].over)
        unobserved[name] = f"it depends on {over}, which do not depend on one another"
    return _read_off(tables, best, seen, unobserved)


def _read_off(
    tables: _Tables, best: Mapping[str, Tensor], seen: Seen, unobserved: dict[str, str]
) -> ActivationMatching:
    """From the outside in: the assignment under the contexts that were chosen."""
    space = tables.space
    t = Transform(space, {}, {})
    factors: dict[int, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for name in reversed(tables.groups):
        group = space.all_groups[name]
        shape = shape_of(group, space)
        contexts = torch.arange(len(best[name]))
        source = _source(t, [space.all_groups[o] for o in group.over])
        p = best[name][contexts, source]
        t = Transform(space, {**t.permutations, name: p.reshape(shape)}, {})
        own = tables.own.get(name)
        if own is None:
            continue
        value, chosen = _under(own, source).chosen(p).choice()
        scores[name] = value.reshape(shape)
        factors |= {i: sign.reshape(shape) for i, sign in chosen.items()}
    samples: dict[str, int] = {}
    for site in seen.sites:
        samples[site.group] = samples.get(site.group, 0) + site.moments.count
    return ActivationMatching(space, t.permutations, factors, scores, unobserved, samples)


def _under(own: Similarity, source: Tensor) -> Similarity:
    """Pairs of units in contexts of the first model and the contexts that come to their place."""
    return own.map(lambda x: x[torch.arange(len(source)), :, source])


def _source(t: Transform, groups: Sequence[Group]) -> Tensor:
    """For every index of some groups, the one that a transform moves there: ``(contexts,)``."""
    size = prod(g.size for g in groups)
    if not any(g.name in t.permutations for g in groups):
        return torch.arange(size)
    return axis_source(t, Axis(tuple(groups)), None)
