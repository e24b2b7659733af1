"""How a module reads its inputs: by which matrices, with which vectors added, and by what else.

An input is *whole* while only views that keep its last axis, and copies, were made of it; the last
axis runs over its coordinates. What reads a whole input, or a concatenation that holds it, is
either a product with a parameter or listed by name. So ``f(A x + t)`` is known to be the function
of other weights only where nothing is listed.
"""

from collections import Counter
from collections.abc import Iterable

from wspace.trace.program import INPUT, PARAM, Call, Program, Value
from wspace.trace.rules import arguments
from wspace.wiring import Input, Reading

KEEP = frozenset(
    "view _unsafe_view reshape unsqueeze squeeze expand alias detach clone _to_copy".split()
)
"""Operators that leave the last axis as it is, if its size is the same."""

_TURNS = frozenset("t transpose permute numpy_T".split())
_PRODUCTS = {
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
    "linear": ("input", "weight", "bias"),
}
"""First operand, matrix and added vector of each product, as its schema names them."""

Part = tuple[int, int]
"""Input, and where it begins along the last axis of a value."""
Read = tuple[int, str, int, int]
"""Input, matrix, the matrix' dimension over coordinates, and where they begin there."""


def note_inputs(
    program: Program, name: str, values: list[Value], outs: list[Value], *, inplace: bool
) -> None:
    """Says of values that are made of inputs alone from which ones, and whether they still are one.

    Args:
        program: The program under way.
        name: Of the operator.
        values: What it was applied to.
        outs: Its results.
        inplace: True if it wrote to its first operand.
    """
    read = frozenset[int]().union(*(v.inputs for v in values))
    kept = name in KEEP and len(values) == 1 and values[0].whole
    for out in outs:
        out.inputs = read
        same = bool(out.shape) and out.shape[-1:] == values[0].shape[-1:] if kept else False
        out.whole = same and out.dtype.is_floating_point
    if inplace:
        program.overwritten |= read


def inputs_of(program: Program) -> tuple[Input, ...]:
    """How a program reads its inputs.

    Args:
        program: The recorded program.

    Returns:
        One for each tensor among the module's inputs, in their order.
    """
    walk = _Walk(program)
    for call in program.calls:
        walk.step(call)
    return tuple(walk.input(k) for k in range(len(program.inputs)))


class _Walk:
    """Follows inputs and matrices through the calls."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.parts: dict[int, list[Part]] = {}
        self.matrices: dict[int, tuple[str, int]] = {id(v): (v.names[0], 0) for v in program.params}
        """Parameters, and with their dimensions exchanged."""
        self.waiting: dict[int, set[Read]] = {}
        self.uses = Counter(id(v) for call in program.calls for v in call.ins)
        self.others: list[dict[str, None]] = [{} for _ in program.inputs]
        self.reads: dict[Read, dict[str, None]] = {}
        self.layouts: dict[str, list[set[Read]]] = {}
        self.bare: set[Read] = set()
        self.biases: dict[str, list[set[Read]]] = {}
        self.elsewhere: dict[str, dict[str, None]] = {}

    def step(self, call: Call) -> None:
        """One call."""
        if call.name == "uniform":  # zeros and ones in the shape of something
            return
        handled = self._turned(call) or self._kept(call) or self._joined(call)
        handled = handled or self._product(call) or self._added(call)
        if handled:
            return
        for v in call.ins:
            self._other(v, call.name)
            if id(v) in self.matrices:
                self.elsewhere.setdefault(self.matrices[id(v)][0], {})[call.name] = None

    def _parts(self, value: Value) -> list[Part]:
        if value.kind == INPUT and value.whole:
            return [(k, 0) for k in value.inputs]
        return self.parts.get(id(value), [])

    def _other(self, value: Value, name: str) -> None:
        """Notes that something else reads the inputs that a value holds, or is computed from."""
        read: Iterable[int] = value.inputs if value.kind == INPUT else ()
        text = name if value.kind != INPUT or value.whole else f"{name}, after other operators"
        for k in {*read, *(k for k, _ in self._parts(value))}:
            self.others[k][text] = None

    def _turned(self, call: Call) -> bool:
        """A matrix with its dimensions exchanged."""
        if call.name not in _TURNS or id(call.ins[0]) not in self.matrices:
            return False
        if len(call.ins[0].shape) != 2 or call.outs[0].shape != call.ins[0].shape[::-1]:
            return False
        bound = arguments(call)
        order = bound.get("dims", [1, 0])
        if [d % 2 for d in order] != [1, 0] or bound.get("dim0", 0) == bound.get("dim1", 1):
            return False
        name, turns = self.matrices[id(call.ins[0])]
        self.matrices[id(call.outs[0])] = (name, 1 - turns)
        return True

    def _kept(self, call: Call) -> bool:
        """A view or a copy that keeps the last axis."""
        if call.name not in KEEP or not call.outs or len(call.ins) != 1:
            return False
        x, out = call.ins[0], call.outs[0]
        if x.shape[-1:] != out.shape[-1:] or not out.shape or x.kind == PARAM:
            return False
        if id(x) in self.waiting and self.uses[id(x)] == 1:
            self.waiting[id(out)] = self.waiting.pop(id(x))
            return True
        self.parts[id(out)] = self._parts(x)
        return bool(self.parts[id(out)])

    def _joined(self, call: Call) -> bool:
        """A concatenation along the last axis."""
        if call.name != "cat":
            return False
        values: list[Value] = [v for v in call.args[0] if v.shape != (0,)]
        rank = len(call.outs[0].shape)
        if arguments(call)["dim"] % rank != rank - 1:
            return False
        start, parts = 0, []
        for v in values:
            if v.kind == INPUT and not v.whole:
                self._other(v, call.name)
            if id(v) in self.matrices:
                self.elsewhere.setdefault(self.matrices[id(v)][0], {})[call.name] = None
            parts += [(k, start + at) for k, at in self._parts(v)]
            start += v.shape[-1]
        self.parts[id(call.outs[0])] = parts
        return True

    def _product(self, call: Call) -> bool:
        """A product of inputs with a parameter."""
        if call.name not in _PRODUCTS:
            return False
        bound = arguments(call)
        x, matrix, added = (bound.get(n) for n in _PRODUCTS[call.name])
        if not isinstance(x, Value) or not isinstance(matrix, Value) or x is added:
            return False
        parts, known = self._parts(x), self.matrices.get(id(matrix))
        if not parts or known is None or len(matrix.shape) != 2:
            return False
        if any(bound.get(n, 1) != 1 for n in ("alpha", "beta")):
            return False
        name, turned = known
        dim = 1 - turned if call.name == "linear" else turned
        found = {(k, name, dim, start) for k, start in parts}
        self.layouts.setdefault(name, []).append(found)
        for read in found:
            self.reads.setdefault(read, {})
        if not isinstance(added, Value):
            self.waiting[id(call.outs[0])] = found
        elif self._is_bias(added, call.outs[0]):
            self._bias(added, found)
        else:
            self._other(added, call.name)
            self.bare |= found
        return True

    def _is_bias(self, value: Value, out: Value) -> bool:
        return value.kind == PARAM and value.shape == out.shape[-1:]

    def _bias(self, value: Value, found: set[Read]) -> None:
        self.biases.setdefault(value.names[0], []).append(found)
        for read in found:
            self.reads[read][value.names[0]] = None

    def _added(self, call: Call) -> bool:
        """A vector added to a product that nothing else reads."""
        if call.name != "add" or len(call.ins) != 2 or arguments(call).get("alpha", 1) != 1:
            return False
        for x, b in (call.ins, call.ins[::-1]):
            if id(x) in self.waiting and self.uses[id(x)] == 1 and self._is_bias(b, x):
                self._bias(b, self.waiting.pop(id(x)))
                return True
        return False

    def input(self, number: int) -> Input:
        """What was found about one input."""
        for found in self.waiting.values():
            self.bare |= found
        others = dict(self.others[number])
        if self.program.concrete:
            others["control flow that depends on data"] = None
        if number in self.program.overwritten:
            others["an operator that writes to it"] = None
        readings: list[Reading] = []
        for read, names in self.reads.items():
            k, matrix, dim, start = read
            if k != number:
                continue
            for op in self.elsewhere.get(matrix, {}):
                others[f"{op}, which also reads {matrix}"] = None
            if any(found != self.layouts[matrix][0] for found in self.layouts[matrix]):
                others[f"products with {matrix} in which the same entries read something else"] = (
                    None
                )
            proper = read not in self.bare and all(self._proper(b) for b in names)
            readings.append(Reading(matrix, dim, start, tuple(names) if proper else ()))
        shape = self.program.inputs[number].shape
        return Input(shape[-1] if shape else 1, tuple(readings), tuple(others))

    def _proper(self, bias: str) -> bool:
        """True if a vector is added to the same products wherever it is used, and only there."""
        found = self.biases[bias]
        return bias not in self.elsewhere and all(reads == found[0] for reads in found)
