"""What several networks answered, in the structure of one answer; and what a run left in a module.

Tensors of the answer are stacked. Whatever else it holds has to be the same for all networks.
"""

import importlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from wspace.errors import HyperError, message
from wspace.restore import entries_once

PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)
"""What an answer may hold beside tensors, if it is the same for all networks."""

_functorch: Any = importlib.import_module("torch._C._functorch")

Attributes = list[tuple[nn.Module, dict[str, tuple[Any, Any]]]]


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or (a != a and b != b)  # noqa: PLR0124 (NaN)


_STANDARD = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""
_HOLDERS = (Tensor, list, tuple, dict, deque)
LARGE = 1 << 16
"""Entries of a buffer that is taken for a constant (a mask, a table of positions)."""


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
        known = self.spec is None or (spec == self.spec and here == self.here)
        if not known or not all(map(_equal, rest, self.rest or rest)):
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

    def stacked(self, rows: Sequence[Sequence[Tensor]]) -> Any:
        """The structure of the answers around the stacked tensors of every network.

        Args:
            rows: For every network its tensors.

        Returns:
            An answer.

        Raises:
            HyperError: If networks answer with tensors of other shapes.
        """
        columns = list(zip(*rows, strict=True))
        shapes = [sorted({str(tuple(x.shape)) for x in column}) for column in columns]
        if ragged := [", ".join(some) for some in shapes if len(some) > 1]:
            raise HyperError(
                message(f"call: answers of {self.name} differ in shape", got=ragged,
                        help="run the networks one at a time")
            )  # fmt: skip
        return self.of([torch.stack(column) for column in columns])

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
    return [(m, {k: _shallow(x) for k, x in m.__dict__.items()}) for m in module.modules()]


def _shallow(x: Any) -> Any:
    """A copy of a list or dict, to go with the original; anything else itself."""
    return (x, x.copy()) if type(x) in {list, dict} else (x, None)


def put_attributes(attributes: Attributes) -> None:
    """Puts back what `attributes_of` gave."""
    for m, found in attributes:
        own = m.__dict__
        for name in own.keys() - found.keys():
            del own[name]
        for name, (value, inside) in found.items():
            if isinstance(value, list) and inside is not None:
                value[:] = inside
            elif isinstance(value, dict) and inside is not None:
                value.clear()
                value.update(inside)
            if own.get(name) is not value:
                own[name] = value


def values_of(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Buffers of a module and copies of them, but large ones: what an attempt may have counted."""
    small = [entries_once(x) for x in module.buffers() if x.numel() <= LARGE]
    return [(x, x.clone()) for x in small]


@torch.no_grad()
def put_values(values: list[tuple[Tensor, Tensor]]) -> None:
    """Puts back what `values_of` gave."""
    for x, value in values:
        x.copy_(value)


def escaped(module: nn.Module) -> list[str]:
    """Names of tensors that a vectorised run left in a module: outside of it they are dead.

    Args:
        module: The module after the run.

    Returns:
        Qualified names of buffers and attributes, and of lists and dicts that hold such tensors.
    """
    return [
        f"{path}.{name}".removeprefix(".")
        for path, m in module.named_modules()
        for name, x in (*m.__dict__.items(), *m.__dict__["_buffers"].items())
        if name not in _STANDARD and isinstance(x, _HOLDERS) and _is_dead(x)
    ]


def _is_dead(x: Any) -> bool:
    if isinstance(x, list | tuple | deque):
        return any(map(_is_dead, x))
    if isinstance(x, dict):
        return any(map(_is_dead, x.values()))
    return isinstance(x, Tensor) and _functorch.is_batchedtensor(x)
