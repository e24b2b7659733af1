"""From scores of units to the units that stay: how many go, and from which groups.

Groups that must keep equal counts form a *bundle*, and a group whose permutation depends on another
(head dims over heads) loses as many units in each of its contexts. So a bundle consists of *rows*,
one per group and context, and each *step* takes the lowest unit that is left from every row. Its
price is the mean of what it takes: a loss per unit, which makes bundles of few and of many rows
comparable. Prices never fall along a bundle, so the steps of all bundles in one order are a list of
which any beginning can be taken; a budget says how much of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import floor, lcm
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from wspace.action import shape_of
from wspace.errors import PruneError, message
from wspace.prune.cost import Cost
from wspace.prune.restriction import prunable
from wspace.space import Group, WeightSpace

Of = Literal["units", "parameters", "flops"]
Scope = Literal["global", "group"]
Normalize = Literal["mean", "max", "sum", "none"]
_T = TypeVar("_T")
_SLACK = 1e-9
"""What a share times a number may be short of a whole one: 0.29 * 100 is 28.999999999999996."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How much to remove, and from what.

    Attributes:
        amount: Share to remove, in [0, 1). Of ``"units"``: of those that may go at all, rounded
            down. Of ``"parameters"`` and ``"flops"``: of the whole network; at least that share
            goes, with as few steps as the order of the scores allows. None: only `ratios` hold.
        of: What `amount` is a share of.
        scope: ``"global"``: one threshold for the normalised scores of all groups. ``"group"``: the
            same share of every group.
        ratios: Glob on group names → share of each such group to remove, rounded down, in [0, 1);
            the first that fits holds. These groups are then out of `amount`, but what they save
            counts towards a budget.
        round_to: Kept counts are multiples of this number, unless nothing of the group goes; one
            number, or glob on group names → number (the first that fits). A group smaller than it
            stays whole.
        at_most: Largest share of one group that may go, in [0, 1]; one unit always stays.
        ignore: Globs on group names and on parameter names: those groups, and all groups on those
            parameters, stay whole.
        groups: Globs on the names of groups that may lose units; None for all.
        normalize: What scores of a group are divided by before groups are compared: ``"mean"``,
            ``"max"`` or ``"sum"`` of their absolute values, or nothing (``"none"``, for scores that
            are losses already).

    Raises:
        PruneError: If an option makes no sense; all of them are listed.
    """

    amount: float | None = None
    of: Of = "units"
    scope: Scope = "global"
    ratios: Mapping[str, float] = field(default_factory=dict[str, float])
    round_to: int | Mapping[str, int] = 1
    at_most: float = 1.0
    ignore: Sequence[str] = ()
    groups: Sequence[str] | None = None
    normalize: str = "mean"

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value!r}, which is not one of {', '.join(map(repr, get_args(kind)))}"
            for name, value, kind in (
                ("of", self.of, Of),
                ("scope", self.scope, Scope),
                ("normalize", self.normalize, Normalize),
            )
            if value not in get_args(kind)
        ]
        if self.amount is None and not self.ratios:
            wrong.append("neither an amount nor ratios, so nothing to do")
        if self.amount is not None and not 0 <= self.amount < 1:
            wrong.append(f"amount={self.amount}: at least one unit of every group stays")
        wrong += [
            f"a ratio of {r} for {g!r}: at least one unit of every group stays"
            for g, r in self.ratios.items()
            if not 0 <= r < 1
        ]
        if not 0 <= self.at_most <= 1:
            wrong.append(f"at_most={self.at_most}")
        rounds = self.round_to if isinstance(self.round_to, Mapping) else {"*": self.round_to}
        wrong += [f"round_to={n!r} for {g!r}" for g, n in rounds.items() if n < 1 or n % 1]
        wrong += [
            f"{name}={value!r}, a string where a list of them is meant"
            for name, value in (("ignore", self.ignore), ("groups", self.groups))
            if isinstance(value, str)
        ]
        if wrong:
            raise PruneError(
                message(
                    "select: options that make no sense",
                    expected="shares from 0 to 1 (1 excluded), positive whole numbers",
                    got=wrong,
                )
            )


def select(
    space: WeightSpace,
    scores: Mapping[str, Tensor],
    selection: Selection,
    *,
    equal: Sequence[Sequence[str]] = (),
    cost: Cost | None = None,
    least: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The units to keep, from their scores.

    Of every group (and in each of its contexts) the units of lowest score go first; of equal ones
    the first. Nothing is random, and the same input gives the same output. If no scores are equal,
    permuted scores give the permuted masks; a larger amount removes a superset.

    Args:
        space: Weight space of the network.
        scores: Group → ``(*sizes of over, size)``, higher = more worth keeping, for every prunable
            group that is not held back by `ignore` or `groups`. Finite.
        selection: How much to remove, and from what.
        equal: Sets of groups that must keep equal counts, such as those that one field of a config
            sizes. A set with a group that may not lose units stays whole.
        cost: What to count a budget in parameters or FLOPs with; parameters are counted from the
            space when None.
        least: Group → units that have to stay, such as those that a top-k asks for; a group of
            which all have to is held back, with all that it is to be equal to.

    Returns:
        Group → bool ``(*sizes of over, size)``, true for units that stay, for every prunable group.

    Raises:
        PruneError: If scores are missing, of the wrong shape or not finite, a name or glob fits
            nothing, a ratio fits only groups that are held back, or the budget cannot be reached
            under the options; it says what can.

    Example:
        >>> import torch, wspace
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> scores = {"h1": torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])}
        >>> select(space, scores, Selection(amount=0.4))["h1"].tolist()
        [True, False, True, False, True]

    References:
        Fang et al. (2023), DepGraph: Towards Any Structural Pruning, section 3.4 (scores of a group
        are divided by their mean). arXiv:2301.12900
    """
    bundles = _bundles(space, selection, equal, least or {})
    _check_scores(space, scores, [g for b in bundles for g in b.groups])
    taken = torch.tensor([b.level_at(b.ratio or 0.0) for b in bundles], dtype=torch.long)
    if selection.amount is not None:
        budget = _Budget(space, selection, bundles, scores, cost)
        taken += budget.levels(taken)
    return _masks(space, scores, bundles, taken.tolist())


# --------------------------------------------------------------------------------- bundles


@dataclass(frozen=True)
class _Bundle:
    """Groups that keep equal counts.

    Attributes:
        groups: The groups, in the order of the space.
        rows: Contexts of all groups together: units that go when the count falls by one.
        levels: Removed counts that are allowed, ascending, from 0.
        ratio: Share to remove if the bundle has its own.
    """

    groups: list[Group]
    rows: int
    levels: Tensor
    ratio: float | None

    @property
    def size(self) -> int:
        """Units of each group, in each of its contexts."""
        return self.groups[0].size

    @property
    def steps(self) -> int:
        """How often the count can fall."""
        return len(self.levels) - 1

    def level_at(self, share: float) -> int:
        """The highest level that takes no more than this share."""
        return int((self.levels <= floor(share * self.size + _SLACK)).sum()) - 1

    def prices(self, scores: Mapping[str, Tensor], normalize: str) -> Tensor:
        """Mean score per unit of what each step takes, ``(steps,)``; never falling."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for g in self.groups:
            x = scores[g.name].detach().to("cpu", torch.float64).reshape(-1, self.size)
            x = x.sort(-1).values / _unit(x, normalize)
            total += x.sort(0).values.sum(0)  # in an order that no permutation of units changes
        ends = torch.cat([torch.zeros(1, dtype=torch.float64), total.cumsum(0) / self.rows])
        price = ends[self.levels].diff() / self.levels.diff()
        return price.cummax(0).values if self.steps else price


def _unit(x: Tensor, normalize: str) -> float:
    """What scores are divided by; the same for any order of them."""
    x = x.abs().flatten().sort().values
    value = {"mean": x.mean, "max": x.max, "sum": x.sum}.get(normalize, lambda: torch.ones(()))()
    return float(value) or 1.0


def _bundles(
    space: WeightSpace,
    selection: Selection,
    equal: Sequence[Sequence[str]],
    least: Mapping[str, int],
) -> list[_Bundle]:
    """The bundles that may lose units, in the order of the space."""
    free = prunable(space)
    held = _held(space, selection) | {
        g for g, n in least.items() if g in free and n >= free[g].size
    }
    wrong = [f"{g!r} in `equal`, no group" for s in equal for g in s if g not in space.all_groups]
    wrong += [f"{g!r} in `least`, no group" for g in least if g not in space.all_groups]
    _raise_if(wrong, "names that fit nothing", "names of groups", _HELP)
    bundles: list[_Bundle] = []
    for names in _closed(space.all_groups, equal):
        groups = [space.all_groups[n] for n in names]
        if not all(n in free and n not in held for n in names):
            continue
        if len({g.size for g in groups}) > 1:
            sizes = ", ".join(f"{g.name}[{g.size}]" for g in groups)
            wrong.append(f"{sizes}, which are to keep equal counts")
            continue
        given = {r for n in names if (r := _first(selection.ratios, n)) is not None}
        if len(given) > 1:
            wrong.append(f"{', '.join(names)}, equal in number, with ratios {sorted(given)}")
            continue
        rows = sum(_contexts(g, space) for g in groups)
        levels = _levels(groups, selection, max(least.get(n, 1) for n in names))
        bundles.append(_Bundle(groups, rows, torch.tensor(levels), next(iter(given), None)))
    _raise_if(wrong, "groups cannot keep equal counts", "one size and one ratio", "")
    idle = [g for g, r in selection.ratios.items() if r and not _fits(g, bundles)]
    _raise_if(
        [f"a ratio for {g!r}" for g in idle],
        "ratios of groups that may not lose units",
        "ratios of groups that are not held back",
        "these groups are ignored, left out of `groups`, fixed by the module's code, or equal to "
        "one that is",
    )
    return bundles


def _fits(glob: str, bundles: Iterable[_Bundle]) -> bool:
    return any(fnmatchcase(g.name, glob) for b in bundles for g in b.groups)


_HELP = "`print(space)` shows the groups and parameters"


def _held(space: WeightSpace, selection: Selection) -> set[str]:
    """Groups that the options keep whole."""
    free = prunable(space)
    held: set[str] = set()
    wrong: list[str] = []
    for glob in selection.ignore:
        found = {g for g in space.all_groups if fnmatchcase(g, glob)}
        named = [p for n, p in space.by_name.items() if fnmatchcase(n, glob)]
        for p in named:
            found |= {g.name for axis in p.axes for g in axis.groups()}
            found |= {p.at[0]} if p.at else set()
        if not found and not named:
            wrong.append(f"{glob!r} in `ignore`")
        held |= found
    rounds = selection.round_to if isinstance(selection.round_to, Mapping) else {}
    globs = [("ratios", g) for g in selection.ratios] + [("round_to", g) for g in rounds]
    globs += [("groups", g) for g in selection.groups or ()]
    wrong += [
        f"{g!r} in `{option}`" for option, g in globs if not any(fnmatchcase(n, g) for n in free)
    ]
    _raise_if(wrong, "names that fit nothing", "names or globs of groups that can be pruned", _HELP)
    if selection.groups is not None:
        held |= {n for n in free if not any(fnmatchcase(n, g) for g in selection.groups)}
    return held


def _closed(groups: Iterable[str], equal: Sequence[Sequence[str]]) -> list[list[str]]:
    """Sets of names joined where they share one, and single names, in order of appearance."""
    order = {name: i for i, name in enumerate(groups)}
    of = {name: {name} for name in order}
    for names in equal:
        joined: set[str] = set().union(*(of[n] for n in names))
        of |= dict.fromkeys(joined, joined)
    seen: set[str] = set()
    sets: list[list[str]] = []
    for name in order:
        if name not in seen:
            sets.append(sorted(of[name], key=order.__getitem__))
            seen |= of[name]
    return sets


def _levels(groups: Sequence[Group], selection: Selection, least: int) -> list[int]:
    """Counts that may be removed: 0, and all that leave an allowed multiple."""
    size = groups[0].size
    step = lcm(*(_round(selection, g.name) for g in groups))
    most = floor(selection.at_most * size + _SLACK)
    kept = range(size // step * step, 0, -step)
    counts = [size - n for n in kept if n < size and size - n <= most and n >= least]
    return [0, *counts]


def _round(selection: Selection, name: str) -> int:
    if isinstance(selection.round_to, Mapping):
        return _first(selection.round_to, name) or 1
    return selection.round_to


def _first(globs: Mapping[str, _T], name: str) -> _T | None:
    return next((value for glob, value in globs.items() if fnmatchcase(name, glob)), None)


def _contexts(g: Group, space: WeightSpace) -> int:
    return torch.Size(shape_of(g, space)[:-1]).numel()


# ---------------------------------------------------------------------------------- budget


class _Budget:
    """The steps of all bundles without a ratio of their own, cheapest first; ties by position."""

    def __init__(
        self,
        space: WeightSpace,
        selection: Selection,
        bundles: Sequence[_Bundle],
        scores: Mapping[str, Tensor],
        cost: Cost | None,
    ) -> None:
        self.selection, self.bundles = selection, bundles
        self.cost = cost or Cost.of(space)
        open_ = [(i, b) for i, b in enumerate(bundles) if b.ratio is None and b.steps]
        if not open_ and selection.amount and selection.of == "units":
            raise PruneError(
                message(
                    f"select: {selection.amount} of the units cannot be removed",
                    expected="a group that may lose units",
                    got="none: all are ignored, tied to one that is, or too small for `round_to`",
                    help="loosen `ignore`, `groups`, `at_most` or `round_to`",
                )
            )
        prices = [
            b.prices(scores, selection.normalize)
            if selection.scope == "global"
            else b.levels[1:].double() / b.size
            for _, b in open_
        ]
        empty = [torch.zeros(0, dtype=torch.long)]
        order = torch.cat([*empty, *prices]).sort(stable=True).indices
        self.steps = torch.cat(
            empty + [torch.full((b.steps,), i, dtype=torch.long) for i, b in open_]
        )[order]
        """Number of the bundle of each step."""
        self.units = torch.cat(empty + [b.levels.diff() * b.rows for _, b in open_])[order]
        """Units that each step takes."""
        self.whole = sum(b.size * b.rows for _, b in open_)

    def levels(self, taken: Tensor) -> Tensor:
        """Steps of each bundle, as few as the budget allows, on top of those that are taken."""
        amount = self.selection.amount or 0.0
        if (self.selection.of, self.selection.scope) == ("units", "group"):
            shares = [0 if b.ratio is not None else b.level_at(amount) for b in self.bundles]
            return torch.tensor(shares, dtype=torch.long)
        if self.selection.of == "units":
            goal = floor(amount * self.whole + _SLACK)
            gone = [0, *self.units.cumsum(0).tolist()]
            if gone[-1] < goal:
                raise self._unreachable(self.whole, self.whole - goal, self.whole - gone[-1])
            return self._first(next(n for n, units in enumerate(gone) if units >= goal))
        measure = self.cost.parameters if self.selection.of == "parameters" else self.cost.macs
        whole = measure()
        goal = floor((1 - amount) * whole + _SLACK)
        low, high = 0, len(self.steps)
        least = measure(self._counts(taken + self._first(high)))
        if least > goal:
            raise self._unreachable(whole, goal, least)
        while low < high:
            middle = (low + high) // 2
            fits = measure(self._counts(taken + self._first(middle))) <= goal
            low, high = (low, middle) if fits else (middle + 1, high)
        return self._first(low)

    def _first(self, n: int) -> Tensor:
        """How many of the first steps each bundle has."""
        return torch.bincount(self.steps[:n], minlength=len(self.bundles))

    def _counts(self, levels: Tensor) -> dict[str, int]:
        """Kept units of every group that may lose some."""
        return {
            g.name: b.size - int(b.levels[k])
            for b, k in zip(self.bundles, levels.tolist(), strict=True)
            for g in b.groups
        }

    def _unreachable(self, whole: int, goal: int, least: int) -> PruneError:
        amount, of = self.selection.amount, self.selection.of
        return PruneError(
            message(
                f"select: {amount} of the {of} cannot be removed",
                expected=f"at most {goal} of {whole} {of} left",
                got=f"{least} left when all that may go is gone: at most "
                f"{1 - least / whole if whole else 0.0:.4g} can be removed",
                help="ask for less, or loosen `at_most`, `ignore`, `groups`, `round_to`, `equal`",
            )
        )


# ----------------------------------------------------------------------------------- masks


def _masks(
    space: WeightSpace,
    scores: Mapping[str, Tensor],
    bundles: Sequence[_Bundle],
    taken: Sequence[int],
) -> dict[str, Tensor]:
    masks = {
        n: torch.ones(shape_of(g, space), dtype=torch.bool) for n, g in prunable(space).items()
    }
    for b, k in zip(bundles, taken, strict=True):
        for g in b.groups if k else ():
            x = scores[g.name].detach().to("cpu", torch.float64)
            lowest = x.sort(dim=-1, stable=True).indices[..., : int(b.levels[k])]
            masks[g.name].scatter_(-1, lowest, value=False)
    return masks


def _check_scores(
    space: WeightSpace, scores: Mapping[str, Tensor], groups: Iterable[Group]
) -> None:
    """Checks that there is one finite score for every unit.

    Raises:
        PruneError: Listing all that is wrong.
    """  # noqa: DOC502 (_raise_if raises)
    wrong = [f"{n!r}, which is no group of the space" for n in scores if n not in space.all_groups]
    for g in groups:
        shape = shape_of(g, space)
        if g.name not in scores:
            wrong.append(f"nothing for {g.name!r}, expected {shape}")
        elif tuple(scores[g.name].shape) != shape:
            wrong.append(f"{g.name!r} of shape {tuple(scores[g.name].shape)}, expected {shape}")
        elif not bool(scores[g.name].isfinite().all()):
            wrong.append(f"{g.name!r} with scores that are infinite or not numbers")
    _raise_if(
        wrong,
        "the scores do not fit the weight space",
        "one finite score for every unit, (*sizes of over, size)",
        "an `Importance` gives scores for every prunable group",
    )


def _raise_if(wrong: Sequence[str], what: str, expected: str, help: str) -> None:
    if wrong:
        raise PruneError(message(f"select: {what}", expected=expected, got=wrong, help=help))
