"""What a run costs and counts, in terms of group sizes.

From one captured program: the multiply-accumulates of every contraction as a polynomial in the
sizes of groups, so that they are known for any sizes without running anything (`Survey.works`);
and the groups whose units some operator counts, so that a unit of zeros is not the same as no unit
(`Survey.counted`).

Decided from the axes that an operator sums, sorts or averages over, never from names of modules.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wspace.space import WeightSpace
from wspace.trace.again import Run, ValueOf, look
from wspace.trace.derive import Naming, Tree, atoms_of
from wspace.trace.polynomials import Polynomial
from wspace.trace.program import Call, Program, Value
from wspace.trace.rules import arguments, dims_of
from wspace.trace.sites import Branches, Labels
from wspace.trace.solve import Axis, Solver
from wspace.trace.zeros import Zeros

Axes = list[Axis]


@dataclass(frozen=True, slots=True)
class Work:
    """The multiply-accumulates of one contraction.

    Attributes:
        op: Operator, without namespace: ``"addmm"``, ``"convolution"``.
        label: Module whose weight is multiplied (else: that leads here) and operator, for reading.
        terms: Names of groups, with repetition → coefficient of the product of their sizes.
    """

    op: str
    label: str
    terms: tuple[tuple[tuple[str, ...], Fraction], ...]

    def macs(self, sizes: Mapping[str, int]) -> Fraction:
        """Multiply-accumulates when the groups have these sizes.

        Args:
            sizes: Size of every group that the terms name.

        Returns:
            The number; a fraction only where one of several unequal experts was taken out.
        """
        return sum((c * prod(sizes[g] for g in key) for key, c in self.terms), Fraction(0))


@dataclass(frozen=True)
class Survey:
    """What a run costs and counts.

    Attributes:
        works: One record for every contraction, in the order of the run.
        counted: Group → operators that count its units: statistics of norms, softmax, mean,
            maximum, sorting, product, and the root of the width by which attention is divided.
    """

    works: tuple[Work, ...] = ()
    counted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def survey(
    space: WeightSpace,
    module: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Survey:
    """What one evaluation-mode pass of a module on these inputs costs and counts.

    The module is run once, as in `trace`, and left as it was. Contractions are matrix products,
    convolutions, attention (in its two products) and pairwise distances. Look-ups, elementwise
    operators, reductions, sorting and Fourier transforms count as no multiply-accumulates.

    Where each token goes to some experts of a mixture only, the work does not depend on how many
    experts there are; where every expert sees every token, it grows with their number.

    Args:
        space: Weight space of the module.
        module: The module; no weights are needed.
        args: Example positional inputs (a single tensor stands for a tuple of one).
        kwargs: Example keyword inputs.

    Returns:
        What was found.

    Raises:
        SpaceMismatch: If the module is not of this space.
        TraceError: If the module fails on these inputs.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
        >>> seen = survey(wspace.trace(mlp, torch.zeros(7, 3)), mlp, torch.zeros(7, 3))
        >>> [(w.label, int(w.macs({"h1": 5})), int(w.macs({"h1": 4}))) for w in seen.works]
        [('0: addmm', 105, 84), ('2: addmm', 70, 56)]
        >>> seen.counted
        {'h1': ('1: native_layer_norm',)}
    """  # noqa: DOC502 (look raises)
    return look(space, module, args, kwargs, SurveyLook())[0]


class SurveyLook:
    """A look for what a run costs and counts."""

    def __init__(self) -> None:
        self._roots: _Roots | None = None

    def within(self, module: nn.Module, value_of: ValueOf) -> "_Roots":
        """Notes the widths by whose roots attention is divided."""
        self._roots = _Roots(value_of)
        return self._roots

    def read(self, run: Run) -> Survey:
        """What was found."""
        roots = [] if self._roots is None else self._roots.found
        return _Surveyor(run.space, run.program, run.naming, run.names).survey(roots)


class _Roots(TorchFunctionMode):
    """Mode that notes where attention is divided by the root of the width of its queries."""

    def __init__(self, value_of: Callable[[Tensor], Value]) -> None:
        super().__init__()
        self.value_of = value_of
        self.found: list[tuple[Value, int, int]] = []
        """Values; a dimension of each that has the width, in its first part if it has parts; and
        how many heads are the slow index there."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            self.found.append((self.value_of(query), -1, 1))
        elif func is F.multi_head_attention_forward:  # it hides what it calls
            weight = kwargs.get("q_proj_weight") if args[5] is None else args[5]
            if weight is not None:
                self.found.append((self.value_of(weight), 0, args[4]))
        return func(*args, **kwargs)


# --------------------------------------------------------------------------- contractions

_Contraction = Callable[[dict[str, Any], Call], list[Axes]]
CONTRACTIONS: dict[str, _Contraction] = {
    "mm": lambda a, c: [[*a["self"].axes, a["mat2"].axes[1]]],
    "addmm": lambda a, c: [[*a["mat1"].axes, a["mat2"].axes[1]]],
    "bmm": lambda a, c: [[*a["self"].axes, a["mat2"].axes[2]]],
    "baddbmm": lambda a, c: [[*a["batch1"].axes, a["batch2"].axes[2]]],
    "mv": lambda a, c: [a["self"].axes],
    "addmv": lambda a, c: [a["mat"].axes],
    "dot": lambda a, c: [c.args[0].axes],
    "vdot": lambda a, c: [c.args[0].axes],
    "linear": lambda a, c: [[*a["input"].axes, a["weight"].axes[0]]],
    "_grouped_mm": lambda a, c: [[*a["self"].axes, a["mat2"].axes[-1]]],
    "_cdist_forward": lambda a, c: [[*a["x1"].axes, a["x2"].axes[-2]]],
    "_trilinear": lambda a, c: [_trilinear(a)],
    **dict.fromkeys(
        ("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"),
        lambda a, c: [_convolution(a, c)],
    ),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math",
         "_scaled_dot_product_attention_math_for_mps"),
        lambda a, c: _attention(a),
    ),
}  # fmt: skip
"""Operator → for each product it computes, the axes whose sizes are multiplied."""


def _convolution(a: dict[str, Any], call: Call) -> Axes:
    """Every tap of the kernel meets every place: of the output, or of the input if transposed."""
    places = (a["input"] if a.get("transposed") else call.outs[0]).axes[2:]
    return [*a["weight"].axes, a["input"].axes[0], *places]


def _attention(a: dict[str, Any]) -> list[Axes]:
    query, key, value = (a[n].axes for n in ("query", "key", "value"))
    return [[*query, key[-2]], [*query[:-1], key[-2], value[-1]]]


def _trilinear(a: dict[str, Any]) -> Axes:
    out: dict[int, Axis] = {}
    for name, expand in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        axes = list(a[name].axes)
        for d in sorted(a[expand]):
            axes.insert(d, ())
        for d, axis in enumerate(axes):
            out[d] = out.get(d) or axis
    return list(out.values())


# ------------------------------------------------------------------------------- counting

_Count = Callable[[Solver, dict[str, Any], Call], Axes]
COUNTING: dict[str, _Count] = {
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "mean", "prod",
         "amax", "amin", "all", "logsumexp", "std", "var", "var_mean", "std_mean", "max", "min",
         "median", "argmax", "argmin", "aminmax", "sort", "topk", "kthvalue", "msort"),
        lambda s, a, c: _along(a, c),
    ),
    **dict.fromkeys(
        ("native_layer_norm", "_fused_rms_norm", "rms_norm"),
        lambda s, a, c: a["input"].axes[-len(a["normalized_shape"]) :],
    ),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
         "cudnn_batch_norm", "batch_norm", "_batch_norm_no_update"),
        lambda s, a, c: [] if _frozen(a) else [x for d, x in enumerate(a["input"].axes) if d != 1],
    ),
    "native_group_norm": lambda s, a, c: [
        _inner(s, a["input"].axes[1], a["group"]), *a["input"].axes[2:]
    ],
    **dict.fromkeys(
        (name for name in CONTRACTIONS if name.startswith("_scaled_dot_product")),
        lambda s, a, c: [a["key"].axes[-2]],
    ),
}  # fmt: skip
"""Operator → the axes whose units it counts."""


def _along(a: dict[str, Any], call: Call) -> Axes:
    """The axes that a reduction, a softmax or a sort runs along."""
    x: Value = a["self"]
    if isinstance(a.get("other"), Value):  # the larger of two tensors
        return []
    dim = a.get("dim", 0 if call.name == "msort" else None)
    return [x.axes[d] for d in dims_of(dim, len(x.shape))]


def _frozen(a: dict[str, Any]) -> bool:
    """True if a batch norm uses statistics that it was given."""
    return not a.get("training", False) and isinstance(a.get("running_mean"), Value)


def _inner(s: Solver, axis: Axis, heads: int) -> Axis:
    """The fast factors of an axis, without the slow ones that count `heads`; all if unclear."""
    atoms = s.resolve(axis)
    for i in range(len(atoms) + 1):
        if s.size(atoms[:i]) == heads:
            return atoms[i:]
    return atoms


_RAGGED = ("nonzero", "masked_select", "index")
"""Operators that may make an axis as long as the data say."""


def _live(program: Program) -> set[int]:
    """Calls that what the module returns may depend on; those that write in place always do."""
    needed = {id(v) for v in program.outputs}
    live: set[int] = set()
    for call in reversed(program.calls):
        if call.inplace or any(id(v) in needed for v in call.outs):
            live.add(id(call))
            needed |= {id(v) for v in call.ins}
    return live


# ----------------------------------------------------------------------------- the survey


@dataclass(frozen=True, slots=True)
class _Raw:
    """A contraction before the branches of families are looked at."""

    call: Call
    label: str
    terms: Polynomial
    branches: frozenset[tuple[str, int]]
    ragged: bool


class _Surveyor:
    """Reads a solved program."""

    def __init__(
        self, space: WeightSpace, program: Program, naming: Naming, names: Mapping[str, str]
    ) -> None:
        self.space, self.program, self.naming, self.names = space, program, naming, names
        self.s = naming.s
        self._present: dict[int, frozenset[str]] = {}

    def survey(self, roots: Iterable[tuple[Value, int, int]]) -> Survey:
        """All that is to be known; `roots` are as `_Roots` found them."""
        labels = Labels(self.program)
        branches = Branches(self.program, self.naming, self.names)
        ragged: set[int] = set()
        raw: list[_Raw] = []
        counted: dict[str, dict[str, None]] = {}
        live = _live(self.program)
        named = self._labels(labels)
        for call in self.program.calls:
            partly = frozenset(branches.of(call))
            if call.name in _RAGGED:
                ragged |= self._atoms(call.outs) - self._atoms(call.ins)
            bound = arguments(call)
            if (contraction := CONTRACTIONS.get(call.name)) is not None:
                for axes in contraction(bound, call):
                    loose = any(a in ragged for axis in axes for a in self.s.resolve(axis))
                    raw.append(_Raw(call, named[id(call)], self._size(axes), partly, loose))
            if id(call) in live:
                for name in self._counts(call, bound, branches):
                    counted.setdefault(name, {})[labels.of(call)] = None
        for value, dim, heads in roots:
            if value.axes is not None:
                for name in self._width(value.axes[dim], heads):
                    counted.setdefault(name, {})["attention over the root of its width"] = None
        idle = {
            (gauge.slots[0][0], gauge.group)
            for gauge in self.space.gauges
            if gauge.kind == "scale" and len({slot[0] for slot in gauge.slots}) == 1
        }
        buffers = [p.name for p in self.space.params if p.buffer]
        for call, name in Zeros(self.program, self._of_value, idle, buffers).left_on():
            if id(call) in live:
                counted.setdefault(name, {})[f"{labels.of(call)} of units that stay on"] = None
        order = {g: tuple(counted[g]) for g in self.space.groups if g in counted}
        return Survey(tuple(self._works(raw)), order)

    def _labels(self, labels: Labels) -> dict[int, str]:
        """Names of contractions for reading: by the weight that is multiplied, if there is one."""
        weights = {id(v) for v in self.program.params}  # and what is computed from them alone
        found: dict[int, str] = {}
        for call in self.program.calls:
            names = [labels.names[id(v)] for v in call.ins if id(v) in weights]
            if len(names) == len(call.ins):
                weights |= {id(v) for v in call.outs}
            if call.name in CONTRACTIONS:
                name = names[-1] if names else ""
                found[id(call)] = f"{name}: {call.name}" if name else labels.of(call)
        return found

    def _works(self, raw: Sequence[_Raw]) -> Iterator[Work]:
        """Work in one branch of a family is there as often as the family has branches."""
        routed = {name for r in raw if r.ragged for name, _ in r.branches}
        for r in raw:
            terms = r.terms
            for name, n in Counter(name for name, _ in r.branches).items():
                g = self.space.all_groups.get(name)
                if n == 1 and g is not None and not g.fixed and name not in routed:
                    terms = {tuple(sorted((*k, name))): c / g.size for k, c in terms.items()}
            yield Work(r.call.name, r.label, tuple(sorted(terms.items())))

    def _counts(self, call: Call, bound: dict[str, Any], branches: Branches) -> Iterator[str]:
        """Groups whose units an operator counts."""
        if call.name == "mean":
            yield from self._averaged(call, bound, branches)
        if (counting := COUNTING.get(call.name)) is not None:
            yield from self._groups(counting(self.s, bound, call))

    def _averaged(self, call: Call, bound: dict[str, Any], branches: Branches) -> set[str]:
        """Groups that index the members of a family whose stacked results a mean is taken of."""
        made = {id(v): c for c in self.program.calls for v in c.outs}
        stack = made.get(id(bound["self"]))
        if stack is None or stack.name != "stack":
            return set()
        dim = arguments(stack).get("dim") or 0
        rank = len(stack.outs[0].shape)
        if dim % rank not in dims_of(bound.get("dim"), rank):
            return set()
        return {name for v in stack.ins if (c := made.get(id(v))) for name, _ in branches.of(c)}

    # --------------------------------------------------------------------- groups of atoms

    def _atoms(self, values: Iterable[Value]) -> set[int]:
        return {a for v in values for axis in v.axes or () for a in self.s.resolve(axis)}

    def _name(self, atom: int) -> str | None:
        """The free group of the space that an atom belongs to, in whole or in part."""
        owner = self.naming.owner(atom)
        name = None if owner is None else self.names.get(self.naming.group(owner).name)
        return name if name in self.space.groups else None

    def _of_value(self, value: Value) -> frozenset[str]:
        """Free groups that a value has units of."""
        found = self._present.get(id(value))
        if found is None:
            atoms = (a for axis in value.axes or () for a in self._all_atoms(axis))
            found = frozenset(n for a in atoms if (n := self._name(a)))
            self._present[id(value)] = found
        return found

    def _all_atoms(self, axis: Axis) -> Iterator[int]:
        """Atoms of an axis, whichever piece stands there (queries, keys or values)."""
        for atom in self.s.resolve(axis):
            case, parts = self.s.cases(atom), self.s.parts(atom)
            inside = [*(case[1] if case else ()), *(parts or ())]
            for piece in inside:
                yield from self._all_atoms(piece)
            if not inside:
                yield atom

    def _groups(self, axes: Iterable[Axis]) -> list[str]:
        """Free groups that some of these axes have units of."""
        atoms = (a for axis in axes for a in atoms_of(self.naming.tree(axis)))
        return list(dict.fromkeys(n for a in atoms if (n := self._name(a))))

    def _width(self, axis: Axis, heads: int) -> list[str]:
        """Free groups in the fast factors of an axis, or of its first part."""
        tree = self.naming.tree(axis)
        while tree and isinstance(tree[0], list):
            tree = tree[0][0]
        return self._groups([_inner(self.s, tuple(atoms_of(tree)), heads)])

    def _size(self, axes: Iterable[Axis]) -> Polynomial:
        """Product of the sizes of axes, in terms of the sizes of free groups."""
        atoms: dict[tuple[int, ...], int] = {(): 1}
        for axis in axes:
            atoms = _times(atoms, self._tree(self.naming.tree(axis)))
        terms: Polynomial = {}
        for key, n in atoms.items():
            name, factor = self._monomial(key)
            terms[name] = terms.get(name, Fraction(0)) + n * factor
        return terms

    def _tree(self, tree: Tree) -> dict[tuple[int, ...], int]:
        out: dict[tuple[int, ...], int] = {(): 1}
        for node in tree:
            if isinstance(node, int):
                out = _times(out, {(node,): 1} if self._name(node) else {(): self.s.size((node,))})
                continue
            total: dict[tuple[int, ...], int] = {}
            for part in node:
                for key, n in self._tree(part).items():
                    total[key] = total.get(key, 0) + n
            out = _times(out, total)
        return out

    def _monomial(self, atoms: tuple[int, ...]) -> tuple[tuple[str, ...], int]:
        """Groups whose units these atoms index together, and the size of what is left over."""
        halves = Counter((self.naming.owner(a) or 0, self.naming.unit(a)) for a in atoms)
        names: list[str] = []
        rest = 1
        for owner in dict.fromkeys(o for o, _ in halves):
            units = self.naming.units(owner)
            whole = min(halves[owner, u] for u in units)
            names += [self._name(units[0]) or ""] * whole
            rest *= prod(self.s.size((u,)) ** (halves[owner, u] - whole) for u in units)
        return tuple(sorted(names)), rest


def _times(
    a: Mapping[tuple[int, ...], int], b: Mapping[tuple[int, ...], int]
) -> dict[tuple[int, ...], int]:
    out: dict[tuple[int, ...], int] = {}
    for x, n in a.items():
        for y, m in b.items():
            key = tuple(sorted((*x, *y)))
            out[key] = out.get(key, 0) + n * m
    return out
