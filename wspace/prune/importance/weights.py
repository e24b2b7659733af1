r"""How much each unit is worth keeping, from weights alone.

A unit shows in several places: its row of one matrix, its column of the next, its entry of a norm's
gain. Each such place is a *slice*: one index, fixed to the unit, of one slot of a piece
(`wspace.nn.pieces`). The criteria here are functions of all coupled slices of a unit, so they hold
for any architecture. What a slice is to the unit follows from the role of its parameter and from
the wiring, never from a name.

All but `Random` are equivariant: the scores of permuted weights are the permuted scores. Criteria
that need data are in `measured`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from wspace.action import State, shape_of
from wspace.errors import PruneError, message
from wspace.nn.pieces import Piece, pieces
from wspace.prune.importance.slices import (
    Normalize,
    Reduction,
    Scores,
    batch_of,
    check_finite,
    check_option,
    counted,
    distances,
    gram,
    lamp,
    normalized,
    powers,
    reduced,
    unit_slices,
    unit_sums,
    weights_of,
)
from wspace.prune.restriction import prunable
from wspace.space import Role, WeightSpace

__all__ = [
    "FPGM",
    "LAMP",
    "BatchNormScale",
    "Importance",
    "Magnitude",
    "Random",
    "Scores",
    "WeightImportance",
    "completed",
    "importance_of",
    "unit_sums",
]


@runtime_checkable
class Importance(Protocol):
    """Says how much every unit is worth keeping."""

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of every prunable group; the module is left as it was."""
        ...


@runtime_checkable
class WeightImportance(Importance, Protocol):
    """An importance that needs no data, hence no module: a state will do, or a stack of states."""

    def of(self, state: State, space: WeightSpace) -> Scores:
        """Scores of every prunable group, ``(*batch, *sizes of over, size)``."""
        ...


def importance_of(importance: Importance | str) -> Importance:
    """An importance, by its name or as it is.

    Args:
        importance: One of ``"magnitude"``, ``"magnitude_l1"``, ``"bn_scale"``, ``"lamp"``,
            ``"fpgm"``, ``"random"``, ``"predicted"`` and ``"mean_field"``, or any object that is
            called with a module and its space.

    Returns:
        The importance.

    Raises:
        PruneError: If there is none of that name, or the object cannot be called.
    """
    if isinstance(importance, str):
        made: dict[str, Callable[[], Importance]] = {
            "magnitude": Magnitude,
            "magnitude_l1": lambda: Magnitude(p=1),
            "bn_scale": BatchNormScale,
            "lamp": LAMP,
            "fpgm": FPGM,
            "random": Random,
            "predicted": lambda: _learned("Predicted"),
            "mean_field": lambda: _learned("MeanField"),
        }
        if importance in made:
            return made[importance]()
        known = ", ".join(map(repr, made))
        help = "what needs data is an object: Taylor(batches, loss), ActivationNorm(batches) …"
    elif callable(importance) and not isinstance(importance, type):
        return importance
    else:
        known, help = "a function of a module and its space", "pass an object, not its class"
    raise PruneError(
        message(
            "prune: no such importance",
            expected=f"one of {known}" if isinstance(importance, str) else known,
            got=repr(importance),
            help=help,
        )
    )


def _learned(name: str) -> Importance:
    from wspace.prune.learned import predicted  # which loads a metanet

    return getattr(predicted, name)()


# ------------------------------------------------------------------------- the criteria


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    r"""Magnitude of a unit over all its coupled slices.

    :math:`I_u = \operatorname{reduce}_j \sum_i |w_j[u, i]|^p`, over the slices j of the unit. The
    slices are those of matrices, tables and gains (of norms and layers); shifts (biases, position
    embeddings) only if asked for, or where a group has nothing else. Tied tensors count once.

    Attributes:
        p: Power, positive. As in DepGraph no root is taken.
        reduction: How slices are combined; ``"first"`` takes the first in the space's order, which
            for most networks is what computes the units.
        normalize: What the scores of a group are divided by; `Selection` can do that too.
        shifts: Whether shifts count.
        otherwise: Scores of groups without any weight: another importance, or one number. An error
            if None.

    References:
        Fang et al. (2023), DepGraph: Towards Any Structural Pruning, section 3.3. arXiv:2301.12900.
        Li et al. (2017), Pruning Filters for Efficient ConvNets (``p=1``). arXiv:1608.08710
    """

    p: float = 2.0
    reduction: Reduction = "mean"
    normalize: Normalize = "none"
    shifts: bool = False
    otherwise: WeightImportance | float | None = None

    def __post_init__(self) -> None:
        check_option("Magnitude", "reduction", self.reduction, get_args(Reduction))
        check_option("Magnitude", "normalize", self.normalize, get_args(Normalize))
        if not self.p > 0:
            raise PruneError(message("Magnitude: no such power", expected="p > 0", got=f"{self.p}"))

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of a module's weights; see `of`."""
        return self.of(weights_of(module), space)

    def of(self, state: State, space: WeightSpace) -> Scores:
        """Scores of a state.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            space: Its weight space.

        Returns:
            Group → ``(*batch, *sizes of over, size)``, float64.

        Raises:
            PruneError: If weights are not finite, or a group has none and `otherwise` is None.
            SpaceMismatch: If the state does not fit the space.
        """  # noqa: DOC502 (helpers raise)
        found: Scores = {}
        for group, slices in powers(state, space, self.p, self.shifts).items():
            x = reduced(slices, self.reduction)
            found[group] = normalized(x, len(shape_of(space.groups[group], space)), self.normalize)
        return completed("Magnitude", found, self.otherwise, state, space)


@dataclass(frozen=True, kw_only=True)
class BatchNormScale:
    r"""Size of a unit's factors in batch normalisations: :math:`I_u = \frac1J\sum_j|\gamma_j[u]|`.

    Which gains belong to batch normalisations is read from the space's wiring. Gains of LayerNorm
    and other norms do not count: they say something else.

    Attributes:
        otherwise: Scores of groups that no batch normalisation scales: another importance, or one
            number. An error if None.

    References:
        Liu et al. (2017), Learning Efficient Convolutional Networks through Network Slimming,
        section 3. arXiv:1708.06519
    """

    otherwise: WeightImportance | float | None = None

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of a module's weights; see `of`."""
        return self.of(weights_of(module), space)

    def of(self, state: State, space: WeightSpace) -> Scores:
        """Scores of a state.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            space: Its weight space, with its wiring.

        Returns:
            Group → ``(*batch, *sizes of over, size)``, float64.

        Raises:
            PruneError: If weights are not finite, the space has no wiring, or no batch
                normalisation scales a group and `otherwise` is None.
            SpaceMismatch: If the state does not fit the space.
        """
        if space.wiring is None:
            raise PruneError(
                message(
                    "BatchNormScale: the space does not say which gains are of batch norms",
                    expected="a space with its wiring",
                    help="trace the module",
                )
            )
        gains = {
            space[b.param].name
            for b in space.wiring.blocks
            if b.param and b.tag.startswith("norm.scale@") and "batch_norm" in b.tag
        }
        found: dict[str, list[Tensor]] = {}
        for group, p, x in unit_slices(state, space, Tensor.abs):
            if p.name in gains:
                found.setdefault(group, []).append(x)
        scores = {g: reduced(slices, "mean") for g, slices in found.items()}
        return completed("BatchNormScale", scores, self.otherwise, state, space)


@dataclass(frozen=True, kw_only=True)
class LAMP:
    r"""Magnitude of a unit relative to that of the units that would survive it.

    :math:`I_u = m_u / \sum_{v: m_v \ge m_u} m_v` over the units of the group (in all contexts),
    where m is `Magnitude` with p = 2. The largest unit of every group has score 1 (shared by equal
    ones), so that thresholds over all groups never empty one. Scores need no normalisation.

    Attributes:
        reduction: How the magnitudes of coupled slices are combined.
        otherwise: As for `Magnitude`.

    References:
        Lee et al. (2021), Layer-adaptive Sparsity for the Magnitude-based Pruning, equation 1, for
        single weights. arXiv:2010.07611
    """

    reduction: Reduction = "mean"
    otherwise: WeightImportance | float | None = None

    def __post_init__(self) -> None:
        check_option("LAMP", "reduction", self.reduction, get_args(Reduction))

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of a module's weights; see `of`."""
        return self.of(weights_of(module), space)

    def of(self, state: State, space: WeightSpace) -> Scores:
        """Scores of a state.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            space: Its weight space.

        Returns:
            Group → ``(*batch, *sizes of over, size)``, float64, in [0, 1].

        Raises:
            PruneError: If weights are not finite, or a group has none and `otherwise` is None.
            SpaceMismatch: If the state does not fit the space.
        """  # noqa: DOC502 (helpers raise)
        found: Scores = {}
        for group, slices in powers(state, space, 2, False).items():
            x = reduced(slices, self.reduction)
            dims = len(shape_of(space.groups[group], space))
            found[group] = lamp(x.flatten(x.dim() - dims)).reshape(x.shape)
        return completed("LAMP", found, self.otherwise, state, space)


@dataclass(frozen=True, kw_only=True)
class FPGM:
    r"""Distance of a unit from all others of its group: near the geometric median is redundant.

    :math:`I_u = \sum_v \lVert w_u - w_v \rVert_2` over the units v of the group in the same
    context, with the coupled slices concatenated. Where the entries of a slice are themselves units
    whose order depends on the unit (the dims of a head, compared with those of another head), the
    norm over them stands for them. Units nearer than 1e-6 of their norms count as equal.

    Attributes:
        shifts: As for `Magnitude`.
        otherwise: As for `Magnitude`.

    References:
        He et al. (2019), Filter Pruning via Geometric Median, equation 4. arXiv:1811.00250
    """

    shifts: bool = False
    otherwise: WeightImportance | float | None = None

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores of a module's weights; see `of`."""
        return self.of(weights_of(module), space)

    def of(self, state: State, space: WeightSpace) -> Scores:
        """Scores of a state.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            space: Its weight space.

        Returns:
            Group → ``(*batch, *sizes of over, size)``, float64. Memory is quadratic in the number
            of units, whatever the number of weights.

        Raises:
            PruneError: If weights are not finite, or a group has none and `otherwise` is None.
            SpaceMismatch: If the state does not fit the space.
        """  # noqa: DOC502 (helpers raise)
        batch = batch_of(state, space)
        every: dict[str, list[tuple[Role, tuple[Piece, int]]]] = {g: [] for g in prunable(space)}
        for piece in pieces(space):
            for k, slot in enumerate(piece.slots):
                if slot.group in every:
                    every[slot.group].append((space[piece.names[0]].role, (piece, k)))
        found: Scores = {}
        for group, slots in every.items():
            used = counted(slots, self.shifts)
            if used:
                products = reduce(add, (gram(state, *slot, len(batch)) for slot in used))
                shape = shape_of(space.groups[group], space)
                found[group] = distances(products).reshape(*batch, *shape)
        return completed("FPGM", found, self.otherwise, state, space)


@dataclass(frozen=True)
class Random:
    """Scores drawn evenly from [0, 1): the control for all others. Not equivariant, by intent.

    Attributes:
        generator: Where they are drawn from; torch's own if None.
    """

    generator: torch.Generator | None = None

    def __call__(self, module: nn.Module, space: WeightSpace) -> Scores:
        """Scores for a module; see `of`."""
        return self.of(weights_of(module), space)

    def of(self, state: State, space: WeightSpace) -> Scores:
        """Scores for a state, of which only the batch axes matter.

        Args:
            state: Tensors by name, ``(*batch, *shape)``.
            space: Its weight space.

        Returns:
            Group → ``(*batch, *sizes of over, size)``, float64.

        Raises:
            SpaceMismatch: If the state does not fit the space.
        """  # noqa: DOC502 (helpers raise)
        batch, drawn = batch_of(state, space), self.generator
        device = drawn.device if drawn else "cpu"
        return {
            name: torch.rand(
                (*batch, *shape_of(g, space)), generator=drawn, dtype=torch.float64, device=device
            )
            for name, g in prunable(space).items()
        }


def completed(
    name: str,
    found: Scores,
    otherwise: WeightImportance | float | None,
    state: State,
    space: WeightSpace,
) -> Scores:
    """Scores of all prunable groups, those that a criterion cannot tell from `otherwise`.

    Args:
        name: Of the criterion.
        found: What it tells.
        otherwise: Another importance, or one number; an error if it is needed and None.
        state: The weights.
        space: Their space.

    Returns:
        Scores in the order of the groups; finite.

    Raises:
        PruneError: If a group has no scores, or one is not finite.
    """
    check_finite(name, found, state, space)
    free, batch = prunable(space), batch_of(state, space)
    missing = [g for g in free if g not in found]
    if missing and otherwise is None:
        raise PruneError(
            message(
                f"{name}: groups without what it reads",
                expected="something to read for every prunable group",
                got=f"nothing for {', '.join(map(repr, missing))}",
                help="pass otherwise=, an importance or a number, for these groups",
            )
        )
    others: Mapping[str, Tensor] = {}
    if not missing or otherwise is None:
        pass
    elif isinstance(otherwise, int | float):
        device = next((x.device for x in state.values()), None)
        number = torch.tensor(float(otherwise), dtype=torch.float64, device=device)
        others = {g: number.expand(*batch, *shape_of(free[g], space)).clone() for g in missing}
    else:
        others = otherwise.of(state, space)
    return {g: found[g] if g in found else others[g] for g in free}
