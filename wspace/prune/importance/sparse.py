r"""Training towards units that can go: a penalty on the norms of groups of coupled slices.

The weaker a unit is among those of its group, the more its weights are pulled to zero. This is
plain PyTorch: one call between ``loss.backward()`` and ``optimizer.step()``, or a term of the loss.
"""

from collections.abc import Mapping
from functools import cached_property
from math import isfinite, prod

import torch
from torch import Tensor, nn

from wspace.action import State, shape_of
from wspace.action.places import along_axis
from wspace.errors import PruneError, message
from wspace.prune.importance.slices import check_finite, weights_of
from wspace.prune.importance.weights import Magnitude
from wspace.prune.restriction import prunable
from wspace.space import Axis, Param, Role, WeightSpace


class GroupSparsity:
    r"""Penalty on units by how weak they are in their group.

    :math:`R = \frac\lambda2 \sum_g \sum_{u \in g} \gamma_u \lVert w_u \rVert^2`, with
    :math:`\gamma_u = \alpha^{(I_{max} - I_u) / (I_{max} - I_{min})}`, where :math:`w_u` are the
    coupled slices of unit u and :math:`I_u = \lVert w_u \rVert` their norm. The strongest unit of a
    group has factor 1, the weakest α; the factors are no variables of the gradient, which is
    :math:`\lambda \gamma_u w_u`, added over the groups that an entry belongs to. Where all units
    are equally strong the factor is 1. Slices are those that `Magnitude` counts.

    Two objects share nothing, and what one knows (options, where units stand) never changes.

    References:
        Fang et al. (2023), DepGraph: Towards Any Structural Pruning, equations 5 and 6 (there with
        the exponent's 2 as a factor, α = 2⁴). arXiv:2301.12900
    """

    def __init__(
        self,
        space: WeightSpace,
        *,
        strength: float = 1e-4,
        alpha: float = 16.0,
        shifts: bool = False,
    ) -> None:
        """Sets the options.

        Args:
            space: Weight space of the networks to come.
            strength: λ, at least 0.
            alpha: α, at least 1; 1 is weight decay of everything that belongs to a unit.
            shifts: Whether biases count.

        Raises:
            PruneError: If an option makes no sense.
        """
        wrong = [f"strength={strength}"] if not (strength >= 0 and isfinite(strength)) else []
        wrong += [f"alpha={alpha}"] if not (alpha >= 1 and isfinite(alpha)) else []
        if wrong:
            raise PruneError(
                message("GroupSparsity: options that make no sense",
                        expected="strength ≥ 0 and alpha ≥ 1, finite", got=wrong)
            )  # fmt: skip
        self.space, self.strength, self.alpha, self.shifts = space, strength, alpha, shifts
        self._free = tuple(prunable(space))

    def __repr__(self) -> str:
        return (
            f"GroupSparsity({len(self._free)} groups, strength={self.strength}, alpha={self.alpha})"
        )

    def factors(self, state: State) -> dict[str, Tensor]:
        """The factor of every unit.

        Args:
            state: Tensors by name, ``(*shape)``; unbatched.

        Returns:
            Prunable group → γ, ``(*sizes of over, size)``, float64, from 1 to α.

        Raises:
            PruneError: If weights are not finite.
            SpaceMismatch: If the state does not fit the space.
        """  # noqa: DOC502 (helpers raise)
        with torch.no_grad():
            norms = Magnitude(reduction="sum", shifts=self.shifts, otherwise=0.0).of(
                state, self.space
            )
            out: dict[str, Tensor] = {}
            for group, square in norms.items():
                norm = square.sqrt()
                most, least = norm.amax(), norm.amin()
                spread = most - least
                flat = spread <= 1e-12 * most
                share = (most - norm) / torch.where(flat, 1.0, spread)
                out[group] = torch.where(flat, 1.0, self.alpha**share)
            return out

    def penalty(self, state: State) -> Tensor:
        """The penalty, differentiable with respect to the state.

        Args:
            state: Tensors by name, ``(*shape)``; unbatched. Of tied tensors the first name counts.

        Returns:
            A scalar, of the dtype of the weights.

        Raises:
            PruneError: If weights are not finite.
            SpaceMismatch: If the state does not fit the space.
        """  # noqa: DOC502 (helpers raise)
        terms: list[Tensor] = []
        for name, gammas in self._laid(self.factors(state)).items():
            w = state[name]
            square = torch.view_as_real(w).square().sum(-1) if w.is_complex() else w.square()
            terms += [(square * x.to(w.device, square.dtype)).sum() for x in gammas]
        if not terms:
            return torch.zeros(())
        return torch.stack([t.to(terms[0].dtype) for t in terms]).sum() * (self.strength / 2)

    @torch.no_grad()
    def add_to_gradients(self, module: nn.Module) -> None:
        """Adds the gradient of the penalty to ``.grad`` in place, once for tied parameters.

        Parameters that do not require gradients stay as they are; a gradient that is None is made,
        and a sparse one becomes dense.

        Args:
            module: A module of the space.

        Raises:
            PruneError: If weights are not finite.
            SpaceMismatch: If the module is not of this space.
        """  # noqa: DOC502 (helpers raise)
        named = dict(module.named_parameters(remove_duplicate=False))
        state = weights_of(module)
        check_finite("GroupSparsity", {}, state, self.space)
        for name, gammas in self._laid(self.factors(state)).items():
            p = named[name]
            if not p.requires_grad:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.is_sparse:  # of an embedding; the penalty is on all of its rows
                p.grad = p.grad.to_dense()
            for x in gammas:
                p.grad.addcmul_(p.detach(), (x * self.strength).to(p.device, p.dtype))

    def _laid(self, factors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Factors at the entries of each parameter, for each place of a group; they broadcast."""
        table = {g: torch.cat([x.new_zeros(1), x.flatten()]) for g, x in factors.items()}
        return {
            name: [table[g][i.to(table[g].device)] for g, i in places]
            for name, places in self._places.items()
        }

    @cached_property
    def _places(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Parameter → for each place of a group, the group and 1 + the unit at every entry."""
        out: dict[str, list[tuple[str, Tensor]]] = {}
        only_shifts = {g for g in self._free if not self._main(g)}
        shapes = {g: shape_of(self.space.groups[g], self.space) for g in self._free}
        units = {g: torch.arange(prod(s)).reshape(s) + 1.0 for g, s in shapes.items()}
        for p in self.space.params:
            if p.buffer or p.role in (Role.UNUSED, Role.STATISTIC):
                continue
            groups = {g.name for axis in p.axes for g in axis.groups()} | {*(p.at or ())[:1]}
            if p.role is Role.SHIFT and not self.shifts:
                groups &= only_shifts
            places = [
                (g, x.long()) for g in self._free if g in groups for x in laid(p, g, units[g])
            ]
            if places:
                out[p.name] = places
        return out

    def _main(self, group: str) -> bool:
        """Whether a group has slices that are no shifts."""
        idle = (Role.SHIFT, Role.UNUSED, Role.STATISTIC)
        return any(
            p.role not in idle
            and (
                (p.at is not None and p.at[0] == group)
                or any(g.name == group for axis in p.axes for g in axis.groups())
            )
            for p in self.space.params
        )


def laid(p: Param, group: str, values: Tensor) -> list[Tensor]:
    """Numbers per unit of a group at the entries of a parameter, for each place of the group.

    Args:
        p: The parameter.
        group: Name of the group.
        values: ``(*sizes of over, size)``, on the CPU.

    Returns:
        Tensors that broadcast to the parameter's shape, 0 where no unit of the group is.
    """
    found = [values[p.at[1]].reshape([1] * len(p.axes))] if p.at and p.at[0] == group else []
    if p.local:
        for d, axis in enumerate(p.axes):
            shape = [n if i == d else 1 for i, n in enumerate(p.shape)]
            for k in range(sum(g.name == group for g in axis.groups())):
                found.append(along_axis(p, d, group, k, values, 0.0).reshape(shape))
        return found
    whole = Axis(tuple(f for axis in p.axes for f in axis.factors))
    flat = Param(p.name, (whole,), p.role, at=p.at, family=p.family)
    return found + [
        along_axis(flat, 0, group, k, values, 0.0).reshape(p.shape)
        for k in range(sum(g.name == group for g in whole.groups()))
    ]
