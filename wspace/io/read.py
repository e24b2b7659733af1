"""Reading checkpoints without running what is in them."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wspace.errors import CheckpointError
from wspace.io.fit import fit_checkpoint
from wspace.io.layout import (
    INDEX,
    TORCH_SUFFIXES,
    Checkpoint,
    Layout,
    State,
    inside,
    text,
    tied_names,
)

# In the order in which transformers looks for them.
FOLDER_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
DDP = "module."
COMPILED = "_orig_mod."
AGAIN = "fetch or save the file again"


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
        raise CheckpointError(
            text(f"there is no {path}", help="check the path; nothing is ever downloaded")
        )
    file = path
    if path.is_dir():
        found = weights_file(path)
        if found is None:
            expected = f"one of {', '.join(FOLDER_FILES)}"
            raise CheckpointError(text(f"folder {path} holds no weights", expected=expected))
        file = found
    if file.name.endswith(INDEX):
        tensors, layout = _load_shards(file)
    else:
        tensors, layout = _load_file(file, key)
    if key is not None and (layout.kind == "safetensors" or layout.index is not None):
        raise CheckpointError(
            text(f"{file} holds one state", got=f"key={key!r}", help="leave `key` out")
        )
    layout = replace(layout, folder=path.is_dir())
    checkpoint = _unwrapped(tensors, layout)
    return checkpoint if module is None else fit_checkpoint(checkpoint, module)


def weights_file(folder: str | Path) -> Path | None:
    """File or index of the weights in a folder; None if it holds none.

    Args:
        folder: A folder as `save_pretrained` writes it, or one with a single weight file.

    Returns:
        Path of a weight file or of a sharded index.

    Raises:
        CheckpointError: If there are several, and none has a name that transformers looks for.
    """
    folder = Path(folder)
    for name in FOLDER_FILES:
        if (folder / name).exists():
            return inside(folder, name)
    files = sorted(item.name for item in folder.iterdir() if item.is_file())
    indices = [name for name in files if name.endswith(INDEX)]
    found = indices or [name for name in files if name.endswith((".safetensors", *TORCH_SUFFIXES))]
    if len(found) > 1:
        help = "pass the path of one of them"
        raise CheckpointError(
            text(f"folder {folder} holds several weight files", got=found, help=help)
        )
    return inside(folder, found[0]) if found else None


def _unwrapped(tensors: State, layout: Layout) -> Checkpoint:
    """Checkpoint without the prefixes of wrappers, and with what can be said of its tensors."""
    names = {name: name.replace(COMPILED, "") for name in tensors}
    if names and all(name.startswith(DDP) for name in names.values()):
        names = {old: name.removeprefix(DDP) for old, name in names.items()}
    if len(set(names.values())) < len(names) or "" in names.values():
        names = {name: name for name in tensors}
    state = {names[name]: tensor for name, tensor in tensors.items()}
    starts = {old.removesuffix(name) if old.endswith(name) else "" for old, name in names.items()}
    layout = replace(
        layout,
        shards={names[name]: file for name, file in layout.shards.items()},
        stored={name: old for old, name in names.items() if name != old},
        prefix=starts.pop() if len(starts) == 1 else "",
        ties=tuple(tuple(group) for group in tied_names(state) if len(group) > 1),
        dtypes={name: tensor.dtype for name, tensor in state.items()},
    )
    return Checkpoint(state, layout)


# --- files and shards -----------------------------------------------------------------------------


def _load_file(file: Path, key: str | None = None) -> tuple[State, Layout]:
    if file.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(file)
        shards = dict.fromkeys(tensors, file.name)
        # `safetensors.torch.save_model` writes a tied tensor once and notes its other names.
        aliases = {name: kept for name, kept in metadata.items() if kept in shards}
        tensors |= {name: tensors[kept] for name, kept in aliases.items() if name not in shards}
        rest = {name: value for name, value in metadata.items() if name not in aliases}
        return tensors, Layout("safetensors", file, shards=shards, metadata={file.name: rest})
    if file.suffix not in TORCH_SUFFIXES:
        kinds = ", ".join((".safetensors", *TORCH_SUFFIXES, f"*{INDEX}"))
        raise CheckpointError(
            text(f"{file} is of no known format", expected=f"a folder, or one of {kinds}")
        )
    content = _read_torch(file)
    nesting, weights = _find_weights(content, key, file)
    siblings, left_out = _siblings(content, nesting)
    layout = Layout(
        "torch",
        file,
        shards=dict.fromkeys(weights, file.name),
        metadata={file.name: getattr(weights, "_metadata", {})},
        nesting=nesting,
        siblings=siblings,
        left_out=left_out,
    )
    return {name: tensor.detach() for name, tensor in weights.items()}, layout


def _load_shards(index: Path) -> tuple[State, Layout]:
    folder = index.parent
    content = _json(index.read_bytes(), index)
    where = content.get("weight_map")
    metadata = content.get("metadata", {})
    if not _is_table(where) or not isinstance(metadata, dict):
        expected = "an object `weight_map` from names of tensors to names of files"
        raise CheckpointError(
            text(f"{index} is not an index of shards", expected=expected, help=AGAIN)
        )
    shards = {name: inside(folder, name) for name in dict.fromkeys(where.values())}
    lost = [f"no file {name!r}" for name, file in shards.items() if not file.is_file()]
    if lost:
        raise CheckpointError(
            text(f"{index} names shards that are not there", got=lost, help=AGAIN)
        )
    parts = {name: _load_file(file) for name, file in shards.items()}
    layouts = {name: layout for name, (_, layout) in parts.items()}
    if problems := _index_problems(where, parts):
        raise CheckpointError(text(f"{index} and its shards disagree", got=problems, help=AGAIN))
    tensors: State = {}
    for part, _ in parts.values():
        tensors |= part
    first = next(iter(layouts.values()), Layout("safetensors", index))
    layout = Layout(
        first.kind,
        index,
        index=cast(dict[str, Any], metadata),
        shards={name: file for name, file in where.items() if name in layouts[file].shards},
        metadata={name: layout.metadata[name] for name, layout in layouts.items()},
    )
    return {name: tensors[name] for name in dict.fromkeys([*where, *tensors])}, layout


def _index_problems(
    where: Mapping[str, str], parts: Mapping[str, tuple[State, Layout]]
) -> list[str]:
    problems = [
        f"no {name!r} in {file}" for name, file in where.items() if name not in parts[file][0]
    ]
    owner: dict[str, str] = {}
    for file, (_, layout) in parts.items():
        if layout.nesting:
            problems.append(f"{file} nests its weights under {'.'.join(layout.nesting)!r}")
        for name in layout.shards:
            if name in owner:
                problems.append(f"{name!r} in both {owner[name]} and {file}")
            elif name not in where:
                problems.append(f"{name!r} in {file}, which the index does not name")
            owner.setdefault(name, file)
    if len({layout.kind for _, layout in parts.values()}) > 1:
        problems.append("shards of different formats")
    return problems


def _is_table(item: object) -> TypeGuard[dict[str, str]]:
    return isinstance(item, dict) and all(
        isinstance(value, str) for value in cast(dict[Any, Any], item).values()
    )


# --- safetensors ----------------------------------------------------------------------------------


def _read_safetensors(file: Path) -> tuple[State, dict[str, str]]:
    header = _header(file)
    metadata = header.pop("__metadata__", None) or {}
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in header}, metadata
    except Exception as error:
        raise CheckpointError(
            text(f"{file} has a corrupt header", got=str(error), help=AGAIN)
        ) from error


def _header(file: Path) -> dict[str, Any]:
    """Names and places of the tensors (safe_open says nothing of names that occur twice)."""
    size = file.stat().st_size
    if size == 0:
        raise CheckpointError(text(f"{file} is empty", help=AGAIN))
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        space = size - 8 - length
        if space < 0:
            raise CheckpointError(
                text(
                    f"{file} is truncated, or not a safetensors file",
                    expected=f"a header of {length} bytes",
                    got=f"{max(size - 8, 0)} bytes",
                    help=AGAIN,
                )
            )
        header = _json(opened.read(length), file)
    try:
        places = [item["data_offsets"][1] for name, item in header.items() if name[:2] != "__"]
        end = max(places, default=0)
        missing = end - space
    except (TypeError, KeyError, IndexError) as error:
        raise CheckpointError(
            text(f"{file} has a corrupt header", got=repr(error), help=AGAIN)
        ) from error
    if missing > 0:
        expected, got = f"{end} bytes of data", f"{space} bytes"
        raise CheckpointError(text(f"{file} is truncated", expected=expected, got=got, help=AGAIN))
    return header


def _json(raw: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted(name for name in content if names.count(name) > 1)
            raise CheckpointError(text(f"{file} names something twice", got=twice, help=AGAIN))
        return content

    try:
        content = json.loads(raw, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        what = "has a corrupt header" if file.suffix == ".safetensors" else "is not JSON"
        raise CheckpointError(text(f"{file} {what}", got=str(error), help=AGAIN)) from error
    if not isinstance(content, dict):
        got = type(content).__name__
        raise CheckpointError(
            text(f"{file} is corrupt", expected="a JSON object", got=got, help=AGAIN)
        )
    return cast(dict[str, Any], content)


# --- torch ----------------------------------------------------------------------------------------


def _read_torch(file: Path) -> object:
    if file.stat().st_size == 0:
        raise CheckpointError(text(f"{file} is empty", help=AGAIN))
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"  # the format before torch 1.6 cannot be mapped
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                text(
                    f"{file} asks to run code",
                    expected="tensors, numbers, strings and containers of them",
                    got=found[1],
                    help="it was not run; ask for safetensors, or for `module.state_dict()` alone",
                )
            ) from error
        raise CheckpointError(
            text(f"{file} is damaged", got=str(error).split("\n")[0], help=AGAIN)
        ) from error


def _find_weights(
    content: object, key: str | None, file: Path
) -> tuple[tuple[str, ...], Mapping[str, Tensor]]:
    """Where the weights of a training checkpoint are, and the weights."""
    found = dict(_states(content, ()))
    labels = [".".join(path) for path in found]
    if key is not None:
        found = {path: item for path, item in found.items() if ".".join(path) == key}
    if len(found) != 1:
        raise CheckpointError(
            text(
                f"{file} holds {len(labels) or 'no'} states"
                + (f", none at {key!r}" if key else ""),
                expected="one mapping from names to tensors",
                got=[repr(label) for label in labels] or type(content).__name__,
                help='choose one by key="..."' if labels else "save `module.state_dict()`",
            )
        )
    ((path, weights),) = found.items()
    if bad := [f"{name!r} is {_type(item)}" for name, item in weights.items() if not _is(item)]:
        raise CheckpointError(
            text(f"{file} holds values that are not tensors", got=bad, help="leave them out")
        )
    return path, weights


def _states(content: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Mappings that hold weights: not an optimizer's, and not a table of scalars (Lightning's)."""
    if not isinstance(content, Mapping) or "param_groups" in content or len(path) > 3:
        return
    items = cast(Mapping[Any, object], content)
    if not all(isinstance(name, str) for name in items):
        return
    scalars = not path and all(_is(item) for item in items.values())
    if scalars or any(_is(item) and item.ndim for item in items.values()):
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


def _is(item: object) -> TypeGuard[Tensor]:
    return isinstance(item, Tensor)


def _type(item: object) -> str:
    return type(item).__name__
