"""The schemes of references, and the dispatch on them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from wspace.errors import CheckpointError, message
from wspace.reference.huggingface import from_hf
from wspace.reference.model import Model, near
from wspace.reference.python import from_py
from wspace.reference.vision import from_timm, from_torchvision


def resolve(
    reference: str,
    *,
    weights: bool | Literal["auto"] = "auto",
    meta: bool = False,
    inputs: tuple[Any, ...] | None = None,
) -> Model:
    """The model that a reference names, with example inputs. The network is never touched.

    - `hf:FOLDER` or `hf:FILE.json`: the transformers class that the configuration names, with the
      weights of the folder if it holds any. Code that comes with the folder is not run.
    - `torchvision:NAME` and `timm:NAME`: a model of that library, untrained.
    - `py:package.module:factory` and `py:path/to/file.py:factory`: what a function of no arguments
      returns: a module, (module, args), (module, args, kwargs), or a Model. A module alone has to
      offer `example_inputs`, an attribute or a method, unless `inputs` are given. **This imports
      and runs that code**, so name only code that you would run yourself; the working directory
      counts as a place of modules.

    Args:
        reference: Scheme, colon, name.
        weights: Whether to load weights: "auto" takes those of an `hf:` folder if there are any
            (and none if a configuration file is named), True insists on them.
        meta: Build on the meta device, without memory for values. Inputs are real all the same, as
            `wspace.trace` wants them (what a `py:` factory makes is filled). Weights are opened
            (memory-mapped) but not copied into the module; with "auto" not even opened if
            transformers has to rearrange them.
        inputs: Example inputs by position, in place of the model's own.

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
        "hf": lambda name, meta: from_hf(name, meta=meta, weights=weights),
        "torchvision": from_torchvision,
        "timm": from_timm,
        "py": lambda name, meta: from_py(name, meta, inputs),
    }
    scheme, colon, name = reference.partition(":")
    if not colon or not name or scheme not in builders:
        raise CheckpointError(
            message(
                f"resolve: unknown scheme {scheme!r}" if colon else "resolve: no scheme",
                expected=f"one of {', '.join(f'{known}:' for known in builders)}",
                got=repr(reference),
                help=near(scheme, builders) or "for example hf:path/to/folder",
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
    if inputs is not None:
        model = replace(model, args=inputs, kwargs={})
    return replace(model, name=reference, module=model.module.eval())
