"""`py:` what a function of the user's own code returns. Runs that code."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, message
from wspace.reference.model import Model, building, near, random

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]

RETURNS = "a module, (module, args), (module, args, kwargs) or a Model"


def from_py(name: str, meta: bool, inputs: tuple[Any, ...] | None = None) -> Model:
    """Model that a factory returns, on inputs that are given where it gives none."""
    with _named(name) as factory, building(f"py:{name}", meta):
        model = _model(_call(factory, name), name, inputs)
    return replace(model, args=_filled(model.args), kwargs=_filled(dict(model.kwargs)))


def load_function(reference: str) -> Callable[..., Any]:
    """The function that a `py:` reference names.

    **This imports and runs that code.**

    Args:
        reference: `py:package.module:function` or `py:path/to/file.py:function`.

    Returns:
        The function; while it runs, modules beside its file can be imported.

    Raises:
        CheckpointError: If the reference names no function.

    Example:
        >>> load_function("py:math:sqrt")(9.0)
        3.0
    """
    name = reference.removeprefix("py:")
    if name == reference:
        raise CheckpointError(
            message(
                "resolve: a function of your own is named by py:",
                expected="py:package.module:function or py:path/to/file.py:function",
                got=repr(reference),
            )
        )
    with _named(name) as found:
        if not callable(found):
            got = type(found).__name__
            raise CheckpointError(message(f"resolve: {reference} is no function", got=got))

    def run(*args: Any, **kwargs: Any) -> Any:
        with _importable(_folder(name).resolve()):
            return found(*args, **kwargs)

    return run


@contextmanager
def _named(name: str) -> Generator[Any]:
    """What a reference names; within the context, modules beside it can be imported."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        expected = "py:package.module:factory or py:path/to/file.py:factory"
        raise CheckpointError(
            message("resolve: no factory is named", expected=expected, got=f"py:{name}")
        )
    with _importable(_folder(name).resolve()):
        found: Any = _import_file(Path(place)) if place.endswith(".py") else _import(place)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise CheckpointError(
                    message(f"resolve: {place} has no {part!r}", help=near(part, dir(found)))
                )
            found = getattr(found, part)
        yield found


def _folder(name: str) -> Path:
    """Folder of a file that a reference names; of a module the working directory."""
    place = name.rpartition(":")[0]
    return Path(place).parent if place.endswith(".py") else Path()


def _filled(inputs: Any) -> Any:
    """Inputs with values where a factory that ran on the meta device gave none."""
    if isinstance(inputs, Tensor) and inputs.is_meta:
        values = random(*inputs.shape) if inputs.is_floating_point() else torch.zeros(inputs.shape)
        return values.to(inputs.dtype)
    if isinstance(inputs, dict):
        return {name: _filled(item) for name, item in cast(dict[Any, Any], inputs).items()}
    if type(inputs) in {tuple, list}:
        return type(inputs)(_filled(item) for item in inputs)
    return inputs


@contextmanager
def _importable(folder: Path) -> Generator[None]:
    """Context in which modules of a folder can be imported, as when a file in it is run."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _import_failure(name, error) from error


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        beside = [item.name for item in file.parent.iterdir()] if file.parent.is_dir() else []
        raise CheckpointError(
            message(f"resolve: there is no file {file}", help=near(file.name, beside))
        )
    name = f"_wspace_reference_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise CheckpointError(message(f"resolve: {file} is not a Python file"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failure(str(file), error) from error
    return module


def _import_failure(name: str, error: Exception) -> CheckpointError:
    got = f"{type(error).__name__}: {error}"
    return CheckpointError(message(f"resolve: {name} cannot be imported", got=got))


def _call(factory: Any, name: str) -> object:
    if isinstance(factory, nn.Module | Model):
        return factory
    if not callable(factory):
        got = type(factory).__name__
        raise CheckpointError(message(f"resolve: py:{name} is no function", got=got))
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise CheckpointError(
            message(
                f"resolve: py:{name} takes arguments",
                expected="a function of no arguments",
                got=f"{error}, in {inspect.signature(factory)}",
                help="write a function that calls it with the values you want",
            )
        ) from error
    except ValueError:
        pass  # builtins have no signature
    return factory()


def _model(made: object, name: str, inputs: tuple[Any, ...] | None) -> Model:
    if isinstance(made, Model):
        return made
    if isinstance(made, nn.Module) and inputs is not None:
        return Model(name, made, inputs)
    if isinstance(made, nn.Module):
        return Model(name, made, *_own_inputs(made, name))
    match made:
        case (nn.Module() as module, args):
            return Model(name, module, *_inputs(args, name))
        case (nn.Module() as module, tuple(args), Mapping() as kwargs):
            return Model(name, module, cast(tuple[Any, ...], args), cast(Mapping[str, Any], kwargs))
        case _:
            raise CheckpointError(
                message(
                    f"resolve: py:{name} returns something else",
                    expected=RETURNS,
                    got=_describe(made),
                )
            )


def _own_inputs(module: nn.Module, name: str) -> Inputs:
    offered: Any = getattr(module, "example_inputs", None)
    if offered is None:
        raise CheckpointError(
            message(
                f"resolve: py:{name} returns a module without example inputs",
                expected=RETURNS,
                got=_describe(module),
                help="return (module, args), give the module a method `example_inputs`, or name "
                "shapes (--inputs 2x3x32x32 on the command line)",
            )
        )
    return _inputs(offered() if callable(offered) else offered, name)


def _inputs(offered: object, name: str) -> Inputs:
    match offered:
        case Tensor():
            return (offered,), {}
        case (tuple(args), dict(kwargs)):
            return cast(tuple[Any, ...], args), cast(dict[str, Any], kwargs)
        case tuple():
            return cast(tuple[Any, ...], offered), {}
        case dict():
            return (), cast(dict[str, Any], offered)
        case _:
            raise CheckpointError(
                message(
                    f"resolve: py:{name} gives inputs of another kind",
                    expected="a tensor, a tuple of arguments, a dict, or (tuple, dict)",
                    got=_describe(offered),
                )
            )


def _describe(item: object) -> str:
    if isinstance(item, tuple):
        parts = cast(tuple[object, ...], item)
        return f"({', '.join(type(part).__name__ for part in parts)})"
    return type(item).__name__
