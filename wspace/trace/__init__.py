"""From an `nn.Module` to its `WeightSpace`, and the proof on the real weights.

Four stages with a record between each: `capture` (module → calls), `rules` and `shapes` (one call
at a time), `solve` (atoms), `derive` (atoms → space). `trace` is the loop over them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from wspace.errors import TraceError, UnknownOp, message
from wspace.space import Opaque, WeightSpace
from wspace.trace import shapes as shapes  # registers its rules
from wspace.trace.capture import capture
from wspace.trace.derive import Naming, build_params
from wspace.trace.families import Family, find_families
from wspace.trace.gauges import derive_gauges
from wspace.trace.program import CONST, Call, Program, Value
from wspace.trace.roles import roles_of
from wspace.trace.rules import apply, arguments, known
from wspace.trace.sandbox import persistent_float_buffers
from wspace.trace.solve import Axis, Solver
from wspace.trace.wire import wire
from wspace.wiring import Wiring


def trace(
    module: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    on_unknown: Literal["freeze", "raise"] = "freeze",
) -> WeightSpace:
    """The weight space of a module: which units may be permuted without changing its function.

    The module is run once in evaluation mode on the example inputs. Parameters are replaced by
    meta tensors, so no weight is read; only where control flow depends on weights are they run for
    real. The module is left as it was.

    Args:
        module: Any module; its parameters may be real, meta or fake.
        args: Example positional inputs (a single tensor stands for a tuple of one).
        kwargs: Example keyword inputs.
        on_unknown: What to do with an operator that has no rule: ``"freeze"`` every axis it
            touches and list it in ``space.opaque``, or ``"raise"``.

    Returns:
        The weight space.

    Raises:
        TraceError: If the module fails on these inputs, or has no parameters.
        UnknownOp: If an operator has no rule and `on_unknown` is ``"raise"``.

    Example:
        >>> import torch
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space = trace(mlp, torch.zeros(1, 3))
        >>> print(*space.params, sep="  ")
        0.weight(h1, 3!)  0.bias(h1)  2.weight(2!, h1)  2.bias(2!)
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    program = capture(module, args, kwargs or {}, known)
    if not program.params:
        raise TraceError(
            message(
                f"trace: {type(module).__name__} has no parameters",
                help="there is no weight space to describe",
            )
        )
    naming, opaque = named(program, on_unknown)
    solver = naming.s
    buffers = {name for name, _ in persistent_float_buffers(module)}
    build_params(naming, program, buffers, {})  # names groups in the order of the parameters
    gauges = derive_gauges(naming, program)
    naming.add_kinds(gauges)
    return WeightSpace(
        params=build_params(naming, program, buffers, roles_of(program)),
        gauges=gauges,
        opaque=tuple(dict.fromkeys(opaque)),
        capture="concrete" if program.concrete else "abstract",
        extra=naming.extra(),
        wiring=Wiring.later(lambda: wire(program, solver, naming)),
        example=(args, dict(kwargs or {})),
    )


def named(program: Program, on_unknown: str = "freeze") -> tuple[Naming, list[Opaque]]:
    """The groups of a program, with axes for each of its values, and operators without a rule."""
    families = find_families(program)
    while True:
        solver = Solver()
        opaque = solve(solver, program, on_unknown, families)
        naming = Naming(solver, program.params, families)
        if not naming.rejected:
            return naming, opaque
        families = [f for f in families if f not in naming.rejected]


def solve(
    s: Solver, program: Program, on_unknown: str, families: Sequence[Family] = ()
) -> list[Opaque]:
    """Runs every call of a program through its rule; returns the operators that had none."""
    opaque: list[Opaque] = []
    _forget_axes(program)
    for value in program.params:
        value.axes = s.fresh(value.shape)
    reads: dict[int, Family] = {}
    for family in families:
        family.axis = s.atom(family.size)
        reads |= {id(call): family for call in family.reads}
    for call in program.calls:
        ins = call.ins
        for value in ins:
            if value.axes is None:
                value.axes = _leaf_axes(s, value)
        if id(call) in reads:
            _read_slot(s, call, reads[id(call)])
            continue
        result = apply(s, call)
        if result is None:
            if on_unknown == "raise":
                raise UnknownOp(_unknown_message(call))
            opaque.append(Opaque(str(call.op), call.source))
            _freeze(s, ins)
            result = tuple(None for _ in call.outs)
        outs = result if isinstance(result, tuple) else (result,)
        _follow_points(s, call)
        for value, axes in zip(call.outs, outs, strict=True):
            value.axes = s.fresh(value.shape, fixed=True) if axes is None else list(axes)
            sizes = tuple(s.size(axis) for axis in value.axes)
            if sizes != value.shape:
                raise AssertionError(f"rule of {call.op}: axes {sizes}, tensor {value.shape}")
        s.settle([v.axes for v in (*ins, *call.outs)])
    used = {id(v) for call in program.calls for v in call.ins}
    _freeze(s, [*program.outputs, *(v for v in program.params if id(v) not in used)])
    return opaque


def _forget_axes(program: Program) -> None:
    for call in program.calls:
        for value in (*call.ins, *call.outs):
            value.axes = value.points = None


def _read_slot(s: Solver, call: Call, family: Family) -> None:
    """Axes of a shared value read at a branch's own index: the branches stay interchangeable."""
    shared: Value = call.args[0]
    out = call.outs[0]
    if call.name == "eq":
        if shared.points is not None and s.size(shared.points) == family.size:
            s.unify(shared.points, family.axis)
        else:
            s.freeze(family.axis)
        out.axes = list(shared.axes)
    else:
        dim = arguments(call)["dim"] % len(shared.shape)
        s.unify(shared.axes[dim], family.axis)
        kept = [()] if call.name == "slice" else []
        out.axes = [*shared.axes[:dim], *kept, *shared.axes[dim + 1 :]]
    s.settle([shared.axes, out.axes])


def _freeze(s: Solver, values: list[Value]) -> None:
    for value in values:
        for axis in value.axes:
            s.freeze(axis)
        if value.points is not None:
            s.freeze(value.points)


_READS_POINTS = frozenset(
    """
    embedding index index_select gather index_add scatter scatter_add histc index_put
    """.split()
)
_KEEPS_POINTS = frozenset(
    """
    view _unsafe_view permute transpose t unsqueeze squeeze expand clone alias detach _to_copy
    slice select unbind split repeat flatten
    """.split()
)


def _follow_points(s: Solver, call: Call) -> None:
    """Indices into an axis may be moved and looked up; used as plain numbers they fix it."""
    for value in call.ins:
        if value.points is None or call.name in _READS_POINTS:
            continue
        if call.name in _KEEPS_POINTS:
            for out in call.outs:
                out.points = value.points
        else:
            s.freeze(value.points)


def _leaf_axes(s: Solver, value: Value) -> list[Axis]:
    """Inputs are fixed; a constant is free along the dimensions in which it does not vary."""
    if value.kind != CONST or value.data is None or value.data.numel() < 2:
        return s.fresh(value.shape, fixed=True)
    data = value.data
    axes = s.fresh(value.shape)
    for d, size in enumerate(value.shape):
        if size > 1 and not bool((data == data.narrow(d, 0, 1)).all()):
            s.freeze(axes[d])
    return axes


def _unknown_message(call: Call) -> str:
    sizes = ", ".join(str(list(v.shape)) for v in call.ins)
    return message(
        f"trace: no rule for {call.op}",
        expected="an operator with a rule, or one that decomposes into such operators",
        got=f"it at {call.source or 'an unknown place'}, on shapes {sizes}",
        help="add a rule (docs/extending.md), or pass on_unknown='freeze' to fix what it touches",
    )
