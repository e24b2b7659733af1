"""From solved atoms to a `WeightSpace`: named groups, axis trees, and what depends on what.

The solver leaves every dependence that no operator ruled out. Here the dependences are made
consistent (acyclic and transitive), a product that nothing ever looked inside is one group again,
and neighbouring fixed factors are merged, so that the description is as short as it can be.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from wspace.space import Axis, Concat, Gauge, Group, Param, Role
from wspace.trace.families import Family
from wspace.trace.program import Call, Program, Value
from wspace.trace.solve import Axis as Atoms
from wspace.trace.solve import Solver

Tree = list["int | list[Tree]"]
"""An axis: atoms, or lists of trees for concatenations."""


class Naming:
    """Groups of a space under construction: trees of atoms in, axes of named groups out."""

    def __init__(self, s: Solver, values: Iterable[Value], families: Sequence[Family] = ()) -> None:
        self.s = s
        values = list(values)
        while any([self._flatten_cases(axis) for v in values for axis in v.axes]):
            s.settle([v.axes for v in values])
        self.trees = {id(v): [self.tree(axis) for axis in v.axes] for v in values}
        self.over = self._dependences()
        self._slots: dict[int, tuple[Family, int, Value]] = {}
        self._indices: dict[int, int] = {}
        self._alias: dict[int, int] = {}
        self._merged: dict[int, int] = {}
        self._leading: set[int] = set()
        self._branches: dict[int, tuple[int, int]] = {}
        self.rejected = [f for f in families if not self._join(f)]
        self._merge_unsplit()
        self._names: dict[int, Group] = {}
        self._by_name: dict[str, Group] = {}
        self._fixed_index = {o for over in self.over.values() for o in over if self._is_fixed(o)}

    # ------------------------------------------------------------------- trees

    def tree(self, axis: Atoms) -> Tree:
        """The axis as a tree of atoms, before groups were merged or families joined."""
        s = self.s
        factors = s.resolve(axis)
        out: Tree = []
        for i, a in enumerate(factors):
            parts = s.parts(a)
            if parts is None:
                out.append(a)
                continue
            rest = factors[i + 1 :]
            if any((c := s.cases(b)) is not None and c[0] == a for b in rest):
                out.append(
                    [self.tree(part + s.restrict(rest, a, j)) for j, part in enumerate(parts)]
                )
                return out
            out.append([self.tree(part) for part in parts] if s.free((a,)) else a)
        return out

    def _flatten_cases(self, axis: Atoms) -> bool:
        """Ends distinctions that an axis cannot express: by an index that is not a factor of it."""
        s = self.s
        for i, a in enumerate(factors := s.resolve(axis)):
            case = s.cases(a)
            if case is not None and case[0] not in factors[:i]:
                s.forget(a, {case[0]})
                return True
            for j, part in enumerate(s.parts(a) or ()):
                if self._flatten_cases(part + s.restrict(factors[i + 1 :], a, j)):
                    return True
        return False

    def _is_fixed(self, atom: int) -> bool:
        return not self.s.free((atom,))

    def _axes_trees(self) -> Iterator[Tree]:
        for trees in self.trees.values():
            yield from trees

    # ---------------------------------------------------------------- families

    def _join(self, family: Family) -> bool:
        """Makes the private groups of all branches one group over the branches, if they match."""
        s = self.s
        (index,) = s.resolve(family.axis) or (None,)
        if index is None or self._is_fixed(index) or s.parts(index) or self.over.get(index):
            return False
        inside = [{id(ps[k]) for ps in family.params} for k in range(family.size)]
        outside = {
            a
            for key, trees in self.trees.items()
            if not any(key in branch for branch in inside)
            for tree in trees
            for a in atoms_of(tree)
        }
        alias: dict[int, int] = {}
        branches: dict[int, tuple[int, int]] = {}
        for k in range(1, family.size):
            pairs: dict[int, int] = {}
            for ps in family.params:
                for a, b in zip(self.trees[id(ps[0])], self.trees[id(ps[k])], strict=True):
                    if not self._match(a, b, pairs, outside):
                        return False
            if len(set(pairs.values())) < len(pairs) or set(pairs.values()) & set(alias):
                return False
            alias |= {b: a for a, b in pairs.items() if a != b}
            branches |= {b: (index, k) for a, b in pairs.items() if a != b}
        self._branches |= branches | {a: (index, 0) for a in alias.values()}
        self._commit(family, index, alias)
        return True

    def _match(self, a: Tree, b: Tree, pairs: dict[int, int], outside: set[int]) -> bool:
        if len(a) != len(b):
            return False
        for x, y in zip(a, b, strict=True):
            if isinstance(x, list) or isinstance(y, list):
                if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y)):
                    return False
                if not all(self._match(p, q, pairs, outside) for p, q in zip(x, y, strict=True)):
                    return False
            elif not self._correspond(x, y, pairs, outside):
                return False
        return True

    def _correspond(self, x: int, y: int, pairs: dict[int, int], outside: set[int]) -> bool:
        """True if an atom of the first branch may stand for one of another branch."""
        if self._is_fixed(x) != self._is_fixed(y) or self.s.size((x,)) != self.s.size((y,)):
            return False
        if self._is_fixed(x):
            return True
        private = x == y or not (x in outside or y in outside)
        return private and pairs.setdefault(x, y) == y

    def _commit(self, family: Family, index: int, alias: dict[int, int]) -> None:
        self.over.setdefault(index, [])
        self._raw_over.setdefault(index, set())
        for a in dict.fromkeys(alias.values()):
            self.over[a] = [index, *(o for o in self.over[a] if o != index)]
            self._raw_over[a] = self._raw_over[a] | {index}
        self._alias |= alias
        for b in alias:
            self.over.pop(b, None)
            self._raw_over.pop(b, None)
        for trees in self.trees.values():
            for i, tree in enumerate(trees):
                trees[i] = _rename(tree, alias)
        for ps in family.params:
            for k, value in enumerate(ps):
                self._slots[id(value)] = (family, k, ps[0])
        self._indices[id(family)] = index

    def slot(self, value: Value) -> tuple[tuple[str, int], str] | None:
        """Index group and index of a parameter that is a slice of a family, and its first slice."""
        found = self._slots.get(id(value))
        if found is None:
            return None
        family, k, first = found
        return (self.group(self._indices[id(family)]).name, k), first.names[0]

    def skips(self, atom: int) -> bool:
        """True if what is said of this atom is said of another: a later slice, a leading factor."""
        return atom in self._alias or atom in self._leading

    def canonical(self, atom: int) -> int:
        """The atom whose group stands for this one in the space."""
        while atom in self._merged:
            if atom in self._leading:
                break
            atom = self._merged[atom]
        return atom

    def branch(self, atom: int) -> tuple[int, int] | None:
        """For an atom private to one branch of a family: the atom of the branches, and which."""
        return self._branches.get(atom)

    def slot_read(self, call: Call) -> tuple[str, int] | None:
        """Index group and index at which a branch reads a shared value, if the call does that."""
        for family, _, _ in self._slots.values():
            for i, read in enumerate(family.reads):
                if read is call:
                    return self.group(self._indices[id(family)]).name, i % family.size
        return None

    def owner(self, atom: int) -> int | None:
        """The atom of the group that moves this one: of the first branch, of a joint factor."""
        top = self._alias.get(atom, atom)
        while top in self._merged:
            top = self._merged[top]
        return top if top in self.over or top in self._fixed_index else None

    def unit(self, atom: int) -> int:
        """The atom in whose place this one stands in its branch: the first branch's."""
        return self._alias.get(atom, atom)

    def units(self, owner: int) -> tuple[int, ...]:
        """Atoms that tensors have in the place of a group's, slowest first: several if merged."""
        halves = [a for a, joint in self._merged.items() if joint == owner]
        halves.sort(key=lambda a: a not in self._leading)
        return tuple(b for a in halves for b in self.units(a)) or (owner,)

    def copies(self, value: Value, atom: int) -> tuple[str, ...]:
        """Names of a parameter and, for a group private to a family, of its other slices."""
        slot = self._slots.get(id(value))
        if slot is None or atom not in self._alias.values():
            return value.names[:1]
        family = slot[0]
        (place,) = (ps for ps in family.params if any(v is value for v in ps))
        return tuple(v.names[0] for v in place)

    def local(self, group: Group, places: Iterable[tuple[Value, int]]) -> bool:
        """True if every axis named says at which index of `group.over` it stands."""
        for value, d in places:
            here = {g.name for g in self.axis(self.trees[id(value)][d]).groups()}
            slot = self.slot(value)
            here |= {slot[0][0]} if slot else set()
            if not here.issuperset(group.over):
                return False
        return True

    def extra(self) -> tuple[Group, ...]:
        """Groups that index families but no axis."""
        used = {a for tree in self._axes_trees() for a in atoms_of(tree)}
        return tuple(self.group(i) for i in self._indices.values() if i not in used)

    # ------------------------------------------------------------ dependences

    def _dependences(self) -> dict[int, list[int]]:
        """For every free atom, in order of appearance: what its permutation may depend on."""
        order: dict[int, int] = {}
        for tree in self._axes_trees():
            for atom in atoms_of(tree):
                order.setdefault(atom, len(order))
        over = {
            a: {o for o in self.s.over(a) if o in order and o != a}
            for a in order
            if not self._is_fixed(a)
        }
        self._raw_over = {a: set(deps) for a, deps in over.items()}
        for a, deps in over.items():  # of two that depend on each other, the later one does
            deps -= {
                o
                for o in self._raw_over[a]
                if a in self._raw_over.get(o, ()) and order[o] > order[a]
            }
        kept: dict[int, list[int]] = {}
        for a in sorted(over, key=order.__getitem__):
            self._close(a, over, order, kept, ())
        return kept

    def _close(
        self,
        atom: int,
        over: dict[int, set[int]],
        order: dict[int, int],
        kept: dict[int, list[int]],
        path: tuple[int, ...],
    ) -> None:
        """Fills in ``kept[atom]``: dependences without cycles, transitive as a group needs them."""
        if atom in kept or atom not in over:
            return
        deps = over[atom] - {*path, atom}
        for o in sorted(deps, key=order.__getitem__):
            self._close(o, over, order, kept, (*path, atom))
        while wrong := {o for o in deps if not set(kept.get(o, ())) <= deps}:
            deps -= wrong
        kept[atom] = sorted(deps, key=order.__getitem__)

    def _merge_unsplit(self) -> None:
        """Joins factors that stand side by side everywhere and that nothing tells apart."""
        changed = True
        while changed:
            changed = False
            for a, b in self._neighbours():
                if self._indistinct(a, b):
                    size = self.s.size((a, b))
                    (joint,) = self.s.atom(size)
                    for trees in self.trees.values():
                        for i, tree in enumerate(trees):
                            trees[i] = _replace_pair(tree, a, b, joint)
                    self.over[joint] = self.over.pop(a)
                    self._raw_over[joint] = self._raw_over.pop(a) - {b}
                    del self.over[b], self._raw_over[b]
                    for deps in (*self.over.values(),):
                        deps[:] = list(dict.fromkeys(joint if o in (a, b) else o for o in deps))
                    for key, deps in self._raw_over.items():
                        if deps & {a, b}:
                            self._raw_over[key] = (deps - {a, b}) | {joint}
                    self._merged |= {a: joint, b: joint}
                    self._leading.add(a)
                    changed = True
                    break

    def _neighbours(self) -> set[tuple[int, int]]:
        """Pairs that occur only as neighbours, in this order."""
        before: dict[int, set[int | None]] = {}
        after: dict[int, set[int | None]] = {}
        for tree in self._axes_trees():
            for run in _runs(tree):
                row = [None, *(n if isinstance(n, int) else None for n in run), None]
                for i, atom in enumerate(row):
                    if atom is not None:
                        before.setdefault(atom, set()).add(row[i - 1])
                        after.setdefault(atom, set()).add(row[i + 1])
        return {
            (a, b)
            for a, follows in after.items()
            for b in follows
            if b is not None and a in self.over and b in self.over
            if follows == {b} and before[b] == {a}
        }

    def _indistinct(self, a: int, b: int) -> bool:
        raw = self._raw_over
        if a not in raw[b] or b not in raw[a] or raw[a] - {b} != raw[b] - {a}:
            return False
        return all((a in deps) == (b in deps) for k, deps in raw.items() if k not in (a, b))

    # ------------------------------------------------------------------- names

    def group(self, atom: int) -> Group:
        """The named group of an atom, made on first use."""
        found = self._names.get(atom)
        if found is None:
            size = self.s.size((atom,))
            if atom in self.over:
                over = tuple(self.group(o).name for o in self.over[atom])
                name = f"h{1 + sum(not g.fixed for g in self._names.values())}"
                found = Group(name, size, ("permutation",), over)
            elif atom in self._fixed_index:
                found = Group(f"{size}#{1 + sum(g.fixed for g in self._names.values())}", size)
            else:
                return Group(str(size), size)
            self._names[atom] = self._by_name[found.name] = found
        return found

    def over_of(self, name: str) -> tuple[str, ...]:
        """Names of the groups that a named group depends on."""
        return self._by_name[name].over

    def add_kinds(self, gauges: Iterable[Gauge]) -> None:
        """Records on every group which diagonal symmetries act on it."""
        found: dict[str, list[str]] = {}
        for gauge in gauges:
            kinds = found.setdefault(gauge.group, ["permutation"])
            if gauge.kind not in kinds:
                kinds.append(gauge.kind)
        for atom, g in self._names.items():
            if g.name in found:
                self._names[atom] = replace(g, kinds=tuple(found[g.name]))

    def axis(self, tree: Tree) -> Axis:
        """The tree in terms of named groups, neighbouring fixed factors merged."""
        factors: list[Group | Concat] = []
        for node in tree:
            if isinstance(node, list):
                factors.append(Concat(_merge_fixed([self.axis(t) for t in node])))
                continue
            g = self.group(node)
            last = factors[-1] if factors else None
            if g.fixed and "#" not in g.name and _plain_fixed(last):
                size = last.size * g.size  # type: ignore[union-attr]
                factors[-1] = Group(str(size), size)
            else:
                factors.append(g)
        return Axis(tuple(factors))

    def extent(self, axis: Atoms) -> Axis | None:
        """What a dimension of any value is made of, in terms of named groups.

        Args:
            axis: Atoms of the dimension.

        Returns:
            The axis, fixed where no parameter shows the units; None if it holds a part of what is
            one group in the space.
        """
        tree = _rename(self.tree(axis), self._alias)
        halves = list(self._merged)
        for a, b in zip(halves[::2], halves[1::2], strict=True):
            tree = _replace_pair(tree, a, b, self._merged[a])
        return None if any(a in self._merged for a in atoms_of(tree)) else self.axis(tree)


def _plain_fixed(factor: Group | Concat | None) -> bool:
    return isinstance(factor, Group) and factor.fixed and "#" not in factor.name


def _merge_fixed(parts: list[Axis]) -> tuple[Axis, ...]:
    out: list[Axis] = []
    for part in parts:
        if out and all(_plain_fixed(f) for p in (out[-1], part) for f in p.factors):
            size = out[-1].size + part.size
            out[-1] = Axis((Group(str(size), size),))
        else:
            out.append(part)
    return tuple(out)


def atoms_of(tree: Tree) -> Iterator[int]:
    """Atoms of a tree from left to right, with repetition.

    Yields:
        Atom numbers.
    """
    for node in tree:
        if isinstance(node, list):
            for part in node:
                yield from atoms_of(part)
        else:
            yield node


def _runs(tree: Tree) -> Iterator[Tree]:
    yield tree
    for node in tree:
        if isinstance(node, list):
            for part in node:
                yield from _runs(part)


def _rename(tree: Tree, names: dict[int, int]) -> Tree:
    return [
        [_rename(part, names) for part in node] if isinstance(node, list) else names.get(node, node)
        for node in tree
    ]


def _replace_pair(tree: Tree, a: int, b: int, joint: int) -> Tree:
    out: Tree = []
    for node in tree:
        if isinstance(node, list):
            out.append([_replace_pair(part, a, b, joint) for part in node])
        elif node == b and out and out[-1] == a:
            out[-1] = joint
        else:
            out.append(node)
    return out


def build_params(
    naming: Naming, program: Program, buffers: set[str], roles: dict[int, Role]
) -> tuple[Param, ...]:
    """`Param` records of a program's parameters, in module order."""
    out = []
    for value in program.params:
        slot = naming.slot(value)
        out.append(
            Param(
                name=value.names[0],
                axes=tuple(naming.axis(t) for t in naming.trees[id(value)]),
                role=roles.get(id(value), Role.UNUSED),
                dtype=str(value.dtype).removeprefix("torch."),
                ties=value.names[1:],
                buffer=value.names[0] in buffers,
                at=slot[0] if slot else None,
                family=slot[1] if slot else "",
            )
        )
    return tuple(out)
