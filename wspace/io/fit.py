"""Fitting a checkpoint to a module, by names, shapes and ties."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError
from wspace.io.layout import Checkpoint, Layout, State, text, tied_names


@overload
def fit_checkpoint(state: Checkpoint, module: nn.Module) -> Checkpoint: ...
@overload
def fit_checkpoint(state: Mapping[str, Tensor], module: nn.Module) -> State: ...
def fit_checkpoint(state: Mapping[str, Tensor], module: nn.Module) -> State:
    """State under the names of a module, complete and of the right shapes.

    A prefix that one side has on all its names, or on those of a submodule, is added or taken off.
    A name that the checkpoint leaves out because the module ties it to another is completed with
    that tensor. Buffers that are not persistent, and names that a transformers class declares to be
    obsolete, are left out. The module is not modified; it may be on the meta device.

    Args:
        state: Parameters and buffers, as read.
        module: Whose names, shapes and ties decide.

    Returns:
        Tensors of `state` in the order of `module.state_dict()`; a Checkpoint if `state` is one.

    Raises:
        CheckpointError: Listing all names that are missing, unexpected or of another shape.
    """
    wanted = _wanted(module)
    strip, add = _prefixes(state, wanted)
    names = {add + name.removeprefix(strip): name for name in state}  # of the module → of the state
    for name in _ignored(module, names.keys() - wanted.keys()):
        del names[name]
    given = dict(names)
    groups = [group for group in tied_names(wanted) if len(group) > 1]
    for group in groups:
        if there := [name for name in group if name in names]:
            names |= {name: names[there[0]] for name in group if name not in names}
    if problems := _problems({name: state[old] for name, old in names.items()}, wanted, groups):
        renamed = f", {strip!r} replaced by {add!r}" if strip or add else ""
        raise CheckpointError(
            text(
                f"the checkpoint does not fit {type(module).__name__}{renamed}",
                verb="fit_checkpoint",
                expected="every parameter and persistent buffer of the module, and no other",
                got=problems,
                help="build the module from the configuration that the weights were trained with",
            )
        )
    for group in groups:  # the file may hold equal copies
        names |= dict.fromkeys(group, names[group[0]])
    fitted = {name: state[names[name]] for name in wanted}
    if not isinstance(state, Checkpoint):
        return fitted
    return Checkpoint(fitted, _renamed(state.layout, given, fitted))


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint into a module: all of it or, on an error, nothing.

    The module keeps its data types and devices; values are converted as `Tensor.copy_` does.

    Args:
        module: Modified in place.
        state: Fitted to the module first (`fit_checkpoint`).

    Raises:
        CheckpointError: If the state does not fit, or one of the two is on the meta device.
    """
    fitted = fit_checkpoint(state, module)
    wanted = _wanted(module)
    if bad := [name for name in fitted if fitted[name].is_meta or wanted[name].is_meta]:
        raise CheckpointError(
            text(
                "values cannot be copied",
                verb="load_into",
                expected="tensors with values on both sides",
                got=[f"{name} on the meta device" for name in bad],
                help="build the module on a real device",
            )
        )
    with torch.no_grad():
        for name, tensor in fitted.items():
            wanted[name].copy_(tensor)


def _wanted(module: nn.Module) -> State:
    """What a checkpoint of the module holds; tied names give the same object."""
    entries: dict[str, object] = module.state_dict(keep_vars=True)  # may hold extra state
    return {name: item for name, item in entries.items() if isinstance(item, Tensor)}


def _prefixes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, str]:
    """Prefix to take off all names of the state, and prefix to add: what makes most names fit."""
    starts = Counter(start for name in state for start in _starts(name))
    strips = ["", *(start for start, count in starts.items() if count == len(state))]
    adds = ["", *dict.fromkeys(start for name in wanted for start in _starts(name)[:2])]
    shapes = {name: tensor.shape for name, tensor in wanted.items()}

    def score(pair: tuple[str, str]) -> tuple[int, int]:
        strip, add = pair
        names = {add + name.removeprefix(strip): tensor for name, tensor in state.items()}
        there = [name for name in names if name in shapes]
        return sum(names[name].shape == shapes[name] for name in there), len(there)

    return max(((strip, add) for strip in strips for add in adds), key=score)  # the first of equals


def _starts(name: str) -> list[str]:
    """`a.` and `a.b.` of the name `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:depth]) + "." for depth in range(1, len(parts))]


def _ignored(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Names that the module once saved: its buffers that are not persistent, and declared ones."""
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    patterns: Iterable[str] = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [
        name
        for name in names
        if name in buffers or any(re.search(pattern, name) for pattern in patterns)
    ]


def _problems(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], groups: list[list[str]]
) -> list[str]:
    """One line for each name that does not fit."""
    problems = [f"missing {name} {_shape(wanted[name])}" for name in wanted if name not in found]
    problems += [f"unexpected {name} {_shape(found[name])}" for name in found if name not in wanted]
    for name, new, old in [(name, found[name], wanted[name]) for name in wanted if name in found]:
        if new.shape != old.shape:
            problems.append(f"{name} of shape {_shape(new)}, the module's is {_shape(old)}")
        elif not torch.can_cast(new.dtype, old.dtype):
            problems.append(f"{name} of {new.dtype}, the module's is {old.dtype}")
    for group in groups:
        there = [name for name in group if name in found]
        problems += [
            f"{there[0]} and {name} that differ; the module ties them"
            for name in there[1:]
            if found[name] is not found[there[0]] and not _equal(found[name], found[there[0]])
        ]
    return problems


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.allclose(a, b, 0, 0, equal_nan=True))


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _renamed(layout: Layout, names: Mapping[str, str], fitted: Mapping[str, Tensor]) -> Layout:
    """Layout under the names of the module, which map to those of the checkpoint."""
    stored = {new: layout.stored.get(old, layout.prefix + old) for new, old in names.items()}
    return replace(
        layout,
        shards={new: layout.shards[old] for new, old in names.items() if old in layout.shards},
        stored=stored,
        prefix="",
        ties=tuple(tuple(group) for group in tied_names(fitted) if len(group) > 1),
        implied=frozenset(fitted.keys() - names.keys()),
        dtypes={name: tensor.dtype for name, tensor in fitted.items()},
    )
