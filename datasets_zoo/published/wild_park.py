"""CNN Wild Park.

Kofinas et al. (2024), "Graph Neural Networks for Learning Equivariant Representations of Neural
Networks" (github.com/mkofinas/neural-graphs; Zenodo 12797219).

``<run>/<network>/<checkpoint>/checkpoint.pt``, as Ray Tune writes them; each a dict with ``model``
(a state dict ``layers.<i>.weight``, ``layers.<i>.bias``, ``fc.weight``, ``fc.bias``), ``config``
(``n_layers``, ``n_classes``, ``channels`` from the image's on, ``kernel_size``, ``stride``,
``padding``, ``residual``, ``activation``), ``iteration`` and ``last_result`` with ``test/acc``.
Beside them perhaps ``cnn_park_splits.json``: for train, val and test ``path``, ``score``, ``step``.

The configuration is pickled as objects of OmegaConf and of the publisher's package. They are not
imported: each is read as an inert record of what was stored in it.

Network: convolutions one after the other; layer ``i`` adds to its sums the first channels of what
layer ``residual[i]`` gave (as many as both have; -1: none), then applies its activation; global
average pooling, a linear layer. Nearly every network has an architecture of its own, so a zoo of
them has nearly as many cohorts as networks.

- Confirmed in the publisher's code: all of the above.
- Not confirmed: the archive itself was not at hand. Reading OmegaConf's objects was tried with
  files that we wrote with OmegaConf 2.3.

Columns: ``network``, ``epoch``, ``test_accuracy``, ``layers``, ``split`` (empty without a list);
split by ``network`` if there is no list.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from datasets_zoo.published.files import (
    Entry,
    Group,
    column,
    group_of,
    json_of,
    known_files,
    nothing_found,
    torch_file,
)
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec
from wspace.zoo.split import PARTS

SIDE = 32
LISTS = ("channels", "kernel_size", "stride", "padding", "residual", "activation")

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "none": nn.Identity,
}


class WildCNN(nn.Module):
    """A network of the park.

    Args:
        channels: Of the image, then of every convolution.
        kernel_size: Of every convolution.
        stride: Of every convolution.
        padding: Of every convolution.
        residual: Number of the layer that every layer adds to its sums, or -1.
        activation: Of every layer, one of `ACTIVATIONS`.
        classes: Length of the answer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernel_size: Sequence[int],
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        residual: Sequence[int],
        activation: Sequence[str],
        classes: int,
    ) -> None:
        super().__init__()
        pairs = zip(channels[:-1], channels[1:], kernel_size, stride, padding, strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(*sizes) for sizes in pairs)
        self.fc = nn.Linear(channels[-1], classes)
        self.residual = tuple(residual)
        self.acts = nn.ModuleList(ACTIVATIONS[name]() for name in activation)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, channels, height, width)``."""
        given: list[Tensor] = []
        for layer, act, source in zip(self.layers, self.acts, self.residual, strict=True):
            x = layer(x)
            if source >= 0:
                shared = min(given[source].shape[1], x.shape[1])
                added = x[:, :shared] + given[source][:, :shared]
                x = torch.cat([added, x[:, shared:]], 1) if shared < x.shape[1] else added
            x = act(x)
            given.append(x)
        return self.fc(x.mean((2, 3)))


def wild_cnn(
    channels: Sequence[int] = (3, 8, 8),
    kernel_size: Sequence[int] = (3, 3),
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (1, 1),
    residual: Sequence[int] = (-1, -1),
    activation: Sequence[str] = ("relu", "relu"),
    classes: int = 10,
) -> nn.Module:
    """The network of `WildCNN`."""
    return WildCNN(
        channels,
        kernel_size,
        stride=stride,
        padding=padding,
        residual=residual,
        activation=activation,
        classes=classes,
    )


def groups(root: Path, last: bool) -> list[Group]:
    """Networks of a folder, a group for each architecture; every file is read once to know it.

    Args:
        root: The folder.
        last: Whether to keep the last checkpoint of every network only.

    Returns:
        The groups.

    Raises:
        ZooError: If there are none.
    """
    paths = sorted(root.rglob("checkpoint.pt"))
    if not paths:
        raise ZooError(
            nothing_found("cnn_wild_park", root, "<run>/<network>/<checkpoint>/checkpoint.pt")
        )
    splits = _splits(root, paths)
    numbers = {folder: i for i, folder in enumerate(dict.fromkeys(p.parent.parent for p in paths))}
    found: list[tuple[Architecture, Entry]] = []
    for path in paths:
        content = _content(path)
        architecture = _architecture(content["config"], path)
        row = {
            "network": numbers[path.parent.parent],
            "epoch": int(content["iteration"]),
            "test_accuracy": float(content["last_result"]["test/acc"]),
            "layers": len(architecture.options["kernel_size"]),
            "split": splits.get(path, ""),
        }
        found.append((architecture, Entry(path, row)))
    if last:
        found.sort(key=lambda item: item[1].row["epoch"])
        found = list({item[1].row["network"]: item for item in found}.values())
    together: dict[str, tuple[Architecture, list[Entry]]] = {}
    for architecture, entry in sorted(found, key=lambda item: item[1].path):
        together.setdefault(architecture.to_json(), (architecture, []))[1].append(entry)
    return [group_of(*item, _model) for _, item in sorted(together.items())]


def _model(path: Path) -> Any:
    return _content(path)["model"]


def _architecture(config: object, path: Path) -> Architecture:
    table = cast(dict[str, Any], config) if isinstance(config, dict) else {}
    lists = {name: table.get(name) for name in LISTS}
    n = len(cast(list[Any], lists["kernel_size"] or []))
    right = n > 0 and all(
        isinstance(values, list) and len(cast(list[Any], values)) == n + (name == "channels")
        for name, values in lists.items()
    )
    if not right or not set(cast(list[str], lists["activation"])) <= ACTIVATIONS.keys():
        raise ZooError(
            message(
                f"published: {path} has a configuration that is not understood",
                expected=f"lists {', '.join(LISTS)}; activations {', '.join(ACTIVATIONS)}",
                got=str(table),
            )
        )
    options = lists | {"classes": int(table.get("n_classes", 10))}
    spec = InputSpec((1, cast(list[int], lists["channels"])[0], SIDE, SIDE))
    return Architecture("datasets_zoo.published.wild_park:wild_cnn", options, (spec,))


def _splits(root: Path, paths: list[Path]) -> dict[Path, str]:
    """Part of every file that a list names: by network, checkpoint and file name."""
    known = known_files(paths, 3)
    out: dict[Path, str] = {}
    for file in sorted(root.glob("*splits*.json")):
        for part, table in cast(dict[str, dict[str, Any]], json_of(file)).items():
            for name in column(table, "path", len(table.get("path", []))):
                path = known.get(Path(str(name)).parts[-3:])
                if path is not None and part in PARTS:
                    out[path] = part
    return out


# --- pickled configurations -----------------------------------------------------------------------


class _Record:
    """Stands for an object of a class that is not imported; holds what was stored in it."""

    def __new__(cls, *_: object) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        self.state: object = {}

    def __setstate__(self, state: object) -> None:
        self.state = state


def _content(path: Path) -> dict[str, Any]:
    """A checkpoint with its configuration as lists, numbers and strings."""
    serialization = cast(Any, torch.serialization)
    try:
        foreign = sorted(serialization.get_unsafe_globals_in_checkpoint(path))
        names = [name for name in foreign if name.partition(".")[0] in _FOREIGN]
        records = [(type("Record", (_Record,), {}), name) for name in names]
        with serialization.safe_globals(records):
            content = torch_file(path)
    except AttributeError as error:
        raise ZooError(message(f"published: {path} needs torch 2.6 or later")) from error
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ZooError):
            raise
        raise ZooError(message(f"published: {path} cannot be read", got=str(error))) from error
    needed = {"model", "config", "iteration", "last_result"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise ZooError(
            message(f"published: {path} is no checkpoint", expected=", ".join(sorted(needed)))
        )
    rest = {name: _plain(content[name], 0) for name in needed - {"model"}}
    return {"model": content["model"], **rest}


_FOREIGN = ("omegaconf", "experiments", "typing", "builtins", "collections", "ray", "numpy")
"""Packages whose objects are read as records."""


def _plain(item: object, depth: int) -> Any:
    """Values inside records; what lies too deep is left out."""
    if depth > 12:
        return None
    if isinstance(item, _Record):
        state = cast(dict[str, Any], item.state) if isinstance(item.state, dict) else {}
        inner = state.get("_content", state.get("_val", state))
        return _plain(inner, depth + 1)
    if isinstance(item, dict):
        table = cast(dict[Any, Any], item)
        return {name: _plain(value, depth + 1) for name, value in table.items()}
    if isinstance(item, list | tuple):
        return [_plain(value, depth + 1) for value in cast(Sequence[Any], item)]
    return item
