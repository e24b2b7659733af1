"""ModelZooDataset, CNN-s and CNN-l.

Schürholt et al. (2022), "Model Zoos: A Dataset of Diverse Populations of Neural Network Models"
(github.com/ModelZoos/ModelZooDataset); CC BY 4.0. The raw zoos, unpacked: a folder for each
network, as Ray Tune writes it, with

- ``result.json``: a line of JSON for each epoch: ``training_iteration``, ``test_acc``,
  ``test_loss``, ``train_acc``, ``train_loss``, and the configuration as ``config``
  (``model::type``, ``model::nlin``, ``optim::lr``, ``seed`` …);
- ``params.json``: the configuration alone;
- ``checkpoint_<epoch>/checkpoints``, the epoch with or without six digits: a state dict
  ``module_list.<i>.weight``, ``module_list.<i>.bias``.

Networks: CNN-s (``CNN``), three convolutions (8, 6, 4 channels, kernels 5, 5, 2) and two linear
layers (20, 10), 2,464 parameters on grey images of 28 × 28; its wider variant ``CNN2``; CNN-l
(``CNN3``: 16, 32, 15 channels, kernels 3; 20, 10) on 32 × 32. Max pooling and an activation after
the first two convolutions (CNN-l: all three). Every configuration of network is a group of its own.
ResNet-18 zoos are not read.

- Confirmed in the publisher's code: all of the above except ``params.json``, and that iterations
  and epochs agree.
- Not confirmed: the archives themselves were not at hand; ``params.json`` is Ray Tune's custom and
  need not be there. The ``.pt`` files of the publisher are pickles of its own classes: refused.

Columns: ``network``, ``epoch``, ``test_accuracy``, ``test_loss``, ``train_accuracy``,
``train_loss`` (NaN where an epoch was not trained or written), ``lr``, ``wd``, ``optimizer``,
``init_type``, ``nlin``, ``dropout``, ``batchsize``, ``seed``. Split by ``network``. States with
numbers that are not finite are left out.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from datasets_zoo.published.files import (
    Entry,
    Group,
    group_of,
    json_of,
    nothing_found,
    torch_file,
)
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec, canonical

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "leakyrelu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class _Design(NamedTuple):
    """Channels and kernels of the convolutions, which are pooled, pixels left, image size."""

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    pooled: int
    left: int
    side: int


DESIGNS = {
    "CNN": _Design((8, 6, 4), (5, 5, 2), 2, 9, 28),
    "CNN2": _Design((6, 9, 6), (5, 5, 2), 2, 9, 28),
    "CNN3": _Design((16, 32, 15), (3, 3, 3), 3, 4, 32),
}


class ModelZooCNN(nn.Module):
    """A network of the zoos, with the publisher's names.

    Args:
        design: One of `DESIGNS`.
        channels: Of the images.
        nlin: One of `ACTIVATIONS`.
        dropout: Whether layers of dropout are among `module_list`; they are idle in evaluation.
    """

    def __init__(self, design: str, channels: int, nlin: str, dropout: bool) -> None:
        super().__init__()
        made, layers = DESIGNS[design], list[nn.Module]()
        idle: list[nn.Module] = [nn.Dropout(0.0)] if dropout else []
        widths = (channels, *made.channels)
        for i, kernel in enumerate(made.kernels):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], kernel))
            if i < made.pooled:
                layers += [nn.MaxPool2d(2, 2), ACTIVATIONS[nlin](), *idle]
            else:
                layers.append(ACTIVATIONS[nlin]())
        layers += [nn.Flatten(), nn.Linear(made.left * widths[-1], 20), ACTIVATIONS[nlin](), *idle]
        self.module_list = nn.ModuleList([*layers, nn.Linear(20, 10)])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, channels, height, width)``."""
        for layer in self.module_list:
            x = layer(x)
        return x


def model_zoo_cnn(
    design: str = "CNN", channels: int = 1, nlin: str = "tanh", dropout: bool = False
) -> nn.Module:
    """The network of `ModelZooCNN`."""
    return ModelZooCNN(design, channels, nlin, dropout)


def groups(root: Path, last: bool) -> list[Group]:
    """Networks of a folder, a group for each configuration of network.

    Args:
        root: The folder.
        last: Whether to keep the last checkpoint of every network only.

    Returns:
        The groups.

    Raises:
        ZooError: If there are none, or it is one of the publisher's pickled data sets.
    """
    if root.suffix == ".pt" or (root.is_dir() and not _trials(root) and list(root.glob("*.pt"))):
        raise ZooError(
            message(
                f"published: {root} is pickled with classes of ModelZooDataset",
                expected="the folder of the raw zoo",
                help="to read it would run its code; unpack the raw .zip of the same record",
            )
        )
    trials = _trials(root)
    if not trials:
        raise ZooError(
            nothing_found(
                "model_zoo",
                root,
                "<network>/result.json and <network>/checkpoint_<epoch>/checkpoints",
            )
        )
    found: dict[str, tuple[Architecture, list[Entry]]] = {}
    for number, trial in enumerate(trials):
        results = trial / "result.json"
        lines = json_of(results, lines=True) if results.is_file() else []
        config = _config(trial, lines)
        architecture = _architecture(config, trial)
        entries = _entries(trial, config, lines, number)
        key = architecture.to_json()
        found.setdefault(key, (architecture, []))[1].extend(entries[-1:] if last else entries)
    return [group_of(*item, torch_file) for _, item in sorted(found.items()) if item[1]]


def _trials(root: Path) -> list[Path]:
    return sorted({path.parent.parent for path in root.rglob("checkpoint_*/checkpoints")})


def _config(trial: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    found: Any = lines[0].get("config") if lines else None
    if (trial / "params.json").is_file():
        found = json_of(trial / "params.json")
    if not isinstance(found, dict):
        raise ZooError(
            message(
                f"published: {trial} does not say what its network is",
                expected="params.json, or result.json with a config in every line",
            )
        )
    return cast(dict[str, Any], found)


def _architecture(config: dict[str, Any], trial: Path) -> Architecture:
    kind, nlin = config.get("model::type"), config.get("model::nlin")
    if kind not in DESIGNS or nlin not in ACTIVATIONS:
        raise ZooError(
            message(
                f"published: {trial} has a network that is not read",
                expected=f"model::type of {', '.join(DESIGNS)}; nlin of {', '.join(ACTIVATIONS)}",
                got=canonical([kind, nlin]),
            )
        )
    channels = int(config.get("model::channels_in", 1))
    dropout = kind == "CNN3" or float(config.get("model::dropout", 0)) > 0
    options = {"design": kind, "channels": channels, "nlin": nlin, "dropout": dropout}
    side = DESIGNS[kind].side
    return Architecture(
        "datasets_zoo.published.model_zoo:model_zoo_cnn",
        options,
        (InputSpec((1, channels, side, side)),),
    )


def _entries(
    trial: Path, config: dict[str, Any], lines: list[dict[str, Any]], number: int
) -> list[Entry]:
    """Checkpoints of a network in the order of epochs."""
    by_epoch = {int(line.get("training_iteration", -1)): line for line in lines}
    found: list[Entry] = []
    for path in trial.glob("checkpoint_*/checkpoints"):
        epoch = re.fullmatch(r"checkpoint_(\d+)", path.parent.name)
        if epoch is None:
            continue
        row = {"network": number, "epoch": int(epoch[1])}
        row |= _measured(by_epoch.get(int(epoch[1]), {})) | _drawn(config)
        found.append(Entry(path, row))
    return sorted(found, key=lambda entry: entry.row["epoch"])


def _measured(line: dict[str, Any]) -> dict[str, float]:
    """Accuracies and losses; the publisher writes -999 where nothing was trained."""
    out: dict[str, float] = {}
    for part in ("test", "train"):
        for short, long in (("acc", "accuracy"), ("loss", "loss")):
            value = line.get(f"{part}_{short}", -999)
            out[f"{part}_{long}"] = float("nan") if value == -999 else float(value)
    return out


def _drawn(config: dict[str, Any]) -> dict[str, Any]:
    numbers = {
        "lr": "optim::lr",
        "wd": "optim::wd",
        "dropout": "model::dropout",
        "batchsize": "training::batchsize",
        "seed": "seed",
    }
    words = {
        "optimizer": "optim::optimizer",
        "init_type": "model::init_type",
        "nlin": "model::nlin",
    }
    drawn: dict[str, Any] = {
        name: float(config.get(key, float("nan"))) for name, key in numbers.items()
    }
    return drawn | {name: str(config.get(key, "")) for name, key in words.items()}
