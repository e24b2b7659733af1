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
    table = _metrics(paths[1])
    count = len(table["step"])
    if weights.shape != (count, slots[-1].end):
        raise ZooError(
            message(
                f"published: the files of {root} do not fit each other",
                expected=f"{count} rows of {slots[-1].end} numbers in weights.npy",
                got=str(weights.shape),
            )
        )
    rows = _latest(table["network"], table["step"]) if last else list(range(count))
    found: list[Group] = []
    for activation in sorted({table["activation"][i] for i in rows}):
        chosen = [i for i in rows if table["activation"][i] == activation]
        found.append(_group(paths[0], slots, table, chosen))
    return found


def _latest(networks: list[int], steps: list[float]) -> list[int]:
    """Rows with the largest step of every network."""
    best: dict[int, int] = {}
    for row, (network, step) in enumerate(zip(networks, steps, strict=True)):
        if network not in best or step >= steps[best[network]]:
            best[network] = row
    return sorted(best.values())


def _group(path: Path, slots: list[_Slot], table: dict[str, list[Any]], chosen: list[int]) -> Group:
    kernels = [slot.shape for slot in slots if len(slot.shape) == 4]
    options = {
        "channels": [kernels[0][2], *[shape[3] for shape in kernels]],
        "classes": slots[-1].shape[-1],
        "kernel": kernels[0][0],
        "activation": table["activation"][chosen[0]],
    }
    side = SIDES.get(table["dataset"][chosen[0]], 28) if "dataset" in table else 28
    spec = InputSpec((1, kernels[0][2], side, side))
    architecture = Architecture("datasets_zoo.published.small_cnn:small_cnn", options, (spec,))

    def load(rows: range) -> tuple[State, dict[str, Any]]:
        picked = [chosen[i] for i in rows]
        flat = np.array(_weights(path)[picked], dtype=np.float32)
        some = {name: [values[i] for i in picked] for name, values in table.items()}
        return finite({slot.name: _tensor(flat, slot) for slot in slots}, some)

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


def _csv(path: Path) -> dict[str, list[str]]:
    """Columns of text; equal texts are one object, for a zoo has millions."""
    known: dict[str, str] = {}
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as text:
            lines = csv.reader(cast(Any, text))
            names = next(lines, [])
            columns = [list[str]() for _ in names]
            for line in lines:
                for values, value in zip(columns, line, strict=True):
                    values.append(known.setdefault(value, value))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise ZooError(message(f"published: {path} cannot be read", got=str(error))) from error
    return dict(zip(names, columns, strict=True))


def _metrics(path: Path) -> dict[str, list[Any]]:
    """Columns of the metrics, as numbers where every value of them is one, and ``network``."""
    raw = _csv(path)
    needed = {"modeldir", "step", "config.activation"}
    if not needed <= raw.keys() or not raw["step"]:
        raise ZooError(
            message(f"published: {path} lacks columns", expected=", ".join(sorted(needed)))
        )
    table = {name.removeprefix("config."): _numbers(values) for name, values in raw.items() if name}
    numbers = {name: i for i, name in enumerate(dict.fromkeys(raw["modeldir"]))}
    return table | {"network": [numbers[name] for name in raw["modeldir"]]}


def _layout(path: Path) -> list[_Slot]:
    """Slots in the order of a row; named by their order among kernels and biases."""
    slots: list[_Slot] = []
    seen = {"weight": 0, "bias": 0}
    try:
        columns = _csv(path)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines = sorted(rows, key=lambda line: int(line["start_idx"]))
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


def _numbers(values: list[str]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values
