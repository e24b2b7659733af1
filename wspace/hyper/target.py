"""The target of a hypernetwork: which of its tensors are generated, shared, and left alone.

Owns the choice (`selected`), the description of what has to be made (`Weight`), and the copy of the
target without those parameters (`skeleton`). What makes them is in `heads`.
"""

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.space import Role, WeightSpace

Pattern = str | type[nn.Module]
Select = Pattern | Sequence[Pattern] | Callable[[str, nn.Module, Tensor], bool]
"""Which parameters: globs on qualified names (``"*.weight"``), classes of modules (all parameters
in them, also as text, ``"type:Conv2d"``), or a function of name, owner and parameter."""

_PACKED: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.MultiheadAttention, 3),
    (nn.LSTM, 4),
    (nn.LSTMCell, 4),
    (nn.GRU, 3),
    (nn.GRUCell, 3),
)
"""Modules that keep several matrices of one fan-in in one tensor, and how many."""

_NORMS = (
    nn.modules.batchnorm._NormBase,  # pyright: ignore[reportPrivateUsage]
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Weight:
    """A tensor that is generated.

    Attributes:
        name: Qualified name, the first where it has several.
        shape: Sizes of its dimensions.
        role: How it is used.
        fan_in: Inputs that are summed in the layer it belongs to; also for the layer's bias.
        fan_out: Outputs that one input of that layer enters.
        bias: True if the layer's bias is generated as well.
        layer: Qualified name of the module that owns it.
        ties: Its other names.
        dtype: Type of its entries.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = Role.MATRIX
    fan_in: int = 1
    fan_out: int = 1
    bias: bool = False
    layer: str = ""
    ties: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return (self.name, *self.ties)


@dataclass(frozen=True)
class Coverage:
    """Which tensors of a target are generated, trained along, and left alone.

    Attributes:
        generated: Entries of each tensor that the head makes, by name.
        shared: Entries of each parameter that is trained with the hypernetwork.
        untouched: Entries of each frozen parameter and buffer.
    """

    generated: Mapping[str, int]
    shared: Mapping[str, int]
    untouched: Mapping[str, int]

    def __str__(self) -> str:
        parts = {k: getattr(self, k) for k in ("generated", "shared", "untouched")}
        total = sum(sum(part.values()) for part in parts.values())
        lines = [f"Coverage of {total:,} entries"]
        for kind, part in parts.items():
            entries = sum(part.values())
            share = 100 * entries / total if total else 0.0
            lines.append(f"  {kind:<10}{len(part):>5} tensors {entries:>12,}  {share:5.1f} %")
            lines += [f"    {name}  {n:,}" for name, n in part.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Found:
    """A parameter of a module under all its names.

    Attributes:
        names: Qualified names, in the module's order.
        owner: Module that owns it under the first of them.
        value: Itself.
    """

    names: tuple[str, ...]
    owner: nn.Module
    value: nn.Parameter


def parameters_of(module: nn.Module) -> list[Found]:
    """Every parameter of a module once, with all its names.

    Args:
        module: The module.

    Returns:
        In the module's order.

    Raises:
        HyperError: If a parameter has no shape yet.
    """
    owners = dict(module.named_modules(remove_duplicate=False))
    found: dict[int, tuple[list[str], nn.Module, nn.Parameter]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if isinstance(p, nn.parameter.UninitializedParameter):
            help = "run the module once, so that its lazy layers know their sizes"
            raise HyperError(message(f"hypernetwork: {name!r} has no shape yet", help=help))
        owner = owners[name.rpartition(".")[0]]
        found.setdefault(id(p), ([], owner, p))[0].append(name)
    return [Found(tuple(names), owner, p) for names, owner, p in found.values()]


def selected(module: nn.Module, select: Select, what: str) -> set[str]:
    """First names of the parameters that are chosen.

    Args:
        module: The module.
        select: What chooses them. ``"*"`` leaves out frozen parameters; other choices do not.
        what: What they are chosen for, for errors.

    Returns:
        Names; a parameter is chosen if one of its names is.

    Raises:
        HyperError: If a pattern chooses nothing.
    """
    found = parameters_of(module)
    if callable(select) and not isinstance(select, type):
        return {f.names[0] for f in found if any(select(n, f.owner, f.value) for n in f.names)}
    patterns: Iterable[Pattern] = [select] if isinstance(select, str | type) else select
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, type) or pattern.startswith("type:"):
            names = _of_class(module, pattern)
        elif pattern == "*":
            names = {n for f in found for n in f.names if f.value.requires_grad}
        else:
            names = {n for f in found for n in f.names if fnmatchcase(n, pattern)}
        if not names and pattern != "*":
            raise HyperError(_nothing(pattern, what, [n for f in found for n in f.names]))
        chosen |= {f.names[0] for f in found if names.intersection(f.names)}
    return chosen


def _of_class(module: nn.Module, kind: Pattern) -> set[str]:
    """Names of all parameters in modules of a class, which may be given by its name."""
    name = kind.removeprefix("type:") if isinstance(kind, str) else ""
    names: set[str] = set()
    for path, m in module.named_modules(remove_duplicate=False):
        fits = isinstance(m, kind) if isinstance(kind, type) else False
        if fits or any(c.__name__ == name for c in type(m).__mro__):
            inner = m.named_parameters(path, remove_duplicate=False)
            names |= {n for n, _ in inner}
    return names


def _nothing(pattern: Pattern, what: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(pattern), known, n=3)
    return message(
        f"hypernetwork: {what}={pattern!r} chooses no parameter of the target",
        expected="a glob on names, a class of modules, or 'type:ClassName'",
        got=near or list(known[:5]),
        help="names are those of target.named_parameters()",
    )


def weights_of(
    module: nn.Module, names: set[str], space: WeightSpace | None = None
) -> tuple[Weight, ...]:
    """Descriptions of parameters that are to be generated.

    Args:
        module: The target.
        names: First names of the parameters.
        space: Weight space of the target, for roles; without it they follow from the owner.

    Returns:
        In the module's order.

    Raises:
        HyperError: If a parameter is not of real floating point, or the space does not know it.
    """
    found = [f for f in parameters_of(module) if f.names[0] in names]
    wrong = [f"{f.names[0]} of {f.value.dtype}" for f in found if not f.value.is_floating_point()]
    if space is not None:
        wrong += [f"{f.names[0]}, unknown to the space" for f in found
                  if f.names[0] not in space.by_name]  # fmt: skip
    if wrong:
        raise HyperError(
            message(
                "hypernetwork: parameters that cannot be generated",
                expected="real floating-point parameters of the traced module",
                got=wrong,
                help="choose others with select=",
            )
        )
    layers = {f.names[0]: f.names[0].rpartition(".") for f in found}
    biases = {head for head, _, last in layers.values() if "bias" in last}
    return tuple(_weight(f, biases, space) for f in found)


def _weight(f: Found, biases: set[str], space: WeightSpace | None) -> Weight:
    layer, _, last = f.names[0].rpartition(".")
    role = _role(f, last) if space is None else space[f.names[0]].role
    if role is Role.STATISTIC or (role is Role.OTHER and f.value.dim() >= 2):
        role = _role(f, last)
    fan_in, fan_out = _fans(f, last)
    return Weight(
        name=f.names[0],
        shape=tuple(f.value.shape),
        role=role,
        fan_in=fan_in,
        fan_out=fan_out,
        bias=layer in biases,
        layer=layer,
        ties=f.names[1:],
        dtype=f.value.dtype,
    )


def _role(f: Found, last: str) -> Role:
    if isinstance(f.owner, nn.Embedding | nn.EmbeddingBag):
        return Role.TABLE
    if "bias" in last:
        return Role.SHIFT
    if isinstance(f.owner, _NORMS):
        return Role.SCALE
    if _normed(f.owner):
        return Role.SCALE if last == "original0" else Role.MATRIX
    return Role.MATRIX if f.value.dim() >= 2 else Role.OTHER


def _normed(owner: nn.Module) -> bool:
    """Whether a module holds the two tensors of a weight norm: lengths first, then directions."""
    if not isinstance(owner, nn.utils.parametrize.ParametrizationList):
        return False
    return type(owner[0]).__name__ == "_WeightNorm"


def _fans(f: Found, last: str) -> tuple[int, int]:
    """Fan-in and fan-out of the layer that owns a parameter; of itself if that is not known."""
    matrix = f.value
    if matrix.dim() < 2 or "bias" in last:
        others = [p for p in f.owner.parameters(recurse=False) if p.dim() >= 2]
        matching = [p for p in others if p.shape[0] == matrix.numel()] or others
        if not matching:
            return (1, 1) if isinstance(f.owner, _NORMS) else (max(1, matrix.numel()), 1)
        matrix = matching[-1]
    shape = list(matrix.shape)
    if isinstance(f.owner, nn.Embedding | nn.EmbeddingBag):
        return 1, shape[1]
    taps = prod(shape[2:])
    if getattr(f.owner, "transposed", False):  # (in, out / groups, taps)
        groups = cast(int, cast(Any, f.owner).groups)
        return max(1, shape[0] * taps // groups), shape[1] * taps
    groups = getattr(f.owner, "groups", 1) if taps != 1 or len(shape) > 2 else 1
    packed = next((k for kind, k in _PACKED if isinstance(f.owner, kind)), 1)
    packed = packed if shape[0] % packed == 0 else 1
    return prod(shape[1:]), max(1, shape[0] * taps // (packed * int(groups)))


def skeleton(module: nn.Module, weights: Sequence[Weight], shared: set[str]) -> nn.Module:
    """A copy of the target whose generated parameters are placeholders without memory.

    They hold NaN, so that running the copy without its weights cannot go unseen.

    Args:
        module: The target; it is not changed.
        weights: What is generated.
        shared: First names of parameters that stay trainable; all others are frozen.

    Returns:
        The copy.

    Raises:
        HyperError: If the target cannot be copied.
    """
    try:
        made = copy.deepcopy(module)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise HyperError(
            message(
                f"hypernetwork: {type(module).__name__} cannot be copied",
                got=str(error),
                help="weights computed by hooks (torch.nn.utils.weight_norm) have to be "
                "parametrizations (torch.nn.utils.parametrizations.weight_norm)",
            )
        ) from error
    for w in weights:
        values = placeholder(w, made.get_parameter(w.name))
        for name in w.names:
            owner, _, last = name.rpartition(".")
            part = made.get_submodule(owner)
            delattr(part, last)
            part.register_buffer(last, values, persistent=False)
    for f in parameters_of(made):
        f.value.requires_grad_(f.names[0] in shared)
    return made


def placeholder(weight: Weight, like: Tensor) -> Tensor:
    """NaN in the shape of a weight, in one entry of memory.

    Args:
        weight: The weight.
        like: Tensor whose device and type it gets.

    Returns:
        An expanded tensor.
    """
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(weight.shape)
