"""Atoms: the store under the axis algebra of `solve`: a union-find, sizes, bindings, dependences.

Owns what is known; every inference is made in `solve`.
"""

from collections.abc import Iterable, Sequence
from math import prod

Axis = tuple[int, ...]


class Atoms:
    """Union-find over atoms that may be bound to products and concatenations."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._fixed: list[bool] = []
        self._over: list[set[int]] = []
        self._product: dict[int, Axis] = {}
        self._concat: dict[int, list[Axis]] = {}
        self._cases: dict[int, tuple[int, list[Axis]]] = {}
        self._meets: list[tuple[int, set[int]]] = []
        self._settled_concats: set[int] = set()
        self._pointers: list[tuple[Axis, Axis]] = []

    # ------------------------------------------------------------------- atoms

    def atom(self, size: int, *, fixed: bool = False, over: Iterable[int] = ()) -> Axis:
        """A new axis of one atom; ``()`` when `size` is 1."""
        if size == 1:
            return ()
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._fixed.append(fixed)
        self._over.append(set() if fixed else set(over))
        return (len(self._parent) - 1,)

    def fresh(self, sizes: Sequence[int], *, fixed: bool = False) -> list[Axis]:
        """New axes of these sizes, one atom each, every one dependent on all the others."""
        axes = [self.atom(size, fixed=fixed) for size in sizes]
        atoms = [a for axis in axes for a in axis]
        for a in atoms:
            if not fixed:
                self._over[a] = set(atoms) - {a}
        return axes

    def depend(self, axis: Axis, on: Iterable[Axis]) -> None:
        """Lets the free atoms of a new axis depend on the atoms of the axes `on`."""
        others = {a for other in on for a in other}
        for a in self.resolve(axis):
            self._over[a] |= others - {a}

    def find(self, atom: int) -> int:
        """Representative of an atom."""
        root = atom
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[atom] != root:
            self._parent[atom], atom = root, self._parent[atom]
        return root

    def size(self, axis: Axis) -> int:
        """Number of indices of an axis."""
        return prod(self._size[a] for a in axis)

    def resolve(self, axis: Axis) -> Axis:
        """The axis as a product of representatives, with all product bindings expanded."""
        out: list[int] = []
        stack = list(reversed(axis))
        while stack:
            root = self.find(stack.pop())
            bound = self._product.get(root)
            if bound is None:
                out.append(root)
            else:
                stack.extend(reversed(bound))
        return tuple(out)

    def parts(self, atom: int) -> list[Axis] | None:
        """The axes that a bound atom concatenates, or None."""
        return self._concat.get(self.find(atom))

    def cases(self, atom: int) -> tuple[int, list[Axis]] | None:
        """The atom that indexes the pieces of this one, and the pieces; None if it has none."""
        case = self._cases.get(self.find(atom))
        return None if case is None else (self.find(case[0]), case[1])

    def fixed(self, atom: int) -> bool:
        """True if no index of the atom may move."""
        return self._fixed[self.find(atom)]

    def free(self, axis: Axis) -> bool:
        """True if some atom of the axis may still move."""
        for a in self.resolve(axis):
            parts = self._concat.get(a)
            if any(self.free(p) for p in parts) if parts else not self._fixed[a]:
                return True
        return False

    def over(self, atom: int) -> set[int]:
        """Representatives of the atoms on which this one may still depend."""
        root = self.find(atom)
        out = {r for a in self._over[root] for r in self.resolve((a,))} - {root}
        self._over[root] = set(out)
        return out
