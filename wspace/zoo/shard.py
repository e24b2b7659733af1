"""The shards of a zoo: stacked states, their table, and the marker that commits both."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wspace.errors import SpaceMismatch, ZooError, message
from wspace.space import WeightSpace
from wspace.zoo.format import (
    FORMAT,
    fail,
    flush,
    listed,
    publish,
    read_json,
    staged,
    write_architecture,
)
from wspace.zoo.recipe import Cohort
from wspace.zoo.table import DTYPES, column, from_csv, kind_of, to_csv

HALVES = ("float16", "bfloat16")
_MARKER = re.compile(r"(\d{6,})\.json")
_CODES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_SUFFIXES = ("safetensors", "csv")


@dataclass(frozen=True)
class Marker:
    """What the marker of a shard says.

    Attributes:
        number: Of its cohort.
        architecture: Digest of the file in `architectures`.
        rows: Number of networks.
        steps: Optimizer steps of the time axis; None without one.
        columns: Kind of every column of the table.
        dtype: Type that floats are stored in; None for the networks' own.
        files: Suffix → size in bytes and SHA-256 of that file.
        statistics: Of every tensor: mean, standard deviation, least and greatest entry.
    """

    number: int
    architecture: str
    rows: int
    steps: tuple[int, ...] | None
    columns: Mapping[str, str]
    dtype: str | None
    files: Mapping[str, tuple[int, str]]
    statistics: Mapping[str, tuple[float, float, float, float]]


def place(folder: Path, number: int, suffix: str) -> Path:
    """File of a shard; the suffix is ``safetensors``, ``csv`` or ``json`` (the marker)."""
    return folder / "shards" / f"{number:06d}.{suffix}"


def committed(folder: Path) -> list[int]:
    """Numbers of the shards that have a marker, in order."""
    names = [item.name for item in listed(folder / "shards")]
    return sorted(int(match[1]) for name in names if (match := _MARKER.fullmatch(name)))


def write_shard(folder: Path, number: int, cohort: Cohort, dtype: str | None = None) -> None:
    """Commits a cohort: its files, then its marker. Replaces a shard that is there.

    Args:
        folder: Of the zoo.
        number: Of the cohort.
        cohort: Its networks.
        dtype: ``"float16"`` or ``"bfloat16"`` to store floats so.

    Raises:
        ZooError: If the cohort does not fit its weight space, or the disk is full.
    """
    space = cohort.architecture.space((cohort.architecture.package,))  # the recipe's own code
    try:
        state, rows, steps = _checked(cohort, space, dtype)
        table = {name: column(values, name) for name, values in cohort.table.items()}
        csv = to_csv(table, rows)
    except (ZooError, SpaceMismatch) as error:
        raise ZooError(f"zoo: cohort {number} cannot be stored\n{error}") from error
    contents = {"safetensors": safetensors.torch.save(state, {"format": "pt"}), "csv": csv}
    marker = {
        "format": FORMAT,
        "number": number,
        "architecture": write_architecture(folder, cohort.architecture, space),
        "rows": rows,
        "steps": steps,
        "columns": {name: kind_of(array) for name, array in table.items()},
        "dtype": dtype,
        "files": {
            suffix: [len(data), hashlib.sha256(data).hexdigest()]
            for suffix, data in contents.items()
        },
        "statistics": {name: _statistics(x) for name, x in sorted(state.items())},
    }
    contents["json"] = (json.dumps(marker, allow_nan=False) + "\n").encode()
    files = {place(folder, number, suffix): data for suffix, data in contents.items()}
    with staged(files) as temporaries:
        place(folder, number, "json").unlink(missing_ok=True)
        flush(folder / "shards")
        publish(temporaries)


def _checked(
    cohort: Cohort, space: WeightSpace, dtype: str | None
) -> tuple[dict[str, Tensor], int, list[int] | None]:
    """State as it is stored, number of rows, and steps."""
    space.validate(cohort.state)
    names = {p.name for p in space.params}
    if extra := sorted(cohort.state.keys() - names):
        raise ZooError(
            message(
                "the state holds more than its weight space",
                expected="parameters and float buffers, each under one name",
                got=[f"{name!r}" + _alias(space, name) for name in extra],
            )
        )
    first = space.params[0]
    lead = tuple(cohort.state[first.name].shape)[: -len(first.shape) or None]
    steps = None if cohort.steps is None else [int(step) for step in cohort.steps]
    if len(lead) != 1 + (steps is not None) or 0 in lead or (steps and len(steps) != lead[1]):
        expected = "at least one network" + (f", each at {len(steps)} steps" if steps else "")
        raise ZooError(message("the state has other axes", expected=expected, got=str(lead)))
    state = {p.name: _stored(p.name, cohort.state[p.name], p.dtype, dtype) for p in space.params}
    return state, lead[0], steps


def _alias(space: WeightSpace, name: str) -> str:
    return f", tied to {space[name].name!r}" if name in space.by_name else ""


def _stored(name: str, x: Tensor, own: str, dtype: str | None) -> Tensor:
    """The tensor as the file holds it: on the CPU, in its own memory."""
    if str(x.dtype) != f"torch.{own}":
        raise ZooError(message(f"{name!r} has another type", expected=own, got=str(x.dtype)))
    x = x.detach().cpu()
    x = x.to(getattr(torch, dtype)) if dtype else x
    if bad := int((~torch.isfinite(x)).sum()):
        text = f"{name!r} has {bad} entries that are NaN, infinite or too large for {dtype or own}"
        raise ZooError(message(text, help="leave networks out that diverged, or store float32"))
    return x.clone(memory_format=torch.contiguous_format)


def _statistics(x: Tensor) -> list[float]:
    x = x.double()
    return [float(x.mean()), float(x.std(correction=0)), float(x.min()), float(x.max())]


def read_marker(folder: Path, number: int) -> Marker:
    """The marker of a shard, checked for its form.

    Args:
        folder: Of the zoo.
        number: Of the cohort.

    Returns:
        The marker.

    Raises:
        ZooError: If the file is damaged, or belongs to another shard.
    """
    path = place(folder, number, "json")
    data = read_json(path)
    try:
        marker = Marker(
            int(data["number"]),
            str(data["architecture"]),
            int(data["rows"]),
            None if data["steps"] is None else tuple(map(int, data["steps"])),
            {str(name): str(kind) for name, kind in data["columns"].items()},
            data["dtype"],
            {key: (int(data["files"][key][0]), str(data["files"][key][1])) for key in _SUFFIXES},
            {str(name): _four(values) for name, values in data["statistics"].items()},
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        fail(path, f"{type(error).__name__}: {error}", error)
    if marker.number != number:
        fail(path, f"the marker of cohort {marker.number}")
    if not re.fullmatch("[0-9a-f]{16}", marker.architecture):
        fail(path, f"no digest: {marker.architecture!r}")
    if marker.dtype not in {None, *HALVES} or not {*marker.columns.values()} <= {*DTYPES}:
        fail(path, f"unknown types {marker.dtype!r}, {sorted({*marker.columns.values()})}")
    return marker


def _four(values: Any) -> tuple[float, float, float, float]:
    a, b, c, d = map(float, values)
    return a, b, c, d


def read_table(folder: Path, marker: Marker) -> dict[str, Any]:
    """The table of a shard: arrays by column."""
    path = place(folder, marker.number, "csv")
    check_size(folder, marker, "csv")
    try:
        return from_csv(path.read_bytes(), marker.columns, marker.rows)
    except (OSError, ValueError, OverflowError) as error:
        fail(path, str(error), error)


def check_size(folder: Path, marker: Marker, suffix: str) -> None:
    """Raises if a file of the shard is missing, or has another size than its marker says."""
    path = place(folder, marker.number, suffix)
    size = path.stat().st_size if path.is_file() else None
    if size != marker.files[suffix][0]:
        found = "nothing" if size is None else f"{size} bytes"
        fail(path, f"{found}; its marker says {marker.files[suffix][0]} bytes")


def check_sums(folder: Path, marker: Marker) -> None:
    """Raises if a file of the shard differs from what was committed."""
    for suffix in _SUFFIXES:
        check_size(folder, marker, suffix)
        path = place(folder, marker.number, suffix)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != marker.files[suffix][1]:
            fail(path, f"SHA-256 {found[:16]}…; its marker says {marker.files[suffix][1][:16]}…")


def check_tensors(folder: Path, marker: Marker, space: WeightSpace) -> None:
    """Raises if the tensors of a shard are not states of the space; reads its header."""
    path = place(folder, marker.number, "safetensors")
    check_size(folder, marker, "safetensors")
    lead = (marker.rows,) if marker.steps is None else (marker.rows, len(marker.steps))
    expected = {p.name: (marker.dtype or p.dtype, (*lead, *p.shape)) for p in space.params}
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: (_CODES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        fail(path, str(error), error)
    wrong = [
        f"{name!r}: {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        fail(path, "\n  got ".join(wrong))


def map_tensors(folder: Path, marker: Marker, space: WeightSpace) -> dict[str, Tensor]:
    """Tensors of a shard, ``(rows, …)`` each, mapped into memory: read when they are used."""
    check_tensors(folder, marker, space)
    with safe_open(place(folder, marker.number, "safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
