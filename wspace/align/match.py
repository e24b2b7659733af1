"""Matching: the symmetry that brings one state closest to another.

Coordinate ascent on the inner product of the states (Ainsworth, Hayase, Srinivasa 2023, Git
Re-Basin, algorithm 1), extended to what their algorithm leaves out: groups that depend on others
(`together`), groups that occur twice in one tensor (`quadratic`), signs and phases (`assign`).
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from wspace.action import State, Transform, compose, identity, moved, sample
from wspace.align.ascent import Ascent, Symmetry
from wspace.align.assign import Assigner
from wspace.align.blocks import Block
from wspace.align.pieces import Piece, pieces
from wspace.errors import SpaceMismatch, message
from wspace.space import WeightSpace

KINDS = ("permutation", "scale", "sign", "phase")
STARTS = ("identity", "random", "forward", "sinkhorn")


@dataclass(frozen=True, repr=False)
class Matching(Transform):
    """The group element that brings B to A, and how it was found.

    Attributes:
        objective: Inner product of A and B as moved, ``(*batch)``, float64. Where phases moved, half
            the decrease of the squared distance is added to the inner product at the start.
        start_objective: The same before the ascent.
        history: Objective at the start and after each step that gained, ``(steps, *batch)``.
        sweeps: Sweeps over the groups.
        converged: True if no step gains any more.
        restarts: Objective that each start reached, ``(starts, *batch)``.
    """

    objective: Tensor
    start_objective: Tensor
    history: Tensor
    sweeps: int
    converged: bool
    restarts: Tensor


def match(
    a: State,
    b: State,
    space: WeightSpace,
    *,
    kinds: Sequence[str] = ("permutation",),
    start: str | Transform = "identity",
    restarts: int = 0,
    sweeps: int = 100,
    generator: torch.Generator | None = None,
    groups: Sequence[str] | None = None,
    buffers: bool = False,
    threads: int | None = None,
) -> Matching:
    r"""The group element `t` for which ``act(t, b, space)`` is closest to `a`.

    Args:
        a: Reference state, ``(*batch, *shape)``; entries that `space` does not know are ignored.
        b: State to move, of the same shapes.
        space: Weight space of both.
        kinds: Symmetries to use.
        start: Where the ascent starts.
        restarts: How many more starts, at random; the best result counts.
        sweeps: Upper limit on sweeps over all groups.
        generator: Source of randomness.
        groups: Groups that may move; all free ones when None.
        buffers: Whether float buffers (running statistics) count.
        threads: Threads for assignments; as many as torch uses when None.

    Returns:
        The matching.

    Raises:
        SpaceMismatch: If a state does not fit, or an option is unknown.
    """
    lead = _batch(a, b, space)
    problem, before = _problem(a, b, space, lead, kinds, groups, buffers)
    aside = before - problem.total()  # what nothing moves
    assigner = Assigner(threads or torch.get_num_threads())
    history = [before.clone()]
    done = 0
    dirty = [True] * len(problem.units)
    while any(dirty) and done < sweeps:
        done += 1
        for i, unit in enumerate(problem.units):
            if not dirty[i]:
                continue
            (gained,) = assigner.run([problem.unit_step(unit)])
            some = bool(gained.any())
            dirty[i] = some and not problem.exact(unit)
            if some:
                history.append(before + problem.gain)
                for j in problem.neighbours[i]:
                    dirty[j] = True
    after = aside + problem.total()
    shape = tuple(lead)
    perms = {
        g: p.reshape(*shape, *p.shape[1:]).cpu() for g, p in problem.moves.permutations.items()
    }
    factors = {i: f.reshape(*shape, *f.shape[1:]).cpu() for i, f in problem.moves.factors.items()}
    return Matching(
        space=space,
        permutations=perms,
        factors=factors,
        objective=after.reshape(shape).cpu(),
        start_objective=before.reshape(shape).cpu(),
        history=torch.stack(history).reshape(-1, *shape).cpu(),
        sweeps=done,
        converged=not any(dirty),
        restarts=after.reshape(1, *shape).cpu(),
    )


def _batch(a: State, b: State, space: WeightSpace) -> tuple[int, ...]:
    space.validate(a)
    space.validate(b)
    p = space.params[0]
    x = a[p.name]
    return tuple(x.shape[: x.dim() - len(p.axes)])


def _problem(
    a: State,
    b: State,
    space: WeightSpace,
    lead: tuple[int, ...],
    kinds: Sequence[str],
    groups: Sequence[str] | None,
    buffers: bool,
) -> tuple[Ascent, Tensor]:
    chosen = {*space.groups} if groups is None else {*groups}
    permuted = {
        g.name for g in space.groups.values() if "permutation" in kinds and not g.fixed
    } & chosen
    gauges = {
        i: g.group
        for i, g in enumerate(space.gauges)
        if g.kind in kinds and g.kind != "scale" and g.group in chosen
    }
    phases = {i for i in gauges if space.gauges[i].kind == "phase"}
    free = [g for g in space.groups.values() if g.name in permuted | {*gauges.values()}]
    symmetry = Symmetry(
        {g.name: g.size for g in free},
        {g.name: g.over for g in free},
        frozenset(permuted),
        gauges,
        frozenset(phases),
    )
    rows = prod(lead)
    extent = {name: g.size for name, g in space.all_groups.items()}
    device = a[space.params[0].name].device
    blocks: list[Block] = []
    before = torch.zeros(rows, dtype=torch.float64, device=device)
    wrong: list[str] = []
    for piece in pieces(space, buffers=buffers):
        block, inner = _block(piece, a, b, len(lead), device)
        blocks.append(block)
        before += inner
        if not bool(torch.isfinite(block.error).all()):
            wrong += [name for name in piece.names if name not in wrong]
    if wrong:
        got = [f"{name!r} {_infinite(a, b, name)}" for name in wrong]
        raise SpaceMismatch(
            message(
                "match: weights are not finite",
                got=got,
                help="take a checkpoint from before training diverged",
            )
        )
    return Ascent(blocks, symmetry, extent, rows, device), before


def _infinite(a: State, b: State, name: str) -> str:
    """Which states have a NaN or an infinity in a tensor."""
    where = [k for k, x in zip("ab", (a, b), strict=True) if not bool(x[name].isfinite().all())]
    return f"of state {' and '.join(where)}" if where else "overflows when squared"


def _block(
    piece: Piece, a: State, b: State, lead: int, device: torch.device
) -> tuple[Block, Tensor]:
    """A piece of both states, and its inner product in each row."""

    def load() -> tuple[Tensor, Tensor]:
        x, y = piece.read(a, lead).to(device), piece.read(b, lead).to(device)
        if x.dtype != y.dtype:
            x, y = x.double(), y.double()
        return x, y

    x, y = load()
    sizes = (x.flatten(1).norm(dim=1).double(), y.flatten(1).norm(dim=1).double())
    inner = (x.double() * y).flatten(1).sum(1)
    return Block(piece.slots, load, torch.finfo(x.dtype).eps * sizes[0] * sizes[1]), inner


def objective(a: State, b: State, space: WeightSpace, *, buffers: bool = False) -> Tensor:
    """Inner product of two states, each tensor once.

    Args:
        a: Tensors by name, ``(*batch, *shape)``.
        b: Of the same shapes.
        space: Weight space of both.
        buffers: Whether float buffers count.

    Returns:
        ``(*batch)``, float64, on the device of `a`.
    """
    lead = _batch(a, b, space)
    return _problem(a, b, space, lead, (), (), buffers)[1].reshape(lead)


class _Moved(Mapping[str, Tensor]):
    """A state moved by a group element, tensor by tensor as it is read."""

    def __init__(self, t: Transform, state: State, space: WeightSpace) -> None:
        self.t, self.state, self.space = t, state, space

    def __getitem__(self, name: str) -> Tensor:
        return moved(self.t, name, self.state, self.space)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


class _Mean(Mapping[str, Tensor]):
    """The mean of states, tensor by tensor as it is read."""

    def __init__(self, states: Sequence[State]) -> None:
        self.states = states

    def __getitem__(self, name: str) -> Tensor:
        first, *more = (s[name] for s in self.states)
        return sum((x.to(first.device) for x in more), first) / len(self.states)

    def __iter__(self) -> Iterator[str]:
        return iter(self.states[0])

    def __len__(self) -> int:
        return len(self.states[0])


def match_many(
    states: Sequence[State],
    space: WeightSpace,
    *,
    rounds: int = 100,
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[Transform]:
    """Each state's way into one frame: each is matched to the mean of the others, in turn.

    MergeMany of Ainsworth, Hayase, Srinivasa (2023), algorithm 3.

    Args:
        states: Of one space.
        space: Weight space of all.
        rounds: Upper limit on rounds over all states.
        generator: Source of randomness.
        **options: As for `match`.

    Returns:
        A transform for each state.
    """
    ways: list[Transform] = [identity(space) for _ in states]
    for _ in range(rounds):
        better = False
        for i, state in enumerate(states):
            others = [_Moved(t, s, space) for j, (t, s) in enumerate(zip(ways, states)) if j != i]
            here = _Moved(ways[i], state, space)
            found = match(_Mean(others), here, space, generator=generator, **options)
            if len(found.history) > 1:
                better = True
                ways[i] = compose(found, ways[i])
        if not better:
            break
    return ways
