"""A model by the name that its users give it: `hf:`, `torchvision:`, `timm:` or `py:`.

Owns which code builds a module and which inputs it runs on. Reading weights is `wspace.io`'s.
Nothing here touches the network. Only `py:` runs code that does not come from an installed library.
"""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, MissingExtra, message
from wspace.io import Checkpoint, fit_checkpoint, load_checkpoint, load_into, weights_file

__all__ = ["Model", "resolve"]

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]

BATCH = 2
TOKENS = 7
SIDE = 224  # of an image, where nothing else is said
WAVE = 4000  # samples: a quarter of a second, more than any of the usual receptive fields
RETURNS = "a module, (module, args), (module, args, kwargs) or a Model"


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


def resolve(
    reference: str, *, weights: bool | Literal["auto"] = "auto", meta: bool = False
) -> Model:
    """The model that a reference names, with example inputs. The network is never touched.

    - `hf:FOLDER` or `hf:FILE.json`: the transformers class that the configuration names, with the
      weights of the folder if it holds any. Code that comes with the folder is not run.
    - `torchvision:NAME` and `timm:NAME`: a model of that library, untrained.
    - `py:package.module:factory` and `py:path/to/file.py:factory`: what a function of no arguments
      returns: a module, (module, args), (module, args, kwargs), or a Model. A module alone has to
      offer `example_inputs`, an attribute or a method. **This imports and runs that code**, so name
      only code that you would run yourself; the working directory counts as a place of modules.

    Args:
        reference: Scheme, colon, name.
        weights: Whether to load weights: "auto" takes those of an `hf:` folder if there are any
            (and none if a configuration file is named), True insists on them.
        meta: Build on the meta device, without memory for values. Weights are then opened (memory-
            mapped) but not copied into the module.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: If the reference names nothing that can be built.
        MissingExtra: If the library is not installed.

    Example:
        >>> resolve("torchvison:resnet18")
        Traceback (most recent call last):
        wspace.errors.CheckpointError: resolve: unknown scheme 'torchvison'
          expected one of hf:, torchvision:, timm:, py:
          got 'torchvison:resnet18'
          help: did you mean 'torchvision'?
    """
    builders: dict[str, Callable[[str, bool], Model]] = {
        "hf": lambda name, meta: _from_hf(name, meta=meta, weights=weights),
        "torchvision": _from_torchvision,
        "timm": _from_timm,
        "py": _from_py,
    }
    scheme, colon, name = reference.partition(":")
    if not colon or not name or scheme not in builders:
        raise CheckpointError(
            message(
                f"resolve: unknown scheme {scheme!r}" if colon else "resolve: no scheme",
                expected=f"one of {', '.join(f'{known}:' for known in builders)}",
                got=repr(reference),
                help=_near(scheme, builders) or "for example hf:path/to/folder",
            )
        )
    if weights is True and scheme != "hf":
        raise CheckpointError(
            message(
                f"resolve: {reference} names no weights",
                expected="hf:FOLDER for weights=True",
                help="build it without weights, then wspace.io.load_into(module, checkpoint)",
            )
        )
    model = builders[scheme](name, meta)
    return replace(model, name=reference, module=model.module.eval())


@contextmanager
def _building(what: str, meta: bool) -> Generator[None]:
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


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(repr(item) for item in found)}?" if found else ""


def _library(name: str, extra: str, scheme: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtra(
            message(
                f"resolve: {scheme}: needs {name}",
                help=f"pip install {name}, or pip install 'wspace[{extra}]'",
            )
        ) from error


def _random(*shape: int, meta: bool) -> Tensor:
    """Example values, the same in every call; the global generator is not touched."""
    if meta:
        return torch.empty(shape, device="meta")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- transformers ----------------------------------------------------------------------------------


def _from_hf(name: str, *, meta: bool, weights: bool | Literal["auto"]) -> Model:
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(
            message(
                f"resolve: there is no {file}",
                expected="a folder with a config.json, or such a file",
                got=f"hf:{name}",
                help=_near(path.name, beside) or f"download it first: hf download {name}",
            )
        )
    transformers = _library("transformers", "hf", "hf")
    with _building(f"the configuration {file}", False):
        config = transformers.AutoConfig.from_pretrained(
            str(file), local_files_only=True, trust_remote_code=False
        )
    _without_cache(config)
    with _building(f"hf:{name}", meta):
        known = [getattr(transformers, item, None) for item in config.architectures or []]
        build = next((item for item in known if item), transformers.AutoModel.from_config)
        module = cast(nn.Module, build(config)).eval()
    model = Model(name, module, kwargs=_hf_inputs(module, config, meta))
    if not weights or (weights == "auto" and not path.is_dir()):
        return model
    if weights_file(file.parent) is None:
        if weights == "auto":
            return model
        raise CheckpointError(message(f"resolve: folder {file.parent} holds no weights"))
    checkpoint = fit_checkpoint(load_checkpoint(file.parent), module)
    if not meta:
        load_into(module, checkpoint)
    return replace(model, checkpoint=checkpoint)


def _without_cache(config: Any) -> None:
    """Turns key-value caches off, in the configurations of submodels too."""
    if getattr(config, "use_cache", None) is not None:
        config.use_cache = False
    for item in vars(config).values():
        if isinstance(item, type(config).__mro__[-3] if False else _config_type()):
            _without_cache(item)


def _config_type() -> type:
    return importlib.import_module("transformers").PretrainedConfig
