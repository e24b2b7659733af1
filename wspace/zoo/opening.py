"""Opening a zoo: what its markers say is checked against its files and its weight spaces."""

from pathlib import Path
from typing import Literal

import numpy as np

from wspace.errors import SpaceMismatch, ZooError
from wspace.space import WeightSpace
from wspace.zoo.architecture import Architecture
from wspace.zoo.collection import Files, Zoo
from wspace.zoo.format import Header, fail, read_architecture, read_header
from wspace.zoo.shard import (
    Marker,
    check_sums,
    check_tensors,
    committed,
    place,
    read_marker,
    read_table,
)

Table = dict[str, np.ndarray]


def open_zoo(
    path: str | Path,
    *,
    check: int = 4,
    checksums: bool = False,
    damaged: Literal["raise", "skip"] = "raise",
) -> Zoo:
    """A zoo on disk: all that is committed of it, also while it is being built.

    Reads markers, tables, and the headers of all shards; states are mapped when they are used.

    Args:
        path: Its folder.
        check: Networks whose values are read and checked, evenly spread.
        checksums: Read every file, and compare its SHA-256 with the marker's.
        damaged: What to do with a shard that is damaged or foreign: ``"raise"``, or ``"skip"`` it
            and note it in `Zoo.damaged`.

    Returns:
        The zoo. Nothing that it names was imported.

    Raises:
        ZooError: If a file is missing, damaged or of another zoo; it names the file.
    """
    folder = Path(path)
    header = read_header(folder)
    found: list[tuple[Marker, Table]] = []
    faults: list[str] = []
    reader = _Reader(folder, header, checksums)
    for number in committed(folder):
        try:
            found.append(reader.shard(number, found[0][0] if found else None))
        except ZooError as error:
            if damaged == "raise":
                raise
            faults.append(str(error))
    digests = tuple(dict.fromkeys(marker.architecture for marker, _ in found))
    files = Files(
        folder,
        header,
        tuple(marker for marker, _ in found),
        digests,
        tuple(reader.known[digest][0] for digest in digests),
        tuple(reader.known[digest][1] for digest in digests),
        tuple(faults),
    )
    zoo = Zoo(files, *_rows(files), _joined([table for _, table in found]))
    _check_values(zoo, check)
    return zoo


class _Reader:
    """Reads shards one by one, and architectures once."""

    def __init__(self, folder: Path, header: Header, checksums: bool) -> None:
        self.folder, self.header, self.checksums = folder, header, checksums
        self.known: dict[str, tuple[Architecture, WeightSpace]] = {}

    def shard(self, number: int, first: Marker | None) -> tuple[Marker, Table]:
        """Marker and table of a shard that fits the zoo and the first of its shards."""
        marker = read_marker(self.folder, number)
        path = place(self.folder, number, "json")
        if number >= self.header.cohorts:
            fail(path, f"cohort {number} of a zoo of {self.header.cohorts}")
        if marker.dtype != self.header.dtype:
            fail(path, f"floats stored as {marker.dtype}; in the zoo {self.header.dtype}")
        if first is not None and marker.columns != first.columns:
            fail(path, f"columns {dict(marker.columns)}; others have {dict(first.columns)}")
        if first is not None and marker.steps != first.steps:
            fail(path, "another time axis than the others have")
        if marker.architecture not in self.known:
            self.known[marker.architecture] = read_architecture(self.folder, marker.architecture)
        space = self.known[marker.architecture][1]
        if {*marker.statistics} != {p.name for p in space.params}:
            fail(path, "statistics of other tensors")
        check_tensors(self.folder, marker, space)
        if self.checksums:
            check_sums(self.folder, marker)
        return marker, read_table(self.folder, marker)


def _rows(files: Files) -> tuple[np.ndarray, np.ndarray]:
    counts = [marker.rows for marker in files.markers]
    shard = np.repeat(np.arange(len(counts)), counts)
    row = np.concatenate([np.arange(n) for n in counts]) if counts else shard
    return shard.astype(np.int64), row.astype(np.int64)


def _joined(tables: list[Table]) -> Table:
    names = tables[0] if tables else ()
    return {name: np.concatenate([table[name] for table in tables]) for name in names}


def _check_values(zoo: Zoo, count: int) -> None:
    """Raises unless the states of an even spread of networks are finite and fit their space."""
    for i in np.unique(np.linspace(0, len(zoo) - 1, min(count, len(zoo))).round().astype(int)):
        try:
            _, state = zoo[int(i)]
        except SpaceMismatch as error:
            fail(zoo.file_of(int(i)), str(error), error)
        if bad := [name for name, x in state.items() if not bool(x.isfinite().all())]:
            fail(zoo.file_of(int(i)), f"NaN or infinite values in {', '.join(bad)}")
