"""Where a command writes weights: a path that is checked before the work, and its layout."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wspace.errors import WSpaceError, message
from wspace.io import Checkpoint, Layout


def check_file(verb: str, target: Path, *, force: bool, such: str) -> None:
    """Refuses a path that is no new safetensors file.

    Args:
        verb: The command, for the message.
        target: What is to be written.
        force: Whether a file that is there may be replaced.
        such: An example of a name.

    Raises:
        WSpaceError: Saying what is wrong with it.
    """
    wrong, help = "", ""
    if target.suffix != ".safetensors":
        wrong, help = "does not end in .safetensors", f"name a file such as {such}"
    elif not target.parent.is_dir():
        wrong, help = "is in a folder that is not there", "create it"
    elif target.is_dir():
        wrong = "is a folder"
    elif target.exists() and not force:
        wrong, help = "is there already", "--force replaces it"
    if wrong:
        raise WSpaceError(message(f"{verb}: {target} {wrong}", help=help))


def check_target(verb: str, target: Path, like: Path, *, force: bool, such: str) -> None:
    """Refuses a path that is neither a new safetensors file nor, like the input, a new folder.

    Args:
        verb: The command, for the message.
        target: What is to be written.
        like: The input that it may be a folder like.
        force: Whether a file that is there may be replaced; a folder never is.
        such: An example of a name.

    Raises:
        WSpaceError: Saying what is wrong with it.
    """
    if target.suffix == ".safetensors" or not like.is_dir():
        check_file(verb, target, force=force, such=such)
    elif not target.parent.is_dir():
        raise WSpaceError(
            message(f"{verb}: {target} is in a folder that is not there", help="create it")
        )
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WSpaceError(
            message(f"{verb}: {target} is in use", expected="a new or empty folder, or a file")
        )


def refuse_inputs(verb: str, target: Path, inputs: Iterable[Path]) -> None:
    """Refuses a target that is an input, or one of the files in an input's folder.

    Args:
        verb: The command, for the message.
        target: What is to be written.
        inputs: Checkpoints that are read.

    Raises:
        WSpaceError: If it is one of them.
    """
    place = target.resolve()
    if target.exists() and any(place.is_relative_to(path.resolve()) for path in inputs):
        raise WSpaceError(message(f"{verb}: {target} is one of the checkpoints"))


def layout_at(target: Path, like: Checkpoint, notes: Mapping[str, Any]) -> Layout:
    """One safetensors file, or a folder if `like` is one and the target's name is no file's.

    Args:
        target: What is to be written; `check_target` has let it pass.
        like: Checkpoint with the names, ties and metadata, and for a folder the shards.
        notes: Entries of the metadata of every file, as plain data by name.

    Returns:
        The layout for `save_checkpoint`.
    """
    if target.suffix == ".safetensors":
        return single_file(like, target, notes)
    old = like.layout
    if old.kind != "safetensors":
        return old
    files = dict.fromkeys(old.shards.values())
    return replace(old, metadata={f: {**old.metadata.get(f, {}), **_text(notes)} for f in files})


def single_file(like: Checkpoint, target: Path, notes: Mapping[str, Any]) -> Layout:
    """One safetensors file with the names, ties and metadata of a checkpoint of any layout.

    Args:
        like: The checkpoint.
        target: The file.
        notes: Entries of the metadata, as plain data by name.

    Returns:
        The layout for `save_checkpoint`.
    """
    old = like.layout
    again = {name for group in old.ties for name in group[1:]}
    held = [name for name in old.shards if old.kind == "safetensors" or name not in again]
    metadata: dict[str, str] = {"format": "pt"}
    if old.kind == "safetensors":
        for some in old.metadata.values():
            metadata |= some
    return Layout(
        "safetensors",
        target,
        shards=dict.fromkeys(held, target.name),
        metadata={target.name: metadata | _text(notes)},
        stored=old.stored,
        prefix=old.prefix,
        ties=old.ties,
        implied=old.implied,
        dtypes=old.dtypes,
    )


def _text(notes: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(note) for name, note in notes.items()}
