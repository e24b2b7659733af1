"""Targets and heads by name, so that a configuration says all of a hypernetwork."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import wspace.hyper
from wspace.errors import HyperError, message
from wspace.hyper import Head
from wspace.zoo.architecture import Architecture


def target_named(
    factory: str, options: Mapping[str, Any] | None = None, *, trust: Sequence[str] = ()
) -> nn.Module:
    """A network with its factory's initial weights, in training mode.

    Args:
        factory: ``"package.module:function"``, of `datasets_zoo`, wspace or a trusted package.
        options: Its arguments.
        trust: Packages whose factories may be imported as well.

    Returns:
        The module.

    Raises:
        ZooError: If the factory is not trusted, is not there, or fails.
    """
    return Architecture(factory, options).module(trust=trust, device="cpu").train()


def head_named(name: str, options: Mapping[str, Any] | None = None) -> Head:
    """A head that is not bound yet.

    Args:
        name: Name of a head of `wspace.hyper`.
        options: Its options.

    Returns:
        The head.

    Raises:
        HyperError: If there is no such head, or it does not take these options.
    """
    known = {key: kind for key, kind in vars(wspace.hyper).items() if _is_head(kind)}
    if name not in known:
        raise HyperError(
            message(f"no head {name!r}", expected=f"one of {', '.join(sorted(known))}")
        )
    try:
        return known[name](**(options or {}))
    except TypeError as error:
        raise HyperError(
            message(f"{name} does not take these options", got=f"{options}: {error}")
        ) from error


def _is_head(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Head) and kind is not Head
