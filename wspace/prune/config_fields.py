"""Which numbers of a Hugging Face config size which tensors: read off models built on meta.

Nothing here knows a name of a field. A number is moved, the class is built again without memory,
and what has changed is written down: sizes of tensors, how many branches there are, and attributes
that the code computes with. Fields that only the code knows of (read with a default) or that are
None are found by watching what the constructor asks for.
"""

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import combinations
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

Field = tuple[str | int, ...]
"""Path of a number in a config: ``("hidden_size",)``, ``("text_config", "hidden_sizes", 2)``."""
Shapes = dict[str, tuple[int, ...]]
STEPS: tuple[Callable[[int], int], ...] = (
    lambda v: 2 * v,
    lambda v: 3 * v,
    lambda v: v + 1,
    lambda v: v // 2,
    lambda v: v + 2,
    lambda v: v - 1,
    lambda v: v + 4,
    lambda v: 4 * v,
)
ENOUGH = 2
"""Builds that succeed with another value, after which a field is known."""
GUESSES = (8, 16, 12, 24, 4)
"""Values for a field that is None or absent."""


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


@dataclass(frozen=True)
class Response:
    """How one observable follows one field: proportional, inverse, affine, or in another way.

    Attributes:
        kind: ``"times"``, ``"over"``, ``"plus"`` or ``"other"``.
        slope: Change per unit, for ``"plus"``.
    """

    kind: str
    slope: Fraction = Fraction(0)


@dataclass(frozen=True)
class Fields:
    """What the fields of a config size.

    Attributes:
        config: The config, with the fields that were made explicit.
        values: Field → value.
        observed: Observable → value at `config`.
        sizes: Observable → polynomial in the sizes of groups.
        responses: Observable → field → how it follows.
        explicit: Fields that the config leaves open and that `config` states.
        joined: Field → others of the same value that only move with it.
    """

    config: Any
    values: dict[Field, int]
    observed: dict[Observable, int]
    sizes: dict[Observable, Polynomial]
    responses: dict[Observable, dict[Field, Response]]
    explicit: tuple[Field, ...] = ()
    joined: Mapping[Field, tuple[Field, ...]] = field(default_factory=dict)

    def changed(self, values: Mapping[Field, int]) -> Any:
        """A copy of the config with other numbers, joined fields along.

        Args:
            values: Field → number.

        Returns:
            The copy.
        """
        along = {g: v for f, v in values.items() for g in self.joined.get(f, ())}
        return changed(self.config, {**values, **along})

    @cached_property
    def sized(self) -> dict[Field, list[Observable]]:
        """Field → what it sizes; fields that size nothing are absent."""
        found: dict[Field, list[Observable]] = {}
        for o, by in self.responses.items():
            for f in by:
                found.setdefault(f, []).append(o)
        return found


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
    except Exception:  # noqa: BLE001  (a config may be refused in any way)
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


# ------------------------------------------------------------------- fields of a config


def numbers_in(config: Any) -> Iterator[tuple[Field, int]]:
    """Every whole number above zero in a config and the configs and lists in it."""
    yield from _numbers(config, ())


def _numbers(held: Any, path: Field) -> Iterator[tuple[Field, int]]:
    if isinstance(held, int) and not isinstance(held, bool):
        if held > 0:
            yield path, held
    elif isinstance(held, list | tuple):
        for i, x in enumerate(held):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            yield from _numbers(x, (*path, i))
    elif hasattr(held, "to_dict"):
        for name, x in vars(held).items():
            if not name.startswith("_"):
                yield from _numbers(x, (*path, name))


def changed(config: Any, values: Mapping[Field, int]) -> Any:
    """A copy of a config with other numbers.

    Args:
        config: The config; not modified.
        values: Field → number.

    Returns:
        The copy.
    """
    out = copy.deepcopy(config)
    for path, value in values.items():
        _set(out, path, value)
    return out


def _set(held: Any, path: Field, value: int) -> None:
    step, *rest = path
    inner: Any = None
    if rest:
        inner = held[step] if isinstance(step, int) else getattr(held, step)
        if isinstance(inner, list | tuple):
            items = list(inner)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            _set(items, tuple(rest), value)
            inner = type(inner)(items)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        else:
            _set(inner, tuple(rest), value)
    new: Any = inner if rest else value
    if isinstance(step, int):
        held[step] = new
    else:
        setattr(held, step, new)


def _open(kind: type[nn.Module], config: Any) -> list[Field]:
    """Fields that the constructor asks for and that the config does not state."""
    asked: list[Field] = []
    watched = copy.deepcopy(config)
    for path, inner in _configs(watched, ()):
        _watch(inner, path, asked)
    try:
        build = kind
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(watched)
    except Exception:  # noqa: BLE001  (the class may look at the type of its config)
        return []
    return list(dict.fromkeys(asked))


def _configs(config: Any, path: Field) -> Iterator[tuple[Field, Any]]:
    yield path, config
    for name, x in vars(config).items():
        if hasattr(x, "to_dict") and not name.startswith("_"):
            yield from _configs(x, (*path, name))


def _watch(config: Any, path: Field, asked: list[Field]) -> None:
    """Makes a config write down which names are read that it does not have, or that are None."""
    kind: type[Any] = type(config)

    def read(self: Any, name: str) -> Any:
        public = not name.startswith("_")
        try:
            value = kind.__getattribute__(self, name)
        except AttributeError:
            if public:
                asked.append((*path, name))
            raise
        if value is None and public:
            asked.append((*path, name))
        return value

    config.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read})


# ------------------------------------------------------------------------------ probing


def probe(observer: Observer, config: Any, *, explicit: bool = False) -> Fields | None:
    """What the fields of a config size.

    Args:
        observer: Builds and reads.
        config: The config of the model.
        explicit: Whether fields that the config leaves open are stated first.

    Returns:
        The fields; None if the class cannot be built from the config as it is.
    """
    base = observer.observe(config)
    if base is None:
        return None
    stated: tuple[Field, ...] = ()
    if explicit:
        for f in _open(observer.kind, config):
            value = _implied(observer, config, base, f)
            if value is not None:
                config, stated = changed(config, {f: value}), (*stated, f)
    values = dict(numbers_in(config))
    responses: dict[Observable, dict[Field, Response]] = {}
    joined: dict[Field, tuple[Field, ...]] = {}
    stuck: dict[int, list[Field]] = {}
    for f, v in values.items():
        runs = _runs(observer, config, (f,), v)
        if not runs:
            stuck.setdefault(v, []).append(f)
        for o, r in _responses(base, v, runs).items():
            responses.setdefault(o, {})[f] = r
    for v, alike in stuck.items():
        for together in _sets(alike):
            found = _responses(base, v, _runs(observer, config, together, v))
            for o, r in found.items():
                responses.setdefault(o, {})[together[0]] = r
            if found:
                joined[together[0]] = together[1:]
                break
    forms = {o: observer.forms[o] for o in base}
    return Fields(config, values, base, forms, responses, stated, joined)


def _sets(fields: list[Field]) -> Iterator[tuple[Field, ...]]:
    """Pairs first, then all together."""
    yield from combinations(fields, 2)
    if len(fields) > 2:
        yield tuple(fields)


def _runs(
    observer: Observer, config: Any, fields: tuple[Field, ...], v: int
) -> list[tuple[int, dict[Observable, int]]]:
    """Builds with another value of some fields that are one value: value and what is seen."""
    runs: list[tuple[int, dict[Observable, int]]] = []
    for value in dict.fromkeys(step(v) for step in STEPS):
        if value < 1 or value == v:
            continue
        seen = observer.observe(changed(config, dict.fromkeys(fields, value)))
        if seen is not None:
            runs.append((value, seen))
        if len(runs) == ENOUGH:
            break
    return runs


def _responses(
    base: Mapping[Observable, int], v: int, runs: list[tuple[int, dict[Observable, int]]]
) -> dict[Observable, Response]:
    return {
        o: _response(v, now, [(x, seen.get(o, now)) for x, seen in runs])
        for o, now in base.items()
        if any(seen.get(o, now) != now for _, seen in runs)
    }


def _response(v: int, now: int, seen: Iterable[tuple[int, int]]) -> Response:
    points = list(seen)
    if all(y * v == now * x for x, y in points):
        return Response("times")
    if all(y * x == now * v or y == now * v // x for x, y in points):
        return Response("over")
    slopes = {Fraction(y - now, x - v) for x, y in points}
    return Response("plus", slopes.pop()) if len(slopes) == 1 else Response("other")


def _implied(
    observer: Observer, config: Any, base: Mapping[Observable, int], f: Field
) -> int | None:
    """The value of an open field at which the model is what it is; None if it sizes nothing."""
    runs: list[tuple[int, dict[Observable, int]]] = []
    for guess in GUESSES:
        try:
            seen = observer.observe(changed(config, {f: guess}))
        except Exception:  # noqa: BLE001  (a property that cannot be set, a type that is checked)
            return None
        if seen is not None:
            runs.append((guess, seen))
        if len(runs) == ENOUGH:
            break
    if len(runs) < ENOUGH:
        return None
    (x, first), (y, second) = runs
    for o, now in base.items():
        if o.dim < 0 or first.get(o) == second.get(o):
            continue
        value = x + Fraction((now - first[o]) * (y - x), second[o] - first[o])
        if value.denominator == 1 and value > 0:
            stated = observer.observe(changed(config, {f: int(value)}))
            shapes = {o: n for o, n in base.items() if o.dim > -2}
            if stated is not None and all(stated.get(o) == n for o, n in shapes.items()):
                return int(value)
    return None


# ------------------------------------------------------------------------- of a model


def has_config(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model that can be built from its config."""
    kinds = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in kinds


def named(f: Field) -> str:
    """A field as it is written in Python: ``text_config.hidden_sizes[2]``."""
    text = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in f)
    return text.removeprefix(".")


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


def probed(observer: Observer, module: nn.Module, *, explicit: bool) -> Fields:
    """What the fields of a model's config size.

    Args:
        observer: Builds and reads.
        module: The model.
        explicit: See `probe`.

    Returns:
        The fields.

    Raises:
        PruneError: If its class does not give the model from the config.
    """
    fields = probe(observer, module.config, explicit=explicit)
    if fields is None:
        raise PruneError(
            message(
                f"prune: {type(module).__name__} does not come out of its config",
                expected="the tensors of the weight space when the class is built from "
                "module.config",
                got="other tensors, or an error",
                help='the module was changed after it was built: pass rebuild="copy"',
            )
        )
    return fields
