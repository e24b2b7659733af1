"""How the networks of a zoo are built without their weights.

An `Architecture` names a factory, the options it takes and the inputs its networks run on. It
survives a round trip through JSON, so a zoo on disk knows its networks; yet nothing that is read
from a zoo runs code that the reader does not trust. Only public factories of `datasets_zoo`, of
wspace and of packages that the caller names are imported, and only if they say that they return a
module.
"""

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self, get_type_hints

import torch
from torch import Tensor, nn

from wspace.errors import ZooError, message
from wspace.space import WeightSpace
from wspace.trace import trace

TRUSTED = ("datasets_zoo", "wspace")
"""Packages whose factories are imported wherever a zoo comes from."""

CLOSED = ("wspace.cli", "wspace.lit")
"""Where no factory is: what is there reads files, and trusts whom its arguments name."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One example input.

    Attributes:
        shape: Its sizes.
        dtype: Name of its element type: ``"float32"``, ``"int64"``, ``"bool"``.
        high: For integers, the number of values: entries are 0 … high - 1.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    high: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        kind = getattr(torch, self.dtype, None)
        if not isinstance(kind, torch.dtype) or kind.is_complex:
            raise ZooError(_text("an input has no such type", got=repr(self.dtype)))
        integers = not kind.is_floating_point and kind is not torch.bool
        if min((1, *self.shape)) < 0 or (self.high > 0) != integers:
            raise ZooError(
                _text(
                    "an input cannot be made",
                    expected="sizes that are not negative, and `high` > 0 for integers only",
                    got=str(self),
                )
            )

    def tensor(self, generator: torch.Generator) -> Tensor:
        """Random values: normal, or uniform for integers and booleans."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(dtype)
        return torch.randint(self.high or 2, self.shape, generator=generator).to(dtype)


@dataclass(frozen=True, init=False)
class Architecture:
    """How to build the networks of a zoo, without weights, and the inputs they run on.

    Attributes:
        factory: ``"package.module:function"``, a public function annotated to return an
            `nn.Module`, or a subclass of it; defined in that package.
        arguments: Its keyword arguments, as canonical JSON text; `options` parses it.
        inputs: Positional example inputs.

    Example:
        >>> a = Architecture("wspace.zoo:example_network", {"width": 5}, [InputSpec((2, 3))])
        >>> print(*a.space().groups.values(), a == Architecture.from_json(a.to_json()))
        h1 True
    """

    factory: str
    arguments: str
    inputs: tuple[InputSpec, ...]

    def __init__(
        self,
        factory: str,
        options: Mapping[str, Any] | None = None,
        inputs: Sequence[InputSpec] = (),
    ) -> None:
        try:
            arguments = canonical(dict(options or {}))
        except (TypeError, ValueError) as error:
            raise ZooError(
                _text(f"the options of {factory!r} are no JSON values", got=str(error))
            ) from error
        object.__setattr__(self, "factory", factory)
        object.__setattr__(self, "arguments", arguments)
        object.__setattr__(self, "inputs", tuple(inputs))

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the factory."""
        return json.loads(self.arguments)

    @property
    def package(self) -> str:
        """Top package of the factory: what has to be trusted to build a network."""
        return self.factory.partition(":")[0].partition(".")[0]

    def module(self, *, trust: Sequence[str] = (), device: str = "meta") -> nn.Module:
        """A network in evaluation mode.

        Args:
            trust: Packages whose factories may be imported, beside `datasets_zoo` and wspace.
            device: ``"meta"`` for a network without values; elsewhere it has the factory's own
                initial ones (the global random state is left as it was).

        Returns:
            The module.

        Raises:
            ZooError: If the factory is not trusted, is not there, or fails.
        """
        make = _factory(self.factory, trust)
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                made = make(**self.options)
        except Exception as error:
            raise ZooError(
                _text(
                    f"{self.factory} failed",
                    got=f"{type(error).__name__}: {error}, with options {self.arguments}",
                )
            ) from error
        if not isinstance(made, nn.Module):
            raise ZooError(_text(f"{self.factory} made no module", got=type(made).__name__))
        return made.eval()

    def example(self, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Random inputs for a network.

        Args:
            generator: Source of randomness; seeded with 0 when None.

        Returns:
            A tensor for each of `inputs`.
        """
        generator = generator or torch.Generator().manual_seed(0)
        return tuple(item.tensor(generator) for item in self.inputs)

    def space(self, trust: Sequence[str] = ()) -> WeightSpace:
        """The weight space of the networks, traced once per process.

        Args:
            trust: As for `module`.

        Returns:
            The space.
        """
        _factory(self.factory, trust)  # also where the space is known: trust is the caller's
        return _space(self)

    def to_json(self) -> str:
        """Canonical JSON text; `from_json` inverts it."""
        inputs = [[list(item.shape), item.dtype, item.high] for item in self.inputs]
        data = {"factory": self.factory, "options": self.options, "inputs": inputs}
        return canonical(data)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The architecture written by `to_json`; nothing is imported.

        Args:
            text: JSON text.

        Returns:
            An equal architecture.

        Raises:
            ZooError: If the text is no architecture.
        """
        try:
            data = json.loads(text)
            inputs = [InputSpec(tuple(s), d, h) for s, d, h in data["inputs"]]
            return cls(str(data["factory"]), {**data["options"]}, inputs)
        except ZooError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ZooError(
                _text("not an architecture", got=f"{type(error).__name__}: {error}")
            ) from error

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.factory.rpartition(':')[2]}({options})"


def canonical(data: object) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def example_network(width: int = 4) -> nn.Module:
    """A perceptron 3-width-2, for examples and tests."""
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


@lru_cache(maxsize=1024)
def _space(architecture: Architecture) -> WeightSpace:
    module = architecture.module(trust=(architecture.package,))
    return trace(module, architecture.example())


def _factory(name: str, trust: Sequence[str]) -> Any:
    """The function or class of a name, once it is known to be trusted and to build modules."""
    place, _, attribute = name.partition(":")
    parts = [*place.split("."), attribute]
    if not all(part.isidentifier() for part in parts):
        raise ZooError(
            _text(f"{name!r} names no factory", expected="package.module:function, all of it names")
        )
    if parts[0] not in (*TRUSTED, *trust):
        raise ZooError(
            _text(
                f"{name!r} is not imported",
                expected=f"a factory of {', '.join((*TRUSTED, *trust))}",
                help=f"if you trust its code, pass trust=({parts[0]!r},)",
            )
        )
    try:
        made = None if _closed(place) else getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError) as error:
        raise ZooError(_text(f"{name!r} is not there", got=str(error))) from error
    if attribute.startswith("_") or not _builds_modules(made, parts[0]):
        raise ZooError(
            _text(
                f"{name!r} is no factory",
                expected=f"a public function of {parts[0]} annotated `-> nn.Module`, or a subclass",
                help="annotate it; what does not say that it builds a module is never called",
            )
        )
    return made


def _closed(place: str) -> bool:
    return any(place == part or place.startswith(f"{part}.") for part in CLOSED)


def _builds_modules(made: Any, package: str) -> bool:
    place = getattr(made, "__module__", "")
    if place.split(".")[0] != package or _closed(place):
        return False
    if inspect.isfunction(made):
        try:
            made = get_type_hints(made).get("return")
        except (NameError, TypeError):
            return False
    return inspect.isclass(made) and issubclass(made, nn.Module)


def _text(what: str, *, expected: str = "", got: str = "", help: str = "") -> str:
    return message(f"architecture: {what}", expected=expected, got=got, help=help)
