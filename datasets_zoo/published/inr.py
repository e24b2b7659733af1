r"""Published SIRENs.

``dws_inr``, MNIST (Navon et al. 2023, github.com/AvivNavon/DWSNets):
``mnist_png_training_<label>_<image>/checkpoints/*.pth`` and ``mnist_png_testing_…``, each a state
dict ``seq.0.weight``, ``seq.0.bias`` … of layers 2-32-32-1. Fashion-MNIST: one folder of ``.pth``
files named ``…_<image>.pth``, the same dict with an entry ``label``, and ``splits.json`` with lists
of paths for train, val and test. A ``*.json`` of train, val and test, each with ``path`` and
``label`` (as the publisher's script writes for MNIST), is honoured too. Paths in such lists are
matched by their last three parts, or by their last two in the folder itself; files that they do not
list are left out.

- Confirmed in the publisher's or neural-graphs' code: the folder's label and image number, that the
  word train or test in it gives the part, names and order in the state dict, the forward pass
  :math:`\sin(30 (W x + b))` and + 0.5 at the end, the ``label`` entry and ``splits.json`` of
  Fashion-MNIST. Seen in a third party's code: the file name ``model_final.pth``.
- Not confirmed: the archives themselves were not at hand.

``nfn_siren`` (Zhou et al. 2023, github.com/AllanYangZhou/nfn):
``<prefix>_<label>s/net<image>.pth``, and ``<prefix>_aug<copy>_<label>s/net<image>.pth`` for more
copies; prefix ``randinit_smaller``. State dict ``net.0.linear.weight``, ``net.0.linear.bias``,
``net.1.linear.…``, ``net.2.weight``, ``net.2.bias``; images are numbered through training and test
images of the data set, pixels in [-1, 1], no shift at the end.

- Confirmed in the publisher's code: folder and file patterns, names, forward pass, the split at
  images 45,000 and 50,000.
- Not confirmed: the archives themselves were not at hand.

Columns: ``label``, ``image``, ``view`` (0; NFN's copy number plus 1), ``split``.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from datasets_zoo.published.files import (
    Group,
    State,
    column,
    json_of,
    known_files,
    nothing_found,
    shapes_of,
    stacked,
    state_of,
    torch_file,
)
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec
from wspace.zoo.split import PARTS

VALIDATION, TEST = 45_000, 50_000
"""First image of these parts in NFN's data."""


class _Sine(nn.Module):
    """sin(ω (W x + b)), its parameters its own."""

    def __init__(self, inputs: int, outputs: int, omega: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * nn.functional.linear(x, self.weight, self.bias))


class _LinearSine(nn.Module):
    """sin(ω (W x + b)) with an inner linear layer."""

    def __init__(self, inputs: int, outputs: int, omega: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


class DWSInr(nn.Module):
    """The SIREN of DWSNets: + 0.5 at the end.

    Args:
        sizes: Widths of the layers, inputs and outputs included.
        omega: Frequency of the sines.
    """

    def __init__(self, sizes: Sequence[int], omega: float) -> None:
        super().__init__()
        hidden = [_Sine(a, b, omega) for a, b in zip(sizes[:-2], sizes[1:-1], strict=True)]
        self.seq = nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1], ``(points, out)``, at coordinates ``(points, in)``."""
        return self.seq(x) + 0.5


class NFNSiren(nn.Module):
    """The SIREN of NFN.

    Args:
        sizes: Widths of the layers, inputs and outputs included.
        omega: Frequency of the sines.
    """

    def __init__(self, sizes: Sequence[int], omega: float) -> None:
        super().__init__()
        hidden = [_LinearSine(a, b, omega) for a, b in zip(sizes[:-2], sizes[1:-1], strict=True)]
        self.net = nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels in [-1, 1], ``(points, out)``, at coordinates ``(points, in)``."""
        return self.net(x)


def dws_inr(sizes: Sequence[int] = (2, 32, 32, 1), omega: float = 30.0) -> nn.Module:
    """The network of `DWSInr`."""
    return DWSInr(sizes, omega)


def nfn_siren(sizes: Sequence[int] = (2, 32, 32, 1), omega: float = 30.0) -> nn.Module:
    """The network of `NFNSiren`."""
    return NFNSiren(sizes, omega)


class _Entry(NamedTuple):
    """A file and what its path or a list says of it; a label of -1 is in the file."""

    path: Path
    label: int
    image: int
    view: int
    split: str


def dws_groups(root: Path, last: bool) -> list[Group]:
    """DWSNets' SIRENs of a folder.

    Args:
        root: The folder.
        last: Without effect: there is one state of each network.

    Returns:
        One group.

    Raises:
        ZooError: If there are none.
    """
    del last
    files = sorted(p for p in root.rglob("*") if p.suffix in {".pth", ".pt"})
    lists = [found for p in sorted(root.glob("*.json")) if (found := _split_list(p))]
    entries = _listed(root, files, lists[0]) if lists else [_from_folder(path) for path in files]
    if not entries:
        raise ZooError(
            nothing_found("dws_inr", root, "mnist_png_…_<label>_<image>/…/*.pth, or splits.json")
        )
    return [_group("dws_inr", entries)]


def nfn_groups(root: Path, last: bool) -> list[Group]:
    """NFN's SIRENs of a folder.

    Args:
        root: The folder.
        last: Without effect: there is one state of each network.

    Returns:
        One group.

    Raises:
        ZooError: If there are none.
    """
    del last
    entries: list[_Entry] = []
    for path in sorted(root.glob("*/net*.pth")):
        folder = re.fullmatch(r".+?(?:_aug(\d+))?_(\d)s", path.parent.name)
        number = re.fullmatch(r"net(\d+)\.pth", path.name)
        if folder and number:
            image, view = int(number[1]), -1 if folder[1] is None else int(folder[1])
            split = PARTS[(image >= VALIDATION) + (image >= TEST)]
            entries.append(_Entry(path, int(folder[2]), image, view + 1, split))
    if not entries:
        raise ZooError(nothing_found("nfn_siren", root, "<prefix>_<label>s/net<image>.pth"))
    entries.sort(key=lambda entry: (entry.view, entry.image))
    return [_group("nfn_siren", entries)]


def _group(factory: str, entries: list[_Entry]) -> Group:
    first = _state(entries[0].path)[0]
    sizes = _sizes(first, entries[0].path)
    architecture = Architecture(
        f"datasets_zoo.published.inr:{factory}", {"sizes": sizes}, (InputSpec((1, sizes[0])),)
    )
    like = shapes_of(architecture)

    def load(rows: range) -> tuple[State, dict[str, Any]]:
        chosen = [entries[i] for i in rows]
        read = [_state(entry.path) for entry in chosen]
        state = stacked([s for s, _ in read], like, [entry.path for entry in chosen])
        labels = [
            entry.label if label is None else label
            for entry, (_, label) in zip(chosen, read, strict=True)
        ]
        table = {name: [getattr(e, name) for e in chosen] for name in ("image", "view", "split")}
        return state, {"label": labels, **table}

    return Group(architecture, len(entries), load)


def _state(path: Path) -> tuple[State, int | None]:
    """State of a file, and the label among it."""
    content = torch_file(path)
    label = content.pop("label", None) if isinstance(content, dict) else None
    return state_of(content, path), None if label is None else int(label)


def _sizes(state: State, path: Path) -> list[int]:
    matrices = [x for x in state.values() if x.dim() == 2]
    if not matrices:
        raise ZooError(message(f"published: {path} holds no perceptron", got=", ".join(state)))
    return [matrices[0].shape[1], *[x.shape[0] for x in matrices]]


def _from_folder(path: Path) -> _Entry:
    """What ``mnist_png_training_<label>_<image>/checkpoints/x.pth`` says."""
    parts = path.parent.parent.name.split("_")
    if len(parts) < 3 or not (parts[-1].isdigit() and parts[-2].isdigit()):
        raise ZooError(
            message(
                f"published: no label in the path of {path}",
                expected="…_<label>_<image>/<folder>/<file>, or a list of the splits",
            )
        )
    split = next((part for part in ("train", "test") if part in path.parent.parent.name), "")
    return _Entry(path, int(parts[-2]), int(parts[-1]), 0, split)


def _image(path: Path) -> int:
    """Number of the image: at the end of the folder's or the file's name; -1 if in neither."""
    found = re.search(r"_\d+_(\d+)$", path.parent.parent.name) or re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else -1


def _split_list(path: Path) -> dict[str, Any] | None:
    content = json_of(path)
    known = isinstance(content, dict) and content and set(cast(Any, content)) <= set(PARTS)
    return cast(dict[str, Any], content) if known else None


def _listed(root: Path, files: list[Path], splits: dict[str, Any]) -> list[_Entry]:
    """Entries of a list: ``{part: [path]}`` or ``{part: {"path": […], "label": […]}}``."""
    entries: list[_Entry] = []
    lost: list[str] = []
    known, here = known_files(files, 3), set(files)
    for part, table in splits.items():
        paths = table if isinstance(table, list) else table.get("path", [])
        labels = [-1] * len(paths)
        if not isinstance(table, list):
            labels = [int(label) for label in column(table, "label", len(paths))]
        for name, label in zip(paths, labels, strict=True):
            parts = Path(str(name)).parts
            path = known.get(parts[-3:]) or root.joinpath(*parts[-2:])
            if path not in here:
                lost.append(str(name))
                continue
            entries.append(_Entry(path, label, _image(path), 0, part))
    if lost:
        raise ZooError(
            message(f"published: {len(lost)} files of the list are not there", got=lost[:5])
        )
    return entries
