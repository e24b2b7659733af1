"""Matching: the symmetry that brings one state closest to another.

Coordinate ascent on the inner product of the states (Ainsworth, Hayase, Srinivasa 2023, Git
Re-Basin, algorithm 1), extended to what that algorithm leaves out: groups that depend on others
(`together`), groups that occur twice in one tensor (`quadratic`), signs and phases (`assign`), and
starts that are better than the identity (`starts`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wspace.action import KINDS, State, Transform, compose, identity, inverse
from wspace.align.canonical.balance import balance
from wspace.align.matching.ascent import Ascent
from wspace.align.matching.assign import Assigner
from wspace.align.matching.blocks import Moves
from wspace.align.matching.climb import Climb, climb
from wspace.align.matching.pairing import Mean, Moved, Pairing, batch_of, pair
from wspace.align.matching.starts import STARTS, WORKED_OUT, begin
from wspace.align.matching.symmetry import Symmetry, symmetry_of
from wspace.errors import SpaceMismatch, message
from wspace.space import WeightSpace


@dataclass(frozen=True, repr=False)
class Matching(Transform):
    """The group element that brings B to A, and how it was found.

    The objective is ``(|a|² + |b|² - |a - moved b|²) / 2``: the inner product of A and B as
    moved, unless phases move, which change the norm.

    Attributes:
        objective: At the end, ``(*batch)``, float64.
        start_objective: Before anything is moved.
        history: Objective where the ascent that won began, and after each step that gained,
            ``(steps, *batch)``; never decreases. The states' precision limits its accuracy, while
            the other objectives are computed in float64.
        sweeps: Sweeps over the groups, of the ascent that took most.
        converged: True if no step gains any more.
        restarts: What each ascent reached, the first start's first, ``(1 + restarts, *batch)``.
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
    start: str | Transform = "forward",
    restarts: int = 0,
    sweeps: int = 100,
    generator: torch.Generator | None = None,
    groups: Sequence[str] | None = None,
    buffers: bool = False,
    threads: int | None = None,
) -> Matching:
    r"""The group element `t` for which ``act(t, b, space)`` is closest to `a`.

    Maximises :math:`\sum_k \langle \theta^a_k, (t \cdot \theta^b)_k \rangle`, each tensor
    counted once, by coordinate ascent: with all groups but one held, the best permutation of that
    one is a linear assignment. The objective never decreases; the result is a local optimum. The
    states are read tensor by tensor, so they may be memory-mapped; the device is that of `a`.

    With ``"scale"`` among the kinds both states are balanced first (`canonical.balance`), and the
    objective is that of the balanced states.

    Args:
        a: Reference state, ``(*batch, *shape)``; entries that `space` does not know are ignored.
        b: State to move, with the same batch axes: there is one matching for each row.
        space: Weight space of both.
        kinds: Symmetries to use, among ``"permutation"``, ``"scale"``, ``"sign"``, ``"phase"``.
        start: Where the ascent starts. ``"forward"``: each group matched by what meets only groups
            that are matched already, beginning at the inputs; ``"sinkhorn"``: soft assignments,
            annealed; ``"identity"``; ``"random"``; or a transform of B. Where one of the first two
            finds less than B has as it is (models of one ancestor), the identity is the start.
        restarts: Further ascents from random permutations; the best counts, row by row.
        sweeps: Upper limit on sweeps over all groups, for each ascent.
        generator: Source of randomness, on the CPU; used by random starts only.
        groups: Names of the groups that may move; all free ones when None.
        buffers: Whether float buffers (running statistics) count. They are moved in any case.
        threads: Assignments solved at the same time; as many as torch has threads when None.

    Returns:
        The transform, batched like the states, with its objective.

    Raises:
        SpaceMismatch: If a state does not fit the space (listing all that is wrong), has weights
            that are not finite, or an option is unknown.

    Example:
        >>> import wspace
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.randn(1, 3))
        >>> t = wspace.sample(space)
        >>> found = match(mlp.state_dict(), wspace.act(t, mlp.state_dict(), space), space)
        >>> torch.equal(found.permutations["h1"], wspace.inverse(t).permutations["h1"])
        True

    References:
        Ainsworth, Hayase, Srinivasa (2023), Git Re-Basin: Merging Models modulo Permutation
        Symmetries, algorithm 1. arXiv:2209.04836
    """
    _check(space, kinds, start, groups, (restarts, sweeps, threads))
    lead = batch_of({"a": a, "b": b}, space, "match")
    way: list[tuple[Transform | None, Transform | None]] = []
    if "scale" in kinds:
        way.append((balanced := balance(a, space), other := balance(b, space)))
        a, b = Moved(balanced, a, space), Moved(other, b, space)
    if isinstance(start, Transform):
        way.append((None, start))
        b, start = Moved(start, b, space), "identity"
    pairing = pair(a, b, space, lead, buffers=buffers, who="match")
    symmetry = symmetry_of(space, kinds, groups)
    with Assigner(threads or torch.get_num_threads()) as assigner:
        search = _Search(space, pairing, symmetry, assigner, sweeps)
        search.ascend(start, generator)
        for _ in range(restarts):
            search.ascend("random", generator)
    found = search.result(lead)
    for left, right in reversed(way):
        t: Transform = found if right is None else compose(found, right)
        t = t if left is None else compose(inverse(left), t)
        found = _with(found, t)
    return found


def _with(found: Matching, t: Transform) -> Matching:
    """A matching with another transform."""
    return Matching(
        t.space,
        t.permutations,
        t.factors,
        found.objective,
        found.start_objective,
        found.history,
        found.sweeps,
        found.converged,
        found.restarts,
    )


def _check(
    space: WeightSpace,
    kinds: Sequence[str],
    start: str | Transform,
    groups: Sequence[str] | None,
    numbers: tuple[int, int, int | None],
) -> None:
    """Refuses options that mean nothing, all at once."""
    restarts, sweeps, threads = numbers
    wrong = [f"kind {k!r}; there are {', '.join(KINDS)}" for k in kinds if k not in KINDS]
    wrong += [f"group {g!r}, which is no free group" for g in groups or () if g not in space.groups]
    if isinstance(start, Transform):
        if start.space != space:
            wrong.append("a start that belongs to another weight space")
    elif start not in STARTS:
        wrong.append(f"start {start!r}; there are {', '.join(STARTS)}, and any transform")
    if isinstance(kinds, str):
        wrong = [f"kinds {kinds!r}, a string; give a tuple"]
    if restarts < 0 or sweeps < 1 or (threads is not None and threads < 1):
        wrong.append(f"restarts {restarts}, sweeps {sweeps}, threads {threads}")
    if wrong:
        raise SpaceMismatch(message("match: options that mean nothing", got=wrong))


class _Search:
    """Ascents from several starts, and the best of each row."""

    def __init__(
        self,
        space: WeightSpace,
        pairing: Pairing,
        symmetry: Symmetry,
        assigner: Assigner,
        sweeps: int,
    ) -> None:
        self.space, self.pairing, self.symmetry = space, pairing, symmetry
        self.assigner, self.sweeps = assigner, sweeps
        self.before = pairing.objective
        self.restarts: list[Tensor] = []
        self.best: Tensor | None = None
        self.courses: list[Climb] = []
        self.won = torch.zeros(pairing.rows, dtype=torch.int64, device=pairing.device)
        self.moves = Moves(symmetry.over, symmetry.phases)

    def ascend(self, start: str, generator: torch.Generator | None) -> None:
        """One ascent; from the identity in rows where the start that is worked out is worse."""
        extent = {name: g.size for name, g in self.space.all_groups.items()}
        pairing = self.pairing
        problem = Ascent(pairing.blocks, self.symmetry, extent, pairing.rows, pairing.device)
        aside, neutral = self._aside(problem), problem.moves.copy()
        unsure = begin(start, problem, self.assigner, generator)
        if start in WORKED_OUT and bool((worse := aside + problem.total() < self.before).any()):
            problem.moves.put_where(worse, neutral)
            unsure = {*range(len(problem.units))}
        problem.gain.zero_()
        course = climb(problem, self.assigner, self.sweeps, unsure)
        reached = aside + problem.total()
        first = reached - problem.gain
        course.history = [first, *(first + x for x in course.history)]
        better = torch.ones_like(reached, dtype=torch.bool)
        if self.best is None:
            self.best = reached
            self.moves = problem.moves
        else:
            better = reached > self.best
            self.best = torch.where(better, reached, self.best)
            self.moves.put_where(better, problem.moves)
        self.won[better] = len(self.courses)
        self.courses.append(course)
        self.restarts.append(reached)

    def _aside(self, problem: Ascent) -> Tensor:
        """Inner product of what nothing moves."""
        counted = {id(b) for b in problem.blocks}
        zero = torch.zeros_like(self.before)
        blocks = zip(self.pairing.blocks, self.pairing.inner, strict=True)
        return sum((x for b, x in blocks if id(b) not in counted), zero)

    def _history(self) -> Tensor:
        """Histories of the ascents that won, ``(steps, rows)``, filled with their last values."""
        used = [*range(len(self.courses))]
        used = [i for i in used if bool((self.won == i).any())] or [0]
        steps = max(len(self.courses[i].history) for i in used)
        table = torch.stack(
            [
                torch.stack([*h, *[h[-1]] * (steps - len(h))])
                for h in (self.courses[i].history for i in used)
            ]
        )
        place = torch.tensor([used.index(int(i)) for i in self.won.tolist()], device=table.device)
        return table[place, :, torch.arange(len(place), device=table.device)].mT

    def result(self, lead: tuple[int, ...]) -> Matching:
        """The best of each row."""

        def shaped(x: Tensor) -> Tensor:
            return x.reshape((*lead, *x.shape[1:])).cpu()

        best = self.before if self.best is None else self.best
        history = self._history()
        return Matching(
            space=self.space,
            permutations={g: shaped(x) for g, x in self.moves.permutations.items()},
            factors={i: shaped(x) for i, x in self.moves.factors.items()},
            objective=shaped(best),
            start_objective=shaped(self.before),
            history=history.reshape((-1, *lead)).cpu(),
            sweeps=max(c.sweeps for c in self.courses),
            converged=all(c.converged for c in self.courses),
            restarts=torch.stack(self.restarts).reshape((-1, *lead)).cpu(),
        )


def objective(a: State, b: State, space: WeightSpace, *, buffers: bool = False) -> Tensor:
    """Inner product of two states, each tensor counted once; what `match` maximises.

    Args:
        a: Tensors by name, ``(*batch, *shape)``.
        b: Of the same shapes.
        space: Weight space of both.
        buffers: Whether float buffers count.

    Returns:
        ``(*batch)``, float64, on the device of `a`.

    Raises:
        SpaceMismatch: If a state does not fit the space or has weights that are not finite.
    """
    lead = batch_of({"a": a, "b": b}, space, "objective")
    return pair(a, b, space, lead, buffers=buffers, who="objective").objective.reshape(lead)


def match_many(
    states: Sequence[State],
    space: WeightSpace,
    *,
    rounds: int = 100,
    **options: Any,
) -> list[Transform]:
    """Each state's way into one frame: each in turn is matched to the mean of the others.

    First each state is matched to the first one; then rounds follow until none gains. The states as
    moved have the mean ``sum(act(t, x, space) for t, x in zip(found, states)) / len(states)``.

    Args:
        states: Of one space, with the same batch axes.
        space: Weight space of all.
        rounds: Upper limit on rounds over all states.
        **options: As for `match`; `start` is that of the first matching.

    Returns:
        A transform for each state; the identity for the first, unless a round gained by moving it.

    Raises:
        SpaceMismatch: As for `match`, or if there is no state.

    References:
        Ainsworth, Hayase, Srinivasa (2023), Git Re-Basin, algorithm 3 (MergeMany).
    """
    if not states:
        raise SpaceMismatch(message("match_many: no states", expected="one or more"))
    batch_of({f"state {i}": x for i, x in enumerate(states)}, space, "match_many")
    kinds = options.get("kinds", ("permutation",))
    if "scale" in kinds:
        return _balanced_many(states, space, rounds=rounds, **options)
    ways: list[Transform] = [identity(space)]
    ways += [match(states[0], x, space, **options) for x in states[1:]]
    options |= {"start": "identity", "restarts": 0}
    for _ in range(rounds if len(states) > 2 else 0):
        gained = False
        for i in range(len(states)):
            here = [Moved(t, x, space) for t, x in zip(ways, states, strict=True)]
            found = match(Mean(here[:i] + here[i + 1 :]), here[i], space, **options)
            if len(found.history) > 1:
                gained, ways[i] = True, compose(found, ways[i])
        if not gained:
            break
    return ways


def _balanced_many(
    states: Sequence[State], space: WeightSpace, *, kinds: Sequence[str], **options: Any
) -> list[Transform]:
    """`match_many` of balanced states, in a frame with the first one's scales."""
    own = [balance(x, space) for x in states]
    here = [Moved(t, x, space) for t, x in zip(own, states, strict=True)]
    ways = match_many(here, space, kinds=[k for k in kinds if k != "scale"], **options)
    frame = compose(ways[0], compose(inverse(own[0]), inverse(ways[0])))
    return [compose(frame, compose(t, o)) for t, o in zip(ways, own, strict=True)]
