"""Writing checkpoints: the same layout as before, all of it or nothing.

Safetensors are written tensor by tensor; a torch file is pickled whole.
"""

import json
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wspace.errors import CheckpointError
from wspace.io.layout import (
    INDEX,
    TORCH_SUFFIXES,
    Checkpoint,
    Layout,
    inside,
    text,
    tied_names,
)
from wspace.io.stream import LazyState, write_safetensors

# Weights in a folder, ours or another framework's: what does not travel with the configuration.
HEAVY = (".safetensors", *TORCH_SUFFIXES, INDEX, ".h5", ".msgpack", ".onnx", ".gguf", ".npz")


def save_checkpoint(
    state: Mapping[str, Tensor], path: str | Path, *, like: Checkpoint | Layout | None = None
) -> None:
    """Writes a state, so that `load_checkpoint(path)` equals it bit for bit, ties included.

    Everything is written beside the target first, so a failed save leaves the old file as it was.
    (Of a sharded index, the shards are then moved into place one by one, and the index last.)
    What a training checkpoint holds beyond the weights is kept unless it has tensors: optimizer
    moments and averages belong to the old weights (`Layout.left_out`).

    A `LazyState` is computed while it is written: safetensors tensor by tensor, in memory for the
    largest one. A torch file is pickled, for which all of it has to be in memory.

    Args:
        state: Tensors by name; those that are the same memory are written once.
        path: A file; or a folder or an index, if that is what `like` is. A folder has to be new.
        like: Layout to follow: same shards, metadata, nesting, prefix and ties. The configuration
            and other small files of a folder are copied. By default the suffix of `path` decides.

    Raises:
        CheckpointError: If the format cannot hold a tensor, or the path does not fit the layout.
    """
    path = Path(path)
    layout = like.layout if isinstance(like, Checkpoint) else like or _plain(path)
    _check_target(path, layout)
    outline = state.outline if isinstance(state, LazyState) else state
    if bad := [f"{name!r}: {fault}" for name in state if (fault := _fault(outline[name], state))]:
        raise CheckpointError(_text("a value is no tensor that can be saved", got=bad))
    files, aliases = _plan(state, layout)
    with _staging(path) as staging:
        for file, names in files.items():
            alone = layout.index is None and not layout.folder
            target = staging / (path.name if alone else file)
            metadata = layout.metadata.get(file, {})
            if layout.kind == "torch":
                _write_torch(target, _read(state, names), metadata, layout)
            else:
                notes = {alias: kept for alias, kept in aliases.items() if kept in names}
                shapes = {stored: outline[name] for stored, name in names.items()}
                source = partial(_one, state, names)
                write_safetensors(target, shapes, source, {**metadata, **notes})
        if layout.index is not None:
            name = layout.file.name if layout.folder else path.name
            content = _index(files, outline, layout.index)
            (staging / name).write_text(content, encoding="utf-8")
        if layout.folder:
            _copy_small_files(layout.file.parent, staging)
            staging.replace(path)
        else:
            _move(staging, path)


def _plain(path: Path) -> Layout:
    if path.suffix == ".safetensors":
        return Layout("safetensors", path, metadata={path.name: {"format": "pt"}})
    if path.suffix in TORCH_SUFFIXES:
        return Layout("torch", path)
    kinds = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise CheckpointError(
        _text(
            f"{path} names no format",
            expected=f"a suffix {kinds}",
            help="or pass `like=` a checkpoint",
        )
    )


def _check_target(path: Path, layout: Layout) -> None:
    """Refuses a path that does not fit the layout, or that would hide or destroy other files."""
    if not path.parent.is_dir():
        raise CheckpointError(_text(f"there is no folder {path.parent}", help="create it"))
    if layout.folder:
        if path.suffix in {".safetensors", *TORCH_SUFFIXES} or path.name.endswith(INDEX):
            raise CheckpointError(
                _text(f"{path} names a file", expected="a folder, as `like` is one")
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            expected = "a new or empty folder"
            raise CheckpointError(
                _text(f"{path} is in use", expected=expected, help="choose another folder")
            )
        return
    if path.is_dir():
        raise CheckpointError(_text(f"{path} is a folder", expected="a file, as `like` is one"))
    suffixes = (".safetensors",) if layout.kind == "safetensors" else TORCH_SUFFIXES
    if layout.index is not None:
        suffixes = (INDEX,)
    if not path.name.endswith(suffixes):
        expected = f"a name that ends in {' or '.join(suffixes)}, as that of `like`"
        raise CheckpointError(_text(f"{path} does not fit the layout", expected=expected))
    taken = [name for name in set(layout.shards.values()) if (path.parent / name).exists()]
    if layout.index is not None and taken and not path.exists():
        got = [f"{name} of another checkpoint" for name in sorted(taken)]
        raise CheckpointError(
            _text(f"{path} would overwrite shards", got=got, help="choose another folder")
        )


def _fault(item: object, state: Mapping[str, Tensor]) -> str:
    if not isinstance(item, Tensor):
        return f"is {type(item).__name__}"
    lost = item.is_meta and not isinstance(state, LazyState)
    return "is on the meta device, it has no values" if lost else ""


# --- what goes where ------------------------------------------------------------------------------


def _plan(
    state: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Names in the state of each file by stored name, and stored aliases → the name written."""
    stored = {name: layout.stored.get(name, layout.prefix + name) for name in state}
    if len(set(stored.values())) < len(stored):
        twice = sorted({old for old in stored.values() if list(stored.values()).count(old) > 1})
        raise CheckpointError(
            _text("two tensors would get one name", got=twice, help="rename one of them")
        )
    files: dict[str, dict[str, str]] = {name: {} for name in dict.fromkeys(layout.shards.values())}
    if not files:
        files = {layout.file.name.removesuffix(INDEX): {}}
    last = list(files)[-1]
    aliases: dict[str, str] = {}
    for name, kept in _kept(state, layout).items():
        if layout.kind == "torch" or kept == name or name in layout.shards:
            files[layout.shards.get(name, last)][stored[name]] = kept
        elif name not in layout.implied:
            aliases[stored[name]] = stored[kept]
    full = {file: names for file, names in files.items() if names}
    return full or {last: {}}, aliases


def _kept(state: Mapping[str, Tensor], layout: Layout) -> dict[str, str]:
    """For each name the one it is written under; names of one tensor share it."""
    kept = {name: name for name in state}
    for group in state.ties if isinstance(state, LazyState) else tied_names(state):
        first = next((name for name in group if name in layout.shards), group[0])
        kept |= dict.fromkeys(group, first)
    # A state that was computed has lost the identity of tied tensors, not their equality.
    for group in layout.ties:
        there = [name for name in group if name in state]
        there.sort(key=lambda name: name not in layout.shards)
        for name in there[1:]:
            if kept[name] != kept[there[0]] and _same(state[there[0]], state[name]):
                old, new = kept[name], kept[there[0]]
                kept |= {other: new for other, first in kept.items() if first == old}
    return {name: kept[name] for name in state}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits (NaN equals itself, -0 differs from 0)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout is not torch.strided:
        return False
    left, right = (
        item.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for item in (a, b)
    )
    return torch.equal(left, right)


def _index(
    files: Mapping[str, Mapping[str, str]],
    outline: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> str:
    where = {stored: file for file, names in files.items() for stored in names}
    tensors = [outline[name] for names in files.values() for name in names.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    metadata = dict(metadata)
    if metadata.get("total_size", size) != size:
        metadata["total_size"] = size
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(tensor.numel() for tensor in tensors)
    content = {"metadata": metadata, "weight_map": where}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


# --- files ----------------------------------------------------------------------------------------


def _one(state: Mapping[str, Tensor], names: Mapping[str, str], stored: str) -> Tensor:
    return state[names[stored]]


def _read(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a file by stored name; names of one tensor share it."""
    read = {name: state[name] for name in dict.fromkeys(names.values())}
    return {stored: read[name] for stored, name in names.items()}


def _write_torch(
    target: Path, tensors: Mapping[str, Tensor], versions: Mapping[str, Any], layout: Layout
) -> None:
    ready: dict[int, Tensor] = {}
    weights: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in tensors.items():  # one object per tensor, so that torch writes ties once
        ready.setdefault(id(tensor), _compact(tensor))
        weights[name] = ready[id(tensor)]
    if versions:
        weights._metadata = versions  # pyright: ignore  # as `Module.state_dict` does
    content: Any = weights
    for key, siblings in reversed(list(zip(layout.nesting, layout.siblings, strict=True))):
        content = {**siblings, key: content}
    try:
        torch.save(content, target)
    except Exception as error:
        raise CheckpointError(_text(f"{target.name} cannot be written", got=str(error))) from error


def _compact(tensor: Tensor) -> Tensor:
    """The tensor without the rest of a larger storage, which torch would write too."""
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        return tensor
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


@contextmanager
def _staging(path: Path) -> Generator[Path]:
    """Folder beside the target that is gone afterwards, whatever happens."""
    outer = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        inner = outer / "new"  # with the usual permissions, which mkdtemp does not give
        inner.mkdir()
        yield inner
    finally:
        shutil.rmtree(outer)


def _move(staging: Path, path: Path) -> None:
    rest = [item for item in staging.iterdir() if item.name != path.name]
    for item in [*rest, staging / path.name]:
        item.replace(path.parent / item.name)


def _copy_small_files(source: Path, target: Path) -> None:
    for item in source.iterdir():
        if item.is_file() and not item.name.endswith(HEAVY):
            shutil.copyfile(inside(source, item.name), target / item.name)


def _text(what: str, *, expected: str = "", got: str | list[str] = "", help: str = "") -> str:
    return text(what, verb="save_checkpoint", expected=expected, got=got, help=help)
