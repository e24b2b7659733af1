"""Graphs in files: one safetensors file, the space in its header.

Values are stored as the parameters they are, so a file opens as an ordinary checkpoint too.
"""

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from wspace.errors import CheckpointError, SpaceMismatch, message
from wspace.graph.parameter import ParameterGraph
from wspace.space import WeightSpace

FORMAT = "wspace-graph-1"


def save_graph(graph: ParameterGraph, path: str | Path) -> None:
    """Writes a graph to one safetensors file.

    Args:
        graph: The graph; batch axes, buffers and ties are kept.
        path: File to write.
    """
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "space": graph.space.to_json(),
        "rest": json.dumps(sorted(graph.rest)),
    }
    tensors = {**graph.values, **graph.rest}
    save_file({k: x.detach().contiguous().clone() for k, x in tensors.items()}, path, metadata)


def load_graph(path: str | Path) -> ParameterGraph:
    """The graph in a file written by `save_graph`.

    Args:
        path: The file.

    Returns:
        The graph, bit for bit.

    Raises:
        CheckpointError: If the file is damaged or holds something else.
    """
    space, tensors, aside = _read(path)
    expected = {p.name for p in space.params} | aside
    if expected != set(tensors):
        wrong = sorted(expected ^ set(tensors))
        raise CheckpointError(_bad(path, f"missing or unexpected tensors {wrong}"))
    values = {name: x for name, x in tensors.items() if name not in aside}
    try:
        space.validate(values)
    except SpaceMismatch as error:
        raise CheckpointError(_bad(path, str(error))) from error
    rest = {name: tensors[name] for name in aside}
    return ParameterGraph(space, MappingProxyType(values), MappingProxyType(rest))


def _read(path: str | Path) -> tuple[WeightSpace, dict[str, Tensor], set[str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(_bad(path, f"format {metadata.get('format')!r}"))
            space = WeightSpace.from_json(metadata["space"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            aside = set(json.loads(metadata["rest"]))
    except CheckpointError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(_bad(path, f"{type(error).__name__}: {error}")) from error
    return space, tensors, aside


def _bad(path: str | Path, got: str) -> str:
    return message(
        f"load_graph: {Path(path).name} is not a readable graph",
        expected="a file written by `save_graph`",
        got=got,
        help="write it again; a damaged file cannot be repaired",
    )
