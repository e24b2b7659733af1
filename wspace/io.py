"""Checkpoints on disk: read safely, written back as they were, and fitted to a module.

A checkpoint is a State (parameters and buffers by qualified name) and a `Layout`, which is what the
file knows beyond the tensors: its shards, metadata, nesting and ties. Nothing here runs code that
comes with the weights: pickles are read by torch's restricted unpickler, and paths named inside a
file have to stay in its folder. Tensors are memory-mapped where the format allows.
"""

import json
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from wspace.errors import CheckpointError, message

__all__ = [
    "Checkpoint",
    "Layout",
    "fit_checkpoint",
    "load_checkpoint",
    "load_into",
    "save_checkpoint",
    "weights_file",
]

State = dict[str, Tensor]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
# In the order in which transformers looks for them.
FOLDER_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
# Weights in a folder, ours or another framework's: what does not travel with the configuration.
HEAVY = (".safetensors", *TORCH_SUFFIXES, INDEX, ".h5", ".msgpack", ".onnx", ".gguf", ".npz")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint lies on disk, so that another state can be written the same way.

    Attributes:
        kind: Format of the files.
        file: What was read: the only file, or the index of the shards.
        folder: Whether the whole folder was named, so that its configuration travels along.
        index: Metadata of the index; None for a single file.
        shards: Name of each tensor that a file holds → name of that file.
        metadata: Name of each file → its metadata (of a torch file: versions of the modules).
        stored: Name in the state → name in the file, where the two differ.
        prefix: What the file puts before names that are new to it.
        ties: Names that are one tensor.
        implied: Names that the file leaves out because they are tied to one that it holds.
        dtypes: Data type of each tensor.
        nesting: Keys that lead to the weights in a torch file.
        siblings: What lies beside the weights at each level of the nesting and holds no tensor.
        left_out: What lies beside them and does hold tensors (optimizer, averages). It belongs to
            the old weights, so it is not written again.
    """

    kind: Literal["safetensors", "torch"]
    file: Path
    folder: bool = False
    index: Mapping[str, Any] | None = None
    shards: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    prefix: str = ""
    ties: tuple[tuple[str, ...], ...] = ()
    implied: frozenset[str] = frozenset()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])
    nesting: tuple[str, ...] = ()
    siblings: tuple[Mapping[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()


class Checkpoint(dict[str, Tensor]):
    """State read from disk that remembers its layout; otherwise an ordinary dict."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        super().__init__(tensors)
        self.layout = layout

    @property
    def path(self) -> Path:
        """The file, index or folder that was read."""
        return self.layout.file.parent if self.layout.folder else self.layout.file

    @property
    def nonfinite(self) -> dict[str, int]:
        """How many elements of each tensor are NaN or infinite; empty if all are finite."""
        counts = {name: _nonfinite(tensor) for name, tensor in self.items()}
        return {name: count for name, count in counts.items() if count}


def load_checkpoint(
    path: str | Path, *, module: nn.Module | None = None, key: str | None = None
) -> Checkpoint:
    """State that a file, a sharded index or a Hugging Face folder holds.

    The weights of a training checkpoint are found by structure, not by name, and the prefixes of
    `DistributedDataParallel` and `torch.compile` are taken off. Of several weight files in a folder
    the one that transformers prefers is read. No code is run. The files are memory-mapped, so do
    not overwrite them in place while the result is in use (`save_checkpoint` never does).

    Args:
        path: `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`, `*.index.json`, or a folder.
        module: If given, the state is fitted to it (`fit_checkpoint`).
        key: Which of several states in a torch file, as the error message lists them.

    Returns:
        A checkpoint: a dict of tensors on the CPU, detached, with its layout.

    Raises:
        CheckpointError: If the file is damaged, unsafe or ambiguous, or does not fit the module.
    """
    path = Path(path)
    if not path.exists():
        raise _error(f"there is no {path}", help="check the path; nothing is ever downloaded")
    file = path
    if path.is_dir():
        found = weights_file(path)
        if found is None:
            names = ", ".join(FOLDER_FILES)
            raise _error(f"folder {path} holds no weights", expected=f"one of {names}")
        file = found
    if file.name.endswith(INDEX):
        tensors, layout = _load_shards(file)
    else:
        tensors, layout = _load_file(file, key)
    if key is not None and layout.kind == "safetensors":
        raise _error(f"{file} holds one state", got=f"key={key!r}", help="leave `key` out")
    tensors, layout = _unwrapped(tensors, layout)
    ties = tuple(tuple(names) for names in _ties(tensors) if len(names) > 1)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    layout = replace(layout, file=file, folder=path.is_dir(), ties=ties, dtypes=dtypes)
    checkpoint = Checkpoint(tensors, layout)
    return checkpoint if module is None else fit_checkpoint(checkpoint, module)


def weights_file(folder: str | Path) -> Path | None:
    """File or index of the weights in a folder; None if it holds none.

    Raises:
        CheckpointError: If there are several, and none has a name that transformers looks for.
    """
    folder = Path(folder)
    for name in FOLDER_FILES:
        if (folder / name).exists():
            return _inside(folder, name)
    files = sorted(item.name for item in folder.iterdir() if item.is_file())
    indices = [name for name in files if name.endswith(INDEX)]
    found = indices or [name for name in files if name.endswith((".safetensors", *TORCH_SUFFIXES))]
    if len(found) > 1:
        raise _error(f"folder {folder} holds several weight files", got=found, help="name the file")
    return _inside(folder, found[0]) if found else None


def save_checkpoint(
    state: Mapping[str, Tensor], path: str | Path, *, like: Checkpoint | Layout | None = None
) -> None:
    """Writes a state; afterwards `load_checkpoint(path)` equals it bit for bit, ties included.

    Everything is written beside the target first, so a failed save leaves the old file as it was.
    (Shards are then moved one after the other, the index last.)

    Args:
        state: Tensors by name; tensors that share storage are written once.
        path: A file; a folder or an index if `like` is one. A folder has to be new or empty.
        like: Layout to follow: same shards, metadata, nesting, prefix and ties; the configuration
            of a folder is copied. By default the suffix of `path` decides.

    Raises:
        CheckpointError: If the format cannot hold a tensor, or the path does not fit the layout.
    """
    path = Path(path)
    layout = like.layout if isinstance(like, Checkpoint) else like or _plain(path)
    _check_target(path, layout)
    if bad := [f"{name!r}: {kind}" for name, item in state.items() if (kind := _no_data(item))]:
        raise _saving("a state holds tensors with data only", got=bad)
    aliases, files = _plan(state, layout)
    with _staging(path) as staging:
        for name, tensors in files.items():
            alone = not layout.folder and layout.index is None
            target = staging / (path.name if alone else name)
            metadata = layout.metadata.get(name, {})
            if layout.kind == "torch":
                _write_torch(target, tensors, metadata, layout)
            else:
                named = {alias: kept for alias, kept in aliases.items() if kept in tensors}
                _write_safetensors(target, tensors, {**metadata, **named})
        if layout.index is not None:
            name = layout.file.name if layout.folder else path.name
            (staging / name).write_text(_index(files, layout.index), encoding="utf-8")
        _move(staging, path, layout)


def fit_checkpoint(state: Mapping[str, Tensor], module: nn.Module) -> Checkpoint | State:
    """State under the names of a module, complete and of the right shapes.

    A prefix that one of the two sides has on every name is added or taken off. A name that the
    checkpoint leaves out because the module ties it to another one is completed with that tensor.
    Buffers that are not persistent, and what a transformers class declares to be obsolete, are left
    out. The module is not modified; it may be on the meta device.

    Args:
        state: Parameters and buffers, as read.
        module: Whose names and shapes decide.

    Returns:
        The tensors of `state` in the order of `module.state_dict()`; a Checkpoint if `state` is one.

    Raises:
        CheckpointError: Listing all names that are missing, unexpected or of another shape.
    """
    wanted = _wanted(module)
    strip, add = _prefixes(state, wanted)
    found = {add + name.removeprefix(strip): name for name in state}
    ignored = _ignored(module, found.keys() - wanted.keys())
    problems = _tie_conflicts(state, found, wanted)
    names = {name: found[name] for name in found if name not in ignored}
    implied = _complete(names, wanted)
    fitted = {name: state[names[name]] for name in wanted if name in names}
    problems += [f"missing {name} {_shape(wanted[name])}" for name in wanted if name not in names]
    problems += [
        f"unexpected {old} {_shape(state[old])}" for name, old in names.items() if name not in wanted
    ]
    problems += _misshaped(fitted, wanted)
    if problems:
        raise CheckpointError(
            message(
                f"fit_checkpoint: the checkpoint does not fit {type(module).__name__}",
                expected="every parameter and persistent buffer of the module, and no other",
                got=problems,
                help="build the module from the configuration that the weights were trained with",
            )
        )
    if not isinstance(state, Checkpoint):
        return fitted
    new = {name: old for name, old in names.items() if name not in implied}
    return Checkpoint(fitted, _renamed(state.layout, new, frozenset(implied)))


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint into a module, all of it or (on an error) nothing.

    The module keeps its data types and devices: values are converted as `Tensor.copy_` does.

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
            message(
                "load_into: values cannot be copied",
                expected="tensors with data",
                got=[f"{name} on the meta device" for name in bad],
                help="build the module on a real device, or `module.to_empty(device=...)` it",
            )
        )
    with torch.no_grad():
        for name, tensor in fitted.items():
            wanted[name].copy_(tensor)


# --- reading ---------------------------------------------------------------------------------------


def _load_file(file: Path, key: str | None) -> tuple[State, Layout]:
    if file.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(file)
        layout = Layout("safetensors", file, metadata={file.name: metadata})
    elif file.suffix in TORCH_SUFFIXES:
        content = _read_torch(file)
        nesting, weights = _find_weights(content, key, file)
        tensors = {name: tensor.detach() for name, tensor in weights.items()}
        siblings, left_out = _siblings(content, nesting)
        versions = getattr(weights, "_metadata", {})
        metadata = {file.name: versions if isinstance(versions, Mapping) else {}}
        layout = Layout(
            "torch", file, nesting=nesting, siblings=siblings, left_out=left_out, metadata=metadata
        )
    else:
        kinds = ", ".join((".safetensors", *TORCH_SUFFIXES, f"*{INDEX}"))
        raise _error(f"{file} is of no known format", expected=f"a folder, or {kinds}")
    return tensors, replace(layout, shards=dict.fromkeys(tensors, file.name))


def _read_safetensors(file: Path) -> tuple[State, dict[str, str]]:
    header = _header(file)
    metadata = cast(dict[str, str], header.pop("__metadata__", None) or {})
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in header}, metadata
    except Exception as error:
        raise _error(f"{file} has a corrupt header", got=str(error), help=RELOAD) from error


def _header(file: Path) -> dict[str, Any]:
    """Names and places of the tensors; safe_open alone would hide duplicates."""
    size = file.stat().st_size
    if size == 0:
        raise _error(f"{file} is empty", help=RELOAD)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > size - 8:
            raise _error(
                f"{file} is truncated, or not a safetensors file",
                expected=f"a header of {length} bytes",
                got=f"{max(size - 8, 0)} bytes",
                help=RELOAD,
            )
        header = _json(opened.read(length), file)
    try:
        end = max((item["data_offsets"][1] for name, item in header.items() if name[:2] != "__"))
    except ValueError:
        end = 0  # no tensor at all
    except (TypeError, KeyError, IndexError) as error:
        raise _error(f"{file} has a corrupt header", got=repr(error), help=RELOAD) from error
    if end != size - 8 - length:
        got = f"{size - 8 - length} bytes"
        raise _error(f"{file} is truncated", expected=f"{end} bytes of data", got=got, help=RELOAD)
    return header


def _json(text: str | bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise _error(f"{file} names something twice", got=twice, help=RELOAD)
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _error(f"{file} has a corrupt header", got=str(error), help=RELOAD) from error
    if not isinstance(content, dict):
        raise _error(f"{file} has a corrupt header", expected="a JSON object", got=str(content))
    return cast(dict[str, Any], content)


def _read_torch(file: Path) -> object:
    if file.stat().st_size == 0:
        raise _error(f"{file} is empty", help=RELOAD)
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"  # the format before torch 1.6 cannot be mapped
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise _error(
                f"{file} asks to run code",
                expected="tensors, numbers, strings and containers",
                got=found[1],
                help="it was not run; ask for safetensors, or for `module.state_dict()` alone",
            ) from error
        raise _error(f"{file} is damaged", got=str(error).split("\n")[0], help=RELOAD) from error


def _find_weights(
    content: object, key: str | None, file: Path
) -> tuple[tuple[str, ...], Mapping[str, Tensor]]:
    """Where the weights of a training checkpoint are, and the weights."""
    found = dict(_states(content, ()))
    labels = [".".join(path) for path in found]
    if key is not None:
        found = {path: item for path, item in found.items() if ".".join(path) == key}
    if len(found) != 1:
        raise _error(
            f"{file} holds {len(labels) or 'no'} states" + (f", none at {key!r}" if key else ""),
            expected="one mapping from names to tensors",
            got=[f"{label!r}" for label in labels] or type(content).__name__,
            help='choose one by key="..."' if labels else "save `module.state_dict()`",
        )
    ((path, weights),) = found.items()
    if bad := [f"{n!r} of type {type(t).__name__}" for n, t in weights.items() if not _is(t)]:
        raise _error(f"{file} holds values that are not tensors", got=bad, help="leave them out")
    return path, cast(Mapping[str, Tensor], weights)


def _states(content: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Any]]:
    """Mappings that hold weights. Not an optimizer's, and not a table of scalars (Lightning's)."""
    if not isinstance(content, Mapping) or "param_groups" in content or len(path) > 3:
        return
    items = cast(Mapping[Any, Any], content)
    if not all(isinstance(name, str) for name in items):
        return
    pure = not path and all(_is(item) for item in items.values())
    if pure or any(_is(item) and item.ndim for item in items.values()):
        yield path, items
    for name, item in items.items():
        yield from _states(item, (*path, name))


def _siblings(
    content: Any, nesting: tuple[str, ...]
) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    levels: list[Mapping[str, Any]] = []
    left_out: list[str] = []
    for depth, key in enumerate(nesting):
        rest = {name: item for name, item in content.items() if name != key}
        kept = {name: item for name, item in rest.items() if not _has_tensor(item)}
        levels.append(kept)
        left_out += [".".join((*nesting[:depth], name)) for name in rest if name not in kept]
        content = content[key]
    return tuple(levels), tuple(left_out)


def _has_tensor(item: object) -> bool:
    if isinstance(item, Mapping):
        return any(_has_tensor(value) for value in cast(Mapping[Any, Any], item).values())
    if isinstance(item, list | tuple | set):
        return any(_has_tensor(value) for value in cast(Iterable[Any], item))
    return _is(item)
