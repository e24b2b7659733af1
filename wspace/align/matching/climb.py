"""Sweeps of an ascent: which groups are moved, and in which order, until none gains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wspace.align.matching.ascent import Ascent
from wspace.align.matching.assign import Assigner


@dataclass
class Climb:
    """Course of an ascent.

    Attributes:
        history: Gain on the start after each step that gained, ``(rows,)`` each.
        sweeps: Sweeps made.
        converged: True if no step gains any more.
    """

    history: list[Tensor] = field(default_factory=list[Tensor])
    sweeps: int = 0
    converged: bool = False


def climb(problem: Ascent, assigner: Assigner, sweeps: int, units: Iterable[int]) -> Climb:
    """Moves groups until none gains.

    A group is moved again only after something changed that it meets. Groups that do not meet are
    independent while all others are held, so that their assignments are solved at the same time.

    Args:
        problem: The ascent; changed in place.
        assigner: Solves assignments.
        sweeps: Upper limit on sweeps.
        units: Units that may gain at the start.

    Returns:
        Its course.
    """
    course = Climb()
    every = torch.ones(problem.rows, dtype=torch.bool)
    dirty = {i: every for i in units}  # where a unit may gain
    while dirty and course.sweeps < sweeps:
        course.sweeps += 1
        waiting = sorted(dirty)
        while waiting:
            now = apart(waiting, problem.neighbours, assigner.threads)
            waiting = [i for i in waiting if i not in now]
            before = problem.gain.clone()
            gained = _stepped(problem, assigner, {i: dirty.pop(i) for i in now})
            for i, rows in gained.items():
                again = problem.neighbours[i] | (set() if problem.exact(problem.units[i]) else {i})
                for j in again if bool(rows.any()) else ():
                    dirty[j] = dirty[j] | rows if j in dirty else rows
            if bool((problem.gain > before).any()):
                course.history.append(problem.gain.clone())
    course.converged = not dirty
    return course


def _stepped(problem: Ascent, assigner: Assigner, units: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """One step of units that do not meet, each in some rows; where they gained."""
    rows = {i: some.nonzero()[:, 0].to(problem.device) for i, some in units.items()}
    parts = {i: problem if len(r) == problem.rows else problem.part(r) for i, r in rows.items()}
    steps = [part.unit_step(part.units[i]) for i, part in parts.items()]
    found: dict[int, Tensor] = {}
    for (i, part), gained in zip(parts.items(), assigner.run(steps), strict=True):
        if part is not problem:
            problem.absorb(part, rows[i])
        found[i] = torch.zeros(problem.rows, dtype=torch.bool)
        found[i][rows[i].cpu()] = gained.cpu()
    return found


def apart(waiting: Sequence[int], neighbours: Sequence[set[int]], most: int) -> list[int]:
    """The first unit, and others that meet neither it nor each other.

    Args:
        waiting: Units, in order.
        neighbours: Unit → units that it meets.
        most: How many are wanted at most.

    Returns:
        The units.
    """
    found: list[int] = []
    for i in waiting:
        if len(found) < most and not neighbours[i] & {*found}:
            found.append(i)
    return found
