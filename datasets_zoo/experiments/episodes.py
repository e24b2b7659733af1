"""Few-shot episodes with labels that mean something else in every episode.

An episode shows images with labels, then one more image, the query, whose label is asked for. Which
classes occur and which class has which label is drawn anew for every episode, so that nothing but
reading the episode tells the answer. In episodes with a switch, labels change their meaning in the
middle: every class gets another label than before.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_zoo.images import standardised
from wspace.errors import ZooError, message
from wspace.lit.data import stream

PARTS = ("train", "val", "test")


class Episode(NamedTuple):
    """A batch of episodes of one length.

    Attributes:
        images: ``(B, T, channels, height, width)``; the query is last.
        labels: Labels shown, ``(B, T)``; 0 for the query.
        target: Label of the query, ``(B,)``.
        classes: Class that has each label at the end of the episode, ``(B, ways)``.
        held_out: Whether the classes never occur in training, ``(B,)``.
    """

    images: Tensor
    labels: Tensor
    target: Tensor
    classes: Tensor
    held_out: Tensor


class Plan(NamedTuple):
    """How episodes are drawn.

    Attributes:
        ways: Classes in an episode.
        before: Examples of each class before the switch.
        after: Examples of each class after it; with 0 nothing switches.
        permute: Whether labels are drawn anew; else the classes of an episode are numbered in
            order.
    """

    ways: int
    before: int
    after: int = 0
    permute: bool = True


class Pool:
    """Images of some classes.

    Args:
        images: ``(N, channels, height, width)``.
        labels: Their classes, ``(N,)``.
        classes: Classes that are used.

    Raises:
        ZooError: If a class has no images.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[int]) -> None:
        self.images = images
        self.classes = torch.tensor(sorted(classes))
        self.rows = labels.argsort(stable=True)
        counts = labels.bincount(minlength=int(self.classes.max()) + 1)
        self.counts, self.first = counts[self.classes], (counts.cumsum(0) - counts)[self.classes]
        if not bool(self.counts.all()):
            none = self.classes[self.counts == 0].tolist()
            raise ZooError(message("episodes: classes without images", got=str(none)))

    def check(self, plan: Plan) -> None:
        """Sees whether there are classes and images enough.

        Args:
            plan: How episodes are drawn.

        Raises:
            ZooError: If there are not.
        """
        ways, needed = len(self.classes), plan.before + plan.after + 1
        bad = [f"{plan.ways} ways of {ways} classes"] if plan.ways > ways else []
        few = self.classes[self.counts < needed].tolist()
        bad += [f"{needed} different images of classes {few}, which have fewer"] if few else []
        if bad:
            raise ZooError(message("episodes: too few to choose from", got=bad))

    def draw(self, plan: Plan, size: int, generator: torch.Generator) -> Episode:
        """Episodes; all images of an episode are different.

        Args:
            plan: How they are drawn.
            size: How many.
            generator: Source of randomness.

        Returns:
            A batch, its `held_out` False.

        Raises:
            ZooError: If there are too few classes or images.
        """
        self.check(plan)
        ways, shots = plan.ways, plan.before + plan.after
        kinds = torch.rand(size, len(self.classes), generator=generator).argsort(1)[:, :ways]
        kinds = kinds if plan.permute else kinds.sort(1).values
        picked = distinct(self.counts[kinds], shots + 1, generator)  # (B, ways, shots + 1)
        rows = self.rows[self.first[kinds][..., None] + picked]
        label = torch.arange(ways).expand(size, ways)
        step = torch.randint(1, max(ways, 2), (size, 1), generator=generator)
        switched = (label + step) % ways if plan.after else label
        asked = torch.randint(ways, (size, 1), generator=generator)
        parts: list[tuple[Tensor, Tensor]] = []
        spans = ((slice(0, plan.before), label), (slice(plan.before, shots), switched))
        for span, named in spans:
            part = rows[..., span]
            order = torch.rand(size, part[0].numel(), generator=generator).argsort(1)
            shown = named[..., None].expand_as(part).flatten(1)
            parts.append((part.flatten(1).gather(1, order), shown.gather(1, order)))
        query = rows[..., -1].gather(1, asked)
        return Episode(
            self.images[torch.cat([*(p[0] for p in parts), query], 1)],
            torch.cat([*(p[1] for p in parts), torch.zeros_like(asked)], 1),
            switched.gather(1, asked)[:, 0],
            self.classes[kinds].gather(1, switched.argsort(1)),
            torch.zeros(size, dtype=torch.bool),
        )


def distinct(counts: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Different whole numbers below a bound, uniformly; many draws at once.

    Args:
        counts: Bounds, int64 of any shape, none below `number`.
        number: How many for each bound.
        generator: Source of randomness.

    Returns:
        ``(*counts.shape, number)``, in the order in which they were drawn.
    """
    drawn: list[Tensor] = []
    for i in range(number):
        left = counts - i  # the i-th of those that are not yet drawn
        new = (torch.rand(counts.shape, generator=generator, dtype=torch.float64) * left).long()
        if drawn:
            for known in torch.stack(drawn).sort(0).values:
                new = new + (new >= known)
        drawn.append(new)
    return torch.stack(drawn, -1)


class _Batches(Dataset[Episode]):
    """Batches by what tells them apart, which are the numbers of a random stream."""

    def __init__(self, data: "Episodes", part: str) -> None:
        self.data, self.part = data, part

    def __getitem__(self, place: tuple[int, int]) -> Episode:
        return self.data.batch(self.part, *place)


class _Places(Sampler[tuple[int, int]]):
    """Epoch and number of every batch; Lightning calls `set_epoch`."""

    def __init__(self, number: int) -> None:
        self.number, self.epoch = number, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for i in range(self.number):  # lazily: Lightning sets the epoch after it asks for this
            yield self.epoch, i

    def __len__(self) -> int:
        return self.number


class Episodes(LightningDataModule):
    """Label-binding episodes from a data set of images.

    Training and validation episodes are of the seen classes, from training images (a tenth of them
    is put aside for validation). Test episodes are of test images: one half of the batches has the
    held-out classes, the other the seen ones; `Episode.held_out` tells them apart. A batch depends
    on the seed, its part, the epoch (in training) and its number, and on nothing else.

    Args:
        data: Name of the data set, as for `datasets_zoo.images.images`.
        root: Where it lies; by default as there.
        ways: Classes in an episode.
        shots: Examples of each class.
        held_out: Classes for testing only, at least as many as ways.
        switch: Examples of each class after labels changed their meaning; 0 for no change. In
            training both numbers are drawn for every batch: 1 … `shots` before, 0 … `switch` after.
        pool: Side of the squares of pixels that are averaged.
        permute: False for a control: classes keep their order, so that what is learned over
            episodes helps.
        batch_size: Episodes in a batch.
        batches: Training batches in an epoch.
        eval_batches: Validation batches, and test batches of either kind.
        seed: Of all that is drawn.

    Raises:
        ZooError: If a number is too small; in `setup`, if there are too few classes or images.
    """

    def __init__(
        self,
        data: str = "digits",
        root: str | Path | None = None,
        *,
        ways: int = 3,
        shots: int = 5,
        held_out: Sequence[int] = (7, 8, 9),
        switch: int = 0,
        pool: int = 1,
        permute: bool = True,
        batch_size: int = 32,
        batches: int = 500,
        eval_batches: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        numbers = {"ways": ways, "shots": shots, "pool": pool, "batch_size": batch_size}
        numbers |= {"batches": batches, "eval_batches": eval_batches, "switch": switch + 1}
        bad = [f"{name} {value}" for name, value in numbers.items() if value < 1]
        if bad or (switch and ways < 2):
            raise ZooError(message("episodes: numbers are too small", got=bad or "a switch of one"))
        self.data, self.root, self.held_out = data, root, tuple(held_out)
        self.plan = Plan(ways, shots, switch, permute)
        self.pool, self.batch_size, self.seed = pool, batch_size, seed
        self.batches, self.eval_batches = batches, eval_batches
        self.pools: dict[str, Pool] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads the images, once.

        Args:
            stage: Not used.

        Raises:
            ZooError: If there are too few classes or images.
        """
        del stage
        if self.pools:
            return
        whole = standardised(self.data, self.root)
        train, test = (F.avg_pool2d(x, self.pool) for x in (whole.train_x, whole.test_x))
        every = set(whole.train_y.tolist())
        if not set(self.held_out) < every:
            got = str(sorted(self.held_out))
            expected = f"some, not all, of {sorted(every)}"
            raise ZooError(message("episodes: held-out classes", expected=expected, got=got))
        seen = sorted(every - set(self.held_out))
        order = torch.randperm(len(train), generator=stream(0, len(train)))
        aside, rest = order.tensor_split([len(order) // 10])
        pools = {
            "train": Pool(train[rest], whole.train_y[rest], seen),
            "val": Pool(train[aside], whole.train_y[aside], seen),
            "test": Pool(test, whole.test_y, seen),
        }
        if self.held_out:
            pools["held_out"] = Pool(test, whole.test_y, self.held_out)
        for pool in pools.values():
            pool.check(self.plan)
        self.pools = pools

    def batch(self, part: str, epoch: int, number: int) -> Episode:
        """One batch.

        Args:
            part: ``"train"``, ``"val"`` or ``"test"``.
            epoch: Number of the epoch; validation and test batches are those of epoch 0.
            number: Number of the batch.

        Returns:
            Episodes.
        """
        generator = stream(self.seed, PARTS.index(part), epoch, number)
        plan = self.plan
        if part == "train" and plan.after:
            before = int(torch.randint(1, plan.before + 1, (), generator=generator))
            after = int(torch.randint(plan.after + 1, (), generator=generator))
            plan = plan._replace(before=before, after=after)
        held = part == "test" and bool(self.held_out) and number < self.eval_batches
        drawn = self.pools["held_out" if held else part].draw(plan, self.batch_size, generator)
        return drawn._replace(held_out=torch.full_like(drawn.held_out, held))

    def train_dataloader(self) -> DataLoader[Any]:
        """Other episodes in every epoch."""
        return self._loader("train", self.batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """The same episodes of the seen classes every time."""
        return self._loader("val", self.eval_batches)

    def test_dataloader(self) -> DataLoader[Any]:
        """Episodes of the held-out classes, then of the seen ones."""
        return self._loader("test", self.eval_batches * (1 + bool(self.held_out)))

    def _loader(self, part: str, number: int) -> DataLoader[Any]:
        # without its own generator a pass would draw a seed from the global one
        drawn = torch.Generator().manual_seed(self.seed)
        places: Any = _Places(number)
        return DataLoader(_Batches(self, part), batch_size=None, sampler=places, generator=drawn)
