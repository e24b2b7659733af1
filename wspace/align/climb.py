"""Sweeps of an ascent: which groups are moved, and in which order, until none gains."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from wspace.align.ascent import Ascent
from wspace.align.assign import Assigner


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


def climb(problem: Ascent, assigner: Assigner, sweeps: int) -> Climb:
    """Moves groups until none gains.

    A group is moved again only after something changed that it meets. Groups that do not meet are
    independent while all others are held, so that their assignments are solved at the same time.

    Args:
        problem: The ascent; changed in place.
        assigner: Solves assignments.
        sweeps: Upper limit on sweeps.

    Returns:
        Its course.
    """
    course = Climb()
    dirty = {*range(len(problem.units))}
    while dirty and course.sweeps < sweeps:
        course.sweeps += 1
        waiting = sorted(dirty)
        while waiting:
            now = _apart(waiting, problem.neighbours, assigner.threads)
            waiting = [i for i in waiting if i not in now]
            dirty -= {*now}
            before = problem.gain.clone()
            steps = [problem.unit_step(problem.units[i]) for i in now]
            for i, gained in zip(now, assigner.run(steps), strict=True):
                if bool(gained.any()):
                    dirty |= problem.neighbours[i]
                    if not problem.exact(problem.units[i]):
                        dirty.add(i)
            if bool((problem.gain > before).any()):
                course.history.append(problem.gain.clone())
    course.converged = not dirty
    return course


def _apart(waiting: Sequence[int], neighbours: Sequence[set[int]], most: int) -> list[int]:
    """The first unit, and others that meet neither it nor each other."""
    found: list[int] = []
    for i in waiting:
        if len(found) < most and not neighbours[i] & {*found}:
            found.append(i)
    return found
