"""Features as cells and their views: how the enumeration of `basis` is carried out on tensors.

*Features* are tensors by parameter name, ``(*batch, *shape, C)``. A cell (see `basis`) is read as
``(N, *loose, F*C)``: ``N`` the batch axes flattened, one axis for each free slot (and each fixed
slot on which a free one depends), and the other fixed slots folded into the channels. A view is
``(N, *kept, F*C)``. Every diagonal and every mean is computed once per call and shared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from wspace.errors import SpaceMismatch, message
from wspace.nn.basis import Factors, Slot, Stack, View, stacks
from wspace.space import Concat, WeightSpace

Features = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one cell is laid out.

    Attributes:
        sizes: Sizes of all slots.
        loose: Positions of the slots that are axes.
        dense: Positions of the slots folded into the channels.
    """

    sizes: tuple[int, ...]
    loose: tuple[int, ...]
    dense: tuple[int, ...]

    @property
    def folded(self) -> int:
        """Entries of the dense slots."""
        return prod([self.sizes[i] for i in self.dense])


@lru_cache(maxsize=4096)
def layout(slots: tuple[Slot, ...]) -> Layout:
    """The layout of a cell with these slots."""
    ruling = {o for s in slots for o in s.over}
    loose = tuple(i for i, s in enumerate(slots) if not s.fixed or i in ruling)
    dense = tuple(i for i in range(len(slots)) if i not in loose)
    return Layout(tuple(s.size for s in slots), loose, dense)


# ------------------------------------------------------------------------------- checks


def shapes(space: WeightSpace, channels: int | Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Trailing shape of each parameter's features, ``(*shape, C)``.

    Args:
        space: The weight space.
        channels: Number of channels: one for all, or by parameter name.

    Returns:
        Shapes by name.
    """
    if isinstance(channels, int):
        return {p.name: (*p.shape, channels) for p in space.params}
    return {p.name: (*p.shape, channels[p.name]) for p in space.params}


def checked(want: Mapping[str, tuple[int, ...]], features: Features, who: str) -> tuple[int, ...]:
    """The batch shape of features, which must have the trailing shapes that a layer wants.

    Args:
        want: Trailing shapes by name; see `shapes`.
        features: Tensors by name, ``(*batch, *shape, C)``.
        who: Name of the layer, for the message.

    Returns:
        The batch shape, the same for all.

    Raises:
        SpaceMismatch: Listing every missing and mis-shaped tensor.
    """
    batch: tuple[int, ...] | None = None
    wrong: list[str] = []
    for name, tail in want.items():
        if name not in features:
            wrong.append(f"no tensor {name!r}")
            continue
        shape = tuple(features[name].shape)
        lead = len(shape) - len(tail)
        if lead < 0 or shape[lead:] != tail or (batch is not None and shape[:lead] != batch):
            known = "*batch" if batch is None else ", ".join(map(str, batch))
            wrong.append(f"{name!r} of shape {shape}, expected trailing {tail} behind ({known})")
        elif batch is None:
            batch = shape[:lead]
    if wrong:
        raise SpaceMismatch(
            message(
                f"{who}: features do not fit the weight space",
                got=wrong,
                help="features are (*batch, *shape, channels); see `to_features`",
            )
        )
    return batch or ()


# ------------------------------------------------------------------- features and cells


class Cutter:
    """Cuts features into cells, and puts cells together.

    Args:
        space: Weight space of the features.
    """

    def __init__(self, space: WeightSpace) -> None:
        self.stacks = [
            (stack, _is_family(stack), _tree(stack.factors), [layout(c) for c in stack.cells])
            for stack in stacks(space)
        ]

    def read(self, features: Features, batch: Sequence[int]) -> list[Tensor]:
        """Every cell of features.

        Args:
            features: Tensors by name, ``(*batch, *shape, C)``.
            batch: The batch shape.

        Returns:
            For each cell of the space, ``(N, *loose, F*C)``.
        """
        n = prod(batch)
        out: list[Tensor] = []
        for stack, family, tree, forms in self.stacks:
            parts = [features[name].reshape(n, *stack.shape, -1) for name in stack.names]
            x = torch.stack(parts, 1) if family else parts[0]
            leaves = _split(x.reshape(n, *tree.sizes, x.shape[-1]), tree)
            out += [_folded(y, form) for y, form in zip(leaves, forms, strict=True)]
        return out

    def write(self, found: Sequence[Tensor], batch: Sequence[int]) -> dict[str, Tensor]:
        """Features with these cells: the inverse of `read`.

        Args:
            found: For each cell of the space, ``(N, *loose, F*C)``.
            batch: The batch shape.

        Returns:
            Tensors by name, ``(*batch, *shape, C)``.
        """
        at = 0
        out: dict[str, Tensor] = {}
        for stack, family, tree, forms in self.stacks:
            leaves = [_unfolded(y, form) for y, form in zip(found[at:], forms, strict=False)]
            at += len(forms)
            x = _join(leaves, tree)
            parts = (x,)
            if family:
                parts = x.reshape(len(x), len(stack.names), *stack.shape, x.shape[-1]).unbind(1)
            for name, part in zip(stack.names, parts, strict=True):
                out[name] = part.reshape(*batch, *stack.shape, part.shape[-1])
        return out


def _folded(y: Tensor, form: Layout) -> Tensor:
    """``(N, *slots, C)``, or with slots of size 1, as ``(N, *loose, F*C)``."""
    y = y.reshape(len(y), *form.sizes, y.shape[-1])
    if not form.dense:
        return y
    order = [1 + i for i in (*form.loose, *form.dense)]
    return y.permute(0, *order, -1).flatten(1 + len(form.loose))


def _unfolded(y: Tensor, form: Layout) -> Tensor:
    """``(N, *loose, F*C)`` with its slots in order, ``(N, *slots, C)``."""
    if not form.dense:
        return y
    order = (*form.loose, *form.dense)
    sizes = [form.sizes[i] for i in order]
    back = [order.index(i) for i in range(len(order))]
    y = y.reshape(len(y), *sizes, y.shape[-1] // form.folded)
    return y.permute(0, *[1 + i for i in back], -1)


def _is_family(stack: Stack) -> bool:
    return prod(f.size for f in stack.factors) != prod(stack.shape) or len(stack.names) > 1


@dataclass(frozen=True, slots=True)
class Tree:
    """How a product of factors falls into cells.

    Attributes:
        sizes: Size of each factor.
        axis: Number of the first concatenation; -1 if there is none.
        lengths: Sizes of its parts.
        parts: How what is left falls apart, with the factors of each part in its place.
    """

    sizes: tuple[int, ...]
    axis: int = -1
    lengths: tuple[int, ...] = ()
    parts: tuple["Tree", ...] = ()


def _tree(factors: Factors) -> Tree:
    sizes = tuple(f.size for f in factors)
    for j, f in enumerate(factors):
        if isinstance(f, Concat):
            parts = [_tree((*factors[:j], *p.factors, *factors[j + 1 :])) for p in f.parts]
            return Tree(sizes, j, tuple(p.size for p in f.parts), tuple(parts))
    return Tree(sizes)


def _split(x: Tensor, tree: Tree) -> list[Tensor]:
    """The leaves of ``(N, *factors, C)``: one for each choice of parts."""
    if not tree.parts:
        return [x]
    out: list[Tensor] = []
    pieces = x.split(tree.lengths, 1 + tree.axis)
    for part, piece in zip(tree.parts, pieces, strict=True):
        out += _split(piece.reshape(len(x), *part.sizes, x.shape[-1]), part)
    return out


def _join(leaves: list[Tensor], tree: Tree) -> Tensor:
    """``(N, *factors, C)`` from its leaves, which are taken from the list."""
    if not tree.parts:
        x = leaves.pop(0)
        return x.reshape(len(x), *tree.sizes, x.shape[-1])
    found: list[Tensor] = []
    for part, length in zip(tree.parts, tree.lengths, strict=True):
        sizes = list(tree.sizes)
        sizes[tree.axis] = length
        x = _join(leaves, part)
        found.append(x.reshape(len(x), *sizes, x.shape[-1]))
    return torch.cat(found, 1 + tree.axis)


# -------------------------------------------------------------------------------- views


def diagonal(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """The entries of ``(N, *axes, C)`` whose indices agree where blocks do; a view.

    Args:
        x: Axes with one block number each.
        blocks: Block of every axis.

    Returns:
        ``(N, *blocks, C)``, blocks in order of first appearance.
    """
    left = list(blocks)
    while len(set(left)) < len(left):
        j = next(j for j, b in enumerate(left) if b in left[:j])
        i = left.index(left[j])
        x = x.diagonal(0, 1 + i, 1 + j).movedim(-1, 1 + i)
        del left[j]
    return x


@dataclass(frozen=True, slots=True)
class Step:
    """How one view is made: of a cell (diagonals), or of a view that has one block more.

    Attributes:
        source: Number of the cell, or of the step before.
        blocks: Block of every loose slot, where the source is a cell; else empty.
        axis: Axis dropped; 0 where the source is a cell.
        fold: True if the axis goes to the channels, False if it is summed.
    """

    source: int
    blocks: tuple[int, ...] = ()
    axis: int = 0
    fold: bool = False


class Reader:
    """Computes views of cells, each diagonal and each sum once.

    Views are sums, for the caller to divide by `averaged` once all views of a product are in one
    tensor: a mean would divide its gradient after expanding it, one more pass over the largest
    tensors. Only float16, which sums overflow, is averaged here.

    Args:
        every: Slots of every cell.
        views: What to compute.
    """

    def __init__(self, every: Sequence[tuple[Slot, ...]], views: Sequence[View]) -> None:
        self.steps: list[Step] = []
        self.results: list[tuple[int, tuple[int, ...]]] = []
        known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}

        def reach(cell: int, blocks: tuple[int, ...], kept: tuple[int, ...]) -> int:
            key = (cell, blocks, kept)
            if key not in known:
                slots = every[cell]
                b = dropped(slots, blocks, kept)
                if b is None:
                    step = Step(cell, tuple(blocks[i] for i in layout(slots).loose))
                else:
                    more = tuple(sorted({*kept, b}, key=blocks.index))
                    fold = slots[blocks.index(b)].fixed
                    step = Step(reach(cell, blocks, more), (), 1 + more.index(b), fold)
                self.steps.append(step)
                known[key] = len(self.steps) - 1
            return known[key]

        for view in views:
            natural = tuple(sorted(view.kept, key=view.blocks.index))
            turn = tuple(natural.index(b) for b in view.kept)
            straight = turn == (*range(len(turn)),)
            order = () if straight else (0, *(1 + i for i in turn), 1 + len(turn))
            self.results.append((reach(view.cell, view.blocks, natural), order))

    def __call__(self, found: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """The views of these cells.

        Args:
            found: Every cell, ``(N, *loose, F*C)``.

        Returns:
            For each view ``(N, *kept, F*C)``; and True if they are sums.
        """
        summed = all(x.dtype != torch.float16 for x in found)
        made: list[Tensor] = []
        for step in self.steps:
            if not step.axis:
                x = diagonal(found[step.source], step.blocks)
            elif step.fold:
                x = made[step.source].movedim(step.axis, -2).flatten(-2)
            elif summed:
                x = made[step.source].sum(step.axis)
            else:
                x = made[step.source].mean(step.axis)
            made.append(x)
        return [made[i].permute(order) if order else made[i] for i, order in self.results], summed


def dropped(slots: tuple[Slot, ...], blocks: tuple[int, ...], kept: tuple[int, ...]) -> int | None:
    """The block to drop last: the smallest on which no other dropped one depends; fixed ones last.

    Args:
        slots: Slots of the cell.
        blocks: Block of every slot.
        kept: Blocks that stay.

    Returns:
        Its number; None if all blocks are kept.
    """
    first = {b: slots[blocks.index(b)] for b in blocks if b >= 0 and b not in kept}

    # Reading from the result upwards: a block may be added back once those it depends on are there.
    def ready(b: int) -> bool:
        return all(blocks[o] in kept for o in first[b].over)

    fixed = [b for b, s in first.items() if s.fixed]
    if fixed:  # folded into the channels after everything else was averaged
        return max(fixed)
    return min((b for b in first if ready(b)), key=lambda b: (first[b].size, -b), default=None)


def averaged(slots: tuple[Slot, ...], view: View) -> int:
    """Number of entries in each mean of a view."""
    left = {b for b in view.blocks if b >= 0} - {*view.kept}
    first = [slots[view.blocks.index(b)] for b in left]
    return prod(s.size for s in first if not s.fixed)


def folded(slots: tuple[Slot, ...], view: View) -> tuple[int, ...]:
    """Fixed blocks that a view folds into its channels, outermost first."""
    left = {b for b in view.blocks if b >= 0} - {*view.kept}
    return tuple(sorted(b for b in left if slots[view.blocks.index(b)].fixed))


def width(slots: tuple[Slot, ...], view: View) -> int:
    """Channels of a view, for each channel of the features."""
    sizes = (slots[view.blocks.index(b)].size for b in folded(slots, view))
    return layout(slots).folded * prod(sizes)


# -------------------------------------------------------------------------- assembling


@dataclass(frozen=True, slots=True)
class Term:
    """One output view as a summand of its cell.

    Attributes:
        blocks: Block of every loose slot.
        turn: Order of the axes of ``(N, *signature, M)`` that makes them natural.
        unfold: Sizes of the fixed blocks folded into the channels.
        places: Where these go, among all blocks that the summand has.
        has: Blocks that the summand has, in natural order.
    """

    blocks: tuple[int, ...]
    turn: tuple[int, ...]
    unfold: tuple[int, ...]
    places: tuple[int, ...]
    has: tuple[int, ...]


def term(slots: tuple[Slot, ...], view: View) -> Term:
    """How the matrix product of an output view becomes a summand."""
    kept = sorted(view.kept, key=view.blocks.index)
    extra = folded(slots, view)
    has = sorted({*kept, *extra}, key=view.blocks.index)
    return Term(
        blocks=tuple(view.blocks[i] for i in layout(slots).loose),
        turn=tuple(view.kept.index(b) for b in kept),
        unfold=tuple(slots[view.blocks.index(b)].size for b in extra),
        places=tuple(has.index(b) for b in extra),
        has=tuple(has),
    )


def laid(y: Tensor, how: Term) -> Tensor:
    """``(N, *signature, M)`` as a summand ``(N, *has, F*C)``."""
    if any(a > b for a, b in pairwise(how.turn)):
        y = y.permute(0, *(1 + i for i in how.turn), -1)
    if how.unfold:
        y = y.unflatten(-1, (*how.unfold, y.shape[-1] // prod(how.unfold)))
        k, n = len(how.unfold), y.dim()
        kept = [i for i in range(len(how.has)) if i not in how.places]
        source = {place: n - 1 - k + i for i, place in enumerate(how.places)}
        source.update({place: 1 + i for i, place in enumerate(kept)})
        y = y.permute(0, *(source[i] for i in range(len(how.has))), n - 1)
    return y


class Assembler:
    """Adds the summands of one cell: small ones first, so that each is expanded once.

    Args:
        terms: What each summand is.
        fresh: Whether each may be overwritten.
    """

    def __init__(self, terms: Sequence[Term], fresh: Sequence[bool]) -> None:
        parts: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(range(len(terms)), key=lambda i: len(terms[i].has)):
            parts.setdefault(terms[i].blocks, []).append(i)
        self.sums: list[tuple[tuple[int, ...], int, list[tuple[int, int, bool]]]] = []
        self.index: list[tuple[slice | None, ...] | None] = [None] * len(terms)
        for blocks, members in sorted(parts.items(), key=lambda item: -len(set(item[0]))):
            top, adds, own = members[-1], list[tuple[int, int, bool]](), fresh[members[-1]]
            for k, i in enumerate(members[:-1]):
                has = {*terms[i].has}
                j = next((j for j in members[k + 1 :] if has < {*terms[j].has}), top)
                adds.append((i, j, j == top and own))
                own = own or j == top
                each = [slice(None) if b in has else None for b in dict.fromkeys(blocks)]
                self.index[i] = (slice(None), *each)
            self.sums.append((blocks, top, adds))

    def __call__(self, found: list[Tensor]) -> Tensor:
        """The sum.

        Args:
            found: The summands, ``(N, *has, F*C)`` each; the list is overwritten.

        Returns:
            ``(N, *loose, F*C)``.
        """
        for i, index in enumerate(self.index):
            if index is not None:
                found[i] = found[i][index]
        for _, _, adds in self.sums:
            for i, j, inside in adds:
                found[j] = found[j].add_(found[i]) if inside else found[j] + found[i]
        (_, plain, _), *joined = self.sums
        for blocks, top, _ in joined:
            diagonal(found[plain], blocks).add_(found[top])
        return found[plain]
