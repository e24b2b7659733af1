"""The Small CNN Zoo: Unterthiner et al. (2020), arXiv 2002.11448; CC BY 4.0.

Of each of its four archives (cifar10, fashion_mnist, mnist, svhn_cropped) a folder with

- ``weights.npy``: float32, one row of 4,970 numbers for each checkpoint of each network;
- ``metrics.csv.gz``: a line for each row: ``config.activation`` and other hyper-parameters,
  ``step`` (epoch: 0, 1, 2, 3, 20, 40, 60, 80, 86), test and training accuracy and loss,
  ``modeldir``;
- ``layout.csv``: where each tensor lies in a row: ``varname``, ``start_idx``, ``end_idx``,
  ``size``, ``shape``; biases come before kernels, kernels are in TensorFlow's layout (height,
  width, in, out).

Network: three 3 × 3 convolutions of 16 channels with stride 2 and no padding (Keras's default), an
activation after each, global average pooling, a linear layer to 10 classes, on grey images in
[-1, 1]. Each activation is a group of its own.

- Confirmed in the publisher's README and code: sizes, columns of the metrics, epochs, network,
  stride, and the places of biases before kernels in a row. Confirmed in NFN's and neural-graphs'
  readers: file names, ``varname`` ending in ``kernel:0`` or ``bias:0``, ``start_idx``, ``end_idx``,
  the text in ``shape``, the order of a kernel's axes.
- Not confirmed: the archives themselves were not at hand; the column ``size`` is not read.

Columns: those of the metrics without ``config.``, and ``network``, which counts the values of
``modeldir``: split by it if there are several checkpoints of a network. Rows with numbers that are
not finite are left out. NFN's split needs its lists of shuffled rows and is not made.
"""

import ast
import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datasets_zoo.published.files import Group, State, finite, nothing_found
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "selu": nn.SELU,
}
SIDES = {"cifar10": 32, "svhn_cropped": 32}  # MNIST and Fashion-MNIST: 28


class SmallCNN(nn.Module):
    """The network of the zoo.

    Args:
        channels: Of the images, and of the convolutions.
        classes: Length of the answer.
        kernel: Size of the kernels.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(self, channels: Sequence[int], classes: int, kernel: int, activation: str) -> None:
        super().__init__()
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, kernel, stride=2) for a, b in pairs)
        self.dense = nn.Linear(channels[-1], classes)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, channels, height, width)``."""
        for conv in self.convs:
            x = self.act(conv(x))
        return self.dense(x.mean((2, 3)))


def small_cnn(
    channels: Sequence[int] = (1, 16, 16, 16),
    classes: int = 10,
    kernel: int = 3,
    activation: str = "relu",
) -> nn.Module:
    """The network of `SmallCNN`."""
    return SmallCNN(channels, classes, kernel, activation)


class _Slot(NamedTuple):
    """Where a tensor lies in a row."""

    name: str
    start: int
    end: int
    shape: tuple[int, ...]


def groups(root: Path, last: bool) -> list[Group]:
    """Networks of a folder, one group for each activation.

    Args:
        root: The folder.
        last: Whether to keep the last checkpoint of every network only.

    Returns:
        The groups.

    Raises:
        ZooError: If files are missing or do not fit each other.
    """
    paths = [root / name for name in ("weights.npy", "metrics.csv.gz", "layout.csv")]
    if not all(path.is_file() for path in paths):
        raise ZooError(nothing_found("small_cnn_zoo", root, ", ".join(path.name for path in paths)))
    slots = _layout(paths[2])
    weights = _weights(paths[0])
    lines = _csv(paths[1])
    if weights.ndim != 2 or len(lines) != len(weights) or weights.shape[1] != slots[-1].end:
        raise ZooError(
            message(
                f"published: the files of {root} do not fit each other",
                expected=f"{len(lines)} rows of {slots[-1].end} numbers in weights.npy",
                got=str(weights.shape),
            )
        )
    numbers = {name: i for i, name in enumerate(dict.fromkeys(x["modeldir"] for x in lines))}
    rows = range(len(lines))
    if last:
        latest = dict[str, int]()
        for i in rows:
            best = latest.get(lines[i]["modeldir"])
            if best is None or float(lines[i]["step"]) >= float(lines[best]["step"]):
                latest[lines[i]["modeldir"]] = i
        rows = sorted(latest.values())
    found: list[Group] = []
    for activation in sorted({lines[i]["config.activation"] for i in rows}):
        chosen = [i for i in rows if lines[i]["config.activation"] == activation]
        found.append(_group(paths[0], slots, lines, numbers, chosen))
    return found


def _group(
    path: Path,
    slots: list[_Slot],
    lines: list[dict[str, str]],
    numbers: dict[str, int],
    chosen: list[int],
) -> Group:
    line = lines[chosen[0]]
    kernels = [slot.shape for slot in slots if len(slot.shape) == 4]
    options = {
        "channels": [kernels[0][2], *[shape[3] for shape in kernels]],
        "classes": slots[-1].shape[-1],
        "kernel": kernels[0][0],
        "activation": line["config.activation"],
    }
    side = SIDES.get(line.get("config.dataset", ""), 28)
    spec = InputSpec((1, kernels[0][2], side, side))
    architecture = Architecture("datasets_zoo.published.small_cnn:small_cnn", options, (spec,))

    def load(rows: range) -> tuple[State, dict[str, Any]]:
        picked = [chosen[i] for i in rows]
        flat = np.array(_weights(path)[picked], dtype=np.float32)
        table = _columns([lines[i] for i in picked])
        table["network"] = [numbers[lines[i]["modeldir"]] for i in picked]
        return finite({slot.name: _tensor(flat, slot) for slot in slots}, table)

    return Group(architecture, len(chosen), load)


def _tensor(flat: NDArray[np.float32], slot: _Slot) -> Tensor:
    """Slots of all rows in torch's layout: kernels (out, in, height, width), matrices (out, in)."""
    x = torch.from_numpy(flat[:, slot.start : slot.end].copy()).unflatten(1, slot.shape)
    if x.dim() == 5:
        return x.permute(0, 4, 3, 1, 2).contiguous()
    return x.mT.contiguous() if x.dim() == 3 else x


def _weights(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ZooError(message(f"published: {path} cannot be read", got=str(error))) from error


def _csv(path: Path) -> list[dict[str, str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as text:
            lines = [dict(line) for line in csv.DictReader(cast(Any, text))]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ZooError(message(f"published: {path} cannot be read", got=str(error))) from error
    needed = {"metrics.csv.gz": ("modeldir", "step", "config.activation")}.get(path.name, ())
    if not lines or any(name not in lines[0] or None in lines[0].values() for name in needed):
        raise ZooError(
            message(f"published: {path} lacks columns", expected=", ".join(needed) or "lines")
        )
    return lines


def _layout(path: Path) -> list[_Slot]:
    """Slots in the order of a row; named by their order among kernels and biases."""
    slots: list[_Slot] = []
    seen = {"weight": 0, "bias": 0}
    try:
        lines = sorted(_csv(path), key=lambda line: int(line["start_idx"]))
        layers = len(lines) // 2
        for line in lines:
            kind = {"kernel:0": "weight", "bias:0": "bias"}[line["varname"].rpartition("/")[2]]
            i, seen[kind] = seen[kind], seen[kind] + 1
            layer = f"convs.{i}" if i < layers - 1 else "dense"
            start, end = int(line["start_idx"]), int(line["end_idx"])
            read: Any = ast.literal_eval(line["shape"])
            shape = tuple(int(n) for n in (read if isinstance(read, tuple | list) else [read]))
            slots.append(_Slot(f"{layer}.{kind}", start, end, shape))
            if end - start != int(np.prod(shape)) or start != (slots[-2].end if slots[1:] else 0):
                raise ValueError(f"{line['varname']} does not fit its place")
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise ZooError(
            message(
                f"published: {path} is no layout",
                expected="varname (…kernel:0, …bias:0), start_idx, end_idx, shape",
                got=f"{type(error).__name__}: {error}",
            )
        ) from error
    return slots


def _columns(lines: list[dict[str, str]]) -> dict[str, list[Any]]:
    """Columns of text as numbers where every value of them is one."""
    table: dict[str, list[Any]] = {}
    for name in lines[0]:
        values = [line[name] for line in lines]
        table[name.removeprefix("config.")] = _numbers(values)
    return table


def _numbers(values: list[str]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values
