"""`ZooDataModule`: batches of the networks of a zoo, by weight space, for one or several processes.

Owns which networks are trained on, in which order, and what is done to them on the way; reading is
`wspace.zoo`'s. A batch is one `ZooBatch`. Batches are gathered from memory maps, so no worker
processes are needed. Nothing here draws from the global generators: the order depends on the seed
and the epoch, augmentations also on the rows of the batch.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from wspace.augment import Augment, augmented
from wspace.errors import ZooError, message
from wspace.graph import ParameterGraph
from wspace.zoo import Zoo, ZooBatch
from wspace.zoo import open as open_zoo
from wspace.zoo.split import PARTS
from wspace.zoo.table import check_values


def stream(*numbers: int) -> torch.Generator:
    """A generator that depends on some whole numbers and on nothing else.

    Not that of a cohort (`wspace.zoo.generator_of`): what is drawn from it is in no file.

    Args:
        numbers: A seed, and what tells apart what is drawn with it.

    Returns:
        A fresh generator on the CPU.
    """
    seed = 0
    for n in numbers:
        seed = (seed * 6364136223846793005 + n + 1442695040888963407) % (1 << 63)
    return torch.Generator().manual_seed(seed)


class SpaceBatches(DistributedSampler[Any]):
    """Rows of every batch of one process: by default of one weight space, shuffled every epoch.

    The rows of a space are cut into batches of as equal a size as possible. Processes get different
    batches, as many each; together they see every row once. Where the number of batches cannot be
    shared, larger batches are cut again.

    Args:
        kind: Which weight space each row is of, ``(rows,)``.
        size: Rows in a batch at most.
        mixed: True to draw rows of any space into a batch.
        shuffle: Whether rows and batches are shuffled; `set_epoch` says with which seed.
        seed: First part of the seed.
        share: This process and the number of processes.

    Raises:
        ZooError: If there are fewer rows than processes, or too few of every space to share.
    """

    def __init__(
        self,
        kind: Sequence[int] | np.ndarray,
        size: int,
        *,
        mixed: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        rank, world = share
        super().__init__(
            cast(Any, range(len(kind))), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed
        )
        kind = np.zeros(len(kind), int) if mixed else np.asarray(kind)
        self.spaces = [torch.from_numpy(np.flatnonzero(kind == k)) for k in np.unique(kind)]
        self.counts = _counts([len(rows) for rows in self.spaces], size, world)

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of each batch of this process in this epoch."""
        if not self.shuffle:
            batches = [b for rows, n in self._cuts() for b in rows.tensor_split(n)]
        else:
            g = stream(self.seed, self.epoch)
            batches = [
                b
                for rows, n in self._cuts()
                for b in rows[torch.randperm(len(rows), generator=g)].tensor_split(n)
            ]
            batches = [batches[i] for i in torch.randperm(len(batches), generator=g).tolist()]
        for batch in batches[self.rank :: self.num_replicas]:
            yield batch.tolist()

    def _cuts(self) -> Iterator[tuple[Tensor, int]]:
        return zip(self.spaces, self.counts, strict=True)

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return sum(self.counts) // self.num_replicas


def _counts(rows: Sequence[int], size: int, world: int) -> list[int]:
    """Batches of every space: no more rows than `size` in one, and a multiple of `world` in all."""
    if sum(rows) < world:
        raise ZooError(
            message(
                f"data: {sum(rows)} networks for {world} processes",
                help="use fewer devices, or a larger zoo",
            )
        )
    counts = [-(-n // size) for n in rows]
    while sum(counts) % world:
        largest = max(range(len(rows)), key=lambda i: rows[i] / counts[i])
        if counts[largest] == rows[largest]:
            text = f"data: {sum(rows)} networks of {len(rows)} architectures for {world} processes"
            raise ZooError(message(text, help="use fewer devices, or mixed: true"))
        counts[largest] += 1
    return counts


class Carried:
    """A batch on its way to a device, which no one takes apart (mixed precision would, and fail).

    Attributes:
        batch: The batch.
    """

    def __init__(self, batch: ZooBatch) -> None:
        self.batch = batch

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The batch on a device."""
        return type(self)(self.batch.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """The batch in pinned memory."""
        return type(self)(self.batch.pin_memory())


class _Rows(Dataset[Any]):
    """Batches of a zoo by their rows; in a loader process, as what can be sent."""

    def __init__(self, zoo: Zoo, time: int | None) -> None:
        self.zoo, self.time = zoo, time

    def __getitem__(self, rows: Sequence[int]) -> Any:
        batch = self.batch(rows)
        if get_worker_info() is None:
            return Carried(batch)
        spaces = self.zoo.spaces
        parts = [(spaces.index(g.space), dict(g.values), dict(g.rest)) for g in batch.graphs]
        return parts, batch.table, batch.index

    def batch(self, rows: Sequence[int]) -> ZooBatch:
        """Networks and their table."""
        return self.zoo.batch(rows, time=None if self.zoo.steps is None else self.time)

    def received(self, sent: Any) -> Carried:
        """The batch that a loader process sent."""
        if isinstance(sent, Carried):
            return sent
        parts, table, index = sent
        graphs = [
            ParameterGraph(self.zoo.spaces[k], MappingProxyType(values), MappingProxyType(rest))
            for k, values, rest in parts
        ]
        return Carried(ZooBatch(graphs, table, index))

    def __len__(self) -> int:
        return len(self.zoo)


class _Loader(DataLoader[Carried]):
    """A loader that goes on in the middle of an epoch after its state was loaded."""

    start = 0
    taken = 0

    def __iter__(self) -> Generator[Carried]:  # type: ignore[override]
        """Batches, beginning where the loaded state ended; nothing is read before the first."""
        first, self.start = self.start, 0
        self.taken = first
        rows = cast(_Rows, self.dataset)
        for batch in self._from(first) if first else super().__iter__():
            self.taken += 1
            yield rows.received(batch)

    def _from(self, first: int) -> Iterator[Carried]:
        dataset = cast(Any, self.dataset)
        for rows in list(cast(SpaceBatches, self.sampler))[first:]:
            yield dataset[rows]

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch are taken."""
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Makes the next pass begin after the batches that were taken; a whole pass is none."""
        self.start = state["taken"] % max(len(self), 1)


class ZooDataModule(LightningDataModule):
    """Training, validation and test networks of a zoo.

    Args:
        path: Folder of the zoo.
        batch_size: Networks in a batch at most, in each process.
        mixed: True to draw networks of all architectures into a batch.
        fractions: Shares of networks for training, validation and test. None takes the zoo's own
            column ``split`` if it has one, else 0.8, 0.1, 0.1.
        by: Column whose values are never split, such as ``image`` where a zoo has several views.
            None takes the one that the zoo's recipe declares; ``""`` splits single networks.
        split_name: Name under which the zoo keeps the split; the options of a split that it has
            may be left out.
        split_seed: Of the split; None for that of the zoo's, or 0.
        where: Only networks whose columns have these values.
        held_out: Networks with one of these values in a column, such as ``{"family": ["vit"]}``,
            are the test networks, and no others are.
        limit: Training networks that are used; smaller choices are part of larger ones.
        time: Which state of a trajectory, for zoos that have them; the last is -1, None for all.
        augment: What is done to training networks (`wspace.augment`). Where networks are mixed,
            the batch says how (`ZooBatch.mixture`), and the task mixes its targets.
        seed: Of the choice, the order and the augmentations.
        workers: Loader processes.
        checksums: Whether to verify all shards when the zoo is opened.

    Raises:
        ZooError: If `batch_size` or `limit` is less than 1; in `setup`, if the zoo is damaged or a
            part is empty.
    """

    zoo: Zoo
    """All networks that `where` leaves."""
    parts: dict[str, Zoo]

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 128,
        mixed: bool = False,
        fractions: tuple[float, float, float] | None = None,
        by: str | None = None,
        split_name: str = "default",
        split_seed: int | None = None,
        where: dict[str, Any] | None = None,
        held_out: dict[str, list[Any]] | None = None,
        limit: int | None = None,
        time: int | None = -1,
        augment: Sequence[Augment] = (),
        seed: int = 0,
        workers: int = 0,
        checksums: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "limit": limit}.items():
            if value is not None and value < 1:
                raise ZooError(f"data: {name} is at least 1, got {value}")
        self.path, self.batch_size, self.mixed = Path(path), batch_size, mixed
        self.fractions, self.by, self.split_name = fractions, by, split_name
        self.split_seed = split_seed
        self.where, self.held_out = dict(where or {}), dict(held_out or {})
        self.limit, self.time, self.augment = limit, time, list(augment)
        self.seed, self.workers, self.checksums = seed, workers, checksums
        self.parts = {}

    def setup(self, stage: str) -> None:
        """Opens the zoo and splits it, once.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ZooError: If the zoo is damaged, or a part that the stage needs is empty.
        """
        if not self.parts:
            zoo = open_zoo(self.path, checksums=self.checksums)
            self.zoo = zoo.where(**self.where) if self.where else zoo
            self.parts = self._split()
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for part in needed:
            if not len(self.parts[part]):
                raise ZooError(
                    message(
                        f"data: {self.path} has no networks for {part}",
                        got=", ".join(f"{len(self.parts[p])} for {p}" for p in PARTS),
                        help="choose `fractions`, or another `where`, `held_out` or `limit`",
                    )
                )

    def _split(self) -> dict[str, Zoo]:
        rest = np.ones(len(self.zoo), bool)
        for name, values in self.held_out.items():
            check_values(self.zoo.column(name), values, f"data: {self.path}", name)
            rest &= ~np.isin(self.zoo.column(name), values)
        options: dict[str, Any] = {
            "by": self.by,
            "seed": self.split_seed,
            "name": self.split_name,
        }
        if self.fractions is not None:
            options |= dict(zip(PARTS, self.fractions, strict=True))
        parts = dict(self.zoo[rest].split(**options))
        if self.held_out:
            parts["test"] = self.zoo[~rest]
        if self.limit is not None and self.limit < len(parts["train"]):
            generator = stream(self.seed, 1)
            chosen = torch.randperm(len(parts["train"]), generator=generator)[: self.limit]
            parts["train"] = parts["train"][chosen.sort().values]
        return parts

    # ------------------------------------------------------------------ loaders

    def sampler(self, part: str) -> SpaceBatches:
        """The batches of this process.

        Args:
            part: ``"train"``, ``"val"``, ``"test"``, or ``"all"`` networks.

        Returns:
            The sampler.
        """
        zoo = self.zoo if part == "all" else self.parts[part]
        trainer = self.trainer
        share = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        train = part == "train"
        mixed = self.mixed and train
        return SpaceBatches(
            zoo.kind, self.batch_size, mixed=mixed, shuffle=train, seed=self.seed, share=share
        )

    def train_dataloader(self) -> DataLoader[Carried]:
        """Batches of training networks, another order in every epoch."""
        loader = self._loader("train")
        trainer: Any = self.trainer
        if trainer is not None:  # a short epoch would else leave no line in the log
            trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, len(loader)))
        return loader

    def val_dataloader(self) -> DataLoader[Carried]:
        """Batches of validation networks, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Carried]:
        """Batches of test networks, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Carried]:
        """Batches of all networks, by space; `ZooBatch.index` says which rows they are."""
        return self._loader("all")

    def _loader(self, part: str) -> _Loader:
        zoo = self.zoo if part == "all" else self.parts[part]
        return _Loader(
            _Rows(zoo, self.time),
            batch_size=None,
            sampler=self.sampler(part),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            # else a pass would draw a seed from the global generator
            generator=torch.Generator().manual_seed(self.seed),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> ZooBatch:
        """The batch itself; in training, its networks augmented."""
        del dataloader_idx
        found = batch.batch if isinstance(batch, Carried) else batch
        if self.augment and self.trainer is not None and self.trainer.training:
            graphs, mixture = augmented(found.graphs, self.augment, self.generator(found))
            if mixture is not None:
                mixture = mixture.to(found.index.device)
            return replace(found, graphs=graphs, mixture=mixture)
        return found

    def generator(self, batch: ZooBatch, salt: int = 0) -> torch.Generator:
        """A generator for a batch: the same in a run that was stopped and resumed.

        Args:
            batch: A training batch.
            salt: Tells apart what draws for one batch.

        Returns:
            A generator on the CPU that depends on the seed, the epoch and the first row of the zoo.
        """
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return stream(self.seed, epoch, int(batch.index[0]), salt)

    def networks(self, part: str, count: int, seed: int = 0) -> list[ParameterGraph]:
        """Graphs of some networks of a part, for statistics.

        Args:
            part: ``"train"``, ``"val"`` or ``"test"``.
            count: How many at most.
            seed: Of the choice.

        Returns:
            One graph for each weight space.
        """
        return self.batch(part, count, seed).graphs

    def batch(self, part: str, count: int, seed: int = 0) -> ZooBatch:
        """Some networks of a part with their table, chosen as in `networks`."""
        zoo = self.parts[part]
        rows = torch.randperm(len(zoo), generator=stream(seed, 2))[:count].sort().values
        return _Rows(zoo, self.time).batch(rows.tolist())


def column(zoo: Zoo, name: str, what: str) -> np.ndarray:
    """A numeric column of a zoo's table.

    Args:
        zoo: The zoo.
        name: Name of the column.
        what: Who asks, for the message.

    Returns:
        Its values, one for each network.

    Raises:
        ZooError: If there is no such column, or it holds text.
    """
    values = zoo.column(name)
    if values.dtype.kind not in "biuf":
        raise ZooError(
            message(
                f"{what}: column {name!r} holds text",
                expected="numbers",
                got=", ".join(map(repr, np.unique(values)[:4].tolist())),
            )
        )
    return values
