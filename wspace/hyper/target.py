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


_TABLES = (nn.Embedding, nn.EmbeddingBag)


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
        axis: Dimension of its units: 0, but 1 in tables, in transposed convolutions, and where the
            space, or the class (`transformers.pytorch_utils.Conv1D`), says so.
        spans: For lengths of a weight norm, how many entries one is the length of; else 0.
        mean: Of the target's own values, for vectors that are neither added nor looked up: about
            this they are made where there is no base. None if it is not known.
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
    axis: int = 0
    spans: int = 0
    mean: float | None = None

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

    @property
    def layer(self) -> str:
        """Name of the module that it belongs to, which may compute its weights from it."""
        return self.names[0].rpartition(".")[0].partition("parametrizations.")[0].removesuffix(".")

    @property
    def last(self) -> str:
        """The last part of its first name."""
        return self.names[0].rpartition(".")[2]


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
    patterns = _patterns(select, what)
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


def _patterns(select: object, what: str) -> list[Pattern]:
    single = isinstance(select, str | type)
    given: list[Any] = [select] if single or not isinstance(select, Iterable) else list(select)
    wrong = [repr(x) for x in given if not isinstance(x, str | type)]
    if wrong:
        raise HyperError(
            message(f"hypernetwork: {what} takes no such thing", got=wrong,
                    expected="globs, classes of modules, a list of these, or a function")
        )  # fmt: skip
    return given


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
    biases = {f.layer for f in found if "bias" in f.last}
    modules = dict(module.named_modules(remove_duplicate=False))
    targets = {} if space is None else _targets(space)
    first = {id(f.value): f.names[0] for f in parameters_of(module)}
    made: list[Weight] = []
    for f in found:
        layer = modules[f.layer]
        matrix = _matrix(f, layer)
        dims = targets.get(first[id(matrix)]) if id(matrix) in first else None
        turned = matrix is not None and _turned(layer, matrix, dims)
        made.append(_weight(f, layer, f.layer in biases, space, turned=turned))
    return tuple(made)


def _targets(space: WeightSpace) -> dict[str, set[int]]:
    """Dimensions of each parameter that run over units that it writes, where the space knows."""
    found: dict[str, set[int]] = {}
    for block in () if space.wiring is None else space.wiring.blocks:
        if block.param and block.source is not None:
            dims = found.setdefault(block.param, set())
            pairs = zip(block.of, block.roles, strict=True)
            dims |= {d for d, role in pairs if d >= 0 and role in {"target", "both"}}
    return found


def _turned(layer: nn.Module, matrix: Tensor, targets: set[int] | None) -> bool:
    """Whether the second dimension of a matrix, not the first, is that of its outputs."""
    if isinstance(layer, _TABLES) or getattr(layer, "transposed", False):
        return True
    if matrix.dim() != 2:
        return False
    return targets == {1} if targets else type(layer).__name__ == "Conv1D"


def _weight(
    f: Found, layer: nn.Module, bias: bool, space: WeightSpace | None, *, turned: bool
) -> Weight:
    role = _role(f, layer) if space is None else space[f.names[0]].role
    if role is Role.STATISTIC or (role is Role.OTHER and f.value.dim() >= 2):
        role = _role(f, layer)
    fan_in, fan_out = _fans(f, layer, turned=turned)
    return Weight(
        name=f.names[0],
        shape=tuple(f.value.shape),
        role=role,
        fan_in=fan_in,
        fan_out=fan_out,
        bias=bias,
        layer=f.layer,
        ties=f.names[1:],
        dtype=f.value.dtype,
        axis=1 if turned and f.value.dim() >= 2 else 0,
        spans=_spans(f),
        mean=_mean(f.value) if role in {Role.SCALE, Role.OTHER} and f.value.dim() < 2 else None,
    )


def _mean(values: Tensor) -> float | None:
    if values.is_meta or not values.numel() or not bool(values.isfinite().all()):
        return None
    return float(values.detach().mean())


def _role(f: Found, layer: nn.Module) -> Role:
    if _spans(f):
        return Role.SCALE
    if isinstance(layer, _TABLES):
        return Role.TABLE
    if "bias" in f.last:
        return Role.SHIFT
    if isinstance(layer, _NORMS):
        return Role.SCALE
    return Role.MATRIX if f.value.dim() >= 2 else Role.OTHER


def _spans(f: Found) -> int:
    """Entries that one entry of a parameter is the length of, if it is one of a weight norm."""
    inner = f.owner
    if f.last != "original0" or not isinstance(inner, nn.utils.parametrize.ParametrizationList):
        return 0
    if type(inner[0]).__name__ != "_WeightNorm":
        return 0
    return inner.get_parameter("original1").numel() // max(1, f.value.numel())


def _fans(f: Found, layer: nn.Module, *, turned: bool) -> tuple[int, int]:
    """Fan-in and fan-out of the layer that a parameter belongs to; (1, 1) if it has no matrix."""
    matrix = _matrix(f, layer)
    if matrix is None:
        return 1, 1
    shape = list(matrix.shape)
    if isinstance(layer, _TABLES):
        return 1, shape[1]
    taps = prod(shape[2:])
    if getattr(layer, "transposed", False):  # (in, out / groups, taps); strides leave out taps
        conv = cast(Any, layer)
        return max(1, shape[0] * taps // (conv.groups * prod(conv.stride))), shape[1] * taps
    if turned:
        return shape[0], shape[1]
    groups = getattr(layer, "groups", 1) if len(shape) > 2 else 1
    packed = next((k for kind, k in _PACKED if isinstance(layer, kind)), 1)
    packed = packed if shape[0] % packed == 0 else 1
    return prod(shape[1:]), max(1, shape[0] * taps // (packed * int(groups)))


def _matrix(f: Found, layer: nn.Module) -> Tensor | None:
    """The matrix of a parameter's layer that it goes with: itself if it is one."""
    if f.value.dim() >= 2 and "bias" not in f.last and not _spans(f):
        return f.value
    if isinstance(layer, _NORMS):
        return None
    inside = "parametrizations."
    own = {
        n.removeprefix(inside).partition(".")[0]: p  # of several originals the last: directions
        for n, p in layer.named_parameters()
        if p.dim() >= 2 and (n.startswith(inside) or "." not in n)
    }
    name = f.names[0].removeprefix(f.layer).removeprefix(".").removeprefix(inside)
    partner = name.partition(".")[0].replace("bias", "weight")
    rows = f.value.numel()
    return own.get(partner) if partner in own else _first(p for p in own.values() if len(p) == rows)


def _first(found: Iterable[Tensor]) -> Tensor | None:
    return next(iter(found), None)


def _check_hooks(module: nn.Module) -> None:
    """Refuses modules that are compiled, or whose weights old hooks compute from parameters."""
    wrong = [path for path, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    help = "torch.jit modules cannot take weights from outside: pass the module that was scripted"
    if not wrong:
        help = (
            "use parametrizations (torch.nn.utils.parametrizations.weight_norm, spectral_norm); "
            "torch.nn.utils.prune.remove ends a pruning"
        )
        for path, m in module.named_modules():
            own = {n for n, _ in m.named_parameters(recurse=False)}
            made = [n for n, x in m.__dict__.items() if isinstance(x, Tensor) and n not in own]
            wrong += [f"{path}.{n}".removeprefix(".") for n in made
                      if own & {f"{n}_orig", f"{n}_g", f"{n}_v"}]  # fmt: skip
    if wrong:
        raise HyperError(
            message(f"hypernetwork: {type(module).__name__} cannot be copied", got=wrong, help=help)
        )


def skeleton(module: nn.Module, weights: Sequence[Weight], shared: set[str]) -> nn.Module:
    """A copy of the target whose generated parameters are placeholders without memory.

    A placeholder is an attribute, neither parameter nor buffer, so that nothing moves, saves or
    broadcasts it; `torch.func.functional_call` finds it all the same. It holds NaN, so that running
    the copy without its weights cannot go unseen.

    Args:
        module: The target; it is not changed.
        weights: What is generated.
        shared: First names of parameters that stay trainable; all others are frozen.

    Returns:
        The copy.

    Raises:
        HyperError: If the target cannot be copied, or computes weights by hooks.
    """
    _check_hooks(module)
    try:
        made = copy.deepcopy(module)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise HyperError(
            message(
                f"hypernetwork: {type(module).__name__} cannot be copied",
                got=str(error),
                help="tensors that it keeps must not hang on a graph: detach them",
            )
        ) from error
    for w in weights:
        like = made.get_parameter(w.name)
        values = torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(w.shape)
        for name in w.names:
            owner, _, last = name.rpartition(".")
            part = made.get_submodule(owner)
            if last in dict(
                part.named_parameters(recurse=False)
            ):  # a part with two names comes twice
                delattr(part, last)
            object.__setattr__(part, last, values)
    for f in parameters_of(made):
        f.value.requires_grad_(f.names[0] in shared)
    return made
