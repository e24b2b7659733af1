"""Runs a module once and writes down every operator as a flat list of `Call` records.

This is the only file that knows how PyTorch dispatches. It owns the choice of what is computed
for real and what is only shaped:

- a value that depends on a parameter or a float buffer is *active*: in the abstract mode it is a
  meta tensor, so no weight is read, allocated or multiplied;
- a value that depends only on inputs or constants (token ids, positions, masks) stays real, so
  Python control flow on it works;
- where control flow depends on an active value the abstract mode cannot go on, and the module is
  run again with everything real (`Program.concrete`).

Operators are recorded below autograd, as `torch.ops.aten` overloads: one closed, typed vocabulary,
whatever Python names the module used. Values are recorded, not names, so hooks, parametrizations
and functional code need no special case.
"""

# pyright: reportPrivateUsage=false
# PyTorch's dispatch and module internals have no public names; they are used here only.

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from wspace.errors import TraceError, message
from wspace.trace.inputs import note_inputs
from wspace.trace.meta import MetaRunner
from wspace.trace.program import ACTIVE, CONST, INPUT, PARAM, Call, Program, Value, where
from wspace.trace.sandbox import (
    attributes_restored,
    dense_experts,
    evaluation_mode,
    persistent_float_buffers,
    state_restored,
    tensors_in,
    without_onednn,
)

Within = Callable[[Callable[[Tensor], Value]], AbstractContextManager[Any]]
"""Given what tells the value of a tensor, a context in which the module is run."""
Watch = Callable[[int, Call, list[Tensor]], None]
"""What is called after each operator of a run on real weights."""
_FACTORIES = frozenset(
    """
    zeros ones full empty empty_strided zeros_like ones_like full_like empty_like new_zeros
    new_ones new_full new_empty new_empty_strided scalar_tensor arange linspace eye rand randn
    rand_like randn_like tri_indices randint randperm lift_fresh
    """.split()
)
_UNIFORM = frozenset(
    """
    zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full
    new_empty
    """.split()
)


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    known: Callable[[str, OpOverload], bool] = lambda name, op: True,
    within: Within | None = None,
) -> Program:
    """Program of one evaluation-mode forward pass of `module`; the module is left as it was.

    Args:
        module: Module with real, meta or fake parameters.
        args: Example positional inputs; real tensors.
        kwargs: Example keyword inputs.
        known: Tells whether an operator has a rule; source lines are kept for the others.
        within: Makes a context for each run of the module.

    Returns:
        The recorded program.

    Raises:
        TraceError: If the module fails on these inputs, or needs weights that it does not have.
    """
    errors: list[Exception] = []
    for shaped in (False, True):  # fused operators want their inputs where their weights are
        try:
            return _run(module, args, kwargs, known, shaped=shaped, within=within)
        except Exception as error:  # any failure here may be the abstraction's own
            errors.append(error)
    if any(t.is_meta or _is_fake(t) for t in (*module.parameters(), *module.buffers())):
        raise TraceError(
            message(
                f"trace: {type(module).__name__} could not be run without its weights",
                expected="a forward pass whose control flow does not depend on weights",
                got=f"{type(errors[0]).__name__}: {errors[0]}",
                help="build the module with real weights (not on the meta device) and "
                "trace it again, or check that the example inputs fit its forward",
            )
        ) from errors[0]
    try:
        program = _run(module, args, kwargs, known, abstract=False, within=within)
    except Exception as error:
        raise TraceError(
            message(
                f"trace: {type(module).__name__} failed on the example inputs",
                expected="inputs that `module(*args, **kwargs)` accepts",
                got=f"{type(error).__name__}: {error}",
                help="call the module yourself with these inputs in eval mode first",
            )
        ) from error
    program.concrete = True
    program.reason = f"{type(errors[0]).__name__}: {errors[0]}"
    return program


def watched(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    known: Callable[[str, OpOverload], bool],
    watch: Watch | None = None,
) -> Program:
    """Program of an evaluation-mode forward pass on real weights, its results shown as they come.

    Args:
        module: Module with real parameters; left as it was.
        args: Positional inputs.
        kwargs: Keyword inputs.
        known: Tells whether an operator has a rule.
        watch: Called after each recorded operator with its number, its record and the tensors it
            made. They are the module's own: to be read at once, and not to be kept or written to.

    Returns:
        The recorded program, which holds no activation.
    """
    return _run(module, args, kwargs, known, abstract=False, watch=watch)


def _run(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    known: Callable[[str, OpOverload], bool],
    *,
    abstract: bool = True,
    shaped: bool = False,
    watch: Watch | None = None,
    within: Within | None = None,
) -> Program:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(attributes_restored(module))
        stack.enter_context(evaluation_mode(module))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(without_onednn())
        stack.enter_context(dense_experts(module))
        recorder = _Recorder(module, known, abstract=abstract, watch=watch)
        stack.enter_context(state_restored(module, values=not abstract))
        leaves, spec = tree_flatten((args, dict(kwargs)))
        leaves = [
            recorder.add_input(x, shaped=shaped) if isinstance(x, Tensor) else x for x in leaves
        ]
        args, kwargs = tree_unflatten(leaves, spec)
        if shaped:
            recorder.shape_module(module)
        if not abstract:
            stack.enter_context(_Reads(recorder))
        stack.enter_context(recorder)
        if within is not None:
            stack.enter_context(within(recorder.value))
        result = module(*args, **kwargs)
    return recorder.finish(result)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _storage_key(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


class _Recorder(TorchDispatchMode):
    """Dispatch mode that runs each operator (shaped or for real) and records the active ones."""

    def __init__(
        self,
        module: nn.Module,
        known: Callable[[str, OpOverload], bool],
        *,
        abstract: bool,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.abstract = abstract
        self.watch = watch
        self.known = known
        self.program = Program()
        self._keep: list[Tensor] = []  # real tensors whose id or storage is a key below
        self._by_id: dict[int, Value] = {}
        self._by_storage: dict[int, Value] = {}
        self._twins: dict[int, Tensor] = {}
        self._names: dict[str, tuple[str, bool]] = {}
        self._run_meta = MetaRunner()
        self._tainted: set[int] = set()  # storages of constants that were written to
        self._add_state(module)

    # ------------------------------------------------------------------ values

    def _add_state(self, module: nn.Module) -> None:
        named = [*module.named_parameters(remove_duplicate=False)]
        named += persistent_float_buffers(module)
        for name, tensor in named:
            known = self._by_id.get(id(tensor))
            if known is None:
                known = self._alias_of_whole(tensor)
            if known is not None:
                known.names += (name,)
                continue
            value = Value(tensor, PARAM, (name,))
            self.program.params.append(value)
            self._remember(tensor, value)

    def _alias_of_whole(self, tensor: Tensor) -> Value | None:
        key = _storage_key(tensor)
        value = None if key is None else self._by_storage.get(key)
        if value is None or tensor.numel() == 0 or tensor.is_meta:
            return None
        base = self._keep[value.origin]
        same = base.shape == tensor.shape and base.stride() == tensor.stride()
        if same and base.storage_offset() == tensor.storage_offset():
            self._by_id[id(tensor)] = value
            self._keep.append(tensor)
            return value
        return None

    def _remember(self, tensor: Tensor, value: Value) -> None:
        value.origin = len(self._keep)
        self._keep.append(tensor)
        self._by_id[id(tensor)] = value
        key = _storage_key(tensor)
        if key is not None:
            self._by_storage.setdefault(key, value)

    def shape_module(self, module: nn.Module) -> None:
        """Puts meta stand-ins in the place of parameters; `attributes_restored` takes them out."""
        for m in module.modules():
            lists = [x for x in m.__dict__.values() if isinstance(x, list)]
            for name, p in m._parameters.items():
                if p is not None:
                    m._parameters[name] = self._shaped(p)  # type: ignore[assignment]
                    for held in lists:  # recurrent modules keep a second reference
                        held[:] = [m._parameters[name] if x is p else x for x in held]

    def add_input(self, tensor: Tensor, *, shaped: bool) -> Tensor:
        """The tensor to pass to the module in place of input `tensor`, registered as an input."""
        if tensor.is_meta or _is_fake(tensor):
            raise TraceError("trace: example inputs must be real tensors (got a meta tensor)")
        meta = shaped and tensor.is_floating_point()
        fresh = torch.empty_like(tensor, device="meta") if meta else tensor.detach().clone()
        fresh._wspace = self.program.add_input(Value(fresh, INPUT))  # type: ignore[attr-defined]
        return fresh

    def value(self, tensor: Tensor) -> Value:
        """What a tensor of the run holds."""
        value = self._by_id.get(id(tensor)) or getattr(tensor, "_wspace", None)
        if value is not None:
            tainted = self._tainted and value.kind in (CONST, INPUT)
            if tainted and _storage_key(tensor) in self._tainted:
                return self._assign(tensor, Value(tensor, ACTIVE))
            return value
        alias = self._by_storage.get(_storage_key(tensor) or 0)
        if alias is not None:  # `.data`, `.detach()` taken outside the recorder
            base = self._keep[alias.origin]
            if base.shape == tensor.shape and base.stride() == tensor.stride():
                self._by_id[id(tensor)] = alias
                self._keep.append(tensor)
                return alias
            raise TraceError(
                f"trace: the module reads part of {alias.names[0]!r} through an untracked view"
            )
        value = Value(tensor, CONST)
        self._by_id[id(tensor)] = value  # not an attribute: the tensor may be the module's own
        self._keep.append(tensor)
        return value

    def _assign(self, tensor: Tensor, value: Value) -> Value:
        """Says what a tensor holds from now on."""
        if id(tensor) in self._by_id:
            self._by_id[id(tensor)] = value
        else:
            tensor._wspace = value  # type: ignore[attr-defined]
        return value

    def _shaped(self, tensor: Tensor) -> Tensor:
        """Meta stand-in of a real tensor: cached for parameters, made on the spot for the rest."""
        if tensor.is_meta and not _is_fake(tensor):
            return tensor
        value = self.value(tensor)
        twin = self._twins.get(id(value)) if value.kind == PARAM else None
        if twin is None:
            twin = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            twin._wspace = value  # type: ignore[attr-defined]
            if value.kind == PARAM:
                self._twins[id(value)] = twin
        return twin

    # ---------------------------------------------------------------- dispatch

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        tensors = [x for x in _leaves(args, kwargs) if isinstance(x, Tensor)]
        values = [self.value(t) for t in tensors]
        name, inplace = self._describe(func)
        if name in _FACTORIES and name != "lift_fresh":
            return self._factory(func, name, args, kwargs, values)
        if not any(v.kind in (PARAM, ACTIVE) for v in values):
            kind = INPUT if any(v.kind == INPUT for v in values) else CONST
            if any(t.is_meta for t in tensors):  # constants of a module on the meta device
                args = _map(self._shaped, args)
                kwargs = {k: _map(self._shaped, v) for k, v in kwargs.items()}
                device = "meta"
            else:
                device = "cpu"
            if self.abstract and kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": torch.device(device)}
            out = self._mark(func(*args, **kwargs), kind)
            made = [self.value(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
            note_inputs(self.program, name, values, made, inplace=inplace)
            return out
        has_rule = self.known(name, func)
        if not has_rule and (out := self._decompose(func, args, kwargs)) is not NotImplemented:
            return out
        return self._record(func, name, args, kwargs, inplace=inplace, has_rule=has_rule)

    def _decompose(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Result of an operator run through its decomposition, whose operators are recorded."""
        from torch._decomp import decomposition_table as table

        with self:
            if func in table:
                return table[func](*args, **kwargs)
            return func.decompose(*args, **kwargs)

    def _record(
        self, func: OpOverload, name: str, args: Any, kwargs: Any, *, inplace: bool, has_rule: bool
    ) -> Any:
        if inplace:
            self._overwrite(args[0])
        recorded = _map(self.value, args), {k: _map(self.value, v) for k, v in kwargs.items()}
        ins = [v for v in _leaves(*recorded) if isinstance(v, Value)]
        target = args[0] if inplace else None
        if self.abstract:
            args = _map(self._shaped, args)
            kwargs = {k: _map(self._shaped, v) for k, v in kwargs.items()}
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": torch.device("meta")}
        out = self._run_meta(func, args, kwargs) if self.abstract else func(*args, **kwargs)
        made = [t for t in _leaves((out,), {}) if isinstance(t, Tensor)]
        outs = [self._output(t) for t in made]
        call = Call(func, name, recorded[0], recorded[1], ins, outs, inplace)
        if not has_rule:
            call.source = where()
        self.program.calls.append(call)
        if self.watch is not None:
            self.watch(len(self.program.calls) - 1, call, made)
        if isinstance(target, Tensor) and target is not out:
            self._assign(target, outs[0])
            return target
        return out

    def _describe(self, func: OpOverload) -> tuple[str, bool]:
        key = str(func)
        known = self._names.get(key)
        if known is None:
            base = func._schema.name.removeprefix("aten::")  # others keep their namespace
            inplace = base.endswith("_") and not base.endswith("__")
            known = self._names[key] = (base[:-1] if inplace else base, inplace)
        return known

    def _output(self, tensor: Tensor) -> Value:
        return self._assign(tensor, Value(tensor, ACTIVE))

    def _mark(self, out: Any, kind: str) -> Any:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._assign(tensor, Value(tensor, kind))
        return out

    def _overwrite(self, target: Tensor) -> None:
        """A constant that is written to is no constant: it and its other views are fixed."""
        value = self.value(target)
        self.program.overwritten |= value.inputs
        if value.kind in (CONST, INPUT) and (key := _storage_key(target)) is not None:
            self._keep.append(target)
            self._tainted.add(key)
            self._assign(target, Value(target, ACTIVE))

    def _factory(
        self, func: OpOverload, name: str, args: Any, kwargs: Any, values: list[Value]
    ) -> Any:
        """Float tensors of one repeated value are active and uniform; the rest are constants."""
        recorded = _map(self.value, args), {k: _map(self.value, v) for k, v in kwargs.items()}
        device = kwargs.get("device") or (args[0].device if values else torch.device("cpu"))
        if self.abstract:
            args = _map(_dense, args)
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*args, **kwargs)
        if name not in _UNIFORM or not out.is_floating_point() or out.numel() < 2:
            return self._mark(out, CONST)
        if self.abstract and device.type == "meta":
            out = torch.empty_like(out, device="meta")  # where the module expects it
        call = Call(func, "uniform", recorded[0], recorded[1], values, [self._output(out)])
        self.program.calls.append(call)
        return out

    def read(self, tensor: Tensor) -> None:
        """Records that the module looks at the entries of a tensor, one by one."""
        value = self.value(tensor)
        if value.kind in (PARAM, ACTIVE):
            op = torch.ops.aten._local_scalar_dense.default
            self.program.calls.append(Call(op, "_local_scalar_dense", (value,), {}, [value], []))

    # ------------------------------------------------------------------ result

    def finish(self, result: Any) -> Program:
        """The program, once the module has returned `result`."""
        for leaf in tensors_in(result):
            value = self.value(leaf)
            if value.kind in (PARAM, ACTIVE):
                self.program.outputs.append(value)
        return self.program


class _Reads(TorchFunctionMode):
    """Mode that records where a module takes numbers out of tensors past the dispatcher."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self.recorder.read(args[0])
        return func(*args, **(kwargs or {}))


def _dense(tensor: Tensor) -> Tensor:
    """A real tensor of the same shape, for factories that copy only shape and dtype."""
    if tensor.is_meta or _is_fake(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return tensor


def _map(function: Callable[[Tensor], Any], x: Any) -> Any:
    """`function` applied to the tensors among an operator's arguments (in lists, too)."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, list | tuple):
        return type(x)(_map(function, y) for y in x)
    return x


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
    for x in (*args, *kwargs.values()):
        if isinstance(x, list | tuple):
            yield from x
        else:
            yield x
