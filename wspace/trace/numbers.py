"""Whole numbers that remember where they come from, and a run in which a module computes with them.

The code of a module holds numbers besides its tensors: how many heads to view an axis as, how wide
a zero state has to be. To change a size, those numbers must be found. Here the module is run with
every whole number that it keeps replaced by a `Number`, an `int` that remembers the attribute it
was read from and what was computed with it. Sizes of tensors are such numbers too. Where one of
them, or a plain number of the code, says how long a dimension is, a `Demand` is written down.
"""

# pyright: reportPrivateUsage=false

import operator
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

from torch import Tensor, nn

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
