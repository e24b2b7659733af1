"""What is known of a module for pruning it, and the small modules made of it."""

import copy
import logging
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from typing import Any, Literal, TypedDict, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace.action import shape_of
from wspace.errors import PruneError, message
from wspace.prune.agreement import POWERS, agree, agrees, gap, outputs
from wspace.prune.compact import compact
from wspace.prune.cost import Cost
from wspace.prune.huggingface.rebuild import config_pinned, config_ties, from_config, has_config
from wspace.prune.importance.weights import Importance, importance_of
from wspace.prune.restriction import Keep, Restriction, prunable
from wspace.prune.select import Selection, select
from wspace.space import WeightSpace
from wspace.trace.again import look
from wspace.trace.sizes import Sizes, SizesLook
from wspace.trace.work import Survey, SurveyLook

log = logging.getLogger(__name__)
Rebuild = Literal["auto", "config", "copy"]
"""How the small module is made: from a smaller config, or as a copy with its attributes changed."""
ROOT = "attention over the root of its width"
EXACT = 1e-8
"""Largest relative difference in float64 that is rounding."""


class Inputs(TypedDict, total=False):
    """Example inputs, for a space that has none."""

    args: tuple[Any, ...] | Tensor
    kwargs: Mapping[str, Any]


class Pruner:
    """What is known of a module for pruning it: once for many prunings.

    Args:
        module: Module of the space, with real weights.
        space: Its weight space.
        args: Example inputs; those of the trace when None.
        kwargs: Example keyword inputs.
        rebuild: See `prune`.

    Raises:
        PruneError: If there are no example inputs, the module is a wrapper for several devices, or
            there is no such way to rebuild.
    """

    def __init__(
        self,
        module: nn.Module,
        space: WeightSpace,
        args: tuple[Any, ...] | Tensor | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        rebuild: Rebuild = "auto",
    ) -> None:
        if args is None and kwargs is None:
            if space.example is None:
                raise PruneError(
                    message(
                        "prune: no example inputs",
                        expected="inputs to run the module with: a space that was read from a "
                        "file has none",
                        help="pass args=(…,) or kwargs={…}, or trace the module",
                    )
                )
            args, kwargs = space.example
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise PruneError(
                message(
                    f"prune: {type(module).__name__} holds the module to prune",
                    expected="the module itself",
                    got="its wrapper for several devices",
                    help="prune `module.module`, and wrap what comes out",
                )
            )
        if rebuild not in get_args(Rebuild):
            raise PruneError(
                message(
                    f"prune: no way to rebuild called {rebuild!r}",
                    expected=f"one of {', '.join(map(repr, get_args(Rebuild)))}",
                )
            )
        self.module, self.space, self.rebuild = module, space, rebuild
        self.args = (args,) if isinstance(args, Tensor) else tuple(args or ())
        self.kwargs = dict(kwargs or {})
        self._remedies: dict[str, tuple[int, float] | None] = {}

    @cached_property
    def _seen(self) -> tuple[Sizes, Survey]:
        looks = SizesLook(), SurveyLook()
        return cast(
            tuple[Sizes, Survey], look(self.space, self.module, self.args, self.kwargs, *looks)
        )

    @cached_property
    def sizes(self) -> Sizes:
        """Numbers in the module's code that depend on the sizes of groups."""
        return self._seen[0]

    @cached_property
    def cost(self) -> Cost:
        """Parameters and multiply-accumulates as functions of what is kept."""
        return Cost(self.space, self._seen[1])

    @cached_property
    def by_config(self) -> bool:
        """Whether small modules are made from a smaller config, where it can say them."""
        return self.rebuild == "config" or (self.rebuild == "auto" and has_config(self.module))

    @cached_property
    def ties(self) -> list[list[str]]:
        """Sets of groups that must keep as many units as each other."""
        ties = self.sizes.ties()
        if self.by_config:
            ties = ties + config_ties(self.module, self.space, self.sizes)
        return ties

    @cached_property
    def pinned(self) -> Mapping[str, str]:
        """Groups that cannot lose units, and why: the code or the config fixes their size.

        These are left whole by `choose`; masks that ask for them anyway are refused, or carried out
        on a copy where only the config stands against them.
        """
        found = dict(self.sizes.pinned)
        if self.by_config:
            found = {**config_pinned(self.module, self.space, self.sizes), **found}
        return {g: why for g, why in found.items() if g in prunable(self.space)}

    def choose(
        self, importance: Importance | str = "magnitude", selection: Selection | None = None
    ) -> Restriction:
        """What to keep, by importance.

        Groups whose size the code fixes stay whole, and groups that it ties keep equal counts.

        Args:
            importance: Which units matter: a name or an object.
            selection: How much goes, and from where; half of the units when None.

        Returns:
            What is kept.

        Raises:
            PruneError: If the options make no sense or the budget cannot be reached.
        """  # noqa: DOC502 (select raises)
        scores = importance_of(importance)(self.module, self.space)
        return self.restrict(scores, selection or Selection(amount=0.5))

    def restrict(self, scores: Mapping[str, Tensor], selection: Selection) -> Restriction:
        """What to keep, by scores that are there already.

        Args:
            scores: Group → ``(*sizes of over, size)``, higher for units that matter more.
            selection: How much goes, and from where.

        Returns:
            What is kept.

        Raises:
            PruneError: If the options make no sense or the budget cannot be reached.
        """  # noqa: DOC502 (select raises)
        keep = select(
            self.space,
            scores,
            selection,
            equal=self.ties,
            cost=self.cost if selection.of == "flops" else None,
            least={**self.sizes.least, **{g: self.space.groups[g].size for g in self.pinned}},
        )
        return Restriction(self.space, keep)

    # ------------------------------------------------------------------ the small module

    def prune(self, keep: Keep | Restriction, *, check: bool = True) -> nn.Module:
        """The small module.

        Args:
            keep: Masks by group, or a restriction of the space.
            check: Whether it is run beside the masked module on the example inputs.

        Returns:
            A new module.

        Raises:
            PruneError: If the masks do not fit, the code does not allow the sizes, or the small
                module does not compute what it should.
        """
        few = keep if isinstance(keep, Restriction) else Restriction(self.space, keep)
        small = self._made(few)
        self._warn(few)
        if check and not any(x.is_meta for x in self.module.parameters()):
            self._compare(few, small)
        return small

    def _warn(self, few: Restriction) -> None:
        """Says where the code makes a factor of a size that weights cannot undo."""
        lost = {g: s for g, s in self.sizes.scaled.items() if g in few.keep and not self._remedy(s)}
        for source in dict.fromkeys(lost.values()):
            names = ", ".join(g for g, place in lost.items() if place == source)
            log.warning(
                "prune: the size of %s is used as a factor at %s, and no weights undo that: what "
                "is computed there changes in scale",
                names,
                source,
            )

    def _made(self, few: Restriction) -> nn.Module:
        if not self.by_config:
            return self._copy(few)
        try:
            return from_config(self.module, few, self._reference(few), self.sizes)
        except PruneError as error:
            if self.rebuild == "config":
                raise
            log.warning(
                "prune: the config of %s cannot say these sizes, so the module is copied and "
                "`from_pretrained` will not load it (`wspace.prune.load` will): %s",
                type(self.module).__name__,
                str(error).replace("\n", " "),
            )
        return self._copy(few)

    def _copy(self, few: Restriction) -> nn.Module:
        small = compact(self.module, few, self.sizes.solve(few.small), self._factors(few))
        if has_config(small):
            small.__dict__["save_pretrained"] = _no_config
        return small

    def _reference(self, few: Restriction) -> nn.Module | None:
        """What a module built from a config has to compute, if the code allows a copy."""
        try:
            return self._copy(few)
        except PruneError:
            return None

    def counted(self, few: Restriction) -> dict[str, tuple[str, ...]]:
        """Groups that lose units although operators count them.

        For them a unit of zeros is not the same as no unit: LayerNorm takes the mean over fewer.
        The root of the head dimension in attention counts too, unless a factor undoes it.

        Args:
            few: What is kept.

        Returns:
            Group → the operators.
        """
        survey = self.cost.survey
        found = dict(survey.counted) if survey else {}
        for g, source in self.sizes.scaled.items():
            if g not in few.keep:
                continue
            if self._remedy(source) is not None:
                found[g] = tuple(op for op in found.get(g, ()) if op != ROOT)
            else:
                found[g] = (*found.get(g, ()), source)
        return {g: found[g] for g in few.keep if found.get(g)}

    def _compare(self, few: Restriction, small: nn.Module) -> None:
        """Runs the small module beside the masked one.

        Where operators count some of the units, the module without the others alone is compared.

        Raises:
            PruneError: If it does not run, or does not compute the same.
        """  # noqa: DOC502 (_runs raises)
        found = self._runs(small)
        counted = self.counted(few)
        if counted:
            whole = {g for tie in self.sizes.ties() if set(tie) & set(counted) for g in tie}
            rest = {g: m for g, m in few.asked.items() if g not in whole and g not in counted}
            part = Restriction(self.space, rest)
            copied = self._reference(part) if rest else None
            if copied is None:
                return
            few, found = part, self._runs(copied)
        wanted = self._masked(few)
        if not agree(wanted, found, small):
            raise PruneError(
                message(
                    f"prune: the small {type(small).__name__} is not the masked one",
                    expected="the same outputs, since nothing counts the units that went",
                    got=f"a relative difference of {gap(wanted, found):.1e} without units of "
                    f"{', '.join(few.keep)}",
                    help="its code uses a size in a way that was not seen; ignore the groups "
                    "involved, and report this",
                )
            )

    def _runs(self, small: nn.Module) -> list[Tensor]:
        """Outputs of a small module; its code may refuse the sizes in any way it likes."""
        try:
            return outputs(small, (self.args, self.kwargs))
        except Exception as error:
            raise PruneError(
                message(
                    f"prune: the small {type(small).__name__} does not run",
                    expected="a module that runs on the example inputs",
                    got=f"{type(error).__name__}: {error}",
                    help="its code allows other sizes only: try round_to=2, 4 or 8, or ignore the "
                    "groups involved",
                )
            ) from error

    def _masked(self, few: Restriction) -> list[Tensor]:
        """Outputs of the module with zeros in the place of the units that go."""
        known = dict(self.module.named_parameters(remove_duplicate=False))
        state = {p.name: few.off(p, known[p.name].detach()) for p in few.touched}
        return outputs(self.module, (self.args, self.kwargs), state)

    # ------------------------------------------------------------------- factors of sizes

    def _factors(self, few: Restriction) -> dict[str, float]:
        """Factors that undo what the code makes of a size: attention divides by its root."""
        found: dict[str, float] = {}
        for g in few.keep:
            source = self.sizes.scaled.get(g)
            if source is not None and (remedy := self._remedy(source)):
                cured = self._tied.get(g, [g])[remedy[0]]
                share = few.counts()[cured] / self.space.groups[cured].size
                found[cured] = share ** remedy[1]
        return found

    @cached_property
    def _tied(self) -> dict[str, list[str]]:
        return {g: tie for tie in self.sizes.ties() for g in tie}

    def _remedy(self, source: str) -> tuple[int, float] | None:
        """What undoes a place of the code that makes a factor of a size, found by trying.

        Half of the units are taken from a group scaled there, and from those tied to it; in
        float64, since softmax hides a wrong scale in the rounding of less.

        Args:
            source: The place.

        Returns:
            The place of the group among these whose one side is multiplied, and by which power of
            the share that is left; None where nothing does.
        """
        if source not in self._remedies:
            self._remedies[source] = None
            trial = self._trial(source)
            meta = any(x.is_meta for x in self.module.parameters())
            if trial is not None and not meta:
                self._remedies[source] = self._tried(source, trial)
        return self._remedies[source]

    def _tried(self, source: str, trial: Restriction) -> tuple[int, float] | None:
        first = next(g for g in trial.keep if self.sizes.scaled.get(g) == source)
        tie = self._tied.get(first, [first])
        choices = [(first, 0.0), *product(tie, POWERS)]
        attributes = self.sizes.solve(trial.small)
        share = {g: trial.counts()[g] / self.space.groups[g].size for g in tie}
        for other in (self._precise(), self):
            try:
                wanted = other._masked(trial)
                gaps: list[float] = []
                for name, power in choices:
                    factors = {name: share[name] ** power}
                    small = compact(other.module, trial, attributes, factors)
                    gaps.append(gap(wanted, other._runs(small)))
            except PruneError:
                continue  # it does not run in float64
            i = min(range(len(gaps)), key=gaps.__getitem__)
            i = 0 if gaps[0] <= max(10 * gaps[i], 1e-13) else i
            name, power = choices[i]
            exact = gaps[i] <= EXACT if other is not self else agrees(gaps[i], self.module)
            return (tie.index(name), power) if exact else None
        return None

    def _precise(self) -> "Pruner":
        """The same for a copy in float64; itself if there is none."""
        try:
            twin = copy.deepcopy(self.module).double()
        except Exception:  # `compact` says what stands against a copy
            return self
        args, kwargs = tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, (self.args, self.kwargs)
        )
        other = Pruner(twin, self.space, args, kwargs, rebuild="copy")
        other.__dict__["sizes"] = self.sizes
        return other

    def _trial(self, source: str) -> Restriction | None:
        """Half of the units of one group that is scaled there, and of those tied to it."""
        free = prunable(self.space)
        for name in (g for g, place in self.sizes.scaled.items() if place == source):
            tied = self._tied.get(name, [name])
            if all(g in free and g not in self.sizes.pinned for g in tied):
                least = max(self.sizes.least.get(g, 1) for g in tied)
                half = torch.arange(free[name].size) < max(free[name].size // 2, least)
                return Restriction(
                    self.space, {g: half.expand(shape_of(free[g], self.space)) for g in tied}
                )
        return None


def _no_config(*_: Any, **__: Any) -> None:
    """Stands for `save_pretrained` on a copy: its config still says the sizes before pruning."""
    raise PruneError(
        message(
            "save_pretrained: this model was pruned as a copy, and its config is as before",
            expected="a model that its class builds from its config",
            help='save it with `wspace.prune.save`, or prune it with rebuild="config"',
        )
    )
