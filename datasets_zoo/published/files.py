"""What readers of published zoos share: groups of networks, and safe reading of their files."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture

State = dict[str, Tensor]
Load = Callable[[range], tuple[State, dict[str, Any]]]
"""Rows of a group → stacked states and columns. Rows with numbers that are not finite may be left
out."""


@dataclass(frozen=True, eq=False)
class Group:
    """Networks of one architecture in a published zoo.

    Attributes:
        architecture: What they are.
        count: How many.
        load: Reads some of them.
    """

    architecture: Architecture
    count: int
    load: Load


class Entry(NamedTuple):
    """A checkpoint: its file and its row of the table."""

    path: Path
    row: dict[str, Any]


def group_of(
    architecture: Architecture, entries: Sequence[Entry], read: Callable[[Path], Any]
) -> Group:
    """Checkpoints of one architecture; those with NaN are left out when they are read.

    Args:
        architecture: What they are.
        entries: Their files and rows.
        read: Gives the state of a file.

    Returns:
        The group.
    """
    like = shapes_of(architecture)

    def load(rows: range) -> tuple[State, dict[str, Any]]:
        chosen = [entries[i] for i in rows]
        paths = [entry.path for entry in chosen]
        state = stacked([state_of(read(path), path) for path in paths], like, paths)
        table = {name: [entry.row[name] for entry in chosen] for name in chosen[0].row}
        return finite(state, table)

    return Group(architecture, len(entries), load)


def torch_file(path: Path) -> Any:
    """What a file of torch holds, read without running code in it.

    Args:
        path: The file.

    Returns:
        Tensors, numbers, strings and containers of them, on the CPU.

    Raises:
        ZooError: If it is damaged or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ZooError(
            message(
                f"published: {path} cannot be read",
                expected="tensors, numbers, strings and containers of them" if code else "",
                got=f"{code[1]}, which would run code" if code else str(error).split("\n")[0],
            )
        ) from error


def state_of(content: object, path: Path) -> State:
    """The tensors of a state dict, float32.

    Args:
        content: The dict.
        path: Where it is from.

    Returns:
        Tensors by name.

    Raises:
        ZooError: If it is none.
    """
    items = cast(dict[Any, Any], content) if isinstance(content, dict) else {}
    state = {str(name): x.float() for name, x in items.items() if isinstance(x, Tensor)}
    if not state:
        raise ZooError(
            message(f"published: {path} holds no state dict", got=type(content).__name__)
        )
    return state


def stacked(
    states: Sequence[Mapping[str, Tensor]], like: Mapping[str, torch.Size], paths: Sequence[Path]
) -> State:
    """States one above the other.

    Args:
        states: One for each file.
        like: Names and shapes that each should have.
        paths: The files.

    Returns:
        ``(n, *shape)`` by name.

    Raises:
        ZooError: If a file has other names or shapes.
    """
    for state, path in zip(states, paths, strict=True):
        got = {name: x.shape for name, x in state.items()}
        if got != like:
            wrong = [f"{n} {tuple(s)}" for n, s in got.items() if like.get(n) != s]
            lost = [f"no {name}" for name in like if name not in got]
            raise ZooError(
                message(
                    f"published: {path} is another network than its siblings",
                    expected=", ".join(f"{n} {tuple(s)}" for n, s in like.items()),
                    got=[*wrong, *lost],
                )
            )
    return {name: torch.stack([state[name] for state in states]) for name in like}


def shapes_of(architecture: Architecture) -> dict[str, torch.Size]:
    """Names and shapes of an architecture's parameters."""
    return {name: p.shape for name, p in architecture.module().named_parameters()}


def json_of(path: Path, *, lines: bool = False) -> Any:
    """A JSON file; with `lines`, a list of one value for each line.

    Args:
        path: The file.
        lines: Whether every line is a value of its own.

    Returns:
        What it holds.

    Raises:
        ZooError: If it is not there or no JSON.
    """
    try:
        content = path.read_text(encoding="utf-8")
        if lines:
            return [json.loads(line) for line in content.splitlines() if line.strip()]
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(message(f"published: {path} cannot be read", got=str(error))) from error


def known_files(paths: Iterable[Path], depth: int) -> dict[tuple[str, ...], Path]:
    """Files by the last parts of their paths.

    Lists that come with a zoo name files where its publisher had them; only files that are found
    in the user's copy are ever opened.

    Args:
        paths: Files that are there.
        depth: How many parts count.

    Returns:
        Parts → file.
    """
    return {path.parts[-depth:]: path for path in paths}


def column(table: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """A column of a list that comes with a zoo.

    Args:
        table: The columns.
        name: Which.
        count: Its length.

    Returns:
        The values.

    Raises:
        ZooError: If it is missing or of another length.
    """
    values = table.get(name)
    if not isinstance(values, list) or len(cast(list[Any], values)) != count:
        raise ZooError(
            message(f"published: {name!r} does not fit", expected=f"a list of {count} values")
        )
    return cast(list[Any], values)


def finite(state: State, table: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """The networks whose numbers are all finite, and their rows.

    Args:
        state: Stacked states.
        table: Columns.

    Returns:
        Both without the others.
    """
    flags = torch.stack([x.flatten(1).isfinite().all(1) for x in state.values()]).all(0)
    if bool(flags.all()):
        return state, table
    kept = flags.nonzero().flatten().tolist()
    rows = {name: [values[i] for i in kept] for name, values in table.items()}
    return {name: x[flags] for name, x in state.items()}, rows


def nothing_found(kind: str, path: Path, expected: str) -> str:
    """The message for a folder that holds no such zoo."""
    return message(
        f"published: no {kind} in {path}",
        expected=expected,
        got="" if path.exists() else "a path that is not there",
        help="unpack the archive, and give the folder",
    )
