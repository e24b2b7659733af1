"""What may move: the groups and gauges of a problem, and how they depend on each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from wspace.nn.pieces import pieces
from wspace.space import WeightSpace


@dataclass(frozen=True)
class Symmetry:
    """What may move.

    Attributes:
        sizes: Group → units, of every group that may move in some way.
        over: Group → groups on which its permutation depends.
        permuted: Groups that may be permuted.
        gauges: Sign and phase gauges that may be used → their group.
        phases: Which of them are phases.
    """

    sizes: Mapping[str, int]
    over: Mapping[str, tuple[str, ...]]
    permuted: frozenset[str]
    gauges: Mapping[int, str]
    phases: frozenset[int]

    @cached_property
    def dependants(self) -> dict[str, tuple[str, ...]]:
        """Group → groups whose permutation depends on it, those they depend on first."""
        order = sorted(self.sizes, key=lambda g: len(self.over[g]))
        return {g: tuple(d for d in order if g in self.over[d]) for g in self.sizes}

    def within(self, given: Sequence[str], groups: Sequence[str]) -> "Symmetry":
        """What is left of some groups once others are given."""
        return Symmetry(
            sizes={g: self.sizes[g] for g in groups},
            over={g: tuple(o for o in self.over[g] if o not in given) for g in groups},
            permuted=self.permuted & {*groups},
            gauges={i: g for i, g in self.gauges.items() if g in groups},
            phases=self.phases & {i for i, g in self.gauges.items() if g in groups},
        )


def symmetry_of(space: WeightSpace, kinds: Sequence[str], groups: Sequence[str] | None) -> Symmetry:
    """What may move.

    Phases stay as they are in groups that depend on others, on which others depend, or that occur
    twice in one tensor.

    Args:
        space: The weight space.
        kinds: Symmetries to use; scales are none of the ascent's.
        groups: Groups that may move; all free ones when None.

    Returns:
        The symmetry.
    """
    chosen = {*(space.groups if groups is None else groups)}
    permuted = {g.name for g in space.groups.values() if not g.fixed and g.name in chosen}
    permuted = permuted if "permutation" in kinds else set[str]()
    gauges = {
        i: gauge.group
        for i, gauge in enumerate(space.gauges)
        if gauge.kind in kinds and gauge.kind != "scale" and gauge.group in chosen
    }
    tied = {name for g in space.groups.values() if g.over for name in (g.name, *g.over)}
    twice = {
        s.group
        for piece in pieces(space)
        for s in piece.slots
        if sum(t.group == s.group for t in piece.slots) > 1
    }
    phases = {i for i in gauges if space.gauges[i].kind == "phase"}
    held = {i for i in phases if gauges[i] in tied | twice}
    for piece in pieces(space):  # of two phases that move one tensor, the first
        here = [i for s in piece.slots for i, _ in s.shifts if i in phases - held]
        held |= {*here[1:]}
    gauges = {i: g for i, g in gauges.items() if i not in held}
    free = [g for g in space.groups.values() if g.name in permuted or g.name in gauges.values()]
    return Symmetry(
        sizes={g.name: g.size for g in free},
        over={g.name: g.over for g in free},
        permuted=frozenset(permuted),
        gauges=gauges,
        phases=frozenset(phases - held),
    )
