"""The table of a shard: columns of numbers, booleans and strings as exact CSV text.

Floats are written by `repr`, so they are read back bit for bit (NaN and infinities too), and
strings are quoted, so that they may hold anything but the character NUL. The first column counts
the rows, so that a lost or doubled line is found.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from wspace.errors import ZooError, message

ROW = "row"
DTYPES = {"int": np.int64, "float": np.float64, "bool": np.bool_, "str": np.str_}
_KINDS = {"b": "bool", "i": "int", "u": "int", "f": "float", "U": "str"}
_BOOLS = {"True": True, "False": False}


def column(values: Any, name: str) -> np.ndarray:
    """A column as an array of int64, float64, bool or str.

    Args:
        values: Sequence, tensor or array of one kind, one axis.
        name: For the error.

    Returns:
        The array.

    Raises:
        ZooError: If the values are of another kind, or of several.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double() if values.is_floating_point() else values.cpu()
        values = values.numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ZooError(_bad(name, str(error))) from error
    kind = _KINDS.get(array.dtype.kind, "")
    if array.ndim != 1 or not (kind or not array.size):
        raise ZooError(_bad(name, f"{array.dtype} with {array.ndim} axes"))
    if kind == "str" and not isinstance(values, np.ndarray):
        items = list(values)
        if not all(isinstance(item, str) for item in items):
            raise ZooError(_bad(name, "strings among other things"))
        if any("\0" in item for item in items):
            raise ZooError(_bad(name, "a string that holds NUL"))
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ZooError(_bad(name, f"{array.max()}, more than 64 bits with a sign"))
    return array.astype(DTYPES[kind or "float"])


def check_values(array: np.ndarray, wanted: Sequence[Any], what: str, name: str) -> None:
    """Refuses values that no row of a column has, another type's among them.

    Args:
        array: The column.
        wanted: Values.
        what: Whose column it is, for the error.
        name: Of the column.

    Raises:
        ZooError: If one is not there; lists those that are.
    """
    known = np.unique(array).tolist()
    there = {*known}
    if unknown := [value for value in wanted if value not in there]:
        listed = ", ".join(map(repr, known[:8])) + (" …" if known[8:] else "")
        text = f"{what} has no network whose {name!r} is {unknown[0]!r}"
        near = [value for value in known if str(value) == str(unknown[0])]
        raise ZooError(
            message(
                text,
                expected=f"one of {listed}" if known else "nothing: there are no networks",
                help=f"did you mean the {kind_of(array)} {near[0]!r}?" if near else "",
            )
        )


def kind_of(array: np.ndarray) -> str:
    """``"int"``, ``"float"``, ``"bool"`` or ``"str"``."""
    return _KINDS[array.dtype.kind]


def to_csv(columns: Mapping[str, np.ndarray], rows: int) -> bytes:
    """The table as CSV text in UTF-8; `from_csv` inverts it.

    Args:
        columns: Arrays of `column`, of one length.
        rows: Their length.

    Returns:
        The text.

    Raises:
        ZooError: If a column has another length, a name is taken, or text is not Unicode.
    """
    wrong = [f"{len(array)} values of {name!r}" for name, array in columns.items()]
    wrong = [item for item in wrong if not item.startswith(f"{rows} ")]
    wrong += [f"the name {name!r}" for name in columns if name in {ROW, ""} or "\0" in name]
    if wrong:
        expected = f"columns of {rows} values, under names other than {ROW!r}"
        raise ZooError(
            message("zoo: a table does not fit its networks", expected=expected, got=wrong)
        )
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow([ROW, *columns])
    writer.writerows(zip(range(rows), *(array.tolist() for array in columns.values()), strict=True))
    try:
        return text.getvalue().encode()
    except UnicodeEncodeError as error:
        raise ZooError(
            message("zoo: a table holds text that is not Unicode", got=str(error))
        ) from error


def from_csv(data: bytes, kinds: Mapping[str, str], rows: int) -> dict[str, np.ndarray]:
    """The columns of a CSV text.

    Args:
        data: What `to_csv` wrote.
        kinds: Kind of every column, by name.
        rows: How many there have to be.

    Returns:
        Arrays by name.

    Raises:
        ValueError: If it is another table; the caller knows the file.
    """
    try:
        lines = list(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    head, body = (lines[0], lines[1:]) if lines else ([], [])
    if head != [ROW, *kinds]:
        raise ValueError(f"columns {', '.join(head)}; expected {', '.join([ROW, *kinds])}")
    if len(body) != rows:
        raise ValueError(f"{len(body)} rows for {rows} networks")
    for at, line in enumerate(body):
        if len(line) != len(head) or line[0] != str(at):
            raise ValueError(f"line {at + 2} is {line}; expected row {at} of {len(head)} cells")
    cells = list(zip(*body, strict=True))[1:] if body else [()] * len(kinds)
    return {
        name: np.array(_parsed(values, kind), dtype=DTYPES[kind])
        for (name, kind), values in zip(kinds.items(), cells, strict=True)
    }


def _parsed(cells: Sequence[str], kind: str) -> Sequence[Any]:
    if kind == "bool":
        if wrong := {*cells} - {*_BOOLS}:
            raise ValueError(f"{min(wrong)!r} among booleans")
        return [_BOOLS[cell] for cell in cells]
    return (
        [int(cell) for cell in cells]
        if kind == "int"
        else ([float(cell) for cell in cells] if kind == "float" else cells)
    )


def _bad(name: str, got: str) -> str:
    return message(
        f"zoo: the column {name!r} cannot be stored",
        expected="one int, float, bool or str for every network",
        got=got,
    )
