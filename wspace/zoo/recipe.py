"""What makes a zoo: a recipe, and the cohorts it makes.

A recipe is a frozen dataclass whose fields are JSON values, so that a zoo on disk can say how it
was made and be resumed. It makes cohorts, each a deterministic function of the fields and of the
cohort's number, so that the bits of a zoo depend neither on who made which cohort, nor when.
"""

import difflib
import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, Union, cast, get_args, get_origin
from typing import get_type_hints as hints_of

import numpy as np
import torch
from torch import Tensor

from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, canonical

Column = Sequence[int] | Sequence[float] | Sequence[bool] | Sequence[str] | Tensor | np.ndarray
"""Values of one kind, one for every network: int, float, bool or str."""

SHORT = "datasets_zoo"  # its RECIPES maps short names to "package.module:Class"


@dataclass(frozen=True, eq=False)
class Cohort:
    """Networks of one architecture that one task made.

    Attributes:
        architecture: What they are.
        state: Stacked states, ``(n, *shape)``, or with a time axis ``(n, T, *shape)``, under the
            names of the weight space: parameters and float buffers, ties once.
        table: What is known of every network: columns of length n by name.
        steps: Optimizer step of every state on the time axis, ``(T,)``; None without one.
    """

    architecture: Architecture
    state: Mapping[str, Tensor]
    table: Mapping[str, Column]
    steps: Tensor | None = None


class Recipe(Protocol):
    """How a zoo is made; in practice a frozen dataclass with a field `seed`.

    Fields are JSON values: int, float, str, bool, None, and tuples of them. Fields that are not
    compared (``field(compare=False)``), such as where data lies, are no part of what a zoo is.
    Those named in `grows` may be larger when a zoo is built again: cohorts are then appended, so
    what a cohort holds must not depend on them. (The last cohort may be short; it is made again
    when the zoo grows.) Where several networks belong together, `grouped_by` names the column that
    says which, and no split parts them unless it is told to: views of one image, states of one
    training run. Both are attributes of the class; without them `count` grows, and nothing belongs
    together.
    """

    @property
    def seed(self) -> int:
        """Source of all randomness."""
        ...

    @property
    def cohorts(self) -> int:
        """Number of independent tasks."""
        ...

    def cohort(self, index: int) -> Cohort:
        """The networks of one task, the same whenever and wherever it is made.

        Args:
            index: Its number, 0 … cohorts - 1.
        """
        ...


class Counted:
    """Base of recipes of `count` networks, `size` of them in a cohort, the last one perhaps short.

    A subclass is a frozen dataclass with these two fields among its own.
    """

    count: int
    size: int

    grows: ClassVar[tuple[str, ...]] = ("count",)

    @property
    def cohorts(self) -> int:
        """Number of cohorts."""
        return -(-self.count // self.size)

    def rows(self, index: int) -> int:
        """Number of networks in a cohort.

        Args:
            index: Number of the cohort.

        Returns:
            `size`, or what is left for the last one.
        """
        return min(self.size, self.count - index * self.size)


def grouping(recipe: Recipe) -> str | None:
    """The column that a recipe declares as `grouped_by`; None where networks stand alone."""
    return getattr(recipe, "grouped_by", None) or None


def check_grouping(recipe: Recipe, table: Mapping[str, Column]) -> None:
    """Refuses a table without the column that says what belongs together.

    Args:
        recipe: What made it.
        table: Of a cohort.

    Raises:
        ZooError: If the column that the recipe declares is missing.
    """
    by = grouping(recipe)
    if by is not None and by not in table:
        text = f"recipe: {type(recipe).__name__} makes no column {by!r}, which it is grouped by"
        raise ZooError(message(text, expected=f"one of {', '.join(table) or '(none)'}"))


def generator_of(seed: int, index: int) -> torch.Generator:
    """Random generator of one cohort: streams of different cohorts have nothing in common.

    Args:
        seed: Of the recipe.
        index: Number of the cohort.

    Returns:
        A fresh generator on the CPU.
    """
    words = np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) % 2**63)


def check_options(recipe: Any, *names: str) -> None:
    """Refuses options that are not at least 1; for a recipe's ``__post_init__``.

    Args:
        recipe: A recipe.
        names: Fields that hold a number, or a tuple of two that rise.

    Raises:
        ZooError: If one is smaller, or a tuple is no pair that rises.
    """
    wrong: list[str] = []
    for name in names:
        value = getattr(recipe, name)
        pair = tuple(value) if isinstance(value, tuple) else (value, value)
        if len(pair) != 2 or not 1 <= pair[0] <= pair[-1]:
            wrong.append(f"{name} = {value!r}")
    if wrong:
        raise ZooError(
            message(
                f"recipe: {type(recipe).__name__} has options that cannot be",
                expected="numbers of at least 1, and pairs (smallest, largest)",
                got=wrong,
            )
        )


def recipe_from(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name. Imports it, so the name has to be the user's own, never a file's.

    Args:
        name: A short name that `datasets_zoo` knows, or ``"package.module:Class"``.
        options: Fields that differ from their defaults; where a field is no string, text is read
            as JSON.

    Returns:
        The recipe.

    Raises:
        ZooError: If there is no such recipe, or an option is unknown or of another type.
    """
    kind = recipe_class(name)
    known = {item.name: item for item in fields(kind) if item.init}
    hints = hints_of(kind)
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in known:
            listed = ", ".join(known)
            raise ZooError(_unknown(f"{name} has no option {key!r}", key, known, listed))
        values[key] = _typed(value, hints[key], f"{name}: {key}")
    missing = [key for key, item in known.items() if key not in values and _required(item)]
    if missing:
        raise ZooError(_text(f"{name} lacks options", got=", ".join(missing)))
    return kind(**values)


def recipe_class(name: str) -> type[Any]:
    """The class of a recipe by name, as for `recipe_from`."""
    dotted = name
    if ":" not in name:
        known = recipe_names()
        if name not in known:
            raise ZooError(_unknown(f"no recipe {name!r}", name, known, ", ".join(sorted(known))))
        dotted = known[name]
    place, _, attribute = dotted.partition(":")
    try:
        kind = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ZooError(_text(f"no recipe {dotted!r}", got=str(error))) from error
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise ZooError(_text(f"{dotted!r} is no recipe", expected="a frozen dataclass"))
    return kind


def recipe_names() -> dict[str, str]:
    """Short names of recipes, and what they stand for; empty without `datasets_zoo`."""
    try:
        return dict(importlib.import_module(SHORT).RECIPES)
    except (ImportError, AttributeError):
        return {}


def described(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON values: its class and its fields.

    Args:
        recipe: A dataclass instance.

    Returns:
        ``{"class": "package.module:Class", "fields": {…}}``.

    Raises:
        ZooError: If it is no dataclass with a seed, or a field is no JSON value.
    """
    kind = type(recipe)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not is_dataclass(kind) or "seed" not in {item.name for item in fields(kind)}:
        raise ZooError(_text(f"{name} is no recipe", expected="a dataclass with a field `seed`"))
    values = {item.name: getattr(recipe, item.name) for item in fields(kind) if item.compare}
    try:
        return json.loads(canonical({"class": name, "fields": values}))
    except (TypeError, ValueError) as error:
        raise ZooError(_text(f"{name} has fields that are no JSON", got=str(error))) from error


def grown(old: Mapping[str, Any], new: Mapping[str, Any], grows: Sequence[str]) -> bool:
    """Whether a described recipe differs from another only in larger growing fields.

    Args:
        old: What a zoo was made with, from `described`.
        new: What is to be made.
        grows: Names of fields that may be larger.

    Returns:
        True if they differ so, False if they are equal.

    Raises:
        ZooError: If they differ otherwise.
    """
    before, after = old.get("fields", {}), new["fields"]
    wrong = [] if old.get("class") == new["class"] else [f"class {old.get('class')}"]
    larger = False
    for key in sorted({*before, *after}):
        a, b = before.get(key), after.get(key)
        if canonical(a) == canonical(b):
            continue
        ok = key in grows and type(a) is int and type(b) is int and b > a
        larger = larger or ok
        wrong += [] if ok else [f"{key} = {a!r} in the zoo, {b!r} now"]
    if wrong:
        raise ZooError(
            message(
                "zoo: it was made by another recipe",
                expected=f"the same recipe; only {', '.join(grows) or 'nothing'} may be larger",
                got=wrong,
                help="build into another folder",
            )
        )
    return larger


# --- options --------------------------------------------------------------------------------------


def _typed(value: Any, hint: Any, what: str) -> Any:
    """The value as the type that a field has; text of other types is JSON."""
    if isinstance(value, str) and hint is not str:
        with suppress(ValueError):  # a string after all, perhaps one of a Literal
            value = json.loads(value)
    fitted, ok = _fit(value, hint)
    if not ok:
        shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        several = "a list, as JSON, in quotes" if get_origin(hint) is tuple else ""
        raise ZooError(_text(f"{what} does not fit", expected=shown, got=repr(value), help=several))
    return fitted


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        found = [fitted for part in parts for fitted, ok in [_fit(value, part)] if ok]
        return (found[0], True) if found else (value, False)
    if origin is Literal:
        return value, value in parts
    if origin is tuple:
        return _fit_tuple(value, parts)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (float(value), True) if number else (value, False)
    if hint in {None, NoneType}:
        return value, value is None
    return value, type(value) is hint


def _fit_tuple(value: Any, parts: tuple[Any, ...]) -> tuple[Any, bool]:
    if not isinstance(value, list | tuple):
        return value, False
    items = list(cast(Sequence[Any], value))
    hints = [parts[0]] * len(items) if parts[1:] == (...,) else list(parts)
    if len(items) != len(hints):
        return value, False
    fitted = [_fit(item, hint) for item, hint in zip(items, hints, strict=True)]
    return tuple(item for item, _ in fitted), all(ok for _, ok in fitted)


def _required(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _unknown(what: str, name: str, known: Mapping[str, Any], listed: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    help = f"did you mean {near[0]!r}?" if near else "a class is named package.module:Class"
    return _text(what, expected=f"one of {listed or '(none)'}", help=help)


def _text(what: str, *, expected: str = "", got: str = "", help: str = "") -> str:
    return message(f"recipe: {what}", expected=expected, got=got, help=help)
