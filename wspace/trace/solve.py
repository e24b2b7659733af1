"""Axis algebra: which units must move together, kept in a union-find over atoms.

Torch-free and operator-free: this file knows integers only, so its laws are tested on integers.

An *axis* is a row-major product of *atoms*, written as a tuple of atom ids; ``()`` is an axis of
size 1. An atom has a size and is either free, fixed, or *bound*: to a product (a view split it) or
to a concatenation of axes (a slice or a `cat` did). Bindings only ever refine, so one pass over
a program is enough: what is learned late applies to what was seen early.

A free atom may *depend* on other atoms that index the same tensors (`over`): its permutation may
then differ from one index of those atoms to the next. Heads × head-dim with a different
permutation per head (a wreath product) is the atom ``d`` over the atom ``h``; stacked experts and
channel groups are the same. Dependence starts as large as possible and shrinks:

- a tensor that contains ``d`` but not ``h`` ends the dependence (`settle` looks at every tensor);
- an operator that mixes along ``h`` ends every dependence on ``h`` (`mix`);
- unified atoms keep what they have in common.

When ``h`` is cut into parts, the piece of ``d`` under each part becomes an atom of its own
(`restrict`), which is how ``view(3, h, d).unbind(0)`` gives q, k and v a freedom each.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from wspace.trace.atoms import Atoms, Axis

Taken = tuple[Axis, list[tuple[int, int]]] | None
"""Part of an axis and the parts of which atoms it lies in; None if no cut gives it."""


class Solver(Atoms):
    """The algebra: unification, refinement into products and concatenations, dependences."""

    # -------------------------------------------------------------- unification

    def unify(self, a: Axis, b: Axis) -> None:
        """Makes two axes of one size move together, refining either as needed."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        while left and right:
            x, y = left[0], right[0]
            if self._size[x] == self._size[y]:
                self._merge(x, y)
                del left[0], right[0]
                left, right = list(self.resolve(tuple(left))), list(self.resolve(tuple(right)))
                continue
            big, small = (left, right) if self._size[x] > self._size[y] else (right, left)
            lead = self._lead(big[0], self._size[small[0]])
            if lead is None:
                self.freeze(tuple(left))
                self.freeze(tuple(right))
                return
            big[:1] = lead
            left, right = list(self.resolve(tuple(left))), list(self.resolve(tuple(right)))
        if left or right:
            raise AssertionError(f"unify: sizes differ by the axes {left} and {right}")

    def _lead(self, atom: int, size: int) -> Axis | None:
        """The atom as (factor of `size`, rest); None if it cannot be seen that way."""
        atom = self.find(atom)
        if self._size[atom] % size:
            return None
        if atom in self._concat:
            return self._lead_of_concat(atom, size)
        rest = self._size[atom] // size
        outer = set(self._over[atom])
        first = self.atom(size, fixed=self._fixed[atom], over=outer)
        second = self.atom(rest, fixed=self._fixed[atom], over=outer)
        if not self._fixed[atom]:
            self._over[first[0]] |= set(second)
            self._over[second[0]] |= set(first)
        self._settled_concats.clear()
        self._bind_product(atom, first + second)
        return self.resolve((atom,))

    def _lead_of_concat(self, atom: int, size: int) -> Axis | None:
        """A concatenation of equal blocks as (fixed index, piece that depends on it)."""
        self._join_pieces(atom)
        if self.find(atom) not in self._concat:
            return self._lead(atom, size)
        atom = self.find(atom)
        step = self._size[atom] // size
        pieces = [self._take_concat(atom, i * step, (i + 1) * step) for i in range(size)]
        if any(p is None for p in pieces):
            return None
        first = self.atom(size, fixed=True)
        second = self.atom(step, over=first)
        self._concat[first[0]] = [() for _ in range(size)]
        self._cases[second[0]] = (first[0], [p for p in pieces if p is not None])
        del self._concat[atom]
        self._product[atom] = first + second
        return first + second

    def _join_pieces(self, index: int) -> None:
        """Ends all distinctions by the parts of an atom, before its parts change."""
        for atom, (by, pieces) in list(self._cases.items()):
            if self.find(by) == index and self._cases.pop(atom, None):
                for piece in pieces:
                    self.unify(piece, (atom,))

    def _bind_product(self, atom: int, axis: Axis) -> None:
        case = self._cases.pop(atom, None)
        self._product[atom] = axis
        if case is not None:
            for j, piece in enumerate(case[1]):
                self.unify(piece, self.restrict(axis, case[0], j))

    def _merge(self, x: int, y: int) -> None:
        x, y = self.find(x), self.find(y)
        if x == y:
            return
        if self._product.get(x) or self._product.get(y):
            self.unify((x,), (y,))
            return
        if self._fixed[x] or self._fixed[y]:
            self.freeze((x,))
            self.freeze((y,))
            if x not in self._concat and y not in self._concat:
                self._parent[x] = y  # one index all the same: what depends on it is told by it
            return
        if x in self._concat and y in self._concat:
            self._merge_concats(x, y)
            return
        if x in self._concat:
            x, y = y, x
        case, own = self._cases.pop(x, None), self._cases.get(y)
        self._meets.append((y, self._over[x]))
        self._meets.append((y, set(self._over[y])))
        self._parent[x] = y
        if case is None and own is None:
            return
        if case is None or own is None:
            case = self._cases[y] = case or own or (0, [])
            whole = y in self._concat or self.find(case[0]) == y
            if not whole and all(y not in self.resolve(piece) for piece in case[1]):
                return
            del self._cases[y]  # equal to a piece of its own: the pieces are all alike
            pieces = [((y,), piece) for piece in case[1]]
        elif self.find(own[0]) == self.find(case[0]):
            pieces = list(zip(own[1], case[1], strict=True))
        else:
            pieces = [((y,), piece) for piece in case[1]]
        for a, b in pieces:
            self.unify(a, b)

    def _merge_concats(self, x: int, y: int) -> None:
        if self._cuts(x) != self._cuts(y):
            self._join_pieces(x)
            x, y = self.find(x), self.find(y)
            if x == y or x not in self._concat or y not in self._concat:
                self.unify((x,), (y,))
                return
        cuts = sorted({*self._cuts(x), *self._cuts(y)})
        for start, stop in pairwise(cuts):
            p, q = self._take_concat(x, start, stop), self._take_concat(y, start, stop)
            if p is None or q is None:
                self.freeze((x,))
                self.freeze((y,))
                return
            self.unify(p, q)
        if self.find(x) != self.find(y):
            self._meets.append((y, self._over[x]))
            del self._concat[x]
            self._parent[x] = y

    def _cuts(self, atom: int) -> list[int]:
        cuts = [0]
        for part in self._concat[atom]:
            cuts.append(cuts[-1] + self.size(part))
        return cuts

    def freeze(self, axis: Axis) -> None:
        """Fixes every index of an axis."""
        stack = list(axis)
        while stack:
            root = self.find(stack.pop())
            bound = self._product.get(root)
            if bound is not None:
                stack.extend(bound)
                continue
            if root in self._concat:
                stack.extend(a for part in self._concat[root] for a in part)
            if self._fixed[root] and root not in self._cases:
                continue
            self._fixed[root] = True
            case = self._cases.pop(root, None)
            if case is not None:
                stack.extend(a for piece in case[1] for a in piece)

    # ---------------------------------------------------------- shape operators

    def reshape(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """Axes after a row-major view as `shape`."""
        pending = [a for axis in axes for a in self.resolve(axis)]
        out: list[Axis] = []
        for size in shape:
            taken: list[int] = []
            room = size
            while room > 1:
                head = self._size[pending[0]] if pending else 0
                if head and room % head == 0:
                    taken.append(pending.pop(0))
                    room //= head
                elif head and head % room == 0 and (lead := self._lead(pending[0], room)):
                    pending[:1] = self.resolve(lead)
                else:
                    self.freeze(tuple(a for axis in axes for a in axis))
                    return [self.atom(s, fixed=True) for s in shape]
            out.append(tuple(taken))
        return out

    def concat(self, parts: Sequence[Axis]) -> Axis:
        """Axis that lists the indices of several axes one after another."""
        parts = [p for p in parts if self.size(p) > 0]
        if len(parts) == 1:
            return parts[0]
        axis = self.atom(sum(self.size(p) for p in parts))
        if axis:
            self._concat[axis[0]] = [tuple(p) for p in parts]
        return axis

    def stack(self, parts: Sequence[Sequence[Axis]], dim: int) -> list[Axis]:
        """Axes of tensors stacked along a new dimension; each keeps its own where they differ."""
        index = self.atom(len(parts), fixed=True)
        if index:
            self._concat[index[0]] = [()] * len(parts)
        out: list[Axis] = []
        for column in zip(*parts, strict=True):
            pieces = [self.resolve(axis) for axis in column]
            if not index or all(p == pieces[0] for p in pieces):
                out.append(pieces[0])
                continue
            axis = self.atom(self.size(pieces[0]), over=index)
            self._cases[axis[0]] = (index[0], pieces)
            out.append(axis)
        return [*out[:dim], index, *out[dim:]]

    def narrow(self, axes: Sequence[Axis], dim: int, start: int, stop: int) -> list[Axis]:
        """Axes after keeping the indices ``start:stop`` of one dimension."""
        axes = [self.resolve(axis) for axis in axes]
        axis = axes[dim]
        if (start, stop) == (0, self.size(axis)):
            return axes
        others = {a for i, other in enumerate(axes) if i != dim for a in other}
        if not self.free(axis) and not any(
            self.over(a) & set(axis) or a in self._concat for a in (*others, *axis)
        ):
            axes[dim] = self.atom(stop - start, fixed=True)
            return axes
        self._orient(axis, [a for other in axes for a in other])
        taken = self._take(axis, start, stop)
        if taken is None:
            self.freeze(axis)
            axes[dim] = self.atom(stop - start, fixed=True)
            return axes
        axes[dim], path = taken
        for i in range(len(axes)):
            if i != dim:
                for index, j in path:
                    axes[i] = self.restrict(axes[i], index, j)
        return axes

    def _orient(self, axis: Axis, atoms: list[int]) -> None:
        """Before a cut: of two atoms that depend on each other, only the later keeps doing so."""
        for x in axis:
            for a in atoms:
                if a in self.over(x) and x in self.over(a):
                    first, second = sorted((a, x), key=atoms.index)
                    self.forget(first, {second})

    def _take(self, axis: Axis, start: int, stop: int) -> Taken:
        """Indices ``start:stop`` of an axis, and the parts of which atoms they lie in."""
        axis = self.resolve(axis)
        if not axis or (start, stop) == (0, self.size(axis)):
            return axis, []
        lead, rest = axis[0], axis[1:]
        step = self.size(rest)
        if start % step or stop % step:
            if start // step != (stop - 1) // step:
                return self._take_ragged(axis, start, stop, step)
            i = start // step
            first = self._take((lead,), i, i + 1)
            if first is None:
                return None
            for index, j in first[1]:
                rest = self.restrict(rest, index, j)
            inner = self._take(rest, start - i * step, stop - i * step)
            return None if inner is None else (inner[0], first[1] + inner[1])
        if lead not in self._concat:
            self._cut(lead, start // step, stop // step)
            return self._take(axis, start, stop)  # the cut may have merged or refined others
        return self._take_parts(lead, rest, start // step, stop // step)

    def _take_ragged(self, axis: Axis, start: int, stop: int, step: int) -> Taken:
        """Indices whose ends lie inside an index of the leading factor, cut at those."""
        inner = {c for c in (-(-start // step) * step, stop // step * step) if start < c < stop}
        pieces = []
        for a, b in pairwise(sorted({start, stop, *inner})):
            taken = self._take(axis, a, b)
            if taken is None:
                return None
            pieces.append(taken[0])
        return self.concat(pieces), []

    def _cut(self, atom: int, start: int, stop: int) -> None:
        """Binds an atom to a concatenation with cuts at `start` and `stop`."""
        cuts = sorted({0, start, stop, self._size[atom]})
        fixed, over = self._fixed[atom], set(self._over[atom])
        parts = [self.atom(b - a, fixed=fixed, over=over) for a, b in pairwise(cuts)]
        case = self._cases.pop(atom, None)
        self._concat[atom] = parts
        for part, (a, b) in zip(parts, pairwise(cuts), strict=True):
            if case is None:
                continue
            taken = [self._take(piece, a, b) for piece in case[1]]
            if part and all(t is not None for t in taken):
                self._cases[part[0]] = (case[0], [t[0] for t in taken if t is not None])
            else:
                self.freeze(part)
                for piece in case[1]:
                    self.freeze(piece)

    def _take_parts(self, lead: int, rest: Axis, start: int, stop: int) -> Taken:
        cuts = self._cuts(lead)
        for j, (a, b) in enumerate(pairwise(cuts)):
            if a <= start and stop <= b:
                inner = self._take(self._concat[lead][j], start - a, stop - a)
                if inner is None:
                    return None
                path = [(lead, j), *inner[1]]
                for index, i in path:
                    rest = self.restrict(rest, index, i)
                return inner[0] + rest, path
        whole = self._take_concat(lead, start, stop)
        if whole is None:
            return None
        return whole + rest, []  # `settle` sees that the result lacks `lead` as an index

    def _take_concat(self, atom: int, start: int, stop: int) -> Axis | None:
        """Indices ``start:stop`` of a concatenation, cutting parts where needed."""
        pieces: list[Axis] = []
        cuts = self._cuts(atom)
        for part, (a, b) in zip(list(self._concat[atom]), pairwise(cuts), strict=True):
            lo, hi = max(a, start), min(b, stop)
            if lo < hi:
                taken = self._take(part, lo - a, hi - a)
                if taken is None:
                    return None
                pieces.append(taken[0])
        return self.concat(pieces)

    # --------------------------------------------------------------- dependence

    def restrict(self, axis: Axis, index: int, j: int) -> Axis:
        """What stands for an axis where the atom `index` is known to lie in its part `j`."""
        return tuple(p for a in self.resolve(axis) for p in self._restrict(a, index, j))

    def _restrict(self, atom: int, index: int, j: int) -> Axis:
        """The piece of `atom` under part `j` of `index`; the atom itself if it does not depend."""
        atom, index = self.find(atom), self.find(index)
        case = self._cases.get(atom)
        if case is not None and self.find(case[0]) == index:
            return case[1][j]
        if index not in self.over(atom):
            return (atom,)
        if case is not None or atom in self._concat or self._fixed[atom]:
            self.forget(atom, {index})
            return (atom,)
        pieces = [self.atom(self._size[atom]) for _ in self._concat[index]]
        self._cases[atom] = (index, pieces)
        others = self.over(atom) - {index}
        for i, (piece, part) in enumerate(zip(pieces, self._concat[index], strict=True)):
            over = set(part)
            for other in others:
                over |= set(self._restrict(other, index, i))
            self._over[piece[0]] = over - set(piece)
        return pieces[j]

    def forget(self, atom: int, indices: set[int]) -> None:
        """Ends the dependence of an atom (and of what it concatenates) on `indices`."""
        atom = self.find(atom)
        if self.over(atom) & indices:
            self._over[atom] -= indices
        case = self._cases.get(atom)
        if case is not None and self.find(case[0]) in indices:
            del self._cases[atom]
            for piece in case[1]:
                self.unify(piece, (atom,))
        elif case is not None:
            for j, piece in enumerate(case[1]):
                under = self._under(indices, case[0], j)
                for a in self.resolve(piece):
                    self.forget(a, under)
        for part in self._concat.get(self.find(atom), ()):
            for a in self.resolve(part):
                self.forget(a, indices)

    def _under(self, atoms: set[int], index: int, j: int) -> set[int]:
        """Atoms as they are under part `j` of an index, together with what they are in all."""
        return atoms | {p for a in atoms for p in self.restrict((a,), index, j)}

    def mix(self, axes: Sequence[Axis], dims: Iterable[int]) -> None:
        """Ends every dependence on the atoms of `dims`: an operator mixes along them."""
        dims = set(dims)
        mixed = {a for d in dims for a in self.resolve(axes[d])}
        mixed |= {a for m in tuple(mixed) for p in self._concat.get(m, ()) for a in self.resolve(p)}
        for i, axis in enumerate(axes):
            for a in self.resolve(axis):
                self.forget(a, mixed if i not in dims else mixed - set(self.resolve(axis)))

    def point(self, at: Sequence[Axis], to: Axis) -> None:
        """Says that indices into `to` stand along the axes `at`: rows there know their `to`."""
        self._pointers.append((tuple(a for axis in at for a in axis), to))

    def _context(self, axes: Iterable[Axis]) -> set[int]:
        """Atoms of which every entry of a tensor with these axes knows the one index it has."""
        count = Counter(a for axis in axes for a in self.resolve(axis))
        context = {a for a, n in count.items() if n == 1}
        for at, to in self._pointers:
            if context.issuperset(self.resolve(at)):
                context.update(self.resolve(to))
        return context

    def settle(self, values: Iterable[Sequence[Axis]]) -> None:
        """Applies what an operator implies for dependence, given every tensor it made or read."""
        while self._meets:
            atom, over = self._meets.pop()
            allowed = {r for a in over for r in self.resolve((a,))}
            self._keep_only((atom,), allowed)
        for axes in values:
            context = self._context(axes)
            for axis in axes:
                for a in self.resolve(axis):
                    self._check(a, context)

    def _keep_only(self, axis: Axis, allowed: set[int]) -> None:
        resolved = self.resolve(axis)
        for a in resolved:
            extra = self.over(a) - allowed - set(resolved)
            if extra:
                self.forget(a, extra)
            for part in self._concat.get(self.find(a), ()):
                self._keep_only(part, allowed | set(self.resolve(part)))

    def _check(self, atom: int, context: set[int]) -> bool:
        """Forgets what a tensor lacks; True once nothing below can depend on anything."""
        atom = self.find(atom)
        parts = self._concat.get(atom)
        if parts is not None:
            if atom in self._settled_concats:
                return True
            done = True
            for part in parts:
                own = set(self.resolve(part))
                for a in own:  # an index that occurs twice cannot be depended on: which one is it?
                    done &= self._check(a, context ^ own)
            if done:
                self._settled_concats.add(atom)
            return done
        if self._fixed[atom]:
            return True
        extra = self.over(atom) - context
        if extra:
            self.forget(atom, extra)
        case = self._cases.get(self.find(atom))
        if case is None:
            return not self._over[self.find(atom)]
        for j, piece in enumerate(case[1]):
            inner = self._under(context | set(self.resolve(piece)), case[0], j)
            inner |= set(self.resolve(self._concat[self.find(case[0])][j]))
            for a in self.resolve(piece):
                self._check(a, inner)
        return False
