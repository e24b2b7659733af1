"""How a zoo lies on disk, and writing it so that it survives a kill.

::

    zoo.json                     how it was made
    architectures/<digest>.json  an architecture and its weight space; named by its content
    shards/000012.safetensors    stacked states of cohort 12
    shards/000012.csv            its table
    shards/000012.json           its marker, written last: sizes and checksums of the other two
    splits/<name>.json           the rule of a split

A file is written beside its place under a temporary name, flushed to the disk, and renamed; a shard
without a marker does not exist. So at any moment every shard is there as a whole or not at all.
What JSON holds is never used as a path.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from wspace.errors import SpaceMismatch, ZooError, message
from wspace.space import WeightSpace
from wspace.zoo.architecture import Architecture, canonical

FORMAT = 1
HEADER = "zoo.json"
FOLDERS = ("architectures", "shards", "splits")
_TEMPORARY = re.compile(r"\..+\.tmp")


@dataclass(frozen=True)
class Header:
    """What `zoo.json` says.

    Attributes:
        recipe: Class and fields, as `recipe.described` gives them.
        cohorts: How many shards there are once the zoo is whole.
        dtype: Type that floats are stored in; None for the networks' own.
        versions: Of wspace, torch and Python when the zoo was begun.
        created: When that was, in UTC.
        stale: Cohorts that a larger recipe makes again.
        grouped_by: Column whose values no split parts unless it is told to; None if networks stand
            alone, and in zoos that were begun before recipes could say it.
    """

    recipe: Mapping[str, Any]
    cohorts: int
    dtype: str | None
    versions: Mapping[str, str]
    created: str
    stale: tuple[int, ...] = ()
    grouped_by: str | None = None


# --- places and whole files -----------------------------------------------------------------------


def is_ours(name: str) -> bool:
    """Whether a zoo that is begun may hold this at its top."""
    return name in {HEADER, *FOLDERS} or bool(_TEMPORARY.fullmatch(name))


def clean(folder: Path) -> None:
    """Removes what writers that were killed left behind."""
    for inner in (folder, *(folder / name for name in FOLDERS)):
        for item in listed(inner):
            if _TEMPORARY.fullmatch(item.name):
                item.unlink(missing_ok=True)


def listed(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing if it is not there."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, all of it or nothing, so that it is there after a crash.

    Args:
        path: Its place.
        data: Its content.

    Raises:
        ZooError: If it cannot be written, for instance on a full disk.
    """
    with staged({path: data}) as files:
        publish(files)


@contextmanager
def staged(files: Mapping[Path, bytes]) -> Generator[dict[Path, Path]]:
    """Temporary files on the disk, by the places they are for; gone afterwards if left."""
    temporaries = {
        path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in files
    }
    path = next(iter(files))
    try:
        for path, temporary in temporaries.items():
            with temporary.open("xb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        yield temporaries
    except OSError as error:
        raise ZooError(
            message(
                f"zoo: {path} cannot be written",
                got=str(error),
                help="make room and build again; what is committed stays as it is",
            )
        ) from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def publish(files: Mapping[Path, Path]) -> None:
    """Renames the files in turn; the folder is flushed between, so that the order holds."""
    for path, temporary in files.items():
        temporary.replace(path)
        flush(path.parent)


def flush(folder: Path) -> None:
    """Waits until renamed and removed files of a folder are so on the disk."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fail(path: Path, got: str, error: Exception | None = None, *, help: str = "") -> NoReturn:
    """Raises the ZooError of a file that is not what it has to be."""
    raise ZooError(
        message(
            f"zoo: {path} is damaged or foreign",
            got=got,
            help=help or "delete it and build again: what is missing is made anew, bit for bit",
        )
    ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of this format.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ZooError: If the file is missing, no JSON object, or of another format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ZooError(
            message(f"zoo: {path} is missing", help="is it the folder of a zoo?")
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        fail(path, f"{type(error).__name__}: {error}", error)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        fail(path, f"format {found!r}; this version reads {FORMAT}", help="use the wspace it is of")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object of this format, to be read by people too."""
    text = json.dumps({"format": FORMAT, **data}, indent=2, sort_keys=True, allow_nan=False)
    write_whole(path, (text + "\n").encode())


# --- zoo.json -------------------------------------------------------------------------------------


def write_header(folder: Path, header: Header) -> None:
    """Writes `zoo.json`."""
    optional = {"stale", "grouped_by"}
    data = {key: value for key, value in vars(header).items() if key not in optional or value}
    write_json(folder / HEADER, data)


def read_header(folder: Path) -> Header:
    """Reads `zoo.json`."""
    path = folder / HEADER
    data = read_json(path)
    try:
        by = data.get("grouped_by")
        return Header(
            {**data["recipe"]},
            int(data["cohorts"]),
            data["dtype"],
            {**data["versions"]},
            str(data["created"]),
            tuple(map(int, data.get("stale", ()))),
            None if by is None else str(by),
        )
    except (KeyError, TypeError, ValueError) as error:
        fail(path, f"{type(error).__name__}: {error}", error, help="restore it from a copy")


# --- architectures --------------------------------------------------------------------------------


def write_architecture(folder: Path, architecture: Architecture, space: WeightSpace) -> str:
    """Writes an architecture, unless it is there undamaged.

    Args:
        folder: Of the zoo.
        architecture: What to write.
        space: Its weight space.

    Returns:
        Its digest, which names the file.
    """
    text, digest = _architecture_text(architecture, space)
    path = folder / "architectures" / f"{digest}.json"
    if not path.exists() or path.read_bytes() != text.encode():
        write_whole(path, text.encode())
    return digest


@lru_cache(maxsize=1024)
def _architecture_text(architecture: Architecture, space: WeightSpace) -> tuple[str, str]:
    data = {
        "format": FORMAT,
        "architecture": json.loads(architecture.to_json()),
        "space": json.loads(space.to_json()),
    }
    text = canonical(data) + "\n"
    return text, hashlib.sha256(text.encode()).hexdigest()[:16]


def read_architecture(folder: Path, digest: str) -> tuple[Architecture, WeightSpace]:
    """The architecture with this digest, and its weight space.

    Args:
        folder: Of the zoo.
        digest: 16 hexadecimal digits.

    Returns:
        Both. Nothing is imported.

    Raises:
        ZooError: If the file is missing, or is not what its name says.
    """
    path = folder / "architectures" / f"{digest}.json"
    data = read_json(path)
    if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != digest:
        fail(path, "a content whose digest differs from the name")
    try:
        architecture = Architecture.from_json(json.dumps(data["architecture"]))
        return architecture, WeightSpace.from_json(json.dumps(data["space"]))
    except (KeyError, ZooError, SpaceMismatch) as error:
        fail(path, str(error), error)
