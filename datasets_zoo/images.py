"""Images and labels that recipes train networks on.

=================  ===================  =========================================================
name               images               source and licence
=================  ===================  =========================================================
``digits``         1,297 + 500, 8 × 8   bundled with scikit-learn; UCI "Optical Recognition of
                                        Handwritten Digits", CC BY 4.0
``mnist``          60,000 + 10,000,     LeCun, Cortes, Burges; CC BY-SA 3.0
                   28 × 28
``fashion_mnist``  60,000 + 10,000,     Xiao, Rasul, Vollgraf (2017), arXiv 1708.07747; MIT
                   28 × 28
``cifar10``        50,000 + 10,000,     Krizhevsky (2009), "Learning Multiple Layers of Features
                   32 × 32 × 3          from Tiny Images"; no licence is stated
``cifar10_16x16``  the same,            means of 2 × 2 pixels of ``cifar10``, rounded
                   16 × 16 × 3
=================  ===================  =========================================================

A data set is looked for in `root`, or in the folder that the environment variable ``WSPACE_DATA``
names, as ``<name>.npz`` (arrays train_x, train_y, test_x, test_y) or as the publisher's files
(``*-ubyte``, ``*-ubyte.gz``; ``cifar-10-binary.tar.gz`` or its ``*.bin``), there or in a folder
``<name>`` or in torchvision's (``MNIST/raw``). Without `root`, what is not there is fetched
and kept in ``~/.cache/wspace``. CIFAR's Python version is pickled and therefore not read.
"""

import gzip
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets_zoo.download import VARIABLE, Remote, checksum, data_folders, fetch
from wspace.errors import MissingExtra, ZooError, message

Bytes = NDArray[np.uint8]

PARTS: tuple[str, ...] = ("train_x", "train_y", "test_x", "test_y")

_UBYTE = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_MD5 = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion_mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
_HOST = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "fashion_mnist": "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
}
_FOLDER = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}  # torchvision's

REMOTES: dict[str, tuple[Remote, ...]] = {
    name: tuple(
        Remote(f"{_HOST[name]}/{file}.gz", f"md5:{md5}")
        for file, md5 in zip(_UBYTE, sums, strict=True)
    )
    for name, sums in _MD5.items()
}
"""Files that are fetched, by name of the data set."""
REMOTES["cifar10"] = (
    Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
    ),
)

_TAR = "cifar-10-binary.tar.gz"
_BINS = (*[f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin")

TRAIN_DIGITS = 1297
"""Images of ``digits`` that are put aside for training by one fixed shuffle."""


class Images(NamedTuple):
    """A data set of images.

    Attributes:
        train_x: Training images, uint8 ``(N, height, width)`` or ``(N, height, width, 3)``.
        train_y: Their labels, int64 ``(N,)``.
        test_x: Test images.
        test_y: Their labels.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def images(name: str, root: str | Path | None = None) -> Images:
    """A data set by name.

    Args:
        name: One of the table at the top of this file.
        root: Folder or file where it lies; by default the places named there.

    Returns:
        Images in their original order, except ``digits``, and labels. (A ``.npz`` is taken as it
        is; its order is its own.)

    Raises:
        ZooError: If there is no such data set, its files are damaged, or they cannot be fetched.
        MissingExtra: If ``digits`` is asked for without scikit-learn.
    """
    if name not in _READERS:
        raise ZooError(
            message(
                "images: no such data set", expected=f"one of {', '.join(_READERS)}", got=repr(name)
            )
        )
    if name == "digits":
        return _digits()
    places = data_folders(root)
    for place in places:
        archive = place if place.suffix == ".npz" else place / f"{name}.npz"
        if archive.is_file():
            return _npz(archive)
    return _READERS[name](name, places, bool(root))


def standardised(name: str, root: str | Path | None = None) -> Images:
    """Images as networks take them.

    Args:
        name: As for `images`.
        root: As for `images`.

    Returns:
        Images as float32 ``(N, channels, height, width)``, shifted and scaled so that every channel
        of the training images has mean 0 and standard deviation 1; labels.
    """
    data = images(name, root)
    train, test = (_channels_first(x) for x in (data.train_x, data.test_x))
    deviation, mean = torch.std_mean(train, (0, 2, 3), keepdim=True)
    deviation = deviation.clamp(min=1e-6)
    return Images((train - mean) / deviation, data.train_y, (test - mean) / deviation, data.test_y)


def _channels_first(x: Tensor) -> Tensor:
    return (x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)).float()


def _digits(*_: object) -> Images:
    """The digits of scikit-learn; 0 … 16 becomes 0 … 255."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtra(
            message("images: digits need scikit-learn", help="pip install 'wspace[demo]'")
        ) from error
    data: Any = load_digits()
    pixels = (torch.tensor(data.images) * (255 / 16)).round().to(torch.uint8)
    labels = torch.tensor(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    return Images(pixels[train], labels[train], pixels[test], labels[test])


def _npz(path: Path) -> Images:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            parts = {name: arrays[name] for name in PARTS}
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ZooError(
            message(
                f"images: {path} cannot be read",
                expected=f"arrays {', '.join(PARTS)}",
                got=f"{type(error).__name__}: {error}",
            )
        ) from error
    return _checked(parts, path)


def _checked(parts: dict[str, NDArray[Any]], path: Path) -> Images:
    """Arrays as tensors, once their sizes and types are seen to agree."""
    bad: list[str] = []
    for x, y in (("train_x", "train_y"), ("test_x", "test_y")):
        image, label = parts[x], parts[y]
        if image.dtype != np.uint8 or image.ndim not in {3, 4}:
            bad.append(f"{x}: {image.dtype} {image.shape}")
        if label.dtype.kind not in "iu" or label.shape != image.shape[:1]:
            bad.append(f"{y}: {label.dtype} {label.shape}")
    if bad or parts["train_x"].shape[1:] != parts["test_x"].shape[1:]:
        raise ZooError(
            message(
                f"images: {path} does not hold images and labels",
                expected="uint8 (N, height, width) or (N, height, width, 3), and N integers",
                got=bad or "images of different sizes",
            )
        )
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in parts.items()}
    return Images(
        tensors["train_x"], tensors["train_y"].long(), tensors["test_x"], tensors["test_y"].long()
    )


# --- MNIST and Fashion-MNIST ----------------------------------------------------------------------


def _ubyte_images(name: str, places: list[Path], strict: bool) -> Images:
    folders = [folder for place in places for folder in _nested(place, name)]
    found = next((f for f in folders if _one(f, _UBYTE[0]) is not None), None)
    files: list[Path] = []
    for file, remote in zip(_UBYTE, REMOTES[name], strict=True):
        local = _one(found, file) if found else None
        if local is None and (strict or found):
            raise ZooError(_absent(name, found or places[0], f"{file} or {file}.gz"))
        files.append(local or fetch(remote, name, others=_ways(name)))
    if found is not None:
        _not_the_other(name, files[0])
    arrays = dict(zip(PARTS, [_idx(file) for file in files], strict=True))
    return _checked(arrays, files[0].parent)


def _nested(place: Path, name: str) -> list[Path]:
    return [place / name, place / _FOLDER[name], place] if place.is_dir() else [place.parent]


def _one(folder: Path, file: str) -> Path | None:
    return next((p for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None)


def _not_the_other(name: str, file: Path) -> None:
    """MNIST and Fashion-MNIST give their files the same names."""
    if file.suffix != ".gz":
        return
    found = checksum(file, "md5:")
    for other, remotes in REMOTES.items():
        if other != name and found == remotes[0].checksum:
            raise ZooError(message(f"images: {file} belongs to {other}", expected=name))


def _idx(path: Path) -> Bytes:
    """Array of an IDX file: two zeros, 8 for bytes, the number of sizes, sizes, and the bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as opened:
            raw = opened.read()
    except (OSError, EOFError) as error:
        raise ZooError(message(f"images: {path} is damaged", got=str(error))) from error
    dims = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    sizes = np.frombuffer(raw[4 : 4 + 4 * dims], ">u4").astype(int)
    body = raw[4 + 4 * dims :]
    if not dims or len(sizes) < dims or len(body) != sizes.prod():
        raise ZooError(
            message(
                f"images: {path} is damaged",
                expected=f"an IDX file of bytes, sizes {tuple(sizes.tolist())}",
                got=f"{len(body)} bytes of data",
            )
        )
    return np.frombuffer(body, np.uint8).reshape(*sizes)


# --- CIFAR-10 -------------------------------------------------------------------------------------


def _cifar(name: str, places: list[Path], strict: bool) -> Images:
    parts = next((p for place in places if (p := list(_bins(place)))), None)
    if parts is None:
        if strict:
            raise ZooError(_absent(name, places[0], f"{_TAR}, or its six .bin files"))
        tar = fetch(REMOTES[name][0], name, others=_ways(name))
        parts = list(_tar_bins(tar))
    train = [_records(raw, file) for raw, file in parts[:-1]]
    test = _records(*parts[-1])
    arrays = {
        "train_x": np.concatenate([x for x, _ in train]),
        "train_y": np.concatenate([y for _, y in train]),
        "test_x": test[0],
        "test_y": test[1],
    }
    return _checked(arrays, Path(parts[-1][1]))


def _bins(place: Path) -> Iterator[tuple[bytes, str]]:
    """Contents of the six files in a place; none if they are not there."""
    if place.is_file():
        yield from _tar_bins(place) if place.name.endswith((".tar.gz", ".tar", ".tgz")) else ()
        return
    for folder in (place, place / "cifar10", place / "cifar-10-batches-bin"):
        if (folder / _TAR).is_file():
            yield from _tar_bins(folder / _TAR)
            return
        if (folder / _BINS[-1]).is_file():
            for file in _BINS:
                path = folder / file
                if not path.is_file():
                    raise ZooError(_absent("cifar10", folder, file))
                yield path.read_bytes(), str(path)
            return


def _tar_bins(path: Path) -> Iterator[tuple[bytes, str]]:
    try:
        with tarfile.open(path) as tar:
            members = {item.name.rpartition("/")[2]: item for item in tar if item.isfile()}
            found = [tar.extractfile(members[name]) for name in _BINS if name in members]
            if len(found) == len(_BINS):
                for name, file in zip(_BINS, found, strict=True):
                    yield cast(Any, file).read(), f"{path}/{name}"
                return
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ZooError(message(f"images: {path} is damaged", got=str(error))) from error
    raise ZooError(
        message(
            f"images: {path} is not CIFAR-10's binary version",
            expected=", ".join(_BINS),
            got=", ".join(sorted(members)[:8]),
            help=f"the Python version is pickled and not read; give {_TAR}",
        )
    )


def _records(raw: bytes, file: str) -> tuple[Bytes, Bytes]:
    """Images and labels of a file: a byte for the label, then 32 × 32 red, green, blue."""
    if not raw or len(raw) % 3073:
        raise ZooError(
            message(f"images: {file} is damaged", expected="3073 bytes an image", got=str(len(raw)))
        )
    table = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    return table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), table[:, 0]


def _cifar_halved(name: str, places: list[Path], strict: bool) -> Images:
    del name
    whole = images("cifar10", places[0] if strict else None)
    return Images(_halved(whole.train_x), whole.train_y, _halved(whole.test_x), whole.test_y)


def _halved(x: Tensor) -> Tensor:
    """Means of 2 × 2 pixels, rounded."""
    parts = [x[:, i::2, j::2].to(torch.int16) for i in (0, 1) for j in (0, 1)]
    return ((parts[0] + parts[1] + parts[2] + parts[3] + 2) // 4).to(torch.uint8)


_READERS: dict[str, Callable[[str, list[Path], bool], Images]] = {
    "digits": _digits,
    "mnist": _ubyte_images,
    "fashion_mnist": _ubyte_images,
    "cifar10": _cifar,
    "cifar10_16x16": _cifar_halved,
}


def _ways(name: str) -> tuple[str, ...]:
    files = _TAR if name == "cifar10" else f"{_UBYTE[0]}.gz and its siblings"
    return (f"root=… or {VARIABLE}=… with {name}.npz, or {files}",)


def _absent(name: str, where: Path, what: str) -> str:
    return message(
        f"images: {name} is not in {where}", expected=f"{name}.npz, or {what}", help=_ways(name)[0]
    )
