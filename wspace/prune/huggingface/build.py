"""A Hugging Face class built without memory, and the numbers of the model that are looked at."""

import copy
import json
import re
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from wspace.errors import PruneError, message
from wspace.space import Axis, WeightSpace
from wspace.trace import polynomials
from wspace.trace.numbers import Attribute
from wspace.trace.polynomials import Polynomial
from wspace.trace.sandbox import persistent_float_buffers
from wspace.trace.sizes import Sizes, find_sizes

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Observable:
    """A whole number of a built model.

    Attributes:
        name: Tensor, or first member of a family, or path of an attribute.
        dim: Dimension of the tensor; -1 for the number of members, -2 for an attribute.
        attribute: The attribute.
    """

    name: str
    dim: int
    attribute: Attribute | None = None

    def __str__(self) -> str:
        if self.dim == -2:
            return f"attribute {self.name!r}"
        return f"{self.name!r}, " + ("branches" if self.dim < 0 else f"dimension {self.dim}")


# ------------------------------------------------------------------------------ a build


@dataclass(frozen=True)
class _Key:
    """What a build depends on; the config itself is along for the ride."""

    kind: type[nn.Module]
    text: str
    config: Any = field(compare=False, repr=False)


def build_meta(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model of a class and config, without memory.

    Args:
        kind: The class.
        config: Its config; copied.

    Returns:
        The model, on the meta device.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(copy.deepcopy(config))


def shapes_of(module: nn.Module) -> Shapes:
    """Shapes of all parameters and persistent float buffers, tied names too."""
    found = {n: tuple(x.shape) for n, x in module.named_parameters(remove_duplicate=False)}
    return found | {n: tuple(x.shape) for n, x in persistent_float_buffers(module)}


def text_of(config: Any) -> str:
    """A config as text, by which two are compared."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


@lru_cache(maxsize=1024)
def _built(key: _Key, attributes: tuple[Attribute, ...]) -> tuple[Shapes, tuple[Any, ...]] | None:
    """Shapes and attributes of a build; None if the class refuses the config."""
    try:
        module = build_meta(key.kind, key.config)
    except Exception:  # a config may be refused in any way
        return None
    return shapes_of(module), tuple(value_of(module, a) for a in attributes)


def value_of(module: nn.Module, attribute: Attribute) -> Any:
    """What an attribute of a module is; None if it is not there."""
    held: Any = dict(module.named_modules()).get(attribute.path)
    for step in attribute.chain:
        held = getattr(held, step, None)
    if attribute.index is None:
        return held
    try:
        return held[attribute.index]
    except (TypeError, IndexError, KeyError):
        return None


# ---------------------------------------------------------------------------- observing


class Observer:
    """Builds a class from changed configs and reads off the observables of a space.

    Args:
        module: A model of the space; only its class and config are used.
        space: Its weight space.
        sizes: Numbers in its code; without, only tensors are observed.
    """

    def __init__(self, module: nn.Module, space: WeightSpace, sizes: Sizes | None = None) -> None:
        self.kind: type[nn.Module] = type(module)
        self.space = space
        self.forms: dict[Observable, Polynomial] = {
            Observable(p.name, d): polynomials.of_axis(axis)
            for p in space.params
            for d, axis in enumerate(p.axes)
            if p.at is None
        }
        self.families = _families(space)
        for name, (_, group) in self.families.items():
            self.forms[Observable(name, -1)] = {(group,): Fraction(1)}
        for p in space.params:  # slices of a family: the first that is there stands for all
            if p.at is not None and p.family == p.name:
                for d, axis in enumerate(p.axes):
                    self.forms[Observable(p.name, d)] = polynomials.of_axis(axis)
        for r in sizes.requirements if sizes else ():
            if isinstance(r.number, Attribute) and isinstance(r.axis, Axis):
                o = Observable(_path(r.number), -2, r.number)
                self.forms.setdefault(o, polynomials.of_axis(r.axis))
        self.attributes = tuple(o.attribute for o in self.forms if o.attribute is not None)

    def observe_built(self, module: nn.Module) -> dict[Observable, int]:
        """The attributes of a model that is built already.

        Args:
            module: A model of the class.

        Returns:
            Observable → value, attributes only.
        """
        found = {o: value_of(module, o.attribute) for o in self.forms if o.attribute is not None}
        return {o: v for o, v in found.items() if isinstance(v, int)}

    def observe(self, config: Any) -> dict[Observable, int] | None:
        """The observables of a build.

        Args:
            config: A config of the class.

        Returns:
            Observable → value; None if the class refuses the config, or the model has other
            tensors than the space apart from branches.
        """
        built = _built(_Key(self.kind, text_of(config), config), self.attributes)
        if built is None:
            return None
        shapes, attributes = built
        branches = {n for n in shapes if any(q.match(n) for q, _ in self.families.values())}
        wanted = {n for p in self.space.params if p.at is None for n in (p.name, *p.ties)}
        if shapes.keys() - branches != wanted:
            return None
        read = dict(zip(self.attributes, attributes, strict=True))
        found: dict[Observable, int] = {}
        for o in self.forms:
            if o.attribute is not None:
                value = read[o.attribute]
            elif o.dim < 0:
                value = sum(bool(self.families[o.name][0].match(n)) for n in shapes)
            else:
                shape = shapes.get(o.name, ())
                value = shape[o.dim] if o.dim < len(shape) else None
            if isinstance(value, int) and not isinstance(value, bool):
                found[o] = value
        return found


def _path(a: Attribute) -> str:
    index = "" if a.index is None else f"[{a.index}]"
    return ".".join(filter(None, (a.path, *a.chain))) + index


def _families(space: WeightSpace) -> dict[str, tuple[re.Pattern[str], str]]:
    """First member of each family → pattern of the names of members, and the group."""
    members: dict[str, list[str]] = {}
    group: dict[str, str] = {}
    for p in space.params:
        if p.at is not None:
            members.setdefault(p.family, []).append(p.name)
            group[p.family] = p.at[0]
    found: dict[str, tuple[re.Pattern[str], str]] = {}
    for family, names in members.items():
        columns = zip(*(n.split(".") for n in names), strict=False)
        words = [re.escape(w[0]) if len(set(w)) == 1 else r"\d+" for w in columns]
        found[family] = re.compile(r"\.".join(words) + "$"), group[family]
    return found


# ------------------------------------------------------------------------------ of a model


def has_config(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model that can be built from its config."""
    kinds = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in kinds


def observer_of(module: nn.Module, space: WeightSpace, sizes: Sizes | None) -> Observer:
    """An observer of a Hugging Face model.

    Args:
        module: The model.
        space: Its weight space.
        sizes: Numbers in its code; found on the inputs of the trace when None.

    Returns:
        The observer.

    Raises:
        PruneError: If it is no Hugging Face model.
    """
    if not has_config(module):
        raise PruneError(
            message(
                f"prune: {type(module).__name__} has no config to be built from",
                expected="a Hugging Face model, a transformers.PreTrainedModel",
                help='pass rebuild="copy"',
            )
        )
    if sizes is None and space.example is not None:
        sizes = find_sizes(space, module, *space.example)
    return Observer(module, space, sizes)
