"""What a command works on: a network, weights, and the space of the two, from a reference."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace import trace
from wspace.cli.screen import working
from wspace.errors import CheckpointError, WSpaceError, message
from wspace.io import (
    Checkpoint,
    fit_checkpoint,
    load_checkpoint,
    load_into,
    module_from_checkpoint,
)
from wspace.reference import resolve
from wspace.space import WeightSpace

PREFIXES = ("hf:", "torchvision:", "timm:", "py:")


@dataclass
class Subject:
    """A network with its weight space, or weights of which no code is known.

    Attributes:
        name: As it is shown.
        module: The network; None if only weights are known.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        weights: The checkpoint, if one was read.
        space: The weight space; None if there is no module.
        seconds: Time that tracing took.
        note: Why there is no module, or how it was found.
    """

    name: str
    module: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    weights: Checkpoint | None = None
    space: WeightSpace | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def state(self) -> dict[str, Tensor]:
        """All tensors by name, ties included."""
        if self.weights is not None:
            return dict(self.weights)
        if self.module is None:
            return {}
        found: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        found.update(self.module.named_buffers(remove_duplicate=False))
        return {name: t.detach() for name, t in found.items()}

    @property
    def nonfinite(self) -> dict[str, int]:
        """How many elements of each tensor are NaN or infinite."""
        counts = {
            name: int(t.numel() - t.isfinite().sum())
            for name, t in self.state.items()
            if not t.is_meta and t.is_floating_point()
        }
        return {name: number for name, number in counts.items() if number}


def is_reference(text: str) -> bool:
    """True for ``hf:…``, ``torchvision:…``, ``timm:…`` and ``py:…``."""
    return text.startswith(PREFIXES)


def open_subject(
    text: str,
    *,
    model: str = "",
    key: str | None = None,
    inputs: Sequence[str] = (),
    meta: bool = False,
    seed: int = 0,
) -> Subject:
    """The network that a reference names, or the weights that a path names, traced.

    Args:
        text: A model reference, or a path to a checkpoint.
        model: Reference to the code of a checkpoint.
        key: Which of several states in a torch file.
        inputs: Example inputs to use instead of the reference's, as ``2x3x32x32`` or ``int:2x9``.
        meta: Build the network without allocating its weights.
        seed: Of torch's generator while the network is built, if it is initialised at random.

    Returns:
        The subject; without a module if only weights are known.

    Raises:
        WSpaceError: If the reference names nothing, or the weights do not fit.
    """
    given = tuple(example(i) for i in inputs) or None
    if is_reference(text) and not Path(text).exists():
        if model:
            raise WSpaceError(message(f"{text} names a network already", help="leave --model out"))
        subject = _from_reference(text, given, meta=meta, seed=seed)
    else:
        subject = _from_checkpoint(text, model, key, given, meta=meta)
    if subject.module is None:
        return subject
    with working(f"tracing {subject.name}"):
        start = time.perf_counter()
        subject.space = trace(subject.module, subject.args, subject.kwargs)
        subject.seconds = time.perf_counter() - start
    return subject


def example(text: str) -> Tensor:
    """An example input: ``2x3x32x32`` is a normal tensor, ``int:2x9`` whole numbers below 10.

    Args:
        text: Sizes joined by ``x``, after ``int:`` for whole numbers.

    Returns:
        The tensor.

    Raises:
        WSpaceError: If the text is none of these.
    """
    kind, _, sizes = text.rpartition(":")
    try:
        shape = [int(size) for size in sizes.split("x")]
    except ValueError:
        shape = [-1]
    if kind not in {"", "int", "float"} or min(shape) < 1:
        raise WSpaceError(
            message(f"--inputs: {text!r} is no shape", expected="sizes as in 2x3x32x32 or int:2x9")
        )
    generator = torch.Generator().manual_seed(0)
    if kind == "int":
        return torch.randint(10, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _from_reference(
    text: str, given: tuple[Tensor, ...] | None, *, meta: bool, seed: int
) -> Subject:
    with working(f"building {text}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = resolve(text, meta=meta, inputs=given)
    args, kwargs = tree_map_only(Tensor, _with_values, (found.args, dict(found.kwargs)))
    return Subject(text, found.module, args, kwargs, found.checkpoint)


def _with_values(tensor: Tensor) -> Tensor:
    """The tensor; if it is on the meta device, one of its kind (inputs are never large)."""
    return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def _from_checkpoint(
    text: str, model: str, key: str | None, given: tuple[Tensor, ...] | None, *, meta: bool
) -> Subject:
    path = Path(text)
    if not path.exists():
        raise CheckpointError(
            message(
                f"there is no {text}",
                expected=f"a path, or a model reference that begins with {', '.join(PREFIXES)}",
                help=_meant(text),
            )
        )
    with working(f"reading {text}"):
        weights = load_checkpoint(path, key=key)
    if not model and (path / "config.json").is_file():
        model = f"hf:{text}"
    if model:
        found = resolve(model, weights=False, meta=meta, inputs=given)
        weights = fit_checkpoint(weights, found.module)
        if not meta:
            load_into(found.module, weights)
        name = f"{text} as {model}"
        return Subject(name, found.module, found.args, dict(found.kwargs), weights)
    try:
        module, args = module_from_checkpoint(weights)
    except CheckpointError as error:
        return Subject(text, weights=weights, note=str(error))
    note = "read off the names and shapes of the tensors; --model names the real code"
    return Subject(text, module, given or args, {}, weights, note=note)


def _meant(text: str) -> str:
    if text.partition(":")[0].endswith(".py") or text.partition(":")[2].isidentifier():
        return f"did you mean py:{text}?"
    if text.endswith(".json"):
        return f"did you mean hf:{text}?"
    return "nothing is ever downloaded; check the path"
