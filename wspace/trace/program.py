"""The record of a run: values, and the calls between them. Made by `capture`, read by the rest."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_TORCH_DIR = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)

PARAM, ACTIVE, INPUT, CONST = "param", "active", "input", "const"


class Value:
    """One tensor of the program: shape, dtype, where it came from, and later its axes.

    Attributes:
        shape: Sizes.
        dtype: Element type.
        kind: ``"param"`` (parameter or float buffer), ``"active"`` (depends on one),
            ``"input"`` (depends on module inputs only) or ``"const"`` (on neither).
        names: Qualified names, for a parameter or buffer; several when tied.
        data: The real tensor, for inputs and constants; otherwise None.
        axes: Filled in by the solver: one axis per dimension.
        points: Axis that the entries are indices into (argmax, top-k), or None.
        inputs: Of an input: numbers of the module's input tensors that it is computed from.
        whole: Of an input: its last axis is that of the module's input, entry by entry.
    """

    __slots__ = ("axes", "data", "dtype", "inputs", "kind", "names", "origin", "points", "shape",
                 "whole")  # fmt: skip

    def __init__(self, tensor: Tensor, kind: str, names: tuple[str, ...] = ()) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.kind = kind
        self.names = names
        known = kind in (INPUT, CONST) and not tensor.is_meta
        self.data: Tensor | None = tensor if known else None
        self.axes: Any = None
        self.origin: Any = None
        self.points: Any = None
        self.inputs: frozenset[int] = frozenset()
        self.whole = False

    def __repr__(self) -> str:
        return f"Value({self.kind}, {list(self.shape)}{', ' + self.names[0] if self.names else ''})"


@dataclass(slots=True)
class Call:
    """One executed operator: `op` applied to `args`, in which tensors are `Value` objects.

    Attributes:
        op: The overload, e.g. ``aten.convolution.default``.
        name: Name without overload, and without namespace for aten: ``convolution``, ``my::op``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        ins: Input values, flattened, in order.
        outs: Output values, flattened, in order.
        inplace: True if the operator writes to its first argument.
        source: ``file:line in function`` of the user's code, when it was asked for.
    """

    op: OpOverload
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ins: list[Value]
    outs: list[Value]
    inplace: bool = False
    source: str = ""


@dataclass(slots=True)
class Program:
    """A run of a module: its calls in order, its parameters, and what it returned.

    Attributes:
        calls: Operators in execution order.
        params: Every parameter and float buffer of the module, used or not; ties share a value.
        outputs: Values among the module's outputs (those that depend on parameters).
        inputs: The tensors among the module's inputs, in order.
        overwritten: Numbers of the inputs that an operator wrote to.
        concrete: True if real weights had to be run, because control flow depends on them.
        reason: Why the abstract run was given up, when `concrete`.
    """

    calls: list[Call] = field(default_factory=list)
    params: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    overwritten: set[int] = field(default_factory=set)
    concrete: bool = False
    reason: str = ""

    def add_input(self, value: Value) -> Value:
        """The value, counted among the module's inputs."""
        value.inputs, value.whole = frozenset((len(self.inputs),)), True
        self.inputs.append(value)
        return value


def where() -> str:
    """``file:line in function`` of the innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH_DIR, _HERE)) and not file.startswith("<"):
            return f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        frame = frame.f_back
    return ""
