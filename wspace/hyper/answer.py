"""What several networks answered, in the structure of one answer; and what a run left in a module.

Tensors of the answer are stacked. Whatever else it holds has to be the same for all networks.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from wspace.errors import HyperError, message

PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)
"""What an answer may hold beside tensors, if it is the same for all networks."""

_functorch: Any = importlib.import_module("torch._C._functorch")

Attributes = list[tuple[nn.Module, dict[str, Any]]]


_TABLES = ("_buffers", "_parameters")
"""Attributes of a module that hold others."""


class Answer:
    """Takes answers of networks apart, and puts their stacked tensors together.

    Args:
        name: Of the module, for errors.
        single: True if a batch axis of length 1 is taken off every tensor.
    """

    def __init__(self, name: str, *, single: bool) -> None:
        self.name, self.single = name, single
        self.spec: Any = None
        self.rest: list[Any] = []
        self.here: list[bool] = []  # which leaves are tensors

    def tensors(self, answer: Any) -> list[Tensor]:
        """Tensors of the answer of one network; the rest is remembered, and compared.

        Args:
            answer: What a module returned.

        Returns:
            Its tensors in order.

        Raises:
            HyperError: If it holds what is neither a tensor nor plain, or differs in it from the
                answers before.
        """
        leaves, spec = tree_flatten(answer)
        here = [isinstance(x, Tensor) for x in leaves]
        rest = [None if isinstance(x, Tensor) else x for x in leaves]
        odd = [type(x).__name__ for x in rest if not isinstance(x, PLAIN)]
        if odd:
            raise HyperError(
                message(
                    f"call: {self.name} answers with what cannot be stacked",
                    expected="tensors, numbers and text, in tuples, lists and dicts",
                    got=sorted(set(odd)),
                    help="leave it out (use_cache=False), or register the class with "
                    "torch.utils._pytree.register_pytree_node",
                )
            )
        if self.spec is not None and (spec != self.spec or here != self.here or rest != self.rest):
            got = [f"{a!r} and {b!r}" for a, b in zip(rest, self.rest, strict=False) if a != b]
            raise HyperError(
                message(
                    f"call: answers of {self.name} differ in more than their tensors",
                    got=got or "other structures",
                    help="return tensors, which are stacked",
                )
            )
        self.spec, self.rest, self.here = spec, rest, here
        found = [x for x in leaves if isinstance(x, Tensor)]
        return [x[0] if x.dim() and len(x) == 1 else x for x in found] if self.single else found

    def of(self, tensors: Sequence[Tensor]) -> Any:
        """The structure of the answers around stacked tensors.

        Args:
            tensors: In the order of `tensors`.

        Returns:
            An answer.
        """
        left = iter(tensors)
        pairs = zip(self.here, self.rest, strict=True)
        return tree_unflatten([next(left) if here else x for here, x in pairs], self.spec)


def attributes_of(module: nn.Module) -> Attributes:
    """The attributes of all parts of a module, buffers among them; `put_attributes` takes them."""
    return [
        (m, {k: dict(x) if k in _TABLES else x for k, x in m.__dict__.items()})
        for m in module.modules()
    ]


def put_attributes(attributes: Attributes) -> None:
    """Puts back what `attributes_of` gave."""
    for m, found in attributes:
        own = m.__dict__
        for name in own.keys() - found.keys():
            del own[name]
        for name, value in found.items():
            if name in _TABLES:
                own[name].clear()
                own[name].update(value)
            elif own.get(name) is not value:
                own[name] = value


def escaped(module: nn.Module) -> list[str]:
    """Names of tensors that a vectorised run left in a module: outside of it they are dead.

    Args:
        module: The module after the run.

    Returns:
        Qualified names of buffers and attributes.
    """
    return [
        f"{path}.{name}".removeprefix(".")
        for path, m in module.named_modules()
        for name, x in (*m.__dict__.items(), *m.__dict__["_buffers"].items())
        if isinstance(x, Tensor) and _functorch.is_batchedtensor(x)
    ]
