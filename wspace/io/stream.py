"""Safetensors files written tensor by tensor, in memory for the largest tensor.

Owns the bytes of a safetensors file (a header with shapes and places, then the data) and states
that are computed while they are written. Order and names of data types are asked of safetensors
itself, so a file is, byte for byte, the one that its own writer makes.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from wspace.errors import CheckpointError
from wspace.io.layout import text, tied_names

LENGTH = 8  # bytes that say how long the header is, and what its length is a multiple of
RESERVED = "__metadata__"


class LazyState(Mapping[str, Tensor]):
    """State whose tensors are computed when they are asked for, and not kept.

    `save_checkpoint` writes such a state tensor by tensor, so a model that does not fit into memory
    can be moved, merged or converted: inputs are memory-mapped, and one tensor of the result is
    there at a time.

    Example:
        >>> state = LazyState({"x": torch.ones(2)}, lambda name: torch.full((2,), 3.0))
        >>> state["x"]
        tensor([3., 3.])
    """

    def __init__(
        self,
        outline: Mapping[str, Tensor],
        compute: Callable[[str], Tensor],
        *,
        ties: Iterable[Sequence[str]] | None = None,
    ) -> None:
        """Stores what is asked later; nothing is computed.

        Args:
            outline: Tensors of the names, shapes and data types of the result. Their values are not
                read: the checkpoint that the result comes from will do, or tensors on `meta`.
            compute: The tensor of a name. Of names that are tied, the first one is asked.
            ties: Names that are one tensor; those of `outline` by default.
        """
        self.outline = dict(outline)
        found = tied_names(outline) if ties is None else ties
        self.ties = tuple(tuple(group) for group in found if len(group) > 1)
        self._compute = compute
        self._first = {name: group[0] for group in self.ties for name in group}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a name, computed now.

        Args:
            name: A name of the outline; another is a KeyError.

        Returns:
            What was computed.

        Raises:
            CheckpointError: If it is not of the shape and data type that the outline says.
        """
        wanted = self.outline[name]
        found = self._compute(self._first.get(name, name))
        if found.shape != wanted.shape or found.dtype != wanted.dtype or found.is_meta:
            raise CheckpointError(
                text(
                    f"{name!r} was computed as another tensor than was announced",
                    verb="LazyState",
                    expected=f"shape {tuple(wanted.shape)} of {wanted.dtype}, with values",
                    got=f"shape {tuple(found.shape)} of {found.dtype} on {found.device}",
                )
            )
        return found

    def __contains__(self, name: object) -> bool:  # a Mapping's own would compute the tensor
        return name in self.outline

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


def write_safetensors(
    target: Path,
    outline: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file; each tensor is read once, written, and let go.

    Args:
        target: The file; a failure leaves a part of it.
        outline: Names, shapes and data types of the tensors; the values are not read.
        read: The tensor of a name, dense, on any device.
        metadata: Text by name, for the header.

    Raises:
        CheckpointError: If the format cannot hold the tensors or the metadata, or the disk is full.
    """
    places: dict[str, Any] = {RESERVED: dict(metadata)} if metadata else {}
    end = 0
    codes = _codes(outline, metadata)
    for name, code in codes.items():
        shape, start = list(outline[name].shape), end
        end += outline[name].numel() * outline[name].element_size()
        if code == "F4":  # two numbers in each element
            shape[-1] *= 2
        places[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(places, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % LENGTH)
    try:
        with target.open("wb") as file:
            file.write(len(header).to_bytes(LENGTH, "little") + header)
            for name in codes:
                file.write(_bytes(read(name)))
    except OSError as error:
        raise CheckpointError(_text(f"{target.name} cannot be written", got=str(error))) from error


def _codes(outline: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Data type of each tensor as the header names it, in the order that the file has."""
    bad = [f"{k!r}, {x.layout}" for k, x in outline.items() if x.layout is not torch.strided]
    if bad:
        raise CheckpointError(_text("safetensors holds dense tensors only", got=bad))
    if RESERVED in outline:
        raise CheckpointError(_text(f"safetensors takes {RESERVED!r} for itself"))
    empty = {name: torch.empty(0, dtype=x.dtype) for name, x in outline.items()}
    try:
        file = safetensors.torch.save(empty, metadata=dict(metadata) or None)
    except Exception as error:
        bad = [f"{name!r} of {x.dtype}" for name, x in outline.items() if not _holds(x.dtype)]
        raise CheckpointError(
            _text(
                "safetensors cannot hold the state",
                got=bad or str(error),
                help="convert the tensors, or save a .pt file",
            )
        ) from error
    header: dict[str, Any] = json.loads(file[LENGTH:])
    return {name: item["dtype"] for name, item in header.items() if name != RESERVED}


def _holds(dtype: torch.dtype) -> bool:
    try:
        safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    except Exception:
        return False
    return True


def _bytes(tensor: Tensor) -> memoryview:
    """The values as they lie in the file (torch's own byte order; all it runs on is little)."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().data


def _text(what: str, *, got: str | list[str] = "", help: str = "") -> str:
    return text(what, verb="save_checkpoint", got=got, help=help)
