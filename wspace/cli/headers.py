"""What a graph file remembers of the checkpoint it came from, in its safetensors header."""

import base64
import json
import shutil
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from wspace.errors import CheckpointError, message
from wspace.io import Layout
from wspace.io.write import HEAVY

LENGTH = 8  # bytes that say how long the header is
MOST = 4 << 20  # bytes of one small file, compressed; the header may be 100 MB


def is_graph(path: Path) -> bool:
    """True if a file is one that `save_graph` wrote."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    return str(notes_of(path).get("format", "")).startswith("wspace-graph")


def notes_of(path: Path) -> dict[str, str]:
    """The text in a safetensors header; empty if the file cannot be read as one."""
    header = _header(path)
    notes = header.get("__metadata__") if header else None
    return notes if isinstance(notes, dict) else {}


def add_notes(path: Path, notes: dict[str, str]) -> None:
    """Adds text to the header of a safetensors file; the tensors stay as they are.

    Args:
        path: A whole safetensors file.
        notes: Text by name.

    Raises:
        CheckpointError: If the file is no safetensors file.
    """
    header = _header(path)
    if header is None:
        raise CheckpointError(message(f"{path} is no safetensors file"))
    header["__metadata__"] = {**header.get("__metadata__", {}), **notes}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)  # tensors begin at a multiple of eight
    new = path.with_name(path.name + ".new")
    with path.open("rb") as old, new.open("wb") as file:
        old.seek(LENGTH + int.from_bytes(old.read(LENGTH), "little"))
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        shutil.copyfileobj(old, file)
    new.replace(path)


def _header(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if length > path.stat().st_size - LENGTH:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    return header if isinstance(header, dict) else None


# --- layouts as text -----------------------------------------------------------------------------


def packed(layout: Layout) -> tuple[str, list[str]]:
    """A layout as text, with the small files of its folder.

    Args:
        layout: Of a checkpoint that was read.

    Returns:
        The text, and what it leaves out.
    """
    dropped: list[str] = []
    data = {f.name: getattr(layout, f.name) for f in fields(layout)}
    data["file"] = layout.file.name
    data["implied"] = sorted(layout.implied)
    data["dtypes"] = {k: str(v).removeprefix("torch.") for k, v in layout.dtypes.items()}
    data["siblings"] = [
        {k: v for k, v in level.items() if _is_plain(v) or dropped.append(f"{k} of the torch file")}
        for level in layout.siblings
    ]
    if layout.kind == "torch":
        data["metadata"] = {k: v for k, v in layout.metadata.items() if _is_plain(dict(v))}
    small: dict[str, str] = {}
    if layout.folder:
        for item in sorted(layout.file.parent.iterdir()):
            if item.is_file() and not item.name.endswith(HEAVY):
                content = base64.b85encode(zlib.compress(item.read_bytes())).decode()
                if len(content) <= MOST:
                    small[item.name] = content
                else:
                    dropped.append(f"{item.name}, which is too large")
    return json.dumps({"layout": data, "files": small}), dropped


def unpacked(note: str, folder: Path) -> Layout:
    """The layout that `packed` wrote.

    Args:
        note: The text.
        folder: Where to put the small files, for `save_checkpoint` to copy.

    Returns:
        The layout.

    Raises:
        CheckpointError: If the text is no such layout.
    """
    try:
        return _layout(json.loads(note), folder)
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise CheckpointError(
            message("convert: the graph file's layout is damaged", got=str(error))
        ) from error


def _layout(content: dict[str, Any], folder: Path) -> Layout:
    data = content["layout"]
    if strange := [n for n in (*content["files"], data["file"]) if Path(n).name != n]:
        raise ValueError(f"{strange} are not plain names of files")
    for name, text in content["files"].items():
        (folder / name).write_bytes(zlib.decompress(base64.b85decode(text)))
    rest = {k: v for k, v in data.items() if k not in {"kind", "file"}}
    rest["ties"] = tuple(map(tuple, rest["ties"]))
    rest["implied"] = frozenset(rest["implied"])
    rest["dtypes"] = {k: getattr(torch, v) for k, v in rest["dtypes"].items()}
    for name in ("nesting", "siblings", "left_out"):
        rest[name] = tuple(rest[name])
    return replace(Layout(data["kind"], folder / data["file"]), **rest)


def _is_plain(value: object) -> bool:
    """True if a value comes back from JSON as it was."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
