"""Several checkpoints of one network, with its space: what align, merge and interpolate work on.

Checkpoints are memory-mapped and the network's code is run on meta tensors, so nothing is as large
as a model here.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace import trace
from wspace.cli.screen import plural, working
from wspace.cli.subject import example, is_reference
from wspace.errors import CheckpointError, TraceError, WSpaceError, message
from wspace.io import Checkpoint, fit_checkpoint, load_checkpoint, module_from_checkpoint
from wspace.reference import resolve
from wspace.space import WeightSpace
from wspace.trace.sandbox import attributes_restored, dense_experts, double_precision, tensors_in
from wspace.trace.verify import difference

CODE = "name it with --model, as hf:<folder|config.json> or py:<file.py>:<factory>"


@dataclass(frozen=True)
class Networks:
    """Checkpoints that fit one network.

    Attributes:
        paths: What was named.
        states: The checkpoints under the names of the network, in the same order.
        space: The weight space.
        code: Where the network's code is from, as it is shown.
        build: Builds the network with memory for its weights, in evaluation mode, and its inputs.
        seconds: Time that tracing took.
        guessed: Whether the code was read off the names and shapes of tensors.
    """

    paths: tuple[Path, ...]
    states: tuple[Checkpoint, ...]
    space: WeightSpace
    code: str
    build: Callable[[], "Runnable"]
    seconds: float
    guessed: bool = False

    @property
    def summary(self) -> str:
        """The space in a few words."""
        groups = plural(len(self.space.groups), "group")
        return f"{groups}, which move {100 * self.space.coverage:.1f}% of the elements"

    @property
    def size(self) -> int:
        """Bytes of the largest checkpoint."""
        return max(sum(x.nbytes for x in state.values()) for state in self.states)


@dataclass(frozen=True)
class Runnable:
    """A network with memory for its weights, and example inputs."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


def network_options(it: argparse.ArgumentParser) -> None:
    """Adds the options that align, merge and interpolate share."""
    it.add_argument("--force", action="store_true", help="replace files that are there")
    it.add_argument("--all", action="store_true", help="show all rows of long tables")
    it.add_argument("--json", metavar="FILE", help="write the findings as JSON; - for stdout")


def open_networks(
    verb: str, names: Sequence[str], *, model: str, key: str | None, inputs: Sequence[str]
) -> Networks:
    """Reads checkpoints, finds their code, traces it, and fits them to it.

    Args:
        verb: The command, for messages.
        names: Paths of checkpoints.
        model: Reference to the code; empty if a folder has it or the names of tensors tell it.
        key: Which of several states in a torch file.
        inputs: Example inputs to use instead of the code's own.

    Returns:
        The networks.

    Raises:
        WSpaceError: If a file is not there, the code is not known, or a checkpoint does not fit;
            all that do not fit are listed.
    """
    paths = _paths(verb, names)
    weights = _read(names, paths, key)
    given = tuple(example(text) for text in inputs) or None
    folder = next((path for path in paths if (path / "config.json").is_file()), None)
    if not model and folder is not None:
        model = f"hf:{folder}"
    if not model:
        return _without_code(verb, paths, weights, given)

    def build(*, meta: bool = False) -> Runnable:
        found = resolve(model, weights=False, meta=meta, inputs=given)
        return Runnable(found.module, tuple(found.args), found.kwargs)

    with working(f"tracing {model}"):
        start = time.perf_counter()
        try:
            found = build(meta=True)
            space = trace(found.module, found.args, dict(found.kwargs))
        except (CheckpointError, TraceError):  # code that needs values
            found = build()
            states = _fitted(verb, paths, weights, found.module)
            set_state(found.module, states[0])
            space = trace(found.module, found.args, dict(found.kwargs))
        seconds = time.perf_counter() - start
    states = _fitted(verb, paths, weights, found.module)
    return Networks(paths, states, space, model, build, seconds)


def set_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a fitted state into a module, one tensor at a time."""
    items: dict[str, object] = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in items.items():
            if isinstance(tensor, Tensor):
                tensor.copy_(state[name])


def change_of_function(
    found: Runnable, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> float:
    """Largest relative change of an output, in float64, when one state is put for another.

    Args:
        found: The network; its weights are replaced.
        before: A state.
        after: Another; read tensor by tensor.

    Returns:
        The change on the example inputs.
    """
    outputs: list[list[Tensor]] = []
    args, kwargs = _double((found.args, dict(found.kwargs)))
    module = found.module.double().eval()
    for state in (before, after):
        set_state(module, state)
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            double_precision(),
            dense_experts(module),
            attributes_restored(module),
        ):
            torch.manual_seed(0)
            outputs.append([x.detach().clone() for x in tensors_in(module(*args, **kwargs))])
    return difference(*outputs)


def _double(inputs: Any) -> Any:
    def cast(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return tree_map_only(Tensor, cast, inputs)


def _paths(verb: str, names: Sequence[str]) -> tuple[Path, ...]:
    """Paths of checkpoints; ``hf:folder`` is that folder."""
    bad = [
        f"{name}, which names code" if is_reference(name) else f"{name}, which is not there"
        for name in names
        if not Path(name.removeprefix("hf:")).exists()
    ]
    bad += [f"{name}, which is a configuration" for name in names if name.endswith(".json")
            and name.startswith("hf:")]  # fmt: skip
    if bad:
        help = "pass files or folders of weights; --model names code; nothing is ever downloaded"
        raise CheckpointError(
            message(f"{verb}: no checkpoint", expected="paths", got=bad, help=help)
        )
    return tuple(Path(name.removeprefix("hf:")) for name in names)


def _read(names: Sequence[str], paths: Sequence[Path], key: str | None) -> list[Checkpoint]:
    """The checkpoints; those named ``hf:folder`` as transformers rearranges them."""
    weights: list[Checkpoint] = []
    problems: list[str] = []
    for name, path in zip(names, paths, strict=True):
        with working(f"reading {path}"):
            try:
                if name.startswith("hf:"):
                    found = resolve(name, weights=True, meta=True).checkpoint
                    weights += [found] if isinstance(found, Checkpoint) else []
                else:
                    weights.append(load_checkpoint(path, key=key))
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return weights


def _without_code(
    verb: str, paths: tuple[Path, ...], weights: list[Checkpoint], given: tuple[Tensor, ...] | None
) -> Networks:
    def build() -> Runnable:
        module, args = module_from_checkpoint(weights[0])
        return Runnable(module, given or args)

    try:
        found = build()
    except CheckpointError as error:
        raise WSpaceError(
            message(
                f"{verb}: {paths[0]} comes without code, so its symmetry is not known",
                got=str(error),
                help=CODE,
            )
        ) from error
    start = time.perf_counter()
    space = trace(found.module, found.args)
    seconds = time.perf_counter() - start
    states = _fitted(verb, paths, weights, found.module)
    code = "read off the names and shapes of the tensors; --model names the real code"
    return Networks(paths, states, space, code, build, seconds, guessed=True)


def _fitted(
    verb: str, paths: Sequence[Path], weights: Sequence[Checkpoint], module: nn.Module
) -> tuple[Checkpoint, ...]:
    """The checkpoints under the names of the module; an error lists all that do not fit."""
    states: list[Checkpoint] = []
    problems: list[str] = []
    for path, state in zip(paths, weights, strict=True):
        try:
            states.append(fit_checkpoint(state, module))
        except CheckpointError as error:
            problems.append(f"{path}: " + str(error).removeprefix("fit_checkpoint: "))
    if len(problems) == 1:
        raise CheckpointError(f"{verb}: {problems[0]}")
    if problems:
        raise CheckpointError(
            message(f"{verb}: {len(problems)} checkpoints do not fit", got=problems)
        )
    return tuple(states)
