"""Statistics of the activations of two models over data: one pass, both models, nothing kept.

Owns the pass and the numbers; which activations show which group is `wspace.trace.observe`'s, what
is made of the numbers is `activations`' and `units`'.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn

from wspace.action import State, Transform, act, shape_of
from wspace.batchnorm import Batches, moved
from wspace.errors import MeasureError, SpaceMismatch, message
from wspace.space import WeightSpace
from wspace.trace.observe import Key, Observer, Plan, Use

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
Network = nn.Module | State
Flips = dict[Key, tuple[int, ...] | None]
LOST = "the models saw other samples each, or signs of other groups change what shows it"
SAME = 1e-3
"""Largest relative change of activations that counts as none, when signs are tried out."""


class Moments:
    """Co-moments of the units of two models over samples.

    Attributes:
        count: Number of samples.
        centred: True if means were taken out.
    """

    def __init__(self, x: Tensor, y: Tensor, *, centred: bool = True, within: bool = False) -> None:
        """Of the samples of one batch.

        Args:
            x: Features of the first model, ``(samples, units)``.
            y: Features of the second, of the same shape.
            centred: Take the means out.
            within: Also the co-moments of each model with itself.
        """
        self._noise = 64 * max(torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
        x, y = x.double(), y.double()
        self.count, self.centred, self.within = len(x), centred, within
        self._means = {"a": x.sum(0) / max(len(x), 1), "b": y.sum(0) / max(len(x), 1)}
        if centred:
            x, y = x - self._means["a"], y - self._means["b"]
        self._tables = {"ab": x.T @ y}
        if within:
            self._tables |= {"aa": x.T @ x, "bb": y.T @ y}
        else:
            self._tables |= {"a": (x * x).sum(0), "b": (y * y).sum(0)}

    def merge(self, other: "Moments") -> None:
        """Takes in the samples of another batch (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        total = self.count + other.count
        if not other.count:
            return
        gap = {k: other._means[k] - self._means[k] for k in "ab"}
        w = self.count * other.count / total if self.centred else 0.0
        for name, table in self._tables.items():
            table.add_(other._tables[name])
            if len(name) == 2:
                table.addr_(gap[name[0]], gap[name[1]], alpha=w)
            else:
                table.add_(gap[name] ** 2, alpha=w)
        for k in "ab":
            self._means[k] = self._means[k] + gap[k] * (other.count / total)
        self.count = total

    def products(self) -> Tensor:
        """Sums of products of units of the first model with units of the second."""
        return self._tables["ab"]

    def correlation(self, which: str = "ab") -> Tensor:
        """Correlations ``(units, units)``, 0 with a unit that never changes.

        Args:
            which: Of which models: ``"ab"``, and ``"aa"`` or ``"bb"`` if these were asked for.

        Returns:
            Values between -1 and 1, float64.
        """
        table = self._tables[which] * self._scale(which[0])[:, None] * self._scale(which[1])
        return table.clamp_(-1, 1)

    def _scale(self, which: str) -> Tensor:
        spread = self._tables[which * 2].diagonal() if self.within else self._tables[which]
        rounding = (
            self.count * (self._noise * self._means[which]) ** 2
        )  # of a unit that stands still
        dead = spread <= torch.maximum(rounding, 1e-24 * spread.max().clamp_min(1e-300))
        return torch.where(dead, 0.0, spread.clamp_min(1e-300).rsqrt())


@dataclass(slots=True)
class SeenSite:
    """Statistics of one result that shows a group.

    Attributes:
        group: The group.
        label: Where it was seen, for reading.
        flips: Sign gauges that flip it.
        moments: Over all samples.
        control: The same with the second model's samples shuffled, if asked for.
    """

    group: str
    label: str
    flips: tuple[int, ...]
    moments: Moments
    control: Moments | None = None

    def table(self, kind: str) -> Tensor:
        """Correlations, or sums of products, of all units of both models: ``(units, units)``."""
        return self.moments.correlation() if kind == "correlation" else self.moments.products()


@dataclass(frozen=True)
class Seen:
    """What a pass over the data saw.

    Attributes:
        sites: Results that show a group.
        unobserved: Groups that none shows, and why.
    """

    sites: Sequence[SeenSite]
    unobserved: Mapping[str, str]


@dataclass
class Pair:
    """Two models that are run side by side.

    Attributes:
        observer: Says which results are read.
        a: First model.
        b: Second.
        rows: Samples per result and batch at most.
        centred: Take means out.
        within: Also co-moments of each model with itself.
        control: Also those with the second model's samples shuffled, batch by batch.
    """

    observer: Observer
    a: nn.Module
    b: nn.Module
    rows: int | None = None
    centred: bool = True
    within: bool = False
    control: bool = False

    def watch(
        self,
        batches: Batches,
        inputs: Callable[[Any], Inputs] | None = None,
        *,
        signs: bool = False,
    ) -> Seen:
        """Runs both models on all batches.

        Args:
            batches: Inputs, gone through once.
            inputs: Gives the inputs of a batch; see `inputs_of`.
            signs: Find out which results flip with which sign gauge, and leave out those in which
                another group's sign could not be told from a change.

        Returns:
            The statistics.

        Raises:
            MeasureError: If there are no batches.
        """
        device = next((x.device for x in (*self.a.parameters(), *self.a.buffers())), None)
        plan: Plan | None = None
        total: dict[Key, Moments] = {}
        shuffled: dict[Key, Moments] = {}
        flips: Flips = {}
        for batch in batches() if callable(batches) else batches:
            args, kwargs = (inputs or inputs_of)(moved(batch, device))
            if plan is None:
                plan = self.observer.plan(self.a, args, kwargs)
                if signs:
                    flips = sign_flips(self.observer, self.a, args, kwargs)
            self._batch(args, kwargs, (total, shuffled))
        if plan is None:
            raise MeasureError(
                message(
                    "no batches to compare activations on",
                    help="batches=[batch, ...], or a function that gives batches anew",
                )
            )
        sites: list[SeenSite] = []
        for key, moments in total.items():
            flip = flips.get(key) if signs else ()
            if flip is not None and moments.count:
                sites.append(SeenSite(key[0], key[2], flip, moments, shuffled.get(key)))
        lost = {s.group for s in plan.sites} - {s.group for s in sites}
        return Seen(sites, {**plan.unobserved, **dict.fromkeys(sorted(lost), LOST)})

    def _batch(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        totals: tuple[dict[Key, Moments], dict[Key, Moments]],
    ) -> None:
        """Adds the moments, on one batch, of every site that both models have."""
        held: dict[Key, Tensor] = {}
        new: tuple[dict[Key, Moments], dict[Key, Moments]] = {}, {}

        def hold(plan: Plan) -> Use:
            held.clear()
            return lambda i, x: held.__setitem__(plan.keys[i], self._units(x).clone())

        def compare(plan: Plan) -> Use:
            for moments in new:
                moments.clear()

            def use(i: int, features: Tensor) -> None:
                key, y = plan.keys[i], self._units(features)
                x = held.get(key)
                if x is None or x.shape != y.shape:
                    return
                new[0][key] = Moments(x, y, centred=self.centred, within=self.within)
                if self.control:
                    new[1][key] = Moments(x, _shuffled(y), centred=self.centred)

            return use

        self.observer.run(self.a, args, kwargs, hold)
        self.observer.run(self.b, args, kwargs, compare)
        for total, batch in zip(totals, new, strict=True):
            for key, moments in batch.items():
                if key in total:
                    total[key].merge(moments)
                else:
                    total[key] = moments

    def _units(self, x: Tensor) -> Tensor:
        """Features ``(samples, *over, size)`` as ``(samples, units)``, evenly thinned out."""
        count = len(x)
        if self.rows is not None and count > self.rows:
            step = max(int(count * 0.6180339887), 1)  # no period of an image or a sequence
            while gcd(step, count) > 1:
                step += 1
            x = x[torch.arange(self.rows, device=x.device) * step % count]
        return x.reshape(len(x), prod(x.shape[1:]))


def _shuffled(x: Tensor) -> Tensor:
    """Samples in another order, the same for every tensor of this length."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))
    return x[order.to(x.device)]


def inputs_of(batch: Any) -> Inputs:
    """Inputs of a batch: a dict by name, of a tuple or list the first, or else the batch itself."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch[0] if isinstance(batch, tuple | list) else batch,), {}


def network(model: Network, module: nn.Module | None) -> nn.Module:
    """The module itself, or a copy of `module` that holds a state; its tensors are not copied.

    Args:
        model: A module, or tensors by name.
        module: What runs a state.

    Returns:
        A module.

    Raises:
        SpaceMismatch: If there is a state and no module, or the state lacks a parameter.
    """
    if isinstance(model, nn.Module):
        return model
    if module is None:
        raise SpaceMismatch(
            message(
                "a state cannot be run without its module",
                help="pass module=…, of the same architecture, or two modules",
            )
        )
    memo: dict[int, Any] = {}
    missing: list[str] = []
    for name, p in module.named_parameters():
        if name in model:
            memo[id(p)] = nn.Parameter(model[name].detach(), requires_grad=False)
        else:
            missing.append(f"no tensor {name!r}")
    for name, x in module.named_buffers():
        if name in model:
            memo[id(x)] = model[name].detach()
    if missing:
        raise SpaceMismatch(message("the state does not fit the module", got=missing))
    return deepcopy(module, memo)


# ------------------------------------------------------------------------------ signs


def sign_flips(
    observer: Observer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Flips:
    """Which sign gauges flip which results: tried out on one batch.

    Args:
        observer: Says which results are read.
        module: The module.
        args: Positional inputs.
        kwargs: Keyword inputs.

    Returns:
        Key of a site → gauges of its own group that flip it; None if signs of other groups
        change it.
    """
    space = observer.space
    state = {
        name: x.detach()
        for name, x in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }
    signed = {g.group for g in space.gauges if g.kind == "sign"}
    before = _features(observer, module, args, kwargs)
    plan = observer.plan(module, args, kwargs)
    flips: Flips = {
        key: None if signed & {*site.beside} else ()
        for key, site in zip(plan.keys, plan.sites, strict=True)
    }
    for gauges in _rounds(space):
        factors = {
            i: -torch.ones(shape_of(space.all_groups[g], space), dtype=torch.float64)
            for i, g in gauges.items()
        }
        turned = network(act(Transform(space, {}, factors), state, space), module)
        after = _features(observer, turned, args, kwargs)
        own = {g: i for i, g in gauges.items()}
        for key, known in flips.items():
            sign = _sign(before[key], after[key]) if key in after else 0
            if known is not None and sign != 1:
                flips[key] = (*known, own[key[0]]) if sign and key[0] in own else None
    return flips


def _features(
    observer: Observer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {}

    def use(plan: Plan) -> Use:
        found.clear()
        return lambda i, x: found.__setitem__(plan.keys[i], x.clone())

    observer.run(module, args, kwargs, use)
    return found


def _rounds(space: WeightSpace) -> list[dict[int, str]]:
    """Sign gauges (number → group) to flip together: one of each group, of groups of one depth."""
    rounds: dict[tuple[int, int], dict[int, str]] = {}
    count: dict[str, int] = {}
    for i, gauge in enumerate(space.gauges):
        if gauge.kind == "sign":
            turn = count[gauge.group] = count.get(gauge.group, 0) + 1
            depth = len(space.all_groups[gauge.group].over)
            rounds.setdefault((depth, turn), {})[i] = gauge.group
    return [*rounds.values()]


def _sign(before: Tensor, after: Tensor) -> int:
    """1 if features stayed the same, -1 if they changed their sign, 0 if they changed otherwise."""
    if before.shape != after.shape:
        return 0
    scale = SAME * float(before.abs().max()) if before.numel() else 0.0
    for sign in (1, -1):
        if before.numel() == 0 or float((after - sign * before).abs().max()) <= scale:
            return sign
    return 0
