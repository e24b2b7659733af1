"""`Clients`: an image data set cut up among clients that each know a few of its classes.

Two ways to cut. With `classes_per_client` = k, every client has k classes, chosen so that all
classes are about equally often taken, and of each class it takes a share in proportion to a number
from U(0.4, 0.6), as Shamsian et al. (2021, arXiv 2103.04628) do. With `alpha`, the shares of client
i in the classes are in proportion to a draw from Dirichlet(alpha, …). Images of a class are divided
among all clients, those that take part in training and those that do not; no image has two owners.
Test images of the data set are divided in the same proportions as training images.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_zoo.images import standardised
from wspace.errors import ZooError, message
from wspace.hyper.federated import Client, Examples


class Clients(LightningDataModule):
    """Clients, and rounds of training. A batch is the numbers of the clients of a round, ``(B,)``.

    Args:
        dataset: Images, as for `datasets_zoo.images.images`.
        root: Where they lie; see there.
        pool: Side of the squares of pixels that are averaged; 1 for images as they are.
        seen: Clients that take part in training: numbers 0 … seen - 1.
        unseen: Clients that do not: numbers seen … seen + unseen - 1.
        classes_per_client: Classes that a client has, if `alpha` is None.
        alpha: Concentration of the Dirichlet distribution; small for clients that differ a lot.
        examples: Training and validation images of a client at most; None for no bound.
        validation: Share of them that is for validation.
        per_round: Clients in a round, drawn without replacement.
        rounds: Rounds in an epoch.
        seed: Decides who has what, and who is in which round.

    Attributes:
        clients: All clients, once set up.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        *,
        pool: int = 1,
        seen: int = 20,
        unseen: int = 5,
        classes_per_client: int = 2,
        alpha: float | None = None,
        examples: int | None = None,
        validation: float = 0.2,
        per_round: int = 5,
        rounds: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < per_round <= seen:
            raise ZooError(
                message(
                    "Clients: a round needs clients",
                    expected=f"per_round between 1 and {seen}",
                    got=str(per_round),
                )
            )
        self.dataset, self.root, self.pool = dataset, root, pool
        self.seen, self.unseen = seen, unseen
        self.classes_per_client, self.alpha = classes_per_client, alpha
        self.examples, self.validation = examples, validation
        self.per_round, self.rounds, self.seed = per_round, rounds, seed
        self.clients: list[Client] = []

    def setup(self, stage: str | None = None) -> None:
        """Divides the images, once.

        Args:
            stage: Not used.

        Raises:
            ZooError: If a client would have no images for one of its parts.
        """
        del stage
        if self.clients:
            return
        data = standardised(self.dataset, None if self.root is None else Path(self.root))
        generator = torch.Generator().manual_seed(self.seed)
        classes, count = int(data.train_y.max()) + 1, self.seen + self.unseen
        shares = self._shares(count, classes, generator)
        train = _divided(data.train_y, shares, generator)
        test = _divided(data.test_y, shares, generator)
        bad: list[str] = []
        for i, (mine, tests) in enumerate(zip(train, test, strict=True)):
            rows = mine[: self.examples]
            held = round(self.validation * len(rows))
            if min(held, len(rows) - held, len(tests)) < 1:
                bad.append(f"client {i}: {len(rows)} training images, {len(tests)} test images")
                continue
            parts = [(data.train_x, data.train_y, rows[held:])]
            parts += [(data.train_x, data.train_y, rows[:held])]
            parts += [(data.test_x, data.test_y, tests)]
            examples = [Examples(F.avg_pool2d(x[r], self.pool), y[r]) for x, y, r in parts]
            self.clients.append(Client(*examples))
        if bad:
            self.clients = []
            raise ZooError(
                message(
                    f"Clients: {self.dataset} has too few images",
                    expected="images of every part for every client",
                    got=bad,
                    help="ask for fewer clients, or a larger alpha",
                )
            )

    def _shares(self, count: int, classes: int, generator: torch.Generator) -> Tensor:
        """What part of every class each client asks for, ``(clients, classes)``."""
        if self.alpha is not None:
            number = int(torch.randint(2**62, (1,), generator=generator))
            drawn = np.random.default_rng(number).dirichlet([self.alpha] * classes, count)
            return torch.from_numpy(drawn)
        if not 0 < self.classes_per_client <= classes:
            raise ZooError(
                message(
                    "Clients: classes_per_client does not fit the data set",
                    expected=f"between 1 and {classes}",
                    got=str(self.classes_per_client),
                )
            )
        shares, taken = torch.zeros(count, classes).double(), torch.zeros(classes)
        for i in range(count):
            order = taken + torch.rand(classes, generator=generator)  # the least taken, at random
            mine = order.argsort()[: self.classes_per_client]
            taken[mine] += 1
            shares[i, mine] = 0.4 + 0.2 * torch.rand(len(mine), generator=generator).double()
        return shares[torch.randperm(count, generator=generator)]

    def train_dataloader(self) -> Any:
        """Numbers of the clients of every round."""
        rounds = Rounds(self.seen, self.per_round, self.rounds, self.seed)
        return DataLoader(Numbers(), batch_size=None, sampler=rounds)

    def val_dataloader(self) -> Any:
        """One batch of all clients that take part in training."""
        return DataLoader(Numbers(), batch_size=None, sampler=[list(range(self.seen))])

    def test_dataloader(self) -> Any:
        """Clients that took part in training, then those that did not."""
        every = list(range(self.seen + self.unseen))
        parts = [every[: self.seen], every[self.seen :]]
        return [
            DataLoader(Numbers(), batch_size=None, sampler=[part]) for part in parts if len(part)
        ]


class Numbers(Dataset[Tensor]):
    """Numbers as a tensor."""

    def __getitem__(self, index: Any) -> Tensor:
        """The numbers given, int64 ``(B,)``."""
        return torch.tensor(index)


class Rounds(Sampler[list[int]]):
    """Which clients take part in the rounds of an epoch.

    Args:
        clients: How many there are.
        size: Clients in a round.
        rounds: Rounds in an epoch.
        seed: With the epoch, decides who takes part.
    """

    def __init__(self, clients: int, size: int, rounds: int, seed: int = 0) -> None:
        self.clients, self.size, self.rounds, self.seed = clients, size, rounds, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; Lightning does so.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        for _ in range(self.rounds):
            yield torch.randperm(self.clients, generator=generator)[: self.size].tolist()

    def __len__(self) -> int:
        return self.rounds


def _divided(labels: Tensor, shares: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Rows of every client, shuffled: each class divided in proportion to the shares in it."""
    owned: list[list[Tensor]] = [[] for _ in shares]
    for c, asked in enumerate(shares.T):
        rows = (labels == c).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        if not asked.sum() > 0:
            continue
        ends = (asked.cumsum(0) / asked.sum() * len(rows)).round().long()
        for mine, part in zip(owned, rows.tensor_split(ends[:-1]), strict=True):
            mine.append(part)
    found = [torch.cat(parts) for parts in owned]
    return [rows[torch.randperm(len(rows), generator=generator)] for rows in found]
