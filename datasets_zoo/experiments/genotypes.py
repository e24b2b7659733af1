"""Random architectures with batches of images: what a graph hypernetwork is trained on.

A *genotype* is a seed and a regime; it names one architecture of `datasets_zoo.architectures` with
random widths, depth, activation and the rest. None has more than `LIMIT` parameters. The regimes:

===========  =====================================================================================
``train``    perceptrons, convolutions with BatchNorm, of one stride or several, residual networks,
             depthwise ones, small vision transformers: up to 48 wide (perceptrons 64), at most 3
             blocks
``between``  the same families and depths, of widths between those of training, 10 to 44
             (perceptrons 18 to 62)
``wide``     the same families, 56 to 96 wide (perceptrons 80 to 160)
``deep``     the same families, 4 to 6 blocks or hidden layers, 6 to 8 convolutions
``family``   residual networks in stages (`architectures.resnet`), of which training has none
``bare``     convolutions without BatchNorm, which all convolutions in training have (but for
             depthwise ones)
===========  =====================================================================================

No architecture of another regime can be one of ``train``. (Other seeds of ``train`` would not do:
some families have so few members that most were seen.)
"""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_zoo.architectures import ACTIVATIONS
from datasets_zoo.images import Images, standardised
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec

LIMIT = 100_000
FAMILIES = ("mlp", "cnn", "plain", "residual", "depthwise", "vit")
REGIMES = ("train", "between", "wide", "deep", "family", "bare")
_FAMILIES = {"family": ("resnet",), "bare": ("cnn", "plain")}
_NARROW = (8, 12, 16, 20, 24, 32, 40, 48)
_WIDTHS = {"between": (10, 14, 18, 22, 28, 36, 44), "wide": (56, 64, 72, 80, 96)}
_HIDDEN = {"between": tuple(range(18, 63, 4)), "wide": tuple(range(80, 161, 8))}


class Genotype(NamedTuple):
    """An architecture, and where it comes from.

    Attributes:
        family: Name of its factory in `datasets_zoo.architectures`.
        regime: One of `REGIMES`.
        seed: Its number in the regime.
        architecture: Builds it.
    """

    family: str
    regime: str
    seed: int
    architecture: Architecture


@lru_cache(maxsize=8192)
def genotype(
    seed: int, regime: str = "train", *, channels: int = 1, side: int = 14, families: str = ""
) -> Genotype:
    """The architecture of a seed.

    Args:
        seed: Any number.
        regime: One of `REGIMES`.
        channels: Channels of the images.
        side: Pixels along a side of the images.
        families: Names of the families to draw from, separated by spaces; those of the regime if
            empty.

    Returns:
        The same genotype for the same arguments.

    Raises:
        ZooError: If there is no such regime.
    """
    if regime not in REGIMES:
        raise ZooError(
            message("genotype: no such regime", expected=", ".join(REGIMES), got=repr(regime))
        )
    known = families.split() or _FAMILIES.get(regime, FAMILIES)
    stream = random.Random(f"{regime}-{seed}-{channels}-{side}-{families}")
    family = stream.choice(list(known))
    while True:
        options = _options(family, regime, channels, side, stream)
        spec = InputSpec((2, channels, side, side))
        made = Architecture(f"datasets_zoo.architectures:{family}", options, [spec])
        if sum(p.numel() for p in made.module().parameters()) <= LIMIT:
            return Genotype(family, regime, seed, made)


def _options(
    family: str, regime: str, channels: int, side: int, stream: random.Random
) -> dict[str, Any]:
    draw: Any = stream.choice
    deep, widths = regime == "deep", _WIDTHS.get(regime, _NARROW)
    width, blocks = draw(widths), draw((4, 5, 6) if deep else (1, 2, 3))
    rest = {"activation": draw(list(ACTIVATIONS))}
    if family == "mlp":
        sizes = _HIDDEN.get(regime, tuple(range(16, 65, 4)))
        hidden = [draw(sizes) for _ in range(blocks)]
        return {"inputs": channels * side**2, "hidden": hidden, **rest}
    rest["channels"] = channels
    if family in {"cnn", "plain"}:
        norm = regime != "bare"
        if family == "cnn" and not deep:
            count, kernel = draw((2, 3, 4)), draw((3, 3, 5))
            sizes = [draw(widths) for _ in range(count)]
            return {"widths": sizes, "kernel": kernel, "norm": norm, **rest}
        sizes = [draw(widths) for _ in range(draw((6, 7, 8) if deep else (3, 4, 5)))]
        strides = [2, *[1] * (len(sizes) - 1)]
        strides[stream.randrange(1, len(sizes))] = 2
        if family == "cnn":  # of one stride: deeper only without
            return {"widths": sizes, "stride": 1, "norm": norm, **rest}
        return {"widths": sizes, "strides": strides, "norm": norm, **rest}
    if family == "resnet":
        stages = sorted(draw(widths) for _ in range(draw((2, 3))))
        return {"widths": stages, "blocks": draw((1, 2)), "stem": 2, **rest}
    if family == "vit":
        heads = draw([n for n in (1, 2, 4) if width % n == 0])
        return {
            "image": side, "patch": 2 if side % 4 else 4, "width": width, "blocks": blocks,
            "heads": heads, **rest,
        }  # fmt: skip
    return {"width": width, "blocks": blocks, **rest}


class Batch(NamedTuple):
    """Architectures, and images that all of them see.

    Attributes:
        genotypes: The architectures.
        images: ``(N, channels, n, n)``.
        labels: int64 ``(N,)``.
    """

    genotypes: tuple[Genotype, ...]
    images: Tensor
    labels: Tensor


class _Steps(Sampler[int]):
    """Numbers of the steps of an epoch: no two epochs have the same."""

    def __init__(self, steps: int) -> None:
        self.steps, self.epoch = steps, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before every epoch, so that a resumed run goes on where it was."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        for i in range(self.steps):  # lazily: Lightning sets the epoch after it asks for this
            yield self.epoch * self.steps + i


class _Drawn(Dataset[Batch]):
    """The batch of every step, drawn by the step's number."""

    def __init__(self, data: "GenotypeImages", images: Tensor, labels: Tensor) -> None:
        self.data, self.images, self.labels = data, images, labels

    def __getitem__(self, step: int) -> Batch:
        data = self.data
        g = torch.Generator().manual_seed(data.seed * 1_000_003 + step)
        seeds = torch.randint(data.genotypes, (data.meta_batch,), generator=g).tolist()
        rows = torch.randint(len(self.labels), (data.batch_size,), generator=g)
        some = tuple(data.genotype(seed, "train") for seed in seeds)
        return Batch(some, self.images[rows], self.labels[rows])


class GenotypeImages(LightningDataModule):
    """Random architectures and images.

    Args:
        dataset: Any of `datasets_zoo.images`.
        root: Folder or file of the images.
        pool: Side of the squares of pixels that are averaged into one.
        families: To draw from in training; all of `FAMILIES` if empty.
        genotypes: Number of training architectures (seeds 0, 1, …).
        held_out: Architectures for validation, of the regime ``between``.
        meta_batch: Architectures in one step.
        batch_size: Images in one step.
        steps: Steps in an epoch.
        judged: Images that validation looks at, of those put aside from the training images.
        regimes: Regimes to test, `tested` architectures of each, on the test images.
        tested: Architectures of each regime.
        seed: Decides which architectures and images come together.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        *,
        pool: int = 1,
        families: Sequence[str] = (),
        genotypes: int = 2000,
        held_out: int = 12,
        meta_batch: int = 4,
        batch_size: int = 64,
        steps: int = 500,
        judged: int = 1000,
        regimes: Sequence[str] = ("between", "wide", "deep", "family", "bare"),
        tested: int = 30,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.root, self.pool = dataset, root, pool
        self.families = " ".join(families)
        self.genotypes, self.held_out = genotypes, held_out
        self.meta_batch, self.batch_size, self.steps = meta_batch, batch_size, steps
        self.judged, self.regimes, self.tested = judged, tuple(regimes), tested
        self.seed = seed
        self.images: Images | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads the images.

        Args:
            stage: Not used.
        """
        del stage
        if self.images is None:
            self.images = pooled(standardised(self.dataset, self.root), self.pool)

    def genotype(self, seed: int, regime: str) -> Genotype:
        """An architecture for these images.

        Args:
            seed: Its number.
            regime: One of `REGIMES`.

        Returns:
            The genotype.
        """
        self.setup()
        assert self.images is not None
        channels, side = self.images.train_x.shape[1], self.images.train_x.shape[-1]
        chosen = self.families if regime in {"train", "between", "wide", "deep"} else ""
        return genotype(seed, regime, channels=channels, side=side, families=chosen)

    def _parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Images for training and those put aside for validation."""
        self.setup()
        assert self.images is not None
        x, y, n = self.images.train_x, self.images.train_y, self.judged
        return (x[:-n], y[:-n]), (x[-n:], y[-n:])

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Moves images and labels; architectures have no values.

        Args:
            batch: The batch.
            device: Where to.
            dataloader_idx: Not used.

        Returns:
            The batch.
        """
        del dataloader_idx
        return batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of `meta_batch` architectures and `batch_size` images."""
        (x, y), _ = self._parts()
        return DataLoader(_Drawn(self, x, y), batch_size=None, sampler=_Steps(self.steps))

    def val_dataloader(self) -> DataLoader[Batch]:
        """One batch for each held-out architecture."""
        _, (x, y) = self._parts()
        batches = [Batch((self.genotype(i, "between"),), x, y) for i in range(self.held_out)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Batch]:
        """One batch for each architecture of the regimes to test."""
        self.setup()
        assert self.images is not None
        x, y = self.images.test_x, self.images.test_y
        batches = [
            Batch((self.genotype(self.held_out + i, regime),), x, y)
            for regime in self.regimes
            for i in range(self.tested)
        ]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def pooled(data: Images, pool: int) -> Images:
    """Images with squares of pixels averaged, brought to mean 0 and deviation 1 again.

    Args:
        data: Images of `datasets_zoo.images.standardised`.
        pool: Side of the squares; 1 for none.

    Returns:
        Smaller images.
    """
    if pool == 1:
        return data
    train, test = (F.avg_pool2d(x, pool) for x in (data.train_x, data.test_x))
    spread, mean = torch.std_mean(train, (0, 2, 3), keepdim=True)
    return Images((train - mean) / spread, data.train_y, (test - mean) / spread, data.test_y)
