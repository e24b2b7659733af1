"""How far the loss rises when a unit is taken away: measured, for every unit of every group.

A unit is taken away by zeros in every entry of a parameter that belongs to it, as
`Restriction.masked` has it; buffers stay. Units are independent of each other here: what two of
them do together is not measured. Many are taken away at once, each from a copy of its own, in one
vectorised pass; where a module cannot be run so, one by one.

The measured effect is what importance is to predict (`wspace.prune.learned.predicted`), and the
best that a criterion which looks at units alone can know.
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from wspace.action import State, shape_of
from wspace.action.places import along_axis
from wspace.errors import PruneError, message
from wspace.prune.restriction import prunable
from wspace.restore import buffers_of, drawn_again, modes_of, put_back, put_modes
from wspace.space import Axis, Group, Param, WeightSpace

Loss = Callable[[nn.Module, Any], Tensor]
"""(the module, one batch) → its loss, a scalar."""

Losses = Callable[[dict[str, Tensor]], Tensor]
"""Stacked states, ``(m, *shape)`` by name → their losses, ``(m,)``."""

ENTRIES = 1 << 24
"""Entries of parameters that are copied at once."""


def removal_effects(
    module: nn.Module,
    space: WeightSpace,
    batches: Iterable[Any],
    loss: Loss,
    *,
    groups: Sequence[str] | None = None,
    at_once: int | None = None,
) -> dict[str, Tensor]:
    r"""The rise of the loss when a unit is taken away, for every unit of the prunable groups.

    :math:`e_u = L(\theta \odot m_u) - L(\theta)`, where :math:`m_u` is 0 in the entries of unit u.
    It costs one evaluation of every batch for each unit.

    Args:
        module: The network, run in evaluation mode and without gradients. It is left bit for bit as
            it was: parameters, buffers, modes, random generators.
        space: Its weight space.
        batches: Gone through once; all count equally.
        loss: Called with the module, which then holds the changed parameters, and a batch.
        groups: Names of groups; all prunable ones if None.
        at_once: Units in one vectorised pass, fewer where parameters are many; 1 to go one by one,
            which also happens where the module or the loss cannot be vectorised. None for 32, or 1
            if the module convolves, since PyTorch's convolutions of many kernels are slow.

    Returns:
        Group name → effects ``(*sizes of over, size)``, float64, on the CPU.

    Raises:
        PruneError: If a group is unknown or cannot lose units, there are no batches, or the loss is
            not one number.

    Example:
        >>> import torch, wspace
        >>> mlp = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> with torch.no_grad():
        ...     _ = mlp[2].weight[:, 1].zero_()  # nobody listens to this unit
        >>> x = torch.randn(20, 3)
        >>> effects = removal_effects(mlp, space, [x], lambda m, x: m(x).square().mean())
        >>> effects["h1"].shape, float(effects["h1"][1])
        (torch.Size([5]), 0.0)
    """  # noqa: DOC502 (helpers raise)
    asked = _Asked(module, loss)
    wanted = _chosen(space, groups)
    found = {n: torch.zeros(prod(shape_of(g, space)), dtype=torch.float64) for n, g in wanted}
    if at_once is None:
        at_once = 1 if any(isinstance(m, _CONVOLUTIONS) for m in module.modules()) else 32
    state = {name: x.detach() for name, x in module.state_dict(keep_vars=True).items()}
    count, together = 0, at_once > 1
    with _lent(module), torch.no_grad():
        for batch in batches:
            before = asked.one({}, batch)
            for name, group in wanted:
                after, together = _without(asked, space, group, state, (batch, at_once, together))
                found[name] += after.double().cpu() - before.double().cpu()
            count += 1
    if not count:
        raise PruneError(message("removal_effects: no batches", expected="at least one"))
    return {n: (found[n] / count).reshape(shape_of(g, space)) for n, g in wanted}


def stacked_effects(
    space: WeightSpace,
    states: State,
    losses: Losses,
    *,
    groups: Sequence[str] | None = None,
    at_once: int = 256,
) -> dict[str, Tensor]:
    """The same for many small networks of one space: a zoo.

    Args:
        space: Weight space of all networks.
        states: Stacked states, ``(n, *shape)`` by name, ties once or under all names.
        losses: Evaluates a stack of states, such as `wspace.zoo.evaluate_many` with a loss that is
            read from the answers.
        groups: As for `removal_effects`.
        at_once: Changed networks in one call of `losses`, at least those of one unit.

    Returns:
        Group name → effects ``(n, *sizes of over, size)``, float64.

    Raises:
        PruneError: As for `removal_effects`.
    """  # noqa: DOC502 (helpers raise)
    n = len(states[space.params[0].name])
    with torch.no_grad():
        before = losses(dict(states)).double()
        found: dict[str, Tensor] = {}
        for name, group in _chosen(space, groups):
            shape, parts = shape_of(group, space), list[Tensor]()
            where = strips(space, group)
            for units in torch.arange(prod(shape)).split(max(1, at_once // n)):
                many = {k: x.repeat_interleave(len(units), 0) for k, x in states.items()}
                for p, zero in _zeros(space, where, units):
                    x = (
                        many[p.name]
                        .unflatten(0, (n, len(units)))
                        .masked_fill(zero, 0)
                        .flatten(0, 1)
                    )
                    many |= {k: x for k in (p.name, *p.ties) if k in many}
                parts.append(losses(many).double().reshape(n, len(units)) - before[:, None])
            found[name] = torch.cat(parts, 1).reshape(n, *shape)
    return found


# ------------------------------------------------------------------ where units are


def strips(space: WeightSpace, group: Group) -> dict[str, list[Tensor]]:
    """Which unit of a group every entry of a parameter belongs to.

    Args:
        space: The weight space.
        group: A group of it.

    Returns:
        For every parameter (no buffers) that the group indexes, one int64 tensor for each of its
        places: it broadcasts to the parameter's shape and holds numbers of units, row-major in
        ``(*sizes of over, size)``, and -1 where there is none.
    """
    shape = shape_of(group, space)
    numbers = torch.arange(prod(shape), dtype=torch.float64).reshape(shape)
    out: dict[str, list[Tensor]] = {}
    for p in space.params:
        if p.buffer:
            continue
        found = [torch.full([1] * len(p.axes), p.at[1])] if p.at and p.at[0] == group.name else []
        axes = p.axes
        if not p.local:  # what a group depends on is in another axis: all of them as one
            axes = (Axis(tuple(f for axis in p.axes for f in axis.factors)),)
        for d, axis in enumerate(axes):
            for k in range(sum(g.name == group.name for g in axis.groups())):
                laid = along_axis(replace(p, axes=axes), d, group.name, k, numbers, -1.0)
                size = [n if i == d else 1 for i, n in enumerate(p.shape)]
                found.append(laid.long().reshape(size if p.local else p.shape))
        if found:
            out[p.name] = found
    return out


def _zeros(
    space: WeightSpace, where: Mapping[str, list[Tensor]], units: Tensor
) -> Iterator[tuple[Param, Tensor]]:
    """Every parameter that loses something, and what: bool ``(units, *shape)``, or broadcasting."""
    for name, places in where.items():
        p = space[name]
        each = units.reshape(-1, *[1] * len(p.axes))
        zero = places[0] == each
        for other in places[1:]:
            zero = zero | (other == each)
        yield p, zero


def _chosen(space: WeightSpace, groups: Sequence[str] | None) -> list[tuple[str, Group]]:
    free = prunable(space)
    wrong = [repr(name) for name in groups or () if name not in free]
    if wrong:
        raise PruneError(
            message(
                "removal_effects: no such groups, or none that can lose units",
                expected=f"some of {', '.join(free) or '(none)'}",
                got=wrong,
            )
        )
    return list(free.items()) if groups is None else [(name, free[name]) for name in groups]


# ------------------------------------------------------------------------ evaluation

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


class _Asked(nn.Module):
    """A module with its loss, as a function of its parameters."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        found = cast("object", self.loss(self.module, batch))
        if not isinstance(found, Tensor) or found.numel() != 1:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise PruneError(
                message("removal_effects: the loss is not one number, a tensor", got=got,
                        help="take its mean")
            )  # fmt: skip
        return found.reshape(())

    def one(self, changed: State, batch: Any) -> Tensor:
        """The loss with some parameters changed."""
        with drawn_again(self.module):
            return functional_call(self, {f"module.{k}": x for k, x in changed.items()}, (batch,))

    def many(self, changed: State, batch: Any) -> Tensor:
        """Losses ``(m,)`` with parameters ``(m, *shape)`` in place of some."""
        named = {f"module.{k}": x for k, x in changed.items()}
        with drawn_again(self.module), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            run = vmap(lambda some: functional_call(self, some, (batch,)), randomness="same")
            return run(named)


def _without(
    asked: _Asked,
    space: WeightSpace,
    group: Group,
    state: State,
    how: tuple[Any, int, bool],
) -> tuple[Tensor, bool]:
    """Losses without each unit of a group, and whether several can be asked for at once."""
    batch, at_once, together = how
    where = {
        name: [x.to(state[name].device) for x in found]
        for name, found in strips(space, group).items()
    }
    touched = sum(space[name].numel for name in where)
    step = max(1, min(at_once, ENTRIES // max(1, touched))) if together else 1
    out: list[Tensor] = []
    for units in torch.arange(prod(shape_of(group, space))).split(step):
        device = next(iter(state.values())).device
        zeros = list(_zeros(space, where, units.to(device)))
        changed = {p.name: state[p.name].masked_fill(zero, 0) for p, zero in zeros}
        losses = _vectorised(asked, changed, batch) if together and len(units) > 1 else None
        if losses is None:
            together = together and len(units) == 1
            each = [{k: x[i] for k, x in changed.items()} for i in range(len(units))]
            losses = torch.stack([asked.one(some, batch) for some in each])
        out.append(losses)
    return torch.cat(out), together


def _vectorised(asked: _Asked, changed: State, batch: Any) -> Tensor | None:
    """Losses of a stack in one pass; None if the module or the loss refuses, or lies."""
    try:
        losses = asked.many(changed, batch)
    except PruneError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AssertionError):
        return None  # if it is the module's or the loss's own error, it is raised one by one
    # code may take a branch on a value, or keep something aside, without vmap noticing
    alone = asked.one({k: x[0] for k, x in changed.items()}, batch)
    near = 1e-9 if losses.dtype == torch.float64 else 1e-3
    return losses if torch.allclose(losses[0], alone, rtol=near, atol=near * 1e-2) else None


@contextmanager
def _lent(module: nn.Module) -> Generator[None]:
    """A module in evaluation mode; modes and buffers are put back."""
    modes, buffers = modes_of(module), buffers_of(module)
    try:
        module.eval()
        yield
    finally:
        put_modes(modes)
        put_back(buffers)
