"""How a checkpoint lies on disk, and the state that remembers it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wspace.errors import CheckpointError, message

State = dict[str, Tensor]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
# Data types whose finiteness torch can test; narrower ones are widened first.
WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layout:
    """How a checkpoint lies on disk, so that another state can be written the same way.

    Attributes:
        kind: Format of the files.
        file: What was read: the only file, or the index of the shards.
        folder: Whether the whole folder was named, so that its configuration travels along.
        index: Metadata of the index; None for a single file.
        shards: Name of each tensor that a file holds → name of that file.
        metadata: Name of each file → its metadata (of a torch file: versions of the modules).
        stored: Name in the state → name in the file, where the two differ.
        prefix: What the file puts before names that are new to it.
        ties: Names that are one tensor.
        implied: Names that the file leaves out because they are tied to one that it holds.
        dtypes: Data type of each tensor.
        nesting: Keys that lead to the weights in a torch file.
        siblings: What lies beside the weights at each level of the nesting and holds no tensor.
        left_out: What lies beside them and does hold tensors (optimizer, averages). It belongs to
            the old weights, so it is not written again.
    """

    kind: Literal["safetensors", "torch"]
    file: Path
    folder: bool = False
    index: Mapping[str, Any] | None = None
    shards: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    prefix: str = ""
    ties: tuple[tuple[str, ...], ...] = ()
    implied: frozenset[str] = frozenset()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])
    nesting: tuple[str, ...] = ()
    siblings: tuple[Mapping[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()


class Checkpoint(dict[str, Tensor]):
    """State read from disk that remembers its layout; otherwise an ordinary dict."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        super().__init__(tensors)
        self.layout = layout

    @property
    def path(self) -> Path:
        """The file, index or folder that was read."""
        return self.layout.file.parent if self.layout.folder else self.layout.file

    @property
    def nonfinite(self) -> dict[str, int]:
        """How many elements of each tensor are NaN or infinite; empty if all are finite."""
        counts = {name: _nonfinite(tensor) for name, tensor in self.items()}
        return {name: count for name, count in counts.items() if count}


def _nonfinite(tensor: Tensor) -> int:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    if tensor.is_floating_point() and tensor.dtype not in WIDE:
        tensor = tensor.float()
    return int(tensor.numel() - tensor.isfinite().sum())


def inside(folder: Path, name: str) -> Path:
    """File of a folder, by a name that something in the folder gave.

    The cache of the Hugging Face hub links every file of a snapshot to a folder of blobs beside the
    snapshots; those links are followed.

    Args:
        folder: Where the file has to be.
        name: Its name, perhaps with subfolders; not trusted.

    Returns:
        The path, which need not exist.

    Raises:
        CheckpointError: If the name leads out of the folder, by itself or through a link.
    """
    home = folder.resolve()
    target = (folder / name).resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if Path(name).is_absolute() or not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            text(
                f"{folder} points outside of itself",
                expected="names of files in that folder",
                got=f"{name!r}, which is {target}",
                help="copy the file into the folder if you trust it",
            )
        )
    return folder / name


def tied_names(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names grouped by tensor: one group for all names of the same memory, seen the same way."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(_identity(tensor), []).append(name)
    return list(groups.values())


def _identity(tensor: Tensor) -> object:
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return id(tensor)  # no memory to compare
    place = (tensor.device, tensor.data_ptr(), tensor.dtype)
    return (*place, tuple(tensor.shape), tuple(tensor.stride()))


def text(
    what: str,
    *,
    verb: str = "load_checkpoint",
    expected: str = "",
    got: str | list[str] = "",
    help: str = "",
) -> str:
    """Text of a CheckpointError; the arguments are those of `wspace.errors.message`."""
    return message(f"{verb}: {what}", expected=expected, got=got, help=help)
