"""Whole numbers that remember where they come from, and a run in which a module computes with them.

The code of a module holds numbers besides its tensors: how many heads to view an axis as, how wide
a zero state has to be. To change a size, those numbers must be found. Here the module is run with
every whole number that it keeps replaced by a `Number`, an `int` that remembers the attribute it
was read from and what was computed with it. Sizes of tensors are such numbers too. Where one of
them, or a plain number of the code, says how long a dimension is, a `Demand` is written down.
"""

# pyright: reportPrivateUsage=false

import operator
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wspace.trace.program import Value, where


@dataclass(frozen=True, slots=True)
class Attribute:
    """A whole number that a module keeps.

    Attributes:
        path: Qualified name of the submodule.
        chain: Attributes that lead there from it: ``("num_heads",)``, ``("config", "n_embd")``.
        index: Place in a tuple or list; None for a number.
        value: The number.
    """

    path: str
    chain: tuple[str, ...]
    index: int | None
    value: int

    def write(self, module: nn.Module, value: int) -> None:
        """Sets the number in a module that keeps it in the same place.

        A config is written past its own checks: it may refuse or compute when it is set.

        Args:
            module: The module.
            value: The new number.
        """
        held: Any = module.get_submodule(self.path)
        *chain, name = self.chain
        for step in chain:
            held = held[step] if isinstance(held, dict) else getattr(held, step)
        inside = cast(dict[str, Any], held if isinstance(held, dict) else held.__dict__)
        whole: Any = value
        if self.index is not None:
            now = inside[name] if name in inside else getattr(held, name)
            whole = [value if i == self.index else x for i, x in enumerate(now)]
            whole = type(now)(whole)
        inside[name] = whole

    def __str__(self) -> str:
        at = "" if self.index is None else f"[{self.index}]"
        return ".".join((*([self.path] if self.path else []), *self.chain)) + at


@dataclass(frozen=True, slots=True)
class Length:
    """The length of a dimension of a value, as a number of the code."""

    value: Value
    dim: int


@dataclass(frozen=True, slots=True)
class Computed:
    """A number computed from two others."""

    op: str
    a: "Expression"
    b: "Expression"


Expression = int | Attribute | Length | Computed
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


class Number(int):
    """A whole number that remembers how it was come by; behaves as an `int` everywhere."""

    _of: "Expression"
    _run: "Numbers"

    def __new__(cls, value: int, of: Expression, run: "Numbers") -> "Number":
        """The number `value` with its history."""
        made = super().__new__(cls, value)
        made._of, made._run = of, run
        return made

    def __float__(self) -> float:
        self._run.floated(self)
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        self._run.floated(self)
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self._run.floated(self)
        return other / int(self)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self._run.floated(self)
        return pow(int(self), other, modulo)

    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        if isinstance(other, Number):
            self._run.compare(self, other, equal=equal)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __neg__(self) -> Any:
        return 0 - self

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _whole(x: Any) -> TypeGuard[int]:
    return type(x) in (int, Number)


def _arithmetic(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    compute = OPERATIONS[name]

    def forward(self: Number, other: Any) -> Any:
        if not _whole(other):
            if isinstance(other, float):
                self._run.floated(self)
            return NotImplemented if isinstance(other, Tensor) else compute(int(self), other)
        return self._run.number(compute(int(self), int(other)), Computed(name, self._of, of(other)))

    def backward(self: Number, other: Any) -> Any:
        if not _whole(other):
            if isinstance(other, float):
                self._run.floated(self)
            return compute(other, int(self))
        return self._run.number(compute(int(other), int(self)), Computed(name, of(other), self._of))

    return forward, backward


for _name in OPERATIONS:
    _forward, _backward = _arithmetic(_name)
    setattr(Number, f"__{_name}__", _forward)
    setattr(Number, f"__r{_name}__", _backward)


def of(number: int) -> Expression:
    """The history of a number; a plain one is itself."""
    return number._of if isinstance(number, Number) else int(number)


@dataclass(frozen=True, slots=True)
class Demand:
    """A number that says how long a dimension is.

    Attributes:
        number: The number, with its history.
        value: The tensor.
        dim: Its dimension.
        part: ``"whole"``, or ``"first"`` or ``"last"`` for a number that only says how many slow
            (groups of a convolution) or fast (repeats) indices there are.
        source: Where in the code, for a plain number.
    """

    number: Expression
    value: Value
    dim: int
    part: str = "whole"
    source: str = ""


@dataclass
class Numbers:
    """What a run was seen to compute with whole numbers.

    Attributes:
        demands: Numbers that say how long a dimension is.
        scales: Numbers that became floats or multiplied tensors.
        dots: Queries of attention that is divided by the root of their last dimension.
        chosen: How many indices are chosen along which dimension of which value.
        compared: Two numbers that were compared, whether they were equal, and where.
    """

    demands: list[Demand] = field(default_factory=list)
    scales: list[tuple[Expression, str]] = field(default_factory=list)
    dots: list[Value] = field(default_factory=list)
    chosen: list[tuple[int, Value, int]] = field(default_factory=list)
    compared: list[tuple[Expression, Expression, bool, str]] = field(default_factory=list)
    active: bool = True

    def number(self, value: int, expression: Expression) -> int:
        """The number with its history, as long as the run lasts."""
        return Number(value, expression, self) if self.active else value

    def floated(self, number: Number) -> None:
        """Notes that a number became a factor."""
        if self.active:
            self.scales.append((number._of, where()))

    def compare(self, a: Number, b: Number, *, equal: bool) -> None:
        """Notes that the code asked whether two numbers of this run are equal."""
        if self.active and a._run is b._run and a._of != b._of:
            self.compared.append((a._of, b._of, equal, where()))


# -------------------------------------------------------------------- the module's own

_TORCH = frozenset(nn.Module().__dict__)
"""Attributes that every module has: parameters, hooks, submodules."""


@contextmanager
def remembered(module: nn.Module, run: Numbers) -> Generator[None]:
    """Context in which the whole numbers that a module keeps are `Number` objects.

    Submodules get their attributes back through `attributes_restored`; other objects here.

    Yields:
        Nothing.
    """
    replaced: list[tuple[dict[str, Any], dict[str, Any]]] = []
    seen: set[int] = set()
    try:
        for path, m in module.named_modules():
            own = cast(dict[str, Any], m.__dict__)
            _replace(own, path, (), run)
            for name, x in _class_numbers(type(m)):
                own.setdefault(name, _remember(x, path, (name,), run))
            for name, held in list(own.items()):
                if name in _TORCH:
                    continue
                _descend(held, path, (name,), run, replaced, seen)
        yield
    finally:
        run.active = False
        for target, before in replaced:
            target.clear()
            target.update(before)


def _descend(
    held: Any, path: str, chain: tuple[str, ...], run: Numbers, replaced: list[Any], seen: set[int]
) -> None:
    """Replaces the numbers of a plain object (a config) and of those inside it."""
    if id(held) in seen or len(chain) > 3:
        return
    if isinstance(held, dict):
        inside = cast(dict[str, Any], held)
    elif hasattr(held, "__dict__") and not isinstance(held, nn.Module | Tensor | type):
        if callable(held) or type(held).__module__.startswith(("torch.", "builtins")):
            return
        inside = cast(dict[str, Any], held.__dict__)
    else:
        return
    if not all(isinstance(name, str) for name in cast(dict[Any, Any], inside)):
        return
    seen.add(id(held))
    replaced.append((inside, dict(inside)))
    _replace(inside, path, chain, run)
    for name, x in list(inside.items()):
        _descend(x, path, (*chain, name), run, replaced, seen)


def _class_numbers(kind: type) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for name, x in vars(base).items():
            if not name.startswith("_") and _numeric(x):
                yield name, x


def _replace(attributes: dict[str, Any], path: str, chain: tuple[str, ...], run: Numbers) -> None:
    for name, x in attributes.items():
        if not name.startswith("_") and _numeric(x):
            attributes[name] = _remember(x, path, (*chain, name), run)


def _numeric(x: Any) -> bool:
    if type(x) in (tuple, list):
        return bool(x) and all(type(y) is int for y in x)
    return type(x) is int


def _remember(x: Any, path: str, chain: tuple[str, ...], run: Numbers) -> Any:
    if type(x) is int:
        return Number(x, Attribute(path, chain, None, x), run)
    return type(x)(Number(y, Attribute(path, chain, i, y), run) for i, y in enumerate(x))


# --------------------------------------------------------------------------- the run

_LENGTHS = (Tensor.size, Tensor.shape.__get__)  # type: ignore[attr-defined]
_CONVOLUTIONS = (
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d,
)  # fmt: skip
_FACTORS = (
    Tensor.mul, Tensor.div, Tensor.__mul__, Tensor.__truediv__, Tensor.__rmul__, torch.mul,
    torch.div, Tensor.__rtruediv__, Tensor.add, Tensor.__add__, Tensor.mul_, Tensor.div_,
    Tensor.__pow__, torch.pow, torch.true_divide, Tensor.true_divide,
)  # fmt: skip
_SHAPES = (
    (0, (torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn, torch.arange)),
    (1, (torch.reshape, torch.broadcast_to, Tensor.view, Tensor.reshape, Tensor.expand,
         Tensor.broadcast_to, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty,
         Tensor.new_full)),
)  # fmt: skip
"""Functions with a shape among their arguments, and where it starts."""


class Watching(TorchFunctionMode):
    """Mode that hands out lengths as `Number` objects and writes down what they are used for."""

    def __init__(self, run: Numbers, value_of: Callable[[Tensor], Value]) -> None:
        super().__init__()
        self.run, self.value_of = run, value_of
        self._rules: dict[Any, Callable[[_Call], None]] = {
            **{f: self._shape for _, functions in _SHAPES for f in functions},
            **dict.fromkeys((Tensor.unflatten, torch.unflatten), self._unflatten),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            **dict.fromkeys((F.group_norm, torch.group_norm), self._group_norm),
            **dict.fromkeys((F.layer_norm, torch.layer_norm, F.rms_norm), self._norm),
            **dict.fromkeys((F.one_hot,), self._one_hot),
            **dict.fromkeys(
                (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes),
                self._split,
            ),
            **dict.fromkeys((Tensor.narrow, torch.narrow), self._narrow),
            **dict.fromkeys((torch.repeat_interleave, Tensor.repeat_interleave), self._repeat),
            **dict.fromkeys(_FACTORS, self._factor),
            **dict.fromkeys((torch.chunk, Tensor.chunk), self._chunks),
            **dict.fromkeys((torch.topk, Tensor.topk), self._choice),
            Tensor.__getitem__: self._slices,
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._heads,
        }
        self._starts = {f: start for start, functions in _SHAPES for f in functions}

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LENGTHS:
            return self._lengths(args[0], func(*args, **kwargs), *args[1:], **kwargs)
        out = func(*args, **kwargs)
        if (rule := self._rules.get(func)) is not None:
            rule(_Call(func, args, kwargs, out))
        return out

    def _lengths(self, tensor: Tensor, found: Any, dim: int | None = None) -> Any:
        value = self.value_of(tensor)
        if isinstance(found, int):
            return self.run.number(found, Length(value, (dim or 0) % tensor.dim()))
        return torch.Size([self.run.number(n, Length(value, i)) for i, n in enumerate(found)])

    def _demand(self, number: Any, tensor: Any, dim: int, part: str = "whole") -> None:
        if isinstance(tensor, Tensor) and isinstance(number, int) and number not in (-1, 1):
            source = "" if isinstance(number, Number) else where()
            value = self.value_of(tensor)
            self.run.demands.append(Demand(of(number), value, dim % tensor.dim(), part, source))

    # -------------------------------------------------------------------- rules

    def _shape(self, call: "_Call") -> None:
        rest = call.args[self._starts[call.func] :]
        named = [x for k in ("shape", "size") if isinstance(x := call.kwargs.get(k), list | tuple)]
        sizes = [*named, *rest][0] if named or rest and isinstance(rest[0], list | tuple) else rest
        if isinstance(call.out, Tensor) and len(sizes) == call.out.dim():
            for i, n in enumerate(sizes):
                if isinstance(n, int) and int(n) == call.out.shape[i]:
                    self._demand(n, call.out, i)

    def _unflatten(self, call: "_Call") -> None:
        dim = call.get("dim", 1, 0) % call.args[0].dim()
        for i, n in enumerate(call.get("sizes", 2, ())):
            self._demand(n, call.out, dim + i)

    def _convolution(self, call: "_Call") -> None:
        self._demand(call.get("groups", 6, 1), call.get("weight", 1, None), 0, "first")

    def _group_norm(self, call: "_Call") -> None:
        self._demand(call.get("num_groups", 1, 1), call.out, 1, "first")

    def _norm(self, call: "_Call") -> None:
        for i, n in enumerate(reversed(call.get("normalized_shape", 1, ()))):
            self._demand(n, call.out, -1 - i)

    def _one_hot(self, call: "_Call") -> None:
        self._demand(call.get("num_classes", 1, -1), call.out, -1)

    def _split(self, call: "_Call") -> None:
        size = call.get("split_size_or_sections", 1, None) or call.get("split_size", 1, ())
        sizes = size if isinstance(size, list | tuple) else [size] * len(call.out)
        for n, part in zip(sizes, call.out, strict=False):
            if int(n) == part.shape[call.get("dim", 2, 0)]:
                self._demand(n, part, call.get("dim", 2, 0))

    def _chunks(self, call: "_Call") -> None:
        x, count, dim = call.args[0], call.get("chunks", 1, 1), call.get("dim", 2, 0)
        length = Computed("floordiv", Length(self.value_of(x), dim % x.dim()), int(count))
        for part in call.out if x.shape[dim] % count == 0 else ():
            self._demand(self.run.number(part.shape[dim], length), part, dim)

    def _choice(self, call: "_Call") -> None:
        x, dim = call.args[0], call.get("dim", 2, -1)
        self.run.chosen.append((int(call.get("k", 1, 1)), self.value_of(x), dim % x.dim()))

    def _narrow(self, call: "_Call") -> None:
        self._demand(call.get("length", 3, -1), call.out, call.get("dim", 1, 0))

    def _repeat(self, call: "_Call") -> None:
        repeats, dim = call.get("repeats", 1, -1), call.get("dim", 2, None)
        if isinstance(repeats, int) and dim is not None:
            self._demand(repeats, call.out, dim, "last")

    def _attention(self, call: "_Call") -> None:
        if call.get("scale", 6, None) is None:
            self.run.dots.append(self.value_of(call.args[0]))

    def _factor(self, call: "_Call") -> None:
        for x in call.args[1:2]:
            if isinstance(x, Number):
                self.run.floated(x)

    def _heads(self, call: "_Call") -> None:
        """`nn.MultiheadAttention` has one width for its input, its heads and its output."""
        query, width, heads, packed, out = (call.args[i] for i in (0, 3, 4, 5, 11))
        for tensor, dim in ((query, -1), (out, 1), (out, 0)):
            self._demand(width, tensor, dim)
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self._demand(width, call.kwargs.get(name), 0)
        if isinstance(packed, Tensor):
            for i in range(3):
                self._demand(width, packed[i * int(width) : (i + 1) * int(width)], 0)
        self._demand(heads, out, 1, "first")

    def _slices(self, call: "_Call") -> None:
        """What a slice with a number at an end leaves is as long as the ends say."""
        x, key = call.args[0], call.args[1]
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, Tensor | list) for k in keys) or not isinstance(call.out, Tensor):
            return
        used = sum(k is not None and k is not Ellipsis for k in keys)
        dim = place = 0
        for k in keys:
            if k is Ellipsis:
                place += x.dim() - used
                dim += x.dim() - used
            elif k is None:
                place += 1
            elif isinstance(k, slice):
                if x.shape[dim] != call.out.shape[place] and k.step in (None, 1):
                    self._demand(self._ends(k, x, dim), call.out, place)
                dim, place = dim + 1, place + 1
            else:
                dim += 1

    def _ends(self, k: slice, x: Tensor, dim: int) -> int:
        """Length of a slice, as a number of the code."""
        whole = self.run.number(x.shape[dim], Length(self.value_of(x), dim))
        start, stop = k.start or 0, whole if k.stop is None else k.stop
        start = start if start >= 0 else whole + start
        stop = stop if stop >= 0 else whole + stop
        return stop - start if start else stop


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that the mode saw."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def get(self, name: str, place: int, default: Any) -> Any:
        """An argument by name or place."""
        return self.kwargs.get(name, self.args[place] if len(self.args) > place else default)
