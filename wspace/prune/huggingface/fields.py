"""Which numbers of a Hugging Face config size which tensors: read off models built on meta.

Nothing here knows a name of a field. A number is moved, the class is built again without memory,
and what has changed is written down: sizes of tensors, how many branches there are, and attributes
that the code computes with. Fields that only the code knows of (read with a default) or that are
None are found by watching what the constructor asks for.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import nn

from wspace.errors import PruneError, message
from wspace.prune.huggingface.build import Observable, Observer
from wspace.trace.polynomials import Polynomial

Field = tuple[str | int, ...]
"""Path of a number in a config: ``("hidden_size",)``, ``("text_config", "hidden_sizes", 2)``."""
Number = int | float
STEPS: tuple[Callable[[Number], Number], ...] = (
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
    values: dict[Field, Number]
    observed: dict[Observable, int]
    sizes: dict[Observable, Polynomial]
    responses: dict[Observable, dict[Field, Response]]
    explicit: tuple[Field, ...] = ()
    joined: Mapping[Field, tuple[Field, ...]] = field(default_factory=dict)

    def changed(self, values: Mapping[Field, Number]) -> Any:
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


# ------------------------------------------------------------------- fields of a config


def numbers_in(config: Any) -> Iterator[tuple[Field, Number]]:
    """Every number above zero in a config and the configs and lists in it."""
    yield from _numbers(config, ())


def _numbers(held: Any, path: Field) -> Iterator[tuple[Field, Number]]:
    if isinstance(held, int | float) and not isinstance(held, bool):
        if held > 0:
            yield path, held
    elif isinstance(held, list | tuple):
        for i, x in enumerate(held):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            yield from _numbers(x, (*path, i))
    elif hasattr(held, "to_dict"):
        for name, x in vars(held).items():
            if not name.startswith("_"):
                yield from _numbers(x, (*path, name))


def changed(config: Any, values: Mapping[Field, Number]) -> Any:
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


def _set(held: Any, path: Field, value: Number) -> None:
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


def _open(kind: Callable[[Any], nn.Module], config: Any) -> list[Field]:
    """Fields that the constructor asks for and that the config does not state."""
    asked: list[Field] = []
    watched = copy.deepcopy(config)
    for path, inner in _configs(watched, ()):
        _watch(inner, path, asked)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind(watched)
    except Exception:  # the class may look at the type of its config
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
    plain: Any = kind.__getattribute__

    def read(self: Any, name: str) -> Any:
        public = not name.startswith("_")
        try:
            value = plain(self, name)
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
    stuck: dict[tuple[type, Number], list[Field]] = {}
    for f, v in values.items():
        runs = _runs(observer, config, (f,), v)
        if not runs:
            stuck.setdefault((type(v), v), []).append(f)
        for o, r in _responses(base, v, runs).items():
            responses.setdefault(o, {})[f] = r
    for (_, v), alike in stuck.items():
        for together in _sets(alike):
            found = _responses(base, v, _runs(observer, config, together, v))
            for o, r in found.items():
                responses.setdefault(o, {})[together[0]] = r
            if found:
                joined[together[0]] = together[1:]
                break
    forms = {o: observer.forms[o] for o in base}
    return Fields(config, values, base, forms, responses, stated, joined)


def _seen(
    observer: Observer, config: Any, values: Mapping[Field, Number]
) -> dict[Observable, int] | None:
    """What is observed with other numbers; None if the config or the class refuses them."""
    try:
        return observer.observe(changed(config, values))
    except (
        Exception
    ):  # a property that cannot be set, a type that is checked, another kind of field
        return None


def _sets(fields: list[Field]) -> Iterator[tuple[Field, ...]]:
    """Pairs first, then all together."""
    yield from combinations(fields, 2)
    if len(fields) > 2:
        yield tuple(fields)


def _runs(
    observer: Observer, config: Any, fields: tuple[Field, ...], v: Number
) -> list[tuple[Number, dict[Observable, int]]]:
    """Builds with another value of some fields that are one value: value and what is seen."""
    runs: list[tuple[Number, dict[Observable, int]]] = []
    for value in dict.fromkeys(step(v) for step in STEPS):
        if value <= 0 or value == v:
            continue
        seen = _seen(observer, config, dict.fromkeys(fields, value))
        if seen is not None:
            runs.append((value, seen))
        if len(runs) == ENOUGH:
            break
    return runs


def _responses(
    base: Mapping[Observable, int], v: Number, runs: list[tuple[Number, dict[Observable, int]]]
) -> dict[Observable, Response]:
    return {
        o: _response(v, now, [(x, seen.get(o, now)) for x, seen in runs])
        for o, now in base.items()
        if any(seen.get(o, now) != now for _, seen in runs)
    }


def _response(v: Number, now: int, seen: Iterable[tuple[Number, int]]) -> Response:
    points = list(seen)
    if all(y * v == now * x for x, y in points):
        return Response("times")
    if all(y * x == now * v or y == now * v // x for x, y in points):
        return Response("over")
    slopes = {(y - now) / (Fraction(x) - Fraction(v)) for x, y in points}
    return Response("plus", slopes.pop()) if len(slopes) == 1 else Response("other")


def _implied(
    observer: Observer, config: Any, base: Mapping[Observable, int], f: Field
) -> int | None:
    """The value of an open field at which the model is what it is; None if it sizes nothing."""
    runs: list[tuple[int, dict[Observable, int]]] = []
    for guess in GUESSES:
        seen = _seen(observer, config, {f: guess})
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
            stated = _seen(observer, config, {f: int(value)})
            shapes = {o: n for o, n in base.items() if o.dim > -2}
            if stated is not None and all(stated.get(o) == n for o, n in shapes.items()):
                return int(value)
    return None


def named(f: Field) -> str:
    """A field as it is written in Python: ``text_config.hidden_sizes[2]``."""
    text = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in f)
    return text.removeprefix(".")


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
