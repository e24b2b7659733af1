"""`ImageData`: any image set of `datasets_zoo.images` as a Lightning data module.

Images are standardised, lie in memory and are drawn a batch at a time, so that a step of a small
network is not spent on loading. What is random depends on `seed` alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler
from torch.utils.data import TensorDataset as Tensors

from datasets_zoo.images import standardised
from wspace.errors import ZooError, message
from wspace.lit.data import stream

PARTS = ("train", "val", "test")
"""Names of the parts of a data set."""


class ImageData(LightningDataModule):
    """Images and labels in batches ``(x, y)``: float32 ``(n, channels, height, width)``, int64.

    Args:
        name: A data set of `datasets_zoo.images`.
        root: Where it lies; see there.
        batch_size: Images in a training batch.
        validation: Training images that are put aside: a number, or a share below 1.
        limit: Training images that are used of the rest; None for all.
        pad: Zeros at each side, out of which a random crop of the old size is cut; training only.
        flip: Whether half of the training images are mirrored.
        seed: Of which images are put aside, of batches, crops and mirrors.

    Attributes:
        parts: Images and labels of ``"train"``, ``"val"`` and ``"test"``; filled by `setup`.

    Example:
        >>> data = ImageData("digits", batch_size=32, validation=97)
        >>> data.setup("fit")
        >>> {part: len(y) for part, (x, y) in data.parts.items()}
        {'train': 1200, 'val': 97, 'test': 500}
    """

    def __init__(
        self,
        name: str = "mnist",
        root: str | None = None,
        *,
        batch_size: int = 128,
        validation: float = 0.1,
        limit: int | None = None,
        pad: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.root = name, None if root is None else Path(root)
        self.batch_size, self.validation, self.limit = batch_size, validation, limit
        self.pad, self.flip, self.seed = pad, flip, seed
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Reads the images, once.

        Args:
            stage: Any of Lightning's stages; all parts are read.

        Raises:
            ZooError: If there are not so many images.
        """
        del stage
        if self.parts:
            return
        data = standardised(self.dataset, self.root)
        aside = counted(self.validation, len(data.train_y))
        drawn = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(data.train_y), generator=drawn)
        kept = order[aside:]
        if self.limit is not None:
            if not 0 < self.limit <= len(kept):
                raise ZooError(
                    message(
                        f"ImageData: limit of {self.dataset}",
                        expected=f"1 to {len(kept)} images",
                        got=str(self.limit),
                    )
                )
            kept = kept[: self.limit]
        rows = {"train": kept, "val": order[:aside]}
        self.parts = {part: (data.train_x[i], data.train_y[i]) for part, i in rows.items()}
        self.parts["test"] = (data.test_x, data.test_y)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, shuffled; the last one may be smaller."""
        return batches(self.parts["train"], self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """What was put aside, in batches of 1,000."""
        return batches(self.parts["val"], 1000)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test images, in batches of 1,000."""
        return batches(self.parts["test"], 1000)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Crops and mirrors images of a training batch."""
        del dataloader_idx
        if self.trainer is None or not self.trainer.training or not (self.pad or self.flip):
            return batch
        x, y = batch
        drawn = stream(self.seed, 1, self.trainer.global_step)  # so that a resumed run goes on
        return moved_about(x, self.pad, flip=self.flip, generator=drawn), y


def counted(amount: float, whole: int) -> int:
    """A number of images: as it is, or as a share of all if it is below 1.

    Args:
        amount: A number or a share.
        whole: All images.

    Returns:
        The number.

    Raises:
        ZooError: If it is negative, or leaves no image.
    """
    number = round(amount * whole) if amount < 1 else int(amount)
    if amount < 0 or number >= whole:
        raise ZooError(
            message(
                "images put aside for validation",
                expected=f"a share from 0 to 1, or a number below {whole}",
                got=str(amount),
            )
        )
    return number


class _Shuffled(Sampler[int]):
    """Rows in an order of their own in every epoch, which Lightning says by `set_epoch`."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.count, generator=stream(self.seed, 0, self.epoch)).tolist()


class _Grouped(BatchSampler):
    """Batches of rows; passes the epoch on."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.sampler, _Shuffled):
            self.sampler.set_epoch(epoch)


def batches(parts: Sequence[Tensor], size: int, seed: int | None = None) -> DataLoader[Any]:
    """A loader that indexes tensors a batch at a time.

    Args:
        parts: Tensors of one length.
        size: Rows in a batch; the last may have fewer.
        seed: Of the orders, one for every epoch; None for the given order.

    Returns:
        The loader; its batches are lists of tensors.
    """
    data = Tensors(*parts)
    order = SequentialSampler(data) if seed is None else _Shuffled(len(data), seed)
    return DataLoader(data, batch_size=None, sampler=_Grouped(order, size, drop_last=False))


def moved_about(
    x: Tensor, pad: int, *, flip: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Images cut at random places out of a frame of zeros, half of them mirrored if asked.

    Args:
        x: ``(n, channels, height, width)``.
        pad: Width of the frame.
        flip: Whether to mirror.
        generator: Random numbers, on the CPU.

    Returns:
        Images of the same shape.

    Example:
        >>> x = torch.ones(2, 1, 3, 3)
        >>> moved_about(x, 0).equal(x), moved_about(x, 1).shape
        (True, torch.Size([2, 1, 3, 3]))
    """
    n, _, height, width = x.shape
    columns = torch.arange(width).repeat(n, 1)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    down, right = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + down).to(x.device)
    columns = (columns + right).to(x.device)
    framed = torch.nn.functional.pad(x, (pad,) * 4)
    which = torch.arange(n, device=x.device)[:, None, None]
    return framed.movedim(1, 3)[which, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
