"""`Pixels`: images that are seen through few sensors, for neural fields.

With ``sensors="pixels"`` the context is a share of the pixels, other ones for each image and, in
training, each time. With ``sensors="radon"`` it is `angles` projections, equally spaced over half a
turn; targets in training are `target_angles` projections, so training never sees a pixel.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_zoo.images import images
from wspace.errors import ZooError, message
from wspace.hyper.fields import PixelSensors, RadonSensors, radon
from wspace.zoo.images import grid


class Observed(NamedTuple):
    """Images, and what sensors read of them.

    Attributes:
        images: Values of the pixels from 0 to 1, ``(B, points, channels)``, row by row.
        grid: Their coordinates, ``(points, 2)``.
        context: Sensors that a network may use.
        readings: What they read, ``(B, m, channels)``.
        target: Sensors whose readings it is trained to predict.
        target_readings: What these read.
    """

    images: Tensor
    grid: Tensor
    context: PixelSensors | RadonSensors
    readings: Tensor
    target: PixelSensors | RadonSensors
    target_readings: Tensor


class Pixels(LightningDataModule):
    """Batches of `Observed`.

    Args:
        dataset: Images, as for `datasets_zoo.images.images`.
        root: Where they lie; see there.
        pool: Side of the squares of pixels that are averaged.
        sensors: ``"pixels"`` or ``"radon"``.
        share: Part of the pixels that is context.
        targets: Pixels that are targets in a training step, drawn at random; None for all.
        angles: Projections that are context.
        target_angles: Projections that are targets, a multiple of `angles`, which are among them.
        batch_size: Images in a batch.
        batches: Training batches in an epoch.
        validation: Training images put aside for validation.
        tests: Test images that are used; None for all.
        seed: Decides batches, sensors and which images are put aside.

    Attributes:
        parts: Pixels ``(n, points, channels)`` of ``"train"``, ``"val"`` and ``"test"``.
        labels: Their labels.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        *,
        pool: int = 1,
        sensors: Literal["pixels", "radon"] = "pixels",
        share: float = 0.1,
        targets: int | None = None,
        angles: int = 8,
        target_angles: int = 24,
        batch_size: int = 32,
        batches: int = 100,
        validation: int = 100,
        tests: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        bad = [f"share of {share}"] if not 0 < share <= 1 else []
        bad += [f"sensors {sensors!r}"] if sensors not in {"pixels", "radon"} else []
        if target_angles % angles:
            bad.append(f"target_angles of {target_angles}, no multiple of {angles}")
        if bad:
            raise ZooError(message("Pixels: wrong options", got=bad))
        self.dataset, self.root, self.pool, self.sensors = dataset, root, pool, sensors
        self.share, self.targets = share, targets
        self.angles, self.target_angles = angles, target_angles
        self.batch_size, self.batches = batch_size, batches
        self.validation, self.tests, self.seed = validation, tests, seed
        self.parts: dict[str, Tensor] = {}
        self.labels: dict[str, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads the images, once.

        Args:
            stage: Not used.
        """
        del stage
        if self.parts:
            return
        data = images(self.dataset, None if self.root is None else Path(self.root))
        train, test = (self._pixels(x) for x in (data.train_x, data.test_x))
        self.size = round(train.shape[1] ** 0.5)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
        rows = {"val": order[: self.validation], "train": order[self.validation :]}
        self.parts = {name: train[r] for name, r in rows.items()} | {"test": test[: self.tests]}
        self.labels = {name: data.train_y[r] for name, r in rows.items()}
        self.labels["test"] = data.test_y[: self.tests]
        self.grid = grid(self.size, self.size)
        if self.sensors == "radon":
            angles = torch.arange(self.target_angles) * (torch.pi / self.target_angles)
            self.lines = radon(self.size, angles)
            every = torch.arange(self.target_angles * self.size).view(self.target_angles, -1)
            some = every[:: self.target_angles // self.angles].flatten()
            places, matrix = self.lines.places[some], self.lines.matrix[some]
            self.few = RadonSensors(self.lines.coordinates, places, matrix)

    def _pixels(self, x: Tensor) -> Tensor:
        """From 0 to 1, ``(n, points, channels)``."""
        x = (x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)).float() / 255
        return F.avg_pool2d(x, self.pool).flatten(2).mT.contiguous()

    def observed(self, part: str, rows: Tensor, generator: torch.Generator) -> Observed:
        """Images and readings.

        Args:
            part: ``"train"``, ``"val"`` or ``"test"``.
            rows: Which images, ``(B,)``.
            generator: Decides which pixels are read.

        Returns:
            The batch; outside of training, all pixels or projections are targets.
        """
        shown = self.parts[part][rows]
        if self.sensors == "radon":
            few, lines = self.few(shown), self.lines(shown)
            return Observed(shown, self.grid, self.few, few, self.lines, lines)
        points = shown.shape[1]
        count = max(1, round(self.share * points))
        order = torch.rand(len(rows), points, generator=generator).argsort(1)
        context, readings = self._read(shown, order[:, :count])
        if part != "train" or self.targets is None:
            return Observed(shown, self.grid, context, readings, PixelSensors(self.grid), shown)
        others = torch.rand(len(rows), points, generator=generator).argsort(1)
        target, target_readings = self._read(shown, others[:, : self.targets])
        return Observed(shown, self.grid, context, readings, target, target_readings)

    def _read(self, shown: Tensor, index: Tensor) -> tuple[PixelSensors, Tensor]:
        readings = shown.gather(1, index[..., None].expand(-1, -1, shown.shape[-1]))
        return PixelSensors(self.grid[index]), readings

    def train_dataloader(self) -> Any:
        """Random images, other ones in every epoch."""
        count = len(self.parts["train"])
        drawn = _Draw(count, min(self.batch_size, count), self.batches, self.seed)
        return DataLoader(_Batches(self, "train"), batch_size=None, sampler=drawn)

    def val_dataloader(self) -> Any:
        """Validation images in order, always with the same sensors."""
        return self._in_order("val")

    def test_dataloader(self) -> Any:
        """Test images in order, always with the same sensors."""
        return self._in_order("test")

    def _in_order(self, part: str) -> Any:
        rows = torch.arange(len(self.parts[part])).split(self.batch_size)
        keys = [(k, r.tolist()) for k, r in enumerate(rows)]
        return DataLoader(_Batches(self, part), batch_size=None, sampler=keys)


class _Batches(Dataset[Observed]):
    """Batches of a part by key: a number that decides sensors, and rows."""

    def __init__(self, data: Pixels, part: str) -> None:
        self.data, self.part = data, part

    def __getitem__(self, key: Any) -> Observed:
        number, rows = key
        generator = torch.Generator().manual_seed(1_000_003 * self.data.seed + number)
        return self.data.observed(self.part, torch.tensor(rows), generator)


class _Draw(Sampler[tuple[int, Sequence[int]]]):
    """Keys of random batches."""

    def __init__(self, count: int, size: int, batches: int, seed: int) -> None:
        self.count, self.size, self.batches, self.seed = count, size, batches, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, Sequence[int]]]:
        first = self.epoch * self.batches
        for number in range(first, first + self.batches):
            generator = torch.Generator().manual_seed(7_368_787 * (self.seed + 1) + number)
            rows = torch.randint(self.count, (self.size,), generator=generator)
            yield number, rows.tolist()

    def __len__(self) -> int:
        return self.batches
