"""`SplitTasks`: tasks that come one after another, cut out of one set of images.

``split``: each task has a few of the classes. ``permuted``: each task has all classes, and the
pixels of its images in an order of its own (the first task's as they are).

An epoch is a number of batches of one task, and the sampler, which Lightning tells the epoch, says
of which. So tasks change at epochs, also in a run that was interrupted and goes on.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from datasets_zoo.experiments.images import counted
from datasets_zoo.images import standardised
from wspace.errors import ZooError, message

KINDS = ("split", "permuted")
"""How tasks are made."""

Place = tuple[int, Sequence[int]]
"""A batch before it is read: its task, and rows of that task."""


class SplitTasks(LightningDataModule):
    """Tasks in a sequence: batches ``(x, y, task)``, all images of a batch of one task.

    Labels are those of the network's outputs: with ``split`` task t has the labels ``t c …
    t c + c - 1``, c classes each; with ``permuted`` all tasks have all of them.

    Args:
        name: A data set of `datasets_zoo.images`.
        root: Where it lies; see there.
        kind: ``"split"`` or ``"permuted"``.
        tasks: How many; with ``split`` they share out the classes evenly.
        order: Classes in the order in which tasks get them; None for 0, 1, 2 …
        steps: Batches in an epoch.
        epochs: Epochs of a task, one after another.
        joint: Whether tasks take turns, batch by batch, instead: the bound that no sequence beats.
        batch_size: Images in a training batch.
        validation: Training images of each task that are put aside, a number or a share. With 0
            the test images are validated on, so that accuracies after each task are those that are
            published; then choose nothing by them.
        seed: Of what is put aside, of batches, and of pixels' orders.

    Raises:
        ZooError: If an option makes no sense.

    Attributes:
        parts: Images and labels of every task, by ``"train"``, ``"val"`` and ``"test"``.
        classes: Labels of every task.

    Example:
        >>> data = SplitTasks("digits", steps=10)
        >>> data.setup("fit")
        >>> data.classes
        [range(0, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 10)]
    """

    def __init__(
        self,
        name: str = "mnist",
        root: str | None = None,
        *,
        kind: str = "split",
        tasks: int = 5,
        order: Sequence[int] | None = None,
        steps: int = 2000,
        epochs: int = 1,
        joint: bool = False,
        batch_size: int = 32,
        validation: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in KINDS or min(tasks, steps, epochs, batch_size) < 1:
            raise ZooError(
                message(
                    "SplitTasks: options",
                    expected=f"kind {' or '.join(KINDS)}; tasks, steps, epochs, batch_size from 1",
                    got=f"kind {kind!r}; {tasks}, {steps}, {epochs}, {batch_size}",
                )
            )
        self.dataset, self.root = name, None if root is None else Path(root)
        self.kind, self.tasks, self.order, self.joint = kind, tasks, order, joint
        self.steps, self.epochs, self.batch_size = steps, epochs, batch_size
        self.validation, self.seed = validation, seed
        self.parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.classes: list[range] = []
        self.pixels: list[Tensor | None] = []

    def setup(self, stage: str) -> None:
        """Reads the images and shares them out, once.

        Args:
            stage: Any of Lightning's stages.

        Raises:
            ZooError: If the classes cannot be shared out so.
        """
        del stage
        if self.parts:
            return
        data = standardised(self.dataset, self.root)
        number = int(data.train_y.max()) + 1
        order = torch.tensor(range(number) if self.order is None else list(self.order))
        if sorted(order.tolist()) != list(range(number)):
            raise ZooError(
                message(
                    "SplitTasks: order of classes",
                    expected=f"each of 0 … {number - 1} once",
                    got=str(order.tolist()),
                )
            )
        place = order.argsort()  # of a class among the outputs
        self.classes = self._share_out(number)
        drawn = torch.Generator().manual_seed(self.seed)
        size = data.train_x[0].numel()
        self.pixels = [
            torch.randperm(size, generator=drawn) if self.kind == "permuted" and i else None
            for i in range(self.tasks)
        ]
        whole = [
            _of(data.train_x, place[data.train_y], self.classes, drawn),
            _of(data.test_x, place[data.test_y], self.classes),
        ]
        train, test = whole
        aside = [counted(self.validation, len(y)) for _, y in train]
        self.parts = {
            "train": [(x[n:], y[n:]) for (x, y), n in zip(train, aside, strict=True)],
            "val": [(x[:n], y[:n]) for (x, y), n in zip(train, aside, strict=True)],
            "test": test,
        }
        if not self.validation:
            self.parts["val"] = test

    def _share_out(self, number: int) -> list[range]:
        if self.kind == "permuted":
            return [range(number)] * self.tasks
        if number % self.tasks:
            raise ZooError(
                message(
                    f"SplitTasks: {number} classes of {self.dataset} in {self.tasks} tasks",
                    expected="a number of tasks that divides them",
                )
            )
        each = number // self.tasks
        return [range(i * each, (i + 1) * each) for i in range(self.tasks)]

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the epoch's task; of all tasks in turn if `joint`."""
        sizes = [len(y) for _, y in self.parts["train"]]
        sampler = TaskBatches(
            sizes, self.batch_size, self.steps, self.epochs, joint=self.joint, seed=self.seed
        )
        data = Tasks(self.parts["train"], self.pixels)
        return DataLoader(data, batch_size=None, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each task."""
        return self._loaders("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each task."""
        return self._loaders("test")

    def _loaders(self, part: str) -> list[DataLoader[Any]]:
        data = Tasks(self.parts[part], self.pixels)
        return [
            DataLoader(data, batch_size=None, sampler=_InOrder(i, len(y), 1000))
            for i, (_, y) in enumerate(self.parts[part])
        ]


class Tasks(Dataset[tuple[Tensor, Tensor, int]]):
    """Images of several tasks; a task and rows of it give a batch.

    Args:
        parts: Images and labels of every task.
        pixels: Orders of pixels; None for images as they are.
    """

    def __init__(
        self, parts: Sequence[tuple[Tensor, Tensor]], pixels: Sequence[Tensor | None]
    ) -> None:
        self.parts, self.pixels = parts, pixels

    def __getitem__(self, place: Place) -> tuple[Tensor, Tensor, int]:
        task, rows = place
        x, y = (part[rows] for part in self.parts[task])
        order = self.pixels[task]
        if order is not None:
            x = x.flatten(1)[:, order].view_as(x)
        return x, y, task


class TaskBatches(Sampler[Place]):
    """Rows of tasks, batch by batch: every image of a task once, then all again in a new order.

    Args:
        sizes: Images of every task.
        batch_size: Rows in a batch, or all of a smaller task's.
        steps: Batches in an epoch.
        epochs: Epochs of a task.
        joint: Whether tasks take turns.
        seed: Of the orders.

    Example:
        >>> sampler = TaskBatches([5, 4], 2, steps=3)
        >>> sampler.set_epoch(1)
        >>> [task for task, rows in sampler]
        [1, 1, 1]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        steps: int,
        epochs: int = 1,
        *,
        joint: bool = False,
        seed: int = 0,
    ) -> None:
        self.sizes, self.batch_size, self.steps = tuple(sizes), batch_size, steps
        self.epochs, self.joint, self.seed, self.epoch = epochs, joint, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes; Lightning calls it.

        Args:
            epoch: From 0.
        """
        self.epoch = epoch

    def task(self, epoch: int) -> int:
        """The task of an epoch; the last one's for later epochs."""
        return min(epoch // self.epochs, len(self.sizes) - 1)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Place]:
        drawn = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        tasks = range(len(self.sizes)) if self.joint else [self.task(self.epoch)]
        rows = {i: _endless(self.sizes[i], self.batch_size, drawn) for i in tasks}
        for step in range(self.steps):
            task = tasks[step % len(tasks)]
            yield task, next(rows[task])


class _InOrder(Sampler[Place]):
    """All rows of one task in batches."""

    def __init__(self, task: int, size: int, batch_size: int) -> None:
        self.task = task
        self.rows = BatchSampler(SequentialSampler(range(size)), batch_size, drop_last=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Place]:
        return ((self.task, rows) for rows in self.rows)


def _endless(size: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of one size without end; what is left of an order is dropped."""
    batch_size = min(size, batch_size)
    while True:
        order = torch.randperm(size, generator=generator)
        for start in range(0, size - batch_size + 1, batch_size):
            yield order[start : start + batch_size].tolist()


def _of(
    x: Tensor, y: Tensor, classes: Sequence[range], generator: torch.Generator | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of every task, shuffled if there is a generator."""
    found: list[tuple[Tensor, Tensor]] = []
    shared: dict[range, tuple[Tensor, Tensor]] = {}
    for those in classes:
        if those not in shared:
            rows = torch.nonzero((y >= those.start) & (y < those.stop))[:, 0]
            if generator is not None:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            shared[those] = (x[rows], y[rows])
        found.append(shared[those])
    return found
