"""The wiring of a traced program: its node sets, and the blocks that parameters form between them.

Each call is run on index arrays instead of numbers (see `units`): views rearrange them, elementwise
operators pass them on, contractions make new units and the blocks that lead to them. Where units
cannot be followed new ones are made and the operator is listed in ``wiring.unknown``. Nothing here
is per parameter element, so the cost does not grow with the size of the model.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from wspace.trace.derive import Naming
from wspace.trace.inputs import inputs_of
from wspace.trace.program import Call, Program, Value
from wspace.trace.rules import arguments, dims_of
from wspace.trace.solve import Solver
from wspace.trace.wire.connect import CONTRACTIONS, look_up
from wspace.trace.wire.finish import finish, leftovers
from wspace.trace.wire.places import Lost
from wspace.trace.wire.units import (
    Builder,
    State,
    Units,
    Weight,
    aligned,
    extend,
    map_state,
    varying,
)
from wspace.trace.wire.views import Ids, slices, views
from wspace.trace.wire.weights import blend, drop, join_weights, reduce_weight
from wspace.wiring import Wiring

_LINEAR = frozenset("add sub rsub copy index_put index_add scatter_add slice_scatter "
                    "select_scatter index_copy scatter addcmul".split())  # fmt: skip
_SYMMETRIC = frozenset("add mul maximum minimum".split())
_DROPPED = frozenset("native_dropout clone _to_copy detach alias".split())
_NORMS = {
    "native_layer_norm": ("weight", "bias"),
    "_fused_rms_norm": ("weight",),
    "rms_norm": ("weight",),
    "native_group_norm": ("weight", "bias"),
}
_STATISTICS = ("norm.scale", "norm.shift", "norm.mean", "norm.var")
_REDUCTIONS = frozenset("sum mean prod amax amin any all logsumexp std var nansum "
                        "linalg_vector_norm norm max min median argmax argmin var_mean std_mean "
                        "aminmax count_nonzero".split())  # fmt: skip
_CARRIED = frozenset(
    """
    _softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp
    native_dropout max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d
    adaptive_max_pool3d max_pool1d max_pool2d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_trilinear3d
    upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d max_unpool2d
    sort topk kthvalue gather histc _fft_r2c _fft_c2r _fft_c2c
    """.split()
)
_CHOICES = frozenset("sort topk kthvalue gather".split())
_BATCH_NORMS = frozenset("native_batch_norm _native_batch_norm_legit batch_norm cudnn_batch_norm "
                         "_native_batch_norm_legit_no_training miopen_batch_norm "
                         "_batch_norm_with_update _batch_norm_no_update".split())  # fmt: skip
_TABLES = frozenset("embedding index index_select gather _embedding_bag "
                    "_embedding_bag_forward_only _unsafe_index".split())  # fmt: skip


def wire(program: Program, solver: Solver, naming: Naming) -> Wiring:
    """The wiring of a program.

    Args:
        program: The recorded program, axes filled in.
        solver: The solver that holds these axes.
        naming: Named groups of the parameters.

    Returns:
        Node sets and blocks; every entry of every parameter is in exactly one block that is not
        `again`.
    """
    builder = Builder(solver, program.params, [v.names[0] for v in program.params])
    walk = _Walk(builder, program)
    for call in program.calls:
        walk.step(call)
    outputs = walk.outputs(program.outputs)
    leftovers(builder)
    return replace(finish(builder, outputs, naming), inputs=inputs_of(program))


class _Walk:
    """Runs calls on index arrays."""

    def __init__(self, builder: Builder, program: Program) -> None:
        self.b = builder
        self.state: dict[int, State] = {
            id(v): builder.leaf(i) for i, v in enumerate(program.params)
        }
        self.uses = Counter(id(v) for call in program.calls for v in call.ins)
        self.uses.update(id(v) for v in program.outputs)
        self.uniform: set[int] = set()
        self.shaped: dict[tuple[int, tuple[int, ...]], tuple[Ids, Ids]] = {}

    def step(self, call: Call) -> None:
        """One call."""
        states = [self.state.get(id(v)) for v in call.ins]
        if call.name == "uniform" or not any(states):
            if call.name == "uniform" or all(id(v) in self.uniform for v in call.ins):
                self.uniform |= {id(v) for v in call.outs}
            self._set(call, [None] * len(call.outs))
            return
        before = len(self.b.blocks)
        try:
            self._set(call, self._run(call, states))
        except (Lost, ValueError):
            del self.b.blocks[before:]
            self._give_up(call, states)

    def _set(self, call: Call, states: Sequence[State]) -> None:
        for value, state in zip(call.outs, states, strict=False):
            if state is not None:
                _check(value, state)
                self.state[id(value)] = state

    def of(self, value: Value | None) -> State:
        """State of a value."""
        return None if value is None else self.state.get(id(value))

    def _give_up(self, call: Call, states: list[State]) -> None:
        """Fresh units where nothing is known of an operator."""
        self.b.unknown.append(call.name)
        op = f"?{call.name}"
        sources = [
            t
            for s, v in zip(states, call.ins, strict=True)
            if isinstance(s, Units)
            for t in self.b.realise(s, len(v.shape)).tracks
        ]
        for value in call.outs:
            last = set(range(len(value.shape))[-1:])
            if any(isinstance(s, Weight) for s in states) or value.shape[-1:] > (1 << 16,):
                last = set()  # whatever it is, it has no axis that a weight's would have to match
            units = self.b.new_units(
                value.shape, last, "hidden", op, not self.b.free(value, [*last])
            )
            for t in sources:
                grid = (*np.unique(np.maximum(t, 0)).shape, 1)
                self.b.link(np.unique(np.maximum(t, 0)).reshape(grid), units.reshape(1, -1), op, "")
            self.state[id(value)] = Units((units,))

    # ------------------------------------------------------------------ dispatch

    def _run(self, call: Call, states: list[State]) -> Sequence[State]:  # noqa: PLR0911
        name = call.name
        if isinstance(states[0], Weight) and name in _TABLES and not any(states[1:]):
            return [look_up(self.b, call, states[0])]
        if states[0] is not None and (made := views(call)) is not None:
            return self._view(call, self._chosen(call, states[0]), made)
        if name in CONTRACTIONS:
            return CONTRACTIONS[name](self, call)
        if name in ("cat", "stack", "concat"):
            return [self._cat(call)]
        if name in _REDUCTIONS and not isinstance(arguments(call).get("other"), Value):
            return self._reduce(call)
        if name in _BATCH_NORMS or name in _NORMS:
            return self._norm(call)
        if name == "glu":
            return [self._glu(call)]
        if name in ("im2col", "col2im", "as_strided"):
            return self._patches(call)
        if name in _CARRIED:
            return self._carry(call)
        return [self.pointwise(call, name, call.ins, value) for value in call.outs[:1]]

    def _chosen(self, call: Call, state: State) -> State:
        """Units looked up by what depends on data are taken together, as a reduction."""
        if call.name not in ("index", "_unsafe_index", "index_select"):
            return state
        bound = arguments(call)
        rank = len(call.ins[0].shape)
        pairs = [(bound.get("dim"), bound.get("index"))]
        if "indices" in bound:
            pairs = list(enumerate(bound["indices"]))
        dims = {d % rank for d, i in pairs if i is not None and i.data is None}  # type: ignore[operator]
        tracks = state.tracks + state.kept if isinstance(state, Units) else ()
        if isinstance(state, Units) and any(varying(t, rank) & dims for t in tracks):
            return self.b.reduce(state, call.ins[0], rank, dims, call.name)
        return state

    def _view(self, call: Call, state: State, made: list[Any]) -> list[State]:
        single = self.uses[id(call.ins[0])] == 1
        out: list[State] = []
        for function in made:
            new = map_state(state, function)
            if isinstance(new, Units):
                new.fresh = new.fresh and single and len(made) == 1
            out.append(new)
        return out

    # --------------------------------------------------------------- elementwise

    def pointwise(self, call: Call, op: str, values: list[Value], out: Value) -> State:
        """An elementwise operator: units of the operands joined, weights attached to them."""
        rank = len(out.shape)
        label = _label(call) if call.name == op else op
        operands = [
            (aligned(self.of(v), len(v.shape), rank), self.uses[id(v)] == 1) for v in values
        ]
        operands = self._with_units(operands, values, out)
        units = [(s, single) for s, single in operands if isinstance(s, Units)]
        weights = [(i, s) for i, (s, _) in enumerate(operands) if isinstance(s, Weight)]
        if not units:
            if op not in ("copy",) and any(v.kind == "input" for v in values) and weights:
                return self._on_input(weights, values, out, op)
            return blend([w for _, w in weights], label)
        if len(units) == 1:
            result = units[0][0]
            blank = any(id(v) in self.uniform for v in values)  # zeros to add up in
            quiet = op in _DROPPED or (op in ("add", "sub", "copy") and (weights or blank))
            if not quiet:
                result = replace(result, trail=extend(result.trail, label), fresh=False)
        else:
            linear = op in _LINEAR
            ordered = op in ("sub", "rsub") or not (linear or op in _SYMMETRIC)
            result = self.b.join(units, out, label, linear=linear, ordered=ordered)
        for i, weight in weights:
            if not result.tracks:
                result = self.b.realise(result, rank)
            slot = {"add": "bias", "mul": "scale", "copy": "bias"}.get(op, f"{op}.{i}")
            slot = f"{slot}@{result.trail}" if result.trail else slot
            self.b.feature(weight, result.tracks, rank, op, slot)
        return result

    def _with_units(
        self, operands: list[tuple[State, bool]], values: list[Value], out: Value
    ) -> list[tuple[State, bool]]:
        """Operands, weights made units if they bring an axis of interchangeable indices."""
        rank = len(out.shape)
        named = {
            d for s, _ in operands if isinstance(s, Units) for t in (*s.tracks, *s.kept)
            for d in varying(t, rank)
        }  # fmt: skip
        if not any(isinstance(s, Units) for s, _ in operands):
            return operands
        made: list[tuple[State, bool]] = []
        for (s, single), value in zip(operands, values, strict=True):
            shift = rank - len(value.shape)
            if isinstance(s, Weight):
                moves = {d for leaf in s.leaves for c in leaf.coords for d in varying(c, rank)}
                new = {d for d in moves - named if self.b.free(value, [d - shift])}
                if new and not any(leaf.inner is not None for leaf in s.leaves):
                    units = self.b.new_units(out.shape, moves, "input", "weight", False)
                    self.b.feature(s, (units,), rank, "learned", "learned")
                    made.append((Units((units,)), single))
                    continue
            made.append((s, single))
        return made

    def _on_input(
        self, weights: list[tuple[int, Weight]], values: list[Value], out: Value, op: str
    ) -> State:
        """A weight combined with an input: input units along the weight's dimensions."""
        rank = len(out.shape)
        dims = {
            d
            for _, w in weights
            for leaf in w.leaves
            for c in leaf.coords
            for d in varying(c, rank)
        }
        units = self.b.new_units(
            out.shape, dims, "input", "input", not self.b.free(out, sorted(dims))
        )
        for i, weight in weights:
            self.b.feature(weight, (units,), rank, op, f"{op}.{i}")
        return Units((units,))

    def _norm(self, call: Call) -> list[State]:
        bound = arguments(call)
        x = call.ins[0]
        rank = len(x.shape)
        if call.name in _BATCH_NORMS and isinstance(whole := self.of(x), Weight):
            shape = (1, -1, *[1] * (rank - 2))  # standardised weights
            affine = [map_state(self.of(v), lambda a: a.reshape(shape)) for v in call.ins[1:]]
            return [blend([whole, *(s for s in affine if isinstance(s, Weight))], _label(call))]
        state = self._units(x, {1} if call.name in _BATCH_NORMS else {rank - 1}, call)
        if call.name in _BATCH_NORMS:
            slots = [bound.get(n) for n in ("weight", "bias", "running_mean", "running_var")]
        else:
            slots = [bound.get(n) for n in _NORMS[call.name]]
        trail = extend(state.trail, _label(call))
        for value, slot in zip(slots, _STATISTICS, strict=False):
            weight = self.of(value)
            if not isinstance(weight, Weight) or value is None:
                continue
            channels = call.name in _BATCH_NORMS or call.name == "native_group_norm"
            shape = (1, -1, *[1] * (rank - 2)) if channels else (1,) * (rank - len(value.shape))
            weight = map_state(weight, lambda a, s=shape, c=channels: self._shaped(a, s, whole=c))
            self.b.feature(weight, state.tracks, rank, "norm", f"{slot}@{trail}")  # type: ignore[arg-type]
        return [Units(state.tracks, trail), *[None] * (len(call.outs) - 1)]

    def _shaped(self, a: Ids, shape: tuple[int, ...], *, whole: bool) -> Ids:
        """An array in another shape (or with leading ones), the same object each time."""
        key = (id(a), shape)
        if key not in self.shaped:
            new = a.reshape(shape if whole else shape + a.shape)
            self.shaped[key] = (new, a)
        return self.shaped[key][0]

    def _units(self, value: Value, dims: set[int], call: Call) -> Units:
        """State of a value as an activation with units."""
        state = self.of(value)
        if isinstance(state, Units):
            return self.b.realise(state, len(value.shape))
        if isinstance(state, Weight):
            made = self.b.materialise(state, value, dims, call.name)
            self.state[id(value)] = made
            return made
        fixed = not self.b.free(value, sorted(dims))
        return Units((self.b.new_units(value.shape, dims, "input", "input", fixed),))

    def _carry(self, call: Call) -> list[State]:
        """Operators that keep units: pooling, softmax, sorting along what is no unit."""
        x, out = call.ins[0], call.outs[0]
        rank = len(x.shape)
        state = self.of(x)
        if len(out.shape) != rank or state is None:
            raise Lost
        arrays = state.tracks + state.kept if isinstance(state, Units) else ()
        if isinstance(state, Weight):
            arrays = tuple(c for leaf in state.leaves for c in leaf.coords)
        if call.name in _CHOICES and rank and isinstance(state, Units):
            moved = {dims_of(arguments(call).get("dim", -1), rank)[0]}
            chosen = self.b.reduce(state, x, rank, moved, _label(call))
            return [chosen for _ in call.outs]
        if call.name.startswith("_fft") and isinstance(state, Units):
            mixed = {d % rank for d in arguments(call)["dim"]}
            if any(varying(a, rank) & mixed for a in arrays):
                return [self.b.reduce(state, x, rank, mixed, _label(call))]
        for a in arrays:
            if any(x.shape[d] != out.shape[d] for d in varying(a, rank)):
                raise Lost
        if isinstance(state, Weight):
            return [blend([state], _label(call)), *[None] * (len(call.outs) - 1)]
        if call.name not in _DROPPED:
            state = replace(state, trail=extend(state.trail, _label(call)), fresh=False)
        return [state, *[None] * (len(call.outs) - 1)]

    def _reduce(self, call: Call) -> list[State]:
        bound = arguments(call)
        x = call.ins[0]
        rank = len(x.shape)
        dims = set(dims_of(bound.get("dim"), rank))
        state = self.of(x)
        gone = () if bound.get("keepdim") else tuple(sorted(dims))
        name = _label(call)
        if isinstance(state, Weight):
            return [reduce_weight(state, rank, dims, gone, name)] * len(call.outs)
        if not isinstance(state, Units):
            return [None] * len(call.outs)
        new = self.b.reduce(state, x, rank, dims, name)
        return [map_state(new, lambda a: drop(a, dims, gone)) for _ in call.outs]

    def _glu(self, call: Call) -> State:
        x, out = call.ins[0], call.outs[0]
        d = arguments(call)["dim"] % len(x.shape)
        half = x.shape[d] // 2
        state = self._units(x, {d}, call)
        first = map_state(state, lambda a: slices(a, d, 0, half))
        second = map_state(state, lambda a: slices(a, d, half, 2 * half))
        assert isinstance(first, Units) and isinstance(second, Units)
        items = [(replace(u, fresh=False), False) for u in (first, second)]
        return self.b.join(items, out, "glu", linear=False, ordered=True)

    def _patches(self, call: Call) -> list[State]:
        x, out = call.ins[0], call.outs[0]
        state = self.of(x)
        if call.name == "as_strided":
            if x.shape != out.shape:
                raise Lost
            return [state]
        taps = int(np.prod(arguments(call)["kernel_size"]))

        def patch(a: Ids) -> Ids:
            if call.name == "im2col":
                a = a.reshape(a.shape[0], a.shape[1], 1)
                return np.repeat(a, taps, 1) if a.shape[1] > 1 else a
            return a[:, :: taps if a.shape[1] > 1 else 1, :, None]

        return [map_state(state, patch)]

    # ------------------------------------------------------------------- joining

    def _cat(self, call: Call) -> State:
        out = call.outs[0]
        rank = len(out.shape)
        values = [v for v in call.args[0] if v.shape != (0,)]
        d = arguments(call)["dim"] % rank
        states = [self.of(v) for v in values]
        if call.name == "stack":
            states = [map_state(s, lambda a: np.expand_dims(a, d)) for s in states]
            sizes = [1] * len(values)
        else:
            sizes = [v.shape[d] for v in values]
        units = [s for s in states if isinstance(s, Units)]
        if not units:
            return join_weights(states, sizes, d, rank)
        return self._cat_units(states, sizes, d, out)

    def _cat_units(self, states: list[State], sizes: list[int], d: int, out: Value) -> State:
        rank = len(out.shape)
        states = [self.b.realise(s, rank) if isinstance(s, Units) else s for s in states]
        units = [s for s in states if isinstance(s, Units)]
        count = max(len(u.tracks) for u in units)
        if any(len(u.tracks) != count for u in units):
            raise Lost
        along = any(t.shape[d] > 1 for u in units for t in u.tracks)
        tracks: list[Ids] = []
        for i in range(count):
            parts = [s.tracks[i] if isinstance(s, Units) else None for s in states]
            filled = [p for p in parts if p is not None]
            if not along and all(p is filled[0] or np.array_equal(p, filled[0]) for p in filled):
                tracks.append(filled[0])
                continue
            full = list(np.broadcast_shapes(*(_but(p.shape, d) for p in filled)))
            pieces = []
            for p, n in zip(parts, sizes, strict=True):
                full[d] = n
                pieces.append(np.full(full, -1) if p is None else np.broadcast_to(p, full))
            tracks.append(np.concatenate(pieces, d))
        start = 0
        for s, n in zip(states, sizes, strict=True):
            if isinstance(s, Weight):
                if along:
                    raise Lost
                self.b.feature(s, tracks, rank, "token", "token")
            start += n
        trails = {u.trail for u in units}
        trail = trails.pop() if len(trails) == 1 else ""
        if trails:
            trail = extend("", "cat(" + ",".join(u.trail for u in units) + ")")
        return Units(tuple(tracks), trail)

    # ------------------------------------------------------------------- results

    def outputs(self, values: list[Value]) -> dict[int, list[str]]:
        """Numbers of the sets that the module returns, each with what was applied to them last."""
        found: dict[int, list[str]] = {}
        for value in values:
            state = self.of(value)
            if isinstance(state, Units):
                state = self.b.realise(state, len(value.shape))
                for t in state.tracks:
                    for number in np.unique(self.b.sets.each(np.maximum(t, 0))).tolist():
                        found.setdefault(number, []).append(state.trail)
        return found


def _but(shape: Sequence[int], d: int) -> tuple[int, ...]:
    return tuple(1 if i == d else n for i, n in enumerate(shape))


def _check(value: Value, state: State) -> None:
    arrays = state.tracks if isinstance(state, Units) else ()
    for a in arrays:
        if any(n not in (1, size) for n, size in zip(a.shape, value.shape, strict=True)):
            raise AssertionError(f"units {a.shape} of a value of shape {value.shape}")


def _label(call: Call) -> str:
    """Operator with its numbers: what distinguishes one use from another."""
    numbers = [
        f"{x:g}" if isinstance(x, float) else str(x).replace(" ", "")
        for x in (*call.args, *call.kwargs.values())
        if isinstance(x, int | float | str)
        and not isinstance(x, bool)
        or (isinstance(x, list | tuple) and x and all(isinstance(y, int) for y in x))
    ]
    if call.name in ("eq", "ne", "index_add"):  # numbers of experts, in no particular order
        return call.name
    return call.name.strip("_") + (f"({','.join(numbers)})" if numbers else "")
