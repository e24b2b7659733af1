"""A model with example inputs, and what the builders of models have in common."""

import difflib
import importlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, MissingExtra, message
from wspace.io import Checkpoint

BATCH = 2
SIDE = 224  # of an image, where nothing else is said


@dataclass(frozen=True, eq=False)
class Model:
    """A module in eval mode, and inputs that it runs on.

    Attributes:
        name: The reference that it was resolved from.
        module: In eval mode.
        args: Example inputs by position.
        kwargs: Example inputs by name.
        checkpoint: The weights as they are on disk, under the names of the module; None if random.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    checkpoint: Checkpoint | None = None


@contextmanager
def building(what: str, meta: bool) -> Generator[None]:
    """Context in which a constructor runs; its failures say what was being built."""
    try:
        with torch.device("meta") if meta else nullcontext():
            yield
    except (CheckpointError, MissingExtra):
        raise
    except Exception as error:
        raise CheckpointError(
            message(
                f"resolve: {what} cannot be built" + (" on the meta device" if meta else ""),
                got=f"{type(error).__name__}: {error}",
                help="try meta=False" if meta else "",
            )
        ) from error


def near(name: str, known: Iterable[str]) -> str:
    """Question after the names that look like this one; empty if none does."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(repr(item) for item in found)}?" if found else ""


def library(name: str, extra: str, scheme: str) -> ModuleType:
    """The module of an optional package, or an error that says how to install it."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtra(
            message(
                f"resolve: {scheme}: needs {package}",
                help=f"pip install {package}, or pip install 'wspace[{extra}]'",
            )
        ) from error


def random(*shape: int) -> Tensor:
    """Example values, the same in every call; the global generator is not touched."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
